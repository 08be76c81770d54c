"""Jobs of processes: how they start, fail and end."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

import tessera as ts
from tests.dist import ranks


def assert_no_rank_is_left():
    """No process of a job outlives it; the fork server and the resource tracker may."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        servers = psutil.Process().children()
        left = [child for server in servers for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {left}")


def test_ranks_know_their_place():
    assert ts.dist.spawn(ranks.speaks, 2, threads=1) == [(2, 0, 1), (2, 1, 1)]
    assert_no_rank_is_left()


@pytest.mark.parametrize(("how", "message"), [
    ("killed", r"rank 1 \(process \d+\) was killed by SIGKILL"),
    ("raises", "rank 1 failed: ValueError: no more"),
    ("exits", r"rank 1 \(process \d+\) exited with status 3"),
])
def test_a_rank_that_dies_ends_the_others_and_is_named(how, message):
    started = time.monotonic()
    with pytest.raises(ts.dist.CollectiveError, match=message):
        ts.dist.spawn(ranks.dies, 3, how)
    assert time.monotonic() - started < 20  # a bound on hanging, not a measure of speed
    assert_no_rank_is_left()


SCRIPT = """
import os, sys, signal
import torch
import tessera as ts
ts.init()
mesh = ts.dist.mesh()
total = ts.dist.all_reduce(torch.tensor([float(ts.dist.get_rank() + 1)]), mesh)
if ts.dist.get_rank() == 0:
    open(sys.argv[0] + ".out", "w").write(f"total {total.item()} {sys.argv[1:]} {__name__}")
if "die" in sys.argv and ts.dist.get_rank() == 2:
    os.kill(os.getpid(), signal.SIGKILL)
ts.dist.barrier(mesh)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_launch_runs_a_script(script):
    assert ts.dist.launch(str(script), ["a", "b"], nproc=3) == 0
    assert script.with_name("script.py.out").read_text() == "total 6.0 ['a', 'b'] __main__"


def test_launch_reports_the_rank_that_died(script, capsys):
    assert ts.dist.launch(str(script), ["die"], nproc=3) == 128 + 9
    assert "tessera: rank 2 (process" in (error := capsys.readouterr().err) and "was killed by SIGKILL" in error
    assert_no_rank_is_left()


def test_ranks_end_with_the_process_that_started_them(script):
    """Even when that is killed and can tell nobody."""
    script.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    code = f"import tessera as ts; ts.dist.launch({str(script)!r}, nproc=2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    processes = [psutil.Process(int(launcher.stdout.readline())) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(processes, timeout=10)
    launcher.stdout.close()
    assert not alive


def test_errors():
    with pytest.raises(ts.InputError, match="nproc: 0 given"):
        ts.dist.spawn(ranks.speaks, 0)
    with pytest.raises(ts.errors.NotFoundError, match=r"no file at 'nowhere\.py'"):
        ts.dist.launch("nowhere.py", nproc=2)


JOIN = """
import os, time, torch
import tessera as ts
ts.init(timeout=60)
print("joined", flush=True)
mesh, x = ts.dist.mesh(), torch.ones(1 << 16)
while True:
    x = ts.dist.all_reduce(x, mesh) / 3
"""


def test_without_a_launcher_every_survivor_names_the_dead():
    """Started by hand, as on several hosts: nobody but the ranks themselves can tell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(3):
        own = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", JOIN], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    time.sleep(0.3)
    processes[1].kill()
    for rank, process in enumerate(processes):
        _, err = process.communicate(timeout=20)
        assert process.returncode != 0
        if rank != 1:
            assert f"rank 1 (process {processes[1].pid}) died" in err
