"""GPTModel: a decoder-only transformer, as it reads on one device.

In: token ids (with padding mask, positions, cache). Out: logits, and the cache. The loaders fill its
parameters, the engines, trainers and plans call it.

Dims: B batch, S new tokens, T all tokens (cached and new), V vocabulary, M d_model.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera import ops
from tessera.errors import InputError, ShapeError
from tessera.models import gpt_plan
from tessera.models.config import GPTConfig
from tessera.nn import MLP, Attention, Block, Embedding, KVCache, LayerNorm, Linear, RMSNorm, StepCache

_INIT_STD = 0.02


class GPTModel(nn.Module):
    """A decoder-only transformer; parameters are drawn at random until a loader fills them.

    Args:
        config: what to build.
        mesh: the devices to build it for: of modules that gpt_plan cuts, this rank's parts are built. None
            builds it whole. On `torch.device("meta")` nothing is allocated, and a configuration for many
            ranks needs no mesh.

    Raises:
        InputError: the configuration asks for several ranks and no mesh is given, or another mesh.
        UnsupportedError: the model cannot be cut so; the message says why.
    """

    def __init__(self, config: GPTConfig, mesh: Any = None) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        _check_mesh(config, mesh)
        device, is_cut = torch.get_default_device(), mesh is not None and mesh.size() > 1
        with torch.device("meta") if is_cut else contextlib.nullcontext():
            self._build(config)
        if is_cut:
            gpt_plan.shard(self, mesh)
            self.to_empty(device=device)
        if device.type != "meta":
            self.init_weights(gpt_plan.common_seed(mesh) if is_cut else None)

    def _build(self, config: GPTConfig) -> None:
        param, compute = config.param.torch, config.compute.torch
        self.embed = Embedding(config.vocab_size, config.d_model, dtype=param, out_dtype=compute)
        # Rounded to the activations' type, as Gemma's published code does.
        self.embed_scale = torch.tensor(config.embed_scale, dtype=compute, device="cpu").item()
        self.pos_embed = None
        if not config.use_rotary_embeddings:
            self.pos_embed = Embedding(config.max_seq_len, config.d_model, dtype=param, out_dtype=compute)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.n_layers))
        self.final_norm = _norm(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, dtype=param)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw all parameters anew: N(0, 0.02), the projections that feed the residual stream N(0,
        0.02 / sqrt(2 n_layers)) (GPT-2), biases zero, norms one.

        Args:
            seed: of a fresh generator, so that the same seed gives the same weights whatever was drawn
                before; None draws from torch's default generator.
        """
        if self.embed.weight.is_meta:
            return
        device = self.embed.weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        residual_std = _INIT_STD / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                std = residual_std if name.endswith(("o_proj", "down_proj")) else _INIT_STD
                module.set_weight(torch.empty(module.whole_shape, device=device).normal_(0, std, generator=generator))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Embedding):
                table = torch.empty(module.whole_shape, dtype=module.weight.dtype, device=device)
                module.set_weight(table.normal_(0, _INIT_STD, generator=generator))
            elif isinstance(module, (RMSNorm, LayerNorm)):
                module.weight.fill_(1)
                if isinstance(module, LayerNorm):
                    module.bias.zero_()

    def unfreeze(self) -> None:
        """Make 8-bit weights trainable: kept in f32, rounded to weight_dtype in every forward pass."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.unfreeze()

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty KVCache that fits this model."""
        config = self.config
        return KVCache(
            batch_size, config.max_seq_len, config.n_layers, self.blocks[0].attn.n_kv_heads, config.d_head,
            dtype=config.kv_cache_dtype, compression="group_query" if config.use_kv_cache_compression else None)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        kv_cache: KVCache | None = None, use_cache: bool = False, logits_to_keep: int = 0,
    ) -> dict[str, Any]:
        """Logits of the next token at every place.

        Args:
            input_ids: [B, S] integers, the tokens that follow those in kv_cache.
            attention_mask: [B, T] (bool or 0/1), 0 for padding, on either side, over the cached and the new
                places; None: no new place is padded, cached ones are as they were given.
            position_ids: [B, S] or [1, S]; default: each token's number among its row's tokens.
            kv_cache: what came before; the new tokens are added to it.
            use_cache: make a cache when kv_cache is None.
            logits_to_keep: compute the logits of the last this many places only; 0 for all.

        Returns:
            {"logits": [B, S or logits_to_keep, V] in compute_dtype, "kv_cache": KVCache or None}.

        Raises:
            InputError: a token outside the vocabulary, more than max_seq_len tokens, a position out of range.
            ShapeError: arguments that do not fit together.
        """
        if logits_to_keep < 0:
            raise InputError(f"logits_to_keep: {logits_to_keep} given; expected a count, or 0 for all places")
        if use_cache and kv_cache is None:
            _check_ids(input_ids, self.config)
            kv_cache = self.new_cache(input_ids.shape[0])
        x_BSM = self._hidden(input_ids, attention_mask, position_ids, kv_cache)
        if logits_to_keep:
            x_BSM = x_BSM[:, -logits_to_keep:]
        return {"logits": self._logits(self.final_norm(x_BSM)), "kv_cache": kv_cache}

    def loss(
        self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None, *, ignore_index: int = -100,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of each place's target; the logits of all places are not held in memory at once.

        Args:
            input_ids: [B, S] integers.
            targets: [B, S] integers, the token that follows each place, or ignore_index where none counts.
            attention_mask: [B, S], 0 for padding, whose targets must be ignore_index.
            ignore_index: the target of places that do not count.
            z_loss: factor on the mean of log(sum(exp(logits)))^2, which keeps logits small (arXiv:2204.02311).

        Returns:
            A scalar in f32; 0 when no place counts.

        Raises:
            InputError, ShapeError: as for a forward pass; or targets that do not fit.
            UnsupportedError: in the deterministic mode, for gradients of a model that is cut over ranks.
        """
        if targets.shape != input_ids.shape:
            raise ShapeError(f"targets: {tuple(targets.shape)} given; expected {tuple(input_ids.shape)}, a target for "
                             "each token")
        gpt_plan.check_gradients(self)
        x_BSM = self.final_norm(self._hidden(input_ids, attention_mask, None, None))
        head = self.embed if self.lm_head is None else self.lm_head
        is_plain = type(head) in (Embedding, Linear) and not getattr(head, "is_quantized", False)
        options: dict[str, Any] = {"ignore_index": ignore_index, "z_loss": z_loss}
        if is_plain and self.config.logit_softcap is None and not ops.is_invariant():
            return ops.linear_cross_entropy(x_BSM, head.weight, targets, **options)
        return ops.cross_entropy(self._logits(x_BSM), targets, **options)

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, kv_cache: KVCache | None,
    ) -> Tensor:
        """The residual stream after the last block, [B, S, M]."""
        _check_ids(input_ids, self.config)
        if kv_cache is not None:
            _check_cache(kv_cache, input_ids.shape[0], self)
        valid_BT = _valid_places(input_ids, attention_mask, kv_cache, self.config)
        positions_BS = _positions(input_ids, position_ids, valid_BT, kv_cache, self.config)
        n_new = input_ids.shape[1]
        n_total = n_new + (kv_cache.length if kv_cache is not None else 0)
        masks = functools.cache(lambda window: ops.make_mask(
            n_new, n_total, window=window, valid_BT=valid_BT, device=input_ids.device))
        x_BSM = self._embed(input_ids, positions_BS)
        rope = self._rope(positions_BS, n_total)
        with contextlib.nullcontext() if kv_cache is None else kv_cache.appending():
            return self._blocks(x_BSM, masks, rope, kv_cache)

    def _embed(self, input_ids: Tensor, positions_BS: Tensor) -> Tensor:
        x_BSM = self.embed(input_ids)
        if self.embed_scale != 1:
            x_BSM = x_BSM * self.embed_scale
        return x_BSM if self.pos_embed is None else ops.add(x_BSM, self.pos_embed(positions_BS))

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: StepCache) -> Tensor:
        """Logits after one more token a row; of kernels alone, to be recorded (infer.decoding). Checks nothing.

        Args:
            tokens_B: int64 [B], in the vocabulary.
            positions_B: int64 [B], in 0..max_seq_len - 1.
            cache: the cache's storage and the tokens' place in it.

        Returns:
            [B, V] in compute_dtype.

        Raises:
            UnsupportedError: while it is recorded: the model computes something that no kernel does.
        """
        x_BSM = self._embed(tokens_B[:, None], positions_B[:, None])
        x_BSM = self._blocks(x_BSM, cache.mask, self._rope(positions_B[:, None], self.config.max_seq_len), cache)
        return self._logits(self.final_norm(x_BSM))[:, 0]

    def _rope(self, positions_BS: Tensor, n_total: int) -> ops.RopeTables | None:
        config = self.config
        if not config.use_rotary_embeddings:
            return None
        return ops.rope_tables(positions_BS, config.rope_dim, config.rope_theta, config.rope_scaling,
                               seq_len=n_total)

    def _blocks(
        self, x_BSM: Tensor, masks: Callable[[int | None], ops.Mask], rope: ops.RopeTables | None,
        cache: KVCache | StepCache | None,
    ) -> Tensor:
        """`masks` gives the mask of a sliding window, or of None."""
        config = self.config
        recompute = config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            mask = masks(config.window(layer))
            if recompute:
                x_BSM = checkpoint(block, x_BSM, mask, rope, use_reentrant=False)
            else:
                x_BSM = block(x_BSM, mask, rope, cache, layer)
        return x_BSM

    def _logits(self, x_BSM: Tensor) -> Tensor:
        logits = self.embed.project(x_BSM) if self.lm_head is None else self.lm_head(x_BSM)
        cap = self.config.logit_softcap
        return logits if cap is None else ops.softcap(logits, cap)


def _norm(config: GPTConfig) -> RMSNorm | LayerNorm:
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(config.d_model, eps=config.norm_eps, dtype=config.param.torch)


def _block(config: GPTConfig) -> Block:
    storage = {"dtype": config.weight.torch, "bias_dtype": config.param.torch}
    attn = Attention(
        config.d_model, config.n_heads, config.n_kv_heads, config.d_head,
        qkv_bias=config.attn_qkv_bias, out_bias=config.attn_out_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        scale=config.attn_scale or config.d_head**-0.5, softcap=config.attn_softcap,
        use_flash=config.use_flash_attention, **storage)
    mlp = MLP(
        config.d_model, config.d_ffn, is_gated=config.use_gated_mlp, activation=config.activation,
        bias=config.mlp_bias, **storage)
    mlp_norm = None if config.use_parallel_attention else _norm(config)
    return Block(attn, mlp, _norm(config), mlp_norm, post_norm=config.norm_placement == "post")


def _check_mesh(config: GPTConfig, mesh: Any) -> None:
    if mesh is None and config.world_size > 1 and torch.get_default_device().type != "meta":
        raise InputError(
            f"mesh: None given; tp_size={config.tp_size}, pp_size={config.pp_size}, dp_size={config.dp_size} "
            f"need a mesh of {config.world_size} devices (set them to 1 to run on one)")


def _is_readable(x: Tensor) -> bool:
    """Whether values can be looked at: not on meta, nor while a CUDA graph is captured."""
    return not x.is_meta and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_ids(input_ids: Tensor, config: GPTConfig) -> None:
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"input_ids: {tuple(input_ids.shape)} {input_ids.dtype} given; "
                         "expected [batch, tokens], neither empty, int64 or int32")
    if not _is_readable(input_ids):
        return
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= config.vocab_size:
        row, column = ((input_ids < 0) | (input_ids >= config.vocab_size)).nonzero()[0].tolist()
        raise InputError(f"input_ids: token {int(input_ids[row, column])} at row {row}, position {column} given; "
                         f"expected 0..{config.vocab_size - 1} (vocab_size {config.vocab_size})")


def _check_cache(cache: KVCache, batch_size: int, model: GPTModel) -> None:
    config = model.config
    if model.training and torch.is_grad_enabled():
        raise InputError("kv_cache: given in training, but cached keys carry no gradient; "
                         "expected model.eval() or torch.no_grad()")
    expected = (batch_size, config.n_layers, model.blocks[0].attn.n_kv_heads, config.d_head)
    given = (cache.batch_size, cache.n_layers, cache.n_kv_heads, cache.d_head)
    if given != expected:
        raise ShapeError(f"kv_cache: batch, layers, kv_heads, d_head = {given} given; expected {expected}")


def _valid_places(
    input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, config: GPTConfig,
) -> Tensor | None:
    """bool [B, T], False for padding; None when nothing is padded. The cache takes note of it."""
    n_new = input_ids.shape[1]
    n_total = n_new + (cache.length if cache is not None else 0)
    limit = config.max_seq_len if cache is None else min(config.max_seq_len, cache.max_seq_len)
    if n_total > limit:
        raise InputError(f"input_ids: {n_total} tokens given ({n_total - n_new} of them cached); "
                         f"expected at most max_seq_len = {limit}")
    valid_BT = None
    if attention_mask is not None:
        if attention_mask.shape != (input_ids.shape[0], n_total):
            raise ShapeError(f"attention_mask: {tuple(attention_mask.shape)} given; expected "
                             f"{(input_ids.shape[0], n_total)} (batch, cached and new places)")
        valid_BT = attention_mask != 0  # a copy: the cache keeps it, the caller may change theirs
        if _is_readable(valid_BT) and bool(valid_BT.all()):
            valid_BT = None
            if cache is not None:
                cache.valid = None
    return valid_BT if cache is None else cache.mark_valid(n_new, valid_BT)


def _positions(
    input_ids: Tensor, position_ids: Tensor | None, valid_BT: Tensor | None, cache: KVCache | None, config: GPTConfig,
) -> Tensor:
    """[B, S] or [1, S]: as given, else each token's number among its row's tokens (0 for padding before it)."""
    batch_size, n_new = input_ids.shape
    if position_ids is None:
        if valid_BT is not None:
            return (valid_BT.long().cumsum(-1)[:, -n_new:] - 1).clamp_(min=0)
        start = cache.length if cache is not None else 0
        return torch.arange(start, start + n_new, device=input_ids.device)[None]
    if position_ids.shape not in ((batch_size, n_new), (1, n_new)):
        raise ShapeError(f"position_ids: {tuple(position_ids.shape)} given; expected {(batch_size, n_new)}")
    if _is_readable(position_ids):
        low, high = (int(bound) for bound in torch.aminmax(position_ids))
        if low < 0 or high >= config.max_seq_len:
            raise InputError(f"position_ids: {low if low < 0 else high} given; "
                             f"expected 0..{config.max_seq_len - 1} (max_seq_len - 1)")
    return position_ids
