"""Data types, and the dim-annotated `Tensor[...]` and `Tile[...]` of signatures.

In: dtype names and annotations as a user writes them. Out: frozen descriptions that the kernel
frontend (Tile), the shape checker (Tensor) and the model configuration (dtype strings) read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tessera.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DType:
    """A storage type: its name, torch's type that holds it, its width in bits and its kind.

    int4 is packed: two values a byte, the even index in the low nibble; torch holds it as uint8.
    """

    name: str
    torch: torch.dtype
    bits: int
    kind: str  # "float", "int", "uint" or "bool"

    def __repr__(self) -> str:
        return self.name

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        return self.kind in ("int", "uint")

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, DType):
            return NotImplemented
        return DTypeGroup(name=f"{self} or {other}", members=(self, other))


@dataclass(frozen=True, kw_only=True)
class DTypeGroup:
    """Several dtypes, as the last item of `Tensor[...]`: a tensor has one of them.

    `torch` are torch's types of the members, and those of torch's that are like them. Where `is_same`, all tensors of
    a call that are annotated with the group's name have one dtype.
    """

    name: str
    members: tuple[DType, ...]
    others: tuple[torch.dtype, ...] = ()
    is_same: bool = False

    def __repr__(self) -> str:
        return self.name

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, DType):
            return NotImplemented
        return DTypeGroup(name=f"{self} or {other}", members=(*self.members, other), others=self.others)

    @property
    def torch(self) -> frozenset[torch.dtype]:
        """Torch's types of the group."""
        return frozenset((*(member.torch for member in self.members), *self.others))

    def same(self, name: str) -> DTypeGroup:
        """The group under a name: a call's tensors of that name have one dtype of it."""
        return DTypeGroup(name=name, members=self.members, others=self.others, is_same=True)


f64 = DType(name="f64", torch=torch.float64, bits=64, kind="float")
f32 = DType(name="f32", torch=torch.float32, bits=32, kind="float")
f16 = DType(name="f16", torch=torch.float16, bits=16, kind="float")
bf16 = DType(name="bf16", torch=torch.bfloat16, bits=16, kind="float")
fp8_e4m3 = DType(name="fp8_e4m3", torch=torch.float8_e4m3fn, bits=8, kind="float")
fp8_e5m2 = DType(name="fp8_e5m2", torch=torch.float8_e5m2, bits=8, kind="float")
fp8 = fp8_e4m3
int64 = DType(name="int64", torch=torch.int64, bits=64, kind="int")
int32 = DType(name="int32", torch=torch.int32, bits=32, kind="int")
int8 = DType(name="int8", torch=torch.int8, bits=8, kind="int")
uint8 = DType(name="uint8", torch=torch.uint8, bits=8, kind="uint")
int4 = DType(name="int4", torch=torch.uint8, bits=4, kind="int")
bool_ = DType(name="bool", torch=torch.bool, bits=1, kind="bool")

# What is computed with, in the order in which `tessera check` tries them.
floating = DTypeGroup(name="floating", members=(f32, bf16, f16, f64))
one_float = floating.same("one_float")
integer = DTypeGroup(name="integer", members=(int64, int32, int8, uint8),
                     others=(torch.int16, torch.uint16, torch.uint32, torch.uint64))

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (f64, f32, f16, bf16, fp8_e4m3, fp8_e5m2, int64, int32, int8, uint8, int4, bool_)
}
_ALIASES = {
    "float64": "f64", "fp64": "f64", "float32": "f32", "fp32": "f32", "float": "f32",
    "float16": "f16", "fp16": "f16", "half": "f16", "bfloat16": "bf16", "fp8": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2",
    "i64": "int64", "long": "int64", "i32": "int32", "int": "int32", "i8": "int8", "u8": "uint8", "i4": "int4",
}
_BY_TORCH = {d.torch: d for d in DTYPES.values() if d is not int4}


def dtype_of(value: Any) -> DType:
    """The DType that a name ("bf16", "float32", "fp32"), a torch dtype or a DType stands for.

    Raises:
        InputError: the name is unknown.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, torch.dtype):
        if value in _BY_TORCH:
            return _BY_TORCH[value]
    elif isinstance(value, str):
        found = DTYPES.get(_ALIASES.get(value, value))
        if found is not None:
            return found
    elif value is bool:
        return bool_
    elif value is int:
        return int32
    elif value is float:
        return f32
    raise InputError(f"dtype: {value!r} is not known; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What "fp8_e4m3 @accum(fp32)" says: the storage type and the type that sums are kept in."""

    storage: DType
    accumulate: DType


