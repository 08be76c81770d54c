"""Loading with a mesh: each rank's parts equal the whole model's, and nothing else of cut tensors is read."""

import pytest
import torch

import tessera as ts
from tessera.formats import blocks
from tessera.models import gpt_plan
from tessera.models.convert import save_gguf

from .test_load import peak_bytes


@pytest.mark.parametrize("layout", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parts_equal_the_whole(hf_folder, family, layout, dtype, tmp_path):
    path, _ = hf_folder(family)
    if layout == "gguf":
        path = tmp_path / "model.gguf"
        save_gguf(ts.load_model(hf_folder(family)[0]), path)
    whole = dict(ts.load_model(path, dtype).named_parameters())
    for n in (2, 3, 4):
        for rank in range(n):
            model = ts.load_model(path, dtype, mesh=ts.dist.mesh(n, rank=rank))
            cuts = gpt_plan.cuts(model)
            for name, value in model.named_parameters():
                expected = cuts[name].of(whole[name]) if name in cuts else whole[name]
                assert torch.equal(value, expected), name
                assert value.untyped_storage().nbytes() == value.nbytes, name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_parts_of_quantized_blocks(hf_folder, kind, tmp_path):
    """Columns cut within a block of 32 numbers: the blocks at the edges are read and trimmed."""
    path = tmp_path / "model.gguf"
    model = ts.GPTModel(ts.GPTConfig(n_layers=1, n_heads=4, d_model=64, d_ffn=96, max_seq_len=64, vocab_size=97,
                                     family="llama"))
    save_gguf(model, path, kind)
    whole = dict(ts.load_model(path).named_parameters())
    for rank in range(4):
        part = ts.load_model(path, mesh=ts.dist.mesh(4, rank=rank))
        for name, cut in gpt_plan.cuts(part).items():
            assert torch.equal(part.get_parameter(name), cut.of(whole[name])), name


def test_a_quarter_is_read_and_held(tmp_path, monkeypatch):
    config = ts.GPTConfig(n_layers=8, n_heads=8, d_model=512, d_ffn=2048, max_seq_len=64, vocab_size=512,
                          family="llama")
    ts.save_model(ts.GPTModel(config), tmp_path / "model")
    whole = config.n_params * 4
    n_read = 0
    original = blocks.DataFile.read_into

    def counting(self, out, offset):
        nonlocal n_read
        n_read += out.nbytes
        original(self, out, offset)

    monkeypatch.setattr(blocks.DataFile, "read_into", counting)
    peak, model = peak_bytes(lambda: ts.load_model(tmp_path / "model", mesh=ts.dist.mesh(4, rank=2)))
    held = sum(p.nbytes for p in model.parameters())
    assert held < 0.26 * whole and n_read < 0.26 * whole
    assert peak < 0.3 * whole + 8e6
