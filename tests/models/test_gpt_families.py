"""GPTModel against transformers: every family, padded batches, cached decoding, context stretching."""

import pytest
import torch
import transformers

import tessera as ts

from .families import FIELDS, SIZES, config, padded_batch, pair, state


def close(actual, expected, bound=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FIELDS)
def test_logits(family, flash):
    expected, model = pair(family, 1, {"use_flash_attention": flash})
    ids = torch.randint(0, 97, (3, 23), generator=torch.Generator().manual_seed(2))
    close(model(ids)["logits"], expected(ids).logits)
    close(model(ids, logits_to_keep=2)["logits"], expected(ids).logits[:, -2:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FIELDS)
def test_padding(family, side):
    expected, model = pair(family, 3)
    lengths = [11, 4, 17, 1]
    ids, mask = padded_batch(4, lengths, side)
    logits = model(ids, attention_mask=mask)["logits"]
    assert logits.isfinite().all()
    for row in range(len(lengths)):
        alone = expected(ids[row, mask[row].bool()][None]).logits[0]
        close(logits[row, mask[row].bool()], alone)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FIELDS)
def test_prefill_and_decode_equal_one_forward(family, side):
    """A prompt of ragged rows, a chunk of 3, then single tokens, without repeating the mask."""
    expected, model = pair(family, 5)
    lengths = [9, 9, 9] if side == "none" else [9, 2, 6]
    ids, mask = padded_batch(6, lengths, side)
    new = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(7))
    step = model(ids, attention_mask=None if side == "none" else mask, use_cache=True)
    cache, pieces = step["kv_cache"], []
    for part in [new[:, :3], *new[:, 3:].split(1, 1)]:
        pieces.append(model(part, kv_cache=cache)["logits"])
    assert cache.length == 19
    for row in range(3):
        alone = torch.cat((ids[row, mask[row].bool()], new[row]))[None]
        close(torch.cat(pieces, 1)[row], expected(alone).logits[0, -10:], 1e-5)
        close(torch.cat(pieces, 1)[row], model(alone)["logits"][0, -10:], 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_padding_only_gives_no_nan(side):
    _, model = pair("mistral", 8)
    ids, mask = padded_batch(9, [12, 5], side)
    mask[1] = 0
    assert model(ids, attention_mask=mask)["logits"].isfinite().all()


def relatives():
    """(transformers model class, config class, its fields, GPTConfig's): what the five families leave untested."""
    gqa = {**SIZES, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "stablelm": ("StableLm", {**gqa, "layer_norm_eps": 1e-6, "use_qkv_bias": True, "use_parallel_residual": True,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                      "partial_rotary_factor": 0.5}},
                     {"norm": "layernorm", "attn_qkv_bias": True, "use_parallel_attention": True,
                      "rope_fraction": 0.5}),
        "granite": ("Granite", {**gqa, "rms_norm_eps": 1e-6, "embedding_multiplier": 3.5, "attention_multiplier": 0.2,
                                "attention_bias": True},
                    {"embed_scale": 3.5, "attn_scale": 0.2, "attn_qkv_bias": True, "attn_out_bias": True}),
        "starcoder2": ("Starcoder2", {**gqa, "norm_epsilon": 1e-6, "use_bias": True, "sliding_window": 5,
                                      "tie_word_embeddings": False},
                       {"norm": "layernorm", "use_gated_mlp": False, "activation": "gelu_tanh", "mlp_bias": True,
                        "attn_qkv_bias": True, "attn_out_bias": True, "sliding_window": 5}),
        "qwen2-windows": ("Qwen2", {**gqa, "rms_norm_eps": 1e-6, "use_sliding_window": True, "sliding_window": 6,
                                    "max_window_layers": 1},
                          {"attn_qkv_bias": True, "sliding_window": 6, "sliding_window_layers": (1, 2)}),
        "gemma": ("Gemma", {**gqa, "head_dim": 12, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
                  {"head_dim": 12, "activation": "gelu_tanh", "embed_scale": 48**0.5, "tie_embeddings": True}),
    }


@pytest.mark.parametrize("name", relatives())
def test_relatives(name):
    prefix, theirs, ours = relatives()[name]
    torch.manual_seed(12)
    expected = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**theirs)).eval()
    for parameter in expected.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {key.replace("c_fc", "up_proj").replace("mlp.c_proj", "mlp.down_proj"): weight
               for key, weight in state(expected, "llama").items()}
    for key in weights if name == "gemma" else ():
        weights[key] = weights[key] + 1 if "norm" in key else weights[key]  # Gemma stores weight - 1
    model = ts.GPTModel(config("llama", **ours)).eval()
    model.load_state_dict({key: weight for key, weight in weights.items() if key in model.state_dict()})
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(13))
    close(model(ids)["logits"], expected(ids).logits)


SCALINGS = {
    "linear": ({"factor": 3.0}, {"factor": 3.0}),
    "dynamic": ({"factor": 2.0}, {"factor": 2.0, "original_max_seq_len": 16}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 16}, {"factor": 4.0, "original_max_seq_len": 16}),
    "yarn-mscale": (
        {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 20},
        {"factor": 4.0, "original_max_seq_len": 16, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 20.0}),
    "yarn-factor": (
        {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3, "beta_slow": 0.5},
        {"factor": 4.0, "original_max_seq_len": 16, "attention_factor": 1.3, "beta_slow": 0.5}),
}


@pytest.mark.parametrize("length", [13, 41])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling(name, length):
    theirs, ours = SCALINGS[name]
    kind = name.split("-")[0]
    limit = {"max_position_embeddings": 16} if kind == "dynamic" else {}
    rope = {"rope_type": kind, "rope_theta": 500.0, **theirs}
    scaling = ts.RopeScaling(kind=kind, **ours)
    expected, model = pair("llama", 10, {"rope_theta": 500.0, "rope_scaling": scaling}, rope_parameters=rope, **limit)
    ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(11))
    close(model(ids)["logits"], expected(ids).logits)
