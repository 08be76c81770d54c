"""Attention over a sequence that lies in parts on the ranks of an axis: keys and values go round a ring.

In: each rank's part of q, k and v (or all of them whole, on every rank). Out: the part's (or the whole) result, with
gradients. Context-parallel trainers call it.

The sequence is cut into 2 n chunks; rank r has chunks r and 2 n - 1 - r (zig-zag), so that under a causal mask all
ranks have the same work in every step. While a rank computes with one part of the keys, the next is on its way.

Dims: B batch, S whole sequence, L a rank's part of it, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.autograd.function import once_differentiable

from tessera.dist.collectives import _watching, all_gather, fan_out
from tessera.dist.mesh import Mesh, resolve
from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.function.decorator import function
from tessera.ops.attention_scores import Scores, check_scores
from tessera.ops.flash_attention import flash_attention_backward_op, flash_attention_op
from tessera.ops.invariant import is_invariant
from tessera.types import Tensor, one_float


@function
def ring_attention(
    q_BHSD: Tensor["B", "G*K", "S", "D", one_float], k_BKSD: Tensor["B", "K", "S", "D", one_float],
    v_BKSD: Tensor["B", "K", "S", "D", one_float], mesh: Mesh | None = None, *, axis: str | None = None,
    is_causal: bool = False, scale: float | None = None, is_sharded: bool = False,
) -> Tensor["B", "G*K", "S", "D", one_float]:
    """softmax(scale * q k^T) v with the sequence spread over an axis (arXiv:2310.01889, zig-zag as arXiv:2311.09431).

    Args:
        q_BHSD: [B, H, S, D], the same on every rank; with `is_sharded` this rank's part [B, H, L, D], as
            `zigzag_shard` gives it, L even and the same on every rank.
        k_BKSD, v_BKSD: likewise with K heads, H a multiple of K.
        mesh, axis: default those of `with mesh.axis(...)`, or the mesh's only axis.
        is_causal: a query sees its own key and those before it.
        scale: factor on the scores, > 0; default 1 / sqrt(D).
        is_sharded: see q_BHSD. A rank then holds 1 / n of the sequence, and two parts of keys and values.

    Returns:
        [B, H, S, D] on every rank, or this rank's [B, H, L, D]. Gradients are those of attention on one device: of
        whole inputs every rank has the whole gradient, of parts its part.

    Raises:
        ShapeError, InputError: arguments that do not fit together.
        UnsupportedError: the deterministic mode.
        CollectiveError: a rank died or is missing.
    """
    mesh, axis = resolve(mesh, axis)
    if is_invariant():
        raise UnsupportedError("ring_attention: its sums depend on the ranks; the deterministic mode has none")
    scores = Scores(scale=q_BHSD.shape[-1]**-0.5 if scale is None else scale, is_causal=is_causal)
    check_scores(scores, k_BKSD.shape[1])
    if is_sharded:
        half, is_odd = divmod(q_BHSD.shape[2], 2)
        if is_odd:
            raise ShapeError(f"q: a part of {q_BHSD.shape[2]} tokens given; expected an even number, two chunks")
        ring = _Ring(mesh=mesh, axis=axis, sizes=(half,) * (2 * mesh.size(axis)))
        return _RingAttention.apply(q_BHSD, k_BKSD, v_BKSD, ring, scores.scale, is_causal)  # type: ignore[no-any-return]
    ring = _Ring(mesh=mesh, axis=axis, sizes=_even_sizes(q_BHSD.shape[2], 2 * mesh.size(axis)))
    parts = [ring.part(fan_out(x, mesh, axis=axis), 2) for x in (q_BHSD, k_BKSD, v_BKSD)]
    return ring.whole(_RingAttention.apply(*parts, ring, scores.scale, is_causal), 2)


def zigzag_shard(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, dim: int = 1) -> Tensor:
    """This rank's part of a sequence: chunks r and 2 n - 1 - r of 2 n, as sharded ring attention takes it.

    Args:
        x: the whole, its size along `dim` a multiple of 2 n.

    Raises:
        InputError: another size.
    """
    mesh, axis = resolve(mesh, axis)
    return _whole_ring(x.shape[dim], mesh, axis).part(x, dim)


def zigzag_gather(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, dim: int = 1) -> Tensor:
    """The whole of which `zigzag_shard` gave the parts, on every rank; all ranks use it alike."""
    mesh, axis = resolve(mesh, axis)
    return _whole_ring(x.shape[dim] * mesh.size(axis), mesh, axis).whole(x, dim)


def _even_sizes(whole: int, count: int) -> tuple[int, ...]:
    return tuple(whole * (i + 1) // count - whole * i // count for i in range(count))


def _whole_ring(length: int, mesh: Mesh, axis: str) -> _Ring:
    count = 2 * mesh.size(axis)
    if length % count:
        raise InputError(f"x: {length} tokens given; expected a multiple of {count}, twice the ranks of axis {axis!r}")
    return _Ring(mesh=mesh, axis=axis, sizes=(length // count,) * count)


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """The ranks of an axis and the sizes of the 2 n chunks."""

    mesh: Mesh
    axis: str
    sizes: tuple[int, ...]

    @property
    def n_ranks(self) -> int:
        return len(self.sizes) // 2

    @property
    def rank(self) -> int:
        here: int = self.mesh.get_coordinate(self.axis)
        return here

    def length(self, rank: int) -> int:
        """Tokens of a rank's part."""
        return self.sizes[rank] + self.sizes[-1 - rank]

    def part(self, x: Tensor, dim: int) -> Tensor:
        chunks = x.split(list(self.sizes), dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        gathered = all_gather(x, self.mesh, axis=self.axis, dim=dim, replicated=True,
                              sizes=[self.length(rank) for rank in range(self.n_ranks)])
        found: list[Tensor] = [x] * len(self.sizes)
        pieces = gathered.split([size for rank in range(self.n_ranks) for size in (
            self.sizes[rank], self.sizes[-1 - rank])], dim)
        for rank in range(self.n_ranks):
            found[rank], found[-1 - rank] = pieces[2 * rank: 2 * rank + 2]
        return torch.cat(found, dim)

    def meeting(self, source: int, is_causal: bool) -> tuple[slice, slice, bool]:
        """Which of this rank's queries meet which keys of a rank's part, and whether causally.

        Early chunks of earlier ranks are seen by all queries, parts of later ranks by the late chunk alone: two
        pairs of chunks either way.
        """
        everything = slice(0, None)
        if not is_causal or source == self.rank:
            return everything, everything, is_causal
        if source < self.rank:
            return everything, slice(0, self.sizes[source]), False
        return slice(self.sizes[self.rank], None), everything, False

    def start(self, x: Tensor) -> _Exchange:
        """Begin to pass x on to the next rank and to receive the last rank's, of the same shape."""
        ranks, group = self.mesh.ranks(self.axis), self.mesh.group(self.axis)
        received = torch.empty_like(x)
        work = [torch_dist.isend(x, ranks[(self.rank + 1) % len(ranks)], group=group),
                torch_dist.irecv(received, ranks[self.rank - 1], group=group)]
        return _Exchange(ring=self, sent=x, received=received, work=work)


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """A tensor on its way to the next rank; `sent` stays untouched until then."""

    ring: _Ring
    sent: Tensor
    received: Tensor
    work: list[Any]

    def finish(self) -> Tensor:
        with _watching("ring_attention", self.ring.mesh, self.ring.axis, self.received.shape):
            for part in self.work:
                part.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring, scale: float, is_causal: bool,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.zeros_like(q, dtype=wide), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
        pair = _packed(k, v, max(ring.length(rank) for rank in range(ring.n_ranks)))
        for step in range(ring.n_ranks):
            source = (ring.rank - step) % ring.n_ranks
            coming = ring.start(pair) if step < ring.n_ranks - 1 else None
            rows, columns, causal = ring.meeting(source, is_causal)
            keys, values = pair[:, :, :, :ring.length(source)][:, :, :, columns]
            _merge(out[:, :, rows], lse[:, :, rows], *flash_attention_op(
                q[:, :, rows], keys, values, None, scale, causal, None, 0, 0))
            if coming is not None:
                pair = coming.finish()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring, ctx.scale, ctx.is_causal = ring, scale, is_causal
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        pair = _packed(k, v, max(ring.length(rank) for rank in range(ring.n_ranks)))
        sums, returning = torch.zeros_like(pair, dtype=lse.dtype), None
        for step in range(ring.n_ranks):
            source = (ring.rank - step) % ring.n_ranks
            coming = ring.start(pair) if step < ring.n_ranks - 1 else None
            rows, columns, causal = ring.meeting(source, ctx.is_causal)
            keys, values = pair[:, :, :, :ring.length(source)][:, :, :, columns]
            part_q, part_k, part_v = flash_attention_backward_op(
                grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows], None, ctx.scale,
                causal, None)
            grad_q[:, :, rows] += part_q
            if returning is not None:
                sums = returning.finish()  # what the ranks before have added for this part of the keys
            for total, part in zip(sums, (part_k, part_v)):
                total[:, :, :ring.length(source)][:, :, columns] += part
            returning = ring.start(sums) if ring.n_ranks > 1 else None
            if coming is not None:
                pair = coming.finish()
        if returning is not None:
            sums = returning.finish()
        grad_k, grad_v = sums[:, :, :, :k.shape[2]].to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


def _packed(k: Tensor, v: Tensor, length: int) -> Tensor:
    """Keys and values in one tensor [2, B, K, length, D], as all ranks send it."""
    pair = k.new_zeros(2, *k.shape[:2], length, k.shape[3])
    pair[0, :, :, :k.shape[2]], pair[1, :, :, :v.shape[2]] = k, v
    return pair


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Bring attention over more keys into the result: both are weighted by their sums (arXiv:1805.02867)."""
    total = torch.logaddexp(lse, part_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out.mul_(torch.exp(lse - safe)[..., None]).add_(part * torch.exp(part_lse - safe)[..., None])
    lse.copy_(total)
