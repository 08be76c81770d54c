"""From a function to the text of its Triton kernels: one a launch.

In: an IR function and the sizes that the text is made for. Out: `KernelText`s: source, the arguments in order,
the launch grid as sizes. `launch` writes them to files and launches them, `interpret` runs them on the CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tessera.kernel import ir
from tessera.kernel.backends.cuda import contract, control, memory, plan, products, rules
from tessera.kernel.backends.cuda.emit import Emitter, Rule, axis_name, param_name
from tessera.kernel.backends.cuda.helpers import text_of
from tessera.kernel.backends.cuda.scopes import INDENT
from tessera.kernel.backends.cuda.values import Index, Val
from tessera.kernel.dims import Dim

GROUP_ROWS = 8  # of tiles that programs of neighbouring numbers share

RULES: dict[str, Rule] = {**rules.RULES, **memory.RULES, **contract.RULES, **products.RULES, **control.RULES}


@dataclass(frozen=True, kw_only=True)
class KernelText:
    """One Triton kernel and how it is launched.

    arguments: ("pointer", param), ("stride", param, axis), ("size", name), ("scalar", param), in order.
    grid: the programs are the product of ceil(size / block) over these pairs.
    """

    name: str
    source: str
    arguments: tuple[tuple[str | int, ...], ...]
    constants: dict[str, int] = field(default_factory=dict)
    grid: tuple[tuple[Dim, int], ...] = ()
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """Triton's own launch options. Multiplications and additions may contract, as on the other backends."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The kernels of a function at some sizes, and the bounds that make them valid at other sizes."""

    kernels: tuple[KernelText, ...]
    bounds: dict[Dim, int]

    @property
    def source(self) -> str:
        """One readable text of all launches."""
        return "\n\n".join(kernel.source for kernel in self.kernels)


def build(function: ir.Function, sizes: dict[str, int], wide: bool = False) -> Texts:
    """The kernels of a function for sizes that round up to the same powers of two as `sizes`.

    Args:
        sizes: named sizes, and int arguments under the names of their values.
        wide: a tensor has 2^31 elements or more: offsets are computed in 64 bits.

    Raises:
        UnsupportedError: an operation cannot be expressed at these sizes; the message names it and its line.
    """
    found = plan.segments(function)
    wide = wide or _counts_far(function)
    kernels, bounds = [], {}
    for number, segment in enumerate(found):
        name = function.name if len(found) == 1 else f"{function.name}_{number}"
        emitter = Emitter(function, sizes, wide, RULES)
        kernels.append(_kernel(emitter, segment, _identifier(name)))
        bounds.update(emitter.asked)
    return Texts(kernels=tuple(kernels), bounds=bounds)


def _counts_far(function: ir.Function) -> bool:
    """Whether random numbers are counted in 64 bits: the arithmetic behind their places must not wrap at 32."""
    return any(op.name == "rand" and op.operands[1].type.dtype.bits == 64 for op in ir.walk(function.body))


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _kernel(emitter: Emitter, segment: plan.Segment, name: str) -> KernelText:
    emitter.block_depth[id(emitter.function.body)] = 0
    for grid in segment.grids:
        emitter.block_depth[id(grid.regions[0])] = 0
    programs = _programs(emitter, segment)
    control.block(emitter, segment.body, programs.presets, {id(op) for op in segment.effects})
    lines = [*programs.lines, *emitter.scopes.stack[0].lines]
    text = "\n".join(lines)
    arguments = _arguments(emitter, text)
    names = [_argument_name(emitter, argument) for argument in arguments]
    scalars = [n for n, argument in zip(names, arguments) if argument[0] == "scalar"]
    if emitter.wide:  # Triton passes ints in 32 bits where they fit: products of them may not
        lines = [f"{n} = tl.cast({n}, tl.int64)" for n, argument in zip(names, arguments)
                 if _is_number(emitter.function, argument)] + lines
    names += [f"{constant}: tl.constexpr" for constant in emitter.constants]
    needs = text_of(emitter.helpers)
    header = ["import triton", "import triton.language as tl"]
    if "libdevice." in text + needs:
        header.append("from triton.language.extra import libdevice")
    jit = f"@triton.jit(do_not_specialize={scalars})" if scalars else "@triton.jit"
    source = "\n".join([*header, needs, "", jit, f"def {name}({', '.join(names)}):",
                        *(INDENT + line for line in lines or ["pass"]), ""])
    return KernelText(name=name, source=source, arguments=tuple(arguments), constants=dict(emitter.constants),
                      grid=tuple(programs.sizes), warps=_warps(emitter), stages=_stages(emitter))


def _warps(emitter: Emitter) -> int:
    if "warps" in emitter.function.schedule:
        return int(emitter.function.schedule["warps"])
    if emitter.dot_elements:
        return 8 if max(emitter.dot_elements, emitter.largest) >= 16384 else 4
    return 4 if emitter.largest <= 2048 else 8 if emitter.largest <= 8192 else 16


def _stages(emitter: Emitter) -> int:
    if "stages" in emitter.function.schedule:
        return int(emitter.function.schedule["stages"])
    return 1 if emitter.function.schedule.get("pipeline") is False else 3 if emitter.dot_elements else 2


# -- programs ----------------------------------------------------------------------------------------


@dataclass
class _Programs:
    """The launch grid, the lines that decode a program's number, and the indices that it gives to stores."""

    sizes: list[tuple[Dim, int]]
    lines: list[str]
    presets: control.Presets


