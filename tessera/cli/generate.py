"""`tessera generate`: one prompt, one text.

In: a prompt from the arguments, a file or stdin. Out: its continuation on stdout, at once, piece by piece, or
in a JSON object. Called by cli.app.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tessera import dist, env
from tessera.cli.loading import Session, be_silent, load
from tessera.cli.options import ModelOptions, SamplingOptions
from tessera.errors import InputError, NotFoundError
from tessera.infer.engine import GenerationResult

MAX_PROMPT_BYTES = 64 << 20


def run(
    model: ModelOptions, sampling: SamplingOptions, *, prompt: str | None, file: Path | None, chat: bool,
    system: str | None, stream: bool | None, as_json: bool,
) -> None:
    """Generate and print.

    Raises:
        InputError: options that contradict each other, no or an empty prompt, or a value out of range.
        NotFoundError: the prompt's file is missing.
    """
    if system is not None and not chat:
        raise InputError("--system: given without --chat; a plain prompt has no system message")
    for name, clashes in (("--json", as_json), ("--num-beams above 1", sampling.num_beams > 1)):
        if stream and clashes:
            raise InputError(f"--stream: given together with {name}, whose text is known only at the end")
    text = read_prompt(prompt, file)
    if stream is None:
        stream = sys.stdout.isatty() and sampling.num_beams == 1 and not as_json
    if model.tp > 1:
        dist.spawn(_on_rank, model.tp, model, sampling, text, chat, system, stream, as_json, threads=model.threads,
                   traces=env.get("TESSERA_DEBUG"))
    else:
        _speak(model, sampling, text, chat, system, stream, as_json)


def _on_rank(*arguments: Any) -> None:
    """What each of several ranks does: all compute, the first one speaks."""
    dist.init()
    if dist.get_rank() > 0:
        be_silent()
    _speak(*arguments)


def _speak(
    model: ModelOptions, sampling: SamplingOptions, text: str, chat: bool, system: str | None, stream: bool,
    as_json: bool,
) -> None:
    session = load(model)
    ids = prompt_ids(session, text, chat=chat, system=system)
    options = sampling.arguments(len(ids), session.engine.config.max_seq_len)
    if as_json:
        print(json.dumps(_report(session, ids, options), ensure_ascii=False))
    elif stream:
        _stream(session, ids, options)
    else:
        result = session.engine.generate_detailed([ids], tokenizer=session.tokenizer, **options)
        print(_text(result))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place that was named; else from stdin, unless that is a terminal.

    Raises:
        InputError: two places, none, an empty text, one that is not UTF-8, or one above 64 MiB.
        NotFoundError: there is no such file.
    """
    if prompt is not None and file is not None:
        raise InputError("prompt: given twice, as an argument and as --file; expected one")
    if prompt is not None:
        if not prompt:
            raise InputError("prompt: '' given; expected at least one character")
        return prompt
    if file is None or str(file) == "-":
        if sys.stdin.isatty() and file is None:
            raise InputError("prompt: none given; expected an argument, --file, or text on stdin")
        name, data = "stdin", sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    elif not file.is_file():
        raise NotFoundError(f"--file: no file at {str(file)!r}")
    else:
        with file.open("rb") as opened:
            name, data = str(file), opened.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"prompt: {name} holds more than {MAX_PROMPT_BYTES >> 20} MiB")
    if not data:
        raise InputError(f"prompt: {name} is empty; expected at least one character")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"prompt: {name} is not UTF-8 (byte {error.start})") from None


def prompt_ids(session: Session, text: str, *, chat: bool, system: str | None) -> list[int]:
    """The text, or the chat of which it is the user's message, as token ids."""
    if not chat:
        return session.tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return session.tokenizer.apply_chat_template(messages)


def _stream(session: Session, ids: list[int], options: dict[str, Any]) -> None:
    try:
        for piece in session.engine.stream(ids, tokenizer=session.tokenizer, **options):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _text(result: GenerationResult) -> str:
    assert result.texts is not None  # a tokenizer was given
    return result.texts[0]


def _report(session: Session, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = session.engine.generate_detailed([ids], tokenizer=session.tokenizer, **options)
    seconds = time.perf_counter() - start
    n_new = len(result.new_tokens[0])
    return {
        "text": _text(result), "finish_reason": result.finish_reasons[0], "prompt_tokens": len(ids),
        "new_tokens": n_new, "dtype": session.dtype, "load_seconds": round(session.load_seconds, 3),
        "generate_seconds": round(seconds, 3), "tokens_per_second": round(n_new / seconds, 2),
    }
