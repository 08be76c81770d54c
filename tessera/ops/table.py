"""The table of operations, docs/operations.md, made from the code: `python -m tessera.ops.table > docs/operations.md`.

In: the operations as they are registered, `ROWS` below, and the measurements in bench/results. Out: Markdown. `make
docs` runs it; tests hold the table to the code and each row's tolerance to what comes out.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import ops
from tessera.ops.registration import Operation, implementation

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
HALF = 2.0**-7  # one rounding to bf16 and what comes before it


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation and its variants.

    Args:
        functions: public names in `ops`, the first with the summary; then the variants.
        registered: names of the registered operations that do the work, without the backward ones.
        shapes: of the float tensors of the sample.
        sample: a result from those tensors; it is computed in each dtype, and by the plain expressions in f64.
        f32, bf16: largest error, relative to the largest value (or 1).
        bench: groups of the benchmarks that measure it.
        launches: whether it launches tile kernels; None: as what is registered does.
    """

    functions: tuple[str, ...]
    registered: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...]
    sample: Callable[..., Tensor]
    f32: float = 1e-5
    bf16: float = HALF
    bench: tuple[str, ...] = ()
    launches: bool | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether a tile kernel computes it."""
        return bool(self.registered) if self.launches is None else self.launches


def _ids(count: int, n_classes: int) -> Tensor:
    return (torch.arange(count) * 7 + 3) % n_classes


def _rope(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return ops.rope_tables(range(x.shape[1]), x.shape[-1], 10000.0)


def _pages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.paged_attention(
        q, k, v, torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.tensor([7, 5], dtype=torch.int32))


def _sparse(table: Tensor) -> Tensor:
    return ops.casted_sparse_embedding(_ids(9, 40), ops.to_block_sparse(table.float(), 0.5), dtype=table.dtype)


def _swiglu_quantized(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ops.swiglu_quantized(x, *ops.quantize_swiglu(gate, up, down))


def _shard(hidden: Tensor, weight: Tensor) -> Tensor:
    return ops.vocab_parallel_cross_entropy(
        hidden, weight, _ids(5, 50), first_class=0, n_classes=50, reduce_max=lambda x: x, reduce_sum=lambda x: x)


def _rows8(weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.quantize_rows(weight, torch.int8)


_QKV = ((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16))
_MLP = ((2, 5, 8), (8, 12), (8, 12), (12, 8))

ROWS: tuple[Row, ...] = (
    Row(functions=("rms_norm", "rmsnorm"), registered=("rms_norm",), shapes=((5, 33), (33,)),
        sample=lambda x, w: ops.rms_norm(x, w), bench=("rms_norm",)),
    Row(functions=("add_rms_norm",), registered=("add_rms_norm",), shapes=((5, 33), (5, 33), (33,)),
        sample=lambda x, r, w: ops.add_rms_norm(x, r, w)[0], bench=("add_rms_norm",), bf16=2 * HALF),
    Row(functions=("stable_rms_norm",), shapes=((5, 33), (33,)), sample=lambda x, w: ops.stable_rms_norm(x * 1e30, w)),
    Row(functions=("sharded_rms_norm",), shapes=((5, 33), (33,)),
        sample=lambda x, w: ops.sharded_rms_norm(x, w, 33, lambda total: total)),
    Row(functions=("layer_norm",), registered=("layer_norm",), shapes=((5, 33), (33,), (33,)),
        sample=lambda x, w, b: ops.layer_norm(x, w, b), bench=("layer_norm",)),
    Row(functions=("silu", "swish", "gelu", "gelu_tanh", "relu", "relu2", "softcap"), registered=("activation",),
        shapes=((5, 33),), sample=lambda x: ops.silu(x) + ops.gelu(x) + ops.gelu_tanh(x), bf16=3 * HALF,
        bench=("silu", "gelu", "activation")),
    Row(functions=("gated", "gated_packed", "swiglu", "swiglu_packed"), registered=("gated", "gated_packed"),
        shapes=((5, 66),), sample=lambda x: ops.swiglu_packed(x), bench=("swiglu", "gated")),
    Row(functions=("fused_mlp", "swiglu_memory_efficient"), shapes=_MLP, bf16=4 * HALF,
        sample=lambda x, g, u, d: ops.fused_mlp(x, u, g, d) + ops.swiglu_memory_efficient(x, g, u, d, 5),
        bench=("fused_mlp", "swiglu_chunked")),
    Row(functions=("swiglu_quantized", "quantize_swiglu"), shapes=_MLP, sample=_swiglu_quantized, bf16=4 * HALF,
        launches=True, bench=("swiglu_quantized",)),
    Row(functions=("attention", "grouped_query_attention", "multi_query_attention"),
        registered=("flash_attention", "decode_attention", "attention_keep"), shapes=_QKV,
        sample=lambda q, k, v: ops.attention(q[:, :, -1:], k, v) + ops.attention(q, k, v, is_causal=True)[:, :, -1:],
        bf16=2 * HALF, bench=("attention", "attention_sinks", "attention_alibi", "decode_attention")),
    Row(functions=("flash_attention",), registered=("flash_attention",), shapes=_QKV,
        sample=lambda q, k, v: ops.flash_attention(q, k, v, is_causal=True), bench=("flash_attention",)),
    Row(functions=("chunked_attention",), registered=("chunked_attention", "flash_attention"), shapes=_QKV,
        sample=lambda q, k, v: ops.chunked_attention(q, k, v, 4, is_causal=True), bench=("chunked_attention",)),
    Row(functions=("paged_attention",), registered=("paged_attention",),
        shapes=((2, 1, 4, 16), (3, 4, 2, 16), (3, 4, 2, 16)), sample=_pages, bench=("paged_attention",)),
    Row(functions=("rotary", "rotary_", "rotary_embedding", "apply_rotary_pos_emb", "dynamic_rope"),
        registered=("rotary",), shapes=((2, 5, 3, 16),), sample=lambda x: ops.rotary(x, *_rope(x)),
        bench=("rope", "rope_interleaved")),
    Row(functions=("cos_sin_embedding", "alibi_bias", "alibi_slopes"), shapes=((1,),),
        sample=lambda x: ops.alibi_bias(9, 4).to(x.dtype) + ops.cos_sin_embedding(9, 10)[0][:, :9].to(x.dtype)),
    Row(functions=("embedding",), registered=("embedding",), shapes=((40, 33),),
        sample=lambda table: ops.embedding(_ids(9, 40), table), bench=("embedding",)),
    Row(functions=("casted_embedding",), registered=("casted_embedding",), shapes=((40, 33),),
        sample=lambda table: ops.casted_embedding(_ids(9, 40), table, 0.5, table.dtype), bench=("casted_embedding",)),
    Row(functions=("casted_sparse_embedding", "to_block_sparse"), registered=("casted_sparse_embedding",),
        shapes=((40, 33),), sample=_sparse),
    Row(functions=("linear",), registered=("linear",), shapes=((5, 33), (7, 33), (7,)),
        sample=lambda x, w, b: ops.linear(x, w, b), bench=("linear", "gemm")),
    Row(functions=("matmul", "gemm"), registered=("matmul",), shapes=((2, 5, 33), (33, 7)),
        sample=lambda a, b: ops.matmul(a, b), bench=("matmul",)),
    Row(functions=("casted_linear", "quantized_matmul"), registered=("casted_linear", "quantized_matmul"),
        shapes=((5, 33), (7, 33)), sample=lambda x, w: ops.casted_linear(x, *_rows8(w)), bench=("casted_linear",)),
    Row(functions=("int8_linear",), registered=("int8_linear",), shapes=((5, 33), (7, 33)),
        sample=lambda x, w: ops.int8_linear(x, *_rows8(w)), bench=("int8_linear",)),
    Row(functions=("mul_fp8", "swish_fp8"), shapes=((5, 33),),
        sample=lambda x: ops.mul_fp8(ops.swish_fp8(ops.cast(x, "fp8_e4m3")), ops.cast(x, "fp8_e4m3")).to(x.dtype)),
    Row(functions=("quantize", "dequantize", "quantize_rows", "dequantize_rows", "fake_quantize_rows"),
        registered=("quantize", "dequantize", "fake_quantize"), shapes=((5, 64),),
        sample=lambda x: sum(  # type: ignore[arg-type,return-value]
            ops.quantize(x, kind).dequantize(x.dtype) for kind in ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp4")),
        bench=("quantize",)),
    Row(functions=("softmax", "softmax_safe"), registered=("softmax",), shapes=((5, 33),),
        sample=lambda x: ops.softmax(x), bench=("softmax",)),
    Row(functions=("log_softmax", "log_softmax_stable"), registered=("log_softmax",), shapes=((5, 33),),
        sample=lambda x: ops.log_softmax(x), bench=("log_softmax",)),
    Row(functions=("masked_mean", "l2_normalize"), registered=("masked_mean", "l2_normalize"),
        shapes=((5, 33),), bench=("masked_mean",),
        sample=lambda x: ops.masked_mean(ops.l2_normalize(x), torch.arange(33) % 3 > 0, 1)),
    Row(functions=("cross_entropy", "cross_entropy_safe", "softmax_cross_entropy", "stable_cross_entropy",
                   "fused_softmax_cross_entropy"), registered=("cross_entropy",), shapes=((5, 33),),
        sample=lambda x: ops.cross_entropy(x, _ids(5, 33), -100, 0.1, "none", 0.01), bf16=1e-5,
        bench=("cross_entropy", "cross_entropy_smoothed")),
    Row(functions=("linear_cross_entropy",), registered=("linear_cross_entropy", "linear_cross_entropy_sum"),
        shapes=((5, 17), (50, 17)), sample=lambda x, w: ops.linear_cross_entropy(x, w, _ids(5, 50)), bf16=1e-5,
        bench=("linear_cross_entropy",)),
    Row(functions=("vocab_parallel_cross_entropy",), registered=("vocab_shard_statistics",),
        shapes=((5, 17), (50, 17)), sample=_shard, bf16=1e-5),
    Row(functions=("max_margin_loss", "stable_max_margin_loss"), registered=("max_margin",), shapes=((5, 33),),
        sample=lambda x: ops.max_margin_loss(x, _ids(5, 33)), bf16=1e-5, bench=("max_margin",)),
    Row(functions=("contrastive_loss", "stable_contrastive_loss"), registered=("contrastive",), shapes=((6, 17),),
        sample=lambda x: ops.contrastive_loss(x, _ids(6, 2)), f32=1e-4, bf16=1e-4, bench=("contrastive",)),
)


def operations() -> dict[str, Operation]:
    """Every registered operation by its name."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.ispkg:
            names = vars(importlib.import_module(f"{ops.__name__}.{module.name}"))
            found.update({value.name: value for value in names.values() if isinstance(value, Operation)})
    return found


