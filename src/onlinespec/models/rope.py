"""Rotary positions: how far a query or key turns at each position, and the scalings that published models have.

A position turns the same way whatever else is in a forward, or drafts that are cropped would leave traces. Where a
scaling depends on how long a text is (`dynamic`, `longrope`), what counts is the most tokens that the request can come
to have, known when its cache is taken. transformers looks at the text so far instead, and so turns a long text's
first positions one way and its later ones another, or computes the cache anew; both agree on whole texts.

Axis letters: N positions, R pairs of elements that turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_TABLES = 8


def _any_length(capacity: int) -> int:
    return 0


@dataclass(frozen=True)
class Rope:
    """A model's rotary positions.

    Args:
        theta: Base of the frequencies, theta ** (-2 i / rotary_dim) for pair i, where nothing scales them.
        share: Of a head's elements, those that turn; they come first.
        length_of: From a request's most tokens to the length that decides on its scaling.
        scaled: For such a length, the frequencies [R] in radians per position, and what cosine and sine are multiplied
            by; None where nothing is scaled.
    """

    theta: float = 10_000.0
    share: float = 1.0
    length_of: Callable[[int], int] = _any_length
    scaled: Callable[[int], tuple[Tensor, float]] | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that turn."""
        return int(head_dim * self.share)

    def rotary(self, positions_N: Tensor, head_dim: int, length: int = 0) -> Tensor:
        """Rotations [N, R] as complex numbers, computed in the order in which transformers does, for its roundings."""
        frequencies_R, scale = self._frequencies(head_dim, length)
        angles_NR = positions_N[:, None].float() * frequencies_R.to(positions_N.device)
        return torch.polar(torch.full_like(angles_NR, scale), angles_NR)

    def _frequencies(self, head_dim: int, length: int) -> tuple[Tensor, float]:
        if self.scaled:
            return self.scaled(length)
        size = self.rotary_dim(head_dim)
        return 1.0 / self.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size), 1.0


class RotaryTables:
    """Rotations by position for whole heads, computed once up to the longest position seen; elements that do not turn
    are turned by nothing."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope, self._head_dim, self._device = rope, head_dim, device
        self._tables: OrderedDict[int, Tensor] = OrderedDict()  # by the length that decides on the scaling

    def __call__(self, start: int, count: int, capacity: int) -> Tensor:
        """Rotations [count, head_dim / 2] from a position on, of a request that can come to have `capacity` tokens."""
        length = self._rope.length_of(capacity)
        table_SR = self._tables.get(length)
        if table_SR is None or start + count > len(table_SR):
            table_SR = self._tables[length] = self._computed(max(256, 2 * (start + count)), length)
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        return table_SR[start : start + count]

    def _computed(self, count: int, length: int) -> Tensor:
        rotary_SR = self._rope.rotary(torch.arange(count, device=self._device), self._head_dim, length)
        still = rotary_SR.new_ones(count, self._head_dim // 2 - rotary_SR.shape[1])
        return torch.cat([rotary_SR, still], dim=1)
