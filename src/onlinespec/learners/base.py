"""What every learner does: a start, a rule, and the weights that play. Knows nothing of drafters or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]


class Evaluation(NamedTuple):
    """What one set of weights scores in this round."""

    fresh_loss: float  # on this round's feedback alone, before the update: what regret is counted in
    total_loss: float  # on everything the gradient is of (replay included)
    grads: Params  # empty where only the losses were asked for
    domain: str = ""  # whose traffic the newest rows are


class Evaluate(Protocol):
    """Scores sets of weights on this round's data; the data is the same for all of them."""

    def __call__(self, *candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        """Losses and gradients of the candidates, then the losses alone of `scored`."""


class Learner(Protocol):
    """An online learner over named tensors. States are values: `update` returns a new one.

    A rule asks for gradients at the weights that played and nowhere else, so that learners can be put together:
    an ensemble evaluates its experts at once and hands each its own.
    """

    needs_gradient: bool = True  # False for what is only ever scored

    @property
    def plays_ahead(self) -> bool:
        """Whether what plays is a step ahead of what was learned, so that `settled` is other weights."""
        return False

    def init(self, params: Params) -> Any:
        """The state before the first round; plays the given weights."""

    def played(self, state: Any) -> Params:
        """The weights to draft with."""

    def settled(self, state: Any) -> Params:
        """What was learned so far: the weights to keep."""
        return self.played(state)

    def update(self, evaluate: Evaluate, state: Any) -> Any:
        """The state after one round."""

    @property
    def extra_work(self) -> float:
        """What a round costs beside the evaluations asked for, in evaluations with gradient; the budget counts it."""
        return 0.0

    def expect(self, domain: str, state: Any) -> Any:
        """The state once it is known whose traffic comes next; most learners don't mind."""
        return state

    def undone(self, earlier: Any, state: Any) -> Any:
        """The state to go on with where a round's weights did harm: the one before it, and what else was found out.

        Args:
            earlier: Before the round that did harm, whose played weights score better.
            state: After the update that would have followed.
        """
        return earlier

    def report(self, state: Any) -> dict[str, Any]:
        """What telemetry may want to know of the last round; computed when asked for, and only then."""
        return {}