def render() -> str:
    """docs/operations.md."""
    known, speeds = operations(), measured()
    lines = [_HEAD]
    for row in ROWS:
        registered = [known[name] for name in row.registered]
        first = getattr(ops, row.functions[0])
        summary = (first.__doc__ or "").split("\n")[0].replace("|", "\\|").rstrip(".")
        cells = (
            f"**{row.functions[0]}**: {summary}", ", ".join(f"`{name}`" for name in row.functions[1:]),
            "interp, cpu, cuda" if row.has_kernel else "torch", _gradient(row, registered),
            f"{row.f32:.0e}, {row.bf16:.0e}", _speed(row, speeds))
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_HEAD = """# Operations

Made by `make docs` (`tessera/ops/table.py`); a test holds it to the code.

All operations take tensors of any strides in f32, bf16, f16 and f64.

- *Backends*: where an operation has a tile kernel, `interp`, `cpu` and `cuda` run the same source in f32, bf16 and \
f16; f64, and `TESSERA_OPS=reference`, take the plain torch expression. "torch" marks what is composed of torch's \
operations and of others of this table.
- *Gradient*: "own" where a backward pass is registered with the operation, "torch" where torch differentiates its \
parts.
- *Error*: the largest difference from f64 in f32 and in bf16, relative to the largest value or 1; a test measures it.
- *Speed*: torch's time over ours in f32 and in bf16 (torch.compile where there is one, else torch's own operation), \
from `bench/results`; a dash where nothing was measured.

| Operation | Variants | Backends | Gradient | Error | Speed |
|---|---|---|---|---|---|"""

