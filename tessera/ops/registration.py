"""One operation, several ways to run it: tile kernel or plain reference, eager, autograd or torch.compile.

In: an operation's schema and its functions. Out: a callable that is also registered as torch.ops.tessera.<name>,
so that torch.compile keeps it whole and FakeTensors have its shape. Every file of `ops` that has kernels makes its
operations here.

    rms_norm_op = Operation(
        "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
        kernel=..., reference=..., fake=lambda x, weight, eps: torch.empty_like(x),
        save=lambda inputs, output: (inputs[0], inputs[1], inputs[2]),
        backward=lambda saved, grad: (*rms_norm_backward_op(grad, *saved), None))

An eager call goes straight to the kernel, or through one autograd function where a gradient is wanted: torch's
dispatcher would cost 13 us, and 40 with a gradient, more than the kernel itself for the one row of a decode step.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tessera import env
from tessera.errors import InputError
from tessera.kernel import recording

_LIBRARY = torch.library.Library("tessera", "DEF")
_PARAMETER = torch.nn.Parameter
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHOICES = ("auto", "reference")

_n_modes = torch._C._len_torch_dispatch_stack
_level = torch._C._functorch.maybe_current_level
_is_compiling = torch.compiler.is_compiling

_CHOICE: contextvars.ContextVar[str | None] = contextvars.ContextVar("tessera_implementation", default=None)


@contextlib.contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Which implementation the operations called inside take; TESSERA_OPS is the default outside.

    Args:
        choice: "auto", the tile kernels where they run and pay; "reference", the plain torch expression everywhere
            (slower and larger, for comparison and for finding errors).

    Raises:
        InputError: another choice.
    """
    if choice not in _CHOICES:
        raise InputError(f"choice: {choice!r} given; expected one of {', '.join(_CHOICES)}")
    token = _CHOICE.set(choice)
    try:
        yield
    finally:
        _CHOICE.reset(token)


@functools.cache
def _default() -> str:
    return env.get("TESSERA_OPS")


def wants_reference() -> bool:
    """Whether the plain torch expressions were asked for."""
    return (_CHOICE.get() or _default()) == "reference"


def is_recording() -> bool:
    """Whether a step is recorded, in which kernels alone may compute; torch.compile, which may trace, records none.

    The recorder is among torch's dispatch modes: without one, which is cheap to see, there is none.
    """
    return not torch.compiler.is_compiling() and _n_modes() > 0 and recording.is_recording()


def is_watched() -> bool:
    """Whether torch traces what is called, or runs it without values (FakeTensors); not in a recorded step."""
    return _is_compiling() or (_n_modes() > 0 and not recording.is_recording())


def is_plain(x: Tensor) -> bool:
    """Whether a kernel may be launched on a tensor as it is: it has memory, and nothing watches or transforms it."""
    return not _is_compiling() and type(x) in (Tensor, _PARAMETER) and not x.is_meta and _level() is None


def launches(x: Tensor) -> bool:
    """Whether an operation that is no `Operation` may launch its kernel on x: in a recorded step it has to."""
    return is_recording() or (is_plain(x) and not wants_reference())


def is_readable(x: Tensor) -> bool:
    """Whether a tensor's values can be looked at, at no cost: not on a GPU, nor while they are traced, recorded or
    transformed by torch.func."""
    return is_plain(x) and x.is_cpu and not is_recording()