def _programs(emitter: Emitter, segment: plan.Segment) -> _Programs:
    sizes: list[tuple[Dim, int]] = []
    names: list[str] = []
    for grid in segment.grids:
        for count, arg in zip(grid.operands, grid.regions[0].args):
            assert count.expr is not None
            sizes.append((count.expr, 1))
            names.append(emitter.scopes.name(arg.hint or "i"))
            emitter.pin(arg, Val(names[-1]))
    if segment.is_open:
        emitter.open_grid = segment.effects[0]
        return _Programs([(Dim.of(plan.OPEN_PROGRAMS), 1)], [], {})
    blocks = plan.program_blocks(emitter, segment)
    given: list[Index | None] = []
    if any(blocks):
        x = segment.effects[0].operands[-1]
        for axis, block in enumerate(blocks):
            given.append(_program_index(emitter, x, axis, block, sizes, names) if block else None)
    presets: control.Presets = {id(op): given for op in segment.effects} if given else {}
    tiled = len(blocks) > 1 and all(given[-2:]) and min(blocks[-2:]) > 1
    grouped = tiled and plan.has_products(plan.sources(segment.effects))
    return _Programs(sizes, _decode(emitter, sizes, names, grouped), presets)


def _program_index(emitter: Emitter, x: ir.Value, axis: int, block: int,
                   sizes: list[tuple[Dim, int]], names: list[str]) -> Index | None:
    """The block of one stored axis that a program takes."""
    dim, limit = x.type.shape[axis], x.type.extent(axis)
    if dim.const == 1 or not {a.partition("/")[0] for a in dim.atoms} <= {*emitter.function.sizes}:
        return None
    if block == 1 and limit != dim:
        return None  # a block of the program's own that ends early: its tile or loop is masked, a program is not
    name = axis_name(dim)
    program = emitter.scopes.name(name + ("_block" if block > 1 else "_at"))
    names.append(program)
    sizes.append((dim, block))
    if block == 1:
        return Index(Val(program))
    text = emitter.constant(f"BLOCK_{name}", block)
    return emitter.over(emitter.new_axis(name, f"{program} * {text}", block, text, depth=0), limit)


def _decode(emitter: Emitter, sizes: list[tuple[Dim, int]], names: list[str], grouped: bool) -> list[str]:
    """Lines that take a program's number apart, the last size running fastest.

    Grouped, the last two sizes are the rows and columns of a product's tiles: programs that run at the same time take
    tiles of a few rows, whose operands then stay in the cache.
    """
    if not names:
        return []
    number = "tl.program_id(0)" + (".to(tl.int64)" if emitter.wide else "")
    if len(names) == 1:
        return [f"{names[0]} = {number}"]
    lines = [f"program = {number}"]
    counts = [f"tl.cdiv({emitter.size(dim).text}, {block})" if block > 1 else emitter.size(dim).text
              for dim, block in sizes]
    last = len(names)
    if grouped:
        last -= 2
        lines += _grouped_tiles(emitter, counts[-2:], names[-2:], is_all=not last)
    for position in range(last - 1, 0, -1):
        lines += [f"{names[position]} = program % {counts[position]}", f"program = program // {counts[position]}"]
    return [*lines, f"{names[0]} = program"] if last else lines


def _grouped_tiles(emitter: Emitter, counts: list[str], names: list[str], is_all: bool) -> list[str]:
    """Lines that take the row and column of a tile from a program's number: down a few rows, then to the right."""
    rows, group, first, height = (emitter.scopes.name(n) for n in ("tile_rows", "group", "first_row", "height"))
    lines, tile = [f"{rows} = {counts[0]}", f"{group} = {GROUP_ROWS} * {counts[1]}"], "program"
    if not is_all:
        tile = emitter.scopes.name("tile_number")
        lines += [f"{tile} = program % ({rows} * {counts[1]})", f"program = program // ({rows} * {counts[1]})"]
    return [*lines, f"{first} = {tile} // {group} * {GROUP_ROWS}",
            f"{height} = tl.minimum({rows} - {first}, {GROUP_ROWS})",
            f"{names[0]} = {first} + {tile} % {group} % {height}", f"{names[1]} = {tile} % {group} // {height}"]


# -- arguments ---------------------------------------------------------------------------------------


def _arguments(emitter: Emitter, text: str) -> list[tuple[str | int, ...]]:
    """The run-time arguments that the text uses."""
    words = set(re.findall(r"\w+", text))
    found: list[tuple[str | int, ...]] = []
    for number, param in enumerate(emitter.function.params):
        if not param.is_view:
            if emitter.pinned[param.value].text in words:
                found.append(("scalar", number))
            continue
        if f"{param_name(param)}_ptr" in words:
            found.append(("pointer", number))
        found += [("stride", number, axis) for axis in range(param.value.type.rank)
                  if f"{param_name(param)}_s{axis}" in words]
    return found + [("size", number) for number, size in enumerate(emitter.function.sizes)
                    if emitter.size_names[size] in words]


def _is_number(function: ir.Function, argument: tuple[str | int, ...]) -> bool:
    """Whether an argument is a size or an int."""
    return argument[0] == "size" or (argument[0] == "scalar"
                                     and function.params[int(argument[1])].value.type.dtype.is_int)


def _argument_name(emitter: Emitter, argument: tuple[str | int, ...]) -> str:
    kind, number = argument[0], int(argument[1])
    if kind == "size":
        return emitter.size_names[emitter.function.sizes[number]]
    param = emitter.function.params[number]
    if kind == "scalar":
        return emitter.pinned[param.value].text
    return f"{param_name(param)}_ptr" if kind == "pointer" else f"{param_name(param)}_s{argument[-1]}"
