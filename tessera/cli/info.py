"""`tessera info`: what a model file holds.

In: a path; only headers are read, never weights. Out: a table or JSON on stdout. Called by cli.app.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.cli.environment import print_rows
from tessera.cli.loading import resolve
from tessera.errors import InputError, NotFoundError
from tessera.formats.gguf import open_gguf
from tessera.formats.json import read_json_object
from tessera.formats.safetensors import open_safetensors
from tessera.models.config import GPTConfig
from tessera.models.gguf import GGUFCheckpoint
from tessera.models.hf import config_from_hf
from tessera.types import dtype_of

_CACHE_DTYPES = ("f32", "bf16", "fp8_e4m3")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the headers of a model's files say.

    Attributes:
        format: "gguf" or "safetensors".
        config: the model's configuration.
        bytes_by_dtype: stored bytes of the tensors of each type, the largest first.
        tensor_count: tensors in the files.
    """

    format: str
    config: GPTConfig
    bytes_by_dtype: dict[str, int]
    tensor_count: int


def read_headers(path: Path) -> Stored:
    """Headers of a model folder or a GGUF file.

    Raises:
        NotFoundError: there is nothing, or the folder has no config.json.
        FileFormatError: a file is damaged or not understood.
    """
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFoundError(f"path: folder {str(path)!r} has no config.json")
        config = config_from_hf(read_json_object(path / "config.json"), str(path / "config.json"))
        with open_safetensors(path) as reader:
            sizes = [(dtype_of(tensor.dtype).name, tensor.nbytes) for tensor in reader.tensors.values()]
        return _stored("safetensors", config, sizes)
    if not path.exists():
        raise NotFoundError(f"path: nothing at {str(path)!r}; expected a model folder or a GGUF file")
    checkpoint = GGUFCheckpoint(path)
    checkpoint.close()
    with open_gguf(path) as file:
        sizes = [(info.type.name, info.nbytes) for info in file.tensors.values()]
    return _stored("gguf", checkpoint.config, sizes)


def _stored(kind: str, config: GPTConfig, sizes: list[tuple[str, int]]) -> Stored:
    by_dtype: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        by_dtype[dtype] += nbytes
    return Stored(format=kind, config=config, bytes_by_dtype=dict(by_dtype.most_common()), tensor_count=len(sizes))


def cache_bytes(config: GPTConfig, context: int, batch: int, dtype: str) -> int:
    """Bytes of keys and values for `batch` rows of `context` tokens; 8-bit types have an f32 scale a head."""
    bits = dtype_of(dtype).bits
    head_bytes = config.d_head * bits // 8 + (4 if bits == 8 else 0)
    return 2 * config.n_layers * config.n_kv_heads * batch * context * head_bytes


def run(path: str, *, context: int | None, batch: int, as_json: bool) -> None:
    """Describe a model.

    Raises:
        InputError: context or batch below 1, context above the model's.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"--{name}: {value} given; expected at least 1")
    found = resolve(path)
    stored = read_headers(found)
    config = stored.config
    if context is not None and context > config.max_seq_len:
        raise InputError(f"--context: {context} given; expected at most {config.max_seq_len}, the model's")
    context = context or config.max_seq_len
    description: dict[str, Any] = {
        "path": str(found), "format": stored.format, "architecture": config.family, "parameters": config.n_params,
        "tensors": stored.tensor_count, "bytes": sum(stored.bytes_by_dtype.values()),
        "bytes_by_dtype": stored.bytes_by_dtype, "layers": config.n_layers, "d_model": config.d_model,
        "d_ffn": config.d_ffn, "heads": config.n_heads, "kv_heads": config.n_kv_heads, "head_dim": config.d_head,
        "vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len, "tied_embeddings": config.tie_embeddings,
        "context": context, "batch": batch,
        "kv_cache_bytes": {dtype: cache_bytes(config, context, batch, dtype) for dtype in _CACHE_DTYPES},
    }
    if as_json:
        print(json.dumps(description))
    else:
        print_rows(_readable(description))


def _readable(description: dict[str, Any]) -> list[tuple[str, str]]:
    """The JSON description as rows for a reader; sizes in binary units."""
    fields = dict(description)
    tensors, total = fields.pop("tensors"), fields.pop("bytes")
    by_dtype, caches = fields.pop("bytes_by_dtype"), fields.pop("kv_cache_bytes")
    context, batch = fields.pop("context"), fields.pop("batch")
    parameters = fields["parameters"]
    fields["parameters"] = f"{parameters:,} ({parameters / 1e6:.1f} M)"
    rows = [(name.replace("_", " "), str(value)) for name, value in fields.items()]
    stored = ", ".join(f"{dtype} {_size(nbytes)}" for dtype, nbytes in by_dtype.items())
    rows.append(("stored", f"{_size(total)} in {tensors} tensors: {stored}"))
    cached = ", ".join(f"{_size(nbytes)} as {dtype}" for dtype, nbytes in caches.items())
    rows.append(("kv cache", f"{cached} (batch {batch}, {context} tokens)"))
    return rows


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
