"""Functions of tensors: shape checks, and the decorators that say how a function runs.

The package itself is `@ts.function`. In: Python functions and classes. Out: the same, checked (`decorator`),
compiled (`compiling`), recomputed in the backward pass (`recompute`, `region`), at a stated precision (`precision`),
guarded against overflow (`stability`, `stable`), or made a module (`module`). Everything above, from `ops` to the
user, calls it.
"""

from __future__ import annotations

from tessera.callable import make_callable
from tessera.function.decorator import function as _function

make_callable(__name__, _function)
