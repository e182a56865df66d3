"""Telemetry: measures what learning did. Losses against the initial weights, movement, gradients, the learner's report.

It evaluates two sets of weights on everything that is served, so it is off by default, and its time is not counted as
learning.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from onlinespec.core import Feedback, Params
from onlinespec.drafters.contract import Drafter
from onlinespec.learners import Evaluate, Evaluation
from onlinespec.learners.geometry import cosine, squared_distance, squared_norm
from onlinespec.learners.losses import TargetRows, cross_entropy, kl, total_variation
from onlinespec.learning.bounds import acceptance_length_at, coupled_distance, distance_bound, greedy_distance_bound
from onlinespec.learning.rounds import Round

log = logging.getLogger(__name__)

_WINDOW = 16  # rounds over which movement of weights and outputs is measured


_AT_ONCE = 64  # rows that are measured together; each needs two rows of logits


@dataclass
class _Sums:
    """Sums of measurements since the last round."""

    num_rows: int = 0
    num_steps: int = 0
    by_row: dict[str, float] = field(default_factory=dict)  # weighted by rows
    bound: float = 0.0  # weighted by steps

    def add(self, means: dict[str, float], num_rows: int, bound: float, num_steps: int) -> None:
        """Adds means over some rows, and the bound on acceptance length over some steps."""
        self.by_row = {name: self.by_row.get(name, 0.0) + value * num_rows for name, value in means.items()}
        self.bound += bound * num_steps
        self.num_rows += num_rows
        self.num_steps += num_steps

    @property
    def means(self) -> dict[str, Any]:
        return {
            **{name: value / self.num_rows for name, value in self.by_row.items()},
            "acceptance_length_bound": self.bound / self.num_steps,
        }


class Telemetry:
    """Measures one run of learning; `rounds` gets one entry per round.

    Every served row is measured once, with the weights that drafted it, so that learners with different numbers of
    rounds and rows can be compared.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._start = drafter.weights.params
        self._num_steps = self._num_requests = self._num_draft_tokens = 0
        self._domain = ""
        self._waiting: list[Feedback] = []  # records that are not measured yet ...
        self._played = self._start  # ... and the weights that drafted them
        self._since = _Sums()  # of rows served since the last round
        self._num_lost = 0  # rows of rounds without finite losses, which the next round includes
        self._grads: list[Params] = []  # gradients that the learner asked for in this round
        self._descended: Params | None = None  # their mean direction in the last round
        self._probe: Any = None  # the first round's batch, on which movement of outputs is measured
        self._then: tuple[Params, Tensor] | None = None  # weights, and probabilities on the probe, 16 rounds ago
        self._has_failed = False
        self.rounds: list[Round] = []
        self.seconds = 0.0

    def observe_steps(self, feedback: Sequence[Feedback], played: Params) -> None:
        """Takes the records of a step and the weights that drafted it. Never raises."""
        if self._played is not played:
            self._measure()
            self._played = played
        for record in feedback:
            self._num_steps += 1
            self._num_requests += record.is_last
            self._num_draft_tokens = max(self._num_draft_tokens, record.num_draft_tokens)
            self._domain = record.domain
            self._waiting.append(record)
        if sum(record.num_rows for record in self._waiting) >= _AT_ONCE:
            self._measure()

    def recording(self, evaluate: Evaluate) -> Evaluate:
        """Wraps `evaluate` for a round, to keep the gradients that the learner asks for until the round is measured."""
        self._grads = []

        def recorded(*candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
            evaluations = evaluate(*candidates, scored=scored)
            if not self._has_failed:
                self._grads += [evaluation.grads for evaluation in evaluations[: len(candidates)]]
            return evaluations

        return recorded

    def observe_round(
        self,
        batch: Any,
        loss: Callable[[], float],
        played: Params,
        interval: float,
        report: Callable[[], dict[str, Any]],
        agreement: float | None = None,
        is_undoing: bool = False,
    ) -> None:
        """Measures a round that has just ended, at the weights that played before it.

        Never raises: an error is logged once and ends telemetry, and learning continues. A round without finite losses
        is left out.

        Args:
            batch: The round's training batch.
            loss: Computes the training loss on the fresh rows.
            played: The weights that played before the update.
            interval: Steps to the next round.
            report: Returns the learner's report.
            agreement: Share of fresh rows whose first draft would have been the committed token.
            is_undoing: Whether this round undid the one before.
        """
        self._measure()
        with self._guarded():
            ended = self._ended(played, interval, loss())
            if ended and _is_finite(ended):
                measured = self._with_movement(ended, batch, played, report())
                self.rounds.append(replace(measured, agreement=agreement, is_undoing=is_undoing))
                self._num_lost = 0
            else:
                self._num_lost += self._since.num_rows
            self._since = _Sums()

    def with_rest(self, interval: float) -> list[Round]:
        """Returns the rounds so far, and one more entry for the rows served since the last update.

        Without it, a learner with rare rounds would be compared on a shorter part of the stream.
        """
        rest = None
        self._measure()
        with self._guarded():
            rest = self._ended(self._played, interval, loss=None)
        return [*self.rounds, rest] if rest and _is_finite(rest) else list(self.rounds)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Times the block. An exception in it ends telemetry, and nothing else."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._has_failed = True
            log.error("telemetry stopped in round %d (%s: %s)", len(self.rounds), type(error).__name__, error)
        finally:
            self.seconds += time.perf_counter() - began

    def _measure(self) -> None:
        """Measures the waiting records with the weights that drafted them."""
        records, self._waiting = self._waiting, []
        if records and not self._has_failed:
            with self._guarded(), torch.no_grad():
                self._add(records)

    def _add(self, records: Sequence[Feedback]) -> None:
        batch = self._drafter.batch(records)
        if not batch:  # no row can be measured
            return
        depths = self._drafter.rows([self._played, self._start], batch, max(1, self._num_draft_tokens))
        logits, target = depths[0]
        (kl_now, kl_start), (tv_now, tv_start) = (of(logits, target).mean(-1).tolist() for of in (kl, total_variation))
        means = {
            "kl": kl_now,
            "token_loss": float(cross_entropy(logits[0], target).mean()),
            "acceptance_prob": 1 - tv_now,
            "frozen_kl": kl_start,
            "frozen_acceptance_prob": 1 - tv_start,
        }
        self._since.add(means, len(target.token_ids_N), self._bound(depths), len(records))

    def _ended(self, played: Params, interval: float, loss: float | None) -> Round | None:
        """An entry for the rows served since the last round; None if there are none, or telemetry has failed."""
        since = self._since
        if self._has_failed or not since.num_rows:
            return None
        return Round(
            step=self._num_steps,
            request=self._num_requests,
            data=self._domain,
            interval=interval,
            loss=loss,
            **since.means,
            distance=math.sqrt(squared_distance(played, self._start)),
            num_rows=since.num_rows + self._num_lost,
            is_update=loss is not None,
        )

    @torch.no_grad()
    def _with_movement(self, measured: Round, batch: Any, played: Params, report: dict[str, Any]) -> Round:
        """Adds what only an update has: its gradient, the movement, the learner's report."""
        moved, function_moved = self._moved(batch, played)
        descended, before = _mean_direction(self._grads), self._descended
        self._grads, self._descended = [], descended
        return replace(
            measured,
            gradient_cosine=cosine(descended, before) if descended and before else None,
            moved=moved,
            function_moved=function_moved,
            learner=report,
        )

    def _bound(self, depths: Sequence[tuple[Tensor, TargetRows]]) -> float:
        """The guaranteed acceptance length, with the worst depth's distance for all depths. It ignores tokens outside
        the draft vocabulary."""
        distances = [_distance(logits[0], target) for logits, target in depths]
        return acceptance_length_at(max(distances), self._num_draft_tokens)

    def _moved(self, batch: Any, played: Params) -> tuple[float | None, float | None]:
        """Movement of weights and outputs over the last _WINDOW rounds; measured once per window."""
        if self._probe is None:
            self._probe = batch
        if len(self.rounds) % _WINDOW:
            return None, None
        ((logits, _),) = self._drafter.rows([played], self._probe)
        probs_NV, then = logits[0].softmax(-1), self._then
        self._then = played, probs_NV
        if then is None:
            return None, None
        moved = math.sqrt(squared_distance(played, then[0]))
        return moved, float((probs_NV - then[1]).abs().sum(-1).mean() / 2)


def _mean_direction(gradients: Sequence[Params]) -> Params | None:
    """The sum of the gradients, each scaled to length 1, so that a diverging expert does not dominate. Gradients that
    are zero or not finite are left out; None if none is left."""
    units = []
    for grads in gradients:
        size = math.sqrt(squared_norm(grads))
        if 0 < size < math.inf:
            units.append({name: g.float() / size for name, g in grads.items()})
    return {name: torch.stack([unit[name] for unit in units]).sum(0) for name in units[0]} if units else None


def _is_finite(measured: Round) -> bool:
    """Whether all measurements are finite; the mean of an ensemble can diverge while its experts do not."""
    values = (measured.kl, measured.token_loss, measured.acceptance_prob, measured.distance, measured.loss or 0.0)
    return all(map(math.isfinite, values))


def _distance(logits_NV: Tensor, target: TargetRows) -> float:
    """The maximum share of drafts that are rejected, by the bounds on losses."""
    is_greedy_N = target.temperatures_N == 0
    bounds = []
    if is_greedy_N.any():
        losses = cross_entropy(logits_NV, target)[is_greedy_N]
        bounds.append((greedy_distance_bound(float(losses.mean())), len(losses)))
    if not is_greedy_N.all():
        temperatures = target.temperatures_N[~is_greedy_N][:, None]
        probs_NV = (target.probs_NV[~is_greedy_N].log() / temperatures).softmax(-1)
        sampled = TargetRows(probs_NV, target.token_ids_N[~is_greedy_N], temperatures[:, 0])
        losses = kl(logits_NV[~is_greedy_N] / temperatures, sampled)
        bounds.append((coupled_distance(distance_bound(float(losses.mean()))), len(losses)))
    return sum(bound * count for bound, count in bounds) / sum(count for _, count in bounds)
