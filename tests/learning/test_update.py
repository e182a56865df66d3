import logging
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import rigs
import torch
from hypothesis import given
from hypothesis import strategies as st
from rigs import SOFT, Recorder, Script, plain, run_together
from toy import steady

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats, DrafterWeights, Features, Feedback, Trace
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.ngram import Ngram
from onlinespec.drafters.small_lm.drafter import SmallLM
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners import make_learner
from onlinespec.learners.step_sizes import step_size_for
from onlinespec.learning.learner_spec import PRESETS, learner_of, parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning, newest_rows
from onlinespec.registry import LEARNERS, LOSSES

TARGET = rigs.random_target()
PROMPT = [5, 9, 200, 31, 77, 14, 9]
OFTEN = LearnConfig(min_interval=8, max_interval=8, replay_every=0, budget=math.inf)


@pytest.fixture
def drafter():
    return Eagle.fresh(TARGET)


def learn(drafter, learner="online_gradient", step_size=5e-3, config=OFTEN, geometry="preconditioned"):
    return InlineLearning(drafter, make_learner(learner, step_size, geometry), config)


def complete(drafter, learning, num_tokens=17, prompt=PROMPT, num_draft_tokens=2, **params):
    params = GenerationParams(num_tokens, num_draft_tokens, **params)
    return DecodeLoop(TARGET, drafter, learning).complete(prompt, params)


# A learner that fails never hurts serving


def raise_something(*args):
    raise KeyError("layers.9")


def lose_to_nan(drafter):
    def sabotage(monkeypatch):
        losses = drafter.losses

        def broken(*asked):
            return [replace(good, total=good.total * torch.nan) for good in losses(*asked)]

        monkeypatch.setattr(drafter, "losses", broken)

    return sabotage


SABOTAGE = {
    "nan loss": lambda drafter, learning, patch: lose_to_nan(drafter)(patch),
    "exception in loss": lambda drafter, learning, patch: patch.setattr(drafter, "losses", raise_something),
    "exception in batch": lambda drafter, learning, patch: patch.setattr(drafter, "batch", raise_something),
    "exception in learner": lambda drafter, learning, patch: patch.setattr(
        learning, "_learner", make_learner("online_gradient", 1e-3, f"{__name__}:BrokenGeometry")
    ),
    "weights not finite": lambda drafter, learning, patch: patch.setattr(
        learning, "_learner", make_learner("online_gradient", float("inf"))
    ),
}


class BrokenGeometry:
    def direction(self, grads, loss, state):
        raise_something()


@pytest.mark.parametrize("kind", SABOTAGE)
def test_a_failing_round_freezes_the_drafter_says_so_once_and_decoding_goes_on(drafter, kind, monkeypatch, caplog):
    learning = learn(drafter)
    kept = {}
    for _ in DecodeLoop(TARGET, drafter, learning).generate(PROMPT, GenerationParams(40)):
        kept[drafter.weights.version] = {name: p.clone() for name, p in drafter.weights.params.items()}
    last = drafter.weights.version
    assert last == learning.num_rounds > 2
    SABOTAGE[kind](drafter, learning, monkeypatch)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        for prompt in (PROMPT, PROMPT[:2], PROMPT[:5]):
            assert complete(drafter, learning, prompt=prompt).output_ids == plain_ids(prompt)
    assert learning.is_frozen
    # the newest weights that scored a finite loss: those that drafted last, unless their own round was the one to fail
    good = drafter.weights
    assert good.version in (last - 1, last)
    assert all(torch.equal(good.params[name], p) for name, p in kept[good.version].items())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert f"stays at weights version {good.version}" in caplog.text


def test_weights_that_score_nothing_finite_are_never_the_last_good_ones(drafter):
    config = parse_learner("ensemble/geometry=euclidean/step_size_pool=1e-2:1e30", OFTEN)
    learning, largest = InlineLearning(drafter, config=config), []
    for _ in DecodeLoop(TARGET, drafter, learning).generate(PROMPT, GenerationParams(60)):
        largest.append(max(float(p.abs().max()) for p in drafter.weights.params.values()))
        assert max(float(p.abs().max()) for p in learning._last_good.params.values()) < 1e6
    assert max(largest) > 1e6  # such weights did play


@cache
def plain_ids_of(prompt, num_tokens):
    return plain(TARGET, prompt, GenerationParams(num_tokens)).output_ids


def plain_ids(prompt, num_tokens=17):
    return plain_ids_of(tuple(prompt), num_tokens)


