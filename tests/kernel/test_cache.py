"""The cache of compiled code on disk: shared by processes, bounded, indifferent to damage; and dumps in spite of it."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tessera as ts
from tessera import Tile, tile
from tessera.errors import InputError
from tessera.kernel import cache

PROGRAM = """
import sys, torch
from tessera.ops.kernels import softmax_kernel
sys.stdin.readline()
x = torch.arange(33.0).reshape(3, 11)
out = torch.empty_like(x)
softmax_kernel(x, out)
print(float((out - x.softmax(-1)).abs().max()) < 1e-6)
"""


@ts.kernel
def doubled(x: Tile["S", "D"], o: Tile["S", "D"]):
    tile.store(o, tile.load(x) * 2.0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


def write_and_read(number: int) -> bool:
    found = [cache.cached(f"key {i}", lambda i=i: bytes([i]) * 200_000) for i in range(20)]
    cache.evict(cache.folder(), 1_000_000)
    return all(code == bytes([i]) * 200_000 for i, code in enumerate(found))


def test_entries_written_by_eight_threads_at_once(place):
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(8)))
    cache.evict(place, 1_000_000)
    assert all(path.suffix == ".bin" for path in place.iterdir())
    assert sum(path.stat().st_size for path in place.iterdir()) <= 1_000_000


@pytest.mark.slow
def test_eight_programs_at_once(place):
    command = [sys.executable, "-c", PROGRAM]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(8)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate()[0].strip() for child in children] == ["True"] * 8
    assert all(path.suffix == ".bin" for path in place.iterdir()) and len(list(place.iterdir())) == 2  # code, manifest


def test_an_entry_is_made_once_and_again_when_it_is_damaged(place):
    made = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    assert cache.cached("key", make) == cache.cached("key", make) == b"code" and len(made) == 1
    (path,) = place.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert cache.cached("key", make) == b"code" and len(made) == 2
    path.write_bytes(b"")
    assert cache.cached("key", make) == b"code" and len(made) == 3


def test_the_entries_used_longest_ago_go_first(place):
    for name in "abcd":
        cache.cached(name, lambda: b"x" * 1000)
    for age, path in enumerate(sorted(place.iterdir())):
        os.utime(path, (time.time() - 100 - age,) * 2)
    cache.cached("a", bytes)  # read: now the youngest
    (youngest,) = [path for path in place.iterdir() if path.stat().st_mtime > time.time() - 50]
    oldest = min(place.iterdir(), key=lambda path: path.stat().st_mtime)
    cache.evict(place, 3500)
    assert len(list(place.iterdir())) == 3 and youngest.exists() and not oldest.exists()
    cache.evict(place, 1500)
    assert list(place.iterdir()) == [youngest]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path / "file"))
    assert cache.cached("key", lambda: b"code") == b"code"


def test_dumps_show_cached_kernels_too(place, monkeypatch, capfd):
    x = torch.ones(2, 3)
    for _ in range(2):
        monkeypatch.setenv("TESSERA_DUMP", "")
        doubled.retype({})(x, torch.empty_like(x))
        monkeypatch.setenv("TESSERA_DUMP", "passes,llvm,asm")
        doubled.retype({})(x, torch.empty_like(x))
        shown = capfd.readouterr().err
        assert "kernel doubled(" in shown and "define " in shown and ".text" in shown


def test_an_unknown_dump_is_told(monkeypatch):
    monkeypatch.setenv("TESSERA_DUMP", "ir,llmv")
    with pytest.raises(InputError, match="TESSERA_DUMP='ir,llmv': 'llmv' is not one of ir, passes, llvm, asm, triton"):
        doubled.retype({}).check()