class Operation:
    """A function of tensors with a kernel, a reference and a gradient, registered with torch.

    Args:
        schema: in torch's syntax, "name(Tensor x, float eps) -> Tensor"; the first tensor's device and dtype decide
            whether the kernel can run.
        kernel: the fast way, on f32, bf16 or f16 tensors of the CPU or a GPU, any strides; no gradient is recorded
            in it. Its results share no memory with its inputs.
        reference: the same in plain torch, for any float dtype and device, differentiable by torch.
        fake: results of the right shapes, dtypes and strides, without values.
        save: (inputs, output) -> what the backward pass reads, tensors and other values.
        backward: (saved, *gradients of the results) -> a gradient or None for each input. It computes with torch
            and with other Operations, which torch.compile can then trace. None: the reference is run again and
            torch differentiates it.
        zero_grads: whether a result without a gradient hands zeros to `backward`, or None.
        dtypes: of the first tensor, for which there is the kernel.
    """

    def __init__(
        self, schema: str, *, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any],
        save: Callable[[Sequence[Any], Any], tuple[Any, ...]] | None = None,
        backward: Callable[..., Any] | None = None, zero_grads: bool = True,
        dtypes: tuple[torch.dtype, ...] = _KERNEL_DTYPES,
    ) -> None:
        self.name = schema[:schema.index("(")]
        self.kernel, self.reference, self.has_gradient = kernel, reference, backward is not None
        self.dtypes = frozenset(dtypes)
        _LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, torch.no_grad()(self._run), key)  # torch's parts must leave no graph of their own
        torch.library.register_fake(f"tessera::{self.name}", fake, lib=_LIBRARY)
        if backward is not None:
            assert save is not None, f"{self.name}: backward given without save"
            self.setup_context, self.backward = _setup(save, zero_grads), _backward(backward)
            torch.library.register_autograd(
                f"tessera::{self.name}", self.backward, setup_context=self.setup_context, lib=_LIBRARY)
        self.registered = getattr(torch.ops.tessera, self.name).default

    def __call__(self, *args: Any) -> Any:
        if _is_compiling():
            return self._dispatched(args)
        if (_CHOICE.get() or _default()) == "reference" or _level() is not None:
            return self.reference(*args)  # torch.func transforms it as any torch code
        if _n_modes():
            return self._watched(args)
        grad, run = torch.is_grad_enabled(), None
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is _PARAMETER:
                if run is None:
                    if arg.is_meta:
                        return self.registered(*args)
                    run = self.kernel if arg.dtype in self.dtypes else self.reference
                if grad and arg.requires_grad:
                    return self._with_gradient(args)
            elif isinstance(arg, Tensor):
                return self._dispatched(args)
        return self._run(*args) if run is None else run(*args)

    def _run(self, *args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor):
                return (self.kernel if arg.dtype in self.dtypes else self.reference)(*args)
        raise InputError(f"{self.name}: no tensor given; expected at least one")

    def _with_gradient(self, args: tuple[Any, ...]) -> Any:
        if not self.has_gradient:
            return self.reference(*args)
        if all(type(arg) in (Tensor, _PARAMETER) for arg in args if isinstance(arg, Tensor)):
            return _Eager.apply(self, *args)
        return self.registered(*args)

    def _dispatched(self, args: tuple[Any, ...]) -> Any:
        """Through torch, whose subclasses and modes see one operation; its parts where torch differentiates it."""
        wants_grad = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        return self.reference(*args) if wants_grad and not self.has_gradient else self.registered(*args)

    def _watched(self, args: tuple[Any, ...]) -> Any:
        # A recorder must see the kernel's launch, not torch's name for it.
        return self._run(*args) if recording.is_recording() else self._dispatched(args)


class _Eager(torch.autograd.Function):
    """An operation of plain tensors, some of which need a gradient: half the time of the registered one."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, *args: Any) -> Any:
        output = operation._run(*args)
        operation.setup_context(ctx, args, output)
        ctx.operation = operation
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = ctx.operation.backward(ctx, *grads)
        return (None, *found) if isinstance(found, tuple) else (None, found)


def _setup(save: Callable[[Sequence[Any], Any], tuple[Any, ...]], zero_grads: bool) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.set_materialize_grads(zero_grads)
        saved = save(inputs, output)
        ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in saved]

    return setup_context


def _backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    def run(ctx: Any, *grads: Tensor) -> Any:
        tensors = iter(ctx.saved_tensors)
        return backward([next(tensors) if other is None else other[0] for other in ctx.others], *grads)

    return run