def test_weights_that_blow_up_without_a_nan_do_not_stop_sampling(drafter):
    learning = learn(drafter, step_size=1e30, geometry="euclidean")
    request = complete(drafter, learning, num_tokens=40, sampling=SOFT)
    assert len(request.output_ids) == 40
    assert learning.is_frozen


def test_weights_that_blew_up_are_not_what_the_drafter_is_frozen_at(drafter):
    learning = learn(drafter, step_size=1e30, geometry="euclidean")
    complete(drafter, learning)
    assert learning.is_frozen
    assert all(p.abs().max() < 10 for p in drafter.weights.params.values())


def test_rows_that_teach_nothing_are_no_failure(drafter):
    learning = learn(drafter, config=replace(OFTEN, min_interval=1, max_interval=1))
    request = complete(drafter, learning, prompt=[7])  # the first step's only row has no state before it
    assert not learning.is_frozen
    assert learning.num_rounds == request.stats.steps - 1


def test_a_drafter_without_weights_is_frozen_from_the_start():
    assert learn(Ngram()).is_frozen


# The step size


@pytest.mark.parametrize(
    ("num_weights", "step_size"), [(930_000, 1e-3), (2_000_000, 1e-3), (8_000_000, 5e-4), (200_000_000, 1e-4)]
)
def test_the_step_size_follows_how_many_weights_learn(num_weights, step_size):
    params = {"fc.weight": torch.empty(num_weights, device="meta")}
    assert step_size_for(params) == step_size
    learner = learner_of(LearnConfig(), params)
    assert learner.step_size == step_size
    ensemble = learner_of(LearnConfig(learner="ensemble"), params)
    assert [expert.step_size for expert in ensemble.experts] == [step_size / 3, step_size, step_size * 3]


def test_a_step_size_that_is_given_holds_whatever_learns():
    params = {"fc.weight": torch.empty(200_000_000, device="meta")}
    assert learner_of(LearnConfig(step_size=3e-3), params).step_size == 3e-3
    assert learner_of(LearnConfig(step_size=0.0), params).step_size == 0
    assert learner_of(parse_learner("osd"), params).step_size == 1e-4


def test_learning_takes_the_step_size_of_its_drafter(drafter, monkeypatch):
    num_parameters = sum(p.numel() for p in drafter.weights.params.values())
    monkeypatch.setattr("onlinespec.learners.step_sizes._LARGEST_UP_TO", num_parameters / 4)
    assert InlineLearning(drafter)._learner.step_size == 5e-4


# What learning costs and gains


def test_learning_adds_no_target_forward(drafter):
    before = TARGET.decoder.num_forwards
    learning = learn(drafter)
    request = complete(drafter, learning)
    assert learning.num_rounds > 0
    assert TARGET.decoder.num_forwards - before == 1 + request.stats.steps  # the prompt, then once a step


def test_learning_is_counted_in_its_own_seconds(drafter):
    request = complete(drafter, learn(drafter))
    assert request.stats.learn_seconds > 0
    assert request.stats.tokens_per_second < request.stats.tokens / request.stats.decode_seconds
    assert complete(drafter, None).stats.learn_seconds == 0


def test_acceptance_rises_on_a_stream_that_repeats(drafter):
    learning = learn(drafter, config=replace(OFTEN, min_interval=32, max_interval=32))
    first = complete(drafter, learning).stats
    for _ in range(16):
        last = complete(drafter, learning).stats
    assert last.acceptance_length > first.acceptance_length + 0.5


@pytest.mark.parametrize("method", ["online_gradient", "ensemble/with_frozen=true", "optimistic/telemetry=true"])
def test_the_same_stream_gives_the_same_weights(method):
    drafters = [Eagle.fresh(TARGET) for _ in range(2)]
    for drafter in drafters:
        jobs = [(PROMPT[i:], GenerationParams(25, 2, sampling=SOFT, seed=i)) for i in range(3)]
        learning = InlineLearning(drafter, config=parse_learner(method, replace(OFTEN, replay_every=2, budget=0.5)))
        run_together(DecodeLoop(TARGET, drafter, learning), jobs, max_running=2)
    one, other = (drafter.weights for drafter in drafters)
    assert one.version == other.version > 3
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)


def test_every_round_makes_one_version(drafter):
    learning = learn(drafter)
    complete(drafter, learning)
    assert drafter.weights.version == learning.num_rounds > 0


