"""What stands between q k^T and the softmax: scale, softcap, ALiBi, masks; the plain expression of attention.

In: a block of queries and a block of keys. Out: their scores, wide (f32, or f64 for f64). Attention in chunks, the
reference and the tests' middle ground share it, so that every variant means the same.

Dims: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K query heads a group, D head_dim;
M, N a block's queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessera.errors import InputError, ShapeError
from tessera.ops.kernels.attention_dropout import attention_dropout_kernel
from tessera.ops.registration import Operation
from tessera.types import Tensor

_MIX = 0x9E3779B97F4A7C15  # spreads neighbouring seeds (splitmix64), so that the rows of two calls differ


AnyMask = Tensor["#T"] | Tensor["#S", "#T"] | Tensor["#G*K", "#S", "#T"] | Tensor["#B", "#G*K", "#S", "#T"]
"""A mask that broadcasts to [B, H, S, T], H = G * K: bool, True where the query sees the key, or float, added."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How scores are made from q k^T.

    Args:
        scale: factor on the products, > 0.
        is_causal: the last query sees all keys, each one before it one key less.
        window: a query sees itself and the window - 1 keys before it (keys after it too, unless causal).
        softcap: scores become softcap * tanh(scores / softcap), before any mask.
        dropout_p: weights are dropped with this probability, by their place and the seed alone.
        seed: int64 [] on the CPU, where there is dropout: a tensor, so that torch.compile can draw it.
    """

    scale: float
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def block(
        self, q_BHMD: Tensor, k_BKND: Tensor, mask: Tensor | None, slopes_H: Tensor | None, place: int, start: int,
    ) -> Tensor:
        """The scores [B, H, M, N] of queries at places `place`.. among the keys, and keys from `start` on.

        Args:
            mask: bool (True: seen) or float (added), broadcastable to [B, H, M, N].
            slopes_H: of ALiBi: slope * (key's place - query's place) is added (arXiv:2108.12409).
        """
        return self.biased(self.products(q_BHMD, k_BKND), mask, slopes_H, place, start)

    def products(self, q_BHMD: Tensor, k_BKND: Tensor) -> Tensor:
        """The scaled products of queries and keys, with the softcap, wide."""
        B, H, M, D = q_BHMD.shape
        K, N = k_BKND.shape[1:3]
        wide = torch.promote_types(q_BHMD.dtype, torch.float32)
        q_BKRD = q_BHMD.to(wide).reshape(B, K, H // K * M, D)
        s_BHMN = (q_BKRD @ k_BKND.to(wide).mT).view(B, H, M, N) * self.scale
        return s_BHMN if self.softcap is None else self.softcap * torch.tanh(s_BHMN / self.softcap)

    def biased(self, s_BHMN: Tensor, mask: Tensor | None, slopes_H: Tensor | None, place: int, start: int) -> Tensor:
        """`products` with what depends on places alone."""
        ages_MN = ages(s_BHMN, place, start)
        if slopes_H is not None:
            s_BHMN = s_BHMN - slopes_H.to(s_BHMN.dtype)[:, None, None] * ages_MN
        seen = self._seen(ages_MN)
        if mask is not None and mask.dtype is torch.bool:
            seen = mask if seen is None else mask & seen
        elif mask is not None:
            s_BHMN = s_BHMN + mask
        return s_BHMN if seen is None else s_BHMN.masked_fill(~seen, float("-inf"))

    def _seen(self, ages_MN: Tensor) -> Tensor | None:
        if not self.is_causal and self.window is None:
            return None
        seen = ages_MN >= 0 if self.is_causal else torch.ones_like(ages_MN, dtype=torch.bool)
        return seen if self.window is None else seen & (ages_MN < self.window)

    def seen(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """bool [S, T] of the causal mask and the window; None where they hide nothing."""
        places_S1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
        return self._seen(places_S1 - torch.arange(n_keys, device=device))

    def first_seed(self) -> int:
        """What the first row of batch and heads draws with; the next ones count on."""
        assert self.seed is not None
        return _spread(self.seed)

    def keep(self, shape: torch.Size, place: int, start: int, n_keys: int, like: Tensor) -> Tensor:
        """What dropout multiplies the weights of a block with, [B, H, M, N]; places as for `block`, from 0."""
        assert self.seed is not None
        keep_RMN = _keep_op(
            self.seed, [shape[0] * shape[1], *shape[2:]], self.dropout_p, place, start, n_keys, like.device)
        return keep_RMN.view(shape).to(like.dtype)


def ages(s_BHMN: Tensor, place: int, start: int) -> Tensor:
    """How many places before its query each key of a block stands, [M, N]."""
    M, N = s_BHMN.shape[-2:]
    places_M1 = torch.arange(place, place + M, device=s_BHMN.device)[:, None]
    return places_M1 - torch.arange(start, start + N, device=s_BHMN.device)


def _spread(seed: Tensor) -> int:
    return int(seed) * _MIX % 2**62


def _keep(
    seed: Tensor, sizes: list[int], dropout_p: float, place: int, start: int, n_keys: int, device: torch.device,
) -> Tensor:
    keep_RMN = torch.empty(sizes, device=device)
    attention_dropout_kernel(keep_RMN, dropout_p, _spread(seed), place, start, n_keys)
    return keep_RMN


_keep_op = Operation(
    "attention_keep(Tensor seed, SymInt[] sizes, float p, SymInt place, SymInt start, SymInt n_keys, Device device)"
    " -> Tensor", kernel=_keep, reference=_keep, fake=lambda seed, sizes, *rest: torch.empty(sizes, device=rest[-1]),
    save=lambda inputs, output: (), backward=lambda saved, grad: (None,) * 7)


def weighted(weights_BHMN: Tensor, v_BKND: Tensor) -> Tensor:
    """weights @ v for heads that share values, [B, H, M, D]."""
    B, H, M, N = weights_BHMN.shape
    K = v_BKND.shape[1]
    rows_BKRN = weights_BHMN.reshape(B, K, H // K * M, N)
    return (rows_BKRN @ v_BKND.to(weights_BHMN.dtype)).view(B, H, M, v_BKND.shape[-1])


def plain_attention(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None = None,
    slopes_H: Tensor | None = None, sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention one step after the other, all scores in memory: what the variants are compared with.

    Returns:
        ([B, H, S, D] in q's dtype, zeros for a query that sees no key; the logarithm of each row's sum, [B, H, S]).
    """
    S, T = q_BHSD.shape[2], k_BKTD.shape[2]
    s_BHST = scores.block(q_BHSD, k_BKTD, mask, slopes_H, T - S, 0)
    lse_BHS = s_BHST.logsumexp(-1)
    if sinks_H is not None:
        lse_BHS = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[:, None].expand_as(lse_BHS))
    weights_BHST = torch.exp(s_BHST - lse_BHS.masked_fill(lse_BHS == float("-inf"), 0.0)[..., None])
    if scores.dropout_p:
        weights_BHST = weights_BHST * scores.keep(weights_BHST.shape, 0, 0, T, weights_BHST)
    return weighted(weights_BHST, v_BKTD).to(q_BHSD.dtype), lse_BHS


def dropout_seed(dropout_p: float, seed: int | None) -> Tensor | None:
    """The seed of `Scores`: what is given, or drawn from torch's generator; None without dropout."""
    if not dropout_p:
        return None
    return torch.randint(1 << 31, (), device="cpu") if seed is None else torch.full(
        (), seed, dtype=torch.int64, device="cpu")


def check_scores(scores: Scores, n_key_heads: int) -> None:
    """Check the numbers of an attention whose shapes fit.

    Raises:
        ShapeError: there are no key heads.
        InputError: scale not above 0, dropout_p outside [0, 1), or a window below 1.
    """
    if not n_key_heads:
        raise ShapeError("k, v: 0 heads given; expected at least 1")
    if not scores.scale > 0:
        raise InputError(f"scale: {scores.scale} given; expected above 0")
    if not 0 <= scores.dropout_p < 1:
        raise InputError(f"dropout_p: {scores.dropout_p} given; expected 0 <= dropout_p < 1")
    if scores.window is not None and scores.window < 1:
        raise InputError(f"window: {scores.window} given; expected at least 1")
