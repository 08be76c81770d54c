"""The angles of rotary position embedding, and the published ways of stretching them to longer contexts.

In: a head's width and the base. Out: each pair's angle per position. ops.rotary makes tables of them; the loaders of
checkpoints compare them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import InputError, UnsupportedError

_KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies are changed for contexts longer than the one trained on.

    Args:
        kind: "linear" (positions divided by `factor`), "dynamic" (NTK-aware: the base grows with the
            sequence), "llama3" (Llama 3.1) or "yarn" (arXiv:2309.00071).
        factor: by how much the context is stretched, >= 1.
        original_max_seq_len: the context trained on, in tokens; needed by dynamic, llama3 and yarn.
        low_freq_factor, high_freq_factor: llama3: wavelengths above original/low are stretched fully,
            below original/high not at all.
        beta_fast, beta_slow: yarn: turns per original context between which the stretch ramps.
        attention_factor: yarn: what cos and sin are multiplied by; None derives it from `factor`.
        mscale, mscale_all_dim: yarn: refine the derived attention factor (DeepSeek), both or neither.
        truncate: yarn: whether the ramp starts and ends at whole dims.
    """

    kind: str
    factor: float = 1.0
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind == "longrope":
            raise UnsupportedError(f"rope_scaling.kind: 'longrope' given; supported: {', '.join(_KINDS)}")
        if self.kind not in _KINDS:
            raise InputError(f"rope_scaling.kind: {self.kind!r} given; expected one of {', '.join(_KINDS)}")
        for field in dataclasses.fields(self)[1:-1]:
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf) and not (value is None and field.default is None):
                raise InputError(f"rope_scaling.{field.name}: {value!r} given; expected a number above 0")
        if not self.factor >= 1:
            raise InputError(f"rope_scaling.factor: {self.factor} given; expected a number >= 1")
        if self.kind != "linear" and self.original_max_seq_len is None:
            raise InputError(
                f"rope_scaling.original_max_seq_len: {self.original_max_seq_len} given; "
                f"kind {self.kind!r} needs the context length (in tokens) that the model was trained on")
        if not self.high_freq_factor > self.low_freq_factor:
            raise InputError(
                f"rope_scaling.high_freq_factor: {self.high_freq_factor} given with low_freq_factor "
                f"{self.low_freq_factor}; expected more")
        if not self.beta_fast >= self.beta_slow:
            raise InputError(
                f"rope_scaling.beta_fast: {self.beta_fast} given; expected at least beta_slow = {self.beta_slow}")


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None, *, seq_len: int = 0,
) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    Args:
        dim: rotated dims R, even.
        theta: base; pair i turns by theta^(-2i/R) radians a position (RoFormer, arXiv:2104.09864).
        scaling: how the context is stretched; None for the plain frequencies.
        seq_len: tokens in the sequence; only kind "dynamic" reads it.

    Returns:
        (frequencies [R/2] f32 on the CPU, attention factor).
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    if scaling is not None and scaling.kind == "dynamic":
        assert scaling.original_max_seq_len is not None
        stretch = scaling.factor * max(seq_len, scaling.original_max_seq_len) / scaling.original_max_seq_len
        theta = theta * (stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.kind == "dynamic":
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, dim, theta, scaling), _yarn_attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended linearly in 1/wavelength."""
    assert scaling.original_max_seq_len is not None
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # per original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, keep.clamp(0, 1))


def _yarn(frequencies: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Pairs with over beta_fast turns in the original context are kept, under beta_slow stretched."""
    assert scaling.original_max_seq_len is not None

    def dim_of_turns(turns: float) -> float:
        assert scaling.original_max_seq_len is not None
        return dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of_turns(scaling.beta_fast), dim_of_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretch = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling.factor, stretch)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
