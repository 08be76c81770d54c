"""The tokenizer of a Hugging Face folder as GGUF metadata.

In: a folder with tokenizer.json (and tokenizer_config.json). Out: the tokenizer.* keys of a GGUF file.
Called by models.convert; data.tokenizer reads the keys back.

Two kinds of tokenizer.json are known: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM; GGUF's model "gpt2")
and BPE with byte fallback (Llama 2, Mistral, TinyLlama; GGUF's model "llama", SentencePiece).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.errors import FileFormatError, UnsupportedFileError
from tessera.formats.json import read_json_object

_MAX_BYTES = 128 << 20
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type


def vocabulary_metadata(folder: Path, vocab_size: int, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer.* metadata of the folder's tokenizer; empty when it has no tokenizer.json.

    Args:
        folder: a Hugging Face folder.
        vocab_size: rows of the embedding; ids that the tokenizer does not use get placeholders.
        pre: tokenizer.ggml.pre, where it cannot be told from tokenizer.json.

    Raises:
        FileFormatError: tokenizer.json is damaged.
        UnsupportedFileError: it is not BPE, has no merges, or splits text in a way that GGUF has no known name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    parsed = read_json_object(path, _MAX_BYTES)
    model = parsed.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedFileError(f"{path}: only BPE tokenizers can be written to GGUF")
    tokens, kinds = _tokens(parsed, model, vocab_size, path)
    merges = [_merge(merge, path) for merge in model.get("merges") or []]
    if not merges:
        raise UnsupportedFileError(f"{path}: no merges; GGUF has no form for a vocabulary that never merges")
    steps = [step.get("type") for step in _steps(parsed.get("pre_tokenizer"))]
    if model.get("byte_fallback"):
        metadata = _sentencepiece(parsed, tokens, merges)
    elif "ByteLevel" in steps:
        metadata = {"model": "gpt2", "pre": pre or _pre_name(parsed, path), "merges": [" ".join(m) for m in merges]}
    else:
        raise UnsupportedFileError(f"{path}: neither byte-level BPE nor BPE with byte fallback")
    metadata |= {"tokens": tokens, "token_type": kinds, **_added_around(parsed, tokens)}
    if model.get("unk_token") in tokens:
        metadata["unknown_token_id"] = tokens.index(model["unk_token"])
    found = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value != []}
    template = _template(folder)
    return found | ({"tokenizer.chat_template": template} if template else {})


def _tokens(
    parsed: dict[str, Any], model: dict[str, Any], vocab_size: int, path: Path,
) -> tuple[list[str], list[int]]:
    """All tokens in the order of their ids, and their types; ids that nothing uses get a placeholder."""
    ids = dict(model["vocab"])
    special: dict[str, bool] = {}
    for entry in parsed.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise FileFormatError(f"{path}: added_tokens must hold objects with content and id")
        ids[entry["content"]] = entry.get("id")
        special[entry["content"]] = bool(entry.get("special"))
    if any(type(i) is not int or not 0 <= i < vocab_size for i in ids.values()) or len(set(ids.values())) < len(ids):
        raise FileFormatError(f"{path}: token ids must be distinct and in 0..{vocab_size - 1} (the embedding's rows)")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    unknown = model.get("unk_token")
    for token, i in ids.items():
        tokens[i] = token
        if token == unknown:
            kinds[i] = _UNKNOWN
        elif token in special:
            kinds[i] = _CONTROL if special[token] else _USER_DEFINED
        else:
            is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
            kinds[i] = _BYTE if is_byte else _NORMAL
    return tokens, kinds


def _merge(merge: Any, path: Path) -> tuple[str, str]:
    """tokenizers writes merges as pairs, older versions as one string."""
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise FileFormatError(f"{path}: merge {str(merge)[:40]!r}; expected two tokens")
    return pair


def _sentencepiece(parsed: dict[str, Any], tokens: list[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """GGUF's "llama" model has scores where tokenizer.json has merges: the best merge gets the highest score."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = [-float(rank[token]) if token in rank else 0.0 for token in tokens]
    prepends = any(step.get("type") in ("Prepend", "Metaspace") and step.get("prepend_scheme") != "never"
                   for key in ("normalizer", "pre_tokenizer") for step in _steps(parsed.get(key)))
    return {"model": "llama", "scores": scores, "add_space_prefix": prepends}


def _pre_name(parsed: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for how tokenizer.json splits text into words."""
    steps = list(_steps(parsed.get("pre_tokenizer")))
    patterns = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    digits = any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps)
    gpt2 = any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps)
    if patterns and patterns[-1].startswith("'s|'t|'re|'ve|'m|'ll|'d| ?"):
        gpt2, digits = True, digits or r"\p{N}" in patterns
        patterns = [p for p in patterns[:-1] if p != r"\p{N}"]
    if gpt2 and not patterns:
        return "smollm" if digits else "gpt-2"
    if len(patterns) == 1 and not gpt2 and not digits and r"[^\r\n\p{L}\p{N}]?\p{L}+|" in patterns[0]:
        return "llama-bpe" if r"|\p{N}{1,3}|" in patterns[0] else "qwen2"
    raise UnsupportedFileError(f"{path}: its pre-tokenizer has no known name in GGUF; give pre=")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or processor, out of their Sequences."""
    if not isinstance(part, dict):
        return
    inner = next((part[key] for key in ("pretokenizers", "normalizers", "processors") if key in part), None)
    if part.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from _steps(step)
    else:
        yield part


def _added_around(parsed: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Whether encoding puts a special token before and after the text, and which."""
    found: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    for step in _steps(parsed.get("post_processor")):
        single = step.get("single")
        if step.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
            continue
        for role, piece in (("bos", single[0]), ("eos", single[-1])):
            token = (piece.get("SpecialToken") or {}).get("id") if isinstance(piece, dict) else None
            if token in tokens:
                found |= {f"add_{role}_token": True, f"{role}_token_id": tokens.index(token)}
    return found


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file() and path.stat().st_size <= 1 << 20:
        return path.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json_object(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None
