"""Where each parameter of GPTModel lies in a checkpoint, by family and file layout.

In: a family ("llama", "mistral", "qwen2", "qwen3", "gpt2"), a layout ("hf" or "gguf") and GPTModel's
parameter names. Out: for each parameter the stored tensor and how to get from one to the other.
Called by models.load (reading) and models.save (writing): one table serves both directions.

The rotary convention of GPTModel and of Hugging Face files is half-split: dim i turns with dim
i + d_head/2. GGUF files of architecture "llama" (Mistral too) hold the rows of q and k so that pairs
are neighbours: row order (0, d/2, 1, d/2 + 1, ...) of every head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import UnsupportedFileError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")

_BLOCK_PARTS = {
    ("hf", "llama"): {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        **{f"attn.{p}": f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
        **{f"mlp.{p}": f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
    },
    ("hf", "gpt2"): {
        "attn_norm": "ln_1", "mlp_norm": "ln_2", "attn.o_proj": "attn.c_proj",
        **{f"attn.{p}_proj": "attn.c_attn" for p in "qkv"},
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    },
    ("gguf", "llama"): {
        "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.o_proj": "attn_output",
        "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
        "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    },
    ("gguf", "gpt2"): {
        "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.o_proj": "attn_output",
        **{f"attn.{p}_proj": "attn_qkv" for p in "qkv"},
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    },
}  # fmt: skip
_TOP_PARTS = {
    ("hf", "llama"): {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"},
    ("hf", "gpt2"): {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "final_norm": "transformer.ln_f",
                     "lm_head": "lm_head"},
    ("gguf", "llama"): {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"},
    ("gguf", "gpt2"): {"embed": "token_embd", "pos_embed": "position_embd", "final_norm": "output_norm",
                       "lm_head": "output"},
}  # fmt: skip
_BLOCK_PREFIX = {("hf", "llama"): "model.layers", ("hf", "gpt2"): "transformer.h", ("gguf", "llama"): "blk",
                 ("gguf", "gpt2"): "blk"}  # fmt: skip

# Tensors that files carry and the math does not need: masks and frequencies that are computed anew.
_IGNORED = {
    "hf": re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)"),
    "gguf": re.compile(r"rope_freqs\.weight"),  # read with the configuration (models.gguf)
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The stored form of one parameter.

    Attributes:
        name: tensor in the file.
        part: which third of a fused q/k/v tensor (0, 1, 2); None for a tensor of its own.
        transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
        paired_heads: heads whose rotary rows lie in pairs (GGUF "llama"); 0 for half-split rows.
    """

    name: str
    part: int | None = None
    transposed: bool = False
    paired_heads: int = 0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor for a parameter of `shape` (fused thirds are equally large)."""
        stored = list(shape)
        if self.part is not None:
            stored[0] *= 3
        return tuple(reversed(stored)) if self.transposed else tuple(stored)

    def extract(self, stored: Tensor) -> Tensor:
        """The parameter, from the stored tensor; contiguous."""
        value = stored.T if self.transposed and stored.dim() == 2 else stored
        if self.part is not None:
            value = value.chunk(3)[self.part]
        if self.paired_heads:
            value = half_split_rows(value, self.paired_heads)
        return value.contiguous()


def half_split_rows(weight: Tensor, n_heads: int) -> Tensor:
    """Rows (0, d/2, 1, d/2 + 1, ...) of each head -> (0, 1, ..., d - 1); weight [n_heads * d, ...]."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def paired_rows(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `half_split_rows`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def source_of(parameter: str, layout: str, family: str, n_heads: int, n_kv_heads: int) -> Source:
    """The stored form of GPTModel's `parameter`.

    Raises:
        UnsupportedFileError: the layout has no place for it.
    """
    table = (layout, "gpt2" if family == "gpt2" else "llama")
    path, kind = parameter.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", path)
    part_name = block[2] if block else path
    stored = (_BLOCK_PARTS if block else _TOP_PARTS)[table].get(part_name)
    if stored is None:
        raise UnsupportedFileError(f"parameter {parameter!r} has no place in {layout} files of family {family!r}")
    name = f"{_BLOCK_PREFIX[table]}.{block[1]}.{stored}.{kind}" if block else f"{stored}.{kind}"
    if family == "gpt2":
        projection = part_name.endswith("_proj")
        return Source(
            name=name,
            part="qkv".index(part_name[5]) if stored.endswith(("c_attn", "attn_qkv")) else None,
            transposed=projection and layout == "hf" and kind == "weight",
        )
    paired = layout == "gguf" and family in ("llama", "mistral")
    heads = {"attn.q_proj": n_heads, "attn.k_proj": n_kv_heads}.get(part_name, 0)
    return Source(name=name, paired_heads=heads if paired else 0)


def is_ignored(name: str, layout: str) -> bool:
    """Whether a stored tensor carries nothing that the model needs."""
    return _IGNORED[layout].fullmatch(name) is not None


def merge(parts: list[tuple[Source, Tensor]]) -> Tensor:
    """The stored tensor, from the parameters that it holds (one, or the three of a fused tensor)."""
    values = []
    for source, value in sorted(parts, key=lambda item: item[0].part or 0):
        values.append(paired_rows(value, source.paired_heads) if source.paired_heads else value)
    stored = values[0] if len(values) == 1 else torch.cat(values)
    return (stored.T if parts[0][0].transposed else stored).contiguous()
