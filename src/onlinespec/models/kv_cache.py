"""Keys and values of running requests: one preallocated block per slot, appended and cropped in place.

Axis letters: G key-value heads, C capacity in tokens, E head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

PAD = 32  # attention reads keys in multiples of this


class Slots(ABC):
    """Which slots are taken, and how many tokens each holds of how many it has room for."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.limits: dict[int, int] = {}  # most tokens of a slot, as asked for

    def take(self, slot: int, capacity: int) -> None:
        """Reserves room for `capacity` tokens under a slot number that is free."""
        if slot in self.lengths:
            raise ValueError(f"slot {slot} is taken; release it first")
        self.lengths[slot], self.limits[slot] = 0, capacity

    def release(self, slot: int) -> None:
        """Gives a slot's memory back."""
        del self.lengths[slot], self.limits[slot]

    @abstractmethod
    def capacity(self, slot: int) -> int:
        """Tokens the slot can hold."""

    def crop(self, slot: int, length: int) -> None:
        """Forgets everything from position `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"can't crop slot {slot} to {length}: it holds {self.lengths[slot]} tokens")
        self.lengths[slot] = length

    def check_room(self, slot: int, count: int) -> None:
        """Raises ValueError if `count` more tokens do not fit into the slot."""
        if self.lengths[slot] + count > self.capacity(slot):
            raise ValueError(
                f"slot {slot} holds {self.lengths[slot]} of {self.capacity(slot)} tokens; {count} more do not fit"
            )

    def extend(self, slot: int, count: int) -> None:
        """Counts `count` more tokens, whose keys and values the layers have written."""
        self.check_room(slot, count)
        self.lengths[slot] += count


class KVCache(Slots):
    """Blocks of [layers, 2, G, C, E], sized per request when its slot is taken.

    Memory of a slot in bytes: layers * 2 * G * C * E * element size. Rows beyond a slot's length are finite
    leftovers that attention masks; nothing needs clearing after `crop`.
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
        """Keys and values [layers, 2, G, C, E], to write into and to attend over."""
        return self._blocks[slot]
