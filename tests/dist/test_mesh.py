"""Mesh, ShardSpec and tensor without processes."""

import math

import pytest
import torch

import tessera as ts
from tessera.dist import Mesh, ShardSpec
from tessera.dist.spec import even_sizes


def test_documents_mesh_of_192_devices():
    mesh = Mesh(axes=["tp", "pp", "dp"], devices=range(192))
    assert mesh.shape == (8, 6, 4) and mesh.is_abstract and mesh.size() == 192
    assert (mesh.size("tp"), mesh.size("pp"), mesh.size("dp")) == (8, 6, 4)
    spec = ShardSpec(partition=("col",), mesh_axes=("tp",))
    w = ts.dist.tensor((12288, 3 * 12288), layout=spec, mesh=mesh, dtype="bf16")
    assert w.shape == (12288, 3 * 12288 // 8) and w.dtype == torch.bfloat16 and w.is_meta
    rows = ts.dist.tensor((12288, 12288), layout=ShardSpec(partition=("row",), mesh_axes=("tp",)), mesh=mesh)
    assert rows.shape == (12288 // 8, 12288)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 36, 72, 97, 192, 1024])
@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_default_shape_is_the_most_even(n, n_axes):
    shape = Mesh(axes=[f"a{i}" for i in range(n_axes)], devices=n).shape
    assert math.prod(shape) == n and list(shape) == sorted(shape, reverse=True)
    if n_axes == 2:
        assert shape[1] == max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)


def test_coordinates_of_every_rank():
    mesh = Mesh(axes=["pp", "tp"], devices=range(6), shape=(2, 3))
    for rank in range(6):
        at = mesh.at(rank)
        assert at.get_coordinate() == (rank // 3, rank % 3) and at.rank == rank
        assert at.ranks("tp") == tuple(range(rank // 3 * 3, rank // 3 * 3 + 3))
        assert at.ranks("pp") == (rank % 3, rank % 3 + 3)
        assert at["tp"].ranks() == at.ranks("tp") and at["tp"].get_coordinate("tp") == rank % 3
    shuffled = Mesh(axes=["pp", "tp"], devices=[5, 3, 1, 4, 2, 0], shape=(2, 3)).at(4)
    assert shuffled.get_coordinate() == (1, 0) and shuffled.rank == 3


def test_parts_cover_the_whole():
    mesh = Mesh(axes=["a", "b"], devices=range(6), shape=(2, 3))
    spec = ShardSpec(partition=("row", 2), mesh_axes=("b", "a"), sizes=((1, 5, 4), None))
    whole = torch.arange(10 * 2 * 7).view(10, 2, 7)
    seen = torch.cat([spec.local(whole, mesh.at(r)).flatten() for r in range(6)])
    assert sorted(seen.tolist()) == list(range(140))
    assert spec.local_shape(whole.shape, mesh.at(1)) == (5, 2, 4)
    assert even_sizes(9, 4) == (3, 2, 2, 2) and even_sizes(2, 4) == (1, 1, 0, 0)


def test_a_mesh_of_one_device_needs_no_processes():
    mesh = ts.dist.mesh(devices=["cpu"], axes=("tp",), shape=(1,))
    x = torch.randn(3, 4, requires_grad=True)
    for out in (ts.dist.all_reduce(x, mesh), ts.all_gather(x, mesh, dim=1), ts.ring_exchange(x, mesh),
                ts.dist.reduce_scatter(x, mesh), ts.dist.broadcast(x, mesh), ts.dist.all_to_all(x, mesh)):
        assert torch.equal(out, x) and out.requires_grad
    assert not mesh.is_abstract and ts.distributed.get_world_size() == 1


def test_an_abstract_mesh_refuses_to_communicate():
    mesh = ts.dist.mesh(devices=[f"cuda:{i}" for i in range(8)], axes=("tp",), shape=(8,))
    with pytest.raises(ts.errors.UnsupportedError, match=r"abstract.*tessera launch --nproc 8"):
        ts.dist.all_reduce(torch.ones(2), mesh)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Mesh(axes=["a", "a"], devices=4), "axes: .* expected different names"),
    (lambda: Mesh(axes=["a", "b"], devices=6, shape=(2, 2)), r"shape: \(2, 2\) given, which is 4 devices; .* 6"),
    (lambda: Mesh(axes=["a", "b"], devices=6, shape=(6,)), "expected a size for each of a, b"),
    (lambda: Mesh(devices=[0, 0]), "devices: .* expected different ranks"),
    (lambda: Mesh(devices=["cuda:0", "cuda:0"]), "expected different devices"),
    (lambda: Mesh(devices=0), "devices: 0 given"),
    (lambda: Mesh(devices=4, rank=4), "rank: 4 given"),
    (lambda: Mesh(devices=4).size("dp"), "axis: 'dp' given; the mesh has tp"),
    (lambda: ts.dist.all_reduce(torch.ones(1)), "mesh: none given"),
    (lambda: ShardSpec(partition=("row",), mesh_axes=()), "mesh_axes: .* expected one for each"),
    (lambda: ShardSpec(partition=("rows",), mesh_axes=("tp",)), "partition: 'rows' given"),
    (lambda: ShardSpec(partition=("row", 0), mesh_axes=("a", "b")), "each dim and each axis once"),
    (lambda: ts.dist.tensor((4, 4), ShardSpec(partition=(2,), mesh_axes=("tp",)), Mesh(devices=2)), "cuts dim 2"),
    (lambda: ts.dist.tensor((4, 4), ShardSpec(partition=(1,), mesh_axes=("tp",))), "mesh: none given"),
])
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ts.InputError, match=message):
        make()
