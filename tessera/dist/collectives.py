"""Collectives along an axis of a mesh, with gradients.

In: a tensor of each rank on this process's line of the axis. Out: the combined tensor. Called by placement
plans, trainers and users. A line of one rank needs no processes: every collective is then what it would be
with one participant.

Gradients: the loss is the sum of what the ranks call backward on, so the gradient of all_reduce is
all_reduce, of all_gather reduce_scatter, and so on. Where all ranks compute the *same* loss from the result
(tensor parallelism), pass `replicated=True`: the gradient, which every rank then has whole, is passed on once.

Under `dist.deterministic()` sums are taken over the ranks in a fixed tree. Sums of 16-bit types are taken in
f32 and rounded once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera import env
from tessera.dist import world
from tessera.dist.mesh import Mesh, resolve
from tessera.errors import CollectiveError, InputError, ShapeError

_OPS = ("sum", "mean", "max", "min", "prod")


def all_reduce(
    x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, op: str = "sum", replicated: bool = False,
) -> Tensor:
    """The sum (mean, max, min, prod) of all ranks' x, on every rank.

    Args:
        x: any shape, the same on every rank.
        mesh, axis: default those of `with mesh.axis(...)`, or the mesh's only axis.
        op: "sum", "mean", "max", "min" or "prod"; the last three have no gradient.
        replicated: see the module.

    Raises:
        InputError: an unknown op, or a gradient asked of one that has none.
        CollectiveError: a rank died, is missing or called something else.
    """
    mesh, axis = resolve(mesh, axis)
    if op not in _OPS:
        raise InputError(f"op: {op!r} given; expected one of {', '.join(_OPS)}")
    if op not in ("sum", "mean") and x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"op: {op!r} given for a tensor that requires a gradient; only sum and mean have one")
    if mesh.group(axis) is None:
        return x
    if op in ("sum", "mean"):
        has_gradient = x.requires_grad and torch.is_grad_enabled()
        total = _AllReduce.apply(x, mesh, axis, replicated) if has_gradient else _reduce_all(x, mesh, axis)
        return total / mesh.size(axis) if op == "mean" else total
    return _reduce_all(x, mesh, axis, op)


def mesh_reduce(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, op: str = "mean") -> Tensor:
    """`all_reduce` under the name that distributed functions use; the mean by default."""
    return all_reduce(x, mesh, axis=axis, op=op)


def fan_out(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None) -> Tensor:
    """x itself, entering work that the ranks share: its gradient is the sum of the ranks' gradients.

    The conjugate of all_reduce(replicated=True) (Megatron-LM's f and g, arXiv:1909.08053).
    """
    mesh, axis = resolve(mesh, axis)
    if mesh.group(axis) is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return _FanOut.apply(x, mesh, axis)


def all_gather(
    x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, dim: int = 0,
    sizes: Sequence[int] | None = None, replicated: bool = False,
) -> Tensor:
    """All ranks' x, concatenated along `dim` in the order of the axis.

    Args:
        x: the same shape on every rank, but for `dim` when `sizes` is given.
        dim: where to concatenate.
        sizes: each rank's size along `dim`; default the same for all.
        mesh, axis, replicated: as for `all_reduce`.
    """
    mesh, axis = resolve(mesh, axis)
    sizes = _sizes(x, mesh, axis, dim, sizes)
    return x if mesh.group(axis) is None else _AllGather.apply(x, mesh, axis, dim, sizes, replicated)


def reduce_scatter(
    x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, dim: int = 0,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """This rank's slice along `dim` of the sum of all ranks' x.

    Args:
        x: the same shape on every rank; its size along `dim` is cut evenly unless `sizes` says otherwise.
        sizes: of the slices, one a rank; their sum is x's size along dim.
        mesh, axis, dim: as for `all_gather`.

    Raises:
        ShapeError: the size along dim cannot be cut so.
    """
    mesh, axis = resolve(mesh, axis)
    sizes = _cut(x, mesh, axis, dim, sizes)
    return x if mesh.group(axis) is None else _ReduceScatter.apply(x, mesh, axis, dim, sizes)


def all_to_all(
    x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, split_dim: int = 0, concat_dim: int = 0,
) -> Tensor:
    """Cut x along split_dim, give rank i the i-th piece, and concatenate what comes along concat_dim.

    Args:
        x: the same shape on every rank; its size along split_dim is a multiple of the axis.
        mesh, axis: as for `all_reduce`.
    """
    mesh, axis = resolve(mesh, axis)
    _cut(x, mesh, axis, split_dim, None)
    return x if mesh.group(axis) is None else _AllToAll.apply(x, mesh, axis, split_dim, concat_dim)


def broadcast(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, src: int = 0) -> Tensor:
    """The x of the rank with coordinate `src`, on every rank; the others give a tensor of the same shape."""
    mesh, axis = resolve(mesh, axis)
    _check_peer("src", src, mesh, axis)
    return x if mesh.group(axis) is None else _Broadcast.apply(x, mesh, axis, src)


def ring_exchange(x: Tensor, mesh: Mesh | None = None, *, axis: str | None = None, shift: int = 1) -> Tensor:
    """Pass x to the rank `shift` places on (cyclic) and return what comes from `shift` places before."""
    mesh, axis = resolve(mesh, axis)
    if mesh.group(axis) is None or shift % mesh.size(axis) == 0:
        return x
    return _Ring.apply(x, mesh, axis, shift % mesh.size(axis))


def barrier(mesh: Mesh | None = None, *, axis: str | None = None) -> None:
    """Return once every rank of the line has come here."""
    mesh, axis = resolve(mesh, axis)
    if mesh.group(axis) is not None:
        with _watching("barrier", mesh, axis, ()):
            mesh.line(axis).barrier()


# What the functions above do with tensors, without gradients.

def _reduce_all(x: Tensor, mesh: Mesh, axis: str, op: str = "sum") -> Tensor:
    with _watching("all_reduce", mesh, axis, x.shape, x.dtype):
        return mesh.line(axis, x, sums=True).all_reduce(x, op)


def _gather(x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    width = max(sizes)
    if x.shape[dim] < width:  # what moves is of one size
        x = torch.cat((x, x.new_zeros(*x.shape[:dim], width - x.shape[dim], *x.shape[dim + 1:])), dim)
    with _watching("all_gather", mesh, axis, x.shape, x.dtype):
        pieces = mesh.line(axis, x).all_gather(x)
    if min(sizes) == width and math.prod(x.shape[:dim]) == 1:
        return pieces.view(*x.shape[:dim], -1, *x.shape[dim + 1:])
    return torch.cat([piece.narrow(dim, 0, size) for piece, size in zip(pieces, sizes)], dim)


def _scatter_sum(x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    pieces = x.split(list(sizes), dim)
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    with _watching("reduce_scatter", mesh, axis, x.shape, x.dtype):
        total = mesh.line(axis, sent, sums=True).reduce_scatter(sent, [piece.numel() for piece in pieces])
    return total.view(pieces[mesh.get_coordinate(axis)].shape)


def _exchange(x: Tensor, mesh: Mesh, axis: str, split_dim: int, concat_dim: int) -> Tensor:
    sent = torch.stack(x.chunk(mesh.size(axis), split_dim)).contiguous()
    with _watching("all_to_all", mesh, axis, x.shape, x.dtype):
        received = mesh.line(axis, sent).all_to_all(sent)
    return torch.cat(list(received), concat_dim)


def _rotate(x: Tensor, mesh: Mesh, axis: str, shift: int) -> Tensor:
    with _watching("ring_exchange", mesh, axis, x.shape, x.dtype):
        return mesh.line(axis, x).ring_exchange(x, shift % mesh.size(axis))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, replicated: bool) -> Tensor:
        ctx.where = mesh, axis, replicated
        return _reduce_all(x, mesh, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mesh, axis, replicated = ctx.where
        return grad if replicated else _reduce_all(grad, mesh, axis), None, None, None


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str) -> Tensor:
        ctx.where = mesh, axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _reduce_all(grad, *ctx.where), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int], replicated: bool) -> Tensor:
        ctx.where, ctx.replicated = (mesh, axis, dim, sizes), replicated
        return _gather(x, mesh, axis, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mesh, axis, dim, sizes = ctx.where
        if ctx.replicated:
            grad = grad.split(list(sizes), dim)[mesh.get_coordinate(axis)]
        else:
            grad = _scatter_sum(grad, mesh, axis, dim, sizes)
        return grad, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.where = mesh, axis, dim, sizes
        return _scatter_sum(x, mesh, axis, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gather(grad, *ctx.where), None, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, split_dim: int, concat_dim: int) -> Tensor:
        ctx.where = mesh, axis, concat_dim, split_dim
        return _exchange(x, mesh, axis, split_dim, concat_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _exchange(grad, *ctx.where), None, None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, src: int) -> Tensor:
        ctx.where = mesh, axis, src
        with _watching("broadcast", mesh, axis, x.shape, x.dtype):
            return mesh.line(axis, x).broadcast(x, src)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mesh, axis, src = ctx.where
        total = _reduce_all(grad, mesh, axis)
        return total if mesh.get_coordinate(axis) == src else torch.zeros_like(total), None, None, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, axis: str, shift: int) -> Tensor:
        ctx.where = mesh, axis, -shift
        return _rotate(x, mesh, axis, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _rotate(grad, *ctx.where), None, None, None


# Checks.

def _watching(
    op: str, mesh: Mesh, axis: str, shape: Sequence[int], dtype: torch.dtype | None = None,
) -> contextlib.AbstractContextManager[None]:
    if env.get("TESSERA_DIST_CHECK") and dtype is not None:
        _compare(op, mesh, axis, shape, dtype)
    watchdog = world.watchdog()
    return contextlib.nullcontext() if watchdog is None else watchdog.watching(op, axis, shape, mesh.ranks(axis))


def _compare(op: str, mesh: Mesh, axis: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Have all ranks of the line say what they are about to do, and compare (TESSERA_DIST_CHECK=1)."""
    text = f"{op} of {list(shape)} {str(dtype).removeprefix('torch.')}"
    told = torch.zeros(256, dtype=torch.uint8)
    data = text.encode()[:256]
    told[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    heard = mesh.line(axis, told).all_gather(told)
    others = [bytes(row.tolist()).rstrip(b"\0").decode() for row in heard]
    different = [f"rank {rank} calls {other}" for rank, other in zip(mesh.ranks(axis), others) if other != text]
    if different:
        raise CollectiveError(f"rank {world.get_rank()}: {text} on axis {axis!r}, but {'; '.join(different)}")


def _sizes(x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    _check_dim("dim", x, dim)
    sizes = (x.shape[dim],) * mesh.size(axis) if sizes is None else tuple(sizes)
    if len(sizes) != mesh.size(axis) or sizes[mesh.get_coordinate(axis)] != x.shape[dim]:
        raise ShapeError(f"sizes: {sizes} given; expected one for each of {mesh.size(axis)} ranks on axis {axis!r}, "
                         f"this rank's being x's {x.shape[dim]} along dim {dim}")
    return sizes


def _cut(x: Tensor, mesh: Mesh, axis: str, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    _check_dim("dim", x, dim)
    n_ranks, whole = mesh.size(axis), x.shape[dim]
    if sizes is None:
        if whole % n_ranks:
            raise ShapeError(f"x: {tuple(x.shape)} given; expected a multiple of {n_ranks} along dim {dim}, "
                             f"to be cut for the ranks of axis {axis!r}")
        return (whole // n_ranks,) * n_ranks
    if len(sizes) != n_ranks or sum(sizes) != whole or min(sizes) < 0:
        raise ShapeError(f"sizes: {tuple(sizes)} given; expected {n_ranks} sizes (axis {axis!r}) that sum to {whole}")
    return tuple(sizes)


def _check_dim(name: str, x: Tensor, dim: int) -> None:
    if not 0 <= dim < x.dim():
        raise ShapeError(f"{name}: {dim} given; expected 0..{x.dim() - 1} for a tensor of shape {tuple(x.shape)}")


def _check_peer(name: str, coordinate: int, mesh: Mesh, axis: str) -> None:
    if not 0 <= coordinate < mesh.size(axis):
        raise InputError(f"{name}: {coordinate} given; expected 0..{mesh.size(axis) - 1}, a place on axis {axis!r}")
