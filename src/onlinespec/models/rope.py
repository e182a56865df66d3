"""Rotary position embeddings (RoPE), with the scalings that published models use.

A position's rotation must not depend on what else is in a forward pass, or else a rejected draft would change keys that
stay in the cache. So for scalings that depend on the text length (`dynamic`, `longrope`) we use the maximum number of
tokens of the request, which is known when its cache slot is taken. transformers uses the length so far, so it rotates
early and late positions of a long text differently, or recomputes the cache. For a whole text in one call both agree.

Axis letters: N positions, R pairs of rotated elements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_TABLES = 8  # tables that are kept, one per length; the oldest is dropped


def _any_length(capacity: int) -> int:
    return 0


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Args:
        theta: Base of the unscaled frequencies, theta ** (-2 i / rotary_dim) for pair i.
        share: Share of a head's elements that are rotated, the first ones.
        length_of: Maps a request's maximum number of tokens to the length that its scaling is computed for.
        scaled: Maps such a length to the frequencies [R] in radians per position, and to a factor of cosine and sine.
            None without scaling.
    """

    theta: float = 10_000.0
    share: float = 1.0
    length_of: Callable[[int], int] = _any_length
    scaled: Callable[[int], tuple[Tensor, float]] | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """Returns the number of elements of a head that are rotated."""
        return int(head_dim * self.share)

    def rotary(self, positions_N: Tensor, head_dim: int, length: int = 0) -> Tensor:
        """Returns rotations [N, R] as complex numbers, with the same rounding as transformers computes them."""
        frequencies_R, scale = self._frequencies(head_dim, length)
        angles_NR = positions_N[:, None].float() * frequencies_R.to(positions_N.device)
        return torch.polar(torch.full_like(angles_NR, scale), angles_NR)

    def _frequencies(self, head_dim: int, length: int) -> tuple[Tensor, float]:
        if self.scaled:
            return self.scaled(length)
        size = self.rotary_dim(head_dim)
        return 1.0 / self.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size), 1.0


class RotaryTables:
    """Tables of rotations for whole heads, computed up to twice the largest position used so far.

    Elements that are not rotated have rotation 1.
    """

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope, self._head_dim, self._device = rope, head_dim, device
        self._tables: OrderedDict[int, Tensor] = OrderedDict()  # by the length that the scaling is computed for

    def __call__(self, start: int, count: int, capacity: int) -> Tensor:
        """Returns rotations [count, head_dim / 2], complex64, of the positions from `start` on.

        Args:
            capacity: Maximum number of tokens of the request.
        """
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
