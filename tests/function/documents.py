"""The functions of the documents, as they stand there; docs/functions_of_the_documents.md says what was mended."""

from __future__ import annotations

import math
from typing import Dict, Optional, Tuple, Union  # noqa: UP035

import torch
import torch.nn.functional as F

import tessera
import tessera as ts
from tessera import DType, Mesh, MeshTensor, Tensor, f32, f64, fp8, int8


@tessera.function
def rms_norm(
    x: Tensor["B", "S", "D"],
    weight: Tensor["D"],
    eps: float = 1e-6,
) -> Tensor["B", "S", "D"]:
    rms = tessera.sqrt(tessera.mean(x ** 2, dim=-1, keepdim=True) + eps)
    x_normed = x / rms
    return x_normed * weight


@tessera.numerically_stable
def stable_rms_norm(
    x: Tensor["B", "S", "D"],
    weight: Tensor["D"],
    eps: float = 1e-6,
) -> Tensor["B", "S", "D"]:
    with tessera.precision(compute=f32, accumulate=f64):
        mean_sq = tessera.stable.mean_of_squares(x, dim=-1, keepdim=True)
        rms = tessera.stable.sqrt(mean_sq + eps)
        x_normed = tessera.stable.divide(x, rms)
    return x_normed * weight


@tessera.distributed
def distributed_rms_norm(
    x: MeshTensor["B", "S", "D"],
    weight: MeshTensor["D"],
    mesh: Mesh,
    eps: float = 1e-6,
) -> MeshTensor["B", "S", "D"]:
    with mesh.axis("model"):
        local_sq = x ** 2
        global_mean_sq = tessera.mesh_reduce(
            tessera.mean(local_sq, dim=-1, keepdim=True),
            axis="model",
            op="mean",
        )
        rms = tessera.sqrt(global_mean_sq + eps)
        x_normed = x / rms
        return x_normed * weight


@ts.function
def swiglu(
    x: Tensor["B", "S", "D"],
    W_gate: Tensor["D", "D_ff"],
    W_up: Tensor["D", "D_ff"],
    W_down: Tensor["D_ff", "D"],
    beta: float = 1.0,
) -> Tensor["B", "S", "D"]:
    gate = tessera.nn.swish(x @ W_gate, beta=beta)
    up = x @ W_up
    hidden = gate * up
    return hidden @ W_down


@tessera.checkpoint
def swiglu_memory_efficient(
    x: Tensor["B", "S", "D"],
    W_gate: Tensor["D", "D_ff"],
    W_up: Tensor["D", "D_ff"],
    W_down: Tensor["D_ff", "D"],
    chunk_size: int = 512,
) -> Tensor["B", "S", "D"]:
    _B, _S, _D = x.shape
    D_ff = W_gate.shape[-1]
    output = tessera.zeros_like(x)
    for i in range(0, D_ff, chunk_size):
        end = min(i + chunk_size, D_ff)
        with tessera.checkpoint_region():
            W_gate_chunk = W_gate[:, i:end]
            W_up_chunk = W_up[:, i:end]
            W_down_chunk = W_down[i:end, :]
            gate = tessera.nn.swish(x @ W_gate_chunk)
            up = x @ W_up_chunk
            hidden = gate * up
            output += hidden @ W_down_chunk
    return output


@tessera.quantized(weights=int8, activations=fp8)
def swiglu_quantized(
    x: Tensor["B", "S", "D", fp8],
    W_gate: Tensor["D", "D_ff", int8],
    W_up: Tensor["D", "D_ff", int8],
    W_down: Tensor["D_ff", "D", int8],
    scales: Dict[str, float],  # noqa: UP006
) -> Tensor["B", "S", "D", fp8]:
    with tessera.quantization.context(scales):
        gate = tessera.nn.quantized_matmul(
            x, W_gate, input_scale=scales["input"], weight_scale=scales["gate_weight"], output_dtype=fp8)
        gate = tessera.nn.swish_fp8(gate)
        up = tessera.nn.quantized_matmul(
            x, W_up, input_scale=scales["input"], weight_scale=scales["up_weight"], output_dtype=fp8)
        hidden = tessera.mul_fp8(gate, up)
        return tessera.nn.quantized_matmul(
            hidden, W_down, input_scale=scales["hidden"], weight_scale=scales["down_weight"], output_dtype=fp8)


