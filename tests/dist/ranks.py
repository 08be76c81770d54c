"""What the ranks of the tests in this folder run; kept apart from the tests, since ranks import it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import tessera as ts
from tessera.dist import Mesh


def inputs(seed: int, rank: int, shape: tuple[int, ...]) -> Tensor:
    """Rank `rank`'s tensor; the tests draw every rank's to compute what must come out."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank))


def collectives(seed: int) -> dict[str, Tensor]:
    """Every collective over all ranks, and gradients: what this rank gets."""
    ts.init(timeout=60)
    mesh, rank, n = ts.dist.mesh(), ts.dist.get_rank(), ts.dist.get_world_size()
    dist, out = ts.dist, {}
    assert (mesh.rank, mesh.size(), mesh.get_coordinate("tp")) == (rank, n, rank)

    def note(name: str, function: Any, x: Tensor) -> None:
        x = x.clone().requires_grad_()
        y = function(x)
        weight = inputs(seed + 1, rank, tuple(y.shape))
        (y * weight).sum().backward()
        out[name], out[name + ".grad"] = y.detach(), x.grad

    x = inputs(seed, rank, (4 * n, 3, 5))
    note("all_reduce", lambda x: dist.all_reduce(x, mesh), x)
    note("mesh_reduce", lambda x: dist.mesh_reduce(x, mesh), x)
    note("fan_out", lambda x: dist.fan_out(x, mesh), x)
    note("replicated", lambda x: dist.all_reduce(x, mesh, replicated=True), x)
    note("all_gather", lambda x: dist.all_gather(x, mesh, dim=1), x)
    sizes = tuple(range(1, n + 1))
    note("all_gather_uneven", lambda x: dist.all_gather(x, mesh, dim=0, sizes=sizes), x[: rank + 1])
    note("all_gather_replicated", lambda x: dist.all_gather(x, mesh, sizes=sizes, replicated=True), x[: rank + 1])
    note("reduce_scatter", lambda x: dist.reduce_scatter(x, mesh), x)
    uneven = (4 * n - (n - 1), *[1] * (n - 1))
    note("reduce_scatter_uneven", lambda x: dist.reduce_scatter(x, mesh, sizes=uneven), x)
    note("all_to_all", lambda x: dist.all_to_all(x, mesh, split_dim=0, concat_dim=2), x)
    note("broadcast", lambda x: dist.broadcast(x, mesh, src=n - 1), x)
    note("ring", lambda x: dist.ring_exchange(x, mesh), x)
    note("ring_back", lambda x: dist.ring_exchange(x, mesh, shift=-1), x)
    out["max"] = dist.all_reduce(x, mesh, op="max")
    out["bf16"] = dist.all_reduce(x.bfloat16(), mesh)
    out["double"] = dist.all_reduce(x.double(), mesh)
    with mesh.axis("tp"):
        out["context"] = ts.mesh_reduce(x, axis="tp", op="mean")
        if rank % 2 == 0:
            dist.send(x[:2].bfloat16(), dst=rank + 1, mesh_axis="tp")
        else:
            out["recv"] = dist.recv(src=rank - 1, mesh_axis="tp")
    dist.barrier(mesh)
    return out


def grid(seed: int) -> dict[str, Any]:
    """Collectives along one axis of a 2 x 2 mesh, and its parts."""
    ts.init(timeout=60)
    mesh = Mesh(axes=["node", "local"], devices=range(4), shape=(2, 2))
    x = inputs(seed, ts.dist.get_rank(), (7, 3))
    part = mesh["local"]
    pair = Mesh(devices=[1, 3])
    out = {
        "local": ts.dist.all_reduce(x, mesh, axis="local"), "node": ts.dist.all_reduce(x, mesh, axis="node"),
        "sub": ts.dist.all_gather(x, part), "coordinate": mesh.get_coordinate(), "sub_size": part.size(),
        "tree": ts.dist.hierarchical_all_reduce(x, mesh, intra="local", inter="node", n_chunks=3),
        "device_mesh": mesh.device_mesh().mesh.tolist(),
    }
    if pair.contains_this_rank:
        out["pair"] = ts.dist.all_reduce(x, pair)
    else:
        with pytest.raises(ts.InputError, match="not one of its 2 devices"):
            ts.dist.all_reduce(x, pair)
    with pytest.raises(ts.InputError, match="axis: none given; the mesh has node, local"):
        ts.dist.all_reduce(x, mesh)
    with pytest.raises(ts.InputError, match="devices: rank 7 given; the job has 4 ranks"):
        Mesh(devices=range(8))
    with pytest.raises(ts.ShapeError, match="multiple of 2 along dim 0"):
        ts.dist.reduce_scatter(x, part)
    return out


