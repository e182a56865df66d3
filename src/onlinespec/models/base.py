"""What a target is to the rest: a forward over running requests, a cache that can be rewound, a head.

`decoder.py` is ours, for the families it knows; `hf.py` runs the others through transformers. Axis letters: N new
tokens of a call (all requests, one after the other), M rows whose logits are wanted, V vocabulary, D hidden size.
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
    """What a forward returns, on the target's device."""

    logits_MV: Tensor  # float32, the last `num_logits` rows of every request, in order
    features: Features  # of all N new tokens, with the aux layers that were asked for


class Cache(Protocol):
    """What a model remembers of running requests, each under a slot number."""

    lengths: dict[int, int]  # tokens held, by slot
    bytes_per_token: int

    def take(self, slot: int, capacity: int) -> None:
        """Reserves room for `capacity` tokens under a slot number that is free."""

    def release(self, slot: int) -> None:
        """Gives a slot's memory back."""

    def crop(self, slot: int, length: int) -> None:
        """Forgets everything from position `length` on."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a whole model."""

    layer: LayerConfig
    num_layers: int
    vocab_size: int
    max_positions: int
    windows: tuple[int | None, ...] = ()  # by layer, how many positions a query sees, its own included; () for all

    def window(self, index: int) -> int | None:
        """A layer's window; None where it sees everything before it."""
        return self.windows[index] if self.windows else None


C = TypeVar("C", bound=Cache)


class Model(ABC, Generic[C]):
    """A causal language model for serving. Its weights never change."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    embedding_VD: Tensor
    head_VD: Tensor  # a drafter's head, and a label's rows; `head` may do more than multiply by it
    has_plain_head: bool = True  # whether `head` is the product with head_VD and nothing more
    path: str = "own"  # which code runs it: ours, or "transformers"
    num_forwards: int  # calls of `forward` so far; learning must not add any

    @abstractmethod
    def new_cache(self) -> C:
        """An empty cache of this model's shape."""

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
        """Runs `counts[i]` new tokens of request `slots[i]`, each behind what its slot already holds.

        Args:
            token_ids_N: int64, all requests' new tokens one after the other, sum(counts) of them.
            num_logits: How many last rows of each request need logits; all of them by default, 0 for none.

        Raises:
            ValueError: if the counts do not add up, num_logits asks for more rows than there are, or a slot comes
                twice or has no room left. Nothing is written then.
        """

    @abstractmethod
    def head(self, hidden_states_MD: Tensor) -> Tensor:
        """float32 logits of rows whose hidden states (after the final norm) are given. Not a forward."""


def check_call(num_tokens: int, slots: Sequence[int], counts: Sequence[int], num_logits: Sequence[int] | None) -> None:
    """Raises ValueError for a call of `forward` that does not add up."""
    if sum(counts) != num_tokens or min(counts, default=0) < 1:
        raise ValueError(f"counts {list(counts)} do not add up to {num_tokens} new tokens, at least 1 each")
    if len(set(slots)) < len(slots):
        raise ValueError(f"slots {list(slots)} name one twice; give all its new tokens at once")
    if num_logits is not None and any(not 0 <= n <= count for n, count in zip(num_logits, counts, strict=True)):
        raise ValueError(f"num_logits {list(num_logits)} must lie between 0 and the counts {list(counts)}")


def last_rows(hidden_ND: Tensor, counts: Sequence[int], num_logits: Sequence[int] | None) -> Tensor:
    """The rows of each request that logits are wanted of."""
    if num_logits is None or list(num_logits) == list(counts):
        return hidden_ND
    ends = accumulate(counts)
    return torch.cat([hidden_ND[end - wanted : end] for end, wanted in zip(ends, num_logits, strict=True)])
