"""The target's own forward: Llama, Qwen2 and Qwen3 shapes, over ragged batches, with a preallocated cache.

Knows nothing of drafting, sampling or text. Axis letters: N new tokens of a call (all requests, one after the
other), M rows whose logits are wanted, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import FastLayer, LayerConfig, RotaryTable, Rows, make_plan
from onlinespec.models.linear import Linear, MakeLinear, linear_for


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a whole decoder."""

    layer: LayerConfig
    num_layers: int
    vocab_size: int
    max_positions: int


class Output(NamedTuple):
    """What a forward returns, on the target's device."""

    logits_MV: Tensor  # float32, the last `num_logits` rows of every request, in order
    hidden_states_ND: Tensor  # after the final norm: the head applied to a row gives its logits
    aux_hidden_states: dict[int, Tensor]  # [N, D] by layer id; id n is the state after n layers, 0 the embedding


class Decoder:
    """A decoder-only language model for serving. Its weights never change.

    Args:
        weights: A checkpoint's tensors under their published names (`model.layers.0...`); a tied model has no
            `lm_head.weight`.
        make_linear: How products are computed; by default the fastest exact way for the weights' device and dtype.
    """

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, Tensor], make_linear: MakeLinear | None = None
    ) -> None:
        self.config = config
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.device, self.dtype = self.embedding_VD.device, self.embedding_VD.dtype
        self.make_linear = make_linear or linear_for(self.device, self.dtype)
        prefixes = [f"model.layers.{i}." for i in range(config.num_layers)]
        self._layers = [
            FastLayer(
                config.layer, {n.removeprefix(p): t for n, t in weights.items() if n.startswith(p)}, self.make_linear
            )
            for p in prefixes
        ]
        self._norm = weights["model.norm.weight"]
        self.head_VD = weights.get("lm_head.weight", self.embedding_VD)
        self._head: Linear = self.make_linear(self.head_VD, None)
        self._rotary = RotaryTable(config.layer, self.device)
        self.num_forwards = 0  # calls of `forward` so far; learning must not add any

    def new_cache(self) -> KVCache:
        """An empty cache of this model's shape."""
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
        """Runs `counts[i]` new tokens of request `slots[i]`, each behind what its slot already holds.

        Args:
            token_ids_N: int64, all requests' new tokens one after the other, sum(counts) of them.
            num_logits: How many last rows of each request need logits; all of them by default, 0 for none.

        Raises:
            ValueError: if the counts do not add up, num_logits asks for more rows than there are, or a slot comes
                twice or has no room left. Nothing is written then.
        """
        if sum(counts) != len(token_ids_N) or min(counts, default=0) < 1:
            raise ValueError(f"counts {list(counts)} do not add up to {len(token_ids_N)} new tokens, at least 1 each")
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots {list(slots)} name one twice; give all its new tokens at once")
        if num_logits is not None and any(not 0 <= n <= count for n, count in zip(num_logits, counts, strict=True)):
            raise ValueError(f"num_logits {list(num_logits)} must lie between 0 and the counts {list(counts)}")
        for slot, count in zip(slots, counts, strict=True):
            cache.check_room(slot, count)
        self.num_forwards += 1
        plan = make_plan(Rows(slots, [cache.lengths[slot] for slot in slots], counts), self._rotary, cache)
        x_ND = F.embedding(token_ids_N, self.embedding_VD)
        aux = {0: x_ND} if 0 in aux_layer_ids else {}
        for index, layer in enumerate(self._layers):
            x_ND = layer(x_ND, plan, index)
            if index + 1 in aux_layer_ids:
                aux[index + 1] = x_ND
        for slot, count in zip(slots, counts, strict=True):
            cache.extend(slot, count)
        hidden_ND = F.rms_norm(x_ND, (x_ND.shape[-1],), self._norm, self.config.layer.rms_norm_eps)
        return Output(self.head(_last_rows(hidden_ND, counts, num_logits)), hidden_ND, aux)

    def head(self, hidden_states_MD: Tensor) -> Tensor:
        """float32 logits of rows whose hidden states (after the final norm) are given. Not a target forward."""
        return self._head(hidden_states_MD).float()


def _last_rows(hidden_ND: Tensor, counts: Sequence[int], num_logits: Sequence[int] | None) -> Tensor:
    if num_logits is None or list(num_logits) == list(counts):
        return hidden_ND
    ends = torch.tensor(counts).cumsum(0).tolist()
    return torch.cat([hidden_ND[end - wanted : end] for end, wanted in zip(ends, num_logits, strict=True)])