def mismatch(case: str) -> str:
    """One rank does something else than the others; returns this rank's error."""
    if case == "checked":
        os.environ["TESSERA_DIST_CHECK"] = "1"
    ts.init(timeout=2)
    mesh, rank = ts.dist.mesh(), ts.dist.get_rank()
    try:
        if rank == 1 and case == "sleeps":
            time.sleep(4)
            return ""
        if rank == 1:
            ts.dist.all_gather(torch.ones(3), mesh)
        ts.dist.all_reduce(torch.ones(2, 5), mesh)
    except ts.dist.CollectiveError as error:
        time.sleep(0.5)
        return str(error)
    return ""


def dies(how: str) -> None:
    """Rank 1 ends in the middle of a run of all_reduces, in one of several ways."""
    ts.init(timeout=60)
    mesh, rank = ts.dist.mesh(), ts.dist.get_rank()
    x = torch.ones(1 << 16)
    started = time.monotonic()
    while time.monotonic() - started < 60:
        x = ts.dist.all_reduce(x, mesh) / mesh.size()
        if rank == 1 and time.monotonic() - started > 0.2:
            if how == "raises":
                raise ValueError("no more")
            if how == "exits":
                raise SystemExit(3)
            os.kill(os.getpid(), signal.SIGKILL)


def reduces_until_told(results: Any, environment: dict[str, str], n_floats: int) -> None:
    """Join a job by hand and reduce without end; says "joined", then its last error and how long that took."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    ts.init(timeout=60)
    mesh, x = ts.dist.mesh(), torch.ones(n_floats)
    ts.dist.all_reduce(x, mesh)
    results.send("joined")
    try:
        while True:
            x = ts.dist.all_reduce(x, mesh) / mesh.size()
    except ts.dist.CollectiveError as error:
        results.send(str(error))
        os._exit(3)


def captured(seed: int) -> dict[str, Any]:
    """A graph of kernels with an all_reduce between them: what it gives, eagerly and replayed, on two inputs."""
    ts.init(timeout=60)
    mesh, rank = ts.dist.mesh(), ts.dist.get_rank()

    @ts.graph.capture
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        doubled, out = torch.empty_like(x), torch.empty_like(x)
        double(x, doubled)
        total = ts.dist.all_reduce(doubled, mesh)
        double(total, out)
        return out, ts.dist.all_gather(total, mesh)

    found: dict[str, Any] = {"type": type(mesh.line("tp")).__name__, "results": []}
    try:
        for i in range(3):
            out, gathered = step(inputs(seed + i, rank, (5, 7)))
            found["results"].append((out.clone(), gathered.clone()))
        found["kernels"] = [bucket.kernels for bucket in step.buckets]
    except ts.errors.UnsupportedError as error:
        found["error"] = str(error)
        for call in (lambda: ts.dist.barrier(mesh), lambda: ts.dist.send(torch.empty(3), 1 - rank, mesh=mesh)):
            with pytest.raises(ts.errors.UnsupportedError, match="graph <lambda>"):
                ts.graph.capture(call)()
    return found


@ts.distributed
def distributed_rms_norm(
    x: ts.MeshTensor["B", "S", "D"], weight: ts.MeshTensor["D"], mesh: Mesh, eps: float = 1e-6,
) -> ts.MeshTensor["B", "S", "D"]:
    """The documents' own: each rank has a part of D."""
    with mesh.axis("model"):
        global_mean_sq = ts.mesh_reduce((x**2).mean(dim=-1, keepdim=True), axis="model", op="mean")
        return x / torch.sqrt(global_mean_sq + eps) * weight


