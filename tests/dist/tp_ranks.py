"""What the ranks of test_tensor_parallel run."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tessera as ts
from tessera.models import gpt_plan

LLAMA = {"n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "d_model": 48, "d_ffn": 90, "head_dim": 8, "max_seq_len": 64,
         "vocab_size": 97}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 7},
    "tinyllama": {**LLAMA, "n_heads": 16, "n_kv_heads": 2, "head_dim": 4},
    "smollm2": {**LLAMA, "n_heads": 9, "n_kv_heads": 3, "tie_embeddings": True},
    "gpt2": {**LLAMA, "n_heads": 6, "n_kv_heads": 6, "norm": "layernorm", "activation": "gelu_tanh",
             "use_gated_mlp": False, "use_rotary_embeddings": False, "attn_qkv_bias": True, "attn_out_bias": True,
             "mlp_bias": True, "tie_embeddings": True},
    "qwen3": {**LLAMA, "qk_norm": True, "attn_qkv_bias": True},
}


def config(shape: str, **fields: Any) -> ts.GPTConfig:
    return ts.GPTConfig(**{**SHAPES[shape], **fields})


def state(config: ts.GPTConfig, seed: int) -> dict[str, Tensor]:
    """Random weights of a whole model, biases and norms too, of a size that gives logits around 1."""
    with torch.device("meta"):
        model = ts.GPTModel(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model.state_dict().items():
        scale = 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
        weights[name] = torch.randn(p.shape, generator=generator) * scale + (1 if "norm.weight" in name else 0)
    return weights


def ids(seed: int, rows: int, places: int, vocab_size: int = 97) -> Tensor:
    return torch.randint(0, vocab_size, (rows, places), generator=torch.Generator().manual_seed(seed))


def build(shape: str, seed: int, mesh: Any = None, **fields: Any) -> ts.GPTModel:
    model = ts.GPTModel(config(shape, **fields), mesh).eval()
    model.load_state_dict(state(model.config, seed))
    return model


def outputs(model: ts.GPTModel, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of a prompt, of a prompt fed in pieces through the cache, and with padding."""
    with torch.no_grad():
        whole = model(tokens)["logits"]
        cache, pieces = None, []
        for piece in tokens.split([5, 1, tokens.shape[1] - 6], 1):
            out = model(piece, kv_cache=cache, use_cache=True)
            cache = out["kv_cache"]
            pieces.append(out["logits"])
        alone = model(tokens[1:])["logits"]
        padded = torch.cat((torch.zeros_like(tokens[:, :3]), tokens), 1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        shifted = model(padded, attention_mask=mask)["logits"][:, 3:]
    return {"whole": whole, "pieces": torch.cat(pieces, 1), "alone": alone, "padded": shifted}


def gradients(model: ts.GPTModel, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss, by parameter."""
    logits = model.train()(tokens)["logits"]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def forward(shapes: list[str], seed: int, is_deterministic: bool) -> dict[str, Any]:
    """Logits, gradients, generated text, bytes and cuts of each shape, on all ranks."""
    ts.init(timeout=60)
    mesh = ts.dist.mesh()
    mode = ts.dist.deterministic(reduce_tree="fixed") if is_deterministic else contextlib.nullcontext()
    found: dict[str, Any] = {}
    with mode:
        for shape in shapes:
            model = build(shape, seed, mesh)
            tokens = ids(seed, 3, 12)
            out: dict[str, Any] = outputs(model, tokens)
            engine = ts.GPTInference(model, mesh=mesh)
            out["greedy"] = engine.generate(tokens, 5, do_sample=False)
            out["sampled"] = engine.generate(tokens, 5, seed=seed)
            out["unseeded"] = engine.generate(tokens, 5)
            out["refusal"], out["is_recorded"] = engine._decoder.refusal, engine._decoder._step is not None
            out["cache"] = model.new_cache(1).n_kv_heads
            out["nbytes"] = sum(p.nbytes for p in model.parameters())
            gpt_plan.share_gradients(model, mesh)
            out["cuts"] = gpt_plan.cuts(model)
            if is_deterministic:
                with pytest.raises(ts.errors.UnsupportedError, match=f"model cut over {mesh.size()} tensor-parallel"):
                    gradients(model, tokens)
                assert all(p.grad is None for p in model.parameters())
                with pytest.raises(ts.errors.UnsupportedError, match=f"model cut over {mesh.size()} tensor-parallel"):
                    model.loss(tokens, tokens)  # at once
                with torch.no_grad():
                    out["loss"] = model.loss(tokens, tokens)
            else:
                out["gradients"] = gradients(model, tokens)
            found[shape] = out
    return found


def vocab_loss(seed: int) -> dict[str, Tensor]:
    """Cross-entropy from parts of the logits, and its gradient."""
    ts.init(timeout=60)
    mesh = ts.dist.mesh()
    own = gpt_plan.share(config("llama"), mesh.size(), mesh.rank).vocab
    logits = (5 * torch.randn(2, 7, 97, generator=torch.Generator().manual_seed(seed)))[..., own.start: own.stop]
    logits = logits.clone().requires_grad_()
    loss = gpt_plan.vocab_parallel_cross_entropy(logits, ids(seed, 2, 7), own, mesh)
    loss.mean().backward()
    return {"loss": loss.detach(), "grad": logits.grad}


def sample_loss(model: ts.GPTModel, tokens: Tensor, n_samples: int) -> Tensor:
    logits = model(tokens[None])["logits"][0]
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]) / n_samples


def tree_gradients(seed: int, n_samples: int, is_scattered: bool = False) -> dict[str, Tensor]:
    """Gradients of samples spread over all ranks, as runs or dealt out one by one."""
    ts.init(timeout=60)
    mesh = ts.dist.Mesh(axes=["dp"])
    model = build("llama", seed).train()
    tokens = ids(seed, n_samples, 12)
    n = mesh.size()
    runs = [i for i in range(n_samples) if i * n // n_samples == mesh.rank]
    own = range(mesh.rank, n_samples, n) if is_scattered else runs
    tree = ts.dist.GradientTree(model.parameters(), n_samples)
    with ts.dist.deterministic():
        for i in own:
            sample_loss(model, tokens[i], n_samples).backward()
            tree.add(i)
    tree.finish(mesh)
    return {name: p.grad for name, p in model.named_parameters()}
