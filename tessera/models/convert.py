"""Between GGUF files and Hugging Face folders.

In: the path of one. Out: the other. Called by the command line (tessera convert).

GGUF to folder keeps every number that `load_model` reads, in the dtype asked for. Folder to GGUF writes
F32, F16, BF16 or a block format (Q8_0, Q4_0, Q4_1) with the gguf package's quantizers; norms and biases
stay F32, and embeddings in the 4-bit formats are Q8_0, as llama.cpp writes them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tessera.errors import InputError, UnsupportedError
from tessera.models.config import GPTConfig
from tessera.models.gguf import config_from_gguf, config_to_gguf, llama3_factors, shortest_float
from tessera.models.gguf_vocabulary import vocabulary_metadata
from tessera.models.gpt import GPTModel
from tessera.models.load import Progress, load_model
from tessera.models.save import SavesFiles, lost_fields, save_model, stored_tensors

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_QUANTIZATION_VERSION = 2  # of the block formats' layout (GGML_QNT_VERSION)


def gguf_to_hf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: str = "bf16",
    tokenizer: SavesFiles | None = None, progress: Progress | None = None,
) -> None:
    """Write the model of a GGUF file as a Hugging Face folder.

    Args:
        source: the GGUF file.
        target: the folder, see save_model.
        dtype: of the written weights: "f32" (exact), "bf16" or "f16".
        tokenizer: `load_tokenizer(source)`, whose files are added; None for weights only.
        progress: as in load_model.

    Raises:
        NotFoundError, FileFormatError, InputError, UnsupportedError: as load_model and save_model.
    """
    save_model(load_model(source, dtype, progress=progress), target, tokenizer=tokenizer)


def hf_to_gguf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], type: str = "F16", pre: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model of a Hugging Face folder, and its tokenizer.json if it has one, as a GGUF file.

    Args:
        source: the folder.
        target: the file; replaced when the new one is complete.
        type: storage of the matrices, one of GGUF_TYPES. Rows that are no multiple of 32 are kept in F16.
        pre: the pre-tokenizer's name (tokenizer.ggml.pre), where tokenizer.json has one of unknown form.
        progress: as in load_model.

    Raises:
        InputError: `type` is unknown.
        UnsupportedError: GGUF cannot express the configuration, or the tokenizer is of another kind.
        NotFoundError, FileFormatError: as load_model.
    """
    if type not in GGUF_TYPES:
        raise InputError(f"type: {type!r} given; expected one of {', '.join(GGUF_TYPES)}")
    model = load_model(source, "auto", progress=progress)
    save_gguf(model, target, type, vocabulary_metadata(Path(source), model.config.vocab_size, pre))


def save_gguf(
    model: GPTModel, path: str | os.PathLike[str], type: str = "F16", vocabulary: dict[str, Any] | None = None,
) -> None:
    """Write a model as a GGUF file.

    Args:
        model: of a configuration that GGUF can express.
        path: the file; replaced when the new one is complete.
        type: one of GGUF_TYPES.
        vocabulary: further metadata, e.g. from gguf_vocabulary.vocabulary_metadata.

    Raises:
        InputError: `type` is unknown.
        UnsupportedError: GGUF cannot express the configuration; names the fields.
    """
    if type not in GGUF_TYPES:
        raise InputError(f"type: {type!r} given; expected one of {', '.join(GGUF_TYPES)}")
    tensors: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {
        name: (shape, make) for name, shape, make in stored_tensors(model, "gguf", model.config.family)}
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        factors = llama3_factors(scaling, model.config.d_head, model.config.rope_theta)
        tensors = {"rope_freqs.weight": (tuple(factors.shape), lambda: factors), **tensors}
    _check_expressible(model.config, tensors)
    arch, metadata = config_to_gguf(model.config)
    metadata |= vocabulary or {}
    metadata |= {"general.file_type": int(_FILE_TYPES[type]), "general.quantization_version": _QUANTIZATION_VERSION}
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        _write(Path(folder) / "new.gguf", arch, metadata, tensors, type)
        os.replace(Path(folder) / "new.gguf", path)


_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}  # fmt: skip


def _check_expressible(config: GPTConfig, tensors: dict[str, Any]) -> None:
    def round_trip(config: GPTConfig) -> GPTConfig:
        arch, metadata = config_to_gguf(config)
        factors = tensors["rope_freqs.weight"][1]() if "rope_freqs.weight" in tensors else None
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        return config_from_gguf(
            {"general.architecture": arch, **metadata}, shapes, "GGUF", rope_factors=factors)

    # GGUF keeps numbers as float32 and one end-of-sequence id: neither makes it another model.
    eos = config.eos_token_id
    config = replace(config, norm_eps=shortest_float(config.norm_eps), rope_theta=shortest_float(config.rope_theta),
                     eos_token_id=eos[0] if isinstance(eos, tuple) else eos)
    lost = lost_fields(config, round_trip)
    if lost:
        raise UnsupportedError(f"model: GGUF of family {config.family!r} cannot express {', '.join(lost)}")


def _write(
    path: Path, arch: str, metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]], type: str,
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        kind = _value_type(value)
        writer.add_key_value(key, value, kind, _item_type(value) if isinstance(value, list) else None)
    kinds = {name: _storage(name, shape, type) for name, (shape, _) in tensors.items()}
    for name, (shape, _) in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, make) in tensors.items():
            writer.write_tensor_data(gguf.quants.quantize(make().float().numpy(), kinds[name]))
    finally:
        writer.close()


def _value_type(value: Any) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    return GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.ARRAY


def _item_type(values: list[Any]) -> GGUFValueType:
    kind = _value_type(values[0])
    return GGUFValueType.INT32 if kind == GGUFValueType.UINT32 else kind  # token types are signed, says the format


def _storage(name: str, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    if len(shape) < 2 or name == "position_embd.weight":
        return GGMLQuantizationType.F32
    if type in ("Q4_0", "Q4_1") and name in ("token_embd.weight", "output.weight"):
        type = "Q8_0"
    kind = GGMLQuantizationType[type]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind
