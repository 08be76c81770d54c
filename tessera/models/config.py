"""GPTConfig: everything that decides a decoder-only transformer's shape, math and storage.

In: fields as a user, a checkpoint loader or JSON gives them. Out: a frozen, checked description that
GPTModel, the loaders, the placement plans and the engines read. No field is ignored: each changes what
the model does, or is refused here with one line that says why.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tessera.errors import InputError, UnsupportedError
from tessera.ops.activations import ACTIVATIONS
from tessera.ops.rotary import RopeScaling
from tessera.types import DType, dtype_of, parse_precision

_COMPUTE_DTYPES = ("f32", "bf16", "f16")
_WEIGHT_DTYPES = ("f32", "bf16", "f16", "fp8_e4m3", "fp8_e5m2", "int8")
_CACHE_DTYPES = ("f32", "bf16", "f16", "fp8_e4m3", "fp8_e5m2")

# Configurations come from files too: bounds that no real model nears keep a damaged one from building for ever.
MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Configuration of a GPTModel; the defaults describe a Llama-like model in f32.

    Shape:
        n_layers, n_heads, d_model, d_ffn, vocab_size: counts and widths.
        max_seq_len: longest sequence in tokens, cached ones included.
        n_kv_heads: key/value heads, shared by groups of query heads; default n_heads.
        head_dim: width of a head; default d_model / n_heads (read it as `d_head`).
    Block:
        use_parallel_attention: x + attn(norm(x)) + mlp(norm(x)) with one norm (GPT-J, PaLM).
        use_gated_mlp: down(act(gate(x)) * up(x)); otherwise down(act(up(x))).
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        norm, norm_eps: "rmsnorm" or "layernorm" (which has biases), and its epsilon.
        norm_placement: "pre": x + f(norm(x)); "post": x + norm(f(x)) (OLMo 2).
        qk_norm: RMSNorm of every query and key head before rotation (Qwen3).
        attn_qkv_bias, attn_out_bias, mlp_bias: which linears have biases.
        attn_scale: factor on the scores; default 1/sqrt(d_head).
        attn_softcap, logit_softcap: scores or logits become cap * tanh(x / cap) (Gemma 2); None for neither.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None for all.
        sliding_window_layers: the layers with a window; None for every layer.
        embed_scale: factor on the token embeddings.
        tie_embeddings: the output projection is the embedding matrix.
    Positions:
        use_rotary_embeddings: rotary; otherwise a learned table of max_seq_len positions (GPT-2).
        rope_theta, rope_scaling: base and context stretching.
        rope_fraction: share of each head's dims that rotate.
    Execution:
        use_flash_attention: attention in blocks that never hold all scores; otherwise scores, softmax and
            product one after the other (same numbers up to rounding; attn_softcap always takes this way).
        gradient_checkpointing: in training, keep only the blocks' inputs and recompute the rest.
        tp_size, pp_size, dp_size: tensor, pipeline and data parallel ranks; above 1 GPTModel needs a mesh.
    Types, as "dtype" or "dtype @accum(fp32)":
        weight_dtype: storage of the blocks' linear weights; the 8-bit types carry one f32 scale a row, and
            leave embeddings, norms, biases and the output projection in compute_dtype.
        compute_dtype: activations, and what 8-bit weights are expanded to.
        kv_cache_dtype: storage of cached keys and values; default compute_dtype.
        use_kv_cache_compression: cache keys and values per key/value head, n_heads / n_kv_heads times
            smaller than per query head; needs n_kv_heads < n_heads.
    Tokens and origin:
        bos_token_id, eos_token_id, pad_token_id: for tokenizers and engines; eos may be several ids.
        family: the architecture that the weights came from ("llama", "qwen3", ...); savers read it.

    Raises:
        InputError: a field's value cannot be used, or two fields contradict each other.
        UnsupportedError: a type that makes sense but is not implemented.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_ffn: int
    max_seq_len: int
    vocab_size: int
    n_kv_heads: int = None  # type: ignore[assignment]  # resolved to n_heads
    head_dim: int | None = None

    use_parallel_attention: bool = False
    use_gated_mlp: bool = True
    activation: str = "silu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    qk_norm: bool = False
    attn_qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_window_layers: tuple[int, ...] | None = None
    embed_scale: float = 1.0
    tie_embeddings: bool = False

    use_rotary_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0

    use_flash_attention: bool = True
    gradient_checkpointing: bool = False
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1

    weight_dtype: str = "f32 @accum(fp32)"
    compute_dtype: str = "f32 @accum(fp32)"
    kv_cache_dtype: str = None  # type: ignore[assignment]  # resolved to compute_dtype's storage
    use_kv_cache_compression: bool = False

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    family: str = "gpt"

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("sliding_window_layers", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_kinds(self)
        _check_shape(self)
        _check_positions(self)
        _check_dtypes(self)
        if self.kv_cache_dtype is None:
            object.__setattr__(self, "kv_cache_dtype", self.compute.name)
        _check_tokens(self)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def weight(self) -> DType:
        """Storage type of the blocks' linear weights."""
        return parse_precision(self.weight_dtype).storage

    @property
    def compute(self) -> DType:
        """Type of activations."""
        return parse_precision(self.compute_dtype).storage

    @property
    def param(self) -> DType:
        """Storage type of embeddings, norms, biases and the output projection."""
        return self.weight if self.weight.bits > 8 else self.compute

    @property
    def rope_dim(self) -> int:
        """Dims of each head that rotate; 0 without rotary embeddings."""
        return int(self.d_head * self.rope_fraction) if self.use_rotary_embeddings else 0

    @property
    def world_size(self) -> int:
        """Ranks that the configuration asks for."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def n_params(self) -> int:
        """Exact number of parameters; tied embeddings count once, 8-bit weights' scales do not count."""
        norm_size = self.d_model * (2 if self.norm == "layernorm" else 1)
        n_norms = self.n_layers * (1 if self.use_parallel_attention else 2) + 1
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        tables += 0 if self.use_rotary_embeddings else self.max_seq_len
        blocks = self.n_layers * (self._attn_params + self._mlp_params)
        return blocks + n_norms * norm_size + tables * self.d_model

    @property
    def _attn_params(self) -> int:
        q_width, kv_width = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        weights = 2 * self.d_model * (q_width + kv_width) + (2 * self.d_head if self.qk_norm else 0)
        biases = q_width + 2 * kv_width if self.attn_qkv_bias else 0
        return weights + biases + (self.d_model if self.attn_out_bias else 0)

    @property
    def _mlp_params(self) -> int:
        n_in = 2 if self.use_gated_mlp else 1
        biases = n_in * self.d_ffn + self.d_model if self.mlp_bias else 0
        return (n_in + 1) * self.d_model * self.d_ffn + biases

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, None when it sees everything."""
        windowed = self.sliding_window_layers is None or layer in self.sliding_window_layers
        return self.sliding_window if windowed else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPTConfig:
        """A configuration from `to_dict`'s values.

        Raises:
            InputError: an unknown or missing key, or a value that the constructor refuses.
        """
        if not isinstance(fields, dict):
            raise InputError(f"GPTConfig: {type(fields).__name__} given; expected a dict of fields")
        fields = dict(fields)
        _check_keys(cls, fields, "GPTConfig")
        scaling = fields.get("rope_scaling")
        if isinstance(scaling, dict):
            _check_keys(RopeScaling, scaling, "rope_scaling")
            fields["rope_scaling"] = RopeScaling(**scaling)
        return cls(**fields)


def _check_keys(cls: type, given: dict[str, Any], what: str) -> None:
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(str(key) for key in given if key not in known):
        raise InputError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    needed = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in given]:
        raise InputError(f"{what}: {', '.join(missing)} missing; needed are {', '.join(needed)}")


def _check_kinds(config: GPTConfig) -> None:
    """Every field has the kind of value that its annotation says."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None:
            ok = "None" in kind or field.default is None
        elif kind.startswith("bool"):
            ok = isinstance(value, bool)
        elif kind.startswith("int"):
            ok = _is_int(value) or ("tuple" in kind and _is_ints(value))
        elif kind.startswith("tuple"):
            ok = _is_ints(value)
        elif kind.startswith("float"):
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        elif kind.startswith("str"):
            ok = isinstance(value, str)
        else:
            ok = isinstance(value, RopeScaling)
        if not ok:
            raise InputError(f"{field.name}: {value!r} given; expected {kind}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_int(item) for item in value)


def _check_shape(config: GPTConfig) -> None:
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_ffn", "max_seq_len", "vocab_size",
                 "head_dim", "sliding_window", "tp_size", "pp_size", "dp_size"):
        value = getattr(config, name)
        most = MOST_LAYERS if name == "n_layers" else _LARGEST_SIZE
        if value is not None and not 1 <= value <= most:
            raise InputError(f"{name}: {value} given; expected 1..{most}")
    for name in ("norm_eps", "attn_scale", "attn_softcap", "logit_softcap"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InputError(f"{name}: {value} given; expected a number above 0")
    if config.n_heads % config.n_kv_heads:
        raise InputError(
            f"n_kv_heads: {config.n_kv_heads} given; expected a divisor of n_heads = {config.n_heads}")
    if config.head_dim is None and config.d_model % config.n_heads:
        raise InputError(
            f"d_model: {config.d_model} given; expected a multiple of n_heads = {config.n_heads}, or head_dim")
    _check_choice("norm", config.norm, ("rmsnorm", "layernorm"))
    _check_choice("norm_placement", config.norm_placement, ("pre", "post"))
    _check_choice("activation", config.activation, tuple(ACTIVATIONS))
    if config.use_parallel_attention and config.norm_placement == "post":
        raise InputError("norm_placement: 'post' given with use_parallel_attention, which has one norm "
                         "before both branches; expected 'pre'")
    if config.use_kv_cache_compression and config.n_kv_heads == config.n_heads:
        raise InputError("use_kv_cache_compression: True given, which keeps one key/value head for a group of "
                         f"query heads; expected n_kv_heads < n_heads = {config.n_heads}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: {value!r} given; expected one of {', '.join(allowed)}")


def _check_positions(config: GPTConfig) -> None:
    if config.sliding_window_layers is not None:
        if config.sliding_window is None:
            raise InputError("sliding_window_layers: given without sliding_window; expected both")
        for layer in config.sliding_window_layers:
            if not 0 <= layer < config.n_layers:
                raise InputError(
                    f"sliding_window_layers: {layer} given; expected layers 0..{config.n_layers - 1}")
    if not 0 < config.rope_fraction <= 1:
        raise InputError(f"rope_fraction: {config.rope_fraction} given; expected a number in (0, 1]")
    if config.rope_theta <= 1:
        raise InputError(f"rope_theta: {config.rope_theta} given; expected a number above 1")
    if not config.use_rotary_embeddings:
        defaults = {"rope_scaling": None, "rope_fraction": 1.0, "rope_theta": 10000.0}
        for name, default in defaults.items():
            if getattr(config, name) != default:
                raise InputError(f"{name}: given with use_rotary_embeddings=False, where it has no meaning")
    elif config.rope_dim % 2 or config.rope_dim < 2:
        raise InputError(f"rope_fraction: {config.rope_fraction} of d_head = {config.d_head} is "
                         f"{config.rope_dim} dims; expected an even number of at least 2")
    elif config.rope_dim == 2 and config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        raise InputError("rope_scaling.kind: 'dynamic' given with 2 rotated dims; expected at least 4")


def _check_dtypes(config: GPTConfig) -> None:
    for name, allowed in (("weight_dtype", _WEIGHT_DTYPES), ("compute_dtype", _COMPUTE_DTYPES)):
        precision = parse_precision(getattr(config, name))
        if precision.storage.name not in allowed:
            raise UnsupportedError(f"{name}: {precision.storage.name} given; supported: {', '.join(allowed)}")
        if precision.accumulate.name != "f32":
            raise UnsupportedError(f"{name}: sums in {precision.accumulate.name} given; supported: f32")
    if config.kv_cache_dtype is not None and dtype_of(config.kv_cache_dtype).name not in _CACHE_DTYPES:
        raise UnsupportedError(
            f"kv_cache_dtype: {config.kv_cache_dtype} given; supported: {', '.join(_CACHE_DTYPES)}")


def _check_tokens(config: GPTConfig) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, tuple) else () if value is None else (value,):
            if not 0 <= token < config.vocab_size:
                raise InputError(f"{name}: {token} given; expected 0..vocab_size - 1 = {config.vocab_size - 1}")
    if not config.family:
        raise InputError("family: '' given; expected the name of an architecture, e.g. 'llama'")
