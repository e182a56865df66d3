"""What every learner does: a start, a rule, and the weights that play. Knows nothing of drafters or text."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]


class Evaluation(NamedTuple):
    """What one set of weights scores in this round."""

    fresh_loss: float  # on this round's feedback alone, before the update: what regret is counted in
    total_loss: float  # on everything the gradient is of (replay included)
    grads: Params


class Evaluate(Protocol):
    """Scores sets of weights on this round's data; the data is the same for all of them."""

    def __call__(self, *candidates: Params) -> list[Evaluation]: ...


class Learner(Protocol):
    """An online learner over named float32 tensors. States are values: `update` returns a new one."""

    def init(self, params: Params) -> Any:
        """The state before the first round; plays the given weights."""

    def played(self, state: Any) -> Params:
        """The weights to draft with."""

    def update(self, evaluate: Evaluate, state: Any) -> Any:
        """The state after one round."""
