"""load_model and save_model against transformers, for every family; and their errors."""

import contextlib
import json
import shutil

import pytest
import torch
from formats.mutations import guarded, mutations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tessera as ts
from tessera.errors import FileFormatError, NotFoundError, UnsupportedError, UnsupportedFileError
from tessera.models.convert import save_gguf

from .families import padded_batch


def logits(model, ids):
    with torch.inference_mode():
        out = model(ids)
    return out["logits"] if isinstance(out, dict) and "kv_cache" in out else out.logits


def edited(folder, tmp_path, **changes):
    """A copy of a model folder with changed config.json fields (None deletes)."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    fields = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return copy


@pytest.mark.parametrize("seed", [1])
def test_logits_equal_transformers(hf_folder, family, seed):
    folder, expected = hf_folder(family, seed)
    ids, _ = padded_batch(seed, [11, 11], "right")
    model = ts.load_model(folder)
    assert model.config.family == family and not model.training
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [2])
def test_saved_models_read_back_with_equal_logits(hf_folder, family, seed, tmp_path):
    """transformers reads what save_model wrote, in shards, with the logits of the model it came from, bit for bit."""
    folder, expected = hf_folder(family, seed)
    model = ts.load_model(folder)
    ts.save_model(model, tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids, _ = padded_batch(seed, [9, 9], "right")
    assert torch.equal(logits(back, ids), logits(expected, ids))
    again = ts.load_model(tmp_path / "out")
    assert again.config == model.config
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("fields", [
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                         "original_max_position_embeddings": 16}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
], ids=lambda fields: "-".join(map(str, fields.get("rope_parameters", fields).values()))[:24])
def test_llama_variants_survive_the_round_trip(hf_folder, fields, tmp_path):
    folder, expected = hf_folder("llama", 3, **fields)
    ids, _ = padded_batch(3, [40], "right")
    model = ts.load_model(folder)
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)
    ts.save_model(model, tmp_path / "out")
    assert ts.load_model(tmp_path / "out").config == model.config


def test_qwen2_with_windows_in_some_layers(hf_folder, tmp_path):
    folder, expected = hf_folder("qwen2", 4, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ids, _ = padded_batch(4, [20], "right")
    model = ts.load_model(folder)
    assert model.config.sliding_window_layers == (1, 2)
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)
    old_layout = edited(folder, tmp_path, layer_types=None)  # transformers 4 did not write it
    assert ts.load_model(old_layout).config == model.config
    ts.save_model(model, tmp_path / "out")
    assert ts.load_model(tmp_path / "out").config == model.config


def test_the_rope_layout_of_transformers_4(hf_folder, tmp_path):
    folder, _ = hf_folder("llama", 3, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    old = edited(folder, tmp_path, rope_parameters=None, rope_theta=5e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert ts.load_model(old).config == ts.load_model(folder).config


@pytest.mark.parametrize("dtype, expected", [("bf16", torch.bfloat16), ("f16", torch.float16), ("auto", torch.float32)])
def test_dtypes_are_rounded_once(hf_folder, family, dtype, expected):
    folder, _ = hf_folder(family)
    exact, model = ts.load_model(folder), ts.load_model(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(expected)), name


def test_loading_inside_inference_mode_gives_ordinary_parameters(hf_folder):
    with torch.inference_mode():
        model = ts.load_model(hf_folder("llama", 0)[0])
    assert not any(p.is_inference() for p in model.parameters())
    model.train()(torch.tensor([[1, 2, 3]]))["logits"].sum().backward()
    assert model.embed.weight.grad is not None


def test_shards_of_transformers_and_files_without_the_base_prefix(hf_folder, tmp_path):
    folder, expected = hf_folder("gpt2", 5, shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    sharded = ts.load_model(folder)
    state = expected.state_dict()
    weights = {name.removeprefix("transformer."): w for name, w in state.items() if "lm_head" not in name}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}  # the masks of GPT-2's first files
    save_file({name: w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    bare = ts.load_model(tmp_path)
    assert all(torch.equal(p, bare.get_parameter(name)) for name, p in sharded.named_parameters())


def test_progress_counts_every_byte_once(hf_folder):
    calls = []
    model = ts.load_model(hf_folder("gpt2")[0], progress=lambda *args: calls.append(args))
    assert sorted(name for *_, name in calls) == sorted(name for name, _ in model.named_parameters())
    assert [done for done, *_ in calls] == sorted({done for done, *_ in calls})
    assert calls[-1][:2] == (sum(p.nbytes for p in model.parameters()),) * 2


def test_parts_of_fused_tensors_own_their_memory(hf_folder):
    for parameter in ts.load_model(hf_folder("gpt2")[0]).parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize("family, changes, names", [
    ("llama", {"model_type": "mamba"}, "mamba.*llama, mistral, qwen2, qwen3, gpt2"),
    ("llama", {"hidden_act": "snake"}, "hidden_act 'snake'.*silu"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral.*llama3"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 3}}, "unknown twist"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
])
def test_what_is_not_supported_is_named(hf_folder, tmp_path, family, changes, names):
    with pytest.raises(UnsupportedFileError, match=names):
        ts.load_model(edited(hf_folder(family)[0], tmp_path, **changes))


@pytest.mark.parametrize("changes, names", [
    ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 5}, "d_model|n_kv_heads"),
    ({"num_attention_heads": "6"}, "num_attention_heads is '6'"),
    ({"num_hidden_layers": 4}, "9 missing: model.layers.3.input_layernorm.weight.*and 6 more"),
    ({"num_hidden_layers": 2}, "9 unexpected: model.layers.2"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000'; expected an integer from 1"),
    ({"num_hidden_layers": 9000}, "parameters announced"),
    ({"hidden_size": 2**30, "vocab_size": 2**31 - 1}, "parameters announced"),
    ({"vocab_size": 96}, r"wrong shape: model.embed_tokens.weight \[97, 48\] \(expected \[96, 48\]\)"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rms_norm_eps": -1}, "norm_eps"),
])
def test_what_does_not_fit_is_named(hf_folder, tmp_path, changes, names):
    with pytest.raises(FileFormatError, match=names):
        ts.load_model(edited(hf_folder("llama")[0], tmp_path, **changes))


def test_missing_and_damaged_files(hf_folder, tmp_path):
    folder, _ = hf_folder("llama", 6, shard_size="60KB")
    with pytest.raises(NotFoundError, match="nothing at"):
        ts.load_model(tmp_path / "absent")
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        ts.load_model(tmp_path)
    copy = edited(folder, tmp_path)
    shard = sorted(copy.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(FileFormatError, match="cut short"):
        ts.load_model(copy)
    shard.unlink()
    with pytest.raises(NotFoundError, match=rf"1 of \d+ shards missing: {shard.name}"):
        ts.load_model(copy)
    with pytest.raises(ts.InputError, match="dtype: 'int8'"):
        ts.load_model(folder, dtype="int8")
    (copy / "config.json").write_text("{" * 2)
    with pytest.raises(FileFormatError, match="not valid JSON"):
        ts.load_model(copy)


def test_a_failed_save_leaves_what_was_there(hf_folder, tmp_path):
    model = ts.load_model(hf_folder("llama")[0])
    target = tmp_path / "model"
    ts.save_model(model, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    class Broken:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ts.save_model(model, target, tokenizer=Broken())
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_saving_replaces_a_model_but_no_other_folder(hf_folder, tmp_path):
    model = ts.load_model(hf_folder("llama")[0])
    ts.save_model(model, tmp_path / "model", shard_bytes=50_000)
    ts.save_model(model, tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "model" / "thesis.tex").write_text("x")
    with pytest.raises(ts.InputError, match=r"holds thesis\.tex"):
        ts.save_model(model, tmp_path / "model")
    with pytest.raises(ts.InputError, match="is a file"):
        ts.save_model(model, tmp_path / "model" / "config.json")


def test_a_configuration_that_no_family_expresses(tmp_path):
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_ffn": 8, "max_seq_len": 8, "vocab_size": 11}
    with pytest.raises(UnsupportedError, match="logit_softcap"):
        ts.save_model(ts.GPTModel(ts.GPTConfig(**sizes, logit_softcap=3.0)), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ts.save_model(ts.GPTModel(ts.GPTConfig(**sizes, qk_norm=True)), tmp_path / "b")  # built by hand: found by its form
    assert ts.load_model(tmp_path / "b").config.family == "qwen3"


def test_8_bit_weights_are_saved_in_the_compute_type(tmp_path):
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_ffn": 8, "max_seq_len": 8, "vocab_size": 11}
    model = ts.GPTModel(ts.GPTConfig(**sizes, weight_dtype="fp8_e4m3 @accum(fp32)"))
    ts.save_model(model, tmp_path / "a")
    ids, _ = padded_batch(0, [5], "right")
    torch.testing.assert_close(logits(ts.load_model(tmp_path / "a"), ids % 11), logits(model.eval(), ids % 11))
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.float32}


def peak_bytes(action):
    """How far the process' resident memory rises above where it stood."""
    def field(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts anew
    before = field("VmRSS:")
    result = action()
    return field("VmHWM:") - before, result


@pytest.mark.parametrize("stored, layout", [("bf16", "hf"), ("f32", "hf"), ("f32", "gguf")])
def test_peak_memory_is_the_model_and_one_tensor(tmp_path, stored, layout):
    config = ts.GPTConfig(n_layers=8, n_heads=8, d_model=512, d_ffn=2048, max_seq_len=64, vocab_size=512,
                          compute_dtype=stored, weight_dtype=stored, family="llama")
    path = tmp_path / "model"
    save = ts.save_model if layout == "hf" else save_gguf
    save(ts.GPTModel(config), path)
    peak, model = peak_bytes(lambda: ts.load_model(path))
    size = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert size > 100e6
    assert peak < size + largest + 16e6


@pytest.mark.parametrize("seed", [8])
def test_damaged_config_json_is_refused_or_loads(hf_folder, family, tmp_path, seed):
    folder = edited(hf_folder(family)[0], tmp_path)
    data = (folder / "config.json").read_bytes()
    with guarded():
        for damaged in mutations(data, len(data), 60, seed):
            (folder / "config.json").write_bytes(damaged)
            with contextlib.suppress(FileFormatError):  # anything else fails the test
                ts.load_model(folder)


@pytest.mark.parametrize("seed", [7])
def test_damaged_gguf_models_are_refused_or_load(hf_folder, tmp_path, seed):
    """As in tests/formats, but up to the model: a damaged configuration is a FileFormatError too."""
    path = tmp_path / "x.gguf"
    save_gguf(ts.load_model(hf_folder("qwen2")[0]), path)
    data = path.read_bytes()
    refused = 0
    with guarded():
        for damaged in mutations(data, 2600, 150, seed):
            path.write_bytes(damaged)
            try:
                ts.load_model(path)
            except FileFormatError:
                refused += 1
    assert refused > 75
