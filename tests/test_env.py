"""The environment table: defaults, parsing, errors that name the variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera import env
from tessera.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent / "tessera"


@pytest.mark.parametrize("name", sorted(env.VARIABLES))
def test_default_when_unset(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    assert env.get(name) == env.VARIABLES[name].default
    assert env.VARIABLES[name].doc.endswith(".")


@pytest.mark.parametrize("name, text, value", [
    ("TESSERA_CACHE_DIR", "/tmp/kernels", Path("/tmp/kernels")),
    ("TESSERA_CACHE_MB", "64", 64),
    ("TESSERA_BACKEND", "interp", "interp"),
    ("TESSERA_DUMP", "ir,llvm", "ir,llvm"),
    ("TESSERA_DUMP", " ir, llvm ", "ir,llvm"),
    ("TESSERA_CPU", "avx2", "avx2"),
    ("TESSERA_DEBUG", "1", True),
    ("TESSERA_DEBUG", "off", False),
    ("TESSERA_DEBUG", "", False),
])
def test_value(name, text, value, monkeypatch):
    monkeypatch.setenv(name, text)
    assert env.get(name) == value


@pytest.mark.parametrize("name, text", [
    ("TESSERA_CACHE_MB", "many"), ("TESSERA_CACHE_MB", "-5"),
    ("TESSERA_BACKEND", "tpu"), ("TESSERA_CPU", "i386"), ("TESSERA_DEBUG", "perhaps"),
])
def test_unreadable_value_is_named(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=f"{name}='{text}'"):
        env.get(name)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("TESSERA_CACHE_DIR", "~/kernels")
    assert env.get("TESSERA_CACHE_DIR") == Path("/home/ada/kernels")


def test_every_variable_that_the_sources_name_is_in_the_table():
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"\bTESSERA_[A-Z]+(?:_[A-Z]+)*\b", text))
    assert named == set(env.VARIABLES)
