"""`@ts.graph.capture`: the kernels of a Python function, recorded once, then run as one native call.

    @ts.graph.capture(bucket_by=["seq_len"])
    def decode_step(q: Tensor["B", "D"], keys: Tensor["seq_len", "D"]): ...

In: a function that allocates tensors, takes views and launches kernels. Out: a `Graph`, called like it. On CPU a
replay is one call and one parallel region, with barriers between kernels (`backends.cpu.replay`); on CUDA it is a
CUDA graph.

The contract. A call runs the recording of its bucket: same shapes, strides, dtypes, devices and sharing of memory
of all tensors; same values of all else in its arguments, in the function's closure and in the globals that it
names (objects there count by identity). A call that differs in any of this is recorded anew. Where things go:
  * tensors of the arguments are read and written where they lie at that call;
  * returned tensors that the function allocated are new at each call; other tensors that it allocates keep their
    place from call to call, and are kept alive;
  * tensors that it reaches in other ways (through objects in its closure or in globals, through functions that it
    calls) are those of the recording: write into them, do not replace them, or pass the object as an argument.
Python code runs at the recording only. What a replay could not repeat is refused then: operations of torch,
tensors read back to Python, arguments changed in Python, results that carry a gradient.
"""

from __future__ import annotations

import functools
import inspect
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tessera import env
from tessera.errors import InputError, UnsupportedError
from tessera.kernel.dims import Dim, split_fraction
from tessera.kernel.recording import Described, Recorded, is_recording, outside_values, record
from tessera.kernel.specialise import is_observed
from tessera.types import Annotation

MAX_BUCKETS = 64


class _Replayable(Protocol):
    """What a bucket holds."""

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run with the tensors of a call's arguments; what the function returns."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One recording: its arguments' keys, and how to run it."""

    parts: Mapping[str, Any]
    replay: _Replayable
    held: Sequence[Any]  # objects that the key names by identity
    kernels: tuple[str, ...]  # in order of launch


class Graph:
    """A function whose launches are replayed. `buckets` are the recordings, the least recently used first."""

    def __init__(self, function: Callable[..., Any], bucket_by: Sequence[str], max_buckets: int) -> None:
        functools.update_wrapper(self, function)
        self.function, self.bucket_by = function, tuple(bucket_by)
        self.name = getattr(function, "__name__", repr(function))
        self._max_buckets = max_buckets
        self._signature = _signature(function)
        self._outside = outside_values(function)
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in self._signature.parameters.values())
        self._positional = len(self._signature.parameters) if plain else -1  # then arguments bind by position
        self._varying = self._arguments_that_vary()
        self._buckets: OrderedDict[Any, Bucket] = OrderedDict()
        self._pinned: dict[Any, tuple[int, ...]] = {}
        self._lock = threading.RLock()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    @property
    def buckets(self) -> list[Bucket]:
        """The recordings."""
        return list(self._buckets.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function.

        Raises:
            UnsupportedError: at a recording, the function does something that a replay could not repeat.
        """
        if is_recording() or is_observed():
            return self.function(*args, **kwargs)  # part of a larger graph, or each kernel is to be seen
        if not kwargs and len(args) == self._positional:
            arguments: dict[str, Any] = dict(zip(self._signature.parameters, args))
        else:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
        described = self._describe(arguments)
        key = tuple(described.key)
        with self._lock:
            pinned = tuple(described.tensors[i].data_ptr() for i in self._pinned.get(key, ()))
            bucket = self._buckets.get((key, pinned))
            if bucket is not None:
                self._buckets.move_to_end((key, pinned))
                return bucket.replay(described.tensors)
            return self._record(self._signature.bind(*args, **kwargs), arguments, described, key)

    def _describe(self, arguments: Mapping[str, Any]) -> Described:
        described = Described()
        described.key += torch.get_num_threads(), env.get("TESSERA_BACKEND"), torch.get_default_dtype()
        for value in arguments.values():
            described.add(value)
        for value in self._outside():
            described.add(value, walk_objects=False)
        return described

    def _record(self, bound: inspect.BoundArguments, arguments: Mapping[str, Any], described: Described,
                key: Any) -> Any:
        """Run the function, keep what it launched, and return what it returned."""
        with record(self.name) as recorded:
            result = self.function(*bound.args, **bound.kwargs)
        if tuple(self._describe(arguments).key) != key:
            raise UnsupportedError(f"graph {self.name}: the function changes an argument, or what it reads, in Python; "
                                   "a replay would not; pass such state as tensors that kernels write")
        devices = {launch.specialisation.backend for launch in recorded.launches}
        replay: _Replayable
        if devices == {"cuda"}:
            replay = _CudaGraph(self.name, self.function, bound, described.tensors, recorded)
            self._pinned[key] = replay.pinned
        elif "cuda" in devices:
            raise UnsupportedError(f"graph {self.name}: kernels run on cpu and on cuda; a graph has one device")
        else:
            replay = _CpuGraph(self.name, described.tensors, recorded, result)
        parts = {name: _key_of(value) for name, value in arguments.items()}
        self._tell_unexpected(parts)
        pinned = tuple(described.tensors[i].data_ptr() for i in self._pinned.get(key, ()))
        self._buckets[key, pinned] = Bucket(parts=parts, replay=replay, held=described.held, kernels=tuple(
            launch.specialisation.name for launch in recorded.launches))
        while len(self._buckets) > self._max_buckets:
            self._buckets.popitem(last=False)
        return result

    def _arguments_that_vary(self) -> frozenset[str] | None:
        """Arguments that bucket_by names, itself or by a dim of its annotation; None where a name is neither."""
        varying: set[str] = set()
        for name in self.bucket_by:
            found = {p.name for p in self._signature.parameters.values()
                     if p.name == name or name in _dim_names(p.annotation)}
            if not found:
                return None  # a dim of tensors without annotations: any of them may vary
            varying |= found
        return frozenset(varying)

    def _tell_unexpected(self, parts: Mapping[str, Any]) -> None:
        if not self.bucket_by or self._varying is None or not self._buckets:
            return
        changed = {name for name, part in parts.items() if all(b.parts[name] != part for b in self._buckets.values())}
        if changed - self._varying:
            names = ", ".join(sorted(changed - self._varying))
            warnings.warn(f"graph {self.name}: recorded anew because {names} changed, which "
                          f"bucket_by={list(self.bucket_by)} does not name", RuntimeWarning, stacklevel=4)


