"""What a launch needs to know of a compiled kernel, besides its machine code.

In: a traced function, or the plain data that was made of one in an earlier process. Out: an `Interface`, which the
backends pack arguments by, and from which tools know what a kernel writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tessera.kernel.ir import Function, Param, asserts

_MAX_RANK = 64


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A compiled kernel from outside.

    `names` and `params` say of each run-time parameter what it is called, and its rank if it is a tensor, else "int"
    or "float"; `sizes` are the names of the sizes that follow the arguments; `outputs` the positions of the parameters
    that it writes; `asserts` what to say when one of its assertions fails, in program order.
    """

    name: str
    names: tuple[str, ...]
    params: tuple[int | str, ...]
    sizes: tuple[str, ...]
    outputs: tuple[int, ...]
    asserts: tuple[str, ...]

    @staticmethod
    def of(function: Function) -> Interface:
        """The interface of a traced function."""
        return Interface(
            name=function.name, names=tuple(p.name for p in function.params),
            params=tuple(map(_kind, function.params)), sizes=tuple(function.sizes),
            outputs=tuple(i for i, p in enumerate(function.params) if p.is_output),
            asserts=tuple(f"{op.loc}: assertion failed: {op.attrs.get('text') or 'tile.assert'}"
                          for op in asserts(function)))

    def data(self) -> dict[str, Any]:
        """It as plain data, for `from_data`."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Interface:
        """What `data` gave, perhaps in another process.

        Raises:
            ValueError: the data is something else.
        """
        found: list[Any] = [data.get(key) for key in ("name", "names", "params", "sizes", "outputs", "asserts")]
        name, names, params, sizes, outputs, asserts_ = found
        if not (isinstance(name, str) and all(isinstance(x, list) for x in (names, params, sizes, outputs, asserts_))
                and len(names) == len(params)
                and all(p in ("int", "float") or (type(p) is int and 0 <= p <= _MAX_RANK) for p in params)
                and all(isinstance(text, str) for text in (*names, *sizes, *asserts_))
                and all(type(i) is int and 0 <= i < len(params) for i in outputs)):
            raise ValueError("not an interface")
        return Interface(name=name, names=tuple(names), params=tuple(params), sizes=tuple(sizes),
                         outputs=tuple(outputs), asserts=tuple(asserts_))


def _kind(param: Param) -> int | str:
    if param.is_view:
        return param.value.type.rank
    return "float" if param.value.type.dtype.is_float else "int"