def test_a_frozen_learner_leaves_weights_and_version_alone(drafter):
    before = drafter.weights
    learning = learn(drafter, learner="frozen")
    complete(drafter, learning)
    assert learning.num_rounds == 0
    assert drafter.weights is before


# When a round is due


def test_a_round_comes_after_as_many_steps_as_the_interval_says(drafter):
    learning = learn(drafter, config=replace(OFTEN, min_interval=12, max_interval=12))
    complete(drafter, learning, num_tokens=35, num_draft_tokens=0)
    assert learning.num_rounds == 2


def test_the_osd_preset_has_a_round_after_every_eighth_request_on_all_that_was_refused(drafter, trained):
    learning = InlineLearning(drafter, config=parse_learner("osd"))
    recorder = Recorder(passed_on_to=learning)
    loop = DecodeLoop(TARGET, drafter, recorder)
    for i in range(17):
        loop.complete(PROMPT, GenerationParams(10, seed=i), request_id=str(i))
        assert learning.num_rounds == (i + 1) // 8
    ids = [{record.request_id for record in round_} for round_ in trained]
    assert ids == [{str(i) for i in range(8)}, {str(i) for i in range(8, 16)}]  # each once


# The budget, in work units


@pytest.mark.parametrize(("share", "num_answers"), [pytest.param(0.02, 20, marks=pytest.mark.full), (0.1, 8)])
def test_learning_keeps_to_its_share_of_the_work(drafter, share, num_answers):
    max_rows, costs = 16, {"round_cost": 0.25, "row_cost": 0.03}
    config = replace(OFTEN, min_interval=4, max_interval=4, max_rows=max_rows, budget=share, **costs)
    learning = learn(drafter, config=config)
    steps = sum(complete(drafter, learning).stats.steps for _ in range(num_answers))
    work = learning.num_rounds * costs["round_cost"] + learning.num_rows * costs["row_cost"]
    assert learning.work >= work  # comparisons with older weights too
    assert learning.work <= share * steps + 9 * (0.25 + 0.03 * max_rows)  # lent at the start, and a comparison
    assert learning.work > 0.6 * share * steps  # and what was earned is used


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("ensemble", 2.5, 4.5), pytest.param("surrogate_ensemble", 1.3, 2.0, marks=pytest.mark.full)],
)
def test_an_ensemble_pays_for_each_of_its_experts(drafter, name, least, most):
    config = replace(OFTEN, min_interval=4, max_interval=4, max_rows=16, budget=0.03, round_cost=0.0, row_cost=0.05)
    alone = learn(drafter, config=config)
    together = InlineLearning(Eagle.fresh(TARGET), config=parse_learner(name, config))
    for learning in (alone, together):
        for _ in range(8):
            complete(learning._drafter, learning, num_tokens=40)
    per_row = [learning.work / learning.num_rows for learning in (alone, together)]
    assert least < per_row[1] / per_row[0] < most
    assert together.num_rows < alone.num_rows


def test_sixteen_streams_learn_within_the_share_of_their_steps(drafter):
    """A step of sixteen that draft four tokens took 4.75 times as long as one of a single stream, not sixteen times."""
    share, costs = 0.25, {"round_cost": 4.0, "row_cost": 0.03}
    config = replace(OFTEN, min_interval=4, max_interval=4, max_rows=16, budget=share, **costs)
    learning = learn(drafter, step_size=0.0, config=config)
    loop = DecodeLoop(TARGET, drafter, learning)
    requests = [loop.start(PROMPT[i % 5 :], GenerationParams(200)) for i in range(16)]
    num_steps = 0
    while learning.num_rounds < 20 and not any(request.finish_reason for request in requests):
        loop.step(requests)
        num_steps += 1
    lent = 9 * (4.0 + 0.03 * 16)
    assert learning.work <= share * 4.75 * num_steps + lent
    assert learning.work > 0.6 * share * num_steps  # and at least what one stream would have earned is used


# The pace, in the loop


@pytest.mark.parametrize(("step_size", "is_rare"), [(0.0, True), (5e-3, False)])
def test_rounds_become_rare_where_they_bring_nothing_and_only_there(drafter, step_size, is_rare):
    learning = learn(drafter, step_size=step_size, config=replace(OFTEN, min_interval=4, max_interval=64))
    for _ in range(4):
        complete(drafter, learning, num_tokens=25)
    assert (learning.schedule.interval == 64) == is_rare


