"""Vocabularies from outside, made into tokenizers of the tokenizers package.

In: a GGUF file's metadata, a tokenizer.json, vocab.json and merges.txt, a tiktoken file of ranks, or the
merges of GPT-2 that come with this package. Out: a `tokenizers.Tokenizer`. Called by data.tokenizer.

Files are hostile: their size is bounded before they are read, every id and merge is checked against the
vocabulary, and what the Rust library refuses (or panics on) becomes a FileFormatError.
"""

from __future__ import annotations

import base64
import binascii
import gzip
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from tessera.data.pretokenizers import WHOLE_WORDS, pre_tokenizer
from tessera.errors import FileFormatError, InputError, NotFoundError, UnsupportedFileError
from tessera.formats.json import read_json_object

MAX_FILE_BYTES = 128 << 20  # the largest published tokenizer.json (Gemma 3) has 33 MB
MAX_VOCAB = 1 << 24
MAX_TOKEN_CHARS = 4096
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type

_T = TypeVar("_T")


def guarded(source: str, build: Callable[[], _T]) -> _T:
    """The result of `build`; an error or panic of the Rust library becomes a FileFormatError about `source`."""
    try:
        return build()
    except BaseException as error:  # a Rust panic derives from BaseException
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            if isinstance(error, InputError):
                raise
            raise FileFormatError(f"{source}: not a usable tokenizer: {error}") from error
        raise


def from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json of the tokenizers package.

    Raises:
        FileFormatError: too large, not JSON, an id out of range, a merge of unknown tokens, an unknown part.
    """
    parsed = read_json_object(path, MAX_FILE_BYTES)
    model = parsed.get("model")
    if not isinstance(model, dict):
        raise FileFormatError(f"{path}: model is {type(model).__name__}; expected an object")
    vocab = model.get("vocab")
    added = parsed.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise FileFormatError(f"{path}: added_tokens is not a list of objects")
    _check_ids([*(vocab.values() if isinstance(vocab, dict) else ()), *(token.get("id") for token in added)], path)
    return guarded(str(path), lambda: tokenizers.Tokenizer.from_file(str(path)))


def from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """GPT-2's pair of files: vocab.json (token -> id) and merges.txt (one merge a line, best first)."""
    vocab = read_json_object(vocab_path, MAX_FILE_BYTES)
    _check_ids(vocab.values(), vocab_path)
    merges = _parse_merges(_read_bounded(merges_path).decode("utf-8", "replace").splitlines(), str(merges_path))
    backend = _byte_level_bpe(vocab, merges, "gpt-2", str(vocab_path))
    _add_special(backend, [token for token in vocab if token.startswith("<|") and token.endswith("|>")])
    return backend


def gpt2() -> tokenizers.Tokenizer:
    """GPT-2's own vocabulary, 50,257 tokens, from the merges that come with this package.

    The ids follow from the merges: the 256 bytes in GPT-2's order, one token a merge, <|endoftext|>.
    """
    packed = resources.files("tessera.data").joinpath("gpt2_merges.txt.gz").read_bytes()
    merges = _parse_merges(gzip.decompress(packed).decode().splitlines(), "gpt2_merges.txt.gz")
    tokens = [*_byte_characters().values(), *(left + right for left, right in merges), "<|endoftext|>"]
    backend = _byte_level_bpe({token: i for i, token in enumerate(tokens)}, merges, "gpt-2", "gpt2")
    _add_special(backend, ["<|endoftext|>"])
    return backend


