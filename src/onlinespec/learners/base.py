"""The learner contract: an initial state, an update rule, and the weights that play. Knows no drafters and no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]


class Evaluation(NamedTuple):
    """The losses and gradients of one set of weights in this round."""

    fresh_loss: float  # on this round's rows only, before the update; used for regret and Hedge
    total_loss: float  # on all rows that the gradient is of, replayed ones included
    grads: Params  # gradients of total_loss; empty if only losses were asked for
    domain: str = ""  # domain tag of the newest rows


class Evaluate(Protocol):
    """Evaluates sets of weights on this round's data, which is the same for all of them."""

    def __call__(self, *candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        """Returns losses and gradients of the candidates, then losses only of `scored`."""


class Learner(Protocol):
    """An online learner over named tensors. States are immutable: `update` returns a new one.

    A rule asks for gradients at the weights that played and nowhere else, so that an ensemble can evaluate all its
    experts at once and pass each its own evaluation.
    """

    needs_gradient: bool = True  # False for a learner that never moves

    @property
    def plays_ahead(self) -> bool:
        """Whether the weights that play are ahead of the learned ones, so that `settled` differs from `played`."""
        return False

    def init(self, params: Params) -> Any:
        """Returns the state before the first round, in which the given weights play."""

    def played(self, state: Any) -> Params:
        """Returns the weights to draft with."""

    def settled(self, state: Any) -> Params:
        """Returns the learned weights, without a look-ahead: the ones to save or publish."""
        return self.played(state)

    def update(self, evaluate: Evaluate, state: Any) -> Any:
        """Returns the state after one round."""

    @property
    def extra_work(self) -> float:
        """Cost of a round beyond its evaluations, in units of one evaluation with gradient; the budget counts it."""
        return 0.0

    def expect(self, domain: str, state: Any) -> Any:
        """Returns the state once the domain of the coming traffic is known. Most learners ignore it."""
        return state

    def undone(self, earlier: Any, state: Any) -> Any:
        """Returns the state to continue from when a round did harm: the earlier one, and what was learned of experts.

        Args:
            earlier: The state before the harmful round; its weights score better.
            state: The state after the update that followed it.
        """
        return earlier

    def report(self, state: Any) -> dict[str, Any]:
        """Returns facts about the last round for telemetry; computed only when asked for."""
        return {}
