"""NVL72Optimizer: the mesh and the settings for training a model on one NVL72 rack.

In: a GPTConfig. Out: a mesh of the rack's 72 GPUs and a model set up as the plan says. Called by training scripts;
what it knows comes from `search`.
"""

from __future__ import annotations

import dataclasses

from tessera.dist.mesh import Mesh
from tessera.errors import InputError
from tessera.models.config import GPTConfig
from tessera.models.gpt import GPTModel
from tessera.models.gpt_plan import MESH_AXES
from tessera.plan.layout import TrainingRun
from tessera.plan.machine import GB200_NVL72, Machine
from tessera.plan.search import Plan, search_training


class NVL72Optimizer:
    """Plans the training of a model on a rack, and applies the plan.

    Args:
        config: when its tp_size, pp_size and dp_size make up the rack, they are the mesh; else the search chooses.
        machine: whose devices_per_node are the rack.
        global_batch: sequences of a step.

    Raises:
        InputError: no plan fits the rack's memory; the message says why.
    """

    def __init__(self, config: GPTConfig, *, machine: Machine = GB200_NVL72, global_batch: int = 256) -> None:
        self.config, devices = config, machine.devices_per_node
        sizes = {"tp": config.tp_size, "pp": config.pp_size, "dp": config.dp_size}
        is_given = config.tp_size * config.pp_size * config.dp_size == devices
        self.plan: Plan = search_training(
            config, machine, devices, global_batch=global_batch, **(sizes if is_given else {})).best

    def create_optimized_mesh(self) -> Mesh:
        """The plan's mesh, over all GPUs of the rack; abstract without a job of as many ranks."""
        layout = self.plan.layout
        return Mesh(MESH_AXES, layout.devices, (layout.pp, layout.dp, layout.tp))

    def optimize_model(self, model: GPTModel) -> GPTModel:
        """Set up a model as the plan says: blocks are recomputed in the backward pass where memory asks for it, and
        kept where it does not.

        Args:
            model: on a mesh of the plan's sizes.

        Returns:
            The same model.

        Raises:
            InputError: the model has another mesh.
        """
        layout = self.plan.layout
        mesh = model.mesh
        for axis in MESH_AXES:
            size = mesh.size(axis) if mesh is not None and mesh.has_axis(axis) else 1
            if size != getattr(layout, axis):
                raise InputError(f"model: {size} ranks on axis {axis!r} given; the plan has {layout.sizes}; make it "
                                 "with the mesh of create_optimized_mesh()")
        run = self.plan.run
        assert isinstance(run, TrainingRun)
        model.config = dataclasses.replace(model.config, gradient_checkpointing=run.recompute != "none")
        return model
