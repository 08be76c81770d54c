"""The tile kernel language: `@ts.kernel` and everything under it.

The package itself is the decorator: `@ts.kernel`, `@ts.kernel(name=...)` and `@ts.kernel.fused` (the
same: every kernel is one launch). Inside: `lang` (the builtins, `from tessera import tile`) -> `frontend`
(Python source to IR) -> `ir`, `verify` -> `passes` -> `backends`.
"""

from __future__ import annotations

from tessera.callable import make_callable
from tessera.kernel import lang as tile
from tessera.kernel.launch import Kernel
from tessera.kernel.launch import kernel as _kernel
from tessera.kernel.schedule import schedule
from tessera.kernel.signature import constexpr

fused = _kernel

make_callable(__name__, _kernel)

__all__ = ["Kernel", "constexpr", "fused", "schedule", "tile"]
