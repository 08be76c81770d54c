"""The mesh: sharded tensors, collectives by axis, and jobs of processes.

    ts.init()
    mesh = ts.dist.mesh(4)                       # four ranks on axis "tp"
    total = ts.dist.all_reduce(x, mesh)

`ts.distributed` is another name of this module, which is a decorator too (`function.distributed`).
"""

import sys
from typing import Any

from tessera.callable import make_callable
from tessera.dist.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    fan_out,
    mesh_reduce,
    reduce_scatter,
    ring_exchange,
)
from tessera.dist.collectives_hierarchical import hierarchical_all_reduce
from tessera.dist.collectives_p2p import recv, send
from tessera.dist.deterministic import deterministic
from tessera.dist.deterministic_gradients import GradientTree
from tessera.dist.function import MeshTensor, distributed
from tessera.dist.launch import launch, spawn
from tessera.dist.mesh import Mesh, mesh
from tessera.dist.norm import distributed_rms_norm
from tessera.dist.ring_attention import ring_attention, zigzag_gather, zigzag_shard
from tessera.dist.shared import rehearsal
from tessera.dist.spec import ShardSpec, tensor
from tessera.dist.world import get_rank, get_world_size, init, is_initialized, shutdown
from tessera.errors import CollectiveError

__all__ = [
    "CollectiveError", "GradientTree", "Mesh", "MeshTensor", "ShardSpec", "all_gather", "all_reduce", "all_to_all",
    "barrier", "broadcast", "deterministic", "distributed", "distributed_rms_norm", "fan_out", "get_rank",
    "get_world_size", "hierarchical_all_reduce", "init", "is_initialized", "launch", "load_model", "mesh",
    "mesh_reduce", "recv", "reduce_scatter", "rehearsal", "ring_attention", "ring_exchange", "send", "shutdown",
    "spawn", "tensor", "zigzag_gather", "zigzag_shard",
]

make_callable(__name__, distributed)


def load_model(path: Any, mesh: Mesh, **options: Any) -> Any:
    """`ts.load_model` with a mesh, under the documents' name: this rank's part of a model."""
    # Models stand above this layer, so that the name is looked up in the public facade, and only when called.
    return sys.modules["tessera"].load_model(path, mesh=mesh, **options)
