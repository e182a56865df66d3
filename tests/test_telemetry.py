"""What `Telemetry` adds to what the learner, the drafter and the round tell it."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from onlinespec.core import Feedback, Trace
from onlinespec.learners import Evaluation
from onlinespec.losses import TargetRows
from onlinespec.telemetry import Telemetry

TRACE = Trace([], torch.empty(0, 0))
START = {"a": torch.zeros(2), "b": torch.zeros(1)}


@dataclass
class OneRow:
    """A drafter of two tokens whose logits are its weights."""

    weights: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(params=START))

    def rows(self, candidates, batch, num_depths=1):
        target = TargetRows(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), torch.tensor([1.0]))
        return [(torch.stack([params["a"] for params in candidates])[:, None], target)] * num_depths


def steps(*num_rows):
    return [Feedback(TRACE, 0, rows, num_draft_tokens=2, num_accepted=rows - 1, weights_version=0) for rows in num_rows]


def rest_of(telemetry, feedback, loss=1.0):
    return telemetry.with_rest("batch", feedback[-1], lambda: loss, START, 16.0)


def finish_round(telemetry, feedback, played=START, loss=1.0):
    telemetry.observe_round("batch", feedback[-1], lambda: loss, played, 16.0, dict)


def after_gradients(telemetry, *grads, scored=()):
    """A round in which a learner asked for these gradients."""

    def evaluate(*candidates, scored=()):
        return [Evaluation(1.0, 1.0, g) for g in candidates] + [Evaluation(1.0, 1.0, {}) for _ in scored]

    answers = telemetry.watched(evaluate)(*grads, scored=scored)
    assert [answer.grads for answer in answers[: len(grads)]] == list(grads)
    assert len(answers) == len(grads) + len(scored)
    finish_round(telemetry, steps(1))
    return telemetry.rounds[-1].gradient_cosine


def gradient(a, b):
    return {"a": torch.tensor(a), "b": torch.tensor([b])}


def test_a_round_stands_for_the_rows_that_were_served_since_the_one_before():
    telemetry = Telemetry(OneRow())
    for each in (steps(1, 3), steps(2)):
        telemetry.observe_steps(each)
        finish_round(telemetry, each)
    assert [each.num_rows for each in telemetry.rounds] == [4, 2]


def test_the_rows_of_a_round_that_could_not_be_measured_go_to_the_next():
    telemetry = Telemetry(OneRow())
    for each, loss in ((steps(2), math.nan), (steps(3), 1.0)):
        telemetry.observe_steps(each)
        finish_round(telemetry, each, loss=loss)
    assert [each.num_rows for each in telemetry.rounds] == [5]


def test_the_rows_behind_the_last_round_are_told_without_being_a_round():
    telemetry = Telemetry(OneRow())
    telemetry.observe_steps(steps(2))
    finish_round(telemetry, steps(2))
    telemetry.observe_steps(steps(3))
    for _ in range(2):  # a report may be asked for at any time
        measured = rest_of(telemetry, steps(3))
        assert [(each.num_rows, each.is_update) for each in measured] == [(2, True), (3, False)]
        assert len(telemetry.rounds) == 1
    telemetry.observe_steps(steps(1))
    finish_round(telemetry, steps(1))
    assert [each.num_rows for each in telemetry.rounds] == [2, 4]


def test_rows_behind_the_last_round_that_cannot_be_measured_are_left_out(caplog):
    telemetry = Telemetry(OneRow())
    finish_round(telemetry, steps(1))
    assert rest_of(telemetry, steps(1), loss=math.nan) == telemetry.rounds
    telemetry._drafter.rows = None
    assert rest_of(telemetry, steps(1)) == telemetry.rounds
    assert "no figures behind round 1" in caplog.text


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
    telemetry = Telemetry(OneRow())
    assert after_gradients(telemetry, gradient([3.0, 0.0], 4.0)) is None
    assert after_gradients(telemetry, second) == pytest.approx(cosine, abs=1e-6)


def test_of_several_gradients_in_a_round_each_counts_alike():
    """An expert's may be a thousand times as large, shortly before it blows up."""
    telemetry = Telemetry(OneRow())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0), gradient([0.0, 1000.0], 0.0))
    assert after_gradients(telemetry, gradient([1.0, 1.0], 0.0)) == pytest.approx(1.0)


def test_weights_that_were_only_scored_have_no_gradient():
    telemetry = Telemetry(OneRow())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0), scored=[START])
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0), scored=[START]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad", [gradient([math.nan, 0.0], 1.0), gradient([math.inf, 0.0], 1.0), gradient([0.0, 0.0], 0.0)]
)
def test_a_gradient_without_a_direction_has_no_cosine_and_ends_the_row_of_them(bad):
    telemetry = Telemetry(OneRow())
    after_gradients(telemetry, gradient([1.0, 0.0], 0.0))
    assert after_gradients(telemetry, bad) is None
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0)) is None
    assert after_gradients(telemetry, gradient([1.0, 0.0], 0.0)) == pytest.approx(1.0)
