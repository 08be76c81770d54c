"""TextStream: token ids in, text out, piece by piece.

In: a row's tokens as they are generated. Out: pieces of text that never hold half a character, and that end
before a stop text. Called by infer.engine and the server.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tessera.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens one at a time. The pieces together are the tokens' `decode`, up to the first stop text.

    Text is held back while it may be part of a character whose bytes are not complete, or the beginning of
    a stop text.

    Args:
        tokenizer: whose tokens these are.
        stop: texts at which the stream ends; they are not part of its output.
        skip_special_tokens: leave special tokens out.

    Attributes:
        is_stopped: a stop text was found; nothing more comes out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.is_stopped = False
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special_tokens
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For vocabularies that are not byte-level: recent tokens, of which the first _n_done are decoded.
        self._recent: list[int] = []
        self._n_done = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        if self.is_stopped or (self._skip and self._tokenizer.is_special(token_id)):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        return self._release(self._utf8.decode(data) if data is not None else self._decode_window(token_id))

    def finish(self) -> str:
        """What is still held back, once no more tokens come."""
        if self.is_stopped:
            return ""
        rest = self._utf8.decode(b"", final=True)
        if self._n_done < len(self._recent):
            rest += self._window_text(final=True)
        return self._release(rest, final=True)

    def _decode_window(self, token_id: int) -> str:
        self._recent.append(token_id)
        return self._window_text(final=False)

    def _window_text(self, final: bool) -> str:
        """Text of the recent tokens beyond that of the first _n_done of them."""
        decode = self._tokenizer.decode
        old = decode(self._recent[: self._n_done], self._skip)
        new = decode(self._recent, self._skip)
        if not final and (new.endswith(_REPLACEMENT) or len(new) <= len(old)):
            return ""
        self._recent = self._recent[self._n_done:]  # begins where a piece began, so at a whole character
        self._n_done = len(self._recent)
        return new[len(old):]

    def _release(self, text: str, final: bool = False) -> str:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        n_held = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held:]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
