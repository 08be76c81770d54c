"""Builtins of the program itself: its context, loops, assertions, printing, random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value
from tessera.kernel.lang.core import Operand, builder, builtin, is_number, tile_of, tiles_of, tracer
from tessera.kernel.lang.elementwise import binary
from tessera.types import f32, int32


@dataclass(frozen=True)
class LoopRange:
    """What a `for` runs over: "grid" (parallel), "range" (in order) or "static" (unrolled)."""

    kind: str
    bounds: tuple[Any, ...]  # grid: extents; otherwise start, stop, step


@builtin
def context() -> Any:
    """The kernel's sizes and schedule: ctx.S is the dim "S", ctx.BS is "B*S", ctx.block_m, block_n, block_k.

    A dim's attribute is its text without operators. Block sizes come from the schedule ("BM", "BN", "BK"),
    by default 64, 64 and 32 (on CUDA 128, 64 and 64 with tensors of 16 bits, else 64, 32 and 32).
    `ctx.program_id(axis)` is the index of the enclosing grid loop.
    """
    return tracer().context()


@builtin
def grid(*extents: Any) -> LoopRange:
    """A parallel loop: `for i in tile.grid(n)`, `for i, j in tile.grid(n, m)`. Programs share no variables."""
    return LoopRange("grid", extents)


@builtin
def thread_range(extent: Any) -> LoopRange:
    """A loop whose iterations are independent: parallel, or in order inside a grid."""
    return LoopRange("thread", (extent,))


@builtin
def range(start: Any, stop: Any = None, step: Any = 1) -> LoopRange:
    """A loop in order: start, start + step, ... below stop; `range(n)` counts from 0."""
    return LoopRange("range", (0, start, step) if stop is None else (start, stop, step))


@builtin
def static_range(start: Any, stop: Any = None, step: Any = 1) -> LoopRange:
    """A loop that is unrolled; its bounds are known at compile time."""
    return LoopRange("static", (0, start, step) if stop is None else (start, stop, step))


@builtin
def cdiv(x: Any, y: Any) -> Any:
    """x / y rounded up."""
    return binary("floordiv", binary("add", x, binary("sub", y, 1)), y)


@builtin
def program_id(axis: int = 0) -> Value:
    """The index of the enclosing grid loop along an axis."""
    return tracer().context().program_id(axis)


@builtin
def num_programs(axis: int = 0) -> Any:
    """The extent of the enclosing grid loop along an axis."""
    return tracer().context().num_programs(axis)


@builtin
def static_assert(condition: Any, message: str = "") -> None:
    """Fail to compile unless the condition, known at compile time, holds.

    Raises:
        TypeRuleError: it does not hold or is not known.
    """
    if isinstance(condition, (Value, Dim)):
        raise TypeRuleError("static_assert: the condition is not known at compile time, as sizes are not; "
                            "use assert", *([condition] if isinstance(condition, Value) else []))
    if not condition:
        raise TypeRuleError(f"static_assert: {message}" if message else "static_assert: the condition does not hold")


@builtin
def device_assert(condition: Operand, message: str = "") -> None:
    """Fail at run time unless the condition holds; on cuda only where TRITON_DEBUG=1 is set."""
    builder().emit("assert", [tile_of(condition, what="assert")], text=str(message))


@builtin
def print(*items: Any) -> None:
    """Print tiles, scalars and texts when the kernel runs, in one line: `print("sum", s)` or `print("sum {}", s)`.

    A first text with {} in it takes the values that follow. interp and cpu write the same line, with the place in the
    source and the program of the grid; cuda one line an element.

    Raises:
        TypeRuleError: fewer values than {} in the first text.
    """
    rest = list(items)
    parts: list[Any] = []
    if items and isinstance(items[0], str) and "{}" in items[0]:
        texts = rest.pop(0).split("{}")
        if len(rest) < len(texts) - 1:
            raise TypeRuleError(f"print: {items[0]!r} has {len(texts) - 1} places for {len(rest)} values")
        parts.append("".join(_printed(x) for pair in zip(texts, [*rest[:len(texts) - 1], ""]) for x in pair))
        items = (*rest[:len(texts) - 1], *(rest := rest[len(texts) - 1:]))
    text = " ".join([*parts, *map(_printed, rest)])
    builder().emit("print", [tile_of(item) for item in items if _is_run_time(item)], text=text)


def _printed(x: Any) -> str:
    """An item in the text of a print: a place for what is known when the kernel runs."""
    return "{}" if _is_run_time(x) else str(x).replace("{", "{{").replace("}", "}}")


def _is_run_time(x: Any) -> bool:
    return isinstance(x, (Value, Dim))


@builtin
def element_index(x: Operand) -> Value:
    """int32 tile of x's shape: each element's row-major index."""
    value = tile_of(x)
    index = tile_of(0)
    for axis, size in enumerate(value.type.shape):
        index = binary("add", binary("mul", index, size), builder().iota(value.type.shape, axis))
    return builder().cast(index, int32)


@builtin
def rand(seed: Operand, offset: Operand) -> Value:
    """Uniform f32 in [0, 1) from Philox4x32-10 of the int scalar seed and the int tile offset."""
    return builder().rand(tile_of(seed, what="rand: seed"), tile_of(offset, what="rand: offset"))


@builtin
def dropout(x: Operand, p: Operand, seed: Operand = 0, offset: Operand | None = None) -> Value:
    """x / (1 - p) where a random number is at least p, else 0 (Srivastava et al. 2014).

    Args:
        p: the probability that an element is dropped.
        seed: int scalar; the same seed gives the same pattern on every backend.
        offset: int tile or scalar added to each element's index, so that blocks of one tensor differ.
    """
    value = tile_of(x, what="dropout")
    if isinstance(p, (int, float)) and not 0 <= p < 1:
        raise TypeRuleError(f"dropout: p={p} given; expected 0 <= p < 1", value)
    if is_number(p) and p == 0:
        return value
    position = element_index(value) if value.type.rank else tile_of(0, int32)
    if offset is not None:
        position = binary("add", position, offset)
    kept = builder().binary("ge", *tiles_of(rand(seed, position), p))
    keep = binary("sub", 1.0, p if is_number(p) else builder().cast(tile_of(p), f32))
    scaled = binary("div", value, keep)
    return builder().where(kept, scaled, builder().const(0.0, scaled.type.dtype))