# Whether the traffic has moved


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        pytest.param(Eagle, SamplingParams(), marks=pytest.mark.full),
        (Eagle, SamplingParams(0.7, top_k=20)),
        (SmallLM, SamplingParams()),
        pytest.param(SmallLM, SamplingParams(0.7, top_k=20), marks=pytest.mark.full),
    ],
)
def test_a_row_agrees_where_a_draft_that_begins_there_is_kept(kind, sampling):
    """Each position of a text is drafted from in a request of its own; the rows were decoded without any draft."""
    drafter = kind.fresh(TARGET)
    learning = learn(drafter, config=replace(OFTEN, min_interval=32, max_interval=32))
    for i in range(10):
        complete(drafter, learning, num_tokens=33, num_draft_tokens=0, sampling=sampling, seed=i)
    recorder, settings = Recorder(), {"sampling": sampling, "seed": 3}
    params = GenerationParams(25, num_draft_tokens=0, **settings)
    request = DecodeLoop(TARGET, drafter, recorder).complete(PROMPT, params)
    text, num_kept = request.trace.token_ids, 0
    for length in range(len(PROMPT), len(text)):
        alone = complete(drafter, None, num_tokens=2, prompt=text[:length], num_draft_tokens=1, **settings)
        assert alone.output_ids[0] == text[length]
        num_kept += alone.stats.accepted
    loss = drafter.loss(drafter.weights.params, drafter.batch(recorder.feedback))
    assert (loss.num_agreed, loss.num_fresh) == (num_kept, 25)
    assert 2 < num_kept < 23


def test_replayed_rows_do_not_count_in_the_agreement(drafter):
    recorder = Recorder()
    loop = DecodeLoop(TARGET, drafter, recorder)
    fresh, old = (recorder.of(loop.complete(PROMPT[i:], GenerationParams(20, sampling=SOFT))) for i in (0, 2))
    alone, both = (drafter.loss(drafter.weights.params, drafter.batch(fresh, more)) for more in ([], old))
    assert both.num_rows > alone.num_rows
    assert (both.num_agreed, both.num_fresh) == (alone.num_agreed, 20)


def test_the_loop_tells_a_drift_when_the_traffic_moves_and_none_before(warm):
    learning = learn(warm, config=replace(OFTEN, max_rows=32))
    for i in range(10):
        complete(warm, learning, num_draft_tokens=(1, 2, 4, 8, 16)[i % 5])
    assert learning.schedule.num_drifts == 0
    num_rounds = learning.num_rounds
    complete(warm, learning, prompt=[250, 3, 77, 12])
    assert learning.schedule.num_drifts == 1
    assert learning.num_rounds - num_rounds < 8


# A round that did harm


@pytest.fixture(scope="module")
def warm_params():
    """Of a drafter that knows what the target says to PROMPT."""
    drafter = Eagle.fresh(TARGET)
    learning = learn(drafter, config=replace(OFTEN, min_interval=24, max_interval=24))
    for _ in range(12):
        complete(drafter, learning, num_tokens=60, num_draft_tokens=0)
    return drafter.weights.params


@pytest.fixture
def warm(drafter, warm_params):
    drafter.swap(DrafterWeights(warm_params, version=1))
    return drafter


HARMFUL = {
    "online_gradient": 0.05,
    "optimistic": 0.05,
    "ensemble": 0.1,
    "surrogate_ensemble": 0.05,
    "momentum": 0.05,
    "reset_to_merged": 0.2,
}


def acceptance_of(learning, drafter):
    stats = sum((complete(drafter, learning, 60, num_draft_tokens=4).stats for _ in range(4)), DecodeStats())
    return stats.acceptance_length


def test_a_step_size_ten_times_too_large_ruins_no_drafter(warm, monkeypatch):
    """0.005 fits this drafter."""
    params = warm.weights.params
    start = complete(warm, None, 60, num_draft_tokens=4).stats.acceptance_length
    lengths = {}
    for is_guarded in (False, True):
        warm.swap(DrafterWeights(params, version=1))
        learning = learn(warm, step_size=0.05)
        if not is_guarded:
            monkeypatch.setattr(learning.schedule, "is_jump", lambda loss: False)
        lengths[is_guarded] = acceptance_of(learning, warm)
        assert (learning.num_undone > 0) == is_guarded
    assert lengths[False] < 1.5 < 2.0 < lengths[True] < start


