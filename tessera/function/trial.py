"""Runs a checked function without data: FakeTensors, whose sizes are prime numbers, one for each name.

In: a `ts.function` and, for a method, its class. Out: None, or the exception of the run with the sizes that led to it.
Distinct primes make every mixture of dims a mismatch, and let a number in an error be read as names again: 35 is B*S.
What only fits special sizes (a head count that divides a width), and tensors of indices without an annotated dtype,
are found by trying: a function is right when some choice of those runs. Called by `checker`.
"""

from __future__ import annotations

import ast
import collections.abc
import inspect
import itertools
import math
import operator
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tessera.errors import CompileError, InputError, ShapeError
from tessera.function.annotations import (
    MappingSpec,
    Parameter,
    SequenceSpec,
    Signature,
    TensorSpec,
    TupleSpec,
    UnionSpec,
    tensor_specs,
)
from tessera.kernel.dims import split_fraction
from tessera.kernel.frontend.source import source_of
from tessera.types import DTYPES, DType, f32, int4

# Primes whose small multiples, sums and products of two all differ, so that each can be read back.
_PRIMES = (5, 7, 11, 19, 29, 59, 79, 137, 163, 199, 227, 313, 389, 487, 599, 701, 823, 839, 919, 1097, 1283, 1487, 1553,
           1597)
_MOST_CHOICES = 64  # of dtypes, and of sizes
_ABOUT_DTYPES = re.compile(
    r"scalar type|dtype|indices|Long|not implemented for|floating point|integer|Float|Double|Bool", re.IGNORECASE)
_TYPE_ASKED_FOR = re.compile(r" is torch\.\w+; expected (one of )?torch\.")
_ABOUT_FACTORS = re.compile(r"shape '?\[|invalid for input of size|divisible|divide|split|chunk", re.IGNORECASE)


class NoValue(Exception):
    """An argument for which no value can be made up; the text says which."""


@dataclass
class Sizes:
    """Numbers for names: dims, and int arguments of the function or of its class's constructor."""

    numbers: dict[str, int] = field(default_factory=dict)
    factor: int = 1  # of every dim
    plain_int: int | None = None  # for ints that are no dims; None: a prime of their own

    def of(self, name: str) -> int:
        """The size of a name, a new prime at the first use."""
        if name not in self.numbers:
            i = len(self.numbers)
            self.numbers[name] = (_PRIMES[i] if i < len(_PRIMES) else _PRIMES[-1] + 2 * i) * self.factor
        return self.numbers[name]

    def describe(self, number: int) -> str:
        """A number in names, where it can be read so: 35 is B*S."""
        if number < min(_PRIMES):
            return str(number)
        for name, size in self.numbers.items():
            if size == number:
                return name
        for name, size in self.numbers.items():
            if number % size == 0 and number // size < 5:
                return f"{number // size}*{name}"
            if size % number == 0 and 1 < size // number < 5:
                return f"{name}/{size // number}"
        pairs = list(itertools.combinations_with_replacement(self.numbers.items(), 2))
        for sign, join in (("*", operator.mul), ("+", operator.add)):
            for (a, left), (b, right) in pairs:
                if join(left, right) == number:
                    return f"{a}{sign}{b}"
        for (a, x), (b, y), (c, z) in itertools.combinations_with_replacement(self.numbers.items(), 3):
            if x * y * z == number:
                return f"{a}*{b}*{c}"
        return str(number)

    def translate(self, text: str) -> str:
        """An error's text with its numbers in names."""
        spaced = re.sub(r"(\d)x(?=\d)", r"\1 x ", text)
        named = re.sub(r"(?<![\w.])\d+(?![\w.]*[.\w]\d)", lambda m: self.describe(int(m[0])), spaced)
        return re.sub(r"(?<![\w*+/-])(\w+)=\1(?![\w*+/-])", r"\1", named)


@dataclass(frozen=True)
class Failure:
    """A run that failed: the exception and the sizes; whether an argument that is no tensor had to be made up; the
    numbers that a method's object holds; and the arguments that were left at None."""

    error: BaseException
    sizes: Sizes
    invented: bool
    held: tuple[int, ...] = ()
    absent: frozenset[str] = frozenset()

    def is_refusal(self, file: str) -> bool:
        """Whether it was raised on purpose, for what could not be made up: by the function's own file, of arguments
        that it checks by hand, or of one that it cannot do without."""
        if isinstance(self.error, InputError) and str(self.error).partition(":")[0] in self.absent:
            return True
        trace = self.error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return isinstance(self.error, InputError) and trace is not None and (
            os.path.realpath(trace.tb_frame.f_code.co_filename) == os.path.realpath(file))


