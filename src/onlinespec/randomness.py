"""A request's random numbers: one counter stream per seed, three uniforms per token position.

A position owns its numbers, whichever step comes to use them, so `propose` and `verify` are pure functions and a
request's tokens do not depend on what is batched beside it.

**Positions are used again.** A step may draft positions 7 to 10 and be refused at 7; the next step drafts 8 to 10 anew,
with the same uniforms. That keeps the target's law: a position's numbers decide only what is committed at that
position. The drafts that read them before were discarded, and the numbers that refused position 7 were its own, so
given all that is committed so far they are still uniform and independent.

It follows that nothing of a discarded draft may reach a later step: not the weights (`Feedback` ends with the row
that refused), not the drafter's cache (it is cropped), not the next `num_draft_tokens`.

**Requests have seeds of their own.** While a drafter learns, its weights depend on what earlier requests drew; a
request that draws the same numbers at the same positions is then not independent of the weights that draft for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DRAFT, ACCEPT, LAST = range(3)  # columns: draws the drafted token, judges it, draws the recovered or bonus token

_WORDS_PER_COUNTER = 4  # 64-bit words Philox makes for each value of its counter


def uniforms(seed: int, position: int, count: int) -> Tensor:
    """Numbers in [0, 1) for the tokens at `position` and the `count - 1` after it, float64, a row each.

    A pure function of the seed and each row's absolute position in the request. Seeds that are equal modulo 2**128
    share a stream.

    >>> uniforms(seed=1, position=7, count=2).shape
    torch.Size([2, 3])
    >>> torch.equal(uniforms(1, 5, 4)[2:], uniforms(1, 7, 2))
    True

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x64-10), as numpy has it.
    """
    stream = np.random.Philox(key=seed % 2**128, counter=position)
    words = stream.random_raw(count * _WORDS_PER_COUNTER).reshape(count, _WORDS_PER_COUNTER)
    return torch.from_numpy((words[:, :3] >> 11) * 2.0**-53)
