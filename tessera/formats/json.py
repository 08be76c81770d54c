"""Bounded JSON from outside.

In: the path or the text of a JSON object. Out: a dict. Called by formats.safetensors (headers and
indexes), models.hf (config.json) and data (tokenizer files).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tessera.errors import FileFormatError, NotFoundError

MAX_CONFIG_BYTES = 4 << 20


def parse_json_object(text: bytes | str, source: str) -> dict[str, Any]:
    """Parse a JSON object; a key that stands twice is an error, since readers differ in which one counts.

    Args:
        text: UTF-8 bytes or a string.
        source: what to call the text in errors, usually its path.

    Raises:
        FileFormatError: not UTF-8, not JSON, nested too deep, not an object, or a key stands twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(k for k, _ in pairs).most_common(1)[0][0]
            raise FileFormatError(f"{source}: key {twice!r} stands twice")
        return found

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique)
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{source}: holds a JSON {type(value).__name__}; expected an object")
    return value


def read_json_object(path: str | os.PathLike[str], max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most `max_bytes` bytes.

    Raises:
        NotFoundError: there is no file at `path`.
        FileFormatError: the file is too large or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"path: no file at {str(path)!r}")
    with open(path, "rb") as stream:
        text = stream.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise FileFormatError(f"{path}: larger than {max_bytes} bytes")
    return parse_json_object(text, str(path))