def _gradient(row: Row, registered: list[Operation]) -> str:
    """Whether the sample's result in f64 leads back to its inputs, and by whose formula."""
    inputs = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for shape in row.shapes]
    with implementation("reference"):
        if not row.sample(*inputs).requires_grad:
            return "none"
    return "own" if any(each.has_gradient for each in registered) else "torch"


def measured(folder: Path = RESULTS) -> dict[tuple[str, str], list[float]]:
    """Times that torch takes for ours, by (group, dtype), from the benchmarks' JSON; bench/ops.py's come first."""
    found: dict[tuple[str, str], list[float]] = {}
    for pattern in ("ops_*.json", "kernels_*.json"):
        taken = set(found)
        for group, dtype, ratio in _ratios(folder, pattern):
            if (group, dtype) not in taken:
                found.setdefault((group, dtype), []).append(ratio)
    return found


def _ratios(folder: Path, pattern: str) -> Iterator[tuple[str, str, float]]:
    for path in sorted(folder.glob(pattern)):
        for case in json.loads(path.read_text()).get("cases", ()):
            words, times = str(case.get("group", "")).split(), case.get("times") or {}
            ratio: Any = times.get("compiled", times.get("eager"))
            if len(words) >= 2 and isinstance(ratio, (int, float)) and ratio > 0:
                yield words[0], words[1], float(ratio)


def _speed(row: Row, speeds: Mapping[tuple[str, str], list[float]]) -> str:
    cells = []
    for dtype in ("f32", "bf16"):
        ratios = [ratio for group in row.bench for ratio in speeds.get((group, dtype), ())]
        cells.append(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.1f}" if ratios else "-")
    return "" if cells == ["-", "-"] else ", ".join(cells)


if __name__ == "__main__":
    print(render(), end="")
