"""The round: Feedback becomes a batch, the batch a gradient, the gradient new weights, between two steps.

Inline and deterministic: a round is due after so many committed tokens, how many depends on what rounds bring. The
target is never run; labels are rebuilt from the hidden states that verification left. A round that fails, for
whatever reason, freezes the drafter at its last good weights; decoding goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from onlinespec.config import LearnConfig
from onlinespec.core import DrafterWeights, Feedback, Params
from onlinespec.drafters.base import Drafter
from onlinespec.learners import Evaluation, Learner

log = logging.getLogger(__name__)


class Cadence:
    """How many steps lie between rounds: few while the loss falls or has jumped, more once it is flat.

    Steps and not tokens, because a step is what decoding time is made of: a drafter that is accepted often commits
    more tokens in it, has less to learn, and should not pay more for it.

    The judge is the served acceptance as well as the loss: acceptance costs nothing to watch, so a drift is seen
    before the next round is due.
    """

    _FALL, _JUMP = 0.04, 0.08  # relative changes that count as news; smaller ones are noise of small rounds
    _STRETCH = 1.5

    def __init__(self, min_interval: int, max_interval: int) -> None:
        self._min, self._max = min_interval, max_interval
        self.interval = float(min_interval)
        self._losses = _Averages(fast=0.8, slow=0.97)
        self._acceptance = _Averages(fast=0.9, slow=0.985)

    def observe_step(self, num_accepted: int, num_draft_tokens: int) -> None:
        """Hears of every step; a clear fall in acceptance brings the next round near."""
        if num_draft_tokens:
            self._acceptance.add(num_accepted / num_draft_tokens)
            if self._acceptance.slow - self._acceptance.fast > 0.2:
                self._restart()

    def observe_round(self, fresh_loss: float) -> None:
        """Hears of every round's loss before its update."""
        self._losses.add(fresh_loss)
        change = self._losses.fast / self._losses.slow - 1 if self._losses.slow > 0 else 0.0
        if change < -self._FALL or change > self._JUMP:
            self.interval = float(self._min)
        else:
            self.interval = min(float(self._max), self.interval * self._STRETCH)

    def _restart(self) -> None:
        self.interval = float(self._min)
        self._acceptance = _Averages(fast=0.9, slow=0.985)


class _Averages:
    """A fast and a slow moving average that start at the first value."""

    def __init__(self, fast: float, slow: float) -> None:
        self._decays = fast, slow
        self.fast = self.slow = math.nan

    def add(self, value: float) -> None:
        if math.isnan(self.slow):
            self.fast = self.slow = value
        self.fast, self.slow = (
            decay * old + (1 - decay) * value for decay, old in zip(self._decays, (self.fast, self.slow), strict=True)
        )


class RoundFailed(ArithmeticError):
    """A round whose numbers can't be used."""


class InlineLearning:
    """Learns in the decoding thread, between steps.

    `offer` takes the Feedback of every step; when a round is due it runs there and then and swaps the drafter's
    weights. Requests may be interleaved: each keeps its own consecutive rows.
    """

    def __init__(self, drafter: Drafter, learner: Learner, config: LearnConfig | None = None) -> None:
        self._drafter, self._learner = drafter, learner
        self.config = config or LearnConfig()
        self.cadence = Cadence(self.config.min_interval, self.config.max_interval)
        self._waiting: list[Feedback] = []
        self._state = learner.init(drafter.weights.params)
        self._last_good = drafter.weights  # the newest that scored a finite loss, or the start
        self.num_rounds = 0
        self.num_rows = 0  # trained so far
        self.last_loss = math.nan
        self.is_frozen = not drafter.is_trainable

    def offer(self, feedback: Sequence[Feedback]) -> None:
        """Takes the verified rows of a step. Never raises for what goes wrong inside a round."""
        if self.is_frozen:
            return
        for record in feedback:
            self._waiting.append(record)
            self.cadence.observe_step(record.num_rows - 1, record.num_draft_tokens)
        if len(self._waiting) >= self.cadence.interval:
            self._round_or_freeze()

    def _round_or_freeze(self) -> None:
        try:
            self._round()
        except Exception as error:  # the one broad except: a failing learner never hurts serving
            self.is_frozen = True
            if self._drafter.weights is not self._last_good:
                self._drafter.swap(self._last_good)
            log.error(
                "learning stopped in round %d (%s: %s); the drafter stays at weights version %d and serving goes on",
                self.num_rounds, type(error).__name__, error, self._last_good.version,
            )  # fmt: skip
        finally:
            self._waiting = []

    def _round(self) -> None:
        rows = newest_rows(self._waiting, self.config.max_rows)
        batch = self._drafter.batch(rows)
        if not batch:  # none of the rows can be learned from
            return
        before = self._learner.played(self._state)
        state = self._learner.update(lambda *candidates: self._evaluate(rows, batch, candidates), self._state)
        played = self._learner.played(state)
        self._last_good = self._drafter.weights
        if played is not before:  # a frozen learner has no rounds
            if not all(math.isfinite(p.sum()) for p in played.values()):  # a third of isfinite().all()'s time
                raise RoundFailed("the updated weights are not finite")
            self._drafter.swap(DrafterWeights(played, self._drafter.weights.version + 1))
            self.num_rounds += 1
        self._state = state

    def _evaluate(self, rows: Sequence[Feedback], batch: object, candidates: Sequence[Params]) -> list[Evaluation]:
        evaluations = [self._evaluate_one(params, batch) for params in candidates]
        self.last_loss = evaluations[0].fresh_loss
        self.num_rows += sum(record.num_rows for record in rows)
        self.cadence.observe_round(self.last_loss)
        return evaluations

    def _evaluate_one(self, params: Params, batch: object) -> Evaluation:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = self._drafter.loss(leaves, batch)
        if not math.isfinite(total := float(loss.total.detach())):
            raise RoundFailed(f"the loss is {total}")
        grads = torch.autograd.grad(loss.total, list(leaves.values()))
        return Evaluation(loss.fresh, total, dict(zip(leaves, grads, strict=True)))


def newest_rows(feedback: Sequence[Feedback], max_rows: int) -> list[Feedback]:
    """The newest records up to max_rows rows, at least one, each request's records side by side and in order."""
    kept: dict[int, list[Feedback]] = {}
    total = 0
    for record in reversed(feedback):
        if kept and total + record.num_rows > max_rows:
            break
        kept.setdefault(id(record.trace), []).append(record)
        total += record.num_rows
    return [record for records in reversed(kept.values()) for record in reversed(records)]