def test_every_learner_has_a_step_size_that_does_harm():
    assert set(HARMFUL) == set(LEARNERS) - {"frozen"}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_round_that_did_harm_is_taken_back_under_every_learner(warm, name, monkeypatch):
    learning = InlineLearning(warm, config=parse_learner(f"{name}/step_size={HARMFUL[name]}", OFTEN))
    undo, restored = learning._undo, []

    def spy(state):
        earlier, learner = learning._earlier, learning._learner
        undo(state)
        kept = [learner.played(earlier), warm.weights.params]
        if "ensemble" in name:  # of experts that are put back: what they have cost decides anew which of them play
            kept = [[expert.played(own) for expert, own in zip(learner.experts, states.experts, strict=True)]
                    for states in (earlier, learning.state)]  # fmt: skip
            restored.append(all(same(*pair) for pair in zip(*kept, strict=True)))
        else:
            restored.append(same(*kept))
        assert learning._last_good is warm.weights

    monkeypatch.setattr(learning, "_undo", spy)
    for _ in range(2):
        complete(warm, learning, num_tokens=60)
    assert not learning.is_frozen
    assert learning.num_undone == len(restored) > 0
    assert all(restored)


def same(one, other):
    return all(torch.equal(one[name], p) for name, p in other.items())


def test_a_learner_of_several_step_sizes_remembers_which_of_them_did_harm(warm):
    learning = InlineLearning(warm, config=parse_learner("ensemble/step_size=0.1", OFTEN))
    while not learning.num_undone:
        assert learning.num_rounds < 100
        complete(warm, learning, num_tokens=10)
    costs = learning.state.costs
    assert costs[0] < costs[1]
    assert costs[0] < costs[2]


def score_with(monkeypatch, drafter, fresh_of):
    """Scores candidates by a function of their weights and how often was asked; returns the list of what was asked."""
    losses, asked = drafter.losses, []

    def scored(candidates, *more):
        asked.extend(candidates)
        return [
            replace(loss, fresh=fresh_of(params), num_agreed=0, num_fresh=0)
            for params, loss in zip(candidates, losses(candidates, *more), strict=True)
        ]

    monkeypatch.setattr(drafter, "losses", scored)
    return asked


def test_where_older_weights_are_as_far_off_the_newer_ones_stay(drafter, monkeypatch):
    learning, level = learn(drafter), [2.0]
    score_with(monkeypatch, drafter, lambda params: level[0])
    complete(drafter, learning, num_tokens=25)
    for level[0] in (20.0, 200.0):  # the traffic moves
        complete(drafter, learning, num_tokens=9, num_draft_tokens=0)
    assert learning.num_rounds > 4
    assert learning.num_undone == 0


def test_older_weights_are_scored_only_where_the_loss_jumps(drafter, monkeypatch):
    learning, level = learn(drafter), [2.0]
    asked = score_with(monkeypatch, drafter, lambda params: level[0])
    counts = []
    for level[0] in (2.0, 2.0, 2.0, 2.5, 4.0):
        before = len(asked)
        complete(drafter, learning, num_tokens=9, num_draft_tokens=0)
        counts.append(len(asked) - before)
    assert learning.num_rounds == 5
    assert counts[:4] == [1, 1, 1, 1]
    assert counts[4] > 1


def test_what_was_taken_back_is_told(warm):
    learning = learn(warm, step_size=0.05, config=replace(OFTEN, telemetry=True))
    for _ in range(3):
        complete(warm, learning, num_tokens=60)
    rounds = learning.telemetry.rounds
    assert sum(measured.is_undoing for measured in rounds) == learning.num_undone > 0
    assert all(0 <= measured.agreement <= 1 for measured in rounds)


# Memory


@pytest.fixture
def replayed(drafter, monkeypatch):
    """What joins each round from memory, in order."""
    rounds = []
    batch = drafter.batch

    def spy(feedback, replayed=(), **choice):
        rounds.append(list(replayed))
        return batch(feedback, replayed, **choice)

    monkeypatch.setattr(drafter, "batch", spy)
    return rounds


def test_rows_of_finished_requests_join_every_third_round(drafter, replayed):
    learning = learn(drafter, config=replace(OFTEN, replay_every=3, max_rows=8))
    for i in range(6):
        DecodeLoop(TARGET, drafter, learning).complete(PROMPT[i:], GenerationParams(25, 2), request_id=str(i))
    assert len(replayed) > 9
    turns = [bool(records) for records in replayed]
    assert not any(turn for i, turn in enumerate(turns) if i % 3)
    assert all(turns[6::3])
    for records in filter(None, replayed):
        assert len({id(record.trace) for record in records}) == 1
        assert sum(record.num_rows for record in records) <= 8


