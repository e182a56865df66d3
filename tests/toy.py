"""A model whose every sequence has a known probability, so that "lossless" is a number.

Axis letters: B runs, M tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import settings
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.lossless.sampling import process_logits

steady = settings(deadline=None, derandomize=True)  # for @given: the same examples every time, however slow the machine

MIN_EXPECTED = 5.0  # chi-square wants at least this many expected draws in a cell; rarer cells are pooled


@dataclass(frozen=True)
class TableTarget:
    """A language model whose next-token row depends on the last token only.

    >>> TableTarget(vocab=5, seed=0).rows(SamplingParams(temperature=1.0)).sum(-1)
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """

    vocab: int
    seed: int
    spread: float = 1.5  # standard deviation of the logits

    @cached_property
    def logits(self) -> Tensor:
        """[V, V]; row i: what follows token i."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.spread * torch.randn(self.vocab, self.vocab, generator=generator)

    def rows(self, sampling: SamplingParams) -> Tensor:
        """The same rows as probabilities, under the given settings."""
        return process_logits(self.logits, sampling)


def enumerate_law(rows_VV: Tensor, first_token: int, length: int) -> Tensor:
    """The probability of each of the V**length continuations of `first_token`, in the order of `sequence_counts`.

    >>> enumerate_law(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), first_token=0, length=2).tolist()
    [0.25, 0.25, 0.125, 0.375]
    """
    rows_VV = rows_VV.double()
    law = torch.ones(1, dtype=torch.float64)
    last_ids = torch.tensor([first_token])
    for _ in range(length):
        law = (law[:, None] * rows_VV[last_ids]).flatten()
        last_ids = torch.arange(len(rows_VV)).repeat(len(last_ids))
    return law


def sequence_counts(token_ids_BM: Tensor, vocab: int) -> Tensor:
    """How often each sequence of M tokens came up; a sequence's place is its tokens read as a number in base V.

    >>> sequence_counts(torch.tensor([[0, 1], [1, 1], [1, 1]]), vocab=2).tolist()
    [0, 1, 0, 2]
    """
    length = token_ids_BM.shape[1]
    place_M = vocab ** torch.arange(length - 1, -1, -1)
    return (token_ids_BM * place_M).sum(-1).bincount(minlength=vocab**length)


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """How likely draws from `probs` are to be at least this far from it. An impossible draw makes it 0.

    >>> round(chi_square_p(torch.tensor([45, 55]), torch.tensor([0.5, 0.5])), 4)
    0.3173
    >>> chi_square_p(torch.tensor([1, 99]), torch.tensor([0.0, 1.0]))
    0.0
    """
    counts, expected = counts.double(), probs.double() * counts.sum()
    if counts[probs == 0].any():
        return 0.0
    counts, expected = _pool_rare(counts, expected)
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def _pool_rare(counts: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    is_rare = expected < MIN_EXPECTED
    pooled = [torch.cat([cells[~is_rare], cells[is_rare].sum()[None]]) for cells in (counts, expected)]
    if pooled[1][-1] >= MIN_EXPECTED:
        return pooled[0], pooled[1]
    return counts[~is_rare], expected[~is_rare]
