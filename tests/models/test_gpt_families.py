"""GPTModel against transformers: every family, padded batches, cached decoding, context stretching."""

import pytest
import torch

import tessera as ts

from .families import FIELDS, padded_batch, pair


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