def test_without_memory_nothing_joins(drafter, replayed):
    learning = learn(drafter)
    for _ in range(3):
        complete(drafter, learning)
    assert not any(replayed)


@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.full)])
def test_what_is_replayed_is_not_forgotten(times):
    """One text, then another for long: with memory the first is still drafted better than without."""
    kept = {}
    for replay_every in (0, 2):
        drafter = Eagle.fresh(TARGET)
        learning = learn(drafter, config=replace(OFTEN, min_interval=24, max_interval=24, replay_every=replay_every))
        loop = DecodeLoop(TARGET, drafter, learning)
        for domain, prompt in (("one", PROMPT), ("other", [250, 3, 77, 12])):
            for _ in range(times):
                requests = [loop.start(prompt, GenerationParams(40, 0), domain=domain) for _ in range(4)]
                while not requests[0].finish_reason:
                    loop.step(requests)
                for request in requests:
                    loop.finish(request)
        kept[replay_every] = complete(drafter, None, num_tokens=40, num_draft_tokens=4).stats.acceptance_length
    assert kept[2] > kept[0]


# Measuring


def test_measuring_changes_nothing_that_is_learned():
    drafters = [Eagle.fresh(TARGET) for _ in range(2)]
    for drafter, telemetry in zip(drafters, (False, True), strict=True):
        complete(drafter, learn(drafter, config=replace(OFTEN, telemetry=telemetry)))
    one, other = (drafter.weights.params for drafter in drafters)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_measuring_is_timed_apart(drafter):
    learning = learn(drafter, config=replace(OFTEN, telemetry=True))
    stats = complete(drafter, learning).stats
    assert stats.diagnostic_seconds == pytest.approx(learning.diagnostic_seconds) != 0
    assert complete(drafter, learn(drafter)).stats.diagnostic_seconds == 0


@pytest.mark.parametrize(
    "sampling", [pytest.param(SamplingParams(), marks=pytest.mark.full), SOFT], ids=["greedy", "sampled"]
)
def test_every_round_is_measured_at_the_weights_that_played(drafter, sampling):
    learning = learn(drafter, config=replace(OFTEN, telemetry=True, loss="soft_cross_entropy"))
    for i in range(8):
        complete(drafter, learning, num_tokens=25, sampling=sampling, seed=i)
    rounds = learning.telemetry.rounds
    assert len(rounds) == learning.num_rounds > 16
    assert rounds[0].kl == pytest.approx(rounds[0].frozen_kl, abs=1e-5)  # nothing learned yet
    assert rounds[0].distance == 0 < rounds[1].distance
    assert rounds[-1].frozen_kl > rounds[-1].kl
    assert all(r.loss >= r.kl for r in rounds)  # the target's entropy lies between
    assert rounds[16].moved > 0
    assert 0 < rounds[16].function_moved < 1
    assert all(1 <= r.acceptance_length_bound <= 5 for r in rounds)
    assert [r.request for r in rounds] == sorted(r.request for r in rounds)


def test_what_fails_in_measuring_stops_the_measuring_alone(drafter, monkeypatch, caplog):
    learning = learn(drafter, config=replace(OFTEN, telemetry=True))
    monkeypatch.setattr(drafter, "rows", raise_something)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        complete(drafter, learning, num_tokens=25)
    assert learning.num_rounds > 2
    assert not learning.is_frozen
    assert learning.telemetry.rounds == []
    assert [record.message.split(" (")[0] for record in caplog.records] == ["telemetry stopped in round 0"]


def test_the_learners_own_report_is_kept(drafter):
    for method, field in (("optimistic", "hint_error"), ("ensemble", "meta_weights")):
        learning = InlineLearning(drafter, config=parse_learner(method, replace(OFTEN, telemetry=True)))
        complete(drafter, learning)
        assert all(field in r.learner for r in learning.telemetry.rounds)


@pytest.mark.parametrize("method", [name for name in [*LEARNERS, *PRESETS] if name != "frozen"])
def test_every_learner_tells_how_alike_its_gradients_are_and_for_how_many_rows(drafter, method):
    learning = InlineLearning(drafter, config=parse_learner(method, replace(OFTEN, telemetry=True)))
    num_requests, num_tokens = (20, 3) if method == "osd" else (2, 25)
    rows = sum(complete(drafter, learning, num_tokens, seed=i, sampling=SOFT).stats.tokens for i in range(num_requests))
    first, *others = learning.telemetry.rounds
    assert first.gradient_cosine is None
    assert others
    assert all(-1 <= each.gradient_cosine <= 1 for each in others)
    assert sum(each.num_rows for each in learning.measured()) == rows


