"""A rank is killed in the middle of an all-reduce: every survivor ends by itself, soon, and names it."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch.distributed as torch_dist

from tests.dist import ranks
from tests.dist.test_launch import assert_no_rank_is_left


def shared_memory():
    """Segments with names, and how many without one are open in processes of ours."""
    names = set(os.listdir("/dev/shm"))
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if "memfd:tessera" in target:
            names.add(target)
    return names


def kill_one(generator, n):
    """One job without a launcher; who is killed, when and at which size is drawn. The test holds the store."""
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tessera.dist"])
    n_floats = generator.choice([64, 1 << 14, 1 << 20])
    processes, pipes = [], []
    for rank in range(n):
        receiver, sender = context.Pipe(duplex=False)
        environment = {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                       "TESSERA_SHARED_MEMORY": os.environ["TESSERA_SHARED_MEMORY"]}
        process = context.Process(target=ranks.reduces_until_told, args=(sender, environment, n_floats))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    assert [pipe.recv() for pipe in pipes] == ["joined"] * n
    victim = generator.randrange(n)
    time.sleep(0.2 * generator.random())
    os.kill(processes[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    for rank, (process, pipe) in enumerate(zip(processes, pipes)):
        process.join(10 - (time.monotonic() - killed))
        assert process.exitcode == (-signal.SIGKILL if rank == victim else 3), f"rank {rank}: {process.exitcode}"
        if rank != victim:
            assert f"rank {victim} (process {processes[victim].pid}) died" in pipe.recv()
        pipe.close()


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shared", ["1", "0"])
def test_every_survivor_ends_and_names_the_dead(shared, rounds, monkeypatch):
    monkeypatch.setenv("TESSERA_SHARED_MEMORY", shared)
    generator, before = random.Random(rounds), shared_memory()
    for turn in range(rounds):
        kill_one(generator, 3 if turn % 4 == 0 else 2)
    assert_no_rank_is_left()
    assert shared_memory() == before
