"""What learning needs of a target: its embedding, its head, its shape. It can't be run."""

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
    """A target's ends without its layers: labels are its head applied to states that verification left."""

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
    """A target's ends as another process is told of them, which has a copy of its own."""

    name: str
    fingerprint: str
    config: ModelConfig
    embedding: Blob
    head: Blob | None  # None: the embedding
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, target: Target) -> EmbeddingAndHead:
        """Raises ValueError if the target's head is more than a product, which its layers' code must compute."""
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
        """A target to make a drafter for, and to learn from."""
        embedding_VD = _over(self.embedding)
        decoder = LabelHead(self.config, embedding_VD, _over(self.head) if self.head else embedding_VD)
        return Target(self.name, decoder, self.tokenizer, frozenset(), SamplingParams(), self.fingerprint)


def _over(blob: Blob) -> Tensor:
    """A tensor over a blob's own bytes, which no one may write into: a wide head is not held twice."""
    with warnings.catch_warnings():  # that the bytes can't be written into is meant
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(blob.data, dtype=getattr(torch, blob.dtype)).view(blob.shape)


def _without_scaling(config: ModelConfig) -> ModelConfig:
    """The shape alone: how the target's positions are scaled is code, and no drafter asks."""
    return replace(config, layer=replace(config.layer, rope=Rope(config.layer.rope.theta)))
