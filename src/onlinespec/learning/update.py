"""The learning round: Feedback becomes a training batch, then gradients, then new weights, between two steps.

It runs inline and is deterministic. The schedule decides when a round is due, the budget whether there is room for it.
The target's layers are never run: labels are its head applied to the hidden states from verification. If a round fails,
the drafter is frozen at its last good weights, and decoding continues.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from onlinespec.core import DrafterWeights, Feedback, Params
from onlinespec.drafters.contract import Drafter, Loss
from onlinespec.host import to_host
from onlinespec.learners import Evaluation, Learner
from onlinespec.learners.geometry import is_finite
from onlinespec.learners.losses import RowLoss
from onlinespec.learning.budget import Budget, StepMeter
from onlinespec.learning.finite import FiniteTexts
from onlinespec.learning.learner_spec import full_loss_of, learner_of
from onlinespec.learning.replay import ReplayBuffer
from onlinespec.learning.rounds import Round
from onlinespec.learning.schedule import UpdateSchedule
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.telemetry import Telemetry
from onlinespec.registry import LOSSES, resolve

log = logging.getLogger(__name__)


class RoundFailed(ArithmeticError):
    """A round with results that are not finite."""


class InlineLearning:
    """Learns in the decoding thread, between steps.

    `offer` takes the Feedback of every step. If a round is due, it runs at once and publishes its weights. Requests may
    be interleaved. The same Feedback and settings give the same weights; no clock is read.

    Args:
        learner: By default the one of the config.
        seed: Of the draws from replay memory.
        budget: By default one that counts work, with the costs of the config.
        on_failure: Called with the reason if learning stops; by default it is logged.
        publish: Called with weights to draft with from the next step on; by default `drafter.swap`.
    """

    def __init__(
        self,
        drafter: Drafter,
        learner: Learner | None = None,
        config: LearnConfig | None = None,
        seed: int = 0,
        budget: Budget | None = None,
        on_failure: Callable[[str], None] | None = None,
        publish: Callable[[DrafterWeights], None] | None = None,
    ) -> None:
        self.config = config or LearnConfig()
        self._publish, self.weights = publish or drafter.swap, drafter.weights
        self._drafter, self._learner = drafter, learner or learner_of(self.config, drafter.weights.params)
        self._row_loss: RowLoss = resolve(LOSSES, self.config.loss, "loss")
        self.schedule = UpdateSchedule(
            self.config.min_interval, self.config.max_interval, self.config.least_gain, full_loss_of(self.config)
        )
        meter = StepMeter(self.config.round_cost, self.config.row_cost, self.config.max_rows)
        self.budget = budget or Budget(self.config.budget, meter)
        self.replay = self._memory(seed) if self.config.replay_every else None
        self.finite = FiniteTexts()
        self._waiting: deque[Feedback] = deque(maxlen=self.config.max_rows)
        self._steps_waited = self._requests_waited = 0
        self._state = self._learner.init(drafter.weights.params)
        self._earlier: Any = None  # the learner's state before the last round; None if there is nothing to undo
        self._domain = ""
        self._last_good = drafter.weights  # the newest weights with a finite loss, or the initial ones
        self._anchor = drafter.weights.params  # the older weights that the schedule compares with
        self.num_rounds = 0
        self.num_undone = 0  # rounds that the next round undid
        self.num_rows = 0  # rows trained so far, replayed ones included
        self.last_loss = math.nan  # of the weights that played, before the last update; see `_Scores.cheap`
        self.is_frozen = not drafter.is_trainable
        self._on_failure = on_failure or self._say
        self.telemetry = Telemetry(drafter) if self.config.telemetry and not self.is_frozen else None

    def _memory(self, seed: int) -> ReplayBuffer:
        return ReplayBuffer(int(self.config.replay_megabytes * 1e6), seed, 60 * self.config.replay_minutes)

    @property
    def work(self) -> float:
        """Cost of learning so far, in the budget's unit: decoding steps with their drafts, if it counts work."""
        return self.budget.spent

    @property
    def diagnostic_seconds(self) -> float:
        """Seconds spent on telemetry so far, which are not counted as learning."""
        return self.telemetry.seconds if self.telemetry else 0.0

    num_published = 0  # there is no gate: the weights of every round are played

    def offer(self, feedback: Sequence[Feedback]) -> None:
        """Takes the Feedback of one step, and runs a round if one is due. An error in a round is never raised."""
        if self.is_frozen or not self._learner.needs_gradient:
            return
        if feedback:
            self.budget.observe_step([record.num_draft_tokens + 1 for record in feedback])
        feedback = self.finite.of(feedback)
        for record in feedback:
            self._waiting.append(record)
            self._steps_waited += 1
            self._requests_waited += record.is_last
            self.schedule.observe_step(record.num_accepted, record.num_draft_tokens, id(record.trace))
        if self.telemetry:
            self.telemetry.observe_steps(feedback, self.weights.params)
        if self._is_due:
            self._guarded(self._round)
            self._waiting.clear()
            self._steps_waited = self._requests_waited = 0
        if self.replay is not None:
            self._guarded(partial(self.replay.offer, feedback))
        if feedback and feedback[-1].domain != self._domain and not self.is_frozen:
            self._domain = feedback[-1].domain
            self._guarded(self._expect)

    def set_share(self, share: float) -> None:
        """Sets the share of decoding time that learning may take from now on."""
        self.budget.set_share(share)

    def measured(self) -> list[Round]:
        """Returns telemetry's entries: one per round, and one for the rows since the last; empty without telemetry."""
        return self.telemetry.with_rest(self.schedule.interval) if self.telemetry else []

    def report(self) -> dict[str, Any]:
        """Returns the learner's report, such as meta weights or hint errors."""
        return dict(self._learner.report(self._state))

    @property
    def state(self) -> Any:
        """The learner's state, for saving; `resume` takes it."""
        return self._state

    @property
    def settled(self) -> Params:
        """The learned weights, without the look-ahead of a learner such as `optimistic`."""
        return self._learner.settled(self._state)

    def resume(self, state: Any) -> None:
        """Continues from a saved learner state, whose weights play from now on."""
        self._play(state)
        self._earlier = None
        self._last_good, self._anchor = self.weights, self.weights.params

    def restart(self, params: Params) -> None:
        """Continues from other weights, with a new learner state. Replay memory is kept."""
        self._state, self._earlier = self._learner.init(params), None
        self._draft_with(DrafterWeights(params, self.weights.version + 1))
        self._last_good, self._anchor = self.weights, params
        self.schedule.restart()

    @property
    def _is_due(self) -> bool:
        if not self.budget.has_room():
            return False
        if self.config.requests_per_round:
            return self._requests_waited >= self.config.requests_per_round
        return self._steps_waited >= self.schedule.interval

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # deliberately broad: a failing learner must not affect serving
            self.is_frozen = True
            if self.weights is not self._last_good:
                self._draft_with(self._last_good)
            self._on_failure(f"in round {self.num_rounds}, {type(error).__name__}: {error}")

    def _draft_with(self, weights: DrafterWeights) -> None:
        self._publish(weights)
        self.weights = weights

    def _say(self, reason: str) -> None:
        log.error(
            "learning stopped (%s); the drafter stays at weights version %d and serving goes on",
            reason, self._last_good.version,
        )  # fmt: skip

    def _round(self) -> None:
        rows = newest_rows(self._waiting, self.config.max_rows)
        replayed = self._replayed()
        batch = self._drafter.batch(rows, replayed, rejected_only=self.config.rows == "rejected")
        if not batch:  # no row can be learned from
            return
        scores = _Scores(self._drafter, batch, self._row_loss, rows[-1].domain)
        before = self._learner.played(self._state)
        state = self._learner.update(self.telemetry.recording(scores) if self.telemetry else scores, self._state)
        played = scores.cheap(before)
        better = self._better_before(scores, played)
        num_rows = sum(record.num_rows for record in (*rows, *replayed))
        self.num_rows += num_rows
        self.last_loss = played.loss
        if better:
            self._undo(state)
        else:
            self._earlier = self._state
            if math.isfinite(played.loss):
                self._last_good = self.weights
        kept = self._learner.played(self._state)
        if math.isfinite(played.loss):
            self._pace(scores, kept, better or played, rows[-1])
        self.budget.spend(num_rows, scores.num_evaluations + self._learner.extra_work)
        if not better:
            self._play(state)
        self.num_rounds += 1
        if self.telemetry:
            self.telemetry.observe_round(
                batch,
                lambda: scores.fresh(before).loss,
                before,
                self.schedule.interval,
                lambda: self._learner.report(state),
                played.agreement,
                is_undoing=better is not None,
            )

    def _better_before(self, scores: _Scores, played: FreshScore) -> FreshScore | None:
        """The score of the weights before the last round on this round's rows, if they are better.

        They are evaluated only if the loss has jumped. After a drift they are as bad as the newer ones, which stay.
        """
        if self._earlier is None or not self.schedule.is_jump(played.loss):
            return None
        earlier = scores.fresh(self._learner.played(self._earlier))
        return earlier if earlier.loss < played.loss else None

    def _undo(self, state: Any) -> None:
        """Undoes the last round, and discards the update to `state`."""
        self._play(self._learner.undone(self._earlier, state))
        self._earlier, self._last_good = None, self.weights
        self.num_undone += 1

    def _replayed(self) -> list[Feedback]:
        if self.replay is None or self.num_rounds % self.config.replay_every:
            return []
        return self.replay.draw(self.config.max_rows)

    def _pace(self, scores: _Scores, kept: Params, score: FreshScore, newest: Feedback) -> None:
        """Passes the score of the weights that stay to the schedule, and every few rounds their gain."""
        if self.schedule.observe_round(score.loss, score.num_agreed, score.num_rows, id(newest.trace)):
            self._anchor = kept
        if self.schedule.wants_probe:
            self.schedule.observe_gain(scores.fresh(self._anchor).loss - scores.fresh(kept).loss)
            self._anchor = kept

    def _expect(self) -> None:
        self._play(self._learner.expect(self._domain, self._state))

    def _play(self, state: Any) -> None:
        """Switches to a learner state; the weights that play in it draft from the next step on."""
        played = self._learner.played(state)
        if played is not self._learner.played(self._state):
            if not is_finite(played):
                raise RoundFailed("the updated weights are not finite")
            self._draft_with(DrafterWeights(played, self.weights.version + 1))
        self._state = state


