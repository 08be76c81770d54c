"""GradientTree: gradients of a batch, summed in one tree over its samples.

In: the gradient of each sample, as backward leaves it in the parameters, on whichever rank and in whichever
accumulation step. Out: their sum in the parameters of every rank, the same bits however the samples were
spread. Called by trainers in the deterministic mode.

For that each sample must be computed alone (a batch of one), inside `dist.deterministic()`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from tessera.dist.collectives import all_gather
from tessera.dist.mesh import Mesh
from tessera.dist.tree import finish_tree, path_to
from tessera.errors import InputError, UnsupportedError


class GradientTree:
    """Sums gradients in the fixed tree over samples 0..n_samples - 1.

    A rank keeps the sums of the subtrees that it has completed: with samples in ascending, contiguous runs these
    are at most 2 log2(n_samples) gradients, with scattered ones as many as its samples.

    Args:
        parameters: whose gradients; those without one count as zeros.
        n_samples: of the whole batch, all ranks and accumulation steps together.

    Raises:
        InputError: n_samples below 1.
        UnsupportedError: parameters are parts of a model that is cut over ranks.
    """

    def __init__(self, parameters: Iterable[Tensor], n_samples: int) -> None:
        if n_samples < 1:
            raise InputError(f"n_samples: {n_samples} given; expected at least 1")
        self.parameters = [p for p in parameters if p.requires_grad]
        if any(getattr(p, "is_part", False) for p in self.parameters):
            raise UnsupportedError("parameters: parts of a model that is cut over tensor-parallel ranks given; their "
                                   "gradients are not the same bits at another number of ranks; expected a whole model")
        self.n_samples = n_samples
        self._nodes: dict[tuple[int, int], Tensor] = {}
        self._added: set[int] = set()

    def add(self, sample: int) -> None:
        """Take the gradient of a sample out of the parameters, whose `grad` becomes None.

        Raises:
            InputError: a sample out of range, or one that was added before.
        """
        if not 0 <= sample < self.n_samples or sample in self._added:
            raise InputError(f"sample: {sample} given; expected one of 0..{self.n_samples - 1}, each once")
        self._added.add(sample)
        self._nodes[sample, sample + 1] = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        for low, middle, high in reversed(path_to(sample, self.n_samples)):
            if (low, middle) not in self._nodes or (middle, high) not in self._nodes:
                break
            self._nodes[low, high] = self._nodes.pop((low, middle)) + self._nodes.pop((middle, high))

    def finish(self, mesh: Mesh | None = None, axis: str = "dp") -> None:
        """Put the sum over all samples into the parameters of every rank of the axis.

        Raises:
            InputError: samples are missing, or on two ranks.
        """
        nodes = self._nodes if mesh is None or mesh.group(axis) is None else self._gather(mesh, axis)
        flat = finish_tree(nodes, self.n_samples)
        for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
            p.grad = part.view(p.shape).to(p.dtype)
        self._nodes, self._added = {}, set()

    def _gather(self, mesh: Mesh, axis: str) -> dict[tuple[int, int], Tensor]:
        """All ranks' subtrees."""
        width = sum(p.numel() for p in self.parameters)
        names = torch.tensor(list(self._nodes), dtype=torch.int64).view(-1, 2)
        sums = torch.stack(list(self._nodes.values())) if self._nodes else torch.zeros(0, width)
        counts = all_gather(torch.tensor([len(names)]), mesh, axis=axis).tolist()
        all_names = [(low, high) for low, high in all_gather(names, mesh, axis=axis, sizes=counts).tolist()]
        if len(set(itertools.chain(*(range(low, high) for low, high in all_names)))) < sum(
                high - low for low, high in all_names):
            raise InputError("samples: one was added on two ranks; expected each on one")
        return dict(zip(all_names, all_gather(sums, mesh, axis=axis, sizes=counts)))