@dataclass(frozen=True)
class _Variant:
    """Which arguments are given: the member of each union, and the flags that are not at their default."""

    members: Mapping[str, int]
    flags: Mapping[str, bool]


def try_function(function: Callable[..., Any], signature: Signature, owner: type | None) -> Failure | None:
    """Run a function in each of its variants; the first that fails.

    Raises:
        NoValue: an argument cannot be made up.
    """
    for alternatives in _variants(signature, is_method=owner is not None):
        failures = [_try_variant(function, signature, owner, variant) for variant in alternatives]
        if all(failures):
            return failures[0]
    return None


def _variants(signature: Signature, is_method: bool) -> list[list[_Variant]]:
    """Unions at None, or at their first member; then every other member and flag by itself. Of each list, one must
    run: which kind of tensor a method takes may depend on its object."""
    unions = {p.name: p.spec.members for p in signature.parameters if isinstance(p.spec, UnionSpec)}
    base = {name: members.index(None) if None in members else 0 for name, members in unions.items()}
    variants = [[_Variant(base, {})]]
    for name, members in unions.items():
        others = [_Variant({**base, name: i}, {}) for i, member in enumerate(members)
                  if i != base[name] and not isinstance(member, type)]
        if is_method and None not in members:
            variants[0] += others
        else:
            variants += [others] if is_method else [[variant] for variant in others]
    flags = [p for p in signature.parameters if isinstance(p.default, bool)]
    return variants + [[_Variant(base, {p.name: not p.default})] for p in flags]


def _try_variant(function: Callable[..., Any], signature: Signature, owner: type | None, variant: _Variant,
                 ) -> Failure | None:
    """Try types of the tensors without one, then sizes; the failure that says most when nothing runs."""
    failure: Failure | None = None
    best: Mapping[int, torch.dtype] = {}
    for dtypes in itertools.islice(_dtype_choices(signature), _MOST_CHOICES):
        found = _run(function, signature, owner, variant, Sizes(), dtypes)
        if found is None:
            return None
        if failure is None or (_is_about_dtypes(failure) and not _is_about_dtypes(found)):
            failure, best = found, dtypes
        if not dtypes and not _is_about_dtypes(found):
            break
    assert failure is not None
    file = inspect.unwrap(function).__code__.co_filename
    for sizes in itertools.islice(_other_sizes(signature, failure, _divides(function), file), _MOST_CHOICES):
        found = _run(function, signature, owner, variant, sizes, best)
        if found is None:
            return None
        if _progress(found, function) > _progress(failure, function):
            failure = found
    return failure


def _progress(failure: Failure, function: Callable[..., Any]) -> float:
    """How far into the function's code the run came; infinitely when it is the result that does not fit."""
    code = inspect.unwrap(function).__code__
    trace = failure.error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    return math.inf if trace is None else trace.tb_lasti


def _dtype_choices(signature: Signature) -> Iterator[Mapping[int, torch.dtype]]:
    """Types of the tensors without an annotated one, by their place among those: f32, then indices, then masks."""
    free = range(sum(s.annotation is None or (s.annotation.dtype is None and s.dtypes is None)
                     for p in signature.parameters for s in tensor_specs(p.spec)))
    for n in range(len(free) + 1):
        for places in itertools.combinations(free, n):
            yield dict.fromkeys(places, torch.int64)
    for mask in free:
        yield {mask: torch.bool}
        yield from ({mask: torch.bool, ids: torch.int64} for ids in free if ids != mask)


def _is_about_dtypes(failure: Failure) -> bool:
    # A ShapeError speaks of sizes, but for a type that another checked function asks for.
    pattern = _TYPE_ASKED_FOR if isinstance(failure.error, ShapeError) else _ABOUT_DTYPES
    return bool(pattern.search(str(failure.error)))


def _other_sizes(signature: Signature, failure: Failure, divides: bool, file: str) -> Iterator[Sizes]:
    """Choices that a function may need: ints that divide every dim, dims that are the constructor's ints or what the
    object holds, dims that are equal, where the function asks for it by hand, and dims that divide each other, where
    it divides or could not reshape."""
    yield Sizes(factor=12, plain_int=2)
    names = _dim_names(signature)
    made = [n for n in failure.sizes.numbers if n.startswith(f"{_CONSTRUCTOR}.")]
    for count in range(1, min(len(names), len(made)) + 1):
        for dims in itertools.permutations(names, count):
            for ints in itertools.combinations(made, count):
                for factor in (1, 12):
                    sizes = Sizes(factor=factor, plain_int=None if factor == 1 else 2)
                    sizes.numbers = dict(zip(dims, map(sizes.of, ints)))
                    sizes.numbers |= {i: sizes.numbers[d] for d, i in zip(dims, ints)}
                    yield sizes
    for count in (1, 2):
        for dims in itertools.combinations(names, count):
            for held in itertools.permutations(failure.held, count):
                yield Sizes(numbers=dict(zip(dims, held)), plain_int=2)
    if failure.is_refusal(file):
        for one, other in itertools.combinations(names, 2):
            sizes = Sizes()
            sizes.numbers = dict.fromkeys((one, other), sizes.of(one))
            yield sizes
    if not divides and not _ABOUT_FACTORS.search(str(failure.error)):
        return
    for whole, part in itertools.permutations(names, 2):
        sizes = Sizes(factor=12, plain_int=2)
        sizes.numbers = {whole: 2 * sizes.of(part), part: sizes.of(part)}
        yield sizes