# Learners in the loop


@pytest.mark.parametrize("method", [*LEARNERS, *PRESETS])
def test_decoding_stays_exact_under_every_learner(drafter, method):
    learning = InlineLearning(drafter, config=parse_learner(f"{method}/step_size=0.05/min_interval=4/max_interval=4"))
    for prompt in (PROMPT, PROMPT[:3]):
        assert complete(drafter, learning, prompt=prompt).output_ids == plain_ids(prompt)
    assert not learning.is_frozen


def test_an_expert_that_blows_up_takes_no_one_with_it(drafter):
    config = parse_learner("ensemble/geometry=euclidean/step_size_pool=1e-2:1e30", OFTEN)
    learning = InlineLearning(drafter, config=config)
    request = complete(drafter, learning, num_tokens=25)
    assert request.output_ids == plain_ids(PROMPT, 25)
    assert not learning.is_frozen
    assert learning.num_rounds > 2
    assert all(p.isfinite().all() for p in drafter.weights.params.values())


def test_a_hint_by_domain_plays_as_soon_as_the_domain_is_known(drafter):
    config = parse_learner("optimistic/hint_by_domain=true/min_interval=8/max_interval=8", OFTEN)
    learning = InlineLearning(drafter, config=config)
    loop = DecodeLoop(TARGET, drafter, learning)
    loop.complete(PROMPT, GenerationParams(12), domain="a")
    ahead = drafter.weights
    loop.complete(PROMPT, GenerationParams(1, num_draft_tokens=0), domain="b")
    assert drafter.weights.version > ahead.version  # no hint is known for b: it plays what was learned
    loop.complete(PROMPT, GenerationParams(1, num_draft_tokens=0), domain="a")
    assert all(torch.equal(drafter.weights.params[name], p) for name, p in ahead.params.items())


def test_a_new_domain_moves_nothing_once_a_round_has_failed(drafter, monkeypatch):
    learning = InlineLearning(drafter, config=parse_learner("optimistic/hint_by_domain=true", OFTEN))
    loop = DecodeLoop(TARGET, drafter, learning)
    loop.complete(PROMPT, GenerationParams(30), domain="a")
    monkeypatch.setattr(drafter, "losses", raise_something)
    learning._steps_waited = 8  # due at the very step that brings the new domain
    loop.complete(PROMPT, GenerationParams(1, num_draft_tokens=0), domain="b")
    assert learning.is_frozen
    assert drafter.weights is learning._last_good


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_learned_from(drafter, loss):
    learning = learn(drafter, config=replace(OFTEN, loss=loss))
    lengths = [complete(drafter, learning).stats.acceptance_length]
    while lengths[-1] < lengths[0] + 0.2:
        assert len(lengths) < 16
        lengths.append(complete(drafter, learning).stats.acceptance_length)
    assert not learning.is_frozen


# Which rows a round trains


@pytest.fixture
def trained(drafter, monkeypatch):
    """The feedback each round trains, in order."""
    rounds = []
    batch = drafter.batch

    def spy(feedback, *more, **choice):
        rounds.append(list(feedback))
        return batch(feedback, *more, **choice)

    monkeypatch.setattr(drafter, "batch", spy)
    return rounds


@pytest.mark.parametrize("max_rows", [1, 5, 20])
def test_a_round_trains_at_most_max_rows(drafter, trained, max_rows):
    learning = learn(drafter, config=replace(OFTEN, min_interval=24, max_interval=24, max_rows=max_rows))
    complete(drafter, learning, num_tokens=96, num_draft_tokens=0)
    counts = [sum(record.num_rows for record in round_) for round_ in trained]
    assert counts == [max_rows] * 4
    assert learning.num_rows == 4 * max_rows


