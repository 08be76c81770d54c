"""load_model: a GPTModel from a Hugging Face folder or a GGUF file.

In: a path. Out: a GPTModel in eval mode, filled. Called as ts.load_model by users, the engines and the
command line.

The model is built on the meta device and filled tensor by tensor, each converted while it is read, so
that peak memory is the model plus one tensor (a fused one, in GPT-2 files) and a few MB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tessera.dist import Mesh
from tessera.errors import FileFormatError, InputError, NotFoundError, UnsupportedError, UnsupportedFileError
from tessera.formats.blocks import Window
from tessera.formats.json import read_json_object
from tessera.formats.safetensors import open_safetensors
from tessera.models import gpt_plan
from tessera.models.config import GPTConfig
from tessera.models.gguf import GGUFCheckpoint
from tessera.models.gpt import GPTModel
from tessera.models.hf import config_from_hf
from tessera.models.names import Source, is_ignored, source_of
from tessera.nn import BlockEmbedding, BlockLinear, Embedding, Linear
from tessera.types import dtype_of

Progress = Callable[[int, int, str], None]
"""Called after each parameter with (bytes done, bytes in all, its name)."""

_DTYPES = ("f32", "bf16", "f16")
_CONFIG_NAME = "config.json"


class Checkpoint(Protocol):
    """What load_model needs of a file format: HFCheckpoint and GGUFCheckpoint have it."""

    layout: str  # "hf" or "gguf", for models.names
    config: GPTConfig
    shapes: dict[str, tuple[int, ...]]
    stored_dtype: str

    def tensor(self, name: str, dtype: torch.dtype, window: Window | None = None) -> Tensor: ...
    def blocks(self, name: str) -> tuple[Tensor, str] | None: ...
    def close(self) -> None: ...


class HFCheckpoint:
    """A folder with config.json and safetensors."""

    layout = "hf"

    def __init__(self, folder: Path) -> None:
        if not (folder / _CONFIG_NAME).is_file():
            raise NotFoundError(f"path: folder {str(folder)!r} has no {_CONFIG_NAME}")
        self.config = config_from_hf(read_json_object(folder / _CONFIG_NAME), str(folder / _CONFIG_NAME))
        self._reader = open_safetensors(folder)
        self._names = {_full_name(name, self.config.family): name for name in self._reader.tensors}
        if len(self._names) < len(self._reader.tensors):
            self._reader.close()
            raise FileFormatError(f"{folder}: holds tensors both with and without the prefix of the base model")
        self.shapes = {full: self._reader.tensors[name].shape for full, name in self._names.items()}
        embed_name = source_of("embed.weight", "hf", self.config.family, 0, 0).name
        embedding = self._reader.tensors.get(self._names.get(embed_name, ""))
        stored = dtype_of(embedding.dtype).name if embedding is not None else "f32"
        self.stored_dtype = stored if stored in _DTYPES else "f32"

    def tensor(self, name: str, dtype: torch.dtype, window: Window | None = None) -> Tensor:
        stored = self._reader.tensors[self._names[name]].dtype
        if not stored.is_floating_point or stored.itemsize == 1:
            raise UnsupportedFileError(f"tensor {name!r} is stored as {stored}; quantized checkpoints are not read")
        return self._reader.tensor(self._names[name], dtype, window)

    def blocks(self, name: str) -> tuple[Tensor, str] | None:
        return None

    def close(self) -> None:
        self._reader.close()


def _full_name(name: str, family: str) -> str:
    """Names in files of the bare model lack its prefix ("h.0..." for "transformer.h.0...")."""
    prefix = "transformer." if family == "gpt2" else "model."
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


@torch.inference_mode(False)  # parameters that a trainer can use, wherever the call stands
def load_model(
    path: str | os.PathLike[str], dtype: str = "f32", device: str | torch.device = "cpu",
    progress: Progress | None = None, *, mesh: Mesh | None = None, keep_quantized: bool = False,
    activations: str | None = None,
) -> GPTModel:
    """Load a model of the Llama, Mistral, Qwen2, Qwen3 or GPT-2 family.

    Args:
        path: a folder with config.json and model.safetensors (or model.safetensors.index.json and its
            shards), or a GGUF file.
        dtype: of weights and activations: "f32", "bf16", "f16" or "auto" (as the embedding is stored; GGUF: bf16).
        device: where the parameters go.
        progress: called after each parameter with (bytes done, bytes in all, name).
        mesh: the ranks that models.gpt_plan cuts the model over; of what is cut, only this rank's part is read.
        keep_quantized: matrices that a GGUF file holds as Q8_0, Q4_0 or Q4_1 stay so in memory and are dequantized
            in registers, in f32, as they are used: the values are the same, decoding reads a fraction of the bytes,
            and they cannot be trained. Other matrices are dequantized to `dtype`, as all are without it.
        activations: "int8" rounds what is multiplied with matrices that stay quantized to 8 bits as well, by groups of
            32: faster, but no longer the numbers of the dequantized model (see ops.block_linear for the bound).

    Returns:
        The model in eval mode; `.config` describes it.

    Raises:
        NotFoundError: the path, config.json or a shard is missing.
        UnsupportedFileError: an architecture, a storage type or a configuration that is not implemented.
        FileFormatError: a file is damaged, or its tensors do not fit its configuration.
        InputError: dtype or activations is not one of the above, activations are given without keep_quantized, or
            the mesh does not fit the model.
        UnsupportedError: keep_quantized with a mesh of several ranks.
    """
    if keep_quantized and mesh is not None and mesh.size() > 1:
        raise UnsupportedError(f"keep_quantized: given with a mesh of {mesh.size()} ranks; blocks are not cut")
    if activations not in (None, "int8") or (activations and not keep_quantized):
        raise InputError(f"activations: {activations!r} given; expected 'int8', with keep_quantized, or None")
    if dtype != "auto" and dtype_of(dtype).name not in _DTYPES:
        raise InputError(f"dtype: {dtype!r} given; expected auto, {', '.join(_DTYPES)}")
    checkpoint = _open(Path(path))
    try:
        name = checkpoint.stored_dtype if dtype == "auto" else dtype_of(dtype).name
        precision = f"{name} @accum(fp32)"
        config = replace(checkpoint.config, weight_dtype=precision, compute_dtype=precision, kv_cache_dtype=name)
        _check_size(config, checkpoint, path)
        with torch.device("meta"):
            model = GPTModel(config, mesh)
        sources = _match(model, checkpoint, path)
        if keep_quantized:
            _keep_blocks(model, checkpoint, sources, torch.device(device), activations)
        _fill(model, checkpoint, sources, torch.device(device), progress)
    finally:
        checkpoint.close()
    return model.eval()


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return HFCheckpoint(path)
    if not path.exists():
        raise NotFoundError(f"path: nothing at {str(path)!r}; expected a model folder or a GGUF file")
    if path.suffix == ".safetensors":
        raise InputError(f"path: {str(path)!r} is a weights file; give its folder, which has {_CONFIG_NAME}")
    return GGUFCheckpoint(path)


def _check_size(config: GPTConfig, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Before the model is built: damaged sizes must not build layers for minutes, or overflow torch's counts.

    The margin leaves smaller differences to `_match`, which names the tensors.
    """
    stored = sum(prod(shape) for shape in checkpoint.shapes.values())
    if config.n_params > 4 * stored:
        raise FileFormatError(f"{path}: {config.n_params} parameters announced, but its tensors hold {stored} numbers")


