"""Operations of decoder-only transformers: pure functions on tensors, one file each."""

import sys
from typing import Any

from torch import Tensor

from tessera.ops.activations import ACTIVATIONS, gelu, gelu_tanh, relu, relu2, silu, softcap, swish
from tessera.ops.attention import Mask, attention, grouped_query_attention, make_mask, multi_query_attention
from tessera.ops.embedding import (
    BlockSparse,
    casted_embedding,
    casted_sparse_embedding,
    embedding,
    to_block_sparse,
)
from tessera.ops.flash_attention import chunked_attention, flash_attention
from tessera.ops.invariant import even_blocks, is_invariant
from tessera.ops.linear import MAX_FEW_ROWS, linear
from tessera.ops.linear_cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
from tessera.ops.losses import (
    apply_label_smoothing,
    cross_entropy,
    cross_entropy_safe,
    fused_softmax_cross_entropy,
    softmax_cross_entropy,
    stable_cross_entropy,
)
from tessera.ops.matmul import gemm, matmul
from tessera.ops.metric_losses import (
    contrastive_loss,
    max_margin_loss,
    stable_contrastive_loss,
    stable_max_margin_loss,
)
from tessera.ops.mlp import fused_mlp, gated, gated_packed, swiglu, swiglu_memory_efficient, swiglu_packed
from tessera.ops.norm import add_rms_norm, layer_norm, rms_norm, sharded_rms_norm, stable_rms_norm
from tessera.ops.paged_attention import paged_attention
from tessera.ops.positions import (
    alibi_bias,
    alibi_slopes,
    apply_causal_mask,
    apply_rotary_pos_emb,
    cos_sin_embedding,
    dynamic_rope,
    rotary_embedding,
)
from tessera.ops.quantize import (
    Quantized,
    dequantize,
    dequantize_rows,
    fake_quantize_rows,
    is_quantized,
    quantize,
    quantize_rows,
)
from tessera.ops.quantized_linear import casted_linear, int8_linear, mul_fp8, quantized_matmul, swish_fp8
from tessera.ops.quantized_mlp import quantize_swiglu, swiglu_quantized
from tessera.ops.registration import implementation, wants_reference
from tessera.ops.residual import add
from tessera.ops.rotary import RopeScaling, RopeTables, rope_frequencies, rope_tables, rotary, rotary_
from tessera.ops.softmax import l2_normalize, log_softmax, log_softmax_stable, masked_mean, softmax, softmax_safe
from tessera.ops.tensors import cast, gather, merge_heads, split_heads

rmsnorm = rms_norm  # as some documents spell it

__all__ = [
    "ACTIVATIONS", "MAX_FEW_ROWS", "BlockSparse", "Mask", "Quantized", "RopeScaling", "RopeTables", "add",
    "add_rms_norm", "alibi_bias", "alibi_slopes", "apply_causal_mask", "apply_label_smoothing", "apply_rotary_pos_emb",
    "attention", "cast", "casted_embedding", "casted_linear", "casted_sparse_embedding", "chunked_attention",
    "contrastive_loss", "cos_sin_embedding", "cross_entropy", "cross_entropy_safe", "dequantize", "dequantize_rows",
    "dynamic_rope", "embedding", "even_blocks", "fake_quantize_rows", "flash_attention", "fused_mlp",
    "fused_softmax_cross_entropy", "gated", "gated_packed", "gather", "gelu", "gelu_tanh", "gemm",
    "grouped_query_attention", "implementation", "int8_linear", "is_invariant", "is_quantized", "l2_normalize",
    "layer_norm", "linear", "linear_cross_entropy", "log_softmax", "log_softmax_stable", "make_mask", "masked_mean",
    "matmul", "max_margin_loss", "merge_heads", "mul_fp8", "multi_query_attention", "paged_attention", "quantize",
    "quantize_rows", "quantize_swiglu", "quantized_matmul", "relu", "relu2", "ring_attention", "rms_norm", "rmsnorm",
    "rope_frequencies", "rope_tables", "rotary", "rotary_", "rotary_embedding", "sharded_rms_norm", "silu", "softcap",
    "softmax", "softmax_cross_entropy", "softmax_safe", "split_heads", "stable_contrastive_loss",
    "stable_cross_entropy", "stable_max_margin_loss", "stable_rms_norm", "swiglu", "swiglu_memory_efficient",
    "swiglu_packed", "swiglu_quantized", "swish", "swish_fp8", "to_block_sparse", "vocab_parallel_cross_entropy",
    "wants_reference",
]


def ring_attention(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mesh: Any = None, **options: Any) -> Tensor:
    """`dist.ring_attention`, under the documents' name: attention over a sequence spread over a mesh."""
    # The mesh stands above this layer, so that the name is looked up in the public facade, and only when called.
    result: Tensor = sys.modules["tessera"].dist.ring_attention(q_BHSD, k_BKSD, v_BKSD, mesh, **options)
    return result
