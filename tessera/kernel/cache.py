"""Compiled code on disk: atomic, shared by any number of processes, bounded.

In: a key text that determines the code (IR, target, versions) and the bytes that were made from it. Out:
the bytes, in a later process. `direct` keeps manifests here, which lead to code without its key. Each entry is one
file named by the key's hash, written next to its place and renamed into it; its last 32 bytes are the hash of the
rest, so that a damaged file counts as absent. When the folder outgrows TESSERA_CACHE_MB, the entries that were used
longest ago go.
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
    return fetch(name_of(key), make)


def fetch(name: str, make: Callable[[], bytes]) -> bytes:
    """`cached`, by the entry's name."""
    found = read(name)
    if found is None:
        found = make()
        write(name, found)
    return found


def name_of(key: str) -> str:
    """The name of a key's entry: 64 hexadecimal digits, others for each version of the compiler."""
    return hashlib.sha256(f"{compiler_version()}\n{key}".encode()).hexdigest()


def read(name: str, limit: int | None = None) -> bytes | None:
    """An entry's bytes; None where there is none, it is damaged, or longer than the limit."""
    path = folder() / (name + _SUFFIX)
    try:
        if limit is not None and path.stat().st_size > limit + _DIGEST:
            return None
        data = path.read_bytes()
        os.utime(path)  # used now: the last to be evicted
    except OSError:
        return None
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    return body if hashlib.sha256(body).digest() == digest else None


def write(name: str, body: bytes) -> None:
    """Keep an entry, in place of one of its name. A folder that cannot be written to is no error."""
    global _writes
    path = folder() / (name + _SUFFIX)
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


def folder() -> Path:
    """Where compiled code is kept (TESSERA_CACHE_DIR)."""
    return env.get("TESSERA_CACHE_DIR") / "kernels"


@cache
def compiler_version() -> str:
    """Changes whenever a source file of the compiler does."""
    root = Path(__file__).parent
    sources = [*root.rglob("*.py"), *root.parent.glob("*.py")]  # of the layers below as well: dtypes, say
    stamps = sorted((p.parts[len(root.parts) - 1:], (status := p.stat()).st_mtime_ns, status.st_size) for p in sources)
    return f"{__version__} {hashlib.sha256(repr(stamps).encode()).hexdigest()}"


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
