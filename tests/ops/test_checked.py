"""Every public operation has annotations, `tessera check` finds no error in them, and torch.func goes through."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

from tessera import ops
from tessera.function.checker import check
from tessera.function.decorator import signature_of
from tessera.ops.table import ROWS

MODULES = sorted(m.name for m in pkgutil.iter_modules(ops.__path__) if not m.ispkg)
# What depends on numbers, or needs an object that cannot be made up.
NOT_CHECKED = {
    "cast", "casted_sparse_embedding", "dynamic_rope", "fake_quantize_rows", "quantize", "quantize_rows",
    "quantized_matmul", "split_heads", "swiglu_quantized", "to_block_sparse"}
# Annotations cannot say it: pairs that broadcast (add, matmul, whose operands may be vectors too), a result whose rank
# is that of the index (gather), two signatures (swiglu); or there are no tensors among the arguments.
PLAIN = {
    "add", "dequantize", "even_blocks", "gather", "implementation", "is_invariant", "is_quantized", "make_mask",
    "matmul", "ring_attention", "rope_frequencies", "rope_tables", "swiglu", "wants_reference"}


@pytest.mark.parametrize("module", MODULES)
def test_tessera_check_finds_nothing(module):
    report = check(f"tessera.ops.{module}")
    assert not report.errors
    functions = {f.message.partition(":")[0] for f in report.findings if not f.message.startswith("not checked: ")}
    assert functions <= NOT_CHECKED  # beside kernels that need compile-time values


def test_every_operation_is_checked():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert {name for name in functions if signature_of(getattr(ops, name)) is None} <= PLAIN


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.functions[0])
def test_usual_calls_are_decided_without_the_matcher(row, monkeypatch):
    """Its verdict is the same, and takes a hundred times as long."""
    for module in MODULES:
        for value in vars(importlib.import_module(f"tessera.ops.{module}")).values():
            if inspect.isfunction(value) and signature_of(value) is not None and "scales" not in (
                    inspect.signature(value).parameters):
                monkeypatch.setitem(value.__globals__, "_ts_match", None)
    row.sample(*(normal(*shape) for shape in row.shapes))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


WEIGHT, TABLE, TARGETS = normal(8), normal(9, 8), torch.arange(6) % 8


@pytest.mark.parametrize("function", [
    lambda x: ops.rms_norm(x, WEIGHT), lambda x: ops.layer_norm(x, WEIGHT, WEIGHT), ops.gelu, ops.softmax,
    lambda x: ops.swiglu(x, x), lambda x: ops.linear(x, TABLE), lambda x: ops.cross_entropy(x, TARGETS),
    lambda x: ops.linear_cross_entropy(x, TABLE, TARGETS), lambda x: ops.max_margin_loss(x, TARGETS),
    lambda x: ops.embedding(TARGETS, x[:, None].expand(6, 2, 8).reshape(12, 8)),
    lambda x: ops.attention(*(x.view(1, 2, 3, 8),) * 3, is_causal=True),
    lambda x: ops.chunked_attention(*(x.view(1, 2, 3, 8),) * 3, 2, softcap=2.0),
], ids=range(12))
def test_under_torch_func(function):
    """vmap and grad of vmap, against one after the other."""
    x = normal(3, 6, 8)

    def total(x):
        return function(x).square().sum()

    torch.testing.assert_close(torch.vmap(function)(x), torch.stack([function(each) for each in x]),
                               atol=1e-5, rtol=1e-5)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(total(each) for each in leaf), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(x), expected, atol=1e-4, rtol=1e-4)
