"""Compiled code on disk: atomic, shared by any number of processes, bounded.

In: a key text that determines the code (IR, target, versions) and the bytes that were made from it. Out:
the bytes, in a later process. Each entry is one file named by the key's hash, written next to its place and
renamed into it; its last 32 bytes are the hash of the rest, so that a damaged file counts as absent. When
the folder outgrows TESSERA_CACHE_MB, the entries that were used longest ago go.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tessera import __version__, env

_DIGEST = 32
_SUFFIX = ".bin"
_SWEEP_EVERY = 32  # writes between two looks at the folder's size
_writes = 0


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes for a key: from disk, or made and kept. A folder that cannot be written to is no error."""
    path = folder() / (hashlib.sha256(f"{compiler_version()}\n{key}".encode()).hexdigest() + _SUFFIX)
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def folder() -> Path:
    """Where compiled code is kept (TESSERA_CACHE_DIR)."""
    return env.get("TESSERA_CACHE_DIR") / "kernels"


@cache
def compiler_version() -> str:
    """Changes whenever a source file of the compiler does."""
    root = Path(__file__).parent
    stamps = sorted((str(p.relative_to(root)), p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*.py"))
    return f"{__version__} {hashlib.sha256(repr(stamps).encode()).hexdigest()}"


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        os.utime(path)  # used now: the last to be evicted
    except OSError:
        return None
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    return body if hashlib.sha256(body).digest() == digest else None


def _write(path: Path, body: bytes) -> None:
    global _writes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body + hashlib.sha256(body).digest())
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError:
        return
    _writes += 1
    if _writes % _SWEEP_EVERY == 1:
        evict(path.parent, env.get("TESSERA_CACHE_MB") << 20)


def evict(place: Path, limit: int) -> None:
    """Delete the least recently used entries until the folder holds at most `limit` bytes."""
    entries = []
    for path in place.iterdir():
        try:
            status = path.stat()
        except OSError:
            continue  # another process was faster
        entries.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries, key=lambda entry: entry[0]):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
