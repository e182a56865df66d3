"""What learning needs of a target: its embedding, its head, its shape. It can't be run, and a copy takes no memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.models.base import Model, ModelConfig, Output
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.loading import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HeadOnly(Model[KVCache]):
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
class Ends:
    """A target's ends as another process is told of them. The tensors move to memory that both share."""

    name: str
    fingerprint: str
    config: ModelConfig
    embedding_VD: Tensor
    head_VD: Tensor
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, target: Target) -> Ends:
        """Raises ValueError if the target's head is more than a product, which its layers' code must compute."""
        decoder = target.decoder
        if not decoder.has_plain_head:
            raise ValueError(
                f"{target.name} does more to its logits than multiply by its head, so its labels need the whole model; "
                "learn in a thread or inline"
            )
        return cls(
            target.name, target.fingerprint, decoder.config, decoder.embedding_VD, decoder.head_VD, target.tokenizer
        )

    def target(self) -> Target:
        """A target to make a drafter for, and to learn from."""
        decoder = HeadOnly(self.config, self.embedding_VD, self.head_VD)
        return Target(self.name, decoder, self.tokenizer, frozenset(), SamplingParams(), self.fingerprint)
