"""Errors: one base, and the built-in types that a user may catch them as."""

from __future__ import annotations

import inspect

import pytest

from tessera import errors


@pytest.mark.parametrize("name", [n for n, c in vars(errors).items() if inspect.isclass(c)])
def test_one_base(name):
    assert issubclass(getattr(errors, name), errors.TesseraError)


@pytest.mark.parametrize("error, builtin", [
    (errors.InputError, ValueError), (errors.ShapeError, ValueError), (errors.FileFormatError, ValueError),
    (errors.NotFoundError, FileNotFoundError), (errors.UnsupportedError, NotImplementedError),
    (errors.UnsupportedFileError, errors.FileFormatError), (errors.UnsupportedFileError, errors.UnsupportedError),
    (errors.LaunchError, errors.InputError),
])
def test_builtin_types(error, builtin):
    with pytest.raises(builtin, match="dtype: int3 given"):
        raise error("dtype: int3 given; expected int4")


def test_not_found_shows_its_message():
    assert str(errors.NotFoundError("path: nothing at 'x'")) == "path: nothing at 'x'"
    assert str(errors.NotFoundError()) == ""
