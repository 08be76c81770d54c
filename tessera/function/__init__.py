"""Functions of tensors: shape checks, and the decorators that say how a function runs.

The package itself is `@ts.function`. In: Python functions and classes. Out: the same, checked (`decorator`),
compiled (`compile`), recomputed in the backward pass (`recompute`), at a stated precision (`precision`), guarded
against overflow (`stability`), or made a module (`module`). Everything above, from `ops` to the user, calls it.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from tessera.function.decorator import function as _function


class _CallableModule(types.ModuleType):
    """`tessera.function` is both the package and the decorator, as `tessera.kernel` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
