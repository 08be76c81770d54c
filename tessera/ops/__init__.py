"""Operations of decoder-only transformers: pure functions on tensors, one file each."""

from tessera.ops.activations import ACTIVATIONS, softcap
from tessera.ops.attention import Mask, attention, grouped_query_attention, make_mask, multi_query_attention
from tessera.ops.chunked_attention import chunked_attention
from tessera.ops.embedding import embedding
from tessera.ops.flash_attention import flash_attention
from tessera.ops.invariant import even_blocks, is_invariant
from tessera.ops.linear import MAX_FEW_ROWS, linear
from tessera.ops.mlp import gated, swiglu
from tessera.ops.norm import add_rms_norm, layer_norm, rms_norm
from tessera.ops.quantize import dequantize_rows, fake_quantize_rows, is_quantized, quantize_rows
from tessera.ops.registration import implementation, wants_reference
from tessera.ops.residual import add
from tessera.ops.rotary import RopeScaling, rope_frequencies, rope_tables, rotary

__all__ = [
    "ACTIVATIONS", "MAX_FEW_ROWS", "Mask", "RopeScaling", "add", "add_rms_norm", "attention", "chunked_attention",
    "dequantize_rows", "embedding", "even_blocks", "fake_quantize_rows", "flash_attention", "gated",
    "grouped_query_attention", "implementation", "is_invariant", "is_quantized", "layer_norm", "linear", "make_mask",
    "multi_query_attention", "quantize_rows", "rms_norm", "rope_frequencies", "rope_tables", "rotary", "softcap",
    "swiglu", "wants_reference",
]
