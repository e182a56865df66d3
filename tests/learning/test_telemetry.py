"""What `Telemetry` adds to what the learner, the drafter and the round tell it."""

import math
from types import SimpleNamespace

import pytest
import torch

from onlinespec.core import Features, Feedback, Trace
from onlinespec.learners import Evaluation
from onlinespec.learners.losses import TargetRows
from onlinespec.learning.telemetry import Telemetry

TRACE = Trace([], Features(torch.empty(0, 0)))
START = {"a": torch.zeros(2), "b": torch.zeros(1)}


class Drafter:
    """Of two tokens: its logits are its weights, and the target finds both tokens as likely."""

    def __init__(self):
        self.weights = SimpleNamespace(params=START)
        self.measured = []  # rows, and the weights they were measured with

    def batch(self, records):
        return list(records)

    def rows(self, candidates, batch, num_depths=1):
        num_rows = sum(record.num_rows for record in batch) if batch != "batch" else 1
        self.measured.append((num_rows, candidates[0]))
        target = TargetRows(torch.full((num_rows, 2), 0.5), torch.zeros(num_rows, dtype=int), torch.ones(num_rows))
        return [(torch.stack([params["a"] for params in candidates])[:, None].expand(-1, num_rows, -1), target)] * (
            num_depths
        )


def steps(*num_rows, domain=""):
    return [
        Feedback(TRACE, 0, rows, num_draft_tokens=2, num_accepted=rows - 1, weights_version=0, domain=domain)
        for rows in num_rows
    ]


def weights(*a):
    return {"a": torch.tensor(a), "b": torch.zeros(1)}


def finish_round(telemetry, played=START, loss=1.0):
    telemetry.observe_round("batch", lambda: loss, played, 16.0, dict)


def after_gradients(telemetry, *grads, scored=()):
    """A round in which a learner asked for these gradients."""

    def evaluate(*candidates, scored=()):
        return [Evaluation(1.0, 1.0, g) for g in candidates] + [Evaluation(1.0, 1.0, {}) for _ in scored]

    answers = telemetry.recording(evaluate)(*grads, scored=scored)
    assert [answer.grads for answer in answers[: len(grads)]] == list(grads)
    assert len(answers) == len(grads) + len(scored)
    telemetry.observe_steps(steps(2), telemetry._start)
    finish_round(telemetry)
    return telemetry.rounds[-1].gradient_cosine


def gradient(a, b):
    return {"a": torch.tensor(a), "b": torch.tensor([b])}


def test_a_round_stands_for_the_rows_that_were_served_since_the_one_before():
    telemetry = Telemetry(Drafter())
    for each in (steps(1, 3), steps(2)):
        telemetry.observe_steps(each, telemetry._start)
        finish_round(telemetry)
    assert [each.num_rows for each in telemetry.rounds] == [4, 2]


def test_every_row_is_measured_once_with_the_weights_that_drafted_it():
    """However many there are between two rounds; a learner may change what plays between them, too."""
    drafter = Drafter()
    telemetry, other = Telemetry(drafter), weights(1.0, 0.0)
    for _ in range(40):
        telemetry.observe_steps(steps(3), telemetry._start)
    drafter.weights = SimpleNamespace(params=other)
    telemetry.observe_steps(steps(3), other)
    telemetry.observe_steps(steps(2), other)
    drafter.weights = SimpleNamespace(params=weights(5.0, 0.0))  # what the round leads to
    measured = drafter.measured
    finish_round(telemetry, played=other)
    served = [(rows, played) for rows, played in measured if rows != 1]
    assert max(rows for rows, _ in served) < 64 + 3
    assert sum(rows for rows, played in served if played is START) == 120
    assert sum(rows for rows, played in served if played is other) == 5
    (only,) = telemetry.rounds
    assert only.num_rows == 125
    kl = -math.log(2) - (1.0 - 2 * math.log(math.e + 1)) / 2  # of even odds from odds of e : 1
    assert only.kl == pytest.approx(5 / 125 * kl, rel=1e-4)
    assert only.frozen_kl == pytest.approx(0.0, abs=1e-6)


def test_the_rows_of_a_round_that_could_not_be_measured_go_to_the_next():
    telemetry = Telemetry(Drafter())
    for each, loss in ((steps(2), math.nan), (steps(3), 1.0)):
        telemetry.observe_steps(each, telemetry._start)
        finish_round(telemetry, loss=loss)
    assert [each.num_rows for each in telemetry.rounds] == [5]


def test_the_rows_behind_the_last_round_are_told_without_being_a_round():
    telemetry = Telemetry(Drafter())
    telemetry.observe_steps(steps(2), telemetry._start)
    finish_round(telemetry)
    telemetry.observe_steps(steps(3), telemetry._start)
    for _ in range(2):  # a report may be asked for at any time
        told = telemetry.with_rest(16.0)
        assert [(each.num_rows, each.is_update, each.loss) for each in told] == [(2, True, 1.0), (3, False, None)]
        assert len(telemetry.rounds) == 1
    telemetry.observe_steps(steps(1), telemetry._start)
    finish_round(telemetry)
    assert [each.num_rows for each in telemetry.rounds] == [2, 4]
    assert telemetry.with_rest(16.0) == telemetry.rounds


def test_where_measuring_fails_the_rounds_so_far_are_told_and_what_failed_is_said_once(caplog):
    drafter = Drafter()
    telemetry = Telemetry(drafter)
    telemetry.observe_steps(steps(2), telemetry._start)
    finish_round(telemetry)
    drafter.rows = None
    for _ in range(2):
        telemetry.observe_steps(steps(70), telemetry._start)
        finish_round(telemetry)
        assert telemetry.with_rest(16.0) == telemetry.rounds
    assert len(telemetry.rounds) == 1
    assert [record.message.split(" (")[0] for record in caplog.records] == ["telemetry stopped in round 1"]


@pytest.mark.parametrize(
    ("second", "cosine"),
    [
        (gradient([6.0, 0.0], 8.0), 1.0),
        (gradient([-3.0, 0.0], -4.0), -1.0),
        (gradient([0.0, 2.0], 0.0), 0.0),
        (gradient([1.0, 0.0], 0.0), 0.6),
    ],
)
def test_the_cosine_is_that_of_all_weights_together_whatever_the_sizes(second, cosine):
    telemetry = Telemetry(Drafter())
    assert after_gradients(telemetry, gradient([3.0, 0.0], 4.0)) is None
    assert after_gradients(telemetry, second) == pytest.approx(cosine, abs=1e-6)


def test_of_several_gradients_in_a_round_each_counts_alike():
    """An expert's may be a thousand times as large, shortly before it blows up."""
    telemetry = Telemetry(Drafter())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0), gradient([0.0, 1000.0], 0.0))
    assert after_gradients(telemetry, gradient([1.0, 1.0], 0.0)) == pytest.approx(1.0)


def test_weights_that_were_only_scored_have_no_gradient():
    telemetry = Telemetry(Drafter())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0), scored=[START])
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0), scored=[START]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad", [gradient([math.nan, 0.0], 1.0), gradient([math.inf, 0.0], 1.0), gradient([0.0, 0.0], 0.0)]
)
def test_a_gradient_without_a_direction_has_no_cosine_and_ends_the_row_of_them(bad):
    telemetry = Telemetry(Drafter())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0))
    assert after_gradients(telemetry, bad) is None
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0)) is None
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0)) == pytest.approx(1.0)
