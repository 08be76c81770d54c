"""GPTModel: variants without a transformers twin, training, 8-bit weights, arguments it refuses."""

import importlib

import pytest
import torch

import tessera as ts
from tessera import ops
from tessera.errors import InputError, ShapeError
from tessera.ops.attention_scores import plain_attention

from .test_config import config


def model_of(seed=0, **fields):
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = ts.GPTModel(config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(seed, *shape):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def reference_block(block, x, *, parallel=False, post=False):
    """A block in float64 from its parameters, one head at a time (plain softmax, no rotation)."""
    weights = {name: p.detach().double() for name, p in block.named_parameters()}

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]

    def attn(x):
        q, k, v = (x @ weights[f"attn.{n}_proj.weight"].T for n in "qkv")
        S, D = x.shape[0], 8
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        heads = []
        for h in range(4):
            shared = slice(h // 2 * D, h // 2 * D + D)
            scores = (q[:, h * D:h * D + D] @ k[:, shared].T / D**0.5).masked_fill(hidden, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, shared])
        return torch.cat(heads, -1) @ weights["attn.o_proj.weight"].T

    def mlp(x):
        gate, up = (x @ weights[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T

    if parallel:
        return x + attn(norm(x, "attn_norm")) + mlp(norm(x, "attn_norm"))
    if post:
        x = x + norm(attn(x), "attn_norm")
        return x + norm(mlp(x), "mlp_norm")
    x = x + attn(norm(x, "attn_norm"))
    return x + mlp(norm(x, "mlp_norm"))


@pytest.mark.parametrize("fields, form", [
    ({}, {}), ({"use_parallel_attention": True}, {"parallel": True}), ({"norm_placement": "post"}, {"post": True}),
])
def test_block_against_float64(fields, form):
    block = model_of(1, **fields).blocks[0]
    x = torch.randn(1, 13, 32)
    actual = block(x, ops.make_mask(13, 13))[0]
    torch.testing.assert_close(actual.double(), reference_block(block, x[0].double(), **form), rtol=1e-5, atol=1e-5)


def test_flash_is_a_path(monkeypatch):
    """use_flash_attention chooses between the blocked kernel and the plain steps; the numbers agree."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return plain_attention(*args, **kwargs)

    monkeypatch.setattr(importlib.import_module("tessera.ops.attention"), "plain_attention", counted)
    flash, plain = model_of(2), model_of(2, use_flash_attention=False)
    ids = tokens(3, 2, 11)
    expected = flash(ids)["logits"]
    assert not calls
    torch.testing.assert_close(plain(ids)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_logit_softcap():
    ids = tokens(3, 1, 9)
    plain, capped = model_of(3)(ids)["logits"], model_of(3, logit_softcap=0.7)(ids)["logits"]
    torch.testing.assert_close(capped, 0.7 * torch.tanh(plain / 0.7))


def test_window_on_some_layers():
    """Neither a window on every layer nor none gives the same logits."""
    some = model_of(4, sliding_window=3, sliding_window_layers=(1,))
    ids = tokens(5, 1, 12)
    assert [some.config.window(layer) for layer in range(2)] == [None, 3]
    for fields in ({"sliding_window": 3}, {}):
        assert (model_of(4, **fields)(ids)["logits"] - some(ids)["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"weight_dtype": "fp8_e4m3"}, {"use_parallel_attention": True}], ids=str)
def test_checkpointing(fields):
    """Recomputed blocks give the same gradients, and keep fewer tensors."""
    kept, grads = [], []
    for gradient_checkpointing in (False, True):
        model = model_of(6, gradient_checkpointing=gradient_checkpointing, **fields)
        model.unfreeze()
        count = [0]

        def pack(x, count=count):
            count[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(tokens(7, 2, 15))["logits"].logsumexp(-1).sum()
        loss.backward()
        kept.append(count[0])
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    assert all(grad is not None for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype, bound", [("fp8_e4m3", 0.12), ("fp8_e5m2", 0.25), ("int8", 0.03)])
def test_8bit_weights(dtype, bound):
    """Stored in 8 bits; logits near those of the float weights, and those of the expanded ones up to f32 rounding."""
    wide, narrow = model_of(8), model_of(8, weight_dtype=dtype)
    narrow.load_state_dict(wide.state_dict(), strict=False)
    weight = narrow.blocks[0].attn.q_proj.weight
    assert weight.element_size() == 1 and not weight.requires_grad
    ids = tokens(9, 2, 10)
    expected, actual = wide(ids)["logits"], narrow(ids)["logits"]
    assert 0 < (actual - expected).norm() < bound * expected.norm()
    for module, other in zip(wide.modules(), narrow.modules()):
        if getattr(other, "weight_scale", None) is not None:
            module.weight.data = other.weight.float() * other.weight_scale[:, None]
    torch.testing.assert_close(actual, wide(ids)["logits"], rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        assigned = ts.GPTModel(narrow.config)
    reloaded = model_of(10, weight_dtype=dtype)
    reloaded.load_state_dict(narrow.state_dict())
    assigned.load_state_dict(narrow.state_dict(), assign=True)
    for model in (reloaded, assigned):
        assert torch.equal(model(ids)["logits"], actual)


def test_unfrozen_8bit_weights_train_as_they_will_be_stored():
    model = model_of(11, weight_dtype="fp8_e4m3")
    ids = tokens(12, 2, 10)
    frozen = model(ids)["logits"]
    model.unfreeze()
    torch.testing.assert_close(model(ids)["logits"], frozen, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        logits = model(ids)["logits"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_bf16_is_near_f32():
    wide, narrow = model_of(13), model_of(13, weight_dtype="bf16", compute_dtype="bf16 @accum(fp32)")
    narrow.load_state_dict(wide.state_dict())
    mixed = model_of(13, compute_dtype="bf16")  # f32 weights, bf16 activations
    ids = tokens(14, 2, 10)
    expected = wide(ids)["logits"]
    for model in (narrow, mixed):
        actual = model(ids)["logits"]
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).norm() < 0.03 * expected.norm()


def test_cache_follows_the_config():
    model = model_of(0, kv_cache_dtype="fp8_e5m2", use_kv_cache_compression=True).eval()
    cache = model(tokens(1, 2, 5), use_cache=True)["kv_cache"]
    assert (cache.dtype.name, cache.compression, cache.max_seq_len) == ("fp8_e5m2", "group_query", 24)
    assert model_of(0, compute_dtype="bf16").new_cache(1).dtype.name == "bf16"
    assert model_of(0).new_cache(1).compression is None


def test_init_is_seeded_and_scaled():
    model = ts.GPTModel(config(d_model=256, d_ffn=512, n_layers=8))
    torch.manual_seed(1)
    model.init_weights(seed=5)
    first = {name: p.clone() for name, p in model.named_parameters()}
    torch.randn(3)
    model.init_weights(seed=5)
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())
    assert first["blocks.0.attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert first["blocks.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert first["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_too_long():
    model = model_of(0).eval()
    with pytest.raises(InputError, match=r"input_ids: 25 tokens given \(0 of them cached\); .* max_seq_len = 24"):
        model(tokens(0, 1, 25))
    cache = model(tokens(0, 1, 24), use_cache=True)["kv_cache"]
    with pytest.raises(InputError, match=r"input_ids: 25 tokens given \(24 of them cached\)"):
        model(tokens(0, 1, 1), kv_cache=cache)


@pytest.mark.parametrize("bad", [31, -1])
def test_token_out_of_range(bad):
    ids = tokens(0, 2, 7)
    ids[1, 4] = bad
    with pytest.raises(InputError, match=rf"token {bad} at row 1, position 4 given; .*vocab_size 31"):
        model_of(0)(ids)


def test_arguments_that_do_not_fit():
    model, ids = model_of(0).eval(), tokens(0, 2, 7)
    with pytest.raises(ShapeError, match=r"attention_mask: \(2, 6\) given; expected \(2, 7\)"):
        model(ids, attention_mask=torch.ones(2, 6))
    with pytest.raises(ShapeError, match=r"position_ids: \(7,\) given; expected \(2, 7\)"):
        model(ids, position_ids=torch.arange(7))
    with pytest.raises(InputError, match=r"position_ids: 24 given; expected 0\.\.23"):
        model(ids, position_ids=torch.arange(18, 25)[None])
    with pytest.raises(ShapeError, match=r"kv_cache: batch, .* = \(3, 2, 2, 8\) given; expected \(2"):
        model(ids, kv_cache=model.new_cache(3))
    for wrong in (ids.float(), ids[0], ids[:, :0]):
        with pytest.raises(ShapeError, match=r"input_ids: .* expected \[batch, tokens\]"):
            model(wrong)
    with pytest.raises(InputError, match="kv_cache: given in training"):
        model.train()(ids, use_cache=True)
    with pytest.raises(InputError, match="logits_to_keep: -1 given"):
        model(ids, logits_to_keep=-1)


def test_explicit_positions():
    """Rotary attention sees only distances; learned positions see the places themselves."""
    ids = tokens(15, 1, 6)
    shifted = torch.arange(9, 15)[None]
    rotary, learned = model_of(16), model_of(16, use_rotary_embeddings=False)
    torch.testing.assert_close(rotary(ids, position_ids=shifted)["logits"], rotary(ids)["logits"], rtol=1e-4, atol=1e-4)
    assert (learned(ids, position_ids=shifted)["logits"] - learned(ids)["logits"]).abs().max() > 1e-2


def test_an_interrupted_forward_leaves_the_cache_usable(monkeypatch):
    model = model_of(17).eval()
    ids = tokens(18, 1, 9)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True)["kv_cache"]
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 5:], kv_cache=cache)
        again = model(ids[:, 5:], kv_cache=cache)["logits"]
        torch.testing.assert_close(again, model(ids)["logits"][:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"logit_softcap": 2.0}, {"weight_dtype": "fp8_e4m3"}])
def test_loss_is_the_cross_entropy_of_the_logits(fields):
    model = model_of(21, **fields).train()
    ids, targets = tokens(22, 3, 9), tokens(23, 3, 9)
    targets[0, :4] = -100
    logits = model(ids)["logits"]
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    loss = model.loss(ids, targets)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for actual, grad in zip(torch.autograd.grad(loss, parameters), wanted):
        torch.testing.assert_close(actual, grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        z = torch.logsumexp(logits.double(), -1)[targets != -100].square().mean()
        expected = (expected + 0.1 * z).float()
        torch.testing.assert_close(model.loss(ids, targets, z_loss=0.1), expected, rtol=1e-5, atol=1e-5)


def test_loss_refuses():
    model = model_of(24)
    with pytest.raises(ShapeError, match=r"targets: \(1, 3\) given; expected \(1, 4\)"):
        model.loss(tokens(1, 1, 4), tokens(1, 1, 3))
    with pytest.raises(InputError, match="token 31"):
        model.loss(torch.tensor([[31]]), tokens(1, 1, 1))
