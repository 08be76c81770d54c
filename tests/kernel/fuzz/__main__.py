"""`python -m tests.kernel.fuzz FIRST END [first|all]` runs programs one by one, each in a child process.

A crash of the process is a finding like any other. One line for each program that fails, then how many did.
"""

from __future__ import annotations

import os
import sys
from random import Random

import torch

from . import ALL, FIRST, make
from .check import check


def run(seed: int, words: str) -> int:
    """Run one program in a child; the child's exit status (a signal's number when it was killed)."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 0
    try:
        check(make(Random(seed), FIRST if words == "first" else ALL), ["interp", "cpu"])
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        print(words, seed, type(error).__name__, lines[0][:160], "...", lines[-1][:200], flush=True)
        status = 1
    os._exit(status)


def main(first: int, end: int, words: str = "all") -> None:
    """Run the programs first, first + 1, ... below end."""
    torch.set_num_threads(1)  # a child cannot use the threads of an OpenMP runtime that its parent started
    failed = 0
    for seed in range(first, end):
        status = run(seed, words)
        failed += status != 0
        if os.WIFSIGNALED(status):
            print(words, seed, "killed by signal", os.WTERMSIG(status), flush=True)
        if seed % 100 == 99:
            print(f"... {seed + 1 - first} programs, {failed} failed", flush=True)
    print(f"{end - first} programs, {failed} failed", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
