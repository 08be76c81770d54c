"""Every kernel gives a row the same bits in any batch and at any number of threads, in f32 and bf16."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tessera.kernel import Kernel
from tessera.ops import kernels, to_block_sparse
from tests.kernel.bits import ROWS, Arg, Draw, check

F32, INT8, FP8 = torch.float32, torch.int8, torch.float8_e4m3fn
D, V, N = 33, 301, 37  # width of a row, classes, columns of a product
Case = tuple[list[Any], dict[str, Any]]


def _all_kernels() -> dict[str, Kernel]:
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        space = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        found |= {name: k for name, k in space.items()
                  if isinstance(k, Kernel) and k.function.__module__ == space["__name__"]}
    return found


KERNELS = _all_kernels()


def _activations(d: Draw) -> dict[str, Case]:
    def x() -> Arg:
        return d.rows(2, D)

    out = d.out(2, D)
    return {
        "activation_kernel": ([x(), out, "gelu"], {}),
        "activation_backward_kernel": ([x(), x(), out, "silu"], {}),
        "gated_kernel": ([x(), x(), out], {}),
        "gated_packed_kernel": ([d.rows(2, 2 * D), out], {}),
        "gated_backward_kernel": ([x(), x(), x(), out, out], {}),
        "add_kernel": ([d.rows(), d.rows(), d.out()], {}),
        "rope_kernel": ([d.rows(3, 2, 10), d.whole(3, 5), d.whole(3, 5), d.out(3, 2, 10)], {}),
        "rope_interleaved_kernel": ([d.rows(3, 2, 10), d.whole(3, 5), d.whole(3, 5), d.out(3, 2, 10)], {}),
        "append_kernel": ([d.rows(2, D), d.rows(2, D), Arg(torch.tensor([3])), d.out(2, 5, D), d.out(2, 5, D)], {}),
        "attention_dropout_kernel": ([d.sum(3, 9, D), 0.25, 7, 5, 11, 50], {}),
    }


def _rows(d: Draw) -> dict[str, Case]:
    x, out, weight, grad_w = d.rows(D), d.out(D), d.whole(D), d.sum(D)
    wide, parts = d.rows(2, D), Arg(torch.zeros(5, D), None)
    seen, count = Arg(d.ints(2, 2, D).value.bool(), 0), Arg(d.rows(dtype=F32).value.abs() + 1, 0)
    return {
        "rms_norm_kernel": ([wide, weight, d.out(2, D)], {}),
        "add_rms_norm_kernel": ([wide, d.rows(2, D), weight, d.out(2, D), d.out(2, D)], {}),
        "rms_norm_backward_kernel": ([d.rows(D), x, weight, None, out, parts, grad_w], {}),
        "layer_norm_kernel": ([wide, weight, d.whole(D), d.out(2, D)], {}),
        "layer_norm_backward_kernel": ([d.rows(D), x, weight, out, parts, parts, grad_w, d.sum(D)], {}),
        "softmax_kernel": ([x, out], {}),
        "softmax_backward_kernel": ([x, d.rows(D), out], {}),
        "log_softmax_kernel": ([x, out], {}),
        "log_softmax_backward_kernel": ([x, d.rows(D), out], {}),
        "masked_mean_kernel": ([wide, seen, d.out(2, dtype=F32), d.out(2, dtype=torch.int32), d.out(),
                                d.out(dtype=F32)], {}),
        "masked_mean_backward_kernel": ([d.rows(), seen, count, d.out(2, D)], {}),
        "masked_mean_columns_kernel": ([wide, seen, None, out, d.out(D, dtype=F32)], {}),
        "masked_mean_columns_backward_kernel": (
            [x, seen, None, Arg(x.value.float().abs() + 1, 0), d.out(2, D)], {}),
        "l2_normalize_kernel": ([x, out], {}),
        "l2_normalize_backward_kernel": ([x, d.rows(D), out], {}),
    }


def _losses(d: Draw) -> dict[str, Case]:
    x, y, grad, top, spread = d.rows(V, scale=4.0), d.ints(V), *(d.rows(dtype=F32) for _ in range(3))
    return {
        "cross_entropy_kernel": ([x, y, d.out(dtype=F32)], {"smoothing": 0.1, "z_loss": 0.01}),
        "cross_entropy_backward_kernel": ([grad, x, y, top, spread, d.out(V)], {}),
        "cross_entropy_both_kernel": ([grad, x, y, d.out(dtype=F32), d.out(V)], {}),
        "logsumexp_update_kernel": ([x, y, *(d.out(dtype=F32) for _ in range(3)), 0], {}),
        "max_margin_kernel": ([x, y, d.out(dtype=F32), d.out(dtype=torch.int32), 0.5], {}),
        "max_margin_backward_kernel": ([grad, top, y, d.ints(V), d.out(V)], {}),
        "contrastive_kernel": ([d.whole(N, N), d.ints(4, N, shared=True), *(d.sum(N) for _ in range(3))], {}),
        "contrastive_backward_kernel": ([d.whole(N, dtype=F32), d.whole(N, N), d.ints(4, N, shared=True),
                                         d.whole(N, dtype=F32), d.whole(N, dtype=F32), d.sum(N, N)], {}),
    }


def _tables(d: Draw) -> dict[str, Case]:
    ids, out = d.ints(11), d.out(D)
    sparse = to_block_sparse(d.normal(11, D, dtype=F32), 0.4, block_size=4, dtype=INT8)
    blocks = [Arg(t) for t in (sparse.blocks_MRC, sparse.pointers, sparse.columns, sparse.scales)]
    scale = d.whole(11, 3, dtype=torch.float16, scale=0.1)
    return {
        "casted_embedding_kernel": ([ids, d.whole(11, D, dtype=FP8), out, 0.5], {}),
        "scaled_embedding_kernel": ([ids, d.whole(11, D, dtype=INT8, scale=40), d.whole(11, dtype=F32), out], {}),
        "embedding_backward_kernel": ([d.rows(D), ids, d.sum(11, D)], {}),
        "sparse_embedding_kernel": ([ids, *blocks, out], {}),
        "int8_group_embedding_kernel": ([ids, d.whole(11, 96, dtype=INT8, scale=40), scale, d.out(96)], {}),
        "int4_embedding_kernel": ([ids, d.ints(256, 11, 48, shared=True, dtype=torch.uint8), scale, scale, d.out(96)],
                                  {}),
    }


def _products(d: Draw) -> dict[str, Case]:
    x, w, out, k = d.rows(160), d.whole(N, 160), d.out(N), 160
    w8, scale, bias = d.whole(N, k, dtype=INT8, scale=40), d.whole(N, dtype=F32), d.whole(N, dtype=F32)
    w4 = d.ints(256, N, k // 2, shared=True, dtype=torch.uint8)
    groups = d.whole(N, k // 32, dtype=torch.float16, scale=0.1)
    turned = Arg(d.normal(k, ROWS), 1)
    return {
        "gemm_kernel": ([x, d.whole(k, N), out], {}),
        "linear_kernel": ([x, w, out, bias], {}),
        "gemm_add_kernel": ([x, d.whole(k, N), d.out(N, dtype=F32)], {}),
        "gemm_transposed_kernel": ([turned, d.whole(k, N), out], {}),
        "gemm_transposed_add_kernel": ([turned, d.whole(k, N), d.out(N, dtype=F32)], {}),
        "batched_gemm_kernel": ([d.rows(3, 40), d.rows(40, 5), d.out(3, 5)], {}),
        "casted_linear_kernel": ([x, w8, scale, out, bias], {}),
        "quantize_kernel": ([x, d.out(k, dtype=INT8), d.out(dtype=F32), d.out(dtype=INT8)], {}),
        "fake_quantize_kernel": ([x, d.out(k), "fp8_e4m3"], {}),
        "dequantize_kernel": ([d.rows(k, dtype=FP8), d.rows(dtype=F32), d.out(k)], {}),
        "dequantize_packed_kernel": ([d.ints(256, k // 2, dtype=torch.uint8), d.rows(dtype=F32), d.out(k), None, True],
                                     {}),
        "int8_product_kernel": ([d.rows(k, dtype=INT8, scale=40), d.rows(dtype=F32), w8, scale, out], {}),
        "int8_rows_kernel": ([x, w8, scale, out, bias], {}),
        "int8_linear_kernel": ([x, w8, scale, out], {}),
        "int8_group_linear_kernel": ([x, w8, groups, out, bias], {}),
        "int8_group_product_kernel": ([x, w8, groups, out, bias], {}),
        "int4_linear_kernel": ([x, w4, groups, groups, out], {}),
        "int4_product_kernel": ([x, w4, groups, groups, out], {}),
    }


def _attention(d: Draw) -> dict[str, Case]:
    def heads(n: int, s: int) -> Arg:
        return d.rows(n, s, 16)

    q, k, v, lse = heads(4, 9), heads(2, 21), heads(2, 21), d.rows(4, 9, dtype=F32)
    shared = [heads(4, 9), q, k, v, heads(4, 9), Arg(lse.value.abs() + 4, 0)]
    grad_kv = [d.out(2, 21, 16), d.out(2, 21, 16)]
    pages = [d.whole(20, 4, 2, 16), d.whole(20, 4, 2, 16)]
    lengths = Arg(torch.randint(2, 21, (ROWS,), generator=d.generator).int(), 0)
    return {
        "flash_attention_kernel": ([q, k, v, d.out(4, 9, 16), 0.25, True], {}),
        "flash_attention_backward_kernel": ([*shared, d.out(4, 9, 16, dtype=F32), *grad_kv, 0.25, True], {}),
        "flash_attention_grad_q_kernel": ([*shared, d.out(4, 9, 16), d.out(4, 9, dtype=F32), 0.25, True], {}),
        "flash_attention_grad_kv_kernel": (
            [*shared[:4], shared[5], d.rows(4, 9, dtype=F32), *grad_kv, 0.25, True], {}),
        "decode_attention_kernel": ([heads(2, 3), heads(2, 300), heads(2, 300), d.out(2, 3, 16),
                                     Arg(torch.zeros(ROWS, 2, 2, 3, 18), 0), 0.25], {}),
        "paged_attention_kernel": ([heads(2, 4), *pages, d.ints(20, 5), lengths, d.out(2, 4, 16),
                                    Arg(torch.zeros(ROWS, 2, 1, 4, 18), 0), 2, 0.25], {}),
    }


GROUPS: list[Callable[[Draw], dict[str, Case]]] = [_activations, _rows, _losses, _tables, _products, _attention]
NAMES = {name: make for make in GROUPS for name in make(Draw(F32))}


def test_no_kernel_is_left_out():
    assert set(NAMES) == set(KERNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name, dtype):
    args, options = NAMES[name](Draw(dtype))[name]
    check(KERNELS[name], [arg if isinstance(arg, Arg) else Arg(arg) for arg in args], **options)