def capture(function: Callable[..., Any] | None = None, *, bucket_by: Sequence[str] = (),
            max_buckets: int = MAX_BUCKETS) -> Any:
    """Decorator: record the kernels that a function launches, replay them as one call. See the module's contract.

    Args:
        bucket_by: what varies from call to call: arguments, or dims of their annotations ("seq_len"). A change of
            anything else makes a bucket as well, with a warning.
        max_buckets: recordings to keep; the least recently used goes first.

    Raises:
        InputError: `bucket_by` is not a list of names, `max_buckets` not above 0.
    """
    if isinstance(bucket_by, str) or not all(isinstance(name, str) for name in bucket_by):
        raise InputError(f"bucket_by: {bucket_by!r} given; expected a list of names")
    if max_buckets < 1:
        raise InputError(f"max_buckets: {max_buckets} given; expected at least 1")

    def make(f: Callable[..., Any]) -> Graph:
        if not callable(f):
            raise InputError(f"capture: {f!r} given; expected a function")
        return Graph(f, bucket_by, max_buckets)

    return make if function is None else make(function)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with annotations as objects where they can be evaluated."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, SyntaxError, TypeError, AttributeError):
        return inspect.signature(function)


def _key_of(value: Any) -> tuple[Any, ...]:
    described = Described()
    described.add(value)
    return tuple(described.key)


def _dim_names(annotation: Any) -> set[str]:
    """The named dims of `Tensor["B", "D/2"]`."""
    dims = annotation.dims if isinstance(annotation, Annotation) else ()
    return {split_fraction(atom)[0] for dim in dims if dim != "..." for atom in Dim.of(dim).atoms}


# -- results -----------------------------------------------------------------------------------------


def _tensors_of(name: str, result: Any) -> list[torch.Tensor]:
    """The tensors of a returned value, in order.

    Raises:
        UnsupportedError: it holds something else than tensors, numbers, text, None, and tuples, lists, dicts of them.
    """
    if isinstance(result, torch.Tensor):
        if result.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"graph {name}: a result carries a gradient, which a replay would not; "
                                   "call it under torch.no_grad()")
        return [result]
    if isinstance(result, (tuple, list, dict)):
        items = result.values() if isinstance(result, dict) else result
        return [tensor for item in items for tensor in _tensors_of(name, item)]
    if result is None or isinstance(result, (bool, int, float, str)):
        return []
    raise UnsupportedError(f"graph {name}: a {type(result).__name__} is returned; expected tensors, numbers, text, "
                           "None, or tuples, lists and dicts of them")


def _map_leaves(result: Any, make: Callable[[Any], Any]) -> Any:
    """The same structure with other tensors, or with what stands for them."""
    if isinstance(result, (torch.Tensor, _Place)):
        return make(result)
    if isinstance(result, dict):
        return {name: _map_leaves(item, make) for name, item in result.items()}
    if isinstance(result, (tuple, list)):
        items = [_map_leaves(item, make) for item in result]
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    return result


