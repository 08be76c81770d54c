"""Modules over ops; they know no ranks."""

from tessera.nn.attention import Attention
from tessera.nn.block import Block
from tessera.nn.kv_cache import KVCache, StepCache
from tessera.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from tessera.nn.mlp import MLP

__all__ = ["MLP", "Attention", "Block", "Embedding", "KVCache", "LayerNorm", "Linear", "RMSNorm", "StepCache"]