def norms(seed: int) -> dict[str, Any]:
    """distributed_rms_norm of this rank's part of the width, its gradients, and what is refused."""
    ts.init(timeout=60)
    mesh, rank = Mesh(axes=["model"]), ts.dist.get_rank()
    x, weight = inputs(seed, rank, (2, 3, 4)).requires_grad_(), inputs(seed + 1, rank, (4,)).requires_grad_()
    y = distributed_rms_norm(x, weight, mesh)
    (y * inputs(seed + 2, rank, (2, 3, 4))).sum().backward()
    grid = Mesh(axes=["a", "b"], shape=(1, 2))

    @ts.distributed(mesh=grid, axis="b")
    def total(x: Tensor) -> Tensor:
        return ts.dist.all_reduce(x)

    @ts.distributed
    def axis_by_name(x: Tensor, mesh: Mesh) -> Tensor:
        return ts.dist.all_reduce(x, axis="b")

    with pytest.raises(ts.ShapeError, match="weight has D=3"):
        distributed_rms_norm(x, weight[:3], mesh)
    with pytest.raises(ts.InputError, match="axis_by_name: 0 meshes given; expected one"):
        axis_by_name(x, None)
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "total": total(x.detach()),
            "by_name": axis_by_name(x.detach(), mesh=grid)}


def dies_under_replay() -> None:
    """Rank 1 is killed while the others are in a captured collective, where Python does not look on."""
    ts.init(timeout=60)
    mesh, rank = ts.dist.mesh(), ts.dist.get_rank()

    @ts.graph.capture
    def step(x: Tensor) -> Tensor:
        return ts.dist.all_reduce(x, mesh)

    x = torch.ones(1 << 12)
    step(x)
    for _ in range(20):
        step(x)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(x)


@ts.kernel
def double(x: ts.Tile["N", "M", ts.f32], out: ts.Tile["N", "M", ts.f32]):
    ts.tile.store(out, ts.tile.load(x) * 2)


def differs(case: str) -> str:
    """Two ranks call different things; each one's error."""
    ts.init(timeout=60)
    mesh, rank = ts.dist.mesh(), ts.dist.get_rank()
    calls = {
        "op": lambda: ts.dist.all_reduce(torch.ones(6), mesh, op="max" if rank else "sum"),
        "shape": lambda: ts.dist.all_reduce(torch.ones(6 + rank), mesh),
        "dtype": lambda: ts.dist.all_gather(torch.ones(6, dtype=torch.bfloat16 if rank else torch.float16), mesh),
        "root": lambda: ts.dist.broadcast(torch.ones(6), mesh, src=rank),
        "kind": lambda: ts.dist.barrier(mesh) if rank else ts.dist.all_reduce(torch.ones(6), mesh),
    }
    try:
        calls[case]()
    except ts.dist.CollectiveError as error:
        with pytest.raises(ts.dist.CollectiveError):
            ts.dist.barrier(mesh)  # what came after would not fit together
        return str(error)
    return ""


def lines(without: tuple[int, ...]) -> tuple[str, list[str], Tensor]:
    """How tensors move when some ranks will not share memory; what stands in /dev/shm meanwhile."""
    if int(os.environ["RANK"]) in without:
        os.environ["TESSERA_SHARED_MEMORY"] = "0"
    ts.init(timeout=60)
    mesh = ts.dist.mesh()
    again = ts.dist.mesh()
    assert again.line("tp") is mesh.line("tp") or without
    with ts.dist.deterministic():
        total = ts.dist.all_reduce(inputs(5, ts.dist.get_rank(), (1031,)), mesh)
    return type(mesh.line("tp")).__name__, os.listdir("/dev/shm"), total


def speaks() -> tuple[int, int, int]:
    ts.init()
    ts.init()  # again is harmless
    return ts.distributed.get_world_size(), ts.dist.get_rank(), torch.get_num_threads()