class FreshScore(NamedTuple):
    """The score of a set of weights on a round's fresh rows, at the first drafting depth."""

    loss: float
    num_agreed: float  # rows whose first draft would have been the committed token ...
    num_rows: int  # ... out of so many

    @property
    def agreement(self) -> float | None:
        return self.num_agreed / self.num_rows if self.num_rows else None


class _Scores:
    """Evaluates sets of weights on one round's batch. Losses without gradient are cached."""

    _SCORE_COST = 0.35  # relative to an evaluation with gradient and update: 9 of 30 ms on code (Intel)

    def __init__(self, drafter: Drafter, batch: Any, row_loss: RowLoss, domain: str) -> None:
        self._drafter, self._batch, self._row_loss, self._domain = drafter, batch, row_loss, domain
        self._known: list[tuple[Params, FreshScore]] = []
        self.num_evaluations = 0.0  # in units of evaluations with gradient

    def __call__(self, *candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        return [*self._with_gradients(candidates), *self._without(scored)]

    def fresh(self, params: Params) -> FreshScore:
        """Returns the score on the fresh rows; computed only if it is not cached."""
        for weights, score in self._known:
            if weights is params:
                return score
        self._without([params])
        return self._known[-1][1]

    def cheap(self, params: Params) -> FreshScore:
        """Returns the cached score, or else the mean of all cached ones: for an ensemble, those of its experts."""
        around = [score for _, score in self._known]
        is_known = any(weights is params for weights, _ in self._known)
        if is_known or not around or not all(math.isfinite(score.loss) for score in around):
            return self.fresh(params)
        loss, num_agreed = (statistics.fmean(values) for values in list(zip(*around, strict=True))[:2])
        return FreshScore(loss, num_agreed, around[0].num_rows)

    def _with_gradients(self, candidates: Sequence[Params]) -> list[Evaluation]:
        if not candidates:
            return []
        leaves = [{name: p.detach().requires_grad_() for name, p in params.items()} for params in candidates]
        losses = self._drafter.losses(leaves, self._batch, self._row_loss)
        tensors = [p for params in leaves for p in params.values()]
        grads = iter(torch.autograd.grad(torch.stack([loss.total for loss in losses]).sum(), tensors))
        self.num_evaluations += len(candidates)
        return [
            self._evaluation(params, loss, {name: next(grads) for name in params})
            for params, loss in zip(candidates, losses, strict=True)
        ]

    @torch.no_grad()
    def _without(self, scored: Sequence[Params]) -> list[Evaluation]:
        if not scored:
            return []
        losses = self._drafter.losses(scored, self._batch, self._row_loss)
        self.num_evaluations += self._SCORE_COST * len(scored)
        return [self._evaluation(params, loss, {}) for params, loss in zip(scored, losses, strict=True)]

    def _evaluation(self, params: Params, loss: Loss, grads: Params) -> Evaluation:
        (total,) = to_host(loss.total.detach())
        fresh = loss.fresh if math.isfinite(total) else math.nan
        self._known.append((params, FreshScore(fresh, loss.num_agreed, loss.num_fresh)))
        return Evaluation(fresh, total, grads, self._domain)


def newest_rows(feedback: Sequence[Feedback], max_rows: int) -> list[Feedback]:
    """Returns the newest records with up to max_rows rows, at least one record, grouped by request and in order."""
    kept: dict[int, list[Feedback]] = {}
    total = 0
    for record in reversed(feedback):
        if kept and total + record.num_rows > max_rows:
            break
        kept.setdefault(id(record.trace), []).append(record)
        total += record.num_rows
    return [record for records in reversed(kept.values()) for record in reversed(records)]
