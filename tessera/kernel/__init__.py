"""The tile kernel language: `@ts.kernel` and everything under it.

The package itself is the decorator: `@ts.kernel`, `@ts.kernel(name=...)` and `@ts.kernel.fused` (the
same: every kernel is one launch). Inside: `lang` (the builtins, `from tessera import tile`) -> `frontend`
(Python source to IR) -> `ir`, `verify` -> `passes` -> `backends`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from tessera.kernel import lang as tile
from tessera.kernel.launch import Kernel
from tessera.kernel.launch import kernel as _kernel
from tessera.kernel.schedule import schedule
from tessera.kernel.signature import constexpr

fused = _kernel


class _CallableModule(types.ModuleType):
    """`tessera.kernel` is both the package and the decorator: importing a submodule binds the package to the
    name `kernel` of `tessera`, so the package has to be what `@ts.kernel` calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _kernel(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

__all__ = ["Kernel", "constexpr", "fused", "schedule", "tile"]
