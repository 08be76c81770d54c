"""config.json of Hugging Face folders, to and from GPTConfig.

In: the parsed config.json of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, in the layout of
transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`). Out: GPTConfig; and back.
Called by models.load and models.save.

A field that changes the math and is not implemented is an error, never ignored.
"""

from __future__ import annotations

from typing import Any

from tessera.errors import FileFormatError, UnsupportedFileError
from tessera.models.config import MOST_LAYERS, GPTConfig
from tessera.models.names import FAMILIES
from tessera.ops.rotary import RopeScaling

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                  "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}  # fmt: skip

# RopeScaling's fields under the names of config.json, by kind.
_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {name: name for name in
             ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")},
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"

# Fields whose other values change the math in ways that GPTModel does not implement.
_ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False), "partial_rotary_factor": (None, 1.0), "is_encoder_decoder": (None, False),
}  # fmt: skip


class _Fields:
    """Typed access to the fields of a JSON object, with errors that name file and field."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def fail(self, name: str, expected: str) -> FileFormatError:
        return FileFormatError(f"{self.where}: {name} is {str(self.fields.get(name))[:80]!r}; expected {expected}")

    def unsupported(self, name: str, supported: str) -> UnsupportedFileError:
        value = str(self.fields.get(name))[:80]
        return UnsupportedFileError(f"{self.where}: {name} {value!r} is not supported; supported: {supported}")

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(name, f"an integer from 1 to {most}")
        return value

    def optional(self, name: str, default: int | None = None) -> int | None:
        return None if self.fields.get(name, default) is None else self.integer(name, default)

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) not in (int, float):
            raise self.fail(name, "a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fail(name, "true or false")
        return value


def config_from_hf(fields: dict[str, Any], where: str = "config.json", **execution: Any) -> GPTConfig:
    """GPTConfig of a parsed config.json.

    Args:
        fields: the JSON object.
        where: what to call it in errors.
        execution: further GPTConfig fields, e.g. compute_dtype.

    Returns:
        The configuration. Token ids outside the vocabulary (-1 for "none" in old files) are dropped.

    Raises:
        UnsupportedFileError: another architecture, or a field that changes the math in an unknown way.
        FileFormatError: a field is missing or has a value that cannot be.
    """
    read = _Fields(fields, where)
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise read.unsupported("model_type", ", ".join(FAMILIES))
    for name, allowed in _ONLY.items():
        if fields.get(name) not in allowed:
            raise read.unsupported(name, " or ".join(str(v) for v in allowed))
    common = _gpt2_fields(read) if family == "gpt2" else _llama_fields(read, family)
    common |= {"family": family, "vocab_size": read.integer("vocab_size"), **_token_ids(read), **execution}
    try:
        return GPTConfig(**common)
    except UnsupportedFileError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise FileFormatError(f"{where}: {error}") from error


def _llama_fields(read: _Fields, family: str) -> dict[str, Any]:
    n_layers, n_heads = read.integer("num_hidden_layers", most=MOST_LAYERS), read.integer("num_attention_heads")
    # transformers' Qwen3 class has a default of its own here; the other families derive it.
    head_dim = read.optional("head_dim", 128 if family == "qwen3" else None)
    attention_bias = family in ("llama", "qwen3") and read.boolean("attention_bias", False)
    return {
        "n_layers": n_layers, "n_heads": n_heads, "head_dim": head_dim,
        "n_kv_heads": read.integer("num_key_value_heads", n_heads if family == "llama" else None),
        "d_model": read.integer("hidden_size"), "d_ffn": read.integer("intermediate_size"),
        "max_seq_len": read.integer("max_position_embeddings"),
        "activation": _activation(read, "hidden_act", "silu"), "norm_eps": read.number("rms_norm_eps", 1e-6),
        "qk_norm": family == "qwen3", "attn_qkv_bias": family == "qwen2" or attention_bias,
        "attn_out_bias": attention_bias, "mlp_bias": family == "llama" and read.boolean("mlp_bias", False),
        "tie_embeddings": read.boolean("tie_word_embeddings", False),
        **_windows(read, family, n_layers), **_rope(read),
    }  # fmt: skip


def _gpt2_fields(read: _Fields) -> dict[str, Any]:
    d_model, n_heads = read.integer("n_embd"), read.integer("n_head")
    scaled = read.boolean("scale_attn_weights", True)
    return {
        "n_layers": read.integer("n_layer", most=MOST_LAYERS), "n_heads": n_heads, "d_model": d_model,
        "d_ffn": read.integer("n_inner", 4 * d_model), "max_seq_len": read.integer("n_positions"),
        "activation": _activation(read, "activation_function", "gelu_new"), "use_gated_mlp": False,
        "norm": "layernorm", "norm_eps": read.number("layer_norm_epsilon", 1e-5), "use_rotary_embeddings": False,
        "attn_qkv_bias": True, "attn_out_bias": True, "mlp_bias": True, "attn_scale": None if scaled else 1.0,
        "tie_embeddings": read.boolean("tie_word_embeddings", True),
    }  # fmt: skip


def _activation(read: _Fields, name: str, default: str) -> str:
    value = read.fields.get(name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise read.unsupported(name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[value]


def _windows(read: _Fields, family: str, n_layers: int) -> dict[str, Any]:
    """sliding_window and its layers, from layer_types or the families' own fields."""
    window = read.optional("sliding_window", 4096 if family == "mistral" else None) if family != "llama" else None
    if family in ("qwen2", "qwen3") and not read.boolean("use_sliding_window", False):
        window = None
    kinds = read.fields.get("layer_types")
    if kinds is not None:
        names = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in names for kind in kinds):
            raise read.unsupported("layer_types", f"{n_layers} of {' or '.join(names)}")
        layers = tuple(i for i, kind in enumerate(kinds) if kind == names[1])
        if family in ("llama", "mistral") and layers != (() if window is None else tuple(range(n_layers))):
            raise read.unsupported("layer_types", f"the same kind in every layer for family {family}")
    elif family in ("qwen2", "qwen3") and window is not None:
        layers = tuple(range(read.integer("max_window_layers", 28), n_layers))
    else:
        layers = tuple(range(n_layers))
    if window is None and kinds is not None and layers:
        raise read.fail("sliding_window", "a width, since layer_types asks for sliding_attention")
    if window is None or not layers:
        return {}
    return {"sliding_window": window, "sliding_window_layers": None if len(layers) == n_layers else layers}