def _match(model: GPTModel, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> dict[str, Source]:
    """The source of every parameter, after checking that all tensors are there, fit, and are used."""
    config, shapes = model.config, checkpoint.shapes
    sources: dict[str, Source] = {}
    expected: dict[str, tuple[int, ...]] = {}
    cuts = gpt_plan.cuts(model)
    for name, parameter in model.named_parameters():
        source = source_of(name, checkpoint.layout, config.family, config.n_heads, config.n_kv_heads)
        shape = list(parameter.shape)
        if name in cuts:
            shape[cuts[name].dim] = cuts[name].whole
        sources[name], expected[source.name] = source, source.stored_shape(tuple(shape))
    if model.lm_head is None:  # a copy of the embedding, in files whose writer did not tie
        head = source_of("lm_head.weight", checkpoint.layout, config.family, 0, 0).name
        if head in shapes:
            expected[head] = shapes[source_of("embed.weight", checkpoint.layout, config.family, 0, 0).name]
    extra = [name for name in shapes if name not in expected and not is_ignored(name, checkpoint.layout)]
    wrong = [f"{name} {list(shapes[name])} (expected {list(shape)})"
             for name, shape in expected.items() if name in shapes and shapes[name] != shape]
    problems = [
        _few("missing", [name for name in expected if name not in shapes]),
        _few("unexpected", extra),
        _few("of wrong shape", wrong),
    ]
    if any(problems):
        raise FileFormatError(f"{path}: tensors do not fit the configuration: {'; '.join(filter(None, problems))}")
    return sources


def _few(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what}: {', '.join(names[:3])}{more}" if names else ""


def _keep_blocks(model: GPTModel, checkpoint: Checkpoint, sources: dict[str, Source], device: torch.device,
                 activations: str | None) -> None:
    """Put block modules in the place of Linear and Embedding whose tensors can be used as they are stored; their
    entries leave `sources`."""
    for name, module in list(model.named_modules()):
        source = sources.get(f"{name}.weight")
        if source is None or source.transposed or not isinstance(module, (Linear, Embedding)) or name == "pos_embed":
            continue
        found = checkpoint.blocks(source.name)
        if found is None:
            continue
        blocks, kind = source.extract(found[0]).to(device), found[1]
        del sources[f"{name}.weight"]
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        made = BlockEmbedding(blocks, kind, module.out_dtype) if isinstance(module, Embedding) else \
            BlockLinear(blocks, kind, module.bias, module.blocks)
        made.activations = activations
        setattr(parent, leaf, made)


def _fill(
    model: GPTModel, checkpoint: Checkpoint, sources: dict[str, Source], device: torch.device,
    progress: Progress | None,
) -> None:
    parameters = dict(model.named_parameters())
    done = sum(b.nbytes for b in model.buffers() if not b.is_meta)  # blocks that are there already
    total = done + sum(p.nbytes for p in parameters.values())
    cuts = gpt_plan.cuts(model)
    by_stored: dict[tuple[str, Window | None], list[str]] = {}
    for name, source in sources.items():
        window = None
        if name in cuts:
            window, sources[name] = _own_part(source, cuts[name], checkpoint.shapes[source.name])
        by_stored.setdefault((source.name, window), []).append(name)
    for (stored_name, window), names in by_stored.items():
        stored = checkpoint.tensor(stored_name, parameters[names[0]].dtype, window)
        for name in names:
            value = sources[name].extract(stored)
            if len(names) > 1 and value.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
                value = value.clone()  # a third that is contiguous as it lies would keep all three alive
            _assign(model, name, value.to(device))
            done += value.nbytes
            if progress is not None:
                progress(done, total, name)


def _own_part(source: Source, cut: gpt_plan.Cut, shape: tuple[int, ...]) -> tuple[Window, Source]:
    """Which part of a stored tensor holds a cut parameter, and how to get from that part to the parameter."""
    start, stop = cut.start, cut.stop
    if source.part is not None and cut.dim == 0:
        start, stop = start + source.part * cut.whole, stop + source.part * cut.whole
    bounds = [(0, size) for size in shape]
    bounds[1 - cut.dim if source.transposed else cut.dim] = (start, stop)
    paired = source.paired_heads * cut.size // cut.whole if cut.dim == 0 else source.paired_heads
    return tuple(bounds), replace(source, part=None, paired_heads=paired)


def _assign(model: GPTModel, name: str, value: Tensor) -> None:
    module_name, leaf = name.rsplit(".", 1)
    module = model.get_submodule(module_name)
    setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))
