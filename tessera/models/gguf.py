"""GGUF files as checkpoints: metadata to and from GPTConfig.

In: an open GGUF file of architecture llama (Mistral too), qwen2, qwen3 or gpt2. Out: GPTConfig and
tensors for models.load; the metadata of a configuration for models.convert.

A metadata key of the architecture that is not known here is an error: it may change the math.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.errors import FileFormatError, UnsupportedFileError
from tessera.formats.blocks import Window
from tessera.formats.gguf import open_gguf
from tessera.models.config import GPTConfig
from tessera.ops.rotary import RopeScaling, rope_frequencies

BLOCK_KINDS = ("Q8_0", "Q4_0", "Q4_1")  # storage types that the kernels read as they are
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0)

# Keys below "{architecture}." that carry no math of their own.
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_ROPE_KEYS = {"factor": "factor", "original_context_length": "original_max_seq_len",
              "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}  # fmt: skip
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


class GGUFCheckpoint:
    """A GGUF file, as models.load reads it."""

    layout = "gguf"
    stored_dtype = "bf16"

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self.shapes = {name: info.shape for name, info in self._file.tensors.items()}
        try:
            factors = self.tensor("rope_freqs.weight", torch.float32) if "rope_freqs.weight" in self.shapes else None
            self.config = config_from_gguf(self._file.metadata, self.shapes, str(path), rope_factors=factors)
        except BaseException:
            self._file.close()
            raise

    def tensor(self, name: str, dtype: torch.dtype, window: Window | None = None) -> Tensor:
        return self._file.tensor(name, dtype, window)

    def blocks(self, name: str) -> tuple[Tensor, str] | None:
        """(stored bytes [rows, bytes of a row], kind) of a tensor that can be used as it is stored; else None."""
        info = self._file.tensors[name]
        if len(info.shape) != 2 or info.type.name not in BLOCK_KINDS:
            return None
        return self._file.blocks(name), info.type.name

    def close(self) -> None:
        self._file.close()


class _Keys:
    """The keys below "{architecture}."; each is taken once, and what is left at the end was not understood."""

    def __init__(self, metadata: dict[str, Any], arch: str, where: str) -> None:
        prefix = arch + "."
        self.left = {key[len(prefix):]: value for key, value in metadata.items() if key.startswith(prefix)}
        self.arch, self.where = arch, where

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.left.pop(key, default)
        if value is ...:
            raise FileFormatError(f"{self.where}: metadata {self.arch}.{key} is missing")
        if value is default:
            return value
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise FileFormatError(
                f"{self.where}: metadata {self.arch}.{key} is {str(value)[:40]!r}; expected one {kind.__name__}")
        return shortest_float(value) if kind is float else value

    def finish(self) -> None:
        unknown = sorted(key for key in self.left if key not in _HARMLESS)
        if unknown:
            few = ", ".join(f"{self.arch}.{key}" for key in unknown[:5])
            raise UnsupportedFileError(f"{self.where}: {len(unknown)} metadata keys not understood: {few}")


def config_from_gguf(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str, *, rope_factors: Tensor | None = None,
) -> GPTConfig:
    """GPTConfig of a GGUF file.

    Args:
        metadata: all of the file's metadata.
        shapes: its tensors; what the metadata does not say (vocabulary, biases, tying) is read off them.
        where: what to call the file in errors.
        rope_factors: [d_head / 2], the tensor rope_freqs.weight of Llama 3 files.

    Raises:
        UnsupportedFileError: an architecture or a key that is not implemented.
        FileFormatError: a key is missing or has a value that cannot be.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedFileError(
            f"{where}: architecture {str(arch)[:40]!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise FileFormatError(f"{where}: tensor token_embd.weight is missing or not a matrix")
    keys = _Keys(metadata, arch, where)
    fields = _gpt2_fields(keys) if arch == "gpt2" else _llama_fields(keys, arch, shapes, rope_factors)
    fields["vocab_size"] = shapes["token_embd.weight"][0]
    fields["tie_embeddings"] = "output.weight" not in shapes
    keys.finish()
    family = "mistral" if arch == "llama" and fields["sliding_window"] is not None else arch
    try:
        return GPTConfig(family=family, **fields, **_token_ids(metadata, fields["vocab_size"], where))
    except (ValueError, NotImplementedError) as error:
        raise FileFormatError(f"{where}: {error}") from error


def shortest_float(value: float) -> float:
    """The number with the fewest digits among those that round to float32 `value`: 1e-05 for 9.99999975e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _common_fields(keys: _Keys) -> dict[str, Any]:
    return {
        "n_layers": keys.take("block_count", int), "n_heads": keys.take("attention.head_count", int),
        "d_model": keys.take("embedding_length", int), "d_ffn": keys.take("feed_forward_length", int),
        "max_seq_len": keys.take("context_length", int),
    }  # fmt: skip


def _llama_fields(
    keys: _Keys, arch: str, shapes: dict[str, tuple[int, ...]], rope_factors: Tensor | None,
) -> dict[str, Any]:
    fields = _common_fields(keys)
    n_heads = fields["n_heads"]
    width = keys.take("attention.key_length", int, None)
    if keys.take("attention.value_length", int, width) != width:
        raise UnsupportedFileError(f"{keys.where}: attention.value_length differs from attention.key_length")
    d_head = width or fields["d_model"] // max(n_heads, 1)
    if keys.take("rope.dimension_count", int, d_head) != d_head:
        raise UnsupportedFileError(f"{keys.where}: {arch}.rope.dimension_count differs from the head's {d_head} dims")
    theta = keys.take("rope.freq_base", float, 10000.0)
    return fields | {
        "head_dim": width, "n_kv_heads": keys.take("attention.head_count_kv", int, n_heads),
        "norm_eps": keys.take("attention.layer_norm_rms_epsilon", float), "rope_theta": theta,
        "rope_scaling": _scaling(keys, d_head, theta, rope_factors),
        "sliding_window": keys.take("attention.sliding_window", int, None) or None,
        "qk_norm": arch == "qwen3", "attn_qkv_bias": "blk.0.attn_q.bias" in shapes,
        "attn_out_bias": "blk.0.attn_output.bias" in shapes, "mlp_bias": "blk.0.ffn_down.bias" in shapes,
    }  # fmt: skip


def _gpt2_fields(keys: _Keys) -> dict[str, Any]:
    fields = _common_fields(keys)
    if keys.take("attention.head_count_kv", int, fields["n_heads"]) != fields["n_heads"]:
        raise UnsupportedFileError(f"{keys.where}: gpt2 with fewer key/value heads than heads")
    return fields | {
        "norm": "layernorm", "norm_eps": keys.take("attention.layer_norm_epsilon", float),
        "activation": "gelu_tanh", "use_gated_mlp": False, "use_rotary_embeddings": False,
        "attn_qkv_bias": True, "attn_out_bias": True, "mlp_bias": True,
    }  # fmt: skip


def _scaling(keys: _Keys, d_head: int, theta: float, rope_factors: Tensor | None) -> RopeScaling | None:
    kind = keys.take("rope.scaling.type", str, "none")
    given = {ours: keys.take(f"rope.scaling.{theirs}", int if "length" in theirs else float, None)
             for theirs, ours in _ROPE_KEYS.items()}
    factor = keys.take("rope.scaling.attn_factor", float, 1.0)
    if rope_factors is not None:
        if kind != "none":
            raise UnsupportedFileError(f"{keys.where}: rope_freqs.weight together with rope scaling {kind!r}")
        return _llama3_scaling(rope_factors, d_head, theta, keys.where)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or factor != 1.0:
        raise UnsupportedFileError(
            f"{keys.where}: rope scaling {kind!r} with attn_factor {factor}; supported: none, linear, yarn with 1.0")
    names = ("factor",) if kind == "linear" else tuple(given)
    try:
        return RopeScaling(kind=kind, **{name: given[name] for name in names if given[name] is not None})
    except ValueError as error:
        raise FileFormatError(f"{keys.where}: {error}") from error


def _llama3_scaling(factors: Tensor, d_head: int, theta: float, where: str) -> RopeScaling:
    """The parameters whose published formula gives `factors`; GGUF keeps the result and not the parameters."""
    if factors.shape == (d_head // 2,) and theta > 0:
        for factor in _LLAMA3_FACTORS:
            scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)
            if torch.allclose(llama3_factors(scaling, d_head, theta), factors, rtol=1e-4):
                return scaling
    raise UnsupportedFileError(f"{where}: rope_freqs.weight is not Llama 3's for factors {_LLAMA3_FACTORS}")


def llama3_factors(scaling: RopeScaling, d_head: int, theta: float) -> Tensor:
    """[d_head / 2] f32: plain rotary frequencies over scaled ones, what GGUF stores as rope_freqs.weight."""
    return rope_frequencies(d_head, theta)[0] / rope_frequencies(d_head, theta, scaling)[0]


def _token_ids(metadata: dict[str, Any], vocab_size: int, where: str) -> dict[str, int]:
    found = {}
    for theirs, ours in _TOKENS.items():
        value = metadata.get(f"tokenizer.ggml.{theirs}")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise FileFormatError(f"{where}: tokenizer.ggml.{theirs} is {value!r}; expected 0..{vocab_size - 1}")
        found[ours] = value
    return found


def config_to_gguf(config: GPTConfig) -> tuple[str, dict[str, Any]]:
    """(architecture, metadata) of `config`; what GGUF cannot say is left out (models.convert reads back and compares).

    Values are int, float or str; floats are written as float32.
    """
    arch = "llama" if config.family == "mistral" else config.family
    keys: dict[str, Any] = {
        "block_count": config.n_layers, "context_length": config.max_seq_len, "embedding_length": config.d_model,
        "feed_forward_length": config.d_ffn, "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if arch == "gpt2":
        keys["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        keys |= {
            "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.d_head, "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim, "attention.sliding_window": config.sliding_window,
        }  # fmt: skip
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind != "llama3":
            keys["rope.scaling.type"] = scaling.kind
            names = _ROPE_KEYS if scaling.kind == "yarn" else {"factor": "factor"}
            keys |= {f"rope.scaling.{theirs}": getattr(scaling, ours) for theirs, ours in names.items()}
    metadata = {f"{arch}.{key}": value for key, value in keys.items() if value is not None}
    for theirs, ours in _TOKENS.items():
        value = getattr(config, ours)
        if value is not None:  # GGUF has room for one id of each kind
            metadata[f"tokenizer.ggml.{theirs}"] = value[0] if isinstance(value, tuple) else value
    return arch, metadata
