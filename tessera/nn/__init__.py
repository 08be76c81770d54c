"""Modules over ops; they know no ranks."""

from torch.nn import Buffer, Module, ModuleList, utils

from tessera.nn.attention import Attention
from tessera.nn.block import Block
from tessera.nn.block_weights import BlockEmbedding, BlockLinear, BlockWeight
from tessera.nn.embeddings import CastedEmbedding, CastedSparseEmbedding, LearnedPositionalEmbedding
from tessera.nn.fused_layer import FusedTransformerLayer
from tessera.nn.kv_cache import KVCache, StepCache
from tessera.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from tessera.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from tessera.nn.memory_efficient import MemoryEfficientAttention
from tessera.nn.mlp import MLP
from tessera.nn.parameter import Parameter
from tessera.nn.quantized import CastedLinear, Int8Linear
from tessera.ops.activations import swish
from tessera.ops.embedding import embedding
from tessera.ops.losses import cross_entropy_safe
from tessera.ops.quantized_linear import quantized_matmul, swish_fp8
from tessera.ops.softmax import l2_normalize, log_softmax_stable, softmax_safe

__all__ = [
    "MLP", "Attention", "Block", "BlockEmbedding", "BlockLinear", "BlockWeight", "Buffer", "CastedEmbedding",
    "CastedLinear", "CastedSparseEmbedding", "CrossEntropyLoss", "Embedding", "FusedTransformerLayer", "Int8Linear",
    "KVCache", "LayerNorm", "LearnedPositionalEmbedding", "Linear", "LinearCrossEntropyLoss",
    "MemoryEfficientAttention", "Module", "ModuleList", "Parameter", "RMSNorm", "StepCache", "cross_entropy_safe",
    "embedding", "l2_normalize", "log_softmax_stable", "quantized_matmul", "softmax_safe", "swish", "swish_fp8",
    "utils",
]