# -- on CPU ------------------------------------------------------------------------------------------


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a returned tensor lies: in a new storage, in an argument's, or (neither) it is `fixed`."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    new: int | None = None
    argument: int | None = None
    offset: int = 0  # bytes from the start of the new storage, or from the argument's address
    fixed: torch.Tensor | None = None

    def tensor(self, tensors: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of one replay."""
        if self.fixed is not None:
            return self.fixed
        if self.new is not None:
            whole = new[self.new].view(self.dtype)
            return whole.as_strided(self.size, self.stride, self.offset // self.dtype.itemsize)
        if self.argument is None:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        source = tensors[self.argument]
        start = source.storage_offset() * source.element_size() + self.offset
        return torch.empty(0, dtype=self.dtype).set_(
            source.untyped_storage(), start // self.dtype.itemsize, self.size, self.stride)


class _CpuGraph:
    """Launches as native data. Sources of addresses: the arguments' tensors, then the storages of new results."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor], recorded: Recorded, result: Any) -> None:
        from tessera.kernel.backends.cpu.replay import Launch, Replay

        sources: dict[int, tuple[int, int]] = {}  # storage -> (source, address that the source stands for)
        for index, tensor in enumerate(tensors):
            if _storage(tensor):
                sources.setdefault(_storage(tensor), (index, tensor.data_ptr()))
        ours = {_storage(tensor) for tensor in recorded.allocated} - sources.keys()
        self._bytes: list[int] = []  # of each new storage
        for tensor in _tensors_of(name, result):
            if _storage(tensor) in ours - sources.keys() - {0}:
                sources[_storage(tensor)] = len(tensors) + len(self._bytes), _storage(tensor)
                # A multiple of 8, so that it can be seen as any dtype.
                self._bytes.append((tensor.untyped_storage().nbytes() + 7) // 8 * 8)
        self._result = _map_leaves(result, lambda tensor: _place(tensor, sources, len(tensors)))
        self._pack = struct.Struct(f"{len(tensors) + len(self._bytes)}Q").pack
        self._replay = Replay([
            Launch(compiled=one.specialisation.resolve(one.args, one.sizes), args=one.args, sizes=one.sizes,
                   bindings=_bindings(one.args, sources)) for one in recorded.launches], torch.get_num_threads())

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        new = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in self._bytes]
        self._replay(self._pack(*[t.data_ptr() for t in tensors], *[t.data_ptr() for t in new]))
        return _map_leaves(self._result, lambda place: place.tensor(tensors, new))


def _place(tensor: torch.Tensor, sources: Mapping[int, tuple[int, int]], given: int) -> _Place:
    place = _Place(dtype=tensor.dtype, size=tensor.shape, stride=tensor.stride())
    storage = _storage(tensor)
    if not storage:
        return place
    if storage not in sources:
        return replace(place, fixed=tensor)
    source, address = sources[storage]
    place = replace(place, offset=tensor.data_ptr() - address)
    return replace(place, argument=source) if source < given else replace(place, new=source - given)


def _bindings(args: Sequence[Any], sources: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """The tensors of a launch that lie in a source's memory: (source, bytes from its address)."""
    found = {}
    for position, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and _storage(arg) in sources:
            source, address = sources[_storage(arg)]
            found[position] = source, arg.data_ptr() - address
    return found


# -- on CUDA -----------------------------------------------------------------------------------------


class _CudaGraph:
    """A CUDA graph. Contiguous arguments that kernels only read are copied to fixed places before a replay; others
    are `pinned`: their addresses belong to the bucket's key. New results are copies of the graph's own."""

    def __init__(self, name: str, function: Callable[..., Any], bound: inspect.BoundArguments,
                 tensors: Sequence[torch.Tensor], recorded: Recorded) -> None:
        written = {_storage(one.args[i]) for one in recorded.launches for i in one.specialisation.outputs}
        storages = [_storage(tensor) for tensor in tensors]
        direct = {id(value) for value in bound.arguments.values()}
        self._copied = {i: tensor.detach().clone() for i, tensor in enumerate(tensors)
                        if id(tensor) in direct and tensor.is_contiguous() and storages[i] not in written
                        and storages.count(storages[i]) == 1}
        self.pinned = tuple(i for i in range(len(tensors)) if i not in self._copied)
        self._kept = [tensors[i] for i in self.pinned]
        fixed = {id(tensors[i]): copy for i, copy in self._copied.items()}
        for argument, value in bound.arguments.items():
            bound.arguments[argument] = fixed.get(id(value), value)
        self._graph = torch.cuda.CUDAGraph()
        device = next(arg.device for one in recorded.launches for arg in one.args if isinstance(arg, torch.Tensor))
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            # Relaxed: a copy may be aligned where its argument was not, which is another kernel to compile and load.
            with torch.cuda.graph(self._graph, capture_error_mode="relaxed"):
                self._result = function(*bound.args, **bound.kwargs)
        _tensors_of(name, self._result)
        self._in_place = {_storage(tensor) for tensor in self._kept}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        for index, copy in self._copied.items():
            copy.copy_(tensors[index])
        self._graph.replay()
        return _map_leaves(self._result, lambda t: t if _storage(t) in self._in_place else t.clone())
