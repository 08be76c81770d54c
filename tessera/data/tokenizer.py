"""Tokenizer: text to token ids and back, chats to prompts.

In: a Hugging Face folder, a GGUF file, or a tiktoken file (`load_tokenizer`), or GPT-2's own vocabulary
(`GPT2Tokenizer`). Out: lists of ids for models and engines, text for people. Called by infer, serve, cli and
training data. The byte-pair merging itself is the tokenizers package's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
import torch

from tessera.data import vocabulary
from tessera.data.chat import MAX_TEMPLATE_CHARS, ChatTemplate
from tessera.errors import FileFormatError, InputError, NotFoundError
from tessera.formats.gguf import open_gguf
from tessera.formats.json import read_json_object

_ROLES = ("bos", "eos", "pad", "unk")
_GGUF_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_MAX_CONFIG_BYTES = 32 << 20  # tokenizer_config.json repeats every added token


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; thread-safe, since nothing changes after that.

    Args:
        backend: the tokenizer of the tokenizers package.
        special: "bos", "eos", "pad", "unk" -> token, where the vocabulary has one.
        eos_token_ids: every id that ends a text or a turn; default the eos token's.
        chat_template: Jinja source of the chat template.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: ids, None where there is no such token.
        special_tokens: every token that decode can skip -> id.
        vocab_size: one more than the largest id.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] | None = None, chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        ids = {role: backend.token_to_id(token) for role, token in (special or {}).items()}
        self.special = {role: token for role, token in (special or {}).items() if ids[role] is not None}
        self.bos_token_id, self.eos_token_id = ids.get("bos"), ids.get("eos")
        self.pad_token_id, self.unk_token_id = ids.get("pad"), ids.get("unk")
        default = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*default, *(eos_token_ids or ()))))
        self.special_tokens = {
            token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.chat_template = chat_template
        self._chat = None if chat_template is None else ChatTemplate(chat_template)
        self._special_ids = frozenset(self.special_tokens.values())
        self._is_byte_level = type(backend.decoder).__name__ == "ByteLevel"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Names of special tokens in it, such as "<|im_end|>", become those tokens.

        Args:
            text: any string; lone surrogates become U+FFFD.
            add_special_tokens: put bos or eos around the text where the vocabulary's own rules say so.

        Raises:
            InputError: not a string.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None or isinstance(texts, str):
            raise InputError(f"text: {type(texts if wrong is None else wrong).__name__} given; expected a string")
        clean = [text.encode("utf-8", "replace").decode() if not text.isascii() else text for text in texts]
        return [e.ids for e in self.backend.encode_batch_fast(clean, add_special_tokens=add_special_tokens)]

    def batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, torch.Tensor]:
        """Prompts of different lengths as one left-padded batch, for GPTInference.generate.

        Returns:
            {"input_ids": [B, S] int64, "attention_mask": [B, S] int64, 0 for padding}.
        """
        rows = self.encode_batch(texts, add_special_tokens)
        length = max((len(row) for row in rows), default=0)
        pad = next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0)
        ids = torch.full((len(rows), length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, length - len(row):] = torch.tensor(row, dtype=torch.int64)
            mask[i, length - len(row):] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids: Iterable[int] | torch.Tensor | int, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        Args:
            ids: a list, a 1-D tensor, or one id.
            skip_special_tokens: leave special tokens out.

        Raises:
            InputError: a tensor of more than one dim, a negative id, or something that is no id.
        """
        return self.backend.decode(_id_list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for, where every token stands for fixed bytes (byte-level vocabularies).

        Decoding is then the concatenation of these bytes, read as UTF-8. None for other vocabularies.
        """
        if not self._is_byte_level:
            return None
        token = self.backend.id_to_token(token_id) or ""
        try:
            return bytes(vocabulary.CHARACTER_BYTES[character] for character in token)
        except KeyError:  # an added token, written as it is
            return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out by default."""
        return token_id in self._special_ids

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = ..., tokenize: Literal[True] = ...,
        **variables: Any) -> list[int]: ...
    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = ..., *, tokenize: Literal[False],
        **variables: Any) -> str: ...
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A chat as the model was trained to read it.

        Args:
            messages: dicts with "role" and "content" (and what else the template knows, such as tool calls).
            add_generation_prompt: end with the start of the assistant's turn.
            tokenize: return ids; otherwise the text.
            variables: more values for the template, such as tools or documents.

        Raises:
            InputError: no messages, one without a role, or the template refuses them.
            NotFoundError: this tokenizer has no chat template.
        """
        if self._chat is None:
            raise NotFoundError("chat_template: this tokenizer has none; use encode(), or load one that has")
        if isinstance(messages, (str, Mapping)) or not messages:
            raise InputError("messages: expected a list of at least one dict with 'role' and 'content'")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"messages[{i}]: expected a dict with a 'role' string and a 'content'")
        named = {f"{role}_token": token for role, token in self.special.items()}
        text = self._chat.render(
            {**named, "messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables})
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers read."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {f"{role}_token": token for role, token in self.special.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {"tokenizer.json": self.backend.to_str(),
                 "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2)}
        for name, text in files.items():
            unfinished = target / f".{name}.{os.getpid()}"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(target / name)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(vocab_size={self.vocab_size}, special={self.special}, "
                f"chat_template={self.chat_template is not None})")


class GPT2Tokenizer(Tokenizer):
    """The tokenizer of GPT-2 and GPT-3: byte-level BPE with 50,257 tokens.

    The vocabulary comes with this package, so no file is needed.

    Args:
        path: a vocabulary to use in its place, see `load_tokenizer`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        if path is None:
            end = "<|endoftext|>"
            super().__init__(vocabulary.gpt2(), {"bos": end, "eos": end, "unk": end})
        else:
            other = load_tokenizer(path)
            super().__init__(other.backend, other.special, other.eos_token_ids, other.chat_template)


