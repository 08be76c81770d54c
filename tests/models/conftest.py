"""Tiny random Hugging Face folders of every family, for any test that reads model files."""

from __future__ import annotations

import pytest

from .families import FIELDS, reference


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """`hf_folder(family, seed=0, **config)` -> (folder, transformers model); saved once a session each."""
    made = {}

    def make(family, seed=0, shard_size="5GB", **fields):
        key = (family, seed, shard_size, repr(sorted(fields.items())))
        if key not in made:
            model = reference(family, seed, **fields)
            folder = tmp_path_factory.mktemp(f"hf-{family}")
            model.save_pretrained(folder, max_shard_size=shard_size)
            made[key] = (folder, model)
        return made[key]

    return make


@pytest.fixture(params=sorted(FIELDS))
def family(request):
    return request.param
