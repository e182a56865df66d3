"""A request's random numbers: every token position owns a row of Gumbel noise over the target's vocabulary.

The token at position p is the argmax of the processed scores plus the noise of p (the Gumbel-max trick), which draws
from their softmax. The noise is a function of (seed, choice, p) alone, so plain decoding and speculation, alone or in
a batch, with any drafter and at any draft length, commit the same token: nothing that is drafted, learned or chosen
can change a draw. A drafter takes the argmax of its own scores plus the same noise, and so often names the same token.

**Positions are used again.** A step may draft positions 7 to 10 and be refused at 7; the next step drafts 8 to 10 anew
with the same rows, and the target's own choice there has not changed either.

**Requests have seeds of their own.** While a drafter learns, its weights depend on what earlier requests drew. That
never shows in the text; but two requests that share a seed and a choice draw the same numbers at the same positions.

A row is kept as the uniforms that it comes from, and becomes noise where it is added: for the few tokens that survive
the cuts of a request's settings, or those that a drafter chooses from, and not for the whole vocabulary.

Axis letters: B requests, N positions, S some tokens, V vocabulary.
Reference: Daliri et al., "Coupling without communication and drafter-invariant speculative decoding", arXiv:2408.07978;
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x64-10), as numpy has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STRIDE = 1 << 64  # of the counter from one position to the next: no row of words can reach the next one's
_SMALLEST = 2.0**-54  # in place of 0, whose logarithm has no value: half the step between two uniforms
_CHUNK = 8192  # numbers made at once, so that they are still in the processor's cache when they are scaled


def uniforms(seed: int, choice: int, position: int, vocab_size: int) -> Tensor:
    """Numbers of 53 bits between 0 and 1, neither included, float64 [V]: a function of seed, choice and position.

    A longer row begins with the same numbers. Seeds and choices that are equal modulo 2**64 share a stream.

    >>> torch.equal(uniforms(1, 0, 7, vocab_size=5), uniforms(1, 0, 7, vocab_size=9)[:5])
    True
    """
    return _uniforms(_key(seed, choice), position, vocab_size)


def _key(seed: int, choice: int) -> int:
    return seed % 2**64 + (choice % 2**64 << 64)


def _uniforms(key: int, position: int, vocab_size: int) -> Tensor:
    stream = np.random.Philox(key=key, counter=position * _STRIDE)
    row_V = np.empty(vocab_size)
    for first in range(0, vocab_size, _CHUNK):
        part = row_V[first : first + _CHUNK]
        np.multiply(stream.random_raw(len(part)) >> np.uint64(11), 2.0**-53, out=part)
        np.maximum(part, _SMALLEST, out=part)
    return torch.from_numpy(row_V)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms, element by element: the argmax of scores + noise is a draw of their softmax.

    >>> gumbel(torch.tensor([0.5], dtype=torch.float64))
    tensor([0.3665], dtype=torch.float64)
    """
    return uniforms.log().neg_().log_().neg_()


class Noise:
    """The random numbers of one request, a row a position; made once and kept until the position is committed.

    Args:
        seed, choice: 64 bits each; `choice` counts the answers that one seeded request asked for.
        vocab_size: Of the target: the length of a row.
        device: Where rows are used. They are made on the host.

    Raises:
        ValueError: if the device has no float64, which noise needs: float32 would repeat itself within a vocabulary.
    """

    def __init__(self, seed: int, choice: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        if torch.device(device).type == "mps":
            raise ValueError("device mps has no float64, which sampling needs; choose temperature 0, or --device cpu")
        self.key = _key(seed, choice)
        self._vocab_size, self._device = vocab_size, torch.device(device)
        self._rows: dict[int, Tensor] = {}

    def row(self, position: int) -> Tensor:
        """The uniforms of a position's token, float64 [V]."""
        if position not in self._rows:
            row_V = _uniforms(self.key, position, self._vocab_size)
            self._rows[position] = row_V.to(self._device, non_blocking=True)
        return self._rows[position]

    def rows(self, first: int, count: int) -> Tensor:
        """The uniforms of consecutive positions, float64 [count, V]."""
        return torch.stack([self.row(first + i) for i in range(count)])

    def forget_before(self, position: int) -> None:
        """Drops the rows of positions before this one: their tokens are committed."""
        for at in [at for at in self._rows if at < position]:
            del self._rows[at]


class StepNoise:
    """What a drafter sees of the random numbers of a step: those of the positions behind each request's anchor.

    Args:
        requests: Each request's numbers; None for a greedy one, whose noise is 0.
        positions: Of the first token behind each request's anchor.
    """

    def __init__(self, requests: Sequence[Noise | None], positions: Sequence[int]) -> None:
        self._requests, self._positions = list(requests), list(positions)

    def take(self, places: Sequence[int]) -> StepNoise:
        """The same for some of the requests, by their places in the step."""
        return StepNoise([self._requests[i] for i in places], [self._positions[i] for i in places])

    def at(self, depth: int, token_ids_S: Tensor | None = None) -> Tensor | None:
        """Gumbel noise [B, V], or [B, S] of some tokens, for each request's token at a drafting depth, 0 the first.

        None where all requests are greedy. Float64.
        """
        if not any(self._requests):
            return None
        rows = [
            noise.row(position + depth) if noise else None
            for noise, position in zip(self._requests, self._positions, strict=True)
        ]
        rows = [row if row is None or token_ids_S is None else row[token_ids_S] for row in rows]
        zeros = torch.zeros_like(next(row for row in rows if row is not None))
        return torch.stack([zeros if row is None else gumbel(row) for row in rows])


def gumbel_rows(places: Sequence[tuple[int, int, int]], vocab_size: int) -> Tensor:
    """The noise of any positions, float64 [N, V], to replay what was drawn; each place is (seed, choice, position)."""
    rows = [gumbel(uniforms(*place, vocab_size)) for place in places]
    return torch.stack(rows) if rows else torch.empty(0, vocab_size, dtype=torch.float64)
