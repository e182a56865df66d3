"""Sampling noise: a row of Gumbel noise over the target's vocabulary for every token position of a request.

The token at position p is the argmax of the processed scores plus the noise of p. This is the Gumbel-max trick, which
samples from the softmax of the scores. The noise is a function of (seed, choice, p) alone, so plain decoding and
speculative decoding commit the same token, for any batch, drafter and draft length. A drafter takes the argmax of its
own scores plus the same noise, which makes it likely to propose the token that the target will choose.

**Noise is per position.** If a step drafts positions 7 to 10 and the draft is rejected at 7, the next step drafts 8 to
10 again with the same rows, and the target also chooses its tokens there with the same rows.

**Noise is per request.** Two requests use the same noise if their seeds and choices are equal, otherwise not.

A row is stored as uniform numbers. These are converted to Gumbel noise where it is added to scores, and only for the
tokens that remain after top-k, top-p and min-p, or that are in the draft vocabulary.

Axis letters: B requests, N positions, S some tokens, V vocabulary.
Reference: Daliri et al., "Coupling without communication and drafter-invariant speculative decoding", arXiv:2408.07978;
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x64-10), numpy's implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STRIDE = 1 << 64  # counter values reserved per position, so that the rows of two positions can't overlap
_SMALLEST = 2.0**-54  # replaces 0, which has no logarithm: half the spacing of the uniform numbers
_CHUNK = 8192  # numbers generated per pass, so that they are still in the processor's cache when they are scaled


def uniforms(seed: int, choice: int, position: int, vocab_size: int) -> Tensor:
    """Returns uniform numbers in (0, 1) with 53 bits, float64 [V], as a function of seed, choice and position.

    A larger vocabulary only appends numbers. Seeds and choices that are equal modulo 2**64 give the same numbers.

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
    """Converts uniforms to standard Gumbel noise, -log(-log(u)). The argmax of scores + noise samples their softmax.

    >>> gumbel(torch.tensor([0.5], dtype=torch.float64))
    tensor([0.3665], dtype=torch.float64)
    """
    return uniforms.log().neg_().log_().neg_()


class Noise:
    """The uniform numbers of one request, one row per position. Rows are cached until their position is committed.

    Args:
        seed, choice: 64 bits each; `choice` is the index of this answer if several are sampled for one prompt.
        vocab_size: The target's vocabulary size, which is the length of a row.
        device: Where rows are used. They are computed on the host and copied.

    Raises:
        ValueError: if the device has no float64 (mps). In float32, numbers would repeat within a vocabulary.
    """

    def __init__(self, seed: int, choice: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        if torch.device(device).type == "mps":
            raise ValueError("device mps has no float64, which sampling needs; choose temperature 0, or --device cpu")
        self.key = _key(seed, choice)
        self._vocab_size, self._device = vocab_size, torch.device(device)
        self._rows: dict[int, Tensor] = {}

    def row(self, position: int) -> Tensor:
        """Returns the uniforms of one position, float64 [V]."""
        if position not in self._rows:
            row_V = _uniforms(self.key, position, self._vocab_size)
            self._rows[position] = row_V.to(self._device, non_blocking=True)
        return self._rows[position]

    def rows(self, first: int, count: int) -> Tensor:
        """Returns the uniforms of consecutive positions, float64 [count, V]."""
        return torch.stack([self.row(first + i) for i in range(count)])

    def forget_before(self, position: int) -> None:
        """Frees the rows of positions before this one, whose tokens are committed."""
        for at in [at for at in self._rows if at < position]:
            del self._rows[at]


class StepNoise:
    """The noise of a step, for drafters: the rows of the positions after each request's anchor.

    Args:
        requests: The noise of each request; None for a greedy request, whose noise is 0.
        positions: For each request, the position of the first token after the anchor (the last committed token).
    """

    def __init__(self, requests: Sequence[Noise | None], positions: Sequence[int]) -> None:
        self._requests, self._positions = list(requests), list(positions)

    def take(self, places: Sequence[int]) -> StepNoise:
        """Returns the noise of a subset of the requests, given by their indices in the step."""
        return StepNoise([self._requests[i] for i in places], [self._positions[i] for i in places])

    def at(self, depth: int, token_ids_S: Tensor | None = None) -> Tensor | None:
        """Returns Gumbel noise, float64 [B, V], for each request's token at a drafting depth.

        Args:
            depth: 0 is the first drafted token.
            token_ids_S: If given, only the columns of these tokens are returned, [B, S].

        Returns:
            None if all requests are greedy.
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
    """Returns the Gumbel noise of N past positions, float64 [N, V], to replay how their tokens were chosen.

    Args:
        places: (seed, choice, position) of each row.
    """
    rows = [gumbel(uniforms(*place, vocab_size)) for place in places]
    return torch.stack(rows) if rows else torch.empty(0, vocab_size, dtype=torch.float64)
