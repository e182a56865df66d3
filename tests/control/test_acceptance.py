from random import Random

import pytest

from onlinespec.control.acceptance import Acceptance


def serve(acceptance, prob, num_steps, request_ids=("a",), depth=4, seed=0):
    """Steps whose tokens are kept with this probability, or with one for each request; the number of alarms."""
    rng, alarms = Random(seed), 0
    probs = prob if isinstance(prob, dict) else dict.fromkeys(request_ids, prob)
    for _ in range(num_steps):
        kept = [next(k for k in range(depth + 1) if k == depth or rng.random() >= probs[i]) for i in request_ids]
        alarms += acceptance.observe(request_ids, [depth] * len(kept), kept)
    return alarms


@pytest.mark.parametrize("prob", [0.1, 0.5, 0.9])
def test_probabilities_are_learned_by_position(prob):
    acceptance = Acceptance(8)
    serve(acceptance, prob, 400)
    assert acceptance.probs[0] == pytest.approx(prob, abs=0.07)


def test_a_position_that_is_never_reached_leans_on_the_one_before():
    acceptance = Acceptance(8)
    serve(acceptance, 0.9, 400, depth=2)
    assert acceptance.probs[7] == acceptance.probs[2] == pytest.approx(acceptance.probs[1])


@pytest.mark.parametrize(("before", "after"), [(0.8, 0.05), (0.05, 0.8)])
def test_a_jump_is_believed_within_some_tens_of_steps(before, after):
    acceptance = Acceptance(4)
    serve(acceptance, before, 1_000)
    assert serve(acceptance, after, 40) > 0
    assert acceptance.probs[0] == pytest.approx(after, abs=0.25)


def test_steady_traffic_seldom_looks_like_a_jump():
    assert sum(serve(Acceptance(4), prob, 1_000, seed=seed) for prob in (0.2, 0.5, 0.8) for seed in range(5)) <= 5


def test_requests_that_differ_are_told_apart():
    acceptance, probs = Acceptance(4), {"good": 0.8, "bad": 0.1}
    serve(acceptance, probs, 100, ("good", "bad"))
    assert acceptance.survival("good", 1)[0] > 0.55
    assert acceptance.survival("bad", 1)[0] < 0.25
    assert acceptance.survival("new", 1)[0] == pytest.approx(acceptance.probs[0])


def test_requests_that_are_alike_are_pooled():
    acceptance, ids = Acceptance(4), ("a", "b", "c")
    serve(acceptance, 0.6, 300, ids)
    assert [acceptance.survival(i, 1)[0] for i in ids] == pytest.approx([acceptance.probs[0]] * 3, rel=0.02)


def test_survival_falls_with_depth():
    acceptance = Acceptance(8)
    serve(acceptance, 0.7, 100)
    survival = acceptance.survival("a", 8)
    assert survival == sorted(survival, reverse=True)
    assert acceptance.survival("a", 0) == []


def test_steps_without_drafts_say_nothing():
    acceptance = Acceptance(4)
    serve(acceptance, 0.7, 50)
    before = list(acceptance.probs)
    acceptance.observe(["b"], [0], [0])
    assert acceptance.probs == pytest.approx(before, rel=0.01)
