"""Estimates the memory of a drafter and its learning, before any weights are read.

The formulas are in `models/memory.py`; this file finds their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onlinespec.drafters.checkpoints import drafter_folder, read_format
from onlinespec.drafters.draft_vocab import draft_vocab_size
from onlinespec.drafters.loading import drafter_class
from onlinespec.learners import Evaluation, Learner, Params
from onlinespec.learning.learner_spec import learner_of
from onlinespec.learning.settings import LearnConfig
from onlinespec.models.base import ModelConfig
from onlinespec.models.linear import draft_linear_for
from onlinespec.models.memory import DrafterSize, Products, drafting_bytes, learning_bytes
from onlinespec.registry import DRAFTERS, SHIPPED_DRAFTERS

_ROUNDS = 4  # after so many rounds a learner's state has its full size, except for hints of further domains
_OF_A_ROUND = 2  # sets of weights beside a learner's state: the last good ones, and the reference for gains
_OF_PUBLISHING = 4  # the served weights, those before, the origin, and the candidate


@dataclass(frozen=True)
class MemoryBeside:
    """Estimates the memory of a command's drafter and learners. Call it with the target's shape.

    Args:
        drafter: Name, path or Hub id; None for plain decoding.
        learners: Settings of each learner, which has its own drafter. Those that never move are left out.
        apart: Where a server learns: "thread" or "process"; empty for inline.
        num_drafters: Number of drafters that draft: one for each run of a comparison.
    """

    drafter: str | None
    learners: Sequence[LearnConfig] = ()
    apart: str = ""
    num_drafters: int = 1

    def __call__(self, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
        """Returns the bytes beside a target of this shape."""
        size = self._size(shape)
        if size is None:
            return 0
        head_dtype = torch.float32 if size.own_head_width else dtype
        products = Products(
            layers=draft_linear_for(device, torch.float32),
            head=draft_linear_for(device, head_dtype),
            vocab_size=draft_vocab_size(shape.vocab_size),
        )
        total = self.num_drafters * drafting_bytes(size, shape, dtype, products)
        for config in self.learners:
            copies = copies_of(learner_of(config)) + _OF_A_ROUND + (_OF_PUBLISHING if self.apart else 0)
            total += learning_bytes(size, shape, dtype, products, copies, self.apart)
        return total

    def _size(self, shape: ModelConfig) -> DrafterSize | None:
        """The drafter's size; None if there is no drafter, or if it does not say."""
        name = self.drafter
        if name is None:
            return None
        is_fresh = name in DRAFTERS or (":" in name and not Path(name).exists())
        folder = None if is_fresh else SHIPPED_DRAFTERS.get(name) or drafter_folder(name, known=list(DRAFTERS))
        kind = drafter_class(read_format(folder) if folder else name)
        return kind.size(folder, shape)


def copies_of(learner: Learner) -> int:
    """Counts the sets of weights, gradients and moments that a learner holds in a round, the initial ones included.

    Found by running it for some rounds on a single number.

    >>> from onlinespec.learners import make_learner
    >>> copies_of(make_learner("frozen", 0.0))
    1
    """
    params, most_asked = {"weight": torch.zeros(1)}, 0

    def evaluate(*candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        nonlocal most_asked
        most_asked = max(most_asked, len(candidates))
        asked = [Evaluation(1.0, 1.0, {"weight": torch.ones(1)}) for _ in candidates]
        return asked + [Evaluation(1.0, 1.0, {}) for _ in scored]

    state = learner.init(params)
    for _ in range(_ROUNDS if learner.needs_gradient else 0):
        state = learner.update(evaluate, state)
    held = {id(tensor) for tensor in (*_tensors(state), *params.values())}
    return len(held) + most_asked


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, tuple | list):
        for value in state:
            yield from _tensors(value)
    elif is_dataclass(state):
        for field in fields(state):
            yield from _tensors(getattr(state, field.name))