@ts.function
def attention(
    q: Tensor["B", "H", "S", "D"],
    k: Tensor["B", "H", "S", "D"],
    v: Tensor["B", "H", "S", "D"],
    mask: Optional[Tensor["S", "S"]] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,  # noqa: UP045
) -> Tensor["B", "H", "S", "D"]:
    _B, _H, _S, D = q.shape
    scale = scale or (1.0 / math.sqrt(D))
    return tessera.ops.flash_attention(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)


@ts.function
def grouped_query_attention(
    q: Tensor["B", "H_q", "S", "D"],
    k: Tensor["B", "H_kv", "S", "D"],
    v: Tensor["B", "H_kv", "S", "D"],
    is_causal: bool = True,
) -> Tensor["B", "H_q", "S", "D"]:
    B, H_q, S, D = q.shape
    H_kv = k.shape[1]
    group_size = H_q // H_kv
    q = q.reshape(B, H_kv, group_size, S, D)
    k = k.unsqueeze(2)
    v = v.unsqueeze(2)
    k = k.expand(B, H_kv, group_size, S, D)
    v = v.expand(B, H_kv, group_size, S, D)
    q = q.reshape(B, H_q, S, D)
    k = k.reshape(B, H_q, S, D)
    v = v.reshape(B, H_q, S, D)
    return attention(q, k, v, is_causal=is_causal)


@ts.function
def multi_query_attention(
    q: Tensor["B", "H", "S", "D"],
    k: Tensor["B", "S", "D"],
    v: Tensor["B", "S", "D"],
    is_causal: bool = True,
) -> Tensor["B", "H", "S", "D"]:
    B, H, S, D = q.shape
    k = k.unsqueeze(1).expand(B, H, S, D)
    v = v.unsqueeze(1).expand(B, H, S, D)
    return attention(q, k, v, is_causal=is_causal)


@ts.function
def apply_rotary_pos_emb(
    x: Tensor["B", "S", "H", "D"],
    cos: Tensor["B", "S", 1, "D/2"],
    sin: Tensor["B", "S", 1, "D/2"],
) -> Tensor["B", "S", "H", "D"]:
    x_r, x_i = x.chunk(2, dim=-1)
    cos = cos.expand(-1, -1, x.shape[2], -1)
    sin = sin.expand(-1, -1, x.shape[2], -1)
    out_r = x_r * cos - x_i * sin
    out_i = x_r * sin + x_i * cos
    return tessera.cat([out_r, out_i], dim=-1)


@ts.function
def rotary_embedding(
    x: Tensor["B", "S", "H", "D"],
    position_ids: Optional[Tensor["B", "S"]] = None,  # noqa: UP045
    base: float = 10000.0,
    scaling_factor: float = 1.0,
) -> Tensor["B", "S", "H", "D"]:
    B, S, _H, D = x.shape
    if position_ids is None:
        position_ids = tessera.arange(S).unsqueeze(0).expand(B, S)
    position_ids = position_ids * scaling_factor
    inv_freq = 1.0 / (base ** (tessera.arange(0, D, 2).float() / D))
    position_ids_expanded = position_ids.unsqueeze(-1)
    freqs = position_ids_expanded * inv_freq
    cos_emb = tessera.cos(freqs).unsqueeze(2)
    sin_emb = tessera.sin(freqs).unsqueeze(2)
    return apply_rotary_pos_emb(x, cos_emb, sin_emb)


@ts.function
def dynamic_rope(
    x: Tensor["B", "S", "H", "D"],
    position_ids: Tensor["B", "S"],
    base: float = 10000.0,
    max_position: int = 2048,
    scaling_type: str = "linear",
) -> Tensor["B", "S", "H", "D"]:
    current_max = position_ids.max().item()
    if current_max <= max_position:
        return rotary_embedding(x, position_ids, base)
    if scaling_type == "linear":
        scaling_factor = current_max / max_position
    elif scaling_type == "ntk":
        scaling_factor = (current_max / max_position) ** (x.shape[-1] / (x.shape[-1] - 2))
        base = base * scaling_factor
        scaling_factor = 1.0
    elif scaling_type == "yarn":
        scaling_factor = math.log(current_max / max_position) + 1
    return rotary_embedding(x, position_ids, base, scaling_factor)


