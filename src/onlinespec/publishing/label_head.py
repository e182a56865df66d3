"""The target without its layers: embedding, LM head and config, which is all that learning needs of it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.models.base import Model, ModelConfig, Output
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.loading import Target
from onlinespec.models.rope import Rope
from onlinespec.publishing.protocol import Blob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelHead(Model[KVCache]):
    """A target model without layers. Labels are its head applied to the hidden states that verification stored.

    `new_cache` and `forward` raise RuntimeError.
    """

    path = "head only"

    def __init__(self, config: ModelConfig, embedding_VD: Tensor, head_VD: Tensor) -> None:
        self.config, self.embedding_VD, self.head_VD = config, embedding_VD, head_VD
        self.device, self.dtype = embedding_VD.device, embedding_VD.dtype
        self.num_forwards = 0

    def new_cache(self) -> KVCache:
        raise RuntimeError("learning never runs the target")

    def forward(
        self,
        token_ids_N: Tensor,
        slots: Sequence[int],
        counts: Sequence[int],
        cache: KVCache,
        num_logits: Sequence[int] | None = None,
        aux_layer_ids: Collection[int] = (),
    ) -> Output:
        raise RuntimeError("learning never runs the target")

    @torch.inference_mode()
    def head(self, hidden_states_MD: Tensor) -> Tensor:
        return F.linear(hidden_states_MD, self.head_VD).float()


@dataclass(frozen=True)
class EmbeddingAndHead:
    """A target's embedding and LM head in a form that can be sent to another process."""

    name: str
    fingerprint: str
    config: ModelConfig
    embedding: Blob  # [V, D]
    head: Blob | None  # [V, D]; None if tied to the embedding
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, target: Target) -> EmbeddingAndHead:
        """Copies the embedding and head of a target.

        Raises:
            ValueError: if the target's logits are not just a product with its head, so that labels need its own code.
        """
        decoder = target.decoder
        if not decoder.has_plain_head:
            raise ValueError(
                f"{target.name} does more to its logits than multiply by its head, so its labels need the whole model; "
                "learn in a thread or inline"
            )
        is_tied = decoder.head_VD.data_ptr() == decoder.embedding_VD.data_ptr()
        return cls(
            name=target.name,
            fingerprint=target.fingerprint,
            config=_without_scaling(decoder.config),
            embedding=Blob.of(decoder.embedding_VD),
            head=None if is_tied else Blob.of(decoder.head_VD),
            tokenizer=target.tokenizer,
        )

    def target(self) -> Target:
        """Returns a Target with a `LabelHead` as its model, to create a drafter for and to compute labels with."""
        embedding_VD = _over(self.embedding)
        decoder = LabelHead(self.config, embedding_VD, _over(self.head) if self.head else embedding_VD)
        return Target(self.name, decoder, self.tokenizer, frozenset(), SamplingParams(), self.fingerprint)


def _over(blob: Blob) -> Tensor:
    """Returns a read-only tensor over a blob's own bytes, so that a large head is not held in memory twice."""
    with warnings.catch_warnings():  # torch warns that the buffer is read-only, which is intended
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(blob.data, dtype=getattr(torch, blob.dtype)).view(blob.shape)


def _without_scaling(config: ModelConfig) -> ModelConfig:
    """Removes the rotary scaling from a config: it may hold code that can't be sent, and drafters don't use it."""
    return replace(config, layer=replace(config.layer, rope=Rope(config.layer.rope.theta)))
