"""Runs the generated Triton text under Triton's own interpreter, on CPU tensors, with no GPU.

`run_interpreted` is for tests. Triton decides when it is imported whether its functions are interpreted, so a
child process that was started with TRITON_INTERPRET=1 does the work; this module is also that child's program.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

from tessera.errors import CompileError
from tessera.kernel import ir
from tessera.kernel.backends.cuda.launch import Argument, Compiled, count_programs, load_module, picker

_child: subprocess.Popen[bytes] | None = None


def run_interpreted(function: ir.Function, args: Sequence[Argument], sizes: Sequence[int]) -> None:
    """Run a function as its Triton text says, in Triton's interpreter; output tensors are changed in place.

    Args:
        args: CPU tensors and scalars in the order of `function.params`.
        sizes: the named sizes in the order of `function.sizes`.

    Raises:
        UnsupportedError: the cuda backend cannot express the function.
        CompileError: the interpreter failed; the message holds its traceback and the text.
    """
    compiled = Compiled(function)
    known = compiled.known(args, sizes)
    kernels = [(text, count_programs(text, known)) for text in compiled.texts(args, sizes).kernels]
    child = _start()
    assert child.stdin is not None and child.stdout is not None
    _send(child.stdin, (kernels, list(args), list(sizes)))
    error, results = _receive(child.stdout)
    if error:
        raise CompileError(f"cuda: the generated text failed under Triton's interpreter\n{error}\n{compiled.source}")
    for mine, theirs in zip(args, results):
        if isinstance(mine, torch.Tensor):
            mine.copy_(theirs)


def _start() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child.poll() is not None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        program = f"import {__name__} as child; child.serve()"
        _child = subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE)
        atexit.register(_stop, _child)
    return _child


def _stop(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.terminate()
    child.wait()


def _send(pipe: BinaryIO | Any, message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    pipe.write(struct.pack("<q", buffer.tell()))
    pipe.write(buffer.getbuffer())
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> Any:
    """One message between the two processes, both ours."""
    header = pipe.read(8)
    if len(header) < 8:
        raise CompileError("cuda: the process that runs Triton's interpreter ended unexpectedly")
    # Not from outside: the other end is our own process.
    return torch.load(io.BytesIO(pipe.read(struct.unpack("<q", header)[0])), weights_only=False)


# -- the child ---------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until the pipe closes; what kernels print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _replace_libdevice()
    _round_as_the_hardware_does()
    _count_with_scalars()
    _combine_by_halves()
    while True:
        try:
            kernels, args, sizes = _receive(sys.stdin.buffer)
        except CompileError:
            return
        error = ""
        try:
            for text, programs in kernels:
                kernel = getattr(load_module(text.name, text.source), text.name)
                if programs:
                    kernel[(programs,)](*picker(text)(args, sizes), **text.constants, **text.options)
        except Exception:  # reported to the parent, whatever it is
            import traceback

            error = traceback.format_exc()
        _send(answers, (error, args))


def _replace_libdevice() -> None:
    """The interpreter has no CUDA device library: the functions that we use, in numpy."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def unary(function: Any) -> Any:
        def call(x: Any) -> Any:
            return tl.tensor(TensorHandle(function(x.handle.data).astype(x.handle.data.dtype), x.handle.dtype), x.type)
        return call

    def binary(function: Any) -> Any:
        def call(x: Any, y: Any) -> Any:
            tensor = x if isinstance(x, tl.tensor) else y
            a, b = (v.handle.data if isinstance(v, tl.tensor) else np.float32(v) for v in (x, y))
            data = function(a, b).astype(tensor.handle.data.dtype)
            is_block = any(isinstance(v, tl.tensor) and v.type.is_block() for v in (x, y))
            type_ = tl.block_type(tensor.dtype, list(data.shape)) if is_block else tensor.dtype
            return tl.tensor(TensorHandle(data, tensor.handle.dtype), type_)
        return call

    for name, of_one in {"tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p, "rint": np.rint}.items():
        setattr(libdevice, name, unary(of_one))
    for name, of_two in {"pow": np.power, "fmod": np.fmod}.items():
        setattr(libdevice, name, binary(of_two))


def _count_with_scalars() -> None:
    """Scalars as bounds of range(): Triton 3.6 holds them as arrays of one element, no int to numpy 2.5."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _combine_by_halves() -> None:
    """Reductions and scans with functions of our own, a whole tensor at a time: the interpreter calls them for every
    element. All of them are exact, so that the order does not count; axes are powers of two long."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def combined(self: Any, input: Any, left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
        sides = [self.to_tensor(x, of.dtype) for side in (left, right) for x, of in zip(side, input)]
        result = self.combine_fn.fn(*sides)
        return [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]

    def reduce(self: Any, input: Any) -> list[Any]:
        parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
        while (half := len(parts[0]) // 2):
            parts = combined(self, input, [x[:half] for x in parts], [x[half:] for x in parts])
        return [self.to_tensor(np.expand_dims(x[0], self.axis) if self.keep_dims else x[0], of.dtype)
                for x, of in zip(parts, input)]

    def scan(self: Any, input: Any) -> list[Any]:
        parts, step = [np.moveaxis(x.handle.data, self.axis, 0) for x in input], 1
        while step < len(parts[0]):
            sums = combined(self, input, [np.roll(x, step, 0) for x in parts], parts)
            parts, step = [np.concatenate([x[:step], y[step:]]) for x, y in zip(parts, sums)], step * 2
        return [self.to_tensor(np.moveaxis(x, 0, self.axis), of.dtype) for x, of in zip(parts, input)]

    ReduceOps.generic_reduce, ScanOps.generic_scan = reduce, scan


def _round_as_the_hardware_does() -> None:
    """The interpreter truncates to bf16 and rounds ties to fp8 upwards; a GPU rounds to nearest even, as torch."""
    import triton.language as tl
    from triton.runtime import interpreter

    torch_types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
                   "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        raw = torch.frombuffer(bytearray(data.tobytes()), dtype=bits[data.dtype.itemsize])
        numbers = raw.view(torch_types[source.name])
        if target.name == "fp8e4nv":
            numbers = numbers.float().clamp(-448.0, 448.0)  # as torch 2.13 does, but not 2.11
        rounded = numbers.to(torch_types[target.name])
        return rounded.view(bits[rounded.element_size()]).numpy().reshape(data.shape)

    interpreter._convert_float = convert
    plain = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, x: Any, type_: Any) -> Any:
        """Ints to bf16 and back by way of f32: the interpreter would take the number for the bits."""
        if tl.bfloat16 in (x.dtype.scalar, type_.scalar) and x.dtype.scalar != type_.scalar:
            x = plain(self, x, tl.float32)
        return plain(self, x, type_)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(self, a), widened(self, b), *rest)

    def widened(builder: Any, x: Any) -> Any:
        """bf16, whose bits the interpreter would multiply as integers, as f32."""
        return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    interpreter.InterpreterBuilder.create_dot = create_dot
    atomic = interpreter.InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, x: Any, mask: Any, *rest: Any) -> Any:
        """bf16, whose bits the interpreter would add as integers: one element after the other, rounded each time."""
        if x.dtype.scalar != tl.bfloat16:
            return atomic(self, operation, pointers, x, mask, *rest)
        for at, number, is_in in zip(pointers.data.flat, x.data.flat, mask.data.flat):
            if is_in:
                place = torch.frombuffer((ctypes.c_uint16 * 1).from_address(int(at)), dtype=torch.bfloat16)
                place += torch.tensor([number], dtype=torch.uint16).view(torch.bfloat16)
        return x

    interpreter.InterpreterBuilder.create_atomic_rmw = create_atomic_rmw

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """Rounded once: in Triton 3.6 the interpreter rounds the product as well."""
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def as_bool(mask: Any) -> Any:
        """Scalar conditions come as ints out of the interpreter's `&`."""
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    interpreter.InterpreterBuilder.create_masked_load = (
        lambda self, pointers, mask, *rest: load(self, pointers, as_bool(mask), *rest))
    interpreter.InterpreterBuilder.create_masked_store = (
        lambda self, pointers, value, mask, *rest: store(self, pointers, value, as_bool(mask), *rest))
