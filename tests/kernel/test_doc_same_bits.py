"""The kernels of the documents give a row the same bits in any batch and at any number of threads."""

from __future__ import annotations

import pytest
import torch

from tessera.kernel import Kernel

from .bits import Arg, Draw, check
from .test_doc_kernels import doc, dtypes, kernel_in

F32, INT8, FP8 = torch.float32, torch.int8, torch.float8_e4m3fn
LAYER = doc.FusedTransformerLayer(24, 3)
LENGTH = 3  # of the sequences of the fused blocks: a row here is a sequence


def cases(d: Draw) -> dict[str, list]:
    """The arguments of every kernel."""
    x, out = d.rows(33), d.out(33)
    heads, table = [d.rows(9, 16) for _ in range(3)], d.whole(40, 4, 4, dtype=FP8)
    places = [Arg(torch.arange(40).int() % 4 * 4), Arg((torch.arange(12) * 40 // 11).int()), d.whole(40, dtype=F32)]
    angles = d.normal(LENGTH, 4, dtype=F32)
    return {
        "rms_norm_kernel": [x, d.whole(33, dtype=F32), out],
        "swiglu_fused_kernel": [x, d.whole(33, 50), d.whole(33, 50), d.whole(50, 33), out, 1.5],
        "flash_attention_kernel": [*heads, d.out(9, 16), None, 0.0, True, 0.25],
        "rotary_embedding_kernel": [d.rows(3, 10), d.rows(5, dtype=F32), d.rows(5, dtype=F32), d.out(3, 10)],
        "casted_embedding_kernel": [d.ints(11), d.whole(11, 33, dtype=FP8), out, 0.5],
        "int8_linear_kernel": [d.rows(96, dtype=INT8, scale=40), d.whole(37, 96, dtype=INT8, scale=40),
                               d.whole(37, dtype=F32), d.out(37), 0.01,
                               d.whole(37, dtype=F32), 0.5],
        "sparse_embedding_kernel": [d.ints(11), table, *places, d.out(64)],
        "stable_cross_entropy_kernel": [d.rows(301), d.ints(301), d.out(dtype=F32), 301],
        "fused_softmax_cross_entropy_kernel": [d.rows(301), d.ints(301), d.out(dtype=F32), 301],
        "fused_attention_block": [d.rows(LENGTH, 24), Arg(angles.cos()), Arg(angles.sin()), None, d.out(LENGTH, 24)],
        "fused_mlp_block": [d.rows(24), d.out(24)],
    }


def kernel_of(name: str, dtype: torch.dtype):
    """A kernel; the fused blocks are methods, and take sequences as rows below each other."""
    if not name.startswith("fused_") or name.endswith("_kernel"):
        return kernel_in(getattr(doc, name), dtype)
    method = kernel_in(getattr(LAYER, name), dtype)
    return lambda *args: method(*(a.flatten(0, 1) if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in args))


def test_no_kernel_is_left_out():
    kernels = {name for space in (doc, doc.FusedTransformerLayer) for name, k in vars(space).items()
               if isinstance(k, Kernel)}
    assert set(cases(Draw(F32))) == kernels


@dtypes
@pytest.mark.parametrize("name", cases(Draw(F32)))
def test_same_bits(name, dtype):
    args = [arg if isinstance(arg, Arg) else Arg(arg) for arg in cases(Draw(dtype))[name]]
    check(kernel_of(name, dtype), args)
