"""Loads of which several elements share one: the groups of a quantized weight's scales, the two int4 of a byte.

An index that is `positions // n` along a whole axis would load every element n times; here it is loaded once, along an
axis of its own of 1/n the size, and spread in registers. Called by `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tessera.kernel.backends.cuda.emit import Emitter
from tessera.kernel.backends.cuda.values import Axis, Index, Val


def coarse_axis(emitter: Emitter, axis: Axis, times: int) -> Axis:
    """The axis of every `times`-th position of an axis; blocks begin at multiples of their size."""
    key = ("coarse", axis, times)
    if (found := emitter.scopes.find(key)) is not None:
        return found.axes[0]
    start = "0" if not axis.blocked else f"{axis.start if axis.start.isidentifier() else f'({axis.start})'} // {times}"
    made = emitter.new_axis(f"{axis.name}_by_{times}", start, axis.size // times, str(axis.size // times), axis.depth)
    emitter.scopes.keep(key, Val(made.offsets, (made,), axis.depth))
    return made


def coarse_index(emitter: Emitter, index: Index, times: int) -> Index | None:
    """The index along the coarse axis of an index whose elements come `times` at a time; None where they may not."""
    (axis,) = index.axes
    if axis.size % times or index.guards or any(on is not axis for on, _ in index.limits):
        return None
    made = coarse_axis(emitter, axis, times)
    limits = frozenset((made, limit // times if (limit % times).const == 0 else limit.ceildiv(times))
                       for _, limit in index.limits)
    return Index(Val(made.offsets, (made,), made.depth), None, limits)


def grouped_position(indices: Sequence[Index]) -> int | None:
    """The first index that runs over groups of an axis that no other index uses."""
    for position, index in enumerate(indices):
        others = {axis for other in (*indices[:position], *indices[position + 1:]) for axis in other.axes}
        if index.shared > 1 and index.axes[0] not in others and index.axes[0].size > index.shared:
            return position
    return None


def spread_groups(emitter: Emitter, loaded: Val, fine: Axis, coarse: Axis, times: int, limits: Index) -> Val:
    """Every element of a loaded tensor `times` times along its coarse axis, which becomes the fine one."""
    axes = tuple(fine if axis is coarse else axis for axis in loaded.axes)
    place = loaded.axes.index(coarse)
    slots = ", ".join([":"] * (place + 1) + ["None"] + [":"] * (len(axes) - place - 1))
    wide = ", ".join([a.size_text for a in loaded.axes[:place + 1]] + [str(times)]
                     + [a.size_text for a in loaded.axes[place + 1:]])
    text = f"tl.reshape(tl.broadcast_to({loaded.text}[{slots}], ({wide})), {emitter.shape(axes)})"
    zero = frozenset(pair for pair in loaded.zero if pair[0] is not coarse) | frozenset(
        (axis, limit) for axis, limit in limits.limits if (limit % times).const == 0)
    return replace(emitter.assign("spread", text, axes, loaded.depth), zero=zero)


def split_bytes(emitter: Emitter, loaded: Val, fine: Axis, coarse: Axis, limits: Index, hint: str) -> Val:
    """The int4 numbers of a tensor of bytes, the low nibble first; the bytes lie along its last axis."""
    axes = (*loaded.axes[:-1], fine)
    both = emitter.assign("nibbles", f"tl.interleave({loaded.text} & 15, {loaded.text} >> 4)", axes, loaded.depth)
    zero = frozenset(pair for pair in loaded.zero if pair[0] is not coarse) | frozenset(
        (axis, limit) for axis, limit in limits.limits if (limit % 2).const == 0)
    return replace(emitter.assign(hint, f"({both.text} ^ 8).to(tl.int8) - 8", axes, loaded.depth), zero=zero)
