"""Damaged copies of a small file, and a guard against what reading them must not do."""

from __future__ import annotations

import random
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_EXTREMES = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def mutations(data: bytes, header_bytes: int, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies: bit flips, truncations, overwritten lengths, cut out and doubled pieces, mostly
    in the header."""
    rng = random.Random(seed)
    for _ in range(count):
        copy = bytearray(data)
        end = header_bytes if rng.random() < 0.85 else len(data)
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind <= 1:
            for _ in range(rng.choice((1, 1, 1, 4))):
                copy[rng.randrange(end)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del copy[at:]
        elif kind == 3:
            value = rng.choice((*_EXTREMES, len(data), len(data) + 1, rng.randrange(2**64)))
            width = rng.choice((4, 8))
            copy[at : at + width] = struct.pack("<Q", value)[:width]
        elif kind == 4:
            del copy[at : at + rng.randrange(1, 9)]
        else:
            piece = copy[at : at + rng.randrange(1, 40)]
            copy[at:at] = piece
        yield bytes(copy)


@contextmanager
def guarded(address_bytes: int = 2 << 30, seconds: int = 120) -> Iterator[None]:
    """Fail on a huge allocation (address space is limited to what is there and `address_bytes`) and on a hang."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def late(signum, frame):
        raise TimeoutError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + address_bytes, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