def test_interleaved_requests_keep_their_own_rows(drafter, trained):
    learning = learn(drafter, config=replace(OFTEN, min_interval=30, max_interval=30))
    recorder = Recorder(passed_on_to=learning)
    jobs = [(PROMPT[i:], GenerationParams(40)) for i in range(3)]
    done = run_together(DecodeLoop(TARGET, drafter, recorder), jobs)
    assert len(trained) > 2
    for round_ in trained:
        owners = [record.request_id for record in round_]
        changes = sum(a != b for a, b in pairwise(owners))
        assert changes == len(set(owners)) - 1  # side by side
    for request in done:
        learned = [record for round_ in trained for record in round_ if record.trace is request.trace]
        assert learned == recorder.of(request)[: len(learned)]  # in order, none left out
        assert len(learned) > 3


def test_a_step_cut_by_a_stop_teaches_only_what_was_kept():
    answer = plain_ids(PROMPT)
    end = answer.index(answer[2])
    recorder = Recorder()
    stopping = replace(TARGET, end_token_ids=frozenset([answer[end]]))
    script = Script(PROMPT + answer)
    request = DecodeLoop(stopping, script, recorder).complete(PROMPT, GenerationParams(num_draft_tokens=8))
    (cut,) = recorder.feedback
    assert (cut.num_rows, cut.num_draft_tokens, cut.is_last) == (end + 1, 8, True)
    assert request.stats.accepted == end
    assert request.trace.num_features == len(request.trace.token_ids) - 1


def test_feedback_says_whose_it_is():
    recorder = Recorder()
    tags = {"request_id": "r7", "domain": "sql", "tenant": "acme"}
    loop = DecodeLoop(TARGET, Ngram(), recorder)
    request = loop.complete(PROMPT, GenerationParams(20, sampling=SOFT), **tags)
    for record in recorder.feedback:
        assert (record.request_id, record.domain, record.tenant) == ("r7", "sql", "acme")
        assert (record.target_fingerprint, record.temperature) == ("random-0", 1.0)
    assert [record.is_last for record in recorder.feedback] == [False] * (request.stats.steps - 1) + [True]


def test_feedback_points_at_the_states_that_made_the_targets_rows(drafter):
    recorder = Recorder()
    request = DecodeLoop(TARGET, drafter, recorder).complete(PROMPT, GenerationParams(30))
    text = request.trace.token_ids
    positions = [record.start + i for record in recorder.feedback for i in range(record.num_rows)]
    assert positions == list(range(len(PROMPT) - 1, len(text) - 1))
    logits = TARGET.decoder.head(request.trace.features.final_SD[positions])
    assert logits.argmax(-1).tolist() == [text[i + 1] for i in positions]


records = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=12)


@steady
@given(steps=records, max_rows=st.integers(1, 20))
def test_newest_rows_are_the_newest_records_that_fit(steps, max_rows):
    traces = [Trace([], Features(torch.empty(0, 1))) for _ in range(3)]
    feedback = [
        Feedback(traces[owner], start, num_rows, num_draft_tokens=6, num_accepted=num_rows - 1, weights_version=0)
        for start, (owner, num_rows) in enumerate(steps)
    ]
    kept = newest_rows(feedback, max_rows)
    newest = feedback[-len(kept) :]
    assert {record.start for record in kept} == {record.start for record in newest}
    rows = sum(record.num_rows for record in kept)
    assert rows <= max_rows or len(kept) == 1
    if len(kept) < len(feedback):
        assert rows + feedback[-len(kept) - 1].num_rows > max_rows
    for trace in traces:
        starts = [record.start for record in kept if record.trace is trace]
        assert starts == sorted(starts)
    owners = [id(record.trace) for record in kept]
    assert sum(a != b for a, b in pairwise(owners)) == len(set(owners)) - 1


def test_learning_together_equals_no_learning_in_tokens(drafter):
    jobs = [(PROMPT[i:], GenerationParams(30)) for i in range(4)]
    done = run_together(DecodeLoop(TARGET, drafter, learn(drafter, step_size=0.1)), jobs, max_running=2)
    assert [request.output_ids for request in done] == [plain_ids(PROMPT[i:], 30) for i in range(4)]
    assert sum((request.stats for request in done), DecodeStats()).requests == 4


@pytest.mark.parametrize(
    ("settings", "interval"),
    [({}, 64), ({"full_loss": 2.0}, 32), ({"full_loss": 0.0}, 16), ({"loss": "jsd"}, 16)],
    ids=["4 nats for cross-entropies", "as given", "never", "never in other units"],
)
def test_rounds_are_rarer_below_the_settings_own_full_loss(settings, interval):
    schedule = InlineLearning(Eagle.fresh(TARGET), config=LearnConfig(**settings)).schedule
    schedule.observe_round(1.0)
    assert schedule.interval == interval
