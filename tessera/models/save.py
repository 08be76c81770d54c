"""save_model: a GPTModel as a Hugging Face folder that transformers reads.

In: a GPTModel. Out: config.json, model.safetensors (or shards and their index), and the tokenizer's
files. Called as ts.save_model by users, trainers, models.convert and the command line.

Everything is written to a hidden folder next to the target and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera import ops
from tessera.errors import InputError, UnsupportedError, UnsupportedFileError
from tessera.formats.safetensors import INDEX_NAME, SINGLE_NAME
from tessera.models.config import GPTConfig
from tessera.models.gpt import GPTModel
from tessera.models.hf import config_from_hf, config_to_hf
from tessera.models.names import FAMILIES, Source, merge, source_of
from tessera.nn import BlockWeight

# What a model folder may hold and save_model may therefore replace.
_REPLACEABLE = ("config.json", "generation_config.json", SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors",
                "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json",
                "merges.txt")  # fmt: skip

# Fields that say how a model runs, not what it computes; files do not carry them.
_EXECUTION = ("family", "use_flash_attention", "gradient_checkpointing", "tp_size", "pp_size", "dp_size",
              "weight_dtype", "compute_dtype", "kv_cache_dtype", "use_kv_cache_compression")  # fmt: skip


class SavesFiles(Protocol):
    """What save_model needs of a tokenizer: data.Tokenizer has it."""

    def save(self, folder: Path) -> None: ...


def save_model(
    model: GPTModel, path: str | os.PathLike[str], shard_bytes: int = 5 << 30, tokenizer: SavesFiles | None = None,
) -> None:
    """Write a folder that `load_model` and transformers' AutoModelForCausalLM read.

    Args:
        model: of a configuration that one of the Llama, Mistral, Qwen2, Qwen3 or GPT-2 classes can express;
            8-bit weights are written in compute_dtype.
        path: the folder. An existing model folder is replaced; one with other files in it is refused.
        shard_bytes: largest size of a weights file in bytes (a larger tensor gets a file of its own).
        tokenizer: its `save(folder)` is called to add its files.

    Raises:
        InputError: shard_bytes is not positive, the path is a file or a folder with foreign files, or
            parameters are on the meta device.
        UnsupportedError: no family can express the configuration; names the fields.
    """
    if shard_bytes <= 0:
        raise InputError(f"shard_bytes: {shard_bytes} given; expected a positive number of bytes")
    if any(p.is_meta for p in model.parameters()):
        raise InputError("model: its parameters are on the meta device; expected a filled model")
    family = saved_family(model.config)
    with replacing_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, family), indent=2) + "\n")
        _write_weights(model, family, folder, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)


def saved_family(config: GPTConfig) -> str:
    """The family whose files express `config`: its own, or for models built by hand the first that can.

    Raises:
        UnsupportedError: none can; names the fields that its own family (or llama) would lose.
    """
    candidates = [config.family] if config.family in FAMILIES else list(FAMILIES)
    losses = [lost_fields(config, lambda c, f=family: config_from_hf(config_to_hf(c, f))) for family in candidates]
    for family, lost in zip(candidates, losses):
        if not lost:
            return family
    raise UnsupportedError(
        f"model: config.json of family {candidates[0]!r} cannot express {', '.join(losses[0])} of its configuration")


def lost_fields(config: GPTConfig, round_trip: Callable[[GPTConfig], GPTConfig]) -> list[str]:
    """The fields of `config` that do not survive being written and read back."""
    try:
        back = round_trip(config)
    except UnsupportedFileError as error:
        return [str(error)]
    back = replace(back, head_dim=back.d_head, **{name: getattr(config, name) for name in _EXECUTION})
    config = replace(config, head_dim=config.d_head)
    return [f.name for f in fields(config) if getattr(back, f.name) != getattr(config, f.name)]


def stored_tensors(
    model: GPTModel, layout: str, family: str,
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(name, shape, how to make it) of every tensor in a file of `layout`; made one at a time."""
    config = model.config
    groups: dict[str, list[tuple[Source, str]]] = {}
    for name in _names(model):
        source = source_of(name, layout, family, config.n_heads, config.n_kv_heads)
        groups.setdefault(source.name, []).append((source, name))
    for stored, parts in groups.items():
        shape = parts[0][0].stored_shape(_shape(model, parts[0][1]))
        yield stored, shape, lambda parts=parts: merge([(source, _value(model, name)) for source, name in parts])


def _names(model: GPTModel) -> list[str]:
    """The model's parameters, and the weights that lie in blocks."""
    blocks = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BlockWeight)]
    return blocks + [name for name, _ in model.named_parameters()]


def _shape(model: GPTModel, name: str) -> tuple[int, ...]:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, BlockWeight) and name.endswith(".weight"):
        return module.shape
    return tuple(model.get_parameter(name).shape)


def _value(model: GPTModel, name: str) -> Tensor:
    """A parameter on the CPU, in compute_dtype where it is stored in fewer bits."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, BlockWeight) and name.endswith(".weight"):
        return module.weight.to("cpu", model.config.compute.torch)
    weight = model.get_parameter(name).detach()
    scale = getattr(module, "weight_scale", None)
    if scale is not None and name.endswith(".weight"):
        weight = ops.dequantize_rows(weight, scale, model.config.compute.torch)
    return weight.cpu()


def _write_weights(model: GPTModel, family: str, folder: Path, shard_bytes: int) -> None:
    width = model.config.param.torch.itemsize
    shards: list[list[tuple[str, Callable[[], Tensor]]]] = [[]]
    size = total = 0
    for name, shape, make in stored_tensors(model, "hf", family):
        nbytes = torch.Size(shape).numel() * width
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, make))
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: make() for name, make in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends and is gone if it raises.

    Raises:
        InputError: `path` is a file, or a folder with files that are not a model's.
    """
    path = Path(path).absolute()
    if path.exists():
        foreign = [] if not path.is_dir() else [
            entry.name for entry in path.iterdir() if not any(entry.match(p) for p in _REPLACEABLE)]
        if not path.is_dir() or foreign:
            what = f"holds {', '.join(sorted(foreign)[:3])}" if foreign else "is a file"
            raise InputError(f"path: {str(path)!r} {what}; expected a new folder or a model folder to replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()  # by the user's umask; mkdtemp's own folder is private
        yield new
        for file in new.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(file: Path) -> None:
    """Have the contents on disk before the rename is: a crash must not leave a complete name on half a file."""
    if file.is_file():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
