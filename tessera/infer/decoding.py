"""Decoder: the model's next-token step, replayed as one native call where that can be.

In: a model, a cache that holds the prompt, one token a row. Out: logits. GPTInference calls it for each step.

On the CPU a step of a model whose operations all have kernels is recorded once for each batch size and capacity of
the cache (kernel.graph) and replayed: no Python runs between its kernels. Otherwise the model is called.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tessera import dist
from tessera.errors import UnsupportedError
from tessera.kernel import graph
from tessera.models import gpt_plan
from tessera.models.gpt import GPTModel
from tessera.nn import KVCache, StepCache
from tessera.ops import MAX_FEW_ROWS, is_invariant, wants_reference

_log = logging.getLogger(__name__)


class Decoder:
    """Runs one token a row. Its recordings serve every cache of the same sizes.

    Args:
        model: in evaluation mode; when its parameters are replaced, the steps are recorded anew.
    """

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._parameters: tuple[Any, ...] = ()
        self._step: graph.Graph | None = None
        self._refusal: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why steps are not recorded; None while they are."""
        return self._refusal

    def begin(self, cache: KVCache) -> Step:
        """The steps of one generation on a cache that holds the prompt."""
        return Step(self._model, cache, self._recorded(cache))

    def _recorded(self, cache: KVCache) -> Decoder | None:
        model = self._model
        if is_invariant() or wants_reference():
            return None
        if cache.batch_size > MAX_FEW_ROWS or next(model.parameters()).device.type != "cpu":
            return None
        parameters = tuple((p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers()))
        if parameters != self._parameters:
            self._parameters, self._refusal = parameters, None
            self._step = graph.capture(self._run, bucket_by=["tokens_B", "positions_B", "stores", "valid_BC"])
        return self if self._refusal is None else None

    def _run(self, tokens_B: Tensor, positions_B: Tensor, place: Tensor, valid_BC: Tensor | None,
             stores: list[Tensor]) -> Tensor:
        return self._model.step(tokens_B, positions_B, StepCache(stores, place, valid_BC))

    def replay(self, *args: Any) -> Tensor | None:
        """The recorded step; None, from then on, when the model has operations that cannot be recorded.

        Ranks that share a model record without talking to each other, agree whether all could, and replay.
        """
        assert self._step is not None
        logits_BV, refusal = None, None
        with dist.rehearsal() as rehearsal:
            try:
                logits_BV = self._step(*args)
            except UnsupportedError as error:
                refusal = str(error)
        mesh = self._model.mesh
        if mesh is not None and mesh.has_axis(gpt_plan.AXIS) and (refusal or rehearsal.n_left_out):
            could = torch.tensor([int(refusal is None)])
            if dist.all_reduce(could, mesh, axis=gpt_plan.AXIS, op="min").item():
                logits_BV = self._step(*args)
            else:
                refusal = refusal or "another rank cannot record them"
        if refusal is None:
            return logits_BV
        self._refusal = refusal
        _log.info("decode steps are not recorded: %s", refusal)
        return None


class Step:
    """The steps of one generation; call it with each row's token."""

    def __init__(self, model: GPTModel, cache: KVCache, decoder: Decoder | None) -> None:
        self._model, self._cache, self._decoder = model, cache, decoder
        self._stores: list[Tensor] = []
        self._capacity = 0
        self._place = torch.zeros(1, dtype=torch.int64)
        self._positions_B = torch.zeros(cache.batch_size, dtype=torch.int64)
        self._valid_BC: Tensor | None = None
        if decoder is not None:
            valid_BT = cache.valid
            self._positions_B.fill_(cache.length)
            if valid_BT is not None:
                self._positions_B.copy_(valid_BT.sum(-1))

    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after tokens_B, int64 [B], which the cache then holds.

        Raises:
            InputError: the cache is full.
        """
        if self._decoder is not None:
            logits_BV = self._replay(tokens_B)
            if logits_BV is not None:
                return logits_BV
            self._decoder = None
        return self._model(tokens_B[:, None], kv_cache=self._cache)["logits"][:, -1]

    def _replay(self, tokens_B: Tensor) -> Tensor | None:
        cache = self._cache
        if cache.length >= self._capacity and not self._grow():
            return None
        self._place.fill_(cache.length)
        if self._valid_BC is not None:
            self._valid_BC[:, cache.length] = True
        assert self._decoder is not None
        logits_BV = self._decoder.replay(tokens_B, self._positions_B, self._place, self._valid_BC, self._stores)
        if logits_BV is not None:
            cache.advance()
            self._positions_B += 1
        return logits_BV

    def _grow(self) -> bool:
        """More room in the cache; whether its storage can be used."""
        cache = self._cache
        cache.reserve(cache.length + 1)
        try:
            self._stores = cache.stores()
        except UnsupportedError:
            return False
        self._capacity = cache.capacity
        if cache.valid is not None:
            old = cache.valid[:, :cache.length]
            self._valid_BC = old.new_zeros(cache.batch_size, self._capacity)
            self._valid_BC[:, :cache.length] = old
        return True
