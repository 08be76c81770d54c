"""The operations as tile programs: what runs when no library is faster.

In: torch tensors, of any float dtype unless a kernel says otherwise, and a tensor for the result. Statistics and
sums are taken in f32; the result is rounded once. `ops` and bench/kernels.py call them.
"""

from tessera.ops.kernels.activations import activation_kernel, gated_kernel
from tessera.ops.kernels.casted_linear import int8_rows_kernel
from tessera.ops.kernels.cross_entropy import cross_entropy_kernel
from tessera.ops.kernels.embedding import casted_embedding_kernel
from tessera.ops.kernels.flash_attention import flash_attention_kernel
from tessera.ops.kernels.gemm import gemm_kernel, linear_kernel
from tessera.ops.kernels.layer_norm import layer_norm_kernel
from tessera.ops.kernels.quantized import (
    int4_linear_kernel,
    int4_product_kernel,
    int8_group_linear_kernel,
    int8_group_product_kernel,
    int8_linear_kernel,
)
from tessera.ops.kernels.rms_norm import rms_norm_kernel
from tessera.ops.kernels.rope import rope_kernel
from tessera.ops.kernels.softmax import softmax_kernel

__all__ = ["activation_kernel", "casted_embedding_kernel", "cross_entropy_kernel", "flash_attention_kernel",
           "gated_kernel", "gemm_kernel", "int4_linear_kernel", "int4_product_kernel", "int8_group_linear_kernel",
           "int8_group_product_kernel", "int8_linear_kernel", "int8_rows_kernel", "layer_norm_kernel", "linear_kernel",
           "rms_norm_kernel", "rope_kernel", "softmax_kernel"]
