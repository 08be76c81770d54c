"""How a GPTModel is cut over the ranks of a mesh's "tp" axis (Megatron-LM, arXiv:1909.08053).

In: a whole model (on the meta device) and a mesh. Out: the same model with each rank's parts in place of the
cut modules. models.gpt calls `shard` when it is given a mesh; models.load asks `cuts` what to read.

    embed            rows, by vocabulary; the ranks' rows are summed (all but one are zero)
    q_proj           rows, by query head        } a rank has whole heads, and with them its part of
    k_proj, v_proj   rows, by key/value head    } the KV cache
    o_proj           columns, by query head; partial sums are added over the ranks
    gate_proj, up_proj   rows, by neuron
    down_proj        columns, by neuron; partial sums are added
    lm_head          rows, by vocabulary (a tied embedding likewise); the logits are gathered
    norms, pos_embed, biases of o_proj and down_proj: whole on every rank

Heads are dealt in whole groups that share a key/value head, as evenly as can be (3 groups on 2 ranks: 2 + 1).
With more ranks than groups, the query heads of a group are cut over several ranks, each of which keeps its own
copy of the key/value head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera import dist, ops
from tessera.dist.deterministic import check_cuts, gradients_refused, refuse_gradient, row_parallel_linear
from tessera.dist.spec import even_sizes
from tessera.errors import InputError, UnsupportedError
from tessera.kernel.recording import is_recording
from tessera.models.config import GPTConfig
from tessera.models.gpt_plan_kernels import padded_kernel, part_of_embedding_kernel, side_by_side_kernel
from tessera.nn import Embedding, Linear
from tessera.ops.invariant import is_invariant

AXIS = "tp"
MESH_AXES = ("pp", "dp", AXIS)  # of a training mesh: tensor-parallel ranks are neighbours


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A rank's part of a parameter: places start..stop - 1 of `whole` along `dim`."""

    dim: int
    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, x: Tensor) -> Tensor:
        """The part of a whole tensor, a view."""
        return x.narrow(self.dim, self.start, self.size)

    def along(self, dim: int) -> Cut:
        return Cut(dim=dim, start=self.start, stop=self.stop, whole=self.whole)

    def scaled(self, width: int) -> Cut:
        """The same part, counted in things of which each is `width` wide."""
        return Cut(dim=self.dim, start=self.start * width, stop=self.stop * width, whole=self.whole * width)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of n_ranks has: ranges of vocabulary, query heads, key/value heads and neurons."""

    vocab: Cut
    heads: Cut
    kv_heads: Cut
    ffn: Cut


def share(config: GPTConfig, n_ranks: int, rank: int) -> Share:
    """What `rank` of n_ranks has of a model.

    Raises:
        UnsupportedError: there are more ranks than query heads, neurons or tokens to deal out.
    """
    for name in ("n_heads", "d_ffn", "vocab_size"):
        if n_ranks > getattr(config, name):
            raise UnsupportedError(f"mesh: {n_ranks} tensor-parallel ranks given; every rank needs its own part, and "
                                   f"{name} is {getattr(config, name)}")
    heads, kv_heads = _deal_heads(config.n_heads, config.n_kv_heads, n_ranks)[rank]
    return Share(
        vocab=_part(even_sizes(config.vocab_size, n_ranks), rank), heads=heads, kv_heads=kv_heads,
        ffn=_part(_ffn_sizes(config.d_ffn, n_ranks), rank))


def _part(sizes: tuple[int, ...], rank: int) -> Cut:
    start = sum(sizes[:rank])
    return Cut(dim=0, start=start, stop=start + sizes[rank], whole=sum(sizes))


def _deal_heads(n_heads: int, n_kv_heads: int, n_ranks: int) -> list[tuple[Cut, Cut]]:
    """(query heads, key/value heads) of each rank."""
    group = n_heads // n_kv_heads
    if n_ranks <= n_kv_heads:
        parts = [_part(even_sizes(n_kv_heads, n_ranks), rank) for rank in range(n_ranks)]
        return [(part.scaled(group), part) for part in parts]
    dealt = []
    for kv_head, n_sharing in enumerate(even_sizes(n_ranks, n_kv_heads)):
        for i in range(n_sharing):
            part = _part(even_sizes(group, n_sharing), i)
            first = kv_head * group
            dealt.append((Cut(dim=0, start=first + part.start, stop=first + part.stop, whole=n_heads),
                          Cut(dim=0, start=kv_head, stop=kv_head + 1, whole=n_kv_heads)))
    return dealt


def _ffn_sizes(d_ffn: int, n_ranks: int) -> tuple[int, ...]:
    """Whole blocks of ops.even_blocks where all ranks get as many (1, 2, 4 and 8), else as even as can be."""
    blocks = ops.even_blocks(d_ffn)
    count, rest = divmod(len(blocks), n_ranks)
    if rest or not count:
        return even_sizes(d_ffn, n_ranks)
    return tuple(sum(blocks[first: first + count]) for first in range(0, len(blocks), count))


def shard(model: Any, mesh: dist.Mesh) -> None:
    """Put this rank's parts in place of the modules that are cut. Call it on the meta device.

    Raises:
        InputError: the mesh does not fit the configuration.
        UnsupportedError: see `share`; the mesh has a pipeline axis; or, in the deterministic mode, its ranks cut
            within a block of the fixed tree.
    """
    config: GPTConfig = model.config
    n_ranks = _check_mesh(config, mesh)
    if n_ranks == 1:
        return
    shares = [share(config, n_ranks, rank) for rank in range(n_ranks)]
    own = shares[mesh.get_coordinate(AXIS)]
    q, kv = own.heads.scaled(config.d_head), own.kv_heads.scaled(config.d_head)
    vocab_sizes = tuple(part.vocab.size for part in shares)
    q_sizes = tuple(part.heads.size * config.d_head for part in shares)
    ffn_sizes = tuple(part.ffn.size for part in shares)

    model.embed = VocabEmbedding(model.embed, own.vocab, vocab_sizes, mesh)
    if model.lm_head is not None:
        model.lm_head = VocabHead(model.lm_head, own.vocab, vocab_sizes, mesh)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.q_proj = LinearPart(attn.q_proj, q)
        attn.k_proj, attn.v_proj = LinearPart(attn.k_proj, kv), LinearPart(attn.v_proj, kv)
        attn.o_proj = RowParallelLinear(attn.o_proj, q.along(1), q_sizes, mesh)
        if mlp.gate_proj is not None:
            mlp.gate_proj = LinearPart(mlp.gate_proj, own.ffn)
        mlp.up_proj = LinearPart(mlp.up_proj, own.ffn)
        mlp.down_proj = RowParallelLinear(mlp.down_proj, own.ffn.along(1), ffn_sizes, mesh)
        for half in (attn, mlp):
            half.register_forward_pre_hook(functools.partial(_enter, mesh))
    model.own_share = own
    for parameter in model.parameters():
        parameter.is_part = True  # for dist.GradientTree
    model.register_forward_pre_hook(_check_mode)
    _check_mode(model)


def _check_mode(model: nn.Module, *_: Any) -> None:
    """In the deterministic mode, refuse what it cannot honour before anything is computed."""
    if is_invariant():
        check_cuts(model)


def check_gradients(model: Any) -> None:
    """Refuse a loss in the deterministic mode that ranks would compute together, if gradients may be asked of it.

    Raises:
        UnsupportedError: as said.
    """
    n_ranks = model.mesh.size(AXIS) if model.mesh is not None and model.mesh.has_axis(AXIS) else 1
    if n_ranks > 1 and is_invariant() and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise gradients_refused(n_ranks)


def create_model_mesh(config: GPTConfig) -> dist.Mesh:
    """The mesh that a configuration asks for: pp_size x dp_size x tp_size ranks, on the axes MESH_AXES.

    Raises:
        InputError: the job has fewer ranks.
    """
    shape = config.pp_size, config.dp_size, config.tp_size
    return dist.Mesh(MESH_AXES, math.prod(shape), shape)


def common_seed(mesh: dist.Mesh) -> int | None:
    """A seed that the ranks of a live mesh agree on, from this process's default generator on the first of them."""
    if mesh.is_abstract:
        return None
    seed = torch.randint(1 << 62, (1,))
    for axis in mesh.axes:
        seed = dist.broadcast(seed, mesh, axis=axis)
    return int(seed)


