"""`@ts.schedule(tile={"BM": 128, "BN": 128, "BK": 32}, warps=8, pipeline=True)`: block sizes and options by hand.

In: options by name. Out: one flat mapping that travels in `ir.Function.schedule`: the kernel reads its
block sizes from it (`ctx.block_m` is "BM"), the passes and backends the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.errors import InputError

# What an option may be. The last two: how tensor cores take f32 tiles, two of them, and one against a tile that bf16
# holds exactly.
OPTIONS: Mapping[str, Sequence[Any]] = {
    "warps": (1, 2, 4, 8, 16, 32), "stages": range(1, 9), "pipeline": (False, True),
    "f32_dot": ("ieee", "tf32x3", "tf32"), "mixed_dot": ("bf16x3", "bf16x2", "bf16"),
}
_MAX_BLOCK = 1 << 16


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of a schedule's options; block sizes of `tile` stand beside them.

    Raises:
        InputError: an option is unknown or has no usable value.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"schedule: {options!r} given; expected a mapping such as {{'BM': 128, 'warps': 8}}")
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name == "tile":
            if not isinstance(value, Mapping):
                raise InputError(f"schedule: tile={value!r} given; expected a mapping such as {{'BM': 128}}")
            flat.update({key: _block(key, size) for key, size in value.items()})
        elif name in OPTIONS:
            # By type too: True is no number of warps.
            if not any(value == choice and type(value) is type(choice) for choice in OPTIONS[name]):
                raise InputError(f"schedule: {name}={value!r} given; expected one of "
                                 f"{', '.join(map(str, OPTIONS[name]))}")
            flat[name] = value
        elif _is_block_name(name):
            flat[name] = _block(name, value)
        else:
            raise InputError(f"schedule: {name!r} is not an option; expected {', '.join(('tile', *OPTIONS))} "
                             "or a block size such as BM")
    return flat


def _is_block_name(name: Any) -> bool:
    return isinstance(name, str) and name.isupper() and name.isidentifier()


def _block(name: Any, size: Any) -> int:
    if not _is_block_name(name):
        raise InputError(f"schedule: tile={{{name!r}: ...}} given; expected names in capitals such as 'BM'")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _MAX_BLOCK:
        raise InputError(f"schedule: block size {name}={size!r} given; expected 1 to {_MAX_BLOCK}")
    return size


def schedule(**options: Any) -> Callable[[Any], Any]:
    """Fix a kernel's schedule; stands above or below `@ts.kernel`.

    Args:
        options: `tile`, a mapping of block sizes: "BM", "BN", "BK", and those that the kernel reads as `ctx.NAME` or
            has as a compile-time parameter; `warps`, `stages`, `pipeline`; and how f32 tiles are multiplied on CUDA:
            `f32_dot` ("tf32x3", "ieee", "tf32"), `mixed_dot` ("bf16x3", "bf16x2", "bf16").

    Raises:
        InputError: an option is unknown or has no usable value.
    """
    flat = flatten(options)

    def apply(target: Any) -> Any:
        if hasattr(target, "__tile_kernel__"):
            return target.with_schedule(**options)
        if not callable(target):
            raise InputError(f"schedule: {target!r} given; expected a kernel or a function")
        target.__tile_schedule__ = {**getattr(target, "__tile_schedule__", {}), **flat}
        return target

    return apply
