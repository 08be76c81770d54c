"""What the interpreter reports of kernels in the tile language, with the place in the user's source."""

import sys

import pytest
import torch

import tessera as ts
from tessera import Tile, f32, int32, tile
from tessera.errors import LaunchError

from .backends import launch


@ts.kernel
def reads_shared_before_it_is_written(x: Tile["N", f32], out: Tile["N", f32]):
    buffer = tile.alloc_shared(x.shape, f32)
    tile.store(out, tile.load(x) + buffer)  # here


@ts.kernel
def writes_one_row_from_every_program(index: Tile["N", int32], out: Tile["N", f32]):
    for i in tile.grid(index.shape[0]):
        out[index[i]] = 1.0  # here


@ts.kernel
def reads_a_neighbour(out: Tile["N", f32], n: int):
    for i in tile.grid(n):
        out[i] = 1.0
        out[i] = out[i + 1] + 1.0  # here


@ts.kernel
def gathers(table: Tile["V", "D", f32], index: Tile["N", int32], out: Tile["N", "D", f32]):
    tile.store(out, tile.gather(table, index))  # here


@ts.kernel
def shows(x: Tile["N", f32], out: Tile["N", f32]):
    doubled = tile.load(x) * 2.0
    print("doubled:", doubled)
    breakpoint()
    tile.store(out, doubled)


CASES = {
    "uninitialised": (reads_shared_before_it_is_written, [torch.ones(3), torch.zeros(3)],
                      "buffer is read before all of it has been written"),
    "race": (writes_one_row_from_every_program, [torch.tensor([0, 2, 0], dtype=torch.int32), torch.zeros(3)],
             "race on out: this store and the store of another grid program"),
    "race of a read": (reads_a_neighbour, [torch.zeros(4), 3], "element is read before the kernel has written it"),
    "bounds": (gathers, [torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, 3)],
               "row of table: index 2 of an axis of 2 elements"),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_users_line(name):
    kernel, args, message = CASES[name]
    with pytest.raises(LaunchError, match=message) as caught:
        launch(kernel, "interp", *args)
    text = str(caught.value)
    assert text.startswith(__file__) and text.splitlines()[1].endswith("# here")


def test_print_and_breakpoint_inside_a_kernel(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(sys._getframe(1).f_locals["tiles"]))
    launch(shows, "interp", torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert "doubled: [2, 4]" in capsys.readouterr().out
    assert torch.equal(seen[0]["doubled"], torch.tensor([2.0, 4.0]))