def _divides(function: Callable[..., Any]) -> bool:
    """Whether // or % stands in the function's body."""
    try:
        tree = source_of(inspect.unwrap(function)).tree
    except CompileError:
        return True
    return any(isinstance(node, (ast.FloorDiv, ast.Mod)) for node in ast.walk(tree))


def _dim_names(signature: Signature) -> list[str]:
    specs = [s for p in signature.parameters for s in tensor_specs(p.spec)]
    return list(dict.fromkeys(split_fraction(a)[0] for s in specs for d in s.dims or () for a in sorted(d.atoms)))


# -- making values ----------------------------------------------------------------------------------

_CONSTRUCTOR = "constructor"


def _run(function: Callable[..., Any], signature: Signature, owner: type | None, variant: _Variant, sizes: Sizes,
         dtypes: Mapping[int, torch.dtype]) -> Failure | None:
    maker = _Maker(signature, variant, sizes, dtypes)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        instance, problem = (None, None) if owner is None else _instance(owner, maker)
        args, kwargs = maker.arguments(instance)
        try:
            function(*args, **kwargs)
        except Exception as error:
            if problem is not None and isinstance(error, AttributeError):
                raise problem from None
            absent = frozenset(p.name for p in signature.parameters if p.spec is None and p.default is None)
            return Failure(error, sizes, maker.invented, _held(instance), absent)
    return None


def _held(instance: Any) -> tuple[int, ...]:
    """Sizes of an object's tensors, and its ints, the smallest first."""
    found = {v for v in getattr(instance, "__dict__", {}).values() if type(v) is int}
    if isinstance(instance, torch.nn.Module):
        found |= {n for x in (*instance.parameters(), *instance.buffers()) for n in x.shape}
    return tuple(sorted(n for n in found if n > 1))


def _instance(owner: type, maker: _Maker) -> tuple[Any, NoValue | None]:
    """An object of the class, and why it is bare: a method that reads nothing of it runs all the same."""
    try:
        return _constructed(owner, maker), None
    except NoValue as problem:
        instance: Any = object.__new__(owner)
        if isinstance(instance, torch.nn.Module):
            torch.nn.Module.__init__(instance)
        return instance, problem


