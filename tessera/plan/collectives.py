"""Times of collectives on links with a latency and a bandwidth.

In: bytes, a machine, and which ranks take part. Out: seconds. Called by plan.training and plan.inference.

A ring over n ranks moves a buffer in n - 1 steps of 1/n (Thakur, Rabenseifner, Gropp 2005): a reduce-scatter or an
all-gather takes (n - 1) (latency + bytes / (n bandwidth)), an all-reduce both. Short buffers are summed by recursive
doubling in log2(n) exchanges of the whole instead, where that is quicker. A group that spans nodes goes in two
levels: within the nodes first, then every rank with its partners in the other nodes, for its part of the buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from tessera.errors import InputError
from tessera.plan.layout import Layout
from tessera.plan.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of a collective: `size` of them, `per_node` in a node (the fewest of any node that has some)."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes, or parts of nodes, that the group spans."""
        return -(-self.size // self.per_node)


def group_of(axis: str, layout: Layout, machine: Machine) -> Group:
    """The worst group along "tp", "dp" or "pp" of a layout.

    Raises:
        InputError: there is no such axis.
    """
    strides = {"tp": 1, "dp": layout.tp, "pp": layout.tp * layout.dp}
    if axis not in strides:
        raise InputError(f"axis: {axis!r} given; expected tp, dp or pp")
    return _worst_group(getattr(layout, axis), strides[axis], layout.devices, machine.devices_per_node)


@lru_cache(maxsize=4096)
def _worst_group(size: int, stride: int, devices: int, per_node: int) -> Group:
    """Members fall into nodes of `per_node` consecutive ranks; the group with the smallest part of any node."""
    if size * stride <= per_node and per_node % (size * stride) == 0:
        return Group(size=size, per_node=size)
    fewest = size
    for start in range(0, min(devices, math.lcm(size * stride, per_node)), size * stride):  # then it repeats
        for first in range(start, start + stride):
            members: dict[int, int] = {}
            for rank in range(first, first + size * stride, stride):
                members[rank // per_node] = members.get(rank // per_node, 0) + 1
            fewest = min(fewest, *members.values()) if len(members) > 1 else fewest
    return Group(size=size, per_node=fewest)


def reduce_scatter_time(n_bytes: float, group: Group, machine: Machine) -> float:
    """Seconds to sum a buffer of n_bytes and leave each rank its part; an all-gather takes as long."""
    inner, outer = min(group.per_node, group.size), group.nodes
    within = _ring(n_bytes, inner, machine.intra_bandwidth * machine.link_efficiency, machine.intra_latency)
    between = _ring(n_bytes / inner, outer, machine.inter_bandwidth * machine.link_efficiency, machine.inter_latency)
    return within + between


def all_reduce_time(n_bytes: float, group: Group, machine: Machine) -> float:
    """Seconds to sum a buffer of n_bytes on every rank."""
    inner, outer = (math.ceil(math.log2(n)) for n in (min(group.per_node, group.size), group.nodes))
    within = machine.intra_latency + n_bytes / (machine.intra_bandwidth * machine.link_efficiency)
    between = machine.inter_latency + n_bytes / (machine.inter_bandwidth * machine.link_efficiency)
    return min(2 * reduce_scatter_time(n_bytes, group, machine), inner * within + outer * between)


def send_time(n_bytes: float, group: Group, machine: Machine) -> float:
    """Seconds of a message of n_bytes to the next rank of a group; 0 in a group of one."""
    if group.size == 1:
        return 0.0
    far = group.nodes > 1
    bandwidth = machine.inter_bandwidth if far else machine.intra_bandwidth
    latency = machine.inter_latency if far else machine.intra_latency
    return latency + n_bytes / (bandwidth * machine.link_efficiency)


def _ring(n_bytes: float, n: int, bandwidth: float, latency: float) -> float:
    return (n - 1) * (latency + n_bytes / (n * bandwidth))
