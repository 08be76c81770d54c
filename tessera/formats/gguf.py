"""Bounded reader of GGUF files.

In: the path of a GGUF v2 or v3 file (little endian), from any source. Out: `GGUFFile`, with the
metadata as plain Python values and each tensor dequantized when it is asked for. Called by
models.gguf (weights and configuration) and data.tokenizer (vocabulary, merges, chat template).

The gguf package's own reader does not check lengths against the file, so the header is parsed here;
the package gives the constants. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic "GGUF" | u32 version | u64 tensor_count | u64 kv_count
    kv_count     x (string key | u32 type | value)
    tensor_count x (string name | u32 n_dims | n_dims x u64 | u32 type | u64 offset)
    padding to general.alignment, then the tensors in the same order, each padded to the alignment

The header is mapped while it is parsed; tensors are read in chunks and dequantized on the way.
A bit flip inside tensor data that leaves a readable number cannot be seen: GGUF has no checksum.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tessera.errors import FileFormatError, NotFoundError, UnsupportedFileError
from tessera.formats.blocks import DataFile, Window, read_tensor
from tessera.formats.dequant import decoder
from tessera.types import DType, dtype_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 256 << 20  # metadata and tensor table; the largest vocabularies need about 20 MB
MAX_KEY_BYTES = 65535  # the format's own limit
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ARRAY_DEPTH = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type -> struct code, in the order of GGUFValueType; bool is read as a byte that must be 0 or 1.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_MIN_KV_BYTES = 8 + 4 + 1  # empty key, type, one byte
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dims, type, offset


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        shape: row-major dims, as torch has them (GGUF stores them reversed): Linear weights are [out, in].
        type: storage type, e.g. GGMLQuantizationType.Q4_1.
        offset: first byte, counted from the start of the file.
        nbytes: stored bytes, padding not included.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class _Cursor:
    """Reads little-endian values from a buffer and never past its end (or past the header limit)."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos = data, path, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def fail(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: {what} (at byte {self.pos} of {len(self.data)})")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.end - self.pos:
            raise self.fail(f"{what} needs {nbytes} bytes; the header has {self.end - self.pos} left")

    def unpack(self, code: str, what: str) -> Any:
        layout = struct.Struct("<" + code)
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return value

    def string(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        size = self.unpack("Q", what)
        if size > limit:
            raise self.fail(f"{what} has {size} bytes; at most {limit} are allowed")
        self.need(size, what)
        raw = self.data[self.pos : self.pos + size]
        self.pos += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """One metadata value of GGUFValueType `kind`."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has value type {kind}; known types are 0 to 12")
        value = self.unpack(_SCALARS[kind], what)
        return self._bools([value], what)[0] if kind == _BOOL else value

    def _array(self, what: str, depth: int) -> list[Any]:
        if depth > MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind, count = self.unpack("I", what), self.unpack("Q", what)
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            self.need(count * width, what)
            values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.pos)
            self.pos += count * width
            return self._bools(values, what) if kind == _BOOL else list(values)
        # A string takes at least its 8-byte length, an inner array its type and count.
        self.need(count * (8 if kind == _STRING else 12), what)
        if kind == _STRING:
            return self._strings(count, what)
        return [self.value(kind, what, depth) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[str]:
        """`string`, `count` times, without its overhead: a vocabulary has some 100,000 strings."""
        read_size, data, pos, end = struct.Struct("<Q").unpack_from, self.data, self.pos, self.end
        found = []
        try:
            for _ in range(count):
                start = pos + 8
                if start > end or (pos := start + read_size(data, pos)[0]) > end:
                    raise self.fail(f"{what} runs past the end of the header")
                found.append(data[start:pos].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error
        self.pos = pos
        return found

    def _bools(self, values: Any, what: str) -> list[bool]:
        if any(v > 1 for v in values):
            raise self.fail(f"{what} holds a bool that is neither 0 nor 1")
        return [v == 1 for v in values]


class GGUFFile:
    """An open GGUF file. Use `open_gguf`; close with `close()` or a `with` block.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str or list of these, e.g. metadata["general.architecture"].
        tensors: name -> TensorInfo, in file order.
    """

    def __init__(self, file: DataFile) -> None:
        self.path, self._file = file.path, file
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, file.path)
            tensor_count, kv_count = _read_preamble(cursor)
            self.metadata: dict[str, Any] = {}
            for _ in range(kv_count):
                key = cursor.string("metadata key", MAX_KEY_BYTES)
                if key in self.metadata:
                    raise cursor.fail(f"metadata key {key!r} stands twice")
                self.metadata[key] = cursor.value(cursor.unpack("I", key), f"metadata {key!r}")
            self.tensors = _read_tensor_table(cursor, tensor_count, _alignment(self.metadata, file.path))

    def tensor(
        self, name: str, dtype: DType | torch.dtype | str = "f32", window: Window | None = None,
    ) -> torch.Tensor:
        """Tensor `name`, or a window of it, dequantized to `dtype` (a floating type), in memory of its own.

        Values are computed in float32, bit-equal to the gguf package's, then rounded to `dtype`;
        the work is done in chunks, so that memory beyond the result stays below 1 MB a thread.

        Raises:
            NotFoundError: the file has no such tensor.
            UnsupportedFileError: its storage type is not one that Tessera reads.
            FileFormatError: the file became shorter since it was opened.
        """
        if name not in self.tensors:
            raise NotFoundError(f"{self.path}: no tensor {name!r} among {len(self.tensors)}")
        info = self.tensors[name]
        try:
            decode = decoder(info.type)
        except UnsupportedFileError as error:
            raise UnsupportedFileError(f"{self.path}: tensor {name!r}: {error}") from error
        return read_tensor(
            self._file, info.offset, info.shape, dtype_of(dtype).torch, *GGML_QUANT_SIZES[info.type], decode, window)

    def blocks(self, name: str) -> torch.Tensor:
        """The stored bytes of a tensor, uint8 [rows, bytes of a row]; its TensorInfo says what they are.

        Raises:
            NotFoundError: the file has no such tensor.
            FileFormatError: the file became shorter since it was opened.
        """
        if name not in self.tensors:
            raise NotFoundError(f"{self.path}: no tensor {name!r} among {len(self.tensors)}")
        info = self.tensors[name]
        out = torch.empty(info.nbytes, dtype=torch.uint8)
        self._file.read_into(out, info.offset)
        return out.view(-1, info.nbytes // math.prod(info.shape[:-1]))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its metadata and tensor table; no tensor data is touched.

    Args:
        path: the file.

    Returns:
        The open file.

    Raises:
        NotFoundError: there is no file at `path`.
        FileFormatError: the file is not a GGUF v2/v3 file, is cut short, or contradicts itself.
    """
    file = DataFile(path)
    try:
        if file.size < 24:
            raise FileFormatError(f"{path}: {file.size} bytes; a GGUF header has at least 24")
        return GGUFFile(file)
    except BaseException:
        file.close()
        raise


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and the two counts, each bounded by what the header can hold."""
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise cursor.fail(f"starts with {magic!r}; a GGUF file starts with {MAGIC!r}")
    cursor.pos = 4
    version = cursor.unpack("I", "version")
    if version not in VERSIONS:
        note = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise cursor.fail(f"GGUF version {version} given{note}; versions 2 and 3 are read")
    tensor_count, kv_count = cursor.unpack("Q", "tensor count"), cursor.unpack("Q", "metadata count")
    cursor.need(tensor_count * _MIN_TENSOR_BYTES + kv_count * _MIN_KV_BYTES, "tensor and metadata counts")
    return tensor_count, kv_count


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value <= 0 or value & (value - 1) or value > 1 << 20:
        raise FileFormatError(f"{path}: general.alignment is {value!r}; expected a power of two up to 2^20")
    return value


def _read_tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensor table. Tensors must follow each other without gap or overlap, as llama.cpp demands too."""
    entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int, int]] = {}
    for _ in range(count):
        name = cursor.string("tensor name", MAX_KEY_BYTES)
        if name in entries:
            raise cursor.fail(f"tensor {name!r} stands twice")
        entries[name] = _read_tensor_entry(cursor, name)

    start = _pad(cursor.pos, alignment)
    expected, tensors = 0, {}
    for name, (shape, kind, nbytes, offset) in entries.items():
        if offset != expected:
            raise cursor.fail(f"tensor {name!r} starts at data offset {offset}; expected {expected}")
        end = start + offset + nbytes
        if end > len(cursor.data):
            raise cursor.fail(f"tensor {name!r} ends at byte {end}, past the end of the file (cut short?)")
        tensors[name] = TensorInfo(shape=shape, type=kind, offset=start + offset, nbytes=nbytes)
        expected += _pad(nbytes, alignment)
    return tensors


def _read_tensor_entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int, int]:
    n_dims = cursor.unpack("I", f"tensor {name!r}")
    if n_dims > MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dims; at most {MAX_DIMS} are allowed")
    dims = [cursor.unpack("Q", f"tensor {name!r}") for _ in range(n_dims)]
    code, offset = cursor.unpack("I", f"tensor {name!r}"), cursor.unpack("Q", f"tensor {name!r}")
    try:
        kind = GGMLQuantizationType(code)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise cursor.fail(f"tensor {name!r} has unknown type {code}") from error
    if any(d == 0 for d in dims) or (dims[0] if dims else 1) % block:
        raise cursor.fail(f"tensor {name!r} has dims {dims}; {kind.name} needs rows of a multiple of {block}")
    numel = 1
    for d in dims:
        numel *= d
    return tuple(reversed(dims)), kind, numel // block * block_bytes, offset


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
