"""Operations of decoder-only transformers: pure functions on tensors, one file each."""

from tessera.ops.activations import ACTIVATIONS, softcap
from tessera.ops.attention import Mask, attention, make_mask
from tessera.ops.embedding import embedding
from tessera.ops.invariant import even_blocks
from tessera.ops.linear import dequantize_rows, fake_quantize_rows, is_quantized, linear, quantize_rows
from tessera.ops.mlp import gated, swiglu
from tessera.ops.norm import layer_norm, rms_norm
from tessera.ops.rotary import RopeScaling, rope_frequencies, rope_tables, rotary

__all__ = [
    "ACTIVATIONS", "Mask", "RopeScaling", "attention", "dequantize_rows", "embedding", "even_blocks",
    "fake_quantize_rows", "gated", "is_quantized", "layer_norm", "linear", "make_mask", "quantize_rows", "rms_norm",
    "rope_frequencies", "rope_tables", "rotary", "softcap", "swiglu",
]
