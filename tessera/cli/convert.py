"""`tessera convert`: between GGUF files and Hugging Face folders.

In: the path of one. Out: the other, complete or not at all. Called by cli.app.
"""

from __future__ import annotations

from pathlib import Path

from tessera.cli.loading import progress_bar, resolve
from tessera.data.tokenizer import load_tokenizer
from tessera.errors import InputError, NotFoundError
from tessera.models.convert import gguf_to_hf, hf_to_gguf


def run(source: str, target: Path, *, kind: str | None) -> None:
    """Convert, with a progress bar on a terminal.

    Args:
        source: a GGUF file, a folder, or "smollm2".
        target: a folder for a GGUF file, a path that ends with .gguf for a folder.
        kind: how weights are stored; default bf16 in folders, f16 in GGUF files.

    Raises:
        InputError: source and target are of the same kind, or the kind of storage is not known there.
        NotFoundError: there is no such source.
    """
    path = resolve(source)
    if not path.exists():
        raise NotFoundError(f"source: nothing at {str(path)!r}; expected a model folder or a GGUF file")
    is_gguf_target = target.suffix == ".gguf"
    if path.is_dir() != is_gguf_target:
        expected = "a path that ends with .gguf" if path.is_dir() else "a folder"
        raise InputError(f"target: {str(target)!r} given for {str(path)!r}; expected {expected}")
    with progress_bar(f"converting {path.name}") as progress:
        if is_gguf_target:
            hf_to_gguf(path, target, type=(kind or "f16").upper(), progress=progress)
        else:
            gguf_to_hf(path, target, dtype=kind or "bf16", tokenizer=load_tokenizer(path), progress=progress)
