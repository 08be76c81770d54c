"""The kernels of "Standard Operations: Implementation Guide", as the document writes them.

What had to be mended is listed, line by line, in docs/kernels_of_the_documents.md; everything else is the
document's text. Each runs on every backend, at any size; in f32 by `kernel.retype({ts.bf16: ts.f32})`.

    python examples/kernels_of_the_documents.py
"""

# ruff: noqa: UP045, RUF059 (the document's text)

from typing import Optional

import torch

import tessera as ts
from tessera import Tensor, Tile, bf16, f32, fp8, int8, int32, tile

# -- 1.1 RMSNorm ------------------------------------------------------------------------------------


@ts.kernel
def rms_norm_kernel(
    x: Tile["S", "D", bf16],
    weight: Tile["D", f32],
    output: Tile["S", "D", bf16],
    eps: float = 1e-6
):
    """Fused RMSNorm kernel for efficiency"""
    ctx = tile.context()

    # Load input tile
    x_tile = tile.load(x, shape=(ctx.S, ctx.D))
    w_tile = tile.load_broadcast(weight)  # Broadcast weight

    # Compute RMS in higher precision
    x_f32 = tile.cast(x_tile, f32)
    x_squared = tile.mul(x_f32, x_f32)

    # Warp-level reduction for efficiency
    rms = tile.warp.reduce_mean(x_squared, axis=-1)
    rms = tile.rsqrt(rms + eps)  # Reciprocal sqrt for efficiency

    # Normalize and scale
    x_normed = tile.mul(x_f32, tile.broadcast(rms, axis=-1))
    x_scaled = tile.mul(x_normed, w_tile)

    # Store result
    tile.store(output, tile.cast(x_scaled, bf16))


# -- 2.1 SwiGLU -------------------------------------------------------------------------------------


@ts.kernel
def swiglu_fused_kernel(
    x: Tile["S", "D", bf16],
    W_gate: Tile["D", "D_ff", bf16],
    W_up: Tile["D", "D_ff", bf16],
    W_down: Tile["D_ff", "D", bf16],
    output: Tile["S", "D", bf16],
    beta: float = 1.0
):
    """Single kernel for entire SwiGLU operation"""
    ctx = tile.context()

    # Load input
    x_tile = tile.load(x, shape=(ctx.S, ctx.D))

    # Fused gate and up projection using tensor cores
    # Concatenate weights for single matmul
    W_combined = tile.concat([W_gate, W_up], axis=1)
    combined_out = tile.mma(x_tile, W_combined)  # [S, 2*D_ff]

    # Split results
    gate_out, up_out = tile.split(combined_out, 2, axis=-1)

    # Apply Swish activation to gate (with beta scaling)
    gate_sigmoid = tile.sigmoid(tile.mul(gate_out, beta))
    gate_activated = tile.mul(gate_out, gate_sigmoid)

    # Element-wise multiplication (gating)
    hidden = tile.mul(gate_activated, up_out)

    # Down projection
    output_tile = tile.mma(hidden, W_down)

    # Store result
    tile.store(output, output_tile)


# -- 3.1 Flash Attention ----------------------------------------------------------------------------


