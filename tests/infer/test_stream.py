"""TextStream: pieces of text are whole characters, and together what decode gives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import tessera as ts
from tessera.infer.stream import TextStream

GPT2 = ts.tokenizer.GPT2Tokenizer()


def pieces(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=40))
def test_random_tokens_stream_as_they_decode(ids):
    """Random tokens are mostly broken UTF-8."""
    assert "".join(pieces(GPT2, ids)) == GPT2.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aé中🙂👩‍👩‍👧\n ", max_size=40))
def test_pieces_are_whole_characters(text):
    out = pieces(GPT2, GPT2.encode(text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_text_comes_as_soon_as_it_is_complete():
    ids = GPT2.encode("a🦩!")  # the emoji is several tokens
    assert len(ids) > 3
    stream = TextStream(GPT2)
    assert [stream.push(i) for i in ids] == ["a", *[""] * (len(ids) - 3), "🦩", "!"]


@pytest.fixture(scope="module")
def fallback():
    """A vocabulary that is not byte-level: SentencePiece pieces with byte fallback."""
    words = ["▁he", "llo", "▁", "▁wor", "ld", "é", "x"]
    vocab = {token: i for i, token in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return ts.tokenizer.Tokenizer(backend)


@pytest.mark.parametrize("seed", range(30))
def test_byte_fallback_streams_as_it_decodes(fallback, seed):
    rng = random.Random(seed)
    ids = []
    for _ in range(20):
        ids += rng.choice([[rng.randint(256, 262)], [256, 257], list("🙂".encode()), list("中".encode()), [10]])
    assert "".join(pieces(fallback, ids)) == fallback.decode(ids)


@pytest.mark.parametrize("text, stop, expected", [
    ("The end. Never seen", ("end.",), "The "),
    ("one\n\nUser: two", ("\nUser:", "###"), "one\n"),
    ("abcabcabd!", ("abcabd",), "abc"),
    ("no stop here", ("stops",), "no stop here"),
    ("ends with a sto", ("stop",), "ends with a sto"),
    ("🙂🙂🙃 x", ("🙃",), "🙂🙂"),
    ("first of both", ("both", "of"), "first "),
])
def test_stop_texts_across_tokens(text, stop, expected):
    """One token a character (a byte even, for the emoji), so that every stop text spans tokens."""
    ids = [GPT2.encode(bytes([b]).decode("latin-1"))[0] if b < 128 else byte_id(b) for b in text.encode()]
    out = pieces(GPT2, ids, stop)
    assert "".join(out) == expected
    so_far = ""
    for piece in out:  # nothing is shown that has to be taken back
        so_far += piece
        assert expected.startswith(so_far)


def byte_id(byte: int) -> int:
    return next(i for i in range(256) if GPT2.token_bytes(i) == bytes([byte]))


def test_special_tokens_are_left_out():
    assert "".join(pieces(GPT2, [15496, 50256, 995])) == "Hello world"
