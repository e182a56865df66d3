"""The interface of a target: a forward pass over a batch of requests, a KV cache that can be cropped, an LM head.

`decoder.py` implements it for the families listed in `families.py`, `hf.py` for all others through transformers.

Axis letters: N new tokens of a call (of all requests, one after the other), M rows with logits, V vocabulary, D hidden
size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from onlinespec.core import Features
from onlinespec.models.layer import LayerConfig


class Output(NamedTuple):
    """The result of a forward pass, on the target's device."""

    logits_MV: Tensor  # float32: the last `num_logits` rows of every request, in order
    features: Features  # the hidden states of all N new tokens: the final ones, and those of the requested aux layers


class Cache(Protocol):
    """The KV cache of a model. Each running request has a slot in it, which is named by a number."""

    lengths: dict[int, int]  # number of cached tokens, by slot
    bytes_per_token: int  # of one cached token in all layers

    def take(self, slot: int, capacity: int) -> None:
        """Reserves room for `capacity` tokens under a free slot number.

        Raises:
            ValueError: if the slot is taken.
        """

    def release(self, slot: int) -> None:
        """Frees a slot's memory."""

    def crop(self, slot: int, length: int) -> None:
        """Drops everything from position `length` on.

        Raises:
            ValueError: if the slot holds fewer than `length` tokens.
        """


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a whole model."""

    layer: LayerConfig
    num_layers: int
    vocab_size: int
    max_positions: int  # the context length in tokens
    windows: tuple[int | None, ...] = ()  # sliding window of each layer, a query's own position included; () for none

    def window(self, index: int) -> int | None:
        """Returns a layer's sliding window in tokens; None if it attends to all earlier positions."""
        return self.windows[index] if self.windows else None


C = TypeVar("C", bound=Cache)


class Model(ABC, Generic[C]):
    """A causal language model for serving. `C` is the type of its cache."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    embedding_VD: Tensor
    head_VD: Tensor  # the LM head's matrix, which drafters use; `head` may do more than multiply by it
    has_plain_head: bool = True  # whether `head` is exactly the product with head_VD
    path: str = "own"  # which code runs it: "own" for our decoder, or "transformers"
    num_forwards: int  # calls of `forward` so far; tests check that learning adds none

    @abstractmethod
    def new_cache(self) -> C:
        """Returns an empty cache for this model."""

    @abstractmethod
    def forward(
        self,
        token_ids_N: Tensor,
        slots: Sequence[int],
        counts: Sequence[int],
        cache: C,
        num_logits: Sequence[int] | None = None,
        aux_layer_ids: Collection[int] = (),
    ) -> Output:
        """Runs `counts[i]` new tokens of slot `slots[i]` through the model, and appends them to that slot of the cache.

        Args:
            token_ids_N: int64: the new tokens of all requests, one after the other, sum(counts) of them.
            num_logits: For how many of its last new tokens each request gets logits; 0 for none. None for all tokens
                of all requests.
            aux_layer_ids: Layers whose hidden states are returned, too: n is the state after n layers, 0 the embedding.

        Raises:
            ValueError: if counts do not add up, num_logits is larger than a count, or a slot is named twice or has no
                room. Nothing is written then.
        """

    @abstractmethod
    def head(self, hidden_states_MD: Tensor) -> Tensor:
        """Returns float32 logits [M, V] of hidden states after the final norm. Does not count in `num_forwards`."""


def check_call(num_tokens: int, slots: Sequence[int], counts: Sequence[int], num_logits: Sequence[int] | None) -> None:
    """Checks the arguments of `Model.forward`.

    Raises:
        ValueError: if counts do not add up, num_logits is larger than a count, or a slot is named twice.
    """
    if sum(counts) != num_tokens or min(counts, default=0) < 1:
        raise ValueError(f"counts {list(counts)} do not add up to {num_tokens} new tokens, at least 1 each")
    if len(set(slots)) < len(slots):
        raise ValueError(f"slots {list(slots)} name one twice; give all its new tokens at once")
    if num_logits is not None and any(not 0 <= n <= count for n, count in zip(num_logits, counts, strict=True)):
        raise ValueError(f"num_logits {list(num_logits)} must lie between 0 and the counts {list(counts)}")


def last_rows(hidden_ND: Tensor, counts: Sequence[int], num_logits: Sequence[int] | None) -> Tensor:
    """Returns the last `num_logits[i]` rows of each request, [M, D]; all rows if it is None."""
    if num_logits is None or list(num_logits) == list(counts):
        return hidden_ND
    ends = accumulate(counts)
    return torch.cat([hidden_ND[end - wanted : end] for end, wanted in zip(ends, num_logits, strict=True)])
