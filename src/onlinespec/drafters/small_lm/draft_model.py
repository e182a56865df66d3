"""The language model in a `small_lm` drafter: a fast forward pass for drafting, a differentiable one for learning.

Model families that our decoder supports draft in batches, and learn through the decoder's plain PyTorch form. Other
families run through transformers, one request at a time, in drafting and in learning.

Axis letters: N rows of a call, C rows of context, S rows of one text, D hidden size, V vocabulary, E sets of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS
from onlinespec.core import Params
from onlinespec.drafters.training_rows import Ints, Layout
from onlinespec.models.base import Cache, ModelConfig
from onlinespec.models.decoder import Decoder, Past, plain_keys_values_by_layer, plain_states
from onlinespec.models.families import published_weights
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.linear import MakeLinear, draft_linear_for, learn_product_for, plain_product

if TYPE_CHECKING:  # imports transformers, which takes seconds
    from onlinespec.models.hf import HFCache, HFModel


class DraftModel(ABC):
    """A causal language model whose weights can be swapped between steps."""

    config: ModelConfig
    cache: Cache
    embedding_name: str  # name of the embedding's weight
    head_name: str  # name of the LM head's weight; the embedding's if they are tied
    max_context: int | None = None  # learning keeps at most so many context rows per span, the latest; None for all
    can_adapt: bool  # whether LoRA adapters are supported

    @abstractmethod
    def prepare(self, weights: Params) -> Callable[[], None]:
        """Prepares drafting with other weights. Returns a function that switches to them and can't fail."""

    @abstractmethod
    def read(self, token_ids_N: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Runs the model on `counts[i]` tokens of `slots[i]` and extends its cache. Returns their states, [N, D]."""

    @abstractmethod
    def states(self, weights: Params, rows: Layout, sets: tuple[int, ...]) -> Tensor:
        """Returns the hidden states [N, D] of the trained rows, differentiable in the weights.

        Args:
            sets: () for one set of weights. (E,) for E stacked sets; the states are then [E, N, D].
        """

    @abstractmethod
    def published(self, weights: Params) -> dict[str, Tensor]:
        """Returns the weights by the published names of the model family."""

    def known(self, token_ids: Tensor) -> Tensor:
        """Replaces ids beyond the drafter's vocabulary by 0, because the target's vocabulary may be larger."""
        return torch.where(token_ids < self.config.vocab_size, token_ids, 0)


class OwnDraftModel(DraftModel):
    """A model of a family that our decoder supports.

    Args:
        config: The shape of the model.
        published_config: The content of its config.json.
        weights: Float32 weights by our decoder's names. A model with tied embeddings has no `lm_head.weight`.
        make_linear: Makes the matrix products for drafting; by default the fastest ones for the device. If given,
            learning uses plain products, too.
        draft_dtype: The dtype of weights and cache in drafting.
    """

    embedding_name = "model.embed_tokens.weight"
    _decoder: Decoder
    max_context = 256  # most of a round's time is recomputing context; on Spider (480 tokens) 256 were as good as all
    can_adapt = True

    def __init__(
        self,
        config: ModelConfig,
        published_config: Mapping[str, Any],
        weights: Params,
        make_linear: MakeLinear | None = None,
        draft_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self._architecture = config, published_config["architectures"][0]
        device = weights[self.embedding_name].device
        self.head_name = "lm_head.weight" if "lm_head.weight" in weights else self.embedding_name
        self._make_linear, self._draft_dtype = make_linear or draft_linear_for(device, draft_dtype), draft_dtype
        self._product = plain_product if make_linear else learn_product_for(device)
        layer = config.layer
        self.cache: KVCache = KVCache(config.num_layers, layer.num_kv_heads, layer.head_dim, device, draft_dtype)

    def prepare(self, weights: Params) -> Callable[[], None]:
        own = {name: weight.to(self._draft_dtype) for name, weight in weights.items()}
        decoder = Decoder(self.config, own, self._make_linear)

        def take_over() -> None:
            self._decoder = decoder

        return take_over

    def read(self, token_ids_N: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        return self._decoder.forward(token_ids_N, slots, counts, self.cache, [0] * len(slots)).features.final_SD

    def published(self, weights: Params) -> dict[str, Tensor]:
        return published_weights(weights, self._architecture)

    def states(self, weights: Params, rows: Layout, sets: tuple[int, ...]) -> Tensor:
        """See `DraftModel.states`. There is no gradient through the context's keys and values."""
        states_ND, _ = plain_states(
            self.config,
            weights,
            self._embedded(weights, rows.read_ids_N, sets),
            rows.positions_N,
            rows.is_visible_NN,
            self._context(weights, rows, sets),
            self._product,
            self._capped(rows.capacities),
        )
        return states_ND

    @torch.no_grad()
    def _context(self, weights: Params, rows: Layout, sets: tuple[int, ...]) -> Past | None:
        sizes = [size for size in rows.context_sizes if size]
        if not sizes:
            return None
        x_CD = self._embedded(weights, rows.context_ids_C, sets)
        capacities = np.split(self._capped(rows.context_capacities), np.cumsum(sizes)[:-1])
        texts = zip(x_CD.split(sizes, dim=-2), rows.context_positions_C.split(sizes), capacities, strict=True)
        by_text = [
            plain_keys_values_by_layer(self.config, weights, x_SD, positions_S, self._product, its_capacities)
            for x_SD, positions_S, its_capacities in texts
        ]
        keys_values = [
            (torch.cat([k for k, _ in layers], dim=-3), torch.cat([v for _, v in layers], dim=-3))
            for layers in zip(*by_text, strict=True)
        ]
        return Past(keys_values, rows.context_positions_C, rows.is_visible_NC)

    def _capped(self, capacities: Ints) -> Ints:
        """Limits capacities to what drafting uses, which ends at the model's last position."""
        return np.minimum(capacities, self.config.max_positions + MAX_DRAFT_TOKENS)

    def _embedded(self, weights: Params, token_ids_N: Tensor, sets: tuple[int, ...]) -> Tensor:
        """Embeds tokens, [N, D]; with stacked weights [E, N, D]."""
        embedding, ids_N = weights[self.embedding_name], self.known(token_ids_N)
        if embedding.dim() == 3:
            return embedding[:, ids_N]
        x_ND = F.embedding(ids_N, embedding)
        return x_ND.expand(*sets, *x_ND.shape)


class HFDraftModel(DraftModel):
    """A model of any other family, run by transformers. Gradients also flow through the context's keys and values."""

    can_adapt = False

    def __init__(self, model: HFModel) -> None:
        self._model, self.config = model, model.config
        self.cache: HFCache = model.new_cache()
        self.embedding_name, self.head_name = model.weight_names()

    def prepare(self, weights: Params) -> Callable[[], None]:
        return self._model.prepare(weights)

    def read(self, token_ids_N: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        return self._model.forward(token_ids_N, slots, counts, self.cache, [0] * len(slots)).features.final_SD

    def published(self, weights: Params) -> dict[str, Tensor]:
        return dict(weights)

    def states(self, weights: Params, rows: Layout, sets: tuple[int, ...]) -> Tensor:
        if not sets:
            return self._states(weights, rows)
        one_set = self._model.weights
        each = (
            {name: t[i] if t.dim() > one_set[name].dim() else t for name, t in weights.items()} for i in range(sets[0])
        )
        return torch.stack([self._states(one, rows) for one in each])

    def _states(self, weights: Params, rows: Layout) -> Tensor:
        """Computes the states span by span: a forward pass over a span's context and its trained rows."""
        parts = []
        for at_N, at_C in _texts(rows):
            ids = self.known(torch.cat([rows.context_ids_C[at_C], rows.read_ids_N[at_N]]))
            parts.append(self._model.states(weights, ids)[len(rows.context_ids_C[at_C]) :])
        return torch.cat(parts)


def _texts(rows: Layout) -> list[tuple[slice, slice]]:
    """Returns for each span the slices of its trained rows and of its context rows."""
    ends = [0, *(np.flatnonzero(rows.left == 1) + 1).tolist()]
    context_ends = [0, *accumulate(rows.context_sizes)]
    return [(slice(*at_N), slice(*at_C)) for at_N, at_C in zip(pairwise(ends), pairwise(context_ends), strict=True)]
