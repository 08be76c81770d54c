"""Every exception that Tessera raises on purpose.

Each message is one line that names the argument or file, what was given and what was expected.
The command line prints it and exits with code 2; a library user catches `TesseraError`.
"""

from __future__ import annotations


class TesseraError(Exception):
    """Base of all errors raised by Tessera."""


class InputError(TesseraError, ValueError):
    """An argument, a configuration field or a request has a value that cannot be used."""


class ShapeError(InputError):
    """Tensor dims or dtypes do not fit a signature."""


class FileFormatError(InputError):
    """A file from outside (GGUF, safetensors, tokenizer, config) is damaged, hostile or not understood."""


class NotFoundError(InputError, FileNotFoundError):
    """A path, a package or a device that was asked for is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedError(TesseraError, NotImplementedError):
    """The request makes sense but this version (or this machine) cannot serve it; the message says what can."""


class UnsupportedFileError(FileFormatError, UnsupportedError):
    """A file from outside that may be sound but asks for something this version does not implement."""


class CompileError(TesseraError):
    """A kernel does not compile; the message carries file, line and caret."""


class LaunchError(InputError):
    """A kernel was launched with tensors that do not fit its signature."""


class NumericalError(TesseraError, ArithmeticError):
    """A function that promises finite results of finite numbers overflowed; the message names it and the result."""


class CollectiveError(TesseraError):
    """A collective failed: a rank died, is missing, or called another one; the message names it."""
