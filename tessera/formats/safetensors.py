"""Bounded reader of safetensors: one file, or a folder with one or many shards.

In: the path of a .safetensors file or of a folder with model.safetensors or
model.safetensors.index.json. Out: `SafetensorsReader`, which reads each tensor when it is asked for
and converts it on the way. Called by models.load.

Layout (https://huggingface.co/docs/safetensors): u64 header length | JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}} | data, with the
ranges covering the data without gap or overlap. All of that is checked before data is read.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tessera.errors import FileFormatError, NotFoundError
from tessera.formats.blocks import DataFile, Window, read_tensor
from tessera.formats.json import parse_json_object, read_json_object
from tessera.types import DType, dtype_of

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies and what it is: `nbytes` bytes from `offset` of `file`, row-major."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: DataFile
    offset: int
    nbytes: int


class SafetensorsReader:
    """Tensors of one or many safetensors files. Use `open_safetensors`; close with `close()` or `with`.

    Attributes:
        tensors: name -> StoredTensor, in file order.
    """

    def __init__(self, files: list[DataFile]) -> None:
        self._files = files
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, info in _read_header(file).items():
                if name in self.tensors:
                    other = self.tensors[name].file.path
                    raise FileFormatError(f"{file.path}: tensor {name!r} stands in {other} too")
                self.tensors[name] = info

    def tensor(
        self, name: str, dtype: DType | torch.dtype | str | None = None, window: Window | None = None,
    ) -> torch.Tensor:
        """Tensor `name`, or a window of it, in memory of its own, in `dtype` (default: as stored).

        Raises:
            NotFoundError: there is no such tensor.
            FileFormatError: the file became shorter since it was opened.
        """
        if name not in self.tensors:
            raise NotFoundError(f"{self._files[0].path}: no tensor {name!r} among {len(self.tensors)}")
        info = self.tensors[name]
        wanted = info.dtype if dtype is None else dtype_of(dtype).torch
        if wanted == info.dtype and window is None:
            out = torch.empty(info.shape, dtype=wanted)
            info.file.read_into(out, info.offset)
            return out
        width = info.dtype.itemsize
        return read_tensor(
            info.file, info.offset, info.shape, wanted, 1, width, lambda raw: raw.view(info.dtype), window)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsReader:
    """Open a .safetensors file, or the model in a folder, and check every header; no data is read.

    Args:
        path: a file; or a folder with model.safetensors, or with model.safetensors.index.json and its shards.

    Raises:
        NotFoundError: the file, or a shard that the index names, is missing.
        FileFormatError: a header is damaged or contradicts the file's size, or the index its shards.
    """
    path = Path(path)
    weight_map: dict[str, str] = {}
    if not path.is_dir():
        paths = [path]
    elif (path / SINGLE_NAME).is_file():
        paths = [path / SINGLE_NAME]
    elif (path / INDEX_NAME).is_file():
        weight_map = _read_index(path / INDEX_NAME)
        paths = [path / shard for shard in dict.fromkeys(weight_map.values())]
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            few = ", ".join(missing[:3])
            raise NotFoundError(f"{path}: {len(missing)} of {len(paths)} shards missing: {few}")
    else:
        raise NotFoundError(f"path: folder {str(path)!r} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    files: list[DataFile] = []
    try:
        files.extend(map(DataFile, paths))
        reader = SafetensorsReader(files)
        _check_index(reader, weight_map, path / INDEX_NAME)
    except BaseException:
        for file in files:
            file.close()
        raise
    return reader


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{path}: weight_map is {type(weight_map).__name__}; expected a mapping of names")
    for shard in weight_map.values():
        # A shard is a plain file name: an index must not reach outside its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise FileFormatError(f"{path}: shard {shard!r} is not a plain file name")
    return weight_map


def _check_index(reader: SafetensorsReader, weight_map: dict[str, str], index: Path) -> None:
    for name, shard in weight_map.items():
        info = reader.tensors.get(name)
        if info is None or info.file.path.name != shard:
            raise FileFormatError(f"{index}: names tensor {name!r} in {shard}, which does not hold it")


def _read_header(file: DataFile) -> dict[str, StoredTensor]:
    if file.size < 8:
        raise FileFormatError(f"{file.path}: {file.size} bytes; a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", file.read(8, 0))
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise FileFormatError(
            f"{file.path}: header of {length} bytes announced; the file has {file.size} (cut short?) "
            f"and headers have at most {MAX_HEADER_BYTES}"
        )
    header = parse_json_object(file.read(length, 8), str(file.path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(f"{file.path}: __metadata__ must map strings to strings")
    entries = {name: _read_entry(entry, name, file, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise FileFormatError(f"{file.path}: tensor {name!r} starts at {info.offset}; expected {end}")
        end += info.nbytes
    if end != file.size:
        raise FileFormatError(f"{file.path}: tensors end at {end}; the file has {file.size} bytes (cut short?)")
    return entries


def _read_entry(entry: Any, name: str, file: DataFile, data_start: int) -> StoredTensor:
    def fail(what: str) -> FileFormatError:
        return FileFormatError(f"{file.path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("expected exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"dtype {str(entry['dtype'])[:40]!r} is not one of {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise fail("shape and data_offsets must be lists of sizes")
    begin, end = offsets
    if begin > end or prod(shape) * dtype.itemsize != end - begin:
        raise fail(f"shape {shape} of {entry['dtype']} does not fill bytes {begin} to {end}")
    offset = data_start + begin
    return StoredTensor(shape=tuple(shape), dtype=dtype, file=file, offset=offset, nbytes=end - begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