def _constructed(owner: type, maker: _Maker) -> Any:
    parameters = [p for p in inspect.signature(owner).parameters.values()
                  if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    try:
        hints = typing.get_type_hints(owner.__init__)  # type: ignore[misc]
    except Exception:
        hints = {}
    values = {p.name: maker.plain(p.name, hints.get(p.name, p.annotation), f"{_CONSTRUCTOR}.{p.name}")
              for p in parameters}
    try:
        return owner(**values)
    except Exception as error:
        raise NoValue(f"an instance of {owner.__name__} cannot be made: {type(error).__name__}: {error}") from None


class _AnyKey(dict):  # type: ignore[type-arg]
    """A mapping that has every key that is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Any) -> Any:
        self[key] = self.make()
        return self[key]


class _Maker:
    """Makes the arguments of one run."""

    def __init__(self, signature: Signature, variant: _Variant, sizes: Sizes, dtypes: Mapping[int, torch.dtype],
                 ) -> None:
        self.signature, self.variant, self.sizes, self.dtypes = signature, variant, sizes, dtypes
        self.free = itertools.count()  # tensors without an annotated dtype, in order
        self.invented = False
        # Int arguments first: the smallest primes, as some count or split what the dims measure.
        for name in (*signature.sizes, *_dim_names(signature)):
            self.sizes.of(name)

    def arguments(self, instance: Any) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) of a call."""
        args: list[Any] = [] if instance is None else [instance]
        kwargs: dict[str, Any] = {}
        for p in self.signature.parameters[len(args):]:
            if p.kind is p.kind.VAR_POSITIONAL:
                args += [self.value(p), self.value(p)] if p.spec is not None else []
            elif p.kind is p.kind.KEYWORD_ONLY:
                kwargs[p.name] = self.value(p)
            elif p.kind is not p.kind.VAR_KEYWORD:
                args.append(self.value(p))
        return args, kwargs

    def value(self, p: Parameter) -> Any:
        """A value for a parameter."""
        if p.spec is not None:
            return self.of_spec(p.spec, p.name)
        if p.name in self.signature.sizes:
            return self.sizes.of(p.name)
        if p.name in self.variant.flags:
            return self.variant.flags[p.name]
        return p.default if p.has_default else self.plain(p.name, p.annotation, p.name)

    def of_spec(self, spec: Any, path: str) -> Any:
        """Tensors as a spec wants them."""
        if isinstance(spec, TensorSpec):
            return self.tensor(spec)
        if isinstance(spec, UnionSpec):
            member = spec.members[self.variant.members.get(path, 0)]
            return self.plain(path, member, path) if isinstance(member, type) else self.of_spec(member, path)
        if isinstance(spec, SequenceSpec):
            return [self.of_spec(spec.member, path) for _ in range(2)]
        if isinstance(spec, TupleSpec):
            return tuple(self.of_spec(m, path) for m in spec.members)
        return _AnyKey(lambda: self.of_spec(spec.member, path)) if isinstance(spec, MappingSpec) else None

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data."""
        shape = self.shape(spec)
        annotation = spec.annotation
        if annotation is not None and annotation.dtype is not None:
            dtype = annotation.dtype.torch
            if annotation.dtype is int4:
                shape = [*shape[:-1], shape[-1] // 2]
        elif spec.dtypes is not None:
            dtype = spec.dtypes.members[0].torch
        else:
            dtype = self.dtypes.get(next(self.free), torch.float32)
        device = annotation.device if annotation is not None else None
        return torch.empty(shape, dtype=dtype, device=device or "cpu", requires_grad=False)

    def shape(self, spec: TensorSpec) -> list[int]:
        """Its sizes; "..." is two axes of their own."""
        if spec.dims is None:
            return [self.sizes.of("a tensor's 1st dim"), self.sizes.of("a tensor's 2nd dim")]
        divisors: dict[str, int] = {}
        stated = [*(p.spec for p in self.signature.parameters), self.signature.result]
        for s in (s for spec in stated for s in tensor_specs(spec)):
            for name, divisor in (split_fraction(a) for d in s.dims or () for a in d.atoms):
                divisors[name] = math.lcm(divisors.get(name, 1), divisor)
        for name, divisor in divisors.items():
            if self.sizes.of(name) % divisor:
                self.sizes.numbers[name] *= divisor
        known = {split_fraction(a)[0] for s in (s for spec in stated for s in tensor_specs(spec))
                 for d in s.solved_dims for a in d.atoms}
        # A dim that may be 1, of a size that nothing else has, is 1: another would be a guess.
        shape = [1 if i in spec.broadcast and {split_fraction(a)[0] for a in d.atoms} - known else d.value(
            self.sizes.numbers) for i, d in enumerate(spec.dims)]
        if spec.ellipsis is not None:
            shape[spec.ellipsis:spec.ellipsis] = [self.sizes.of("...0"), self.sizes.of("...1")]
        return shape

    def plain(self, name: str, annotation: Any, path: str) -> Any:
        """A value that is no tensor, from its annotation.

        Raises:
            NoValue: the annotation says nothing that a value follows from.
        """
        members = typing.get_args(annotation)
        if type(None) in members:
            return None
        if annotation is int:
            stays = self.sizes.plain_int is None or path in self.sizes.numbers
            return self.sizes.of(path) if stays else self.sizes.plain_int
        known = {float: 0.5, bool: False, DType: f32, torch.dtype: torch.float32, torch.device: torch.device("cpu")}
        if annotation in known if isinstance(annotation, collections.abc.Hashable) else False:
            return known[annotation]
        self.invented = True
        if annotation is str:
            return ""
        if typing.get_origin(annotation) is collections.abc.Callable and members and members[0] is not Ellipsis:
            return lambda first, *rest: first
        if typing.get_origin(annotation) in (dict, collections.abc.Mapping) and members[1] in (int, float):
            return _AnyKey(lambda: 1)
        raise NoValue(f"argument {name!r} has no default, and no value follows from its annotation")


def type_text(x: torch.Tensor, sizes: Sizes) -> str:
    """A tensor's type in names: f32[B, S, D]."""
    names = [d.name for d in DTYPES.values() if d.torch is x.dtype]
    return f"{names[0] if names else x.dtype}[{', '.join(sizes.describe(int(n)) for n in x.shape)}]"
