"""One case for every public operation: shapes in letters, a call, and what it should give, written out in float64.

`test_sweep.py` takes each through ragged, empty and one-element sizes, layouts, extreme values, and torch's own checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera import ops

# Batch, sequence, keys, query and key heads, widths (odd D, even E), d_ffn, classes, outputs, vocabulary, places of a
# page, new tokens; M pages are 2 a row.
SIZES = {"B": 2, "S": 5, "T": 9, "H": 4, "K": 2, "D": 17, "E": 18, "F": 13, "C": 33, "O": 7, "V": 40, "P": 4, "N": 3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation as it is called, and its meaning.

    Args:
        shapes: of the float tensors: letters of `SIZES`, one word a tensor; [] for none.
        call: of the tensors.
        want: of the same in f64; independent of `ops`.
        factor: on the tolerance of the dtype.
        fixed: letters that do not become 1 or 0, since others are multiples of them.
        no: checks that do not apply: "traced" (it depends on the numbers), "vmap", "infinite" (it refuses them),
            "slopes of 1e30" (differences of large numbers).
    """

    shapes: str
    call: Callable[..., Any]
    want: Callable[..., Any]
    factor: float = 1.0
    fixed: str = ""
    no: tuple[str, ...] = ()

    def tensors(self, seed: int, dtype: torch.dtype, **sizes: int) -> list[Tensor]:
        """Leaves of standard normal values."""
        generator = torch.Generator().manual_seed(seed)
        known = {**SIZES, **sizes}
        known["M"] = 2 * known["B"]
        return [torch.randn([known[letter] for letter in word], generator=generator, dtype=torch.float64)
                .to(dtype).requires_grad_() for word in self.shapes.split()]


def ids(shape: Any, n_classes: int = SIZES["V"]) -> Tensor:
    """Classes that differ, and repeat."""
    return (torch.arange(math.prod(shape)) * 7 + 3).remainder(max(n_classes, 1)).view(shape)


def _rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate) * (x @ up)) @ down


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, bias: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, seen: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D] from keys of [B, K, T, D], one step after the other."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s, t = q.shape[2], k.shape[2]
    scores = q @ k.mT * q.shape[-1]**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(s, t, dtype=torch.bool).triu(t - s + 1), -torch.inf)
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], s, 1)], -1)
    weights = scores.softmax(-1)[..., :t]
    return weights.masked_fill(scores[..., :t] == -torch.inf, 0.0) @ v


def _turned(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Heads [B, S, H, D] as complex numbers, times e^(i angle)."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    turned = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1)
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


def _angles(n: int, width: int, base: float = 1e4) -> Tensor:
    return torch.arange(n).double()[:, None] * base ** (-torch.arange(0, width, 2).double() / width)


def _cross_entropy(
    logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
) -> Tensor:
    """Targets of -100 are left out; -inf logits have no part in the smoothing but an infinite one."""
    lse = logits.logsumexp(-1)
    counted = targets != -100
    picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = lse - (1 - smoothing) * picked
    if smoothing:
        losses = losses - smoothing * logits.mean(-1)
    losses = torch.where(counted, losses + z_loss * lse.square(), 0.0)
    return losses if reduction == "none" else losses.sum() / counted.sum().clamp(min=1)


def _margin(scores: Tensor, targets: Tensor) -> Tensor:
    others = scores.scatter(1, targets[:, None], -torch.inf).amax(1)
    return (1 + others - scores.gather(1, targets[:, None])[:, 0]).relu().sum() / max(len(scores), 1)


def _contrast(x: Tensor, labels: Tensor) -> Tensor:
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    scores = (unit @ unit.T / 0.07).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    positive = (labels[:, None] == labels) & ~torch.eye(len(x), dtype=torch.bool)
    rows = positive.any(1)
    if not rows.any():
        return x.sum() * 0
    return (scores.logsumexp(1) - scores.masked_fill(~positive, -torch.inf).logsumexp(1))[rows].mean()


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None]


def _scale8(w: Tensor) -> Tensor:
    return w.detach().abs().amax(-1) / 127


