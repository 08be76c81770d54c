"""Plans: the memory and the time of a model on a mesh, before any device is there.

    machine      devices and links: presets, and this CPU
    layout       meshes and runs; what the busiest rank holds
    memory       bytes of a rank by purpose
    collectives  seconds of all-reduces and their kin
    training     seconds of an optimizer step by purpose
    inference    seconds of a prompt and of a token
    search       meshes that fit, the fastest first
    nvl72        a plan for one rack, applied to a model
    words        a plan explained
    published    the error on published figures
    presets      configurations by name

Nothing here computes with a model or talks to other processes; `tessera plan` shows it on the command line.
"""

from __future__ import annotations

from tessera.plan.inference import InferenceTime, inference_time
from tessera.plan.layout import InferenceRun, Layout, TrainingRun
from tessera.plan.machine import MACHINES, Machine, machine_named
from tessera.plan.memory import Memory, inference_memory, training_memory
from tessera.plan.nvl72 import NVL72Optimizer
from tessera.plan.presets import MODELS, gpt_120b, model_named
from tessera.plan.search import (
    Plan,
    Search,
    choose_mesh,
    plan_inference,
    plan_training,
    search_inference,
    search_training,
)
from tessera.plan.training import StepTime, training_time
from tessera.plan.words import describe, explain

__all__ = [
    "MACHINES", "MODELS", "InferenceRun", "InferenceTime", "Layout", "Machine", "Memory", "NVL72Optimizer", "Plan",
    "Search", "StepTime", "TrainingRun", "choose_mesh", "describe", "explain", "gpt_120b", "inference_memory",
    "inference_time", "machine_named", "model_named", "plan_inference", "plan_training", "search_inference",
    "search_training", "training_memory", "training_time"]
