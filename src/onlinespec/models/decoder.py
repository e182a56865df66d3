"""Our decoder for targets and drafters: a fast forward pass over ragged batches, and its differentiable plain form.

Axis letters: N new tokens of a call (of all requests, one after the other), M rows with logits, V vocabulary, D hidden
size, G key-value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.core import Features
from onlinespec.models.base import Model, ModelConfig, Output, check_call, last_rows
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import (
    FastLayer,
    Rows,
    Seen,
    make_plan,
    plain_keys_values,
    plain_layer,
    rms_norm,
    rotary_at,
)
from onlinespec.models.linear import Linear, MakeLinear, Product, linear_for, plain_product
from onlinespec.models.rope import RotaryTables


class Decoder(Model[KVCache]):
    """A model of a family in `families.py`, with a fast forward pass over ragged batches.

    Args:
        weights: The checkpoint's tensors by their published names (`model.layers.0...`); a model with tied embeddings
            has no `lm_head.weight`. Each layer's tensors are removed from it when the layer is made, to save memory.
        make_linear: Makes the matrix products; by default the fastest exact ones for the weights' device and dtype.
    """

    def __init__(
        self, config: ModelConfig, weights: MutableMapping[str, Tensor], make_linear: MakeLinear | None = None
    ) -> None:
        self.config = config
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.device, self.dtype = self.embedding_VD.device, self.embedding_VD.dtype
        self.make_linear = make_linear or linear_for(self.device, self.dtype)
        self._layers = [
            FastLayer(config.layer, _taken(weights, i), self.make_linear, config.window(i))
            for i in range(config.num_layers)
        ]
        self._norm = weights["model.norm.weight"]
        self.head_VD = weights.get("lm_head.weight", self.embedding_VD)
        self._rotary = RotaryTables(config.layer.rope, config.layer.head_dim, self.device)
        self._windows = set(config.windows) or {None}
        self.num_forwards = 0

    def new_cache(self) -> KVCache:
        layer = self.config.layer
        return KVCache(self.config.num_layers, layer.num_kv_heads, layer.head_dim, self.device, self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        token_ids_N: Tensor,
        slots: Sequence[int],
        counts: Sequence[int],
        cache: KVCache,
        num_logits: Sequence[int] | None = None,
        aux_layer_ids: Collection[int] = (),
    ) -> Output:
        check_call(len(token_ids_N), slots, counts, num_logits)
        for slot, count in zip(slots, counts, strict=True):
            cache.check_room(slot, count)
        self.num_forwards += 1
        rows = Rows(slots, [cache.lengths[slot] for slot in slots], counts)
        num_heads = self.config.layer.num_heads + self.config.layer.num_kv_heads
        plan = make_plan(rows, self._rotary, cache, num_heads, windows=self._windows)
        x_ND = F.embedding(token_ids_N, self.embedding_VD)
        aux = {0: x_ND} if 0 in aux_layer_ids else {}
        for index, layer in enumerate(self._layers):
            x_ND = layer(x_ND, plan, index)
            if index + 1 in aux_layer_ids:
                aux[index + 1] = x_ND
        for slot, count in zip(slots, counts, strict=True):
            cache.extend(slot, count)
        hidden_ND = F.rms_norm(x_ND, (x_ND.shape[-1],), self._norm, self.config.layer.rms_norm_eps)
        rows_MD = last_rows(hidden_ND, counts, num_logits)
        logits_MV = self.head(rows_MD) if len(rows_MD) else rows_MD.new_empty(0, len(self.head_VD), dtype=torch.float32)
        return Output(logits_MV, Features(hidden_ND, aux))

    @cached_property
    def _head(self) -> Linear:
        """The head's matrix product, made when it is first used, because a draft model never uses it."""
        return self.make_linear(self.head_VD, None)

    def head(self, hidden_states_MD: Tensor) -> Tensor:
        return self._head(hidden_states_MD).float()


class Past(NamedTuple):
    """C context rows, which later rows attend to."""

    keys_values: Sequence[tuple[Tensor, Tensor]]  # [C, G, E] each, by layer
    positions_C: Tensor
    is_visible_NC: Tensor  # bool: which context rows each later row attends to


def plain_states(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    x_ND: Tensor,
    positions_N: Tensor,
    is_visible_NN: Tensor,
    past: Past | None = None,
    product: Product = plain_product,
    capacities: Iterable[int] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns the states after the final norm [N, D], and every layer's keys and values [N, G, E], differentiable.

    This is the reference for `Decoder.forward`. Several sets of weights can be evaluated at once: weights and x then
    have a leading axis, one entry per set.

    Args:
        x_ND: Embedded tokens.
        is_visible_NN: bool: which rows each row attends to, before sliding windows are applied.
        past: Context rows, which all rows come after.
        product: Multiplies rows by a weight.
        capacities: Maximum number of tokens of each row's request; see `rotary_at`.
    """
    rotary_NR, keys_values = rotary_at(positions_N, config.layer, capacities), []
    for index in range(config.num_layers):
        layer, window = layer_weights(weights, index), config.window(index)
        keys_values.append(plain_keys_values(config.layer, layer, x_ND, rotary_NR, product))
        seen = [Seen(*keys_values[-1], _within(window, positions_N, positions_N, is_visible_NN))]
        if past:
            is_visible_NC = _within(window, positions_N, past.positions_C, past.is_visible_NC)
            seen.insert(0, Seen(*past.keys_values[index], is_visible_NC))
        x_ND = plain_layer(config.layer, layer, x_ND, rotary_NR, seen, product)
    return rms_norm(x_ND, weights["model.norm.weight"], config.layer.rms_norm_eps), keys_values


def plain_keys_values_by_layer(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    x_SD: Tensor,
    positions_S: Tensor,
    product: Product = plain_product,
    capacities: Iterable[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Returns every layer's keys and values [S, G, E] of one text, as `plain_states` does, without its final states."""
    rotary_SR, keys_values = rotary_at(positions_S, config.layer, capacities), []
    is_before_SS = positions_S[:, None] >= positions_S
    for index in range(config.num_layers):
        layer = layer_weights(weights, index)
        keys_values.append(plain_keys_values(config.layer, layer, x_SD, rotary_SR, product))
        if index + 1 < config.num_layers:
            is_visible_SS = _within(config.window(index), positions_S, positions_S, is_before_SS)
            x_SD = plain_layer(config.layer, layer, x_SD, rotary_SR, [Seen(*keys_values[-1], is_visible_SS)], product)
    return keys_values


def _within(window: int | None, positions_N: Tensor, positions_S: Tensor, is_visible_NS: Tensor) -> Tensor:
    """Removes positions outside of the sliding window."""
    return is_visible_NS if window is None else is_visible_NS & (positions_N[:, None] - positions_S < window)


def layer_weights(weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Returns one layer's tensors, by their names inside the layer."""
    prefix = _prefix(index)
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _taken(weights: MutableMapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Removes one layer's tensors from `weights` and returns them."""
    names = [name for name in weights if name.startswith(_prefix(index))]
    return {name.removeprefix(_prefix(index)): weights.pop(name) for name in names}


def _prefix(index: int) -> str:
    return f"model.layers.{index}."