def _check_mesh(config: GPTConfig, mesh: dist.Mesh) -> int:
    for axis in mesh.axes:
        if axis == "pp" and mesh.size("pp") > 1:
            raise UnsupportedError(f"mesh: pipeline axis of {mesh.size('pp')} given; models are cut over 'tp' alone "
                                   "(pipelines are made of whole models); expected 'pp' of size 1")
    n_ranks = mesh.size(AXIS) if mesh.has_axis(AXIS) else 1
    if config.tp_size not in (1, n_ranks):
        raise InputError(f"mesh: {n_ranks} devices on axis {AXIS!r} given; the configuration has "
                         f"tp_size={config.tp_size}")
    return n_ranks


def _enter(mesh: dist.Mesh, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the ranks compute from the residual stream is in parts: its gradient is their sum."""
    return dist.fan_out(args[0], mesh, axis=AXIS), *args[1:]


def cuts(model: nn.Module) -> dict[str, Cut]:
    """The cut of every parameter that this rank has a part of, by name; others are whole."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (LinearPart, VocabEmbedding)):
            found[f"{name}.weight"] = module.cut
            if isinstance(module, LinearPart) and module.bias is not None and module.cut.dim == 0:
                found[f"{name}.bias"] = module.cut
    return found


def share_gradients(model: Any, mesh: dist.Mesh) -> None:
    """Add up, in every backward pass, the gradients of what several ranks have a copy of and use differently:
    key/value heads with more ranks than groups, and the norms of single heads. Call it once, before training."""
    for block in model.blocks:
        attn = block.attn
        for norm in (attn.q_norm, attn.k_norm):
            if norm is not None:
                norm.weight.register_hook(functools.partial(_sum_copies, mesh, None))
        if mesh.size(AXIS) > model.config.n_kv_heads:
            for linear in (attn.k_proj, attn.v_proj):
                for parameter in linear.parameters():
                    parameter.register_hook(functools.partial(_sum_copies, mesh, linear.cut))


def _sum_copies(mesh: dist.Mesh, cut: Cut | None, grad: Tensor) -> Tensor:
    if cut is None:
        return dist.all_reduce(grad, mesh, axis=AXIS)
    whole = grad.new_zeros(cut.whole, *grad.shape[1:])
    cut.of(whole).copy_(grad)
    return cut.of(dist.all_reduce(whole, mesh, axis=AXIS))


class LinearPart(Linear):
    """Some rows (cut.dim 0) or columns (1) of a Linear. Whole weights that come in are cut on the way."""

    def __init__(self, whole: Linear, cut: Cut) -> None:
        shape = list(whole.weight.shape)
        shape[cut.dim] = cut.size
        super().__init__(shape[1], shape[0], bias=whole.bias is not None, dtype=whole.storage,
                         bias_dtype=None if whole.bias is None else whole.bias.dtype)
        self.cut, self._whole_shape = cut, whole.whole_shape

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self._whole_shape

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        state = self._part({"weight": weight}, "")
        if self.weight_scale is not None:
            self.weight_scale.copy_(state["weight_scale"])
        self.weight.copy_(state["weight"])

    def _part(self, state: dict[str, Any], prefix: str) -> dict[str, Any]:
        """This rank's part of whole entries; those that are parts already stay."""
        state = dict(state)
        weight = state.get(prefix + "weight")
        if weight is None or tuple(weight.shape) != self.whole_shape:
            return state
        if self.weight_scale is not None and not ops.is_quantized(weight.dtype):
            # Rows are scaled by their largest weight, wherever it lies: quantize first, then cut.
            weight, state[prefix + "weight_scale"] = ops.quantize_rows(weight, self.storage)
        state[prefix + "weight"] = self.cut.of(weight)
        for name in ("bias", "weight_scale") if self.cut.dim == 0 else ():
            if prefix + name in state:
                state[prefix + name] = self.cut.of(state[prefix + name])
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(self._part(state_dict, prefix), prefix, *args)


class RowParallelLinear(LinearPart):
    """Some columns of a Linear, for inputs that are cut alike; the ranks' partial sums are added, then the bias.

    Its `blocks` are those of the whole Linear; the cut lies between two of them.
    """

    def __init__(self, whole: Linear, cut: Cut, sizes: tuple[int, ...], mesh: dist.Mesh) -> None:
        super().__init__(whole, cut)
        self.blocks, self.sizes, self.mesh = whole.blocks, sizes, mesh

    def forward(self, x: Tensor) -> Tensor:
        out = row_parallel_linear(
            x, self.weight, self.weight_scale, blocks=self.blocks, sizes=self.sizes, mesh=self.mesh, axis=AXIS)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class VocabHead(LinearPart):
    """The rows of an output projection for some of the vocabulary; the logits are gathered."""

    def __init__(self, whole: Linear, cut: Cut, sizes: tuple[int, ...], mesh: dist.Mesh) -> None:
        super().__init__(whole, cut)
        self.sizes, self.mesh = sizes, mesh

    def forward(self, x: Tensor) -> Tensor:
        return _gather_logits(super().forward(dist.fan_out(x, self.mesh, axis=AXIS)), self.mesh, self.sizes)


class VocabEmbedding(Embedding):
    """Some rows of an embedding, which may be the output projection too."""

    def __init__(self, whole: Embedding, cut: Cut, sizes: tuple[int, ...], mesh: dist.Mesh) -> None:
        super().__init__(
            cut.size, whole.weight.shape[1], dtype=whole.weight.dtype, out_dtype=whole.out_dtype)
        self.cut, self.sizes, self.mesh, self._whole_shape = cut, sizes, mesh, whole.whole_shape

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self._whole_shape

    def forward(self, ids: Tensor) -> Tensor:
        if is_recording():
            rows = torch.empty(*ids.shape, self.weight.shape[1], dtype=self.out_dtype, device=ids.device)
            part_of_embedding_kernel(ids.reshape(-1), self.weight, rows.view(-1, rows.shape[-1]), self.cut.start)
            return dist.all_reduce(rows, self.mesh, axis=AXIS, replicated=True)
        local = ids - self.cut.start
        is_here = (local >= 0) & (local < self.cut.size)
        rows = super().forward(torch.where(is_here, local, 0)) * is_here.unsqueeze(-1)
        return dist.all_reduce(rows, self.mesh, axis=AXIS, replicated=True)

    def project(self, x: Tensor) -> Tensor:
        return _gather_logits(super().project(dist.fan_out(x, self.mesh, axis=AXIS)), self.mesh, self.sizes)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.weight.copy_(self.cut.of(weight))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and tuple(weight.shape) == self.whole_shape:
            state_dict = {**state_dict, prefix + "weight": self.cut.of(weight)}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _gather_logits(logits: Tensor, mesh: dist.Mesh, sizes: tuple[int, ...]) -> Tensor:
    if is_recording():
        return _gather_recorded(logits.view(-1, logits.shape[-1]), mesh, sizes).view(*logits.shape[:-1], -1)
    whole = dist.all_gather(logits, mesh, axis=AXIS, dim=logits.dim() - 1, sizes=sizes, replicated=True)
    return refuse_gradient(whole, len(sizes)) if is_invariant() else whole


def _gather_recorded(logits_BV: Tensor, mesh: dist.Mesh, sizes: tuple[int, ...]) -> Tensor:
    """All ranks' columns, by kernels; `sizes` are even_sizes."""
    n_rows, width = logits_BV.shape[0], sizes[0]
    own = logits_BV
    if logits_BV.shape[1] < width:
        own = logits_BV.new_empty(n_rows, width)
        padded_kernel(logits_BV, own)
    parts = dist.all_gather(own.view(1, n_rows, width), mesh, axis=AXIS)
    if n_rows == 1 and min(sizes) == width:
        return parts.view(1, -1)
    out = logits_BV.new_empty(n_rows, sum(sizes))
    side_by_side_kernel(parts, out, sizes.count(width))
    return out


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab: Cut, mesh: dist.Mesh) -> Tensor:
    """Cross-entropy of each target from a rank's part of the logits, which are never gathered.

    log(sum over ranks of sum(exp(logits - max))) + max - the target's logit.

    Args:
        logits: [..., vocab.size], this rank's.
        targets: [...] int64 in 0..vocab.whole - 1.
        vocab: this rank's part.
        mesh: with axis "tp".

    Returns:
        [...] f32, the same on every rank.
    """
    total = functools.partial(dist.all_reduce, mesh=mesh, axis=AXIS, replicated=True)
    logits = logits.float()
    highest = dist.all_reduce(logits.detach().amax(-1), mesh, axis=AXIS, op="max")
    shifted = logits - highest.unsqueeze(-1)
    local = targets - vocab.start
    is_here = (local >= 0) & (local < vocab.size)
    own = shifted.gather(-1, torch.where(is_here, local, 0).unsqueeze(-1)).squeeze(-1)
    return total(shifted.exp().sum(-1)).log() - total(own * is_here)