@ts.function
def cos_sin_embedding(
    seq_len: int,
    dim: int,
    base: float = 10000.0,
    dtype: DType = f32,
) -> Tuple[Tensor["seq_len", "dim"], Tensor["seq_len", "dim"]]:  # noqa: UP006
    position = tessera.arange(seq_len, dtype=dtype).unsqueeze(1)
    div_term = tessera.exp(tessera.arange(0, dim, 2, dtype=dtype) * -(math.log(base) / dim))
    cos_emb = tessera.zeros(seq_len, dim, dtype=dtype)
    sin_emb = tessera.zeros(seq_len, dim, dtype=dtype)
    cos_emb[:, 0::2] = tessera.cos(position * div_term)
    cos_emb[:, 1::2] = tessera.cos(position * div_term)
    sin_emb[:, 0::2] = tessera.sin(position * div_term)
    sin_emb[:, 1::2] = tessera.sin(position * div_term)
    return cos_emb, sin_emb


@ts.function
def alibi_bias(
    seq_len: int,
    num_heads: int,
    dtype: DType = f32,
) -> Tensor["H", "S", "S"]:
    positions = tessera.arange(seq_len, dtype=dtype)
    distances = positions.unsqueeze(0) - positions.unsqueeze(1)
    slopes = 2 ** (-8 * tessera.arange(1, num_heads + 1) / num_heads)
    return distances.unsqueeze(0) * slopes.view(-1, 1, 1)


@tessera.module
class LearnedPositionalEmbedding:
    def __init__(self, max_seq_len: int, dim: int):
        self.embeddings = tessera.nn.Embedding(max_seq_len, dim)

    def forward(self, position_ids: Tensor["B", "S"]) -> Tensor["B", "S", "D"]:
        return self.embeddings(position_ids)


@tessera.numerically_stable
def log_softmax_stable(
    x: Tensor["B", "V"],
    dim: int = -1,
) -> Tensor["B", "V"]:
    x_max = x.max(dim=dim, keepdim=True).values
    x_shifted = x - x_max
    exp_x = tessera.exp(x_shifted)
    sum_exp = exp_x.sum(dim=dim, keepdim=True)
    log_sum_exp = tessera.log(sum_exp)
    return x_shifted - log_sum_exp


