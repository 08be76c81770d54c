"""All-reduce in two levels: within a node over fast links, between nodes over slow ones.

In: a tensor of each rank of a mesh with an axis within nodes and one between them. Out: the sum over both.
Called by trainers on machines of several nodes.

Within the node a reduce-scatter leaves each rank one share of the node's sum; ranks that hold the same share
sum it over the nodes; an all-gather within the node puts the shares together. Only 1 / intra-size of the
tensor crosses the slow links per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.dist.collectives import all_gather, all_reduce, reduce_scatter
from tessera.dist.mesh import Mesh
from tessera.errors import InputError


@torch.no_grad()
def hierarchical_all_reduce(x: Tensor, mesh: Mesh, *, intra: str, inter: str, n_chunks: int = 1) -> Tensor:
    """The sum of x over both axes, on every rank; without gradients, as it is for gradients.

    Args:
        x: the same shape on every rank.
        mesh: has both axes.
        intra, inter: the axis within a node, the axis between nodes.
        n_chunks: the share that crosses between nodes goes in this many pieces. Rank i of a node begins
            with piece i, so that the ranks of a node do not load the same links (and draw the same power)
            at the same moment.

    Raises:
        InputError: the axes are the same, or n_chunks is below 1.
    """
    if intra == inter:
        raise InputError(f"inter: {inter!r} given, which is intra too; expected two axes")
    if n_chunks < 1:
        raise InputError(f"n_chunks: {n_chunks} given; expected at least 1")
    n_ranks, here = mesh.size(intra), mesh.get_coordinate(intra)
    flat = x.reshape(-1)
    padded = torch.cat((flat, flat.new_zeros(-len(flat) % n_ranks)))
    share = reduce_scatter(padded, mesh, axis=intra)
    pieces = list(share.tensor_split(n_chunks))
    for step in range(n_chunks):
        i = (here + step) % n_chunks
        pieces[i] = all_reduce(pieces[i], mesh, axis=inter)
    whole = all_gather(torch.cat(pieces), mesh, axis=intra)
    return whole[: len(flat)].view(x.shape)