def _rounded8(w: Tensor) -> Tensor:
    """As int8 stores the rows of the f32 (or bf16) weight; a constant."""
    scale = (w.detach().float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-38) if w.numel() else 1.0
    return ((w.detach().float() / scale).round() * scale).double()


def _float8(x: Tensor) -> Tensor:
    return ops.cast(x.detach(), "fp8_e4m3")


def _paged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, size = q.shape[0], k.shape[1]
    table = torch.arange(2 * n, dtype=torch.int32).view(n, 2)
    return ops.paged_attention(q, k, v, table, torch.full((n,), 2 * size - 1, dtype=torch.int32))


def _paged_want(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two pages a row, of which all places but the last are keys."""
    k, v = (x.unflatten(0, (-1, 2)).flatten(1, 2)[:, :-1].transpose(1, 2) for x in (k, v))
    return _attention(q.transpose(1, 2), k, v, causal=True).transpose(1, 2)



def _ce(x: Tensor, reduction: str = "mean") -> tuple[Any, ...]:
    targets = ids(x.shape[:-1], x.shape[-1])
    return (torch.where(targets % 4 == 1, -100, targets), -100, 0.1, reduction, 0.01)


def _ce_want(x: Tensor, reduction: str = "mean") -> Tensor:
    return _cross_entropy(x, _ce(x)[0], smoothing=0.1, z_loss=0.01, reduction=reduction)


def _quantized_weights(*weights: Tensor) -> tuple[Tensor, ...]:
    *codes, scales = ops.quantize_swiglu(*weights)
    return tuple(ops.dequantize_rows(q.T, s, torch.float32) for q, s in zip(codes, scales.values()))


def _same(x: Any) -> Any:
    return x


_QKV, _NO_ROOM, _LARGE = "BHSD BKTD BKTD", "HK", ("slopes of 1e30",)

CASES: dict[str, Case] = {
    # norms
    "rms_norm": Case(shapes="BSD D", call=lambda x, w: ops.rms_norm(x, w), want=_rms),
    "rmsnorm": Case(
        shapes="BSD", call=lambda x: ops.rmsnorm(x, eps=1e-6), want=lambda x: _rms(x, x.new_ones(()), 1e-6)),
    "add_rms_norm": Case(
        shapes="BSD BSD D", call=lambda x, r, w: ops.add_rms_norm(x, r, w), factor=2,
        want=lambda x, r, w: (_rms(x + r, w), x + r)),
    "stable_rms_norm": Case(
        shapes="BSD D", call=lambda x, w: ops.stable_rms_norm(x, w), want=lambda x, w: _rms(x, w, 1e-6)),
    "sharded_rms_norm": Case(
        shapes="BSD D", call=lambda x, w: ops.sharded_rms_norm(x, w, x.shape[-1], _same),
        want=lambda x, w: _rms(x, w, 1e-6)),
    "layer_norm": Case(
        shapes="BSD D D", call=lambda x, w, b: ops.layer_norm(x, w, b),
        want=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)),
    # activations
    "silu": Case(shapes="BSD", call=lambda x: ops.silu(x), want=F.silu),
    "swish": Case(shapes="BSD", call=lambda x: ops.swish(x, 1.5), want=lambda x: x * torch.sigmoid(1.5 * x)),
    "gelu": Case(shapes="BSD", call=lambda x: ops.gelu(x), want=F.gelu),
    "gelu_tanh": Case(shapes="BSD", call=lambda x: ops.gelu_tanh(x), want=lambda x: F.gelu(x, approximate="tanh")),
    "relu": Case(shapes="BSD", call=lambda x: ops.relu(x), want=F.relu),
    "relu2": Case(shapes="BSD", call=lambda x: ops.relu2(x), want=lambda x: F.relu(x).square()),
    "softcap": Case(shapes="BSD", call=lambda x: ops.softcap(x, 3.0), want=lambda x: 3 * torch.tanh(x / 3)),
    # MLPs
    "gated": Case(shapes="BSF BSF", call=lambda g, u: ops.gated(g, u, "gelu"), want=lambda g, u: F.gelu(g) * u),
    "gated_packed": Case(
        shapes="BSE", call=lambda x: ops.gated_packed(x, "gelu_tanh"),
        want=lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1], fixed="E"),
    "swiglu": Case(shapes="BSD DF DF FD", call=lambda *t: ops.swiglu(*t), want=_mlp, factor=4),
    "swiglu_packed": Case(
        shapes="BSE", call=lambda x: ops.swiglu_packed(x), want=lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        fixed="E"),
    "fused_mlp": Case(
        shapes="BSD DF DF FD", call=lambda x, g, u, d: ops.fused_mlp(x, up=u, gate=g, down=d), want=_mlp, factor=4),
    "swiglu_memory_efficient": Case(
        shapes="BSD DF DF FD", call=lambda *t: ops.swiglu_memory_efficient(*t, chunk_size=5), want=_mlp, factor=4),
    "swiglu_quantized": Case(
        shapes="BSD DF DF FD", call=lambda x, *w: ops.swiglu_quantized(x, *ops.quantize_swiglu(*w)), factor=4,
        want=lambda x, *w: _mlp(x, *(_rounded8(each.T).T for each in w)).detach()),
    "quantize_swiglu": Case(
        shapes="DF DF FD", call=_quantized_weights,
        want=lambda *w: tuple(_rounded8(each.T) for each in w)),
    # attention
    "attention": Case(
        shapes="BHSD BKTD BKTD H", call=lambda q, k, v, s: ops.attention(q, k, v, is_causal=True, sinks=s),
        want=lambda q, k, v, s: _attention(q, k, v, causal=True, sinks=s), fixed=_NO_ROOM, factor=2, no=_LARGE),
    "grouped_query_attention": Case(
        shapes=_QKV, call=lambda *t: ops.grouped_query_attention(*t), want=lambda *t: _attention(*t, causal=True),
        fixed=_NO_ROOM, factor=2, no=_LARGE),
    "multi_query_attention": Case(
        shapes="BHSD BTD BTD", call=lambda *t: ops.multi_query_attention(*t), factor=2,
        want=lambda q, k, v: _attention(q, k[:, None], v[:, None], causal=True), no=_LARGE),
    "flash_attention": Case(
        shapes=_QKV, call=lambda *t: ops.flash_attention(*t), want=_attention, fixed=_NO_ROOM, factor=2, no=_LARGE),
    "chunked_attention": Case(
        shapes=_QKV, call=lambda *t: ops.chunked_attention(*t, 4, softcap=2.0, is_causal=True), fixed=_NO_ROOM,
        want=lambda *t: _attention(*t, softcap=2.0, causal=True), factor=2, no=_LARGE),
    "paged_attention": Case(
        shapes="BNHE MPKE MPKE", call=_paged, want=_paged_want, fixed=_NO_ROOM, factor=2, no=_LARGE),
    # positions
    "rotary": Case(
        shapes="BSHE", call=lambda x: ops.rotary(x, *ops.rope_tables(range(x.shape[1]), x.shape[-1], 1e4)),
        want=lambda x: _turned(x, _angles(x.shape[1], x.shape[-1])), fixed="E"),
    "rotary_": Case(
        shapes="BSHE", call=lambda x: ops.rotary_(
            x.detach().clone(), *ops.rope_tables(range(x.shape[1]), x.shape[-1], 1e4)),
        want=lambda x: _turned(x, _angles(x.shape[1], x.shape[-1])).detach(), fixed="E"),
    "rotary_embedding": Case(
        shapes="BSHE", call=lambda x: ops.rotary_embedding(x, interleaved=True),
        want=lambda x: _turned(x, _angles(x.shape[1], x.shape[-1]), True), fixed="E"),
    "apply_rotary_pos_emb": Case(
        shapes="BSHE", call=lambda x: ops.apply_rotary_pos_emb(x, *(
            f(_angles(x.shape[1], x.shape[-1])).float()[None, :, None] for f in (torch.cos, torch.sin))),
        want=lambda x: _turned(x, _angles(x.shape[1], x.shape[-1])), fixed="E"),
    "dynamic_rope": Case(
        shapes="BSHE", call=lambda x: ops.dynamic_rope(x, _positions(x), max_position=2, scaling_type="linear"),
        want=lambda x: _turned(x, _angles(x.shape[1], x.shape[-1]) / max(x.shape[1] / 2, 1)), fixed="E",
        no=("traced",)),  # the longest position is a number
    "cos_sin_embedding": Case(
        shapes="", call=lambda: ops.cos_sin_embedding(5, 6),
        want=lambda: tuple(f(_angles(5, 6)).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))),
    "alibi_slopes": Case(
        shapes="", call=lambda: ops.alibi_slopes(4), want=lambda: 2.0 ** (-2 * torch.arange(1, 5).double())),
    "alibi_bias": Case(
        shapes="", call=lambda: ops.alibi_bias(3, 4), want=lambda: (
            2.0 ** (-2 * torch.arange(1, 5).double())[:, None, None] * (torch.arange(3) - torch.arange(3)[:, None]))),
    # tables
    "embedding": Case(
        shapes="VD", call=lambda t: ops.embedding(ids((3, 4), len(t)), t), want=lambda t: t[ids((3, 4), len(t))]),
    "casted_embedding": Case(
        shapes="VD", call=lambda t: ops.casted_embedding(ids((9,), len(t)), t, 0.5, torch.float32),
        want=lambda t: t[ids((9,), len(t))] * 0.5),
    "casted_sparse_embedding": Case(
        shapes="VD", call=lambda t: ops.casted_sparse_embedding(
            ids((9,), len(t)), ops.to_block_sparse(t, 0.0, dtype=torch.float32), dtype=torch.float32),
        want=lambda t: t.detach()[ids((9,), len(t))], no=("traced",)),  # which blocks are kept depends on numbers
    "to_block_sparse": Case(
        shapes="VD", call=lambda t: ops.to_block_sparse(t, 0.0, block_size=4, dtype=torch.float32).to_dense(),
        want=lambda t: t.detach(), no=("traced",)),
    # linear maps
    "linear": Case(shapes="BSD OD O", call=lambda *t: ops.linear(*t), want=F.linear),
    "matmul": Case(shapes="BSD DO", call=lambda a, b: ops.matmul(a, b), want=torch.matmul),
    "gemm": Case(shapes="BSD DO", call=lambda a, b: ops.gemm(a, b), want=torch.matmul),
    "casted_linear": Case(
        shapes="BSD OD O", call=lambda x, w, b: ops.casted_linear(x, *ops.quantize_rows(w.detach(), torch.int8), b),
        want=lambda x, w, b: F.linear(x, _rounded8(w), b)),
    "quantized_matmul": Case(
        shapes="BSD DO", call=lambda x, w: ops.quantized_matmul(
            x, (q := ops.quantize_rows(w.detach().T, torch.int8))[0].T, weight_scale=q[1]),
        want=lambda x, w: (x @ _rounded8(w.T).T).detach()),
    "int8_linear": Case(
        shapes="BSD OD O", call=lambda x, w, b: ops.int8_linear(x, *ops.quantize_rows(w.detach(), torch.int8), b),
        want=lambda x, w, b: F.linear(x + (_rounded8(x) - x).detach(), _rounded8(w), b)),
    # few bits
    "swish_fp8": Case(
        shapes="BSD", call=lambda x: ops.swish_fp8(_float8(x)).float(), factor=4000,
        want=lambda x: F.silu(_float8(x).double()).clamp(-448, 448)),
    "mul_fp8": Case(
        shapes="BSD BSD", call=lambda a, b: ops.mul_fp8(_float8(a), _float8(b)).float(), factor=4000,
        want=lambda a, b: (_float8(a).double() * _float8(b).double()).clamp(-448, 448)),
    "quantize": Case(
        shapes="BSD", call=lambda x: ops.quantize(x.detach(), "int8").dequantize(), want=_rounded8, no=("infinite",)),
    "dequantize": Case(
        shapes="BSD", call=lambda x: ops.dequantize(ops.quantize(x.detach(), "int8"), torch.float64), want=_rounded8,
        no=("infinite",)),
    "quantize_rows": Case(
        shapes="BSD", call=lambda x: (q := ops.quantize_rows(x.detach(), torch.int8))[0].float() * q[1][..., None],
        want=_rounded8),
    "dequantize_rows": Case(
        shapes="BSD", call=lambda x: ops.dequantize_rows(*ops.quantize_rows(x.detach(), torch.int8), torch.float64),
        want=_rounded8),
    "fake_quantize_rows": Case(
        shapes="BSD", call=lambda x: ops.fake_quantize_rows(x, torch.int8),
        want=lambda x: x + (_rounded8(x) - x).detach()),
    # softmax and what belongs to it
    "softmax": Case(shapes="BSC", call=lambda x: ops.softmax(x), want=lambda x: x.softmax(-1)),
    "softmax_safe": Case(shapes="BSC", call=lambda x: ops.softmax_safe(x, dim=1), want=lambda x: x.softmax(1)),
    "log_softmax": Case(shapes="BSC", call=lambda x: ops.log_softmax(x), want=lambda x: x.log_softmax(-1)),
    "log_softmax_stable": Case(
        shapes="BSC", call=lambda x: ops.log_softmax_stable(x, dim=0), want=lambda x: x.log_softmax(0)),
    "masked_mean": Case(
        shapes="BSC", call=lambda x: ops.masked_mean(x, torch.arange(x.shape[-1]) % 3 > 0, -1),
        want=lambda x: x[..., torch.arange(x.shape[-1]) % 3 > 0].sum(-1) / max((x.shape[-1] * 2) // 3, 1)),
    "l2_normalize": Case(
        shapes="BSD", call=lambda x: ops.l2_normalize(x),
        want=lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)),
    # losses
    "cross_entropy": Case(shapes="BSC", call=lambda x: ops.cross_entropy(x, *_ce(x)), want=_ce_want),
    "stable_cross_entropy": Case(
        shapes="BSC", call=lambda x: ops.stable_cross_entropy(x, *_ce(x, "none")), want=lambda x: _ce_want(x, "none")),
    "cross_entropy_safe": Case(
        shapes="BSC", call=lambda x: ops.cross_entropy_safe(x, *_ce(x)[:2]),
        want=lambda x: _cross_entropy(x, _ce(x)[0])),
    "softmax_cross_entropy": Case(
        shapes="BC", call=lambda x: ops.softmax_cross_entropy(x, ids(x.shape[:-1], x.shape[-1])),
        want=lambda x: _cross_entropy(x, ids(x.shape[:-1], x.shape[-1]))),
    "fused_softmax_cross_entropy": Case(
        shapes="BC", call=lambda x: ops.fused_softmax_cross_entropy(x, ids(x.shape[:-1], x.shape[-1]), "none"),
        want=lambda x: _cross_entropy(x, ids(x.shape[:-1], x.shape[-1]), reduction="none")),
    "linear_cross_entropy": Case(
        shapes="BSD CD", call=lambda h, w: ops.linear_cross_entropy(h, w, *_ce(h @ w.T)),
        want=lambda h, w: _ce_want(h @ w.T)),
    "vocab_parallel_cross_entropy": Case(
        shapes="BSD CD", call=lambda h, w: ops.vocab_parallel_cross_entropy(
            h, w, _ce(h @ w.T)[0], first_class=0, n_classes=len(w), reduce_max=_same, reduce_sum=_same,
            label_smoothing=0.1, z_loss=0.01), want=lambda h, w: _ce_want(h @ w.T), no=("vmap",)),
    "max_margin_loss": Case(
        shapes="BC", call=lambda x: ops.max_margin_loss(x, ids(x.shape[:1], x.shape[1])),
        want=lambda x: _margin(x, ids(x.shape[:1], x.shape[1]))),
    "stable_max_margin_loss": Case(
        shapes="BC", call=lambda x: ops.stable_max_margin_loss(x, ids(x.shape[:1], x.shape[1])),
        want=lambda x: _margin(x, ids(x.shape[:1], x.shape[1]))),
    "contrastive_loss": Case(
        shapes="SD", call=lambda x: ops.contrastive_loss(x, ids(x.shape[:1], 2)),
        want=lambda x: _contrast(x, ids(x.shape[:1], 2)), factor=20),
    "stable_contrastive_loss": Case(
        shapes="SD", call=lambda x: ops.stable_contrastive_loss(x, ids(x.shape[:1], 4)),
        want=lambda x: _contrast(x, ids(x.shape[:1], 4)), factor=20),
}
