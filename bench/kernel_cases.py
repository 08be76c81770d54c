"""The cases of bench/kernels.py: what is computed, by whom, and what the machine would need at least.

Each case has our kernel, torch's own operation (eager), the function that torch.compile gets, a float64
reference, and either its flops or a `floor`: a torch operation that only moves the same bytes. Products of up to 8
rows find their weights in memory, as a model that generates does: each call takes another copy. "again" are the same
products of one weight, over and over, which stays in the caches where it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from itertools import cycle, product
from typing import Any

import torch
import torch.nn.functional as F
from common import device
from torch import Tensor

from tessera.ops import kernels
from tessera.ops.kernels.quantized import GROUP

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 256 << 20  # of the copies of a weight that few rows take in turn: more than caches hold
SLOW_BF16_FLOPS = 4e8  # the largest bf16 product that a processor without bf16 instructions is given


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table; every callable computes the same thing."""

    group: str
    label: str
    ours: Callable[[], None]
    eager: Callable[[], Tensor]
    out: Tensor  # what `ours` writes
    expected: Callable[[], Tensor]  # in float64
    function: Callable[..., Tensor] | None = None  # for torch.compile, with `arguments`
    arguments: Sequence[object] = ()
    liger: Callable[[], object] | None = None
    liger_waits: bool = False  # for the GPU, which a CUDA graph cannot hold
    turns: int = 1  # calls until tensors come back that an earlier call has read
    floor: Callable[[], object] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    goal: float = 1.2  # how many times faster than torch

    @property
    def tolerance(self) -> float:
        """Largest error allowed, relative to the largest value expected."""
        return 1e-5 if self.out.dtype == torch.float32 else 2.0**-8


