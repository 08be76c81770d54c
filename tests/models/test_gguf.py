"""GGUF files: SmolLM2 against transformers, and every family written, read and checked by other readers."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import tessera as ts
from tessera.errors import FileFormatError, UnsupportedError, UnsupportedFileError
from tessera.models.convert import hf_to_gguf, save_gguf
from tessera.models.gguf import config_from_gguf

from .families import padded_batch


def logits(model, ids):
    with torch.inference_mode():
        return model(ids)["logits"]


@pytest.fixture(scope="module")
def smollm2():
    return ts.load_model(ts.hub.smollm2())


def test_smollm2_has_the_weights_that_the_gguf_package_reads(smollm2):
    """Bit-equal to the package's reader and dequantizer, q and k rows in half-split order."""
    model = smollm2
    assert (model.config.n_layers, model.config.tie_embeddings, model.config.norm_eps) == (30, True, 1e-5)
    stored = {t.name: t for t in gguf.GGUFReader(ts.hub.smollm2()).tensors}
    for ours, theirs, heads in [("embed.weight", "token_embd.weight", 0),
                                ("blocks.7.attn.q_proj.weight", "blk.7.attn_q.weight", 9),
                                ("blocks.29.attn.k_proj.weight", "blk.29.attn_k.weight", 3),
                                ("blocks.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0)]:
        expected = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        if heads:
            rows, width = expected.shape
            expected = expected.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        np.testing.assert_array_equal(model.get_parameter(ours).detach().numpy(), expected)


def test_smollm2_speaks(smollm2):
    """Wrongly ordered rotary rows would give noise."""
    tokenizer = ts.load_tokenizer(ts.hub.smollm2())
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode([int(logits(smollm2, ids)[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize("type, tolerance", [
    ("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3), ("Q4_0", 0.12), ("Q4_1", 0.12)])
def test_written_files_read_back(hf_folder, family, type, tolerance, tmp_path):
    """Each parameter within its storage type's step; widths of 48 and 80 are no multiple of 32 and stay F16."""
    model = ts.load_model(hf_folder(family)[0])
    save_gguf(model, tmp_path / "x.gguf", type)
    back = ts.load_model(tmp_path / "x.gguf")
    assert back.config == dataclasses.replace(model.config, family=back.config.family)
    for name, parameter in model.named_parameters():
        read = back.get_parameter(name)
        assert (parameter - read).abs().max() <= tolerance * parameter.abs().max(), name
    if type == "F32":
        ids, _ = padded_batch(1, [12, 12], "right")
        assert torch.equal(logits(back, ids), logits(model, ids))


def block_model(family):
    """A model whose rows are whole blocks."""
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 64, "d_ffn": 96, "max_seq_len": 32, "vocab_size": 50}
    extra = {"qwen2": {"attn_qkv_bias": True}, "qwen3": {"qk_norm": True}, "mistral": {"sliding_window": 8}}
    return ts.GPTModel(ts.GPTConfig(**shape, family=family, **extra.get(family, {}))).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_1"])
def test_block_types(tmp_path, family, type):
    model = block_model(family)
    save_gguf(model, tmp_path / "x.gguf", type)
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert stored["blk.1.ffn_down.weight"].tensor_type.name == type
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    read = ts.load_model(tmp_path / "x.gguf").get_parameter("blocks.1.mlp.down_proj.weight")
    down = gguf.quants.dequantize(stored["blk.1.ffn_down.weight"].data, stored["blk.1.ffn_down.weight"].tensor_type)
    np.testing.assert_array_equal(read.detach().numpy(), down)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_written_files(hf_folder, family, tmp_path):
    """transformers' GGUF reader, with its own names and un-permutation, finds the weights of the folder."""
    folder, expected = hf_folder(family)
    hf_to_gguf(folder, tmp_path / "x.gguf", "F32")
    read = load_gguf_checkpoint(tmp_path / "x.gguf", return_tensors=True, model_to_load=expected)
    weights = expected.state_dict()
    assert set(read["tensors"]) == set(weights)
    for name, value in read["tensors"].items():
        assert torch.equal(torch.as_tensor(value), weights[name]), name
    assert read["config"]["num_key_value_heads"] == 2
    assert read["config"]["rms_norm_eps"] == pytest.approx(1e-6)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_scaling_survives(tmp_path, kind):
    original = {} if kind == "linear" else {"original_max_seq_len": 8192}
    scaling = ts.RopeScaling(kind=kind, factor=8.0, **original)
    model = ts.GPTModel(ts.GPTConfig(
        n_layers=1, n_heads=2, d_model=64, d_ffn=8, max_seq_len=32, vocab_size=11, rope_theta=5e5, rope_scaling=scaling,
        family="llama"))
    save_gguf(model, tmp_path / "x.gguf")
    assert ts.load_model(tmp_path / "x.gguf").config.rope_scaling == scaling


def test_what_gguf_cannot_express_is_named(tmp_path):
    model = ts.GPTModel(ts.GPTConfig(
        n_layers=1, n_heads=2, d_model=8, d_ffn=8, max_seq_len=8, vocab_size=11, activation="gelu", family="llama"))
    with pytest.raises(UnsupportedError, match="activation"):
        save_gguf(model, tmp_path / "x.gguf")
    with pytest.raises(ts.InputError, match=r"Q3_K.*Q8_0"):
        save_gguf(model, tmp_path / "x.gguf", "Q3_K")
    assert list(tmp_path.iterdir()) == []


METADATA = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 16, "llama.embedding_length": 8,
    "llama.feed_forward_length": 16, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}


@pytest.mark.parametrize("changes, error, names", [
    ({"general.architecture": "mamba"}, UnsupportedFileError, "'mamba'.*llama, qwen2, qwen3, gpt2"),
    ({"llama.expert_count": 8}, UnsupportedFileError, r"not understood: llama\.expert_count"),
    ({"llama.rope.scaling.type": "longrope"}, UnsupportedFileError, "longrope"),
    ({"llama.rope.dimension_count": 2}, UnsupportedFileError, "dimension_count"),
    ({"llama.attention.head_count": [2]}, FileFormatError, "head_count is"),
    ({"llama.attention.head_count": 0}, FileFormatError, "n_heads|n_kv_heads"),
    ({"llama.block_count": 1 << 40}, FileFormatError, "n_layers"),
    ({"tokenizer.ggml.eos_token_id": 11}, FileFormatError, r"eos_token_id is 11; expected 0\.\.10"),
])
def test_metadata_that_cannot_be_used(changes, error, names):
    assert config_from_gguf(METADATA, {"token_embd.weight": (11, 8)}, "x").n_layers == 1
    with pytest.raises(error, match=names):
        config_from_gguf(METADATA | changes, {"token_embd.weight": (11, 8)}, "x")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1"])
def test_weights_stay_quantized(tmp_path, family, type):
    """The same logits, from an eighth to a quarter of the bytes; saving writes what the blocks stand for."""
    model = block_model(family)
    save_gguf(model, tmp_path / "x.gguf", type)
    whole, kept = ts.load_model(tmp_path / "x.gguf"), ts.load_model(tmp_path / "x.gguf", keep_quantized=True)
    assert isinstance(kept.embed, ts.nn.BlockEmbedding) and isinstance(kept.blocks[1].mlp.down_proj, ts.nn.BlockLinear)
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(kept, ids), logits(whole, ids), rtol=1e-4, atol=1e-4)
    expected = ts.GPTInference(whole).generate(ids, 6, do_sample=False, eos_token_id=())
    engine = ts.GPTInference(kept)
    assert torch.equal(engine.generate(ids, 6, do_sample=False, eos_token_id=()), expected)
    ts.save_model(kept, tmp_path / "out")
    again = ts.load_model(tmp_path / "out")
    torch.testing.assert_close(dict(again.named_parameters()), dict(whole.named_parameters()), rtol=1e-6, atol=1e-7)


def test_activations_in_8_bits(tmp_path):
    save_gguf(block_model("llama"), tmp_path / "x.gguf", "Q4_1")
    exact, rounded = (ts.load_model(tmp_path / "x.gguf", keep_quantized=True, activations=a) for a in (None, "int8"))
    assert rounded.embed.activations == rounded.blocks[1].mlp.down_proj.activations == "int8"
    ids = torch.randint(0, exact.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    expected, actual = logits(exact, ids), logits(rounded, ids)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05
    for given in ({"activations": "int8"}, {"activations": "fp8", "keep_quantized": True}):
        with pytest.raises(ts.InputError, match=r"activations: .* given; expected 'int8', with keep"):
            ts.load_model(tmp_path / "x.gguf", **given)


def test_blocks_are_not_cut():
    with pytest.raises(UnsupportedError, match="keep_quantized: given with a mesh of 2 ranks"):
        ts.load_model(ts.hub.smollm2(), keep_quantized=True, mesh=ts.dist.Mesh(axes=["tp"], devices=range(2)))
