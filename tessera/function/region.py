"""`with ts.checkpoint_region():` a block whose activations are computed again in the backward pass.

In: the operations of the block, as torch dispatches them. Out: nothing is kept of what autograd saves in the block and
what can be computed from the block's inputs; the first tensor that the backward pass asks for replays the operations
that are needed, with the same random numbers.

A value is known by its memory (storage, offset, shape, strides), as autograd hands out other Python objects for the
same tensor. What the block's inputs were overwritten with, or what a tile kernel wrote, cannot be replayed: that is
kept as it is.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tessera.errors import InputError
from tessera.kernel.specialise import Run, Specialisation, observing


class checkpoint_region:
    """Context: what autograd saves inside is computed again in the backward pass.

        for i in range(0, d_ff, chunk):
            with ts.checkpoint_region():
                hidden = swish(x @ gate[:, i:i + chunk]) * (x @ up[:, i:i + chunk])
                out += hidden @ down[i:i + chunk]

    The memory goes when the block ends and its variables are gone. Each operation inside costs some 25 microseconds
    more, and in the backward pass once more what it cost. Without gradients it does nothing; under torch.compile the
    compiler decides what is recomputed.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def __enter__(self) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._stack is not None:
            raise InputError("checkpoint_region: entered twice; expected a new one for each block")
        tape = _Tape()
        with ExitStack() as stack:
            stack.callback(tape.close)
            stack.enter_context(_Recorder(tape))
            stack.enter_context(observing(tape.wrap))
            stack.enter_context(saved_tensors_hooks(tape.pack, _unpack))
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.__exit__(*error)


Key = tuple[Any, ...]


def _key(x: Tensor) -> Key:
    """Where a tensor lies, and how: what the same value has in every object that autograd makes for it."""
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


class _Recorder(TorchDispatchMode):
    """Writes every operation of the block on the tape."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        flat, form = _flatten(args, kwargs)
        inputs = [self.tape.read(a) if isinstance(a, Tensor) else a for a in flat]
        states = _random_states(flat) if torch.Tag.nondeterministic_seeded in func.tags else []
        out = func(*args, **(kwargs or {}))
        written = {id(x) for x in _written(func, args, kwargs or {})} if _writes(func) else ()
        positions = [i for i, a in enumerate(flat) if id(a) in written] if written else []
        self.tape.record(_Step(func, inputs, form, states), flat, positions, out)
        return out


def _flatten(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[list[Any], TreeSpec | None]:
    """All arguments in a list, and their form; None for the usual one, positions without lists."""
    if not kwargs and not any(isinstance(a, (list, tuple)) for a in args):
        return list(args), None
    return tree_flatten((args, dict(kwargs or {})))


def _results(out: Any) -> list[Any]:
    return [out] if isinstance(out, Tensor) else tree_flatten(out)[0]


@functools.cache
def _writes(func: Any) -> bool:
    """Whether an operation changes an argument."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation changes, by its schema."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return found


def _random_states(flat: Sequence[Any]) -> list[tuple[torch.Generator, Tensor]]:
    """The generators that a random operation may draw from, with their states."""
    generators = [a for a in flat if isinstance(a, torch.Generator)]
    if not generators:
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return [(g, g.get_state()) for g in generators]


@dataclass(frozen=True)
class _Ref:
    """A value of the tape, standing for a tensor among recorded arguments."""

    index: int


@dataclass
class _Step:
    """One recorded operation, and the values that it makes: (position, value) of results and of changed arguments."""

    function: Any
    inputs: list[Any]
    form: TreeSpec | None  # of (args, kwargs), flattened into inputs
    states: list[tuple[torch.Generator, Tensor]]
    results: list[tuple[int, int]] = field(default_factory=list)
    changes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sources(self) -> list[int]:
        """The values that it reads."""
        return [a.index for a in self.inputs if isinstance(a, _Ref)]

    def run(self, values: dict[int, Tensor]) -> None:
        """Do it again, on values, into values; what it changes is a copy."""
        flat = [values[a.index] if isinstance(a, _Ref) else a for a in self.inputs]
        for position, _ in self.changes:
            flat[position] = flat[position].clone()
        args, kwargs = (flat, {}) if self.form is None else tree_unflatten(flat, self.form)
        before = [(g, g.get_state()) for g, _ in self.states]
        for generator, state in self.states:
            generator.set_state(state)
        out = _results(self.function(*args, **kwargs))
        for generator, state in before:
            generator.set_state(state)
        values.update({index: out[position] for position, index in self.results})
        values.update({index: flat[position] for position, index in self.changes})