def pointwise_cases(quick: bool) -> Iterator[Case]:
    """Rows and elementwise operations, bound by memory; on a GPU eight times as many, beyond its cache."""
    unit = (8 if device() == "cuda" else 1) * (1 if quick else 8)
    for name, dtype in DTYPES.items():
        for rows, width in [(1024 * unit, 1024), (256 * unit, 4096)]:
            yield _rms_norm(name, dtype, rows, width)
            yield _softmax(name, dtype, rows, width)
        for rows, classes in [(64 * unit, 50257), (32 * unit, 131072)]:
            yield _cross_entropy(name, dtype, rows, classes)
        yield _swiglu(name, dtype, 256 * unit, 4096)
        for width in (64, 128):
            yield _rope(name, dtype, 256 * unit, 2048 // width, width)
    for name, dtype in [("f32->bf16", torch.float32), ("fp8->bf16", torch.float8_e4m3fn)]:
        yield _embedding(name, dtype, 1024 * unit, 2048)


def gemm_cases(quick: bool, fast_bf16: bool) -> Iterator[Case]:
    """Square and skinny matrix products with the weight as [N, K], as a linear layer has it."""
    sizes = [256, 512] if quick else [256, 512, 1024, 2048, 4096]
    skinny = [(576, 1536)] if quick else [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]
    if device() == "cuda" and not quick:
        sizes, skinny = [*sizes, 8192], [*skinny, (14336, 4096)]
    shapes = [(size, size, size) for size in sizes] + [(m, n, k) for m in (1, 8, 32) for n, k in skinny]
    for name, (m, n, k) in product(DTYPES, shapes):
        if name == "f32" or fast_bf16 or 2 * m * n * k <= SLOW_BF16_FLOPS:
            yield _linear(name, DTYPES[name], m, n, k)
            if m <= 8:
                yield _linear(name, DTYPES[name], m, n, k, again=True)


def quantized_cases(quick: bool) -> Iterator[Case]:
    """Skinny products with weights in 8 and 4 bits, beside torch's product of the same shape; the activations in f32
    (on a GPU in bf16, as torch's product is), and rounded to 8 bits (by rows, or by the groups of the weights)."""
    shapes = [(576, 1536)] if quick else [(1536, 576), (576, 1536), (49152, 576), (4096, 4096)]
    for kind, m, (n, k) in product(("int8", "q8_0", "q4_0", "q4_1"), (1, 8), shapes):
        yield _quantized(kind, m, n, k)
        yield _quantized(kind, m, n, k, rounded=True)


def attention_cases(quick: bool, fast_bf16: bool) -> Iterator[Case]:
    """Causal attention with 8 heads that share 8 or 2 heads of keys and values; on a GPU, four times eight."""
    scale = 4 if device() == "cuda" else 1
    lengths = [512] if quick else [512, 1024, 2048, 4096]
    for name, width, length, kv_heads in product(DTYPES, (64, 128), lengths, (8, 2)):
        small = length == 512 and width == 64
        if (kv_heads == 8 or length == 1024) and (name == "f32" or fast_bf16 or small):
            yield _attention(name, DTYPES[name], 8 * scale, kv_heads * scale, length, width)


def _liger(name: str) -> Callable[..., object] | None:
    """A function of liger-kernel, which runs on GPUs alone; None where it is not installed."""
    if device() != "cuda" or util.find_spec("liger_kernel") is None:
        return None
    function: Callable[..., object] | None = getattr(import_module("liger_kernel.transformers.functional"), name, None)
    return function


def _peer(name: str, *arguments: object, **options: object) -> Callable[[], object] | None:
    """A call of a function of liger-kernel, which may write to what it is given."""
    function = _liger(name)
    own = [x.clone() if isinstance(x, Tensor) else x for x in arguments] if function else []
    return (lambda: function(*own, **options)) if function else None


def _rms_norm(name: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    x, weight = torch.randn(rows, width).to(dtype), torch.rand(width).to(dtype)
    out = torch.empty_like(x)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    return Case(
        group=f"rms_norm {name}", label=f"rms_norm {name} {rows}x{width}", out=out,
        ours=lambda: kernels.rms_norm_kernel(x[None], weight, out[None], 1e-6), eager=lambda: formula(x, weight),
        expected=lambda: formula(x.double(), weight.double()), function=formula, arguments=(x, weight),
        liger=_peer("liger_rms_norm", x, weight, 1e-6, in_place=False), floor=_move([x], out), bytes=2 * x.nbytes)


def _softmax(name: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    x = torch.randn(rows, width).to(dtype)
    out = torch.empty_like(x)

    def formula(x: Tensor) -> Tensor:
        return x.softmax(-1)

    return Case(
        group=f"softmax {name}", label=f"softmax {name} {rows}x{width}", out=out,
        ours=lambda: kernels.softmax_kernel(x, out), eager=lambda: formula(x),
        expected=lambda: formula(x.double()), function=formula, arguments=(x,),
        liger=_peer("liger_softmax", x), floor=_move([x], out), bytes=2 * x.nbytes)


def _cross_entropy(name: str, dtype: torch.dtype, rows: int, classes: int) -> Case:
    x, targets = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    loss = torch.empty(rows)

    def formula(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), targets, reduction="none")

    return Case(
        group=f"cross_entropy {name}", label=f"cross_entropy {name} {rows}x{classes}", out=loss,
        ours=lambda: kernels.cross_entropy_kernel(x, targets, loss), eager=lambda: formula(x, targets),
        expected=lambda: F.cross_entropy(x.double(), targets, reduction="none"), function=formula,
        arguments=(x, targets), liger=_peer("liger_cross_entropy", x, targets, reduction="none"),
        liger_waits=True, floor=_move([x], None), bytes=x.nbytes)


def _swiglu(name: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    gate, up = (torch.randn(rows, width).to(dtype) for _ in range(2))
    out = torch.empty_like(gate)

    def formula(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    return Case(
        group=f"swiglu {name}", label=f"swiglu {name} {rows}x{width}", out=out,
        ours=lambda: kernels.gated_kernel(gate[None], up[None], out[None]), eager=lambda: formula(gate, up),
        expected=lambda: formula(gate.double(), up.double()), function=formula, arguments=(gate, up),
        liger=_peer("liger_swiglu", gate, up), floor=_move([gate, up], out), bytes=3 * out.nbytes)


def _rope(name: str, dtype: torch.dtype, length: int, heads: int, width: int) -> Case:
    x, angles = torch.randn(length, heads, width).to(dtype), torch.randn(length, width // 2)
    cos, sin, out = angles.cos(), angles.sin(), torch.empty_like(x)

    def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.to(cos.dtype).chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)

    # liger-kernel rotates queries and keys [B, H, S, D] together, in place: half of the heads each.
    q, k = x[None].transpose(1, 2).chunk(2, dim=1)
    whole_cos, whole_sin = (torch.cat([t, t], -1)[None] for t in (cos, sin))
    return Case(
        group=f"rope {name}", label=f"rope {name} {length}x{heads}x{width}", out=out,
        ours=lambda: kernels.rope_kernel(x[None], cos, sin, out[None]), eager=lambda: formula(x, cos, sin),
        expected=lambda: formula(x.double(), cos.double(), sin.double()), function=formula,
        arguments=(x, cos, sin), liger=_peer("liger_rope", q, k, whole_cos, whole_sin), floor=_move([x], out),
        bytes=2 * x.nbytes)


def _embedding(name: str, dtype: torch.dtype, tokens: int, width: int) -> Case:
    table, ids = torch.randn(32000, width).to(dtype), torch.randint(32000, (tokens,))
    out = torch.empty(tokens, width, dtype=torch.bfloat16)
    rows = table[:tokens]

    def formula(table: Tensor, ids: Tensor) -> Tensor:
        return (table[ids].float() * 0.5).bfloat16()

    return Case(
        group=f"embedding {name}", label=f"embedding {name} {tokens}x{width}", out=out,
        ours=lambda: kernels.casted_embedding_kernel(ids, table, out, 0.5), eager=lambda: formula(table, ids),
        expected=lambda: table[ids].double() * 0.5, function=formula, arguments=(table, ids),
        floor=_move([rows], out), bytes=rows.nbytes + out.nbytes)


def _linear(name: str, dtype: torch.dtype, m: int, n: int, k: int, *, again: bool = False) -> Case:
    """`again`: few rows find the one weight that the last call left in the caches, where it fits."""
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    weights = _copies(weight) if m <= 8 and not again else [weight]
    note = " again" if again else ""
    rows, goal = ("M<=8", 1.5) if m <= 8 else ("M=32", 1.0) if m == 32 else ("M>=128", 1.1 if name == "f32" else 0.9)
    return Case(
        group=f"gemm {name} {rows}{note}", label=f"gemm {name} {m}x{n}x{k}{note}", out=out, goal=goal,
        ours=_in_turn(lambda w: kernels.linear_kernel(x, w, out), weights),
        eager=_in_turn(lambda w: F.linear(x, w), weights),
        expected=lambda: x[:16].double() @ weight.double().T, turns=len(weights), flops=2.0 * m * n * k,
        bytes=weight.nbytes,
        floor=_in_turn(lambda read: read(), [_move([w], None) for w in weights]) if m <= 32 else None)


def _copies(x: Tensor) -> list[Tensor]:
    """So many copies of a tensor that none is left in a cache when its turn comes."""
    return [x, *(x.clone() for _ in range(COLD_BYTES // x.nbytes))]


def _in_turn(run: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[], Any]:
    """A call of run() with the next item."""
    turns = cycle(items)
    return lambda: run(next(turns))


def _quantized(kind: str, m: int, n: int, k: int, *, rounded: bool = False) -> Case:
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    x, out, dense = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype), torch.randn(n, k).to(dtype)
    groups = k // GROUP
    quants = torch.randint(-128, 128, (n, k), dtype=torch.int8) if kind in ("int8", "q8_0") else \
        torch.randint(256, (n, k // 2), dtype=torch.uint8)
    numbers = quants.double() if quants.dtype == torch.int8 else \
        torch.stack([(quants & 15 ^ 8), (quants >> 4 ^ 8)], -1).flatten(-2).double() - 8
    scale = torch.rand(n) if kind == "int8" else torch.rand(n, groups).half()
    minimum = torch.randn(n, groups) if kind == "q4_1" else None
    ours: dict[str, Callable[[Tensor], None]] = {
        "int8": lambda w: kernels.int8_linear_kernel(x, w, scale, out),
        "q8_0": lambda w: kernels.int8_group_linear_kernel(x, w, scale, out),
        "q4_0": lambda w: kernels.int4_linear_kernel(x, w, scale, None, out),
        "q4_1": lambda w: kernels.int4_linear_kernel(x, w, scale, minimum, out),
    }
    in_int8: dict[str, Callable[[Tensor], None]] = {
        "int8": lambda w: kernels.int8_rows_kernel(x, w, scale, out),
        "q8_0": lambda w: kernels.int8_group_product_kernel(x, w, scale, out),
        "q4_0": lambda w: kernels.int4_product_kernel(x, w, scale, None, out),
        "q4_1": lambda w: kernels.int4_product_kernel(x, w, scale, minimum, out),
    }
    weights = _copies(quants)

    def expected() -> Tensor:
        grouped = numbers.reshape(n, -1, k // (scale.numel() // n)) * scale.double().reshape(n, -1, 1)
        weight = (grouped if minimum is None else grouped + minimum.double()[..., None]).reshape(n, k)
        return (_rounded(x, k if kind == "int8" else GROUP) if rounded else x.double()) @ weight.T

    name = f"{kind} x int8" if rounded else kind
    return Case(
        group=f"{name} weights M={m}", label=f"linear {name} {m}x{n}x{k}", out=out, goal=1.5,
        ours=_in_turn((in_int8 if rounded else ours)[kind], weights),
        eager=_in_turn(lambda w: F.linear(x, w), _copies(dense)), expected=expected,
        floor=_in_turn(lambda read: read(), [_move([w], None) for w in weights]), turns=len(weights),
        flops=2.0 * m * n * k, bytes=quants.nbytes + scale.nbytes + (0 if minimum is None else minimum.nbytes))


def _rounded(x: Tensor, group: int) -> Tensor:
    """x to the nearest multiples of max|x| / 127 of each group of a row, in float64."""
    groups = x.float().unflatten(-1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True).float() / 127  # in f32, as the kernels do
    codes = (groups / step if group == x.shape[-1] else groups * (1 / step)).round()
    return (codes.double() * step.double()).flatten(-2)


def _attention(name: str, dtype: torch.dtype, heads: int, kv_heads: int, length: int, width: int) -> Case:
    q = torch.randn(1, heads, length, width).to(dtype)
    k, v = (torch.randn(1, kv_heads, length, width).to(dtype) for _ in range(2))
    out, scale = torch.empty_like(q), width**-0.5

    def expected() -> Tensor:
        parts = (t[:, -1:].double() for t in (q, k, v))
        return F.scaled_dot_product_attention(*parts, is_causal=True)[:, 0]

    def eager() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != heads)

    return Case(
        group=f"attention {name}", label=f"attention {name} {heads}/{kv_heads}x{length}x{width}", out=out[:, -1],
        goal=1.2 if name == "f32" else 1.5,
        ours=lambda: kernels.flash_attention_kernel(q, k, v, out, scale, causal=True), eager=eager,
        expected=expected, flops=2.0 * heads * length**2 * width)


def _move(inputs: Sequence[Tensor], out: Tensor | None) -> Callable[[], object]:
    """A torch operation on f32 that reads as many bytes as `inputs` have and writes as many as `out` has."""
    words = [x.reshape(-1).view(torch.uint8)[:x.nbytes // 4 * 4].view(torch.float32) for x in inputs]
    if out is None:
        return words[0].sum
    target = torch.empty(out.nbytes // 4)
    if len(words) == 2:
        return lambda: torch.add(words[0], words[1], out=target)
    if words[0].numel() == target.numel():
        return lambda: target.copy_(words[0])
    pairs = torch.empty(words[0].numel() // target.numel() or 1, target.numel()) if words[0].numel() > target.numel() \
        else None
    if pairs is None:
        half = words[0].numel()
        return lambda: (target[:half].copy_(words[0]), target[half:].fill_(0.0))
    return lambda: torch.sum(pairs, 0, out=target)
