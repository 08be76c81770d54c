"""The job that this process is a rank of: joining it, its size, and leaving it.

In: the environment that `tessera launch`, torchrun or `dist.spawn` sets (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT, LOCAL_RANK). Out: torch.distributed's process group and a watchdog over the other ranks. Called
as `ts.init()`. Without that environment the process is a job of its own, of size 1.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from tessera.dist import shared
from tessera.dist.watchdog import Watchdog
from tessera.errors import InputError

DEFAULT_TIMEOUT = 300.0  # seconds
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_watchdog: Watchdog | None = None
_store: Any = None
_n_joined = 0  # jobs so far, in this process: names in a store that outlives a job are not used twice
_lines: dict[tuple[int, ...], shared.SharedLine | None] = {}
_timeout = datetime.timedelta(seconds=DEFAULT_TIMEOUT)


def init(backend: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the job, once; without a launcher's environment this does nothing.

    Args:
        backend: torch's name; default "gloo", with "nccl" for CUDA tensors where there are GPUs.
        timeout: seconds that a collective waits for the other ranks before it raises and names who is missing.

    Raises:
        InputError: the environment contradicts itself, or timeout is not positive.
        CollectiveError: the other ranks do not come.
    """
    global _watchdog, _store, _n_joined, _timeout
    if is_initialized() or "RANK" not in os.environ:
        return
    rank, size = _environment_int("RANK"), _environment_int("WORLD_SIZE")
    if not 0 <= rank < size:
        raise InputError(f"environment: RANK={rank} with WORLD_SIZE={size}; expected 0..WORLD_SIZE - 1")
    if not timeout > 0:
        raise InputError(f"timeout: {timeout} given; expected seconds above 0")
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _environment_int("MASTER_PORT")
    if host in _LOOPBACK:
        _use_loopback()
    if torch.cuda.is_available():
        torch.cuda.set_device(_environment_int("LOCAL_RANK", rank) % torch.cuda.device_count())
    backend = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _timeout = datetime.timedelta(seconds=timeout)
    # With torchrun and `tessera launch` the store lives in the launcher and outlives every rank.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = torch_dist.TCPStore(host, port, size, is_master=is_host, timeout=_timeout, wait_for_workers=False)
    _store, _n_joined = store.clone(), _n_joined + 1
    _watchdog = Watchdog(store.clone(), rank, size, timeout=timeout)
    with _watchdog.watching("init", "world", (), range(size)):
        torch_dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout)
    atexit.register(shutdown)


def shutdown() -> None:
    """Leave the job: the others see that this rank ended on purpose. Called at exit; again is harmless."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
        _lines.clear()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process is a rank of a job of processes."""
    return torch_dist.is_initialized()


def get_world_size() -> int:
    """Ranks of the job; 1 without one."""
    return torch_dist.get_world_size() if is_initialized() else 1


def get_rank() -> int:
    """This process's number in the job, 0..get_world_size() - 1."""
    return torch_dist.get_rank() if is_initialized() else 0


def new_group(ranks: list[int]) -> Any:
    """torch's process group of some ranks; every rank of the job must call this alike."""
    if ranks == list(range(get_world_size())):
        return torch_dist.group.WORLD
    return torch_dist.new_group(ranks, timeout=_timeout)


def shared_line(ranks: Sequence[int]) -> shared.SharedLine | None:
    """Memory that some ranks share, this one among them; each of them must call this. None over several hosts."""
    line = tuple(ranks)
    if line not in _lines:
        if _watchdog is None:  # nobody would notice a death
            return None
        with _watchdog.watching("share memory", "world", (), line):
            name = f"tessera/shared/{_n_joined}/{','.join(map(str, line))}"
            _lines[line] = shared.attach(_store, name, line, line.index(get_rank()), _watchdog)
    return _lines[line]


def watchdog() -> Watchdog | None:
    """The watchdog of this process's job; None when torch.distributed was started by other means."""
    return _watchdog


def _environment_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise InputError(f"environment: {name}={text!r}; expected an integer, as torchrun sets it") from None


def _use_loopback() -> None:
    """Gloo looks up this host's name otherwise, which need not lead anywhere."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
