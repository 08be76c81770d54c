"""Every kernel of `wrong_kernels` fails to compile with the message, line and caret that its comment says."""

import inspect
import re
from pathlib import Path

import pytest

from tessera.errors import CompileError
from tessera.kernel import Kernel
from tests.kernel import wrong_kernels

LINES = Path(wrong_kernels.__file__).read_text().splitlines()
KERNELS = [k for k in vars(wrong_kernels).values() if isinstance(k, Kernel)]


def expectation(kernel: Kernel) -> tuple[int, list[str]]:
    """The line and the parts of the comment, in the kernel or in the helper that it calls."""
    functions = [kernel.function, wrong_kernels.helper, wrong_kernels.forever]
    names = kernel.function.__code__.co_names
    for function in functions:
        if function is kernel.function or function.__name__ in names:
            lines, first = inspect.getsourcelines(function)
            for offset, line in enumerate(lines):
                if "# error: " in line:
                    return first + offset, line.split("# error: ")[1].strip().split(" @ ")
    raise AssertionError(f"{kernel.name} says no error")


def test_there_are_enough():
    assert len(KERNELS) >= 80


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_wrong_kernel(kernel):
    line, parts = expectation(kernel)
    fragment, rest = parts[0], parts[1:]
    with pytest.raises(CompileError) as caught:
        kernel.check()
    head, source, caret, *notes = str(caught.value).splitlines()
    assert head.startswith(f"{wrong_kernels.__file__}:{line}: ")
    assert fragment in head
    assert source.strip() == LINES[line - 1].strip()
    span = re.search(r"\^+", caret)
    underlined = source[span.start():span.end()]
    # " @ " also is Python's matrix product: the underlined text is the longest prefix that fits.
    expected = [" @ ".join(rest[:n]) for n in range(len(rest), 0, -1)]
    assert underlined in expected
    wanted = rest[len(underlined.split(" @ ")):]
    assert all(any(note in text for text in notes) for note in wanted)