@tessera.function
def stable_cross_entropy(
    logits: Tensor["B", "S", "V"],
    targets: Tensor["B", "S"],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    B, S, V = logits.shape
    logits_flat = logits.reshape(-1, V)
    targets_flat = targets.reshape(-1)
    mask = targets_flat != ignore_index
    log_probs = tessera.nn.log_softmax_stable(logits_flat, dim=-1)
    if label_smoothing > 0:
        log_probs = tessera.ops.apply_label_smoothing(log_probs, label_smoothing)
    target_log_probs = tessera.gather(
        log_probs,
        targets_flat.where(mask, 0).unsqueeze(1),
        dim=1,
    ).squeeze(1)
    loss = -target_log_probs * mask
    if reduction == "mean":
        return loss.sum() / mask.sum()
    elif reduction == "sum":
        return loss.sum()
    else:
        return loss.reshape(B, S)


@tessera.function
def softmax_cross_entropy(
    logits: Tensor["B", "C"],
    targets: Tensor["B"],
    reduction: str = "mean",
) -> Tensor:
    return tessera.ops.fused_softmax_cross_entropy(logits, targets, reduction)


@tessera.function
def stable_contrastive_loss(
    embeddings: Tensor["B", "D"],
    labels: Tensor["B"],
    temperature: float = 0.07,
    normalize: bool = True,
) -> Tensor:
    B, _D = embeddings.shape
    if normalize:
        embeddings = tessera.nn.l2_normalize(embeddings, dim=1)
    sim_matrix = embeddings @ embeddings.T / temperature
    mask = ~tessera.eye(B, dtype=bool)
    sim_matrix = sim_matrix.masked_fill(~mask, float("-inf"))
    labels_equal = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive_mask = labels_equal & mask
    max_sim = sim_matrix.max(dim=1, keepdim=True).values
    exp_sim = tessera.exp(sim_matrix - max_sim)
    sum_exp_sim = exp_sim.sum(dim=1)
    pos_sim = sim_matrix.masked_fill(~positive_mask, float("-inf"))
    pos_exp = tessera.exp(pos_sim - max_sim)
    loss = -tessera.log(pos_exp.sum(dim=1) / sum_exp_sim)
    return loss.mean()


def transformer_block(x, cache, W_qkv, W_out, W_up, W_gate, W_down, num_heads, head_dim):
    x = ts.op.rmsnorm(x, eps=1e-5)
    qkv = ts.op.matmul(x, W_qkv)
    q, k, v = ts.op.split_heads(qkv, num_heads=num_heads, head_dim=head_dim)
    y = ts.op.flash_attention(q, k, v, block_q=128, block_k=128, block_d=head_dim,
                              precision="bf16", accumulate="fp32", cache=cache)
    y = ts.op.matmul(ts.op.merge_heads(y), W_out)
    x = x + y
    y = ts.op.fused_mlp(x, up=W_up, gate=W_gate, down=W_down, activation="silu")
    return x + y


@ts.function
def stable_max_margin_loss(
    scores: Tensor["B", "N"],
    targets: Tensor["B"],
    margin: float = 1.0,
) -> Tensor:
    pos_scores = tessera.gather(scores, targets.unsqueeze(1), dim=1)
    mask = tessera.ones_like(scores)
    mask.scatter_(1, targets.unsqueeze(1), 0)
    scores_with_margin = scores + margin * mask
    neg_scores_max = tessera.where(mask.bool(), scores_with_margin, tessera.tensor(float("-inf"))).max(dim=1).values
    return tessera.relu(neg_scores_max - pos_scores.squeeze(1)).mean()


@ts.memory_efficient
class MemoryEfficientAttention:
    @staticmethod
    @ts.function
    def chunked_attention(
        q: Tensor["B", "H", "S", "D"],
        k: Tensor["B", "H", "S", "D"],
        v: Tensor["B", "H", "S", "D"],
        chunk_size: int = 512,
    ) -> Tensor["B", "H", "S", "D"]:
        """With the running maximum that the document's sketch leaves out."""
        B, H, S, D = q.shape
        output = []
        for i in range(0, S, chunk_size):
            q_chunk = q[:, :, i:i + chunk_size]
            attn_output = tessera.zeros_like(q_chunk)
            normalizer = q.new_zeros(B, H, q_chunk.shape[2], 1)
            running = q.new_full((B, H, q_chunk.shape[2], 1), float("-inf"))
            for j in range(0, S, chunk_size):
                scores = (q_chunk @ k[:, :, j:j + chunk_size].transpose(-2, -1)) / math.sqrt(D)
                scores_max = torch.maximum(running, scores.max(dim=-1, keepdim=True).values)
                scores_exp, factor = tessera.exp(scores - scores_max), tessera.exp(running - scores_max)
                attn_output = attn_output * factor + scores_exp @ v[:, :, j:j + chunk_size]
                normalizer = normalizer * factor + scores_exp.sum(dim=-1, keepdim=True)
                running = scores_max
            output.append(attn_output / normalizer)
        return tessera.cat(output, 2)


@ts.jit
class PipelineParallelGPT(torch.nn.Module):
    def __init__(self, stage_id: int = 0, vocab_size: int = 11, d_model: int = 8) -> None:
        super().__init__()
        self.stage_id = stage_id
        self.token_embedding = torch.nn.Parameter(tessera.randn(vocab_size, d_model))
        self.block = torch.nn.Linear(d_model, d_model)

    @ts.jit
    def forward(
        self,
        x: Union[Tensor["B", "S", "i32"], Tensor["B", "S", "D", "f32"]],  # noqa: UP007
        **kwargs,
    ):
        hidden_states = F.embedding(x, self.token_embedding) if self.stage_id == 0 else x
        return self.block(hidden_states)


@ts.jit
class GPTTrainer:
    def __init__(self, model, vocab_size: int = 11) -> None:
        self.model, self.vocab_size = model, vocab_size

    @ts.jit
    def train_step(self, batch: Dict[str, Tensor], accumulation_step: int = 0) -> Dict[str, float]:  # noqa: UP006
        logits = self.model(batch["input_ids"]) @ self.model.token_embedding.T
        loss = self._compute_loss(logits, batch["labels"])
        loss.backward()
        return {"loss": loss.detach().item(), "accuracy": self._compute_accuracy(logits.detach(), batch["labels"])}

    @ts.jit
    def _compute_loss(self, logits: Tensor["B", "S", "V"], labels: Tensor["B", "S"]) -> Tensor:
        shift_logits = logits[:, :-1, :].contiguous()
        shift_labels = labels[:, 1:].contiguous()
        return F.cross_entropy(shift_logits.view(-1, self.vocab_size), shift_labels.view(-1))

    @ts.jit
    def _compute_accuracy(self, logits: Tensor["B", "S", "V"], labels: Tensor["B", "S"]) -> Tensor:
        predictions = logits[:, :-1, :].argmax(dim=-1)
        mask = labels[:, 1:] != -100
        return ((predictions == labels[:, 1:]) & mask).sum() / mask.sum()