@ts.kernel
def flash_attention_kernel(
    Q: Tile["B*H", "S", "D", bf16],
    K: Tile["B*H", "S", "D", bf16],
    V: Tile["B*H", "S", "D", bf16],
    O: Tile["B*H", "S", "D", bf16],
    mask: Optional[Tile["S", "S"]] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = 1.0,
    seed: int = 0
):
    """
    Flash Attention kernel implementation
    Uses tiling and online softmax for memory efficiency
    """
    ctx = tile.context()
    BH, S, D = Q.shape

    # Tile sizes for Q and KV
    Br = ctx.block_m  # Rows of Q
    Bc = ctx.block_n  # Cols of K/V

    # One program for every head
    for bh in tile.grid(BH):
        # Allocate shared memory
        Q_block = tile.alloc_shared((Br, D), bf16)
        K_block = tile.alloc_shared((Bc, D), bf16)
        V_block = tile.alloc_shared((Bc, D), bf16)

        # Output accumulator in registers
        O_accum = tile.zeros((Br, D), f32)
        row_max = tile.full((Br,), -float('inf'), f32)
        row_sum = tile.zeros((Br,), f32)

        # Process Q blocks
        for q_idx in tile.range(0, S, Br):
            # Load Q block
            tile.load_async(Q[bh, q_idx:q_idx+Br], Q_block)
            tile.wait()

            # Reset statistics for this Q block
            tile.fill(row_max, -float('inf'))
            tile.fill(row_sum, 0.0)
            tile.fill(O_accum, 0.0)

            # Process KV blocks
            for kv_idx in tile.range(0, S, Bc):
                # Skip if causal mask
                if is_causal and kv_idx > q_idx + Br:
                    break

                # Load K, V blocks
                tile.load_async(K[bh, kv_idx:kv_idx+Bc], K_block)
                tile.load_async(V[bh, kv_idx:kv_idx+Bc], V_block)
                tile.wait()

                # Compute QK^T
                S_block = tile.mma(Q_block, tile.transpose(K_block))
                S_block = tile.mul(S_block, scale)

                # Apply mask if needed
                if is_causal:
                    tile.apply_causal_mask(S_block, q_idx, kv_idx)
                if mask is not None:
                    S_block = tile.add(S_block, mask[q_idx:q_idx+Br, kv_idx:kv_idx+Bc])

                # Online softmax computation
                block_max = tile.max(S_block, axis=1)

                # Update running max and adjust previous accumulator
                prev_max = row_max
                row_max = tile.maximum(row_max, block_max)

                # Compute exp with new max
                S_block = tile.exp(S_block - tile.broadcast(row_max, axis=1))

                # Adjust previous accumulator
                adjust_factor = tile.exp(prev_max - row_max)
                O_accum = tile.mul(O_accum, tile.broadcast(adjust_factor, axis=1))
                row_sum = tile.mul(row_sum, adjust_factor)
                row_sum = tile.add(row_sum, tile.sum(S_block, axis=1))

                # Apply dropout if needed
                if dropout_p > 0:
                    block = (bh * tile.cdiv(S, Br) + q_idx // Br) * tile.cdiv(S, Bc) + kv_idx // Bc
                    S_block = tile.dropout(S_block, dropout_p, seed=seed, offset=block * Br * Bc)

                # Update accumulator
                P_V = tile.mma(S_block, V_block)
                O_accum = tile.add(O_accum, P_V)

            # Normalize output
            O_block = tile.div(O_accum, tile.broadcast(row_sum, axis=1))

            # Store output
            tile.store(O[bh, q_idx:q_idx+Br], tile.cast(O_block, bf16))


# -- 4.1 Rotary Position Embedding ------------------------------------------------------------------


@ts.kernel
def rotary_embedding_kernel(
    x: Tile["S", "H", "D", bf16],
    cos_cache: Tile["S", "D/2", f32],
    sin_cache: Tile["S", "D/2", f32],
    output: Tile["S", "H", "D", bf16]
):
    """
    Optimized RoPE kernel with precomputed cos/sin cache
    """
    S, H, D = x.shape
    D_half = D // 2

    # Load input tile
    x_tile = tile.load(x)

    # Split into pairs for rotation
    x_r = x_tile[..., :D_half]
    x_i = x_tile[..., D_half:]

    # Load precomputed cos/sin values
    cos = tile.load_broadcast(cos_cache)  # Broadcast across H
    sin = tile.load_broadcast(sin_cache)

    # Apply rotation: (x_r + i*x_i) * (cos + i*sin)
    # Real part: x_r * cos - x_i * sin
    # Imaginary part: x_r * sin + x_i * cos
    out_r = tile.sub(tile.mul(x_r, cos), tile.mul(x_i, sin))
    out_i = tile.add(tile.mul(x_r, sin), tile.mul(x_i, cos))

    # Concatenate real and imaginary parts
    output_tile = tile.concat([out_r, out_i], axis=-1)

    # Store result
    tile.store(output, output_tile)


# -- 5.1 Casted Embedding ---------------------------------------------------------------------------


@ts.kernel
def casted_embedding_kernel(
    indices: Tile["B*S", int32],
    embeddings: Tile["V", "D", fp8],
    output: Tile["B*S", "D", bf16],
    scale: float
):
    """Optimized kernel for casted embedding lookup"""
    ctx = tile.context()

    # Load indices
    idx_tile = tile.load(indices)

    # Gather embeddings with casting
    for i in tile.thread_range(ctx.BS):
        idx = idx_tile[i]

        # Load embedding vector in FP8
        emb_fp8 = tile.load_vector(embeddings[idx])

        # Cast to BF16 and scale
        emb_bf16 = tile.cast(emb_fp8, bf16)
        emb_scaled = tile.mul(emb_bf16, scale)

        # Store result
        tile.store_vector(output[i], emb_scaled)


# -- 5.2 Casted Linear ------------------------------------------------------------------------------


@ts.kernel
def int8_linear_kernel(
    x: Tile["B*S", "D_in", int8],
    weight: Tile["D_out", "D_in", int8],
    bias: Optional[Tile["D_out", f32]],
    output: Tile["B*S", "D_out", bf16],
    x_scale: float,
    w_scale: Tensor["D_out"],
    output_scale: float
):
    """INT8 matrix multiplication with per-channel scaling"""
    ctx = tile.context()

    # Use INT8 tensor cores
    for batch_idx in tile.grid(ctx.BS):
        # Load input tile
        x_tile = tile.load(x[batch_idx], dtype=int8)

        # Compute INT8 matmul with INT32 accumulation
        acc = tile.zeros((ctx.D_out,), dtype=int32)

        for k in tile.range(0, ctx.D_in, 16):  # Process in chunks
            x_chunk = x_tile[k:k+16]
            w_chunk = tile.load(weight[:, k:k+16], dtype=int8)

            # INT8 tensor core operation
            acc = tile.dp4a(x_chunk, w_chunk, acc)  # INT8 -> INT32

        # Dequantize and scale
        acc_f32 = tile.cast(acc, f32)
        scaled = tile.mul(acc_f32, x_scale)

        # Per-channel weight scaling
        for i in tile.range(ctx.D_out):
            scaled[i] = tile.mul(scaled[i], w_scale[i])

        # Add bias if present
        if bias is not None:
            bias_tile = tile.load(bias)
            scaled = tile.add(scaled, bias_tile)

        # Quantize output
        output_bf16 = tile.cast(scaled, bf16)
        output_scaled = tile.mul(output_bf16, output_scale)

        # Store result
        tile.store(output[batch_idx], output_scaled)


# -- 5.3 Casted Sparse Embedding --------------------------------------------------------------------


@ts.kernel
def sparse_embedding_kernel(
    indices: Tile["B*S", int32],
    block_data: Tile["N_blocks", "block_size", "block_size", fp8],
    block_indices: Tile["N_blocks", int32],
    block_ptr: Tile["V+1", int32],
    block_scales: Tile["N_blocks", f32],
    output: Tile["B*S", "D", bf16]
):
    """Optimized kernel for sparse embedding gathering"""
    ctx = tile.context()

    # Process each lookup
    for idx in tile.grid(ctx.BS):
        emb_idx = indices[idx]

        # Get block range
        start = block_ptr[emb_idx]
        end = block_ptr[emb_idx + 1]

        # Initialize output
        out_vec = tile.zeros(ctx.D, bf16)

        # Gather and decompress blocks
        for block_idx in tile.range(start, end):
            # Load compressed block
            block_fp8 = tile.load(block_data[block_idx])
            scale = block_scales[block_idx]

            # Decompress: cast and scale
            block_bf16 = tile.cast(block_fp8, bf16)
            block_scaled = tile.mul(block_bf16, scale)

            # Get position in output
            col_idx = block_indices[block_idx]
            offset = col_idx * ctx.block_size

            # Copy to output position
            tile.copy(
                block_scaled.reshape(-1),
                out_vec[offset:offset + ctx.block_size * ctx.block_size]
            )

        # Store result
        tile.store(output[idx], out_vec)


# -- 6.1 Stable Cross-Entropy -----------------------------------------------------------------------


@ts.kernel
def stable_cross_entropy_kernel(
    logits: Tile["B*S", "V", bf16],
    targets: Tile["B*S", int32],
    loss: Tile["B*S", f32],
    vocab_size: int,
    ignore_index: int = -100
):
    """
    Fused kernel for stable cross-entropy computation
    Combines log-softmax and gathering in single pass
    """
    ctx = tile.context()

    for idx in tile.grid(ctx.BS):
        target = targets[idx]

        # Skip if ignore index
        if target == ignore_index:
            loss[idx] = 0.0
            continue

        # Load logits for this position
        logits_vec = tile.load(logits[idx], dtype=bf16)

        # Find max for stability (warp reduction)
        max_logit = tile.warp.reduce_max(logits_vec)
        max_logit = tile.broadcast(max_logit)

        # Compute exp(x - max)
        logits_vec = tile.sub(logits_vec, max_logit)
        exp_vec = tile.exp(tile.cast(logits_vec, f32))

        # Sum of exponentials (warp reduction)
        sum_exp = tile.warp.reduce_sum(exp_vec)
        sum_exp = tile.broadcast(sum_exp)

        # Log-sum-exp, of the logits less their maximum as the target's logit is
        log_sum_exp = tile.log(sum_exp)

        # Get target logit
        target_logit = logits_vec[target]

        # Compute loss: -(target_logit - log_sum_exp)
        loss_val = -(target_logit - log_sum_exp)

        # Store result
        loss[idx] = loss_val


# -- 6.2 Softmax Cross-Entropy ----------------------------------------------------------------------


@ts.kernel
def fused_softmax_cross_entropy_kernel(
    logits: Tile["B", "C", bf16],
    targets: Tile["B", int32],
    loss: Tile["B", f32],
    num_classes: int
):
    """
    Fused softmax + cross-entropy kernel
    More efficient than separate operations
    """
    ctx = tile.context()

    for b in tile.grid(ctx.B):
        # Load logits row
        logits_row = tile.load(logits[b], dtype=f32)
        target = targets[b]

        # Online softmax computation
        max_val = tile.reduce_max(logits_row)

        # Compute exp(x - max) and sum
        sum_exp = 0.0
        target_exp = 0.0

        for c in tile.range(num_classes):
            exp_val = tile.exp(logits_row[c] - max_val)
            sum_exp += exp_val

            if c == target:
                target_exp = exp_val

        # Cross entropy: -log(softmax[target])
        loss[b] = -tile.log(target_exp / sum_exp)


# -- 7.1 Fused blocks -------------------------------------------------------------------------------


class CastedLinear:
    """The weight of a linear layer in int8, with one scale for each output feature (chapter 5.2)."""

    def __init__(self, in_features: int, out_features: int):
        self.weight = torch.randint(-127, 128, (out_features, in_features)).to(torch.int8)
        self.weight_scale = torch.full((out_features, 1), (in_features**-0.5) / 64)


class FusedTransformerLayer:
    """
    Fully fused transformer layer
    Combines all operations into minimal kernel launches
    """
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0
    ):
        self.dim = dim
        self.num_heads = num_heads
        self.mlp_dim = int(dim * mlp_ratio)

        # Fused QKV projection
        self.qkv = CastedLinear(dim, 3 * dim)

        # Output projection
        self.out_proj = CastedLinear(dim, dim)

        # Fused MLP weights
        self.mlp_gate_up = CastedLinear(dim, 2 * self.mlp_dim)
        self.mlp_down = CastedLinear(self.mlp_dim, dim)

        self.dropout = dropout

    @ts.kernel.fused
    def fused_attention_block(
        self,
        x: Tile["B*S", "D", bf16],
        rope_cos: Tile["S", "D_rot", f32],
        rope_sin: Tile["S", "D_rot", f32],
        mask: Optional[Tile["S", "S"]],
        output: Tile["B*S", "D", bf16]
    ):
        """Single kernel for entire attention block"""
        ctx = tile.context()

        # RMSNorm (in registers)
        x_norm = tile.rms_norm(x, eps=1e-6)

        # QKV projection (tensor cores)
        qkv = linear(x_norm, self.qkv.weight, self.qkv.weight_scale)
        q, k, v = tile.split(qkv, 3, dim=-1)

        # Reshape for heads
        q = tile.reshape(q, (ctx.B, ctx.S, self.num_heads, -1))
        k = tile.reshape(k, (ctx.B, ctx.S, self.num_heads, -1))
        v = tile.reshape(v, (ctx.B, ctx.S, self.num_heads, -1))

        # Apply RoPE (in registers)
        q = tile.apply_rope(q, rope_cos, rope_sin)
        k = tile.apply_rope(k, rope_cos, rope_sin)

        # Flash attention (tiled computation)
        attn_out = tile.flash_attention(
            q, k, v,
            causal=True,
            dropout=self.dropout
        )

        # Output projection
        attn_out = tile.reshape(attn_out, (ctx.BS, ctx.D))
        output_tile = linear(attn_out, self.out_proj.weight, self.out_proj.weight_scale)

        # Store with residual (done by caller)
        tile.store(output, output_tile)

    @ts.kernel.fused
    def fused_mlp_block(
        self,
        x: Tile["B*S", "D", bf16],
        output: Tile["B*S", "D", bf16]
    ):
        """Single kernel for entire MLP block"""
        # RMSNorm
        x_norm = tile.rms_norm(x, eps=1e-6)

        # Fused Gate + Up projection
        gate_up = linear(x_norm, self.mlp_gate_up.weight, self.mlp_gate_up.weight_scale)
        gate, up = tile.split(gate_up, 2, dim=-1)

        # SwiGLU activation
        gate = tile.swish(gate)
        hidden = tile.mul(gate, up)

        # Down projection
        output_tile = linear(hidden, self.mlp_down.weight, self.mlp_down.weight_scale)

        # Store
        tile.store(output, output_tile)


def linear(x, weight, weight_scale):
    """x @ weight.T, each column times its scale: what `tile.mma(x, weight)` means for an int8 weight."""
    product = tile.mma(x, tile.transpose(tile.cast(weight, f32)))
    return product * tile.transpose(tile.load(weight_scale))


def main() -> None:
    """Run RMSNorm as written and show how far it is from float64."""
    x, weight = torch.randn(33, 100).bfloat16(), torch.rand(100)
    output = torch.empty_like(x)
    rms_norm_kernel(x, weight, output)
    x64 = x.double()
    expected = x64 / torch.sqrt(x64.square().mean(-1, keepdim=True) + 1e-6) * weight
    error = ((output.double() - expected).abs() / expected.abs().clamp(min=1e-3)).max()
    print(f"rms_norm_kernel on [33, 100] bf16: largest relative error {error:.1e} (bf16 rounds to 3.9e-03)")


if __name__ == "__main__":
    main()
