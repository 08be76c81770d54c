"""The functions of the documents, as they stand there; torch's names for the tensor functions that they call."""

from __future__ import annotations

import math
from typing import Dict, Optional, Tuple, Union  # noqa: UP035

import torch
import torch as tessera
import torch.nn.functional as F

import tessera as ts
from tessera import DType, Tensor, f32


@ts.function
def swiglu(
    x: Tensor["B", "S", "D"],
    W_gate: Tensor["D", "D_ff"],
    W_up: Tensor["D", "D_ff"],
    W_down: Tensor["D_ff", "D"],
    beta: float = 1.0,
) -> Tensor["B", "S", "D"]:
    gate = x @ W_gate
    gate = gate * tessera.sigmoid(beta * gate)
    up = x @ W_up
    hidden = gate * up
    return hidden @ W_down


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
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal and mask is None, scale=scale)


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
) -> Tensor["B", "S", "H", "D"]:
    current_max = position_ids.max().item()
    if current_max <= max_position:
        return rotary_embedding(x, position_ids, base)
    return rotary_embedding(x, position_ids, base, current_max / max_position)


@ts.function
def cos_sin_embedding(
    seq_len: int,
    dim: int,
    base: float = 10000.0,
    dtype: DType = f32,
) -> Tuple[Tensor["seq_len", "dim"], Tensor["seq_len", "dim"]]:  # noqa: UP006
    position = tessera.arange(seq_len, dtype=dtype.torch).unsqueeze(1)
    div_term = tessera.exp(tessera.arange(0, dim, 2, dtype=dtype.torch) * -(math.log(base) / dim))
    cos_emb = tessera.zeros(seq_len, dim, dtype=dtype.torch)
    sin_emb = tessera.zeros(seq_len, dim, dtype=dtype.torch)
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
    positions = tessera.arange(seq_len, dtype=dtype.torch)
    distances = positions.unsqueeze(0) - positions.unsqueeze(1)
    slopes = 2 ** (-8 * tessera.arange(1, num_heads + 1) / num_heads)
    return distances.unsqueeze(0) * slopes.view(-1, 1, 1)


@ts.function
def stable_max_margin_loss(
    scores: Tensor["B", "N"],
    targets: Tensor["B"],
    margin: float = 1.0,
) -> Tensor:
    pos_scores = tessera.gather(scores, 1, targets.unsqueeze(1))
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
                scores_max = tessera.maximum(running, scores.max(dim=-1, keepdim=True).values)
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
