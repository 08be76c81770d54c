"""Reading tensor data from a file in chunks, converted on the way.

In: a file, a byte range whose bounds were checked against the file's size, and how to turn stored
units into numbers. Out: a filled tensor. Called by formats.gguf and formats.safetensors.

Data is read with pread rather than mapped: pages of a mapping count as this process's memory until
the kernel takes them back, and a file that is cut short while mapped ends the process (SIGBUS).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch

from tessera.errors import FileFormatError, NotFoundError

# Values per chunk. Temporaries stay in the L2 cache, and torch runs operations of this size (its grain)
# on the calling thread: no barrier per operation, which on a busy machine costs more than the work.
_CHUNK_VALUES = 1 << 15
_PARALLEL_VALUES = 1 << 20  # below this, starting threads costs more than it saves
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB in one call


class DataFile:
    """A file that is open for reading at given offsets; safe to use from several threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`.

        Raises:
            NotFoundError: there is no file there.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFoundError(f"path: no file at {str(path)!r}")
        self._stream = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by close())
        self.size = os.fstat(self._stream.fileno()).st_size

    def fileno(self) -> int:
        return self._stream.fileno()

    def read_into(self, out: torch.Tensor, offset: int) -> None:
        """Fill `out` (contiguous, any dtype) with the bytes from `offset` on.

        Raises:
            FileFormatError: the file ends before `out` is full.
        """
        target = memoryview(out.view(-1).view(torch.uint8).numpy())
        while target:
            count = os.preadv(self.fileno(), [target[:_READ_BYTES]], offset)
            if count == 0:
                raise FileFormatError(f"{self.path}: ends at byte {offset}; {len(target)} more expected")
            target, offset = target[count:], offset + count

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes from `offset` on; the caller has bounded `count`."""
        out = torch.empty(count, dtype=torch.uint8)
        self.read_into(out, offset)
        return out.numpy().tobytes()

    def close(self) -> None:
        self._stream.close()


def read_units(
    out: torch.Tensor,
    file: DataFile,
    offset: int,
    unit_values: int,
    unit_bytes: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Fill `out` with numbers that lie in `file` as units of `unit_bytes` bytes, `unit_values` numbers each.

    Args:
        out: `[numel]`, contiguous; numel is a multiple of `unit_values`. Values are rounded to its dtype.
        file: where the units lie.
        offset: first byte of the first unit.
        unit_values: numbers in a unit.
        unit_bytes: bytes of a unit.
        decode: `[N, unit_bytes]` uint8 -> `[N, unit_values]` numbers.

    Raises:
        FileFormatError: the file ends too early.
    """
    units = out.view(-1, unit_values)

    def convert(first: int, last: int) -> None:
        step = max(1, _CHUNK_VALUES // unit_values)
        scratch = torch.empty(min(step, last - first), unit_bytes, dtype=torch.uint8)
        for start in range(first, last, step):
            part = units[start : min(start + step, last)]
            stored = scratch[: len(part)]
            file.read_into(stored, offset + start * unit_bytes)
            part.copy_(decode(stored))

    n_threads = torch.get_num_threads() if out.numel() >= _PARALLEL_VALUES else 1
    if n_threads == 1:
        convert(0, len(units))
        return
    bounds = [len(units) * i // n_threads for i in range(n_threads + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(convert, bounds, bounds[1:]))


Window = tuple[tuple[int, int], ...]
"""A part of a tensor: (start, stop) along each dim."""


def read_tensor(
    file: DataFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype, unit_values: int, unit_bytes: int,
    decode: Callable[[torch.Tensor], torch.Tensor], window: Window | None = None,
) -> torch.Tensor:
    """A tensor, or a window of it, of which no other bytes are read (but for the units at the window's edges).

    Args:
        file, offset, unit_values, unit_bytes, decode: as for `read_units`.
        shape: of the whole tensor, row-major; a row is a whole number of units.
        dtype: of the result.
        window: None for all; else within the shape. Dims after the second are not cut.

    Returns:
        The window's numbers, in memory of their own.

    Raises:
        FileFormatError: the file ends too early.
    """
    if window is None or all((0, size) == part for size, part in zip(shape, window)):
        out = torch.empty(shape, dtype=dtype)
        read_units(out.view(-1), file, offset, unit_values, unit_bytes, decode)
        return out
    if len(shape) == 1:
        shape, window = (1, *shape), ((0, 1), *window)
        return read_tensor(file, offset, shape, dtype, unit_values, unit_bytes, decode, window)[0]
    (first, last), (left, right) = window[:2]
    row_bytes = prod(shape[1:]) // unit_values * unit_bytes
    out = torch.empty(last - first, right - left, *shape[2:], dtype=dtype)
    if right - left == shape[1]:
        read_units(out.view(-1), file, offset + first * row_bytes, unit_values, unit_bytes, decode)
        return out
    inner = prod(shape[2:])
    first_unit, last_unit = left * inner // unit_values, -(-right * inner // unit_values)
    n_units = last_unit - first_unit
    skip = left * inner - first_unit * unit_values
    step = max(1, _CHUNK_VALUES // (n_units * unit_values))
    scratch = torch.empty(min(step, last - first), n_units, unit_bytes, dtype=torch.uint8)
    for start in range(first, last, step):
        stop = min(start + step, last)
        for row in range(start, stop):
            file.read_into(scratch[row - start], offset + row * row_bytes + first_unit * unit_bytes)
        values = decode(scratch[: stop - start].view(-1, unit_bytes)).view(stop - start, -1)
        out[start - first: stop - first].copy_(values[:, skip: skip + (right - left) * inner].view(-1, *out.shape[1:]))
    return out
