"""`tessera chat`: commands, history, interruption, a context that fills up."""

from __future__ import annotations

import io
import shutil

import pytest

from tessera.cli.chat import Conversation
from tessera.cli.loading import load
from tessera.cli.options import ModelOptions, SamplingOptions
from tessera.errors import InputError


@pytest.fixture(scope="module")
def session(model_folder):
    return load(ModelOptions(path=str(model_folder), dtype="f32"))


@pytest.fixture
def conversation(session):
    return Conversation(session, SamplingOptions(greedy=True, max_new_tokens=6), "Be kind.")


def _answer(session, messages, count=6):
    ids = session.tokenizer.apply_chat_template(messages)
    return session.engine.generate_detailed(
        [ids], count, do_sample=False, tokenizer=session.tokenizer).texts[0]


def test_history_reaches_the_model(conversation, session, capsys):
    system, first = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "one"}
    assert conversation.take("one\n")
    answer = _answer(session, [system, first])
    assert capsys.readouterr().out == answer + "\n"
    assert conversation.take("two")
    messages = [system, first, {"role": "assistant", "content": answer}, {"role": "user", "content": "two"}]
    assert capsys.readouterr().out == _answer(session, messages) + "\n"
    assert len(conversation.turns) == 4


def test_commands(conversation):
    conversation.take("one")
    conversation.take("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    conversation.take("/system Be quick.")
    assert conversation.messages == [{"role": "system", "content": "Be quick."}]
    conversation.take("/system")
    assert conversation.messages == []
    assert conversation.take("   ") and conversation.messages == []
    assert not conversation.take("/exit")


def test_help_names_every_command(conversation, capsys):
    conversation.take("/help")
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("/reset", "/system", "/exit", "Ctrl-C"))


def test_unknown_command(conversation):
    with pytest.raises(InputError, match="/nope: no such command"):
        conversation.take("/nope now")


def test_ctrl_c_keeps_what_was_said(conversation, session, monkeypatch, capsys):
    def pieces(*args, **kwargs):
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(session.engine, "stream", pieces)
    assert conversation.take("one")
    assert capsys.readouterr().out == "half an\n"
    assert conversation.turns[-1] == {"role": "assistant", "content": "half an"}


def test_a_message_that_cannot_be_answered_is_forgotten(conversation):
    conversation.take("one")
    before = list(conversation.turns)
    with pytest.raises(InputError, match="max_seq_len"):
        conversation.take("x" * 200)
    assert conversation.turns == before


def test_oldest_turns_go_when_the_context_is_full(conversation, session):
    for i in range(12):
        conversation.take(f"message number {i}")
    assert conversation.turns[-2]["content"] == "message number 11"
    assert 2 <= len(conversation.turns) < 24
    ids = session.tokenizer.apply_chat_template(conversation.messages[:-1])  # what was answered
    assert len(ids) <= session.engine.config.max_seq_len


def test_piped(tessera, model_folder, session, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/reset\n\none\n/exit\nnever\n"))
    code, out, err = tessera("chat", "-m", model_folder, "--dtype", "f32", "--greedy", "-n", 6)
    answer = _answer(session, [{"role": "user", "content": "one"}])
    assert (code, out, err) == (0, f"{answer}\n{answer}\n", "")


def test_piped_error_ends(tessera, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/nope\n"))
    code, _, err = tessera("chat", "-m", model_folder)
    assert code == 2 and err == "error: /nope: no such command; /help lists them\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_at_the_prompt(tessera, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", _Terminal())
    events = iter([KeyboardInterrupt, "/reset", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def read(prompt):
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", read)
    assert tessera("chat", "-m", model_folder)[0] == 0
    assert next(events) == "never"


def test_ctrl_d_ends(tessera, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", _Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert tessera("chat", "-m", model_folder)[0] == 0


def test_model_without_template(tessera, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "plain")
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config.replace('"chat_template"', '"_"'))
    code, _, err = tessera("chat", "-m", folder)
    assert code == 2 and "chat_template" in err
