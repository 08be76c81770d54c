"""`tessera chat`: a conversation with a model.

In: lines from a terminal or a pipe. Out: streamed answers on stdout, notes on stderr. Called by cli.app, and
by cli.chat_ranks for several ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from tessera.cli.loading import Session, load
from tessera.cli.options import ModelOptions, SamplingOptions
from tessera.errors import InputError, TesseraError

HELP = """\
/help          this list
/reset         forget the conversation, keep the system message
/system TEXT   set the system message and forget the conversation; without TEXT, remove it
/exit          end (so do Ctrl-D, and Ctrl-C twice at the prompt)
Ctrl-C stops an answer. Everything else is said to the model."""


def run(model: ModelOptions, sampling: SamplingOptions, *, system: str | None) -> None:
    """Read, answer, repeat, until the input ends.

    Raises:
        TesseraError: the model cannot be loaded; or, when the input is not a terminal, a turn fails.
    """
    converse(Conversation(load(model), sampling, system).take)


def converse(take: Callable[[str], bool]) -> None:
    """Give each line of stdin to `take`, until it returns False or the input ends.

    Raises:
        TesseraError: `take` raised it, and the input is not a terminal.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # history and editing for input()
        _note("Ctrl-D ends, /help lists the commands.")
    was_interrupted = False
    while True:
        try:
            line = input("> ") if is_terminal else _next_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                return
            was_interrupted = True
            _note("\nCtrl-C again, Ctrl-D or /exit ends.")
            continue
        was_interrupted = False
        try:
            if not take(line):
                return
        except TesseraError as error:
            if not is_terminal:
                raise
            _note(f"error: {error}")


class Conversation:
    """The messages so far, and what a line of input does to them.

    Args:
        session: the model.
        sampling: how answers are made.
        system: the system message, or None.
        is_stopped: asked after each piece of an answer, whether it ends there.

    Raises:
        TesseraError: the model has no chat template.
    """

    def __init__(
        self, session: Session, sampling: SamplingOptions, system: str | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        session.tokenizer.apply_chat_template([{"role": "user", "content": "?"}])  # fails now if there is no template
        self.session, self.sampling, self.system, self._is_stopped = session, sampling, system, is_stopped
        self.turns: list[dict[str, str]] = []  # user and assistant by turns

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False when the conversation is to end.

        Raises:
            TesseraError: an unknown command, or the message cannot be answered; it is then forgotten.
        """
        line = line.strip()
        name, _, argument = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            _note(HELP)
        elif name == "/reset":
            self.turns.clear()
        elif name == "/system":
            self.system = argument.strip() or None
            self.turns.clear()
        elif name.startswith("/"):
            raise InputError(f"{name}: no such command; /help lists them")
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        """Print the model's answer; Ctrl-C ends it where it is."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            ids, options = self._fit()
            for piece in self.session.engine.stream(ids, tokenizer=self.session.tokenizer, **options):
                pieces.append(piece)
                print(piece, end="", flush=True)
                if self._is_stopped():
                    break
        except KeyboardInterrupt:
            pass
        except TesseraError:
            self.turns = before
            raise
        print(flush=True)
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _fit(self) -> tuple[list[int], dict]:
        """Token ids of the conversation and generate's options; the oldest turns go when it grows too long."""
        limit = self.session.engine.config.max_seq_len
        while True:
            ids = self.session.tokenizer.apply_chat_template(self.messages)
            options = self.sampling.arguments(len(ids), limit)
            wanted = self.sampling.max_new_tokens or min(options["max_new_tokens"], limit // 4)
            if len(ids) + wanted <= limit or len(self.turns) < 3:
                return ids, options
            del self.turns[:2]
            _note("(the context is full: the oldest turn is forgotten)")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if there is one, and the turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
