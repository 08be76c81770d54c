"""Conversion there and back, with vocabularies of every kind that GGUF has a name for."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import tessera as ts
from tessera.errors import FileFormatError, UnsupportedFileError
from tessera.models.convert import gguf_to_hf, hf_to_gguf
from tessera.models.gguf_vocabulary import vocabulary_metadata

TEXTS = ["Hello world, it's 1234 o'clock!", "  def f(x):\n\treturn x ** 2\n", "naïve 日本語 🙂", "<s>marked</s>", ""]
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(*steps):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece():
    letters = sorted({c for text in TEXTS for c in text if c != " "} | {"▁"})
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("▁", "Hell"), ("▁", "w"), ("o", "r"), ("▁w", "or")]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *letters]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": lambda: byte_level(split(_LLAMA3), pre_tokenizers.ByteLevel(False, use_regex=False)),
    "qwen2": lambda: byte_level(split(_LLAMA3.replace("{1,3}", "")), pre_tokenizers.ByteLevel(False, use_regex=False)),
    "": sentencepiece,
}


@pytest.mark.parametrize("pre", list(TOKENIZERS))
def test_folder_to_gguf_to_folder(tmp_path, pre):
    original = TOKENIZERS[pre]()
    size = original.get_vocab_size() + 5  # a padded embedding, as many models have
    model = ts.GPTModel(ts.GPTConfig(
        n_layers=1, n_heads=2, d_model=32, d_ffn=32, max_seq_len=32, vocab_size=size, family="llama"))
    ts.save_model(model, tmp_path / "a")
    original.save(str(tmp_path / "a" / "tokenizer.json"))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    hf_to_gguf(tmp_path / "a", tmp_path / "b.gguf", "F32")
    tokenizer = ts.load_tokenizer(tmp_path / "b.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text).ids, text
    assert tokenizer.chat_template == "{{ messages }}"
    gguf_to_hf(tmp_path / "b.gguf", tmp_path / "c", "f32", tokenizer)
    back = ts.load_model(tmp_path / "c")
    assert all(torch.equal(p, back.get_parameter(name)) for name, p in model.named_parameters())
    again = ts.load_tokenizer(tmp_path / "c")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("change, error, names", [
    ({"model": {"type": "Unigram", "vocab": []}}, UnsupportedFileError, "only BPE"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, UnsupportedFileError, "neither"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x+"}}, {"type": "ByteLevel", "use_regex": False}]}},
     UnsupportedFileError, "give pre="),
    ({"added_tokens": [{"content": "<x>", "id": 10**6}]}, FileFormatError, "distinct and in 0..499"),
    ({"added_tokens": [{"content": "<x>", "id": 5}]}, FileFormatError, "distinct"),
    ({"added_tokens": ["<x>"]}, FileFormatError, "added_tokens"),
])
def test_tokenizers_that_cannot_be_written(tmp_path, change, error, names):
    parsed = json.loads(TOKENIZERS["gpt-2"]().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed | change))
    with pytest.raises(error, match=names):
        vocabulary_metadata(tmp_path, 500)


def test_a_pre_tokenizer_of_unknown_form_can_be_named(tmp_path):
    tokenizer = byte_level(split("x+"), pre_tokenizers.ByteLevel(False, use_regex=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_metadata(tmp_path, 500, pre="tekken")["tokenizer.ggml.pre"] == "tekken"


def test_a_vocabulary_without_merges_is_refused(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedFileError, match="no merges"):
        vocabulary_metadata(tmp_path, 256)
