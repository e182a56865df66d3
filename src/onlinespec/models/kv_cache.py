"""The KV cache: one preallocated block per slot, which is appended to and cropped in place.

Axis letters: G key-value heads, C capacity in tokens, E head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

PAD = 32  # the number of keys in an attention call is a multiple of this; see `layer.make_plan`


class Slots(ABC):
    """Bookkeeping of a cache's slots: which are taken, how many tokens each holds, and how many it has room for."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.limits: dict[int, int] = {}  # by slot, the `capacity` that was asked for in `take`

    def take(self, slot: int, capacity: int) -> None:
        """Reserves room for `capacity` tokens under a free slot number.

        Raises:
            ValueError: if the slot is taken.
        """
        if slot in self.lengths:
            raise ValueError(f"slot {slot} is taken; release it first")
        self.lengths[slot], self.limits[slot] = 0, capacity

    def release(self, slot: int) -> None:
        """Frees a slot's memory."""
        del self.lengths[slot], self.limits[slot]

    @abstractmethod
    def capacity(self, slot: int) -> int:
        """Returns the number of tokens that a slot has room for, which may be more than was asked for."""

    def crop(self, slot: int, length: int) -> None:
        """Drops everything from position `length` on.

        Raises:
            ValueError: if the slot holds fewer than `length` tokens.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"can't crop slot {slot} to {length}: it holds {self.lengths[slot]} tokens")
        self.lengths[slot] = length

    def check_room(self, slot: int, count: int) -> None:
        """Checks that `count` more tokens fit into a slot.

        Raises:
            ValueError: if they do not.
        """
        if self.lengths[slot] + count > self.capacity(slot):
            raise ValueError(
                f"slot {slot} holds {self.lengths[slot]} of {self.capacity(slot)} tokens; {count} more do not fit"
            )

    def extend(self, slot: int, count: int) -> None:
        """Adds `count` tokens to a slot's length, after the layers have written their keys and values.

        Raises:
            ValueError: if they do not fit.
        """
        self.check_room(slot, count)
        self.lengths[slot] += count


class KVCache(Slots):
    """The keys and values of all layers: a block [layers, 2, G, C, E] for each slot, allocated by `take`.

    C is the slot's capacity, rounded up to a multiple of PAD, and the block has layers * 2 * G * C * E * element size
    bytes. Rows beyond a slot's length hold old, finite values that attention masks, so `crop` clears nothing.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._shape = (num_layers, 2, num_kv_heads)
        self._head_dim = head_dim
        self._options = {"device": device, "dtype": dtype}
        self.bytes_per_token = num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize
        self._blocks: dict[int, Tensor] = {}

    def take(self, slot: int, capacity: int) -> None:
        padded = -(-capacity // PAD) * PAD
        block = torch.zeros(*self._shape, padded, self._head_dim, **self._options)  # type: ignore[call-overload]
        super().take(slot, capacity)
        self._blocks[slot] = block

    def release(self, slot: int) -> None:
        super().release(slot)
        del self._blocks[slot]

    def capacity(self, slot: int) -> int:
        return self._blocks[slot].shape[3]

    def block(self, slot: int) -> Tensor:
        """Returns a slot's keys and values, [layers, 2, G, C, E]."""
        return self._blocks[slot]
