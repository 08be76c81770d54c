"""`generate --tp` and `launch`: several processes, one output."""

from __future__ import annotations

import subprocess
import sys

import tessera as ts


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from tessera.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


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


def test_chat_says_that_it_runs_in_one_process(tessera, model_folder):
    code, _, err = tessera("chat", "-m", model_folder, "--tp", 2)
    assert code == 2 and "--tp: 2 given; chat runs in one process" in err
