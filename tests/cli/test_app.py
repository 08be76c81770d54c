"""The program as a process: a light start, pipes that close, signals."""

from __future__ import annotations

import signal
import subprocess
import sys

import tessera as ts

RUN = [sys.executable, "-c", "import sys; from tessera.cli import main; sys.exit(main())"]


def test_help_and_version_import_nothing_heavy():
    script = (
        "import sys; from tessera.cli import main\n"
        "assert main(['--help']) == 0 and main(['generate', '--help']) == 0 and main(['--version']) == 0\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'gguf', 'llvmlite', 'triton', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in ("generate", "chat", "info", f"tessera {ts.__version__}"))


def test_no_command_shows_help(tessera):
    code, out, err = tessera()
    assert code == 2 and "Usage: tessera" in out + err


def test_unknown_command(tessera):
    code, _, err = tessera("frobnicate")
    assert code == 2 and err.startswith("error: ") and "frobnicate" in err and err.count("\n") == 1


def test_closed_pipe_is_silent():
    process = subprocess.Popen([*RUN, "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (1, b"")


def test_unexpected_error_is_one_line(tessera, monkeypatch):
    monkeypatch.setattr("tessera.cli.info.run", lambda *a, **k: 1 // 0)
    code, _, err = tessera("info", "x")
    assert code == 2 and err == "error: ZeroDivisionError: integer division or modulo by zero (--debug shows where)\n"


def test_ctrl_c(tessera, monkeypatch):
    monkeypatch.setattr("tessera.cli.info.run", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert tessera("info", "x") == (130, "", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_out_of_memory(tessera, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("tessera.cli.info.run", fail)
    assert tessera("info", "x") == (2, "", "error: out of memory\n")
