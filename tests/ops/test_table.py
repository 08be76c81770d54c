"""docs/operations.md says what the code does: complete, up to date, and with errors that hold."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from tessera import ops
from tessera.ops import table
from tessera.ops.registration import implementation

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
# Of `ops`, what computes nothing by itself: tables and masks, modes, tests, parts of other functions.
HELPERS = {"add", "apply_causal_mask", "apply_label_smoothing", "cast", "even_blocks", "gather", "implementation",
           "is_invariant", "is_quantized", "make_mask", "merge_heads", "ring_attention", "rope_frequencies",
           "rope_tables", "split_heads", "wants_reference"}


def test_the_document_is_what_the_code_makes():
    assert DOCUMENT.read_text() == table.render(), "run: make docs"


def test_every_operation_is_in_the_table():
    registered = {name for row in table.ROWS for name in row.registered}
    assert {name for name in table.operations() if not name.endswith("_backward")} == registered
    functions = [name for row in table.ROWS for name in row.functions]
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert len(functions) == len(set(functions)) and set(functions) == public - HELPERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.functions[0])
def test_error(row, dtype):
    """The sample on fresh inputs, as it runs by default, against the plain expressions in float64."""
    generator = torch.Generator().manual_seed(sum(map(ord, row.functions[0])))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in row.shapes]
    actual = row.sample(*inputs)
    with implementation("reference"):
        expected = row.sample(*(x.double() for x in inputs))
    assert actual.isfinite().all()
    bound = row.f32 if dtype is torch.float32 else row.bf16
    assert (actual.double() - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())
