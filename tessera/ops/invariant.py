"""Switch of the invariant mode: operations whose bits do not depend on the batch, the chunking or the mesh.

In: nothing. Out: whether this context asks for it. `dist.deterministic` turns it on; operations of this layer
read it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_INVARIANT: contextvars.ContextVar[bool] = contextvars.ContextVar("tessera_invariant", default=False)


def is_invariant() -> bool:
    """Whether operations must give each row the same bits whatever stands beside it."""
    return _INVARIANT.get()


@contextlib.contextmanager
def invariant() -> Iterator[None]:
    """Turn the mode on for the calls inside."""
    token = _INVARIANT.set(True)
    try:
        yield
    finally:
        _INVARIANT.reset(token)
