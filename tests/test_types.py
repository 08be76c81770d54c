"""dtype names, precision strings and dim-annotated types."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import types
from tessera.errors import InputError


@pytest.mark.parametrize("dtype", types.DTYPES.values(), ids=str)
def test_dtypes_describe_torchs(dtype):
    assert types.dtype_of(dtype.name) is dtype
    if dtype is not types.int4:
        assert types.dtype_of(dtype.torch) is dtype
    if dtype.bits >= 8:
        assert dtype.torch.itemsize * 8 == dtype.bits
        assert dtype.is_float == dtype.torch.is_floating_point
    assert dtype.is_float + dtype.is_int + (dtype.kind == "bool") == 1


@pytest.mark.parametrize("alias, name", [
    ("fp32", "f32"), ("float32", "f32"), ("half", "f16"), ("bfloat16", "bf16"), ("fp8", "fp8_e4m3"),
    ("float8_e5m2", "fp8_e5m2"), ("i64", "int64"), ("u8", "uint8"), (int, "int32"), (float, "f32"), (bool, "bool"),
])
def test_aliases(alias, name):
    assert types.dtype_of(alias).name == name


@pytest.mark.parametrize("unknown", ["int3", "", None, 7, torch.complex64, str])
def test_unknown_dtype(unknown):
    with pytest.raises(InputError, match="expected one of f64, f32"):
        types.dtype_of(unknown)


@pytest.mark.parametrize("text, storage, accumulate", [
    ("bf16", "bf16", "f32"), ("fp8_e4m3 @accum(fp32)", "fp8_e4m3", "f32"), (" bf16@accum( f64 ) ", "bf16", "f64"),
])
def test_precision(text, storage, accumulate):
    found = types.parse_precision(text)
    assert (found.storage.name, found.accumulate.name) == (storage, accumulate)


@pytest.mark.parametrize("text", ["", "bf16 @", "bf16 @accum()", "bf16 f32", "@accum(f32)", "bf16 @accum(int3)", None])
def test_unreadable_precision(text):
    with pytest.raises(InputError, match="dtype"):
        types.parse_precision(text)


@pytest.mark.parametrize("kind, cls", [(ts.Tile, types.TileType), (ts.Tensor, types.TensorType)])
def test_annotations(kind, cls):
    assert kind["B*S", 4, ts.bf16] == cls(("B*S", 4), ts.bf16)
    assert kind["S"] == cls(("S",))
    assert kind["...", "D", torch.float32] == cls(("...", "D"), ts.f32)
    assert kind["S", "bf16"] == cls(("S",), ts.bf16)
    with pytest.raises(InputError, match=r"dim True given"):
        kind[True, "D"]


def test_annotations_in_unions():
    either = ts.Tile["S", ts.f32] | None
    assert either.members == (types.TileType(("S",), ts.f32), None)
    assert (None | ts.Tensor["S"] | int).members == (None, types.TensorType(("S",)), int)