class _Input:
    """A tensor from outside the block; its version tells whether it was written since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    @property
    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version

    def check(self) -> Tensor:
        """The tensor, when it is what it was; autograd leaves this check to whoever packs what it saves."""
        if not self.is_unchanged:
            raise InputError(f"checkpoint_region: a tensor {list(self.tensor.shape)} that it read was changed in place "
                             "before the backward pass")
        return self.tensor


class _Saved:
    """What autograd keeps: the value itself until the block ends, and after that only where it cannot be replayed."""

    def __init__(self, tape: _Tape, index: int, tensor: Tensor) -> None:
        self.tape, self.index = tape, index
        self.kept: _Input | None = _Input(tensor)


def _unpack(saved: _Saved | _Input) -> Tensor:
    if isinstance(saved, _Input):
        return saved.check()
    return saved.tape.value(saved.index) if saved.kept is None else saved.kept.check()


class _Tape:
    """The operations of one block, and how to run them again."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.count = itertools.count()
        self.current: dict[Key, int] = {}  # the value that a piece of memory has now
        self.inputs: dict[int, _Input] = {}
        self.written: set[int] = set()  # memory that was overwritten: what is read from it cannot be replayed
        self.steps: list[_Step] = []
        self.held: list[Tensor] = []  # while the block runs, no memory, and so no key, is used a second time
        self.saved: list[_Saved] = []
        self.uses: Counter[int] = Counter()
        self.replayed: dict[int, list[Any]] = {}  # value -> [tensor, uses left]

    # -- while the block runs -----------------------------------------------------------------------

    def read(self, x: Tensor) -> _Ref:
        """The value that a tensor has now; what the tape does not know comes from outside."""
        index = self.current.get(_key(x))
        if index is None:
            index = self._new(x)
            self.inputs[index] = _Input(x)
        return _Ref(index)

    def _new(self, x: Tensor) -> int:
        index = self.current[_key(x)] = next(self.count)
        self.held.append(x)
        return index

    def record(self, step: _Step, flat: Sequence[Any], written: Sequence[int], out: Any) -> None:
        """Add an operation that has run; `written` are the positions of the arguments that it changed."""
        for position in written:
            self._forget(flat[position])
        for position in written:
            index = self._new(flat[position])
            step.changes.append((position, index))
        for position, x in enumerate(_results(out)):
            # A result that is a changed argument, or a view of all of one, is known already.
            if isinstance(x, Tensor) and _key(x) not in self.current:
                step.results.append((position, self._new(x)))
        self.steps.append(step)

    def _forget(self, x: Tensor) -> None:
        """Memory was written: the values that the tape knew there are no longer in it."""
        storage = x.untyped_storage()._cdata
        self.written.add(storage)
        for key in [k for k in self.current if k[0] == storage]:
            del self.current[key]

    def wrap(self, specialisation: Specialisation, run: Run) -> Run:
        """Watch the launches of tile kernels: what they write comes from outside."""

        def watched(args: Sequence[Any], sizes: Sequence[int]) -> None:
            run(args, sizes)
            if threading.get_ident() == self.thread:
                for position in specialisation.outputs:
                    self._forget(args[position])

        return watched

    def pack(self, x: Tensor) -> Any:
        """What autograd keeps for a tensor that it wants to save."""
        index = self.current.get(_key(x))
        if index is None or index in self.inputs:
            return _Input(x)
        self.saved.append(_Saved(self, index, x))
        return self.saved[-1]

    # -- afterwards ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of everything that can be replayed, and of the steps that nobody needs."""
        can = {index: given.is_unchanged and given.tensor.untyped_storage()._cdata not in self.written
               for index, given in self.inputs.items()}
        for step in self.steps:
            possible = all(can[source] for source in step.sources)
            can.update({index: possible for _, index in (*step.results, *step.changes)})
        for saved in self.saved:
            if can[saved.index]:
                saved.kept = None
                self.uses[saved.index] += 1
        needed = set(self.uses)
        kept: list[_Step] = []
        for step in reversed(self.steps):
            if any(index in needed for _, index in (*step.results, *step.changes)):
                needed.update(step.sources)
                kept.append(step)
        self.steps = kept[::-1]
        self.inputs = {index: given for index, given in self.inputs.items() if index in needed}
        self.saved, self.held, self.current = [], [], {}

    def value(self, index: int) -> Tensor:
        """A value that autograd asks for; the first one replays the block."""
        if index not in self.replayed:
            self._replay()
        entry = self.replayed[index]
        entry[1] -= 1
        if not entry[1]:
            del self.replayed[index]
        return entry[0]

    def _replay(self) -> None:
        values = {index: given.check() for index, given in self.inputs.items()}
        last = {source: i for i, step in enumerate(self.steps) for source in step.sources}
        with torch.no_grad():
            for i, step in enumerate(self.steps):
                step.run(values)
                for source in step.sources:
                    if last[source] == i and source not in self.uses:
                        values.pop(source, None)
        self.replayed = {index: [values[index], uses] for index, uses in self.uses.items()}
