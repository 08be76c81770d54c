"""Attention that never holds all scores, under one name.

In: q, k, v. Out: the heads' weighted values. Called by users; the functions are those of `ops`.
"""

from __future__ import annotations

from tessera import ops


class MemoryEfficientAttention:
    """`chunked_attention` for long sequences on one device, `ring_attention` for longer ones on many."""

    chunked_attention = staticmethod(ops.chunked_attention)
    ring_attention = staticmethod(ops.ring_attention)
