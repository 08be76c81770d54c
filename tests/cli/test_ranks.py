"""`generate --tp`, `chat --tp` and `launch`: several processes, one output."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import tessera as ts
from tessera import dist
from tessera.cli import chat_ranks
from tessera.cli.chat import Conversation
from tessera.cli.loading import load
from tessera.cli.options import ModelOptions, SamplingOptions


def run(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from tessera.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, input=text)


def test_generate_on_two_ranks(model_folder):
    tokenizer = ts.load_tokenizer(model_folder)
    engine = ts.GPTInference(ts.load_model(model_folder))
    expected = engine.generate_detailed([tokenizer.encode("abc")], 9, do_sample=False, tokenizer=tokenizer).texts[0]
    done = run("generate", "-m", model_folder, "--dtype", "f32", "--tp", 2, "--greedy", "-n", 9, "--stream", "abc")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_launch_passes_arguments_and_status(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, tessera as ts\nts.init()\n"
                      "if ts.dist.get_rank() == 1: print(ts.dist.get_world_size(), sys.argv[1:])\n"
                      "sys.exit(3 if ts.dist.get_rank() == 0 else 0)\n")
    done = run("launch", "--nproc", 2, script, "--nproc", 7, "x")
    assert done.stdout == "2 ['--nproc', '7', 'x']\n"
    assert done.returncode == 3 and "rank 0" in done.stderr and "exited with status 3" in done.stderr


def test_chat_on_two_ranks(tessera, model_folder, monkeypatch):
    text = "one\n/reset\n\ntwo\nthree\n/system Be kind.\none\n/exit\nnever\n"
    options = ("-m", str(model_folder), "--dtype", "f32", "--greedy", "-n", "6")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code, expected, _ = tessera("chat", *options)
    done = run("chat", *options, "--tp", 2, text=text)
    assert (done.returncode, done.stdout, done.stderr) == (code, expected, "") and expected.count("\n") >= 4


def test_chat_ends_with_a_turn_that_fails(model_folder):
    done = run("chat", "-m", model_folder, "--tp", 2, text="/nope\n")
    assert done.returncode == 2 and done.stderr.startswith("error: rank 0 failed: InputError: /nope: no such command")


def interrupted_answer(path: str) -> tuple[list[str], list[str], bool]:
    """Ctrl-C, heard by the first rank after its third piece: what both ranks have said by then, and after it."""
    dist.init()
    session = load(ModelOptions(path=path, dtype="f32", tp=2))
    stop = chat_ranks.Interrupt(session.engine.mesh)
    conversation = Conversation(session, SamplingOptions(greedy=True, max_new_tokens=6), is_stopped=stop.is_agreed)
    pieces = iter("abcdefgh")

    def stream(*_, **__):
        for count, piece in enumerate(pieces):
            if count == 2 and dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    object.__setattr__(session.engine, "stream", stream)
    with stop.heard():
        conversation.take("one")
    is_restored = signal.getsignal(signal.SIGINT) is not stop.hear
    return [turn["content"] for turn in conversation.turns], list(pieces), is_restored


def test_ctrl_c_ends_an_answer_on_all_ranks_at_the_same_place(model_folder):
    results = dist.spawn(interrupted_answer, 2, str(model_folder))
    assert results == [(["one", "abc"], list("defgh"), True)] * 2
