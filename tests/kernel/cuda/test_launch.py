"""What a launch does when the GPU refuses it."""

import pytest
from triton.runtime.errors import OutOfResources

from tessera.errors import UnsupportedError
from tessera.kernel.backends.cuda.kernel import KernelText
from tessera.kernel.backends.cuda.launch import _Launch


class Gpu:
    """A jitted kernel on a GPU on which so many stages fit."""

    def __init__(self, stages: int) -> None:
        self.stages, self.launched = stages, []

    def __getitem__(self, grid):
        def run(*args, num_stages, **options):
            self.launched.append(num_stages)
            if num_stages > self.stages:
                raise OutOfResources(300_000, 232_448, "shared memory")

        return run


def make(stages: int) -> tuple[Gpu, _Launch]:
    gpu = Gpu(stages)
    return gpu, _Launch(gpu, KernelText(name="big", source="", arguments=(), stages=3), (1,))


def test_fewer_loads_are_kept_ahead_where_shared_memory_is_short():
    gpu, launch = make(stages=1)
    launch((), ())
    launch((), ())
    assert gpu.launched == [3, 2, 1, 1]


def test_what_does_not_fit_at_all_is_told():
    with pytest.raises(UnsupportedError, match=r"cuda: kernel big: out of resource: shared memory.*smaller blocks"):
        make(stages=0)[1]((), ())


def test_other_errors_pass():
    class Broken:
        def __getitem__(self, grid):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        _Launch(Broken(), KernelText(name="k", source="", arguments=()), (1,))((), ())