_DEVICE_TYPES = ("cpu", "cuda", "meta")  # last in Tensor[...], such a text is a device, not a dim
_PRECISION = re.compile(r"\s*(\w+)\s*(?:@accum\(\s*(\w+)\s*\))?\s*")


def parse_precision(text: str) -> Precision:
    """Read a dtype string of the configuration, e.g. "bf16 @accum(fp32)"; the accumulator defaults to f32.

    Raises:
        InputError: the text is not `dtype` or `dtype @accum(dtype)`, or a dtype is unknown.
    """
    match = _PRECISION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f'dtype: {text!r} given; expected "dtype" or "dtype @accum(dtype)", e.g. "bf16 @accum(fp32)"')
    return Precision(storage=dtype_of(match[1]), accumulate=dtype_of(match[2] or "f32"))


@dataclass(frozen=True, repr=False)
class Annotation:
    """A dim-annotated array type: dims as written (names, expressions, ints or "...") and an optional dtype."""

    dims: tuple[str | int, ...]
    dtype: DType | None = None

    def __repr__(self) -> str:
        parts = [f'"{d}"' if isinstance(d, str) else str(d) for d in self.dims]
        dtype = [str(d) for d in (self.dtype, getattr(self, "dtypes", None)) if d is not None]
        return f"{type(self).__name__.removesuffix('Type')}[{', '.join(parts + dtype)}]"

    def __or__(self, other: Any) -> Any:
        return _Union((self, other))

    def __ror__(self, other: Any) -> Any:
        return _Union((other, self))


@dataclass(frozen=True, repr=False)
class TileType(Annotation):
    """`Tile["S", "D", bf16]`: a kernel parameter, a view of a tensor with named dims."""


@dataclass(frozen=True, repr=False)
class TensorType(Annotation):
    """`Tensor["B", "S", "D", bf16]`: an argument of a shape-checked function, on any device or on one `device` type, of
    one dtype, one of `dtypes`, or any."""

    device: str | None = None
    dtypes: DTypeGroup | None = None


@dataclass(frozen=True)
class _Union:
    """`Tile[...] | None` and `Tensor[...] | Tensor[...]`."""

    members: tuple[Any, ...]

    def __or__(self, other: Any) -> _Union:
        return _Union((*self.members, other))


def _annotation(cls: type[Annotation], items: Any) -> Annotation:
    items = items if isinstance(items, tuple) else (items,)
    dims, dtype = items, None
    if items and not isinstance(items[-1], int):
        last = items[-1]
        if isinstance(last, (DType, torch.dtype)) or last is bool or (
            isinstance(last, str) and _ALIASES.get(last, last) in DTYPES
        ):
            dims, dtype = items[:-1], dtype_of(last)
    for dim in dims:
        if not isinstance(dim, (str, int)) or isinstance(dim, bool):
            name = cls.__name__.removesuffix("Type")
            raise InputError(f"{name}[...]: dim {dim!r} given; expected a name, an expression or an int")
    return cls(tuple(dims), dtype)


class Tile:
    """Annotation of a kernel parameter: `Tile["B*S", "D/2", bf16]`."""

    def __class_getitem__(cls, items: Any) -> Annotation:
        return _annotation(TileType, items)


if TYPE_CHECKING:
    from torch import Tensor as Tensor  # to a type checker, what is annotated so is a tensor
else:
    class Tensor:
        """Annotation of a shape-checked function's argument: `Tensor["B", "S", "D", bf16, "cuda"]`; dtype (one, several
        as in `f32 | bf16`, or a group such as `floating`) and device type are optional, and `Tensor` is any tensor."""

        def __class_getitem__(cls, items: Any) -> Annotation:
            items = items if isinstance(items, tuple) else (items,)
            device = dtypes = None
            if items and (isinstance(items[-1], torch.device) or items[-1] in _DEVICE_TYPES):
                device = torch.device(items[-1]).type
                items = items[:-1]
            if items and isinstance(items[-1], DTypeGroup):
                *items, dtypes = items
            found = _annotation(TensorType, tuple(items))
            return TensorType(found.dims, found.dtype, device, dtypes)