# Vocabularies published as tiktoken files: the split, and the special tokens, which the files leave out.
_TIKTOKEN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": ("gpt-2", {"<|endoftext|>": 50256}),
    "r50k_base": ("gpt-2", {"<|endoftext|>": 50256}),
    "p50k_base": ("gpt-2", {"<|endoftext|>": 50256}),
    "cl100k_base": ("llama-bpe", {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                                  "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k_base": ("gpt-4o", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def from_tiktoken(
    path: Path, pre: str | None = None, special_tokens: dict[str, int] | None = None,
) -> tokenizers.Tokenizer:
    """A tiktoken file: one `base64(token bytes) rank` a line.

    tiktoken merges the neighbours whose concatenation has the lowest rank. So every split of a token into
    two tokens is a merge, in the order of the ranks of the results.

    Args:
        path: the file.
        pre: how text is split, see data.pretokenizers; by default known from the file's name.
        special_tokens: token -> id; by default known from the file's name.

    Raises:
        FileFormatError: a line that is not base64 and a rank, a rank or token that stands twice, a byte missing.
        InputError: `pre` is needed for a file of this name.
    """
    known_pre, known_special = _TIKTOKEN.get(path.stem, (None, {}))
    pre, special = pre or known_pre, known_special if special_tokens is None else special_tokens
    if pre is None:
        raise InputError(f"pre: needed for {path.name}, since tiktoken files do not say how text is split; "
                         f"known by file name are {', '.join(_TIKTOKEN)}")
    ranks = _parse_tiktoken(path)
    _check_ids([*ranks.values(), *special.values()], path)
    if set(ranks.values()) & set(special.values()):
        raise InputError(f"special_tokens: an id of {special} is taken in {path.name}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FileFormatError(f"{path}: byte {missing[0]} has no token")
    letters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:  # in the order of the ranks
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        local = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += [(text(left), text(right)) for left, right in sorted(local, key=lambda s: (ranks[s[0]], ranks[s[1]]))]
    vocab = {text(token): rank for token, rank in ranks.items()} | special
    backend = _byte_level_bpe(vocab, merges, pre, str(path), whole_words=True)
    _add_special(backend, list(special))
    return backend


def from_gguf(metadata: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    """The tokenizer that a GGUF file carries (tokenizer.ggml.*).

    "gpt2" is byte-level BPE with its merges; "llama" is SentencePiece BPE, whose scores order the merges.

    Raises:
        FileFormatError: keys that are missing, of another kind, or contradict each other.
        UnsupportedFileError: another model (e.g. "bert") or pre-tokenizer.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens", source)
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise FileFormatError(f"{source}: {len(kinds)} token types for {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):  # some files repeat a placeholder; the first of a name counts
        vocab.setdefault(token, i)
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre", "default")
        merges = _parse_merges(_strings(metadata, "tokenizer.ggml.merges", source), source)
        backend = _byte_level_bpe(vocab, merges, pre, source, whole_words=pre in WHOLE_WORDS)
    elif model == "llama":
        pre, backend = "", _sentencepiece_bpe(metadata, vocab, tokens, kinds, source)
    else:
        raise UnsupportedFileError(f"{source}: tokenizer model {model!r} is not supported; 'gpt2' and 'llama' are")
    _add_special(backend, [t for t, kind in zip(tokens, kinds) if kind in (_CONTROL, _UNKNOWN)])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == _USER_DEFINED])
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in WHOLE_WORDS)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    _wrap(backend, *(gguf_token(metadata, name, source) if wanted else None
                     for name, wanted in (("bos", adds_bos), ("eos", adds_eos))))
    return backend


def _sentencepiece_bpe(
    metadata: dict[str, Any], vocab: dict[str, int], tokens: list[str], kinds: list[int], source: str,
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise FileFormatError(f"{source}: tokenizer.ggml.scores must hold one score for each of {len(tokens)} tokens")
    mergeable = {token for token, kind in zip(tokens, kinds) if kind == _NORMAL}
    merges = []
    for token, score in zip(tokens, scores):
        if token in mergeable and len(token) <= MAX_TOKEN_CHARS:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            local = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
            local.sort(key=lambda split: (vocab[split[0]], vocab[split[1]]))
            merges += [(score, split) for split in local]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores stay in the order of their ids
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    unknown = gguf_token(metadata, "unknown", source)
    model = guarded(source, lambda: models.BPE(
        vocab=vocab, merges=[split for _, split in merges], unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    backend = tokenizers.Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], pre: str, source: str, whole_words: bool = False,
) -> tokenizers.Tokenizer:
    for left, right in merges:
        unknown = next((token for token in (left, right, left + right) if token not in vocab), None)
        if unknown is not None:
            raise FileFormatError(f"{source}: merge {left!r} {right!r} needs token {unknown!r}, "
                                  "which is not in the vocabulary")
    splitter = pre_tokenizer(pre, source)
    model = guarded(source, lambda: models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Have encode() put bos before and eos after the text, when special tokens are asked for."""
    around = [token for token in (bos, eos) if token is not None]
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)])


def _add_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens if token])


def gguf_token(metadata: dict[str, Any], name: str, source: str) -> str | None:
    """The token that tokenizer.ggml.<name>_token_id names, None without that key.

    Raises:
        FileFormatError: it is no id of the vocabulary.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens", source)
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise FileFormatError(f"{source}: tokenizer.ggml.{name}_token_id is {token_id!r}; "
                              f"expected 0..{len(tokens) - 1}")
    return tokens[token_id]


def _strings(metadata: dict[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise FileFormatError(f"{source}: {key} is missing or not a list of strings")
    if len(value) > MAX_VOCAB:
        raise FileFormatError(f"{source}: {key} has {len(value)} entries; at most {MAX_VOCAB} are allowed")
    return value


def _parse_merges(lines: list[str], source: str) -> list[tuple[str, str]]:
    merges = []
    for line in lines:
        if not line or line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise FileFormatError(f"{source}: merge {line[:80]!r}; expected two tokens with a space between them")
        merges.append((left, right))
    return merges


def _parse_tiktoken(path: Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_bounded(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or len(token) > MAX_TOKEN_CHARS or token in ranks:
                raise ValueError("empty, too long or standing twice")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise FileFormatError(f"{path}: line {number} {line[:40]!r}; "
                                  f"expected base64 and a rank ({error})") from error
    if len(set(ranks.values())) != len(ranks):
        raise FileFormatError(f"{path}: a rank stands twice")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _read_bounded(path: Path) -> bytes:
    if not path.is_file():
        raise NotFoundError(f"path: no file at {str(path)!r}")
    with open(path, "rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise FileFormatError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    return data


def _check_ids(ids: Iterable[Any], path: Path) -> None:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCAB:
            raise FileFormatError(f"{path}: token id {token_id!r}; expected 0..{MAX_VOCAB - 1}")


def _byte_characters() -> dict[int, str]:
    """Byte -> the printable character that GPT-2 writes for it, in the order of GPT-2's first 256 tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# The inverse: decoding byte-level tokens one at a time, as streaming does.
CHARACTER_BYTES = {character: byte for byte, character in _byte_characters().items()}