def load_tokenizer(
    path: str | os.PathLike[str], *, pre: str | None = None, special_tokens: dict[str, int] | None = None,
) -> Tokenizer:
    """The tokenizer in a file or folder.

    Args:
        path: a Hugging Face folder (tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja where present), a tokenizer.json, a GGUF file, or a
            tiktoken file of ranks.
        pre, special_tokens: only for tiktoken files of unknown names: how text is split
            (see data.pretokenizers), and the special tokens.

    Raises:
        NotFoundError: there is no such file, or the folder holds no tokenizer.
        FileFormatError: the file is damaged, hostile or contradicts itself.
        UnsupportedFileError: a kind of vocabulary that is not known.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise NotFoundError(f"path: no file or folder at {str(path)!r}")
    if path.suffix == ".json":
        return _from_folder(path.parent, path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    backend = vocabulary.from_tiktoken(path, pre, special_tokens)
    end = "<|endoftext|>"
    return Tokenizer(backend, {"bos": end, "eos": end})


def _from_gguf(path: Path) -> Tokenizer:
    with open_gguf(path) as file:
        metadata = file.metadata
    backend = vocabulary.from_gguf(metadata, str(path))
    special = {}
    for role, name in _GGUF_NAMES.items():
        token = vocabulary.gguf_token(metadata, name, str(path))
        if token is not None:
            special[role] = token
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise FileFormatError(f"{path}: tokenizer.chat_template is {type(template).__name__}; expected a string")
    return Tokenizer(backend, special, [i for i in ends if type(i) is int], template)


def _from_folder(folder: Path, json_path: Path | None = None) -> Tokenizer:
    json_path = json_path or folder / "tokenizer.json"
    if json_path.is_file():
        backend = vocabulary.from_tokenizer_json(json_path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = vocabulary.from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
    else:
        raise NotFoundError(f"path: {str(folder)!r} holds neither tokenizer.json nor vocab.json and merges.txt")
    config = _optional_json(folder / "tokenizer_config.json")
    named = {**_optional_json(folder / "special_tokens_map.json"), **config}
    special = {}
    for role in _ROLES:
        token = named.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[role] = token
    ends = _optional_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return Tokenizer(backend, special, [i for i in ends if type(i) is int], _template(folder, config))


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the config's; of several named ones, "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with open(file, encoding="utf-8", errors="strict") as stream:
            try:
                return stream.read(MAX_TEMPLATE_CHARS + 1)
            except UnicodeDecodeError as error:
                raise FileFormatError(f"{file}: not UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise FileFormatError(f"{folder}: chat_template is {type(template).__name__}; expected a string")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, _MAX_CONFIG_BYTES) if path.is_file() else {}


def _id_list(ids: Iterable[int] | torch.Tensor | int) -> list[int]:
    if isinstance(ids, torch.Tensor):
        if ids.dim() > 1 or ids.is_floating_point():
            raise InputError(f"ids: {tuple(ids.shape)} {ids.dtype} given; expected [tokens] integers (one row)")
        ids = ids.tolist()
    values = [ids] if isinstance(ids, int) else list(ids)
    wrong = next((i for i in values if not isinstance(i, int) or not 0 <= i < 1 << 32), None)
    if wrong is not None:
        raise InputError(f"ids: {wrong!r} given; expected token ids, integers of at least 0")
    return values
