"""KVCache: the keys and values of the tokens that a model has seen.

In: each layer's new keys and values. Out: views of all of that layer's keys and values so far. GPTModel
fills it, nn.Attention reads it, the engines reorder, select and truncate its rows.

Dims: B batch, K key/value heads, S new tokens, T all tokens, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tessera import ops
from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.ops.kernels.append import append_kernel
from tessera.types import dtype_of

_DTYPES = ("f32", "bf16", "f16", "fp8_e4m3", "fp8_e5m2")
_FIRST_CAPACITY = 64  # tokens


class KVCache:
    """Keys and values of up to max_seq_len tokens for every layer and row.

    Storage grows with the tokens (doubling, so that appending costs amortised O(1) a token) and never
    exceeds max_seq_len. The fp8 types keep one f32 scale for each token and head: the scaled head's largest
    magnitude is the type's largest, so the error of an entry is at most 2^-4 (e4m3) or 2^-3 (e5m2) of
    itself, plus a subnormal step of the largest.

    Rows of different lengths lie in one rectangle: padded places hold keys that `valid` marks False and that
    no query sees. All rows grow together; `length` counts places, padding included. What is cached carries
    no gradient.

    Args:
        batch_size, max_seq_len, n_layers, n_kv_heads, d_head: shape.
        dtype: storage, "f32", "bf16", "f16", "fp8_e4m3" or "fp8_e5m2".
        compression: "group_query" or None. Keys and values are kept per key/value head, never repeated
            for the query heads of a group, so the first names what the cache always does.
        device: where; default that of the first keys.

    Raises:
        InputError: a size below 1 or an unknown compression.
        UnsupportedError: another dtype.
    """

    def __init__(
        self, batch_size: int, max_seq_len: int, n_layers: int, n_kv_heads: int, d_head: int,
        dtype: Any = "bf16", compression: str | None = None, device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "max_seq_len": max_seq_len, "n_layers": n_layers,
                 "n_kv_heads": n_kv_heads, "d_head": d_head}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name}: {value} given; expected at least 1")
        if compression not in (None, "group_query"):
            raise InputError(f"compression: {compression!r} given; expected 'group_query' or None")
        self.dtype = dtype_of(dtype)
        if self.dtype.name not in _DTYPES:
            raise UnsupportedError(f"dtype: {self.dtype} given; a KV cache holds one of {', '.join(_DTYPES)}")
        self.batch_size, self.max_seq_len, self.n_layers = batch_size, max_seq_len, n_layers
        self.n_kv_heads, self.d_head, self.compression = n_kv_heads, d_head, compression
        self.device = None if device is None else torch.device(device)
        self.valid: Tensor | None = None  # bool [B, >= length], False for padding; None: no padding
        self._lengths = [0] * n_layers
        self._least = _FIRST_CAPACITY  # places that the first allocation has at least
        # Per layer: keys and values [B, K, capacity, D], then for fp8 their scales [B, K, capacity].
        self._stores: list[list[Tensor]] = [[] for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Places filled in every layer (tokens, padding included)."""
        return min(self._lengths)

    @property
    def capacity(self) -> int:
        """Places allocated in the first layer."""
        return self._stores[0][0].shape[2] if self._stores[0] else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and scales."""
        return sum(store.numel() * store.element_size() for stores in self._stores for store in stores)

    def update(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values.

        Args:
            layer: 0..n_layers - 1.
            k_BKSD, v_BKSD: [B, K, S, D], one float dtype.

        Returns:
            (k, v) of all tokens so far, [B, K, T, D] in the dtype given: views when the storage has that
            dtype, valid until the cache changes.

        Raises:
            ShapeError: the shape does not fit the cache.
            InputError: more than max_seq_len tokens.
        """
        expected = (self.batch_size, self.n_kv_heads, k_BKSD.shape[-2], self.d_head)
        if k_BKSD.shape != expected or v_BKSD.shape != expected:
            raise ShapeError(f"k, v: {tuple(k_BKSD.shape)}, {tuple(v_BKSD.shape)} given; expected {expected} "
                             "(batch_size, n_kv_heads, new tokens, d_head)")
        start = self._lengths[layer]
        end = start + expected[2]
        stores = self._reserve(layer, end, k_BKSD.device)
        self._lengths[layer] = end
        new = (k_BKSD.detach(), v_BKSD.detach())
        if len(stores) == 2:
            for store, x in zip(stores, new):
                store[:, :, start:end] = x
            k, v = (store[:, :, :end] for store in stores)
            return (k, v) if k.dtype == k_BKSD.dtype else (k.to(k_BKSD.dtype), v.to(k_BKSD.dtype))
        out = []
        for store, scales, x in zip(stores[:2], stores[2:], new):
            store[:, :, start:end], scales[:, :, start:end] = ops.quantize_rows(x, self.dtype.torch)
            out.append(ops.dequantize_rows(store[:, :, :end], scales[:, :, :end], x.dtype))
        return out[0], out[1]

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """Around a pass over the layers: when it is interrupted, the cache keeps what it held before."""
        length = self.length
        try:
            yield
        except BaseException:
            self.truncate(length)
            raise

    def reserve(self, length: int) -> None:
        """Make room for `length` places in every layer, at its next growth or, where it has storage, now.

        Raises:
            InputError: more than max_seq_len.
        """
        self._least = max(self._least, min(length, self.max_seq_len))
        for layer, stores in enumerate(self._stores):
            if stores:
                self._reserve(layer, length, stores[0].device)

    def stores(self) -> list[Tensor]:
        """The storage of keys and of values of every layer in turn, [B, K, capacity, D] each.

        Raises:
            UnsupportedError: a layer is empty, or the storage type keeps scales beside its values.
        """
        if self.dtype.bits == 8 or not all(self._stores):
            raise UnsupportedError(f"KVCache: {self.dtype} of {self.length} tokens; a recorded step needs a cache of "
                                   "f32, bf16 or f16 that holds the prompt")
        return [store for stores in self._stores for store in stores]

    def advance(self) -> None:
        """Take note of a place that a `StepCache` has filled in every layer and row."""
        self.mark_valid(1, None)
        self._lengths = [length + 1 for length in self._lengths]

    def _reserve(self, layer: int, length: int, device: torch.device) -> list[Tensor]:
        """The layer's stores, grown to hold at least `length` places."""
        stores = self._stores[layer]
        if stores and length <= stores[0].shape[2]:
            return stores
        if length > self.max_seq_len:
            raise InputError(
                f"KVCache: {length} tokens given ({self._lengths[layer]} of them cached); "
                f"expected at most max_seq_len = {self.max_seq_len}")
        # A power of two: few capacities, for each of which decode steps are recorded once.
        capacity = 1 << (max(self._least, length) - 1).bit_length()
        shape = (self.batch_size, self.n_kv_heads, min(capacity, self.max_seq_len))
        if not stores:
            device = self.device or device
            heads = [torch.empty(*shape, self.d_head, dtype=self.dtype.torch, device=device) for _ in range(2)]
            scales = [torch.empty(shape, device=device) for _ in range(2)] if self.dtype.bits == 8 else []
            self._stores[layer] = heads + scales
        else:
            filled = self._lengths[layer]
            for i, old in enumerate(stores):
                grown = old.new_empty(*shape, *old.shape[3:])
                grown[:, :, :filled] = old[:, :, :filled]
                stores[i] = grown
        return self._stores[layer]

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length` places; storage stays allocated.

        Raises:
            InputError: length is negative or above the cached length.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"length: {length} given; expected 0..{self.length} (cached)")
        self._lengths = [length] * self.n_layers
        if self.valid is not None:
            self.valid = self.valid[:, :length]

    def select(self, rows: Tensor | list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times. The batch size follows.

        Args:
            rows: row numbers, [n] integers.

        Raises:
            InputError: no row, or a row outside the batch.
        """
        index = torch.as_tensor(rows)
        if index.dim() != 1 or not index.numel() or index.dtype not in (torch.int64, torch.int32):
            raise InputError(f"rows: {tuple(index.shape)} {index.dtype} given; expected at least one row number, [n]")
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= self.batch_size:
            raise InputError(f"rows: {low if low < 0 else high} given; expected 0..{self.batch_size - 1}")
        if self._stores[0]:
            index = index.to(self._stores[0][0].device)
        for layer, stores in enumerate(self._stores):
            filled = self._lengths[layer]
            for i, old in enumerate(stores):
                new = old.new_empty(len(index), *old.shape[1:])
                new[:, :, :filled] = old[index, :, :filled]
                stores[i] = new
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        self.batch_size = len(index)

    def reorder(self, indices: Tensor | list[int]) -> None:
        """Row i becomes what row indices[i] was, as beam search needs after each step; see `select`."""
        self.select(indices)

    def mark_valid(self, n_new: int, valid_BT: Tensor | None) -> Tensor | None:
        """Note which places hold tokens, before the layers append n_new places.

        Args:
            n_new: places about to be appended.
            valid_BT: bool [B, length + n_new], or None: the new places are tokens, the old as noted before.

        Returns:
            bool [B, length + n_new], or None when no place is padded.
        """
        if valid_BT is None and self.valid is not None:
            old = self.valid[:, :self.length]
            valid_BT = torch.cat((old, old.new_ones(self.batch_size, n_new)), 1)
        self.valid = valid_BT
        return valid_BT

    def __repr__(self) -> str:
        return (f"KVCache({self.length}/{self.max_seq_len} tokens, batch {self.batch_size}, {self.n_layers} layers, "
                f"{self.n_kv_heads} x {self.d_head} {self.dtype}, {self.nbytes} bytes)")


class StepCache:
    """A KVCache's storage as a recorded decode step sees it: the place of its token is read when kernels run.

    Args:
        stores: of the cache, see KVCache.stores.
        place: int64 [1], in 0..capacity - 1: where each row's token goes.
        valid_BC: bool [B, capacity], False for padding; None when there is none.
    """

    def __init__(self, stores: list[Tensor], place: Tensor, valid_BC: Tensor | None) -> None:
        self._stores, self._place, self._valid_BC = stores, place, valid_BC

    def update(self, layer: int, k_BK1D: Tensor, v_BK1D: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [B, K, 1, D]; its whole storage, [B, K, capacity, D] each."""
        keys, values = self._stores[2 * layer: 2 * layer + 2]
        append_kernel(k_BK1D[:, :, 0], v_BK1D[:, :, 0], self._place, keys, values)
        return keys, values

    def mask(self, window: int | None) -> ops.Mask:
        """What the token's query sees.

        Raises:
            UnsupportedError: a window over padded rows, where places and tokens are counted differently.
        """
        if window is not None and self._valid_BC is not None:
            raise UnsupportedError(f"window: {window} given with padding; a recorded decode step has one or the other")
        return ops.Mask(place=self._place, last=window, valid=self._valid_BC)
