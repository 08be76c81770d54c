"""Packages that are decorators as well: `@ts.kernel` and `tessera.kernel.lang` have one name.

Importing a submodule binds its package to the name in `tessera`, so the package itself has to be what is called. In: a
package's name and a function. Called by the packages' `__init__`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


class _CallableModule(types.ModuleType):
    """A module with a `__call__` that `make_callable` has put into it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Calling the module of this name calls the function."""
    module = sys.modules[name]
    module.__class__ = _CallableModule
    module._call = function  # type: ignore[attr-defined]
