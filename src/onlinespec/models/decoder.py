"""The target's own forward: Llama, Qwen2 and Qwen3 shapes, over ragged batches, with a preallocated cache.

Knows nothing of drafting, sampling or text. Axis letters: N new tokens of a call (all requests, one after the
other), M rows whose logits are wanted, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.models.base import Model, ModelConfig, Output, check_call, last_rows
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import FastLayer, RotaryTable, Rows, make_plan
from onlinespec.models.linear import Linear, MakeLinear, linear_for


class Decoder(Model[KVCache]):
    """Our own forward, over ragged batches.

    Args:
        weights: A checkpoint's tensors under their published names (`model.layers.0...`); a tied model has no
            `lm_head.weight`. Each layer's are taken out as it is made, so that no second copy of all is ever held.
        make_linear: How products are computed; by default the fastest exact way for the weights' device and dtype.
    """

    def __init__(
        self, config: ModelConfig, weights: MutableMapping[str, Tensor], make_linear: MakeLinear | None = None
    ) -> None:
        self.config = config
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.device, self.dtype = self.embedding_VD.device, self.embedding_VD.dtype
        self.make_linear = make_linear or linear_for(self.device, self.dtype)
        self._layers = [
            FastLayer(config.layer, _take(weights, f"model.layers.{i}."), self.make_linear)
            for i in range(config.num_layers)
        ]
        self._norm = weights["model.norm.weight"]
        self.head_VD = weights.get("lm_head.weight", self.embedding_VD)
        self._head: Linear = self.make_linear(self.head_VD, None)
        self._rotary = RotaryTable(config.layer, self.device)
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
        return Output(self.head(last_rows(hidden_ND, counts, num_logits)), hidden_ND, aux)

    def head(self, hidden_states_MD: Tensor) -> Tensor:
        return self._head(hidden_states_MD).float()


def _take(weights: MutableMapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Moves the tensors whose names begin so into a dictionary of their own, named without it."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}