def _rope(read: _Fields) -> dict[str, Any]:
    """rope_theta and rope_scaling from either layout of config.json."""
    given = read.fields.get("rope_parameters")
    name = "rope_scaling" if given is None else "rope_parameters"
    scaling = read.fields.get(name) or {}
    if not isinstance(scaling, dict):
        raise read.fail(name, "an object")
    rope = _Fields(dict(scaling), f"{read.where}: {name}")
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" and (not isinstance(kind, str) or kind not in _ROPE_FIELDS):
        supported = ", ".join(["default", *_ROPE_FIELDS])
        raise UnsupportedFileError(f"{rope.where}: rope_type {str(kind)[:40]!r} given; supported: {supported}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, *_ROPE_FIELDS.get(kind, {})}
    unknown = sorted(str(key) for key in scaling if key not in known)
    if unknown:
        raise UnsupportedFileError(f"{rope.where}: unknown {', '.join(unknown[:5])} for rope_type {kind!r}")
    if scaling.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.unsupported("partial_rotary_factor", "1.0")
    if kind == "default":
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": _scaling(read, rope, kind)}


def _scaling(read: _Fields, rope: _Fields, kind: str) -> RopeScaling:
    fields: dict[str, Any] = {
        ours: rope.fields[theirs] for theirs, ours in _ROPE_FIELDS[kind].items() if rope.fields.get(theirs) is not None}
    if kind == "dynamic":  # transformers counts from max_position_embeddings, whatever else the file says
        fields["original_max_seq_len"] = read.integer("max_position_embeddings")
    elif kind != "linear":
        fallback = read.integer(_ORIGINAL, read.integer("max_position_embeddings"))
        fields["original_max_seq_len"] = rope.integer(_ORIGINAL, fallback)
    if "factor" not in fields:
        raise rope.fail("factor", "a number")
    try:
        return RopeScaling(kind=kind, **fields)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{rope.where}: {error}") from error


def _token_ids(read: _Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    vocab_size = read.integer("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = read.fields.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(v) is not int for v in values) or (isinstance(value, list) and name != "eos_token_id"):
            raise read.fail(name, "a token id")
        kept = tuple(v for v in values if 0 <= v < vocab_size)
        found[name] = None if not kept else kept[0] if len(kept) == 1 else kept
    return found


def config_to_hf(config: GPTConfig, family: str) -> dict[str, Any]:
    """The config.json of `config` as a model of `family`; what the family cannot say is left out (and so
    shows when the result is read back with `config_from_hf`).

    Args:
        config: what to describe.
        family: one of FAMILIES.
    """
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {
        "architectures": [_ARCHITECTURES[family]], "model_type": family, "dtype": str(config.param.torch)[6:],
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings, "use_cache": True,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in ids.items()},
    }  # fmt: skip
    if family == "gpt2":
        return fields | {
            "n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.d_model, "n_inner": config.d_ffn,
            "n_positions": config.max_seq_len, "activation_function": _ACTIVATION_NAMES[config.activation],
            "layer_norm_epsilon": config.norm_eps, "scale_attn_weights": config.attn_scale is None,
        }  # fmt: skip
    fields |= {
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn, "max_position_embeddings": config.max_seq_len,
        "hidden_act": _ACTIVATION_NAMES[config.activation], "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_to_hf(config),
    }  # fmt: skip
    if config.head_dim is not None or family == "qwen3":  # whose class has a default of its own
        fields["head_dim"] = config.d_head
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = config.attn_qkv_bias
    if family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        sliding = [config.window(i) is not None for i in range(config.n_layers)]
        fields["use_sliding_window"] = any(sliding)
        fields["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    return fields


def _rope_to_hf(config: GPTConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    fields = {theirs: getattr(scaling, ours) for theirs, ours in _ROPE_FIELDS[scaling.kind].items()}
    if scaling.kind in ("llama3", "yarn"):
        fields[_ORIGINAL] = scaling.original_max_seq_len
    fields = {name: value for name, value in fields.items() if value is not None}
    return {"rope_type": scaling.kind, "rope_theta": config.rope_theta, **fields}
