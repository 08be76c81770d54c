"""How byte-level BPE vocabularies split text into words before they merge bytes.

In: the name that a GGUF file (tokenizer.ggml.pre) or a tiktoken file goes by. Out: a pre-tokenizer of the
tokenizers package. Called by data.vocabulary.

Each split is a list of regular expressions, applied one after the other to the pieces that the one before
left; text that no expression matches stays a piece of its own. The expressions are those of the models'
own tokenizer.json files; the names, and which models share a split, are llama.cpp's.
"""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

from tessera.errors import UnsupportedFileError

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _llama3(digits: str) -> str:
    """The expression of Llama 3, Qwen 2 and cl100k, which differ in how many digits make a piece."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(suffix: str, digits: str) -> str:
    """The expression of o200k and Tekken: words end where lower case turns into upper case."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return (rf"{head}{_UPPER}*{_LOWER}+{suffix}|{head}{_UPPER}+{_LOWER}*{suffix}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}")


SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_llama3(r"\p{N}{1,3}"),),
    "qwen2": (_llama3(r"\p{N}"),),
    "gpt-4o": (_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "tekken": (_cased("", r"\p{N}"),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_SAME_AS = {
    "gpt-2": ("gpt2", "mpt", "olmo", "jais", "phi-2", "gigachat", "mellum", "a.x-4.0"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "cl100k"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan-dense"),
    "gpt-4o": ("llama4", "o200k"),
}
_CANONICAL = {alias: name for name, aliases in _SAME_AS.items() for alias in (name, *aliases)}

# Vocabularies that hold whole words which no merge leads to: a piece found there is not merged (llama.cpp's list).
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"})


def pre_tokenizer(name: str, source: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer called `name`: the splits, then bytes mapped to GPT-2's printable characters.

    Args:
        name: see SPLITS; llama.cpp's other names for the same splits are known too.
        source: the file, for errors.

    Raises:
        UnsupportedFileError: no such split. (Guessing one would change the tokens without a word.)
    """
    splits = SPLITS.get(_CANONICAL.get(name, name))
    if splits is None:
        known = ", ".join(sorted({*SPLITS, *_CANONICAL}))
        raise UnsupportedFileError(f"{source}: pre-tokenizer {name!r} is not known; known are {known}")
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
