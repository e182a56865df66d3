"""Which weights come to be served. Most of it with a drafter that is a table, so that acceptance is a known number."""

import gc
import logging
import math
import weakref
from dataclasses import replace
from functools import cache
from itertools import count, pairwise
from random import Random

import pytest
import rigs
import torch
from rigs import Recorder, run_together
from toy import TableTarget

from onlinespec import load_drafter
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DrafterWeights, Features, Feedback, Trace
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.eagle import Eagle
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners.losses import TargetRows, cross_entropy
from onlinespec.learning.budget import Budget, ClockMeter
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.update import InlineLearning
from onlinespec.lossless.noise import gumbel, uniforms
from onlinespec.publishing.gate import Publisher
from onlinespec.publishing.paired import Lengths, PairedTest, RequestOrder, lengths_of, paired, run_of
from onlinespec.publishing.settings import PublishConfig
from onlinespec.publishing.workers import TrainerSpec

VOCAB = 6
TARGET = TableTarget(VOCAB, seed=0)
DEFAULTS = PublishConfig()


class Bigram(Drafter):
    """Drafts from a table by the last token; its weights are the logits. The target is a table too."""

    is_trainable = True

    def __init__(self, logits_VV, target_logits_VV=None):
        self.weights = DrafterWeights({"logits": logits_VV}, version=0)
        self.target_logits_VV = TARGET.logits if target_logits_VV is None else target_logits_VV

    fresh = load = save = start = propose = observe = release = None

    def batch(self, feedback, replayed=(), rejected_only=False):
        return list(feedback)

    def rows(self, candidates, batch, num_depths=1):
        first, last = batch[0].start, batch[-1].start + batch[-1].num_rows
        ids = torch.tensor(batch[0].trace.token_ids)[first : last + 1]
        temperatures = torch.full((len(ids) - 1,), batch[0].temperature)
        keys = torch.tensor([(batch[0].seed, batch[0].choice, at) for at in range(first + 1, last + 1)])
        target = TargetRows(self.target_logits_VV[ids[:-1]].softmax(-1), ids[1:], temperatures, keys)
        logits = torch.stack([params["logits"][ids[:-1]] for params in candidates])
        depths = range(min(num_depths, len(ids) - 1))
        return [(logits[:, depth:], target.take(torch.arange(depth, len(ids) - 1))) for depth in depths]


Bigram.__abstractmethods__ = frozenset()


@cache
def text(seed, num_tokens, table=TARGET, sampling=None):
    """Token ids that the table says, greedy by default (from a start that the seed chooses)."""
    rows, ids = table.rows(sampling or SamplingParams()).log(), [seed % VOCAB]
    while len(ids) < num_tokens:
        noise_V = gumbel(uniforms(seed, 0, len(ids), VOCAB))
        ids.append(int((rows[ids[-1]] + noise_V).argmax()))
    return tuple(ids)


def request(name, ids, temperature=0.0, version=0, num_accepted=0, num_draft_tokens=4, seed=0):
    """The Feedback of a request whose every step kept as many drafts; the prompt is one token."""
    trace, size = Trace(list(ids), Features(torch.zeros(len(ids) - 1, 1)), len(ids) - 1), num_accepted + 1
    starts = range(0, len(ids) - 1, size)
    return [
        Feedback(
            trace, start, min(size, len(ids) - 1 - start), num_draft_tokens, num_accepted, version, request_id=name,
            temperature=temperature, seed=seed, is_last=start == starts[-1],
        )
        for start in starts
    ]  # fmt: skip


def traffic(numbers, version=0, table=TARGET, temperature=1.0, num_accepted=0, num_tokens=24):
    """Finished requests, one after the other; sampled ones by default, so that texts differ."""
    for i in numbers:
        ids = text(i, num_tokens, table, SamplingParams(temperature))
        yield request(f"r{i}", ids, temperature, version, num_accepted, seed=i)


def better_and_worse(strength=1.0, seed=1):
    """Logits near the target's, and some that are not."""
    noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return TARGET.logits + 0.1 * noise, TARGET.logits + 3 * strength * noise


# What weights would have kept


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_weights_would_have_kept_is_what_they_keep_when_they_draft(temperature):
    """At every position: drafts from there on, with the noise of their positions, as far as they are the text's own."""
    logits, K = better_and_worse(0.3)[1], 3
    num_kept = 0
    for seed, records in zip(range(20), traffic(range(20), temperature=temperature, num_tokens=12), strict=True):
        ids, kept, first = records[0].trace.token_ids, 0, 0
        for anchor in range(len(ids) - 1):
            depth = 0
            while depth < min(K, len(ids) - 1 - anchor):
                at = anchor + depth
                scores = logits[ids[at]] / temperature + gumbel(uniforms(seed, 0, at + 1, VOCAB))
                if int(scores.argmax()) != ids[at + 1]:
                    break
                depth += 1
            kept, first = kept + depth, first + (depth > 0)
        assert lengths_of(Bigram(logits), [{"logits": logits}], records, K) == (len(ids) - 1, (kept,), (first,))
        num_kept += kept
    assert 0.2 < num_kept / (20 * 11) < 2.8  # neither nothing nor everything


def test_greedy_counts_the_drafts_that_say_what_the_text_says():
    wrong = TARGET.logits.clone()
    wrong[2, wrong[2].argmax()] = -99.0  # wrong behind token 2, and there alone
    ids = text(0, 30)
    lengths = lengths_of(Bigram(wrong), [{"logits": TARGET.logits}, {"logits": wrong}], request("a", ids), 4)
    is_right = [token_id != 2 for token_id in ids[:-1]]
    runs = [next((k for k in range(4) if not [*is_right[n : n + 4], False][k]), 4) for n in range(29)]
    assert lengths.accepted == (4 * 26 + 3 + 2 + 1, sum(runs))
    assert lengths.first == (29, sum(is_right))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_draft_nothing_finite_keep_nothing(temperature):
    lost = {"logits": TARGET.logits * torch.nan}
    (records,) = traffic([3], temperature=temperature)
    kept, nothing = lengths_of(Bigram(TARGET.logits), [{"logits": TARGET.logits}, lost], records, 4).accepted
    assert kept > nothing == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_ruled_out_costs_nothing_where_it_is_not_wanted(temperature):
    never = TARGET.logits.argmin()
    ruled_out = TARGET.logits.index_put((never // VOCAB, never % VOCAB), torch.tensor(-torch.inf))
    (records,) = traffic([3], temperature=temperature)
    all_of_them, but_one = lengths_of(
        Bigram(TARGET.logits), [{"logits": TARGET.logits}, {"logits": ruled_out}], records, 4
    ).accepted
    assert but_one == pytest.approx(all_of_them, rel=0.05)


def test_records_of_several_requests_at_once_are_refused():
    drafter = Eagle.fresh(rigs.random_target())
    recorder = Recorder()
    for i in range(2):
        DecodeLoop(rigs.random_target(), drafter, recorder).complete([5 + i, 9, 77], GenerationParams(12))
    with pytest.raises(ValueError, match=r"depth 1 has \d+ rows for \d+ positions; give the records of one request"):
        lengths_of(drafter, [drafter.weights.params], recorder.feedback, 4)


@pytest.fixture(scope="module")
def learned():
    """A target, and weights that learned some of its answers by heart."""
    target = rigs.random_target()
    drafter = Eagle.fresh(target)
    config = parse_learner("online_gradient/step_size=5e-3/min_interval=12/max_interval=12/replay_every=0/budget=inf")
    loop = DecodeLoop(target, drafter, InlineLearning(drafter, config=config))
    jobs = [([5, 9, 200 + i % 2, 31], GenerationParams(24, num_draft_tokens=0)) for i in range(20)]
    run_together(loop, jobs, max_running=2)
    return target, drafter


def test_it_agrees_with_what_a_real_drafter_has_kept(learned):
    """At K = 1 every step begins where a text says; over all positions, drafted one by one."""
    target, drafter = learned
    recorder = Recorder()
    request_ = DecodeLoop(target, drafter, recorder).complete([5, 9, 201, 31], GenerationParams(24))
    ids, kept = request_.trace.token_ids, 0
    for n in range(3, len(ids) - 1):
        limit = min(4, len(ids) - 1 - n)
        loop = DecodeLoop(target, drafter, again := Recorder())
        loop.step([request := loop.start(ids[: n + 1], GenerationParams(5))])
        loop.finish(request)
        kept += min(again.feedback[0].num_accepted, limit)
    lengths = lengths_of(drafter, [drafter.weights.params], recorder.feedback, 4)
    assert lengths.num_anchors == len(ids) - 4
    assert lengths.accepted[0] == pytest.approx(kept, abs=2)  # drafting rounds its products otherwise
    assert kept > 24


# Two sets of weights by their lengths


def drawn_lengths(rng, gain=0.0):
    """Of one request: skewed, of any length, both sets alike but for the gain; most of what is drawn they share."""
    num_anchors, ease = rng.randint(4, 64), rng.expovariate(1.0)
    own = [ease + rng.expovariate(2.0) + each for each in (0.0, gain)]
    return Lengths(num_anchors, tuple(num_anchors * one for one in own), (0.0, 0.0))


def test_figures_are_means_over_positions_and_errors_over_requests():
    few = [Lengths(10, (10.0, 15.0), (5.0, 8.0)), Lengths(30, (30.0, 60.0), (20.0, 25.0))]
    figures = paired(few, 0.05)
    assert (figures.num_requests, figures.num_anchors) == (2, 40)
    assert (figures.served_length, figures.other_length) == (2.0, 2.875)
    assert (figures.served_acceptance_prob, figures.other_acceptance_prob) == (25 / 40, 33 / 40)
    assert figures.difference == 0.875
    assert figures.standard_error == pytest.approx(math.sqrt(2 * 2 * 3.75**2) / 40)


def test_the_error_is_that_of_many_draws():
    rng = Random(1)
    drawn = [paired([drawn_lengths(rng) for _ in range(40)], 0.05) for _ in range(400)]
    spread = math.sqrt(sum(figures.difference**2 for figures in drawn) / len(drawn))
    told = sum(figures.standard_error for figures in drawn) / len(drawn)
    assert told == pytest.approx(spread, rel=0.1)


def test_equal_weights_are_neither_better_nor_worse():
    figures = paired([Lengths(10 + i, (7.0 + i, 7.0 + i), (1.0, 1.0)) for i in range(20)], 0.05)
    assert (figures.difference, figures.is_other_better, figures.is_served_better) == (0.0, False, False)


# Trials


def trial(served, candidate, config=DEFAULTS, **options):
    drafter = Bigram(served)
    looks, order = config.test_looks, RequestOrder()
    return PairedTest(drafter, {"logits": served}, {"logits": candidate}, looks, config, order, since=0, **options)


def drawn_trials(monkeypatch, gain, num_streams):
    """Of trials on drawn lengths, the shares that end with the candidate better, and with it worse."""
    better = worse = 0
    for seed in range(num_streams):
        rng = Random(f"{seed}/{gain}")
        monkeypatch.setattr("onlinespec.publishing.paired.lengths_of", lambda *asked, rng=rng: drawn_lengths(rng, gain))
        each, figures = trial(TARGET.logits, TARGET.logits), None
        while not each.is_over and not (figures and (figures.is_other_better or figures.is_served_better)):
            each.offer(request("", [0, 1]))  # one step; its lengths are drawn
            figures = each.look()
        better += figures.is_other_better
        worse += figures.is_served_better
    return better / num_streams, worse / num_streams


@pytest.mark.parametrize("num_streams", [200, pytest.param(400, marks=pytest.mark.full)])
def test_equal_weights_are_hardly_ever_taken_for_better_or_worse(monkeypatch, num_streams):
    better, worse = drawn_trials(monkeypatch, 0.0, num_streams)
    assert better <= 0.05
    assert worse <= 0.05


@pytest.mark.parametrize(("gain", "least"), [(0.4, 0.6), (0.8, 0.98)])
def test_better_weights_are_taken_for_better(monkeypatch, gain, least):
    """One request's difference spreads by 0.7 drafts per step; up to 32 requests."""
    better, worse = drawn_trials(monkeypatch, gain, num_streams=100)
    assert better >= least
    assert worse == 0


def test_a_trial_looks_after_so_many_requests_and_then_is_over():
    each, looks = trial(*better_and_worse()), []
    for i, records in enumerate(traffic(range(60)), start=1):
        each.offer(records)
        if figures := each.look():
            looks.append((i, figures.num_requests))
    assert looks == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert each.is_over


def test_what_came_meanwhile_is_compared_one_request_at_a_time():
    each = trial(*better_and_worse())
    for records in traffic(range(20)):
        each.offer(records)
    looks = [each.look() for _ in range(20)]
    assert [i for i, figures in enumerate(looks, start=1) if figures] == [4, 8, 16]
    assert each.num_requests == 20
    assert each.look() is None


def test_what_other_versions_drafted_is_no_evidence_where_one_is_asked_for():
    each = trial(*better_and_worse(), version=3)
    for records in traffic(range(40), version=2):
        each.offer(records)
    assert each.look() is None
    for records in traffic(range(8), version=3):
        each.offer(records)
        each.look()
    assert each.num_requests == 8


def test_several_choices_of_one_request_count_once():
    each, counted = trial(*better_and_worse()), []
    for number in range(8):
        for choice in range(3):
            records = request(f"request {number}", text(10 * number + choice, 40))
            each.offer([replace(record, choice=choice) for record in records])
        each.look()
        counted.append(each.num_requests)
    assert counted == [1, 2, 3, 4, 5, 6, 7, 8]


def test_requests_wait_within_a_bound_and_keep_no_live_trace():
    one = 24 * 8 + 23 * 4
    each = trial(*better_and_worse(), config=PublishConfig(megabytes=9.5 * one / 1e6))
    traces = []
    for records in traffic(range(20)):
        each.offer(records)
        traces.append(weakref.ref(records[0].trace))
    del records
    gc.collect()
    assert not any(trace() for trace in traces)
    for _ in range(20):
        each.look()
    assert each.num_requests == 10


def test_of_a_long_request_some_rows_are_compared_wherever_they_are():
    places = set()
    for records in traffic(range(60), num_tokens=80, num_accepted=2):
        run = run_of(records, 16)
        assert 13 < sum(record.num_rows for record in run) <= 16
        assert all(a.start + a.num_rows == b.start for a, b in pairwise(run))
        places.add(run[0].start)
    assert len(places) > 8


def test_behind_a_gap_in_the_feedback_the_request_goes_on():
    records = request("a", text(0, 40), num_accepted=1)
    del records[3]
    run = run_of(records, 1000)
    assert run[0].start == 8
    assert len(run) == len(records) - 3


# What is served


def publisher_with(served_logits, **options):
    return Publisher(Bigram(served_logits), PublishConfig(), **options)


def tried(publisher, candidate, requests):
    """What `check` first says of a candidate while requests come in, and after how many of them."""
    publisher.propose({"logits": candidate})
    return checks(publisher, requests)


def test_a_better_candidate_is_served_under_the_next_number():
    good, bad = better_and_worse()
    publisher = publisher_with(bad)
    weights, num_requests = tried(publisher, good, traffic(range(80)))
    assert num_requests == 4
    assert (weights.version, weights.params["logits"]) == (1, good)
    assert publisher.served is weights
    (event,) = publisher.history
    assert (event.kind, event.version, event.parent) == ("promoted", 1, 0)
    assert event.paired.other_length > event.paired.served_length
    assert "acceptance length" in event.reason
    assert publisher.has_canary
    assert publisher.wants_candidate


def test_what_came_before_a_candidate_is_no_evidence_for_it():
    good, bad = better_and_worse()
    publisher = publisher_with(bad)
    for records in traffic(range(80)):
        publisher.offer(records)
    publisher.propose({"logits": good})
    assert publisher.check() is None


def halves(numbers, **options):
    """The same requests running at once: the first halves of all, then the second halves."""
    whole = list(traffic(numbers, **options))
    middle = len(whole[0]) // 2
    return [r for records in whole for r in records[:middle]], [r for records in whole for r in records[middle:]]


def test_requests_that_ran_when_a_candidate_was_made_are_no_evidence_for_it():
    """It has learned from their beginnings, which what is served has not."""
    good, bad = better_and_worse()
    publisher = publisher_with(bad)
    beginnings, ends = halves(range(40))
    publisher.offer(beginnings)
    publisher.propose({"logits": good})
    publisher.offer(ends)
    assert not any(publisher.check() for _ in range(40))
    assert publisher._paired_test.num_requests == 0
    weights, num_requests = checks(publisher, traffic(range(40, 80)))
    assert (weights.version, num_requests) == (1, 4)


def test_a_choice_of_a_request_that_ran_when_a_candidate_was_made_is_no_evidence_either():
    """Another choice of it was learned from: the same prompt, and often the same words."""
    good, bad = better_and_worse()
    publisher = publisher_with(bad)
    for records in traffic(range(8)):
        publisher.offer(records)
    publisher.propose({"logits": good})
    for records in traffic(range(8)):
        publisher.offer([replace(record, choice=1) for record in records])
        assert publisher.check() is None
    assert publisher._paired_test.num_requests == 0


def test_requests_that_ran_when_what_is_served_was_made_are_no_evidence_against_what_came_before():
    """Watch and collapse, then the way back: of requests whose beginnings only one of the two has learned."""
    publisher = publisher_with(OTHER_TRAFFIC.logits)
    beginnings, ends = halves(range(500, 520), version=1, num_accepted=0)
    publisher.offer(beginnings)
    assert tried(publisher, TARGET.logits, traffic(range(80)))[0].version == 1
    publisher._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    publisher.offer(ends)
    assert not any(publisher.check() for _ in range(30))
    assert publisher._canary.num_requests == 0
    assert publisher._health_check.num_steps == 0
    publisher.on_drift()  # the way back is looked for beside the watch
    more_beginnings, more_ends = halves(range(600, 608), version=1, table=OTHER_TRAFFIC, num_accepted=1)
    publisher.offer(more_beginnings)
    assert publisher._fallback is not None
    publisher.offer(more_ends)
    weights = next(filter(None, (publisher.check() for _ in range(30))))
    assert publisher.history[-1].kind == "returned"  # by those that began after it was made, running or not
    assert weights.version == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_candidate_that_is_no_better_is_refused(temperature):
    good, bad = better_and_worse()
    for served, candidate in ((good, bad), (good, good.clone()), (good, good * 1.0001)):
        publisher = publisher_with(served)
        assert tried(publisher, candidate, traffic(range(80), temperature=temperature))[0] is None
        assert [event.kind for event in publisher.history] == ["refused"]
        assert publisher.served.version == 0
        assert publisher.wants_candidate


@pytest.mark.parametrize(
    ("num_requests", "expected"),
    [(70, [0, 8, 16, 24]), pytest.param(480, [0, 8, 16, 24, 32, 40, 48, 56, 64, 64], marks=pytest.mark.full)],
)
def test_candidates_that_are_refused_come_up_less_and_less_often(num_requests, expected):
    good, bad = better_and_worse()
    publisher, begun = publisher_with(good), []
    for i, records in enumerate(traffic(range(num_requests))):
        if publisher.wants_candidate:
            publisher.propose({"logits": bad})
            begun.append(i)
        publisher.offer(records)
        publisher.check()
    gaps = [later - one - 4 for one, later in pairwise(begun)]
    assert gaps[: len(expected)] == expected


def test_a_candidate_that_is_like_what_is_served_is_undecided_after_eight_requests():
    publisher = publisher_with(TARGET.logits)
    publisher.propose({"logits": TARGET.logits.clone()})
    undecided = []
    for records in traffic(range(32)):
        publisher.offer(records)
        publisher.check()
        undecided.append(publisher.is_undecided)
    assert undecided == [False] * 7 + [True] * 24 + [False]  # looked at then; over after the last look
    assert publisher.history[-1].kind == "refused"


def test_what_is_on_trial_when_the_traffic_moves_is_dropped():
    good, bad = better_and_worse()
    publisher = publisher_with(good)
    for i in range(3):
        assert tried(publisher, bad, traffic(range(8 * i, 8 * i + 8)))[0] is None
        publisher._pause = 0
    publisher.propose({"logits": bad})
    assert not publisher.wants_candidate
    publisher.on_drift()
    assert publisher.wants_candidate
    assert tried(publisher, bad, traffic(range(24, 32)))[0] is None
    assert publisher.wants_candidate  # as after a first refusal


def test_a_lower_training_loss_is_no_reason_to_promote():
    """More certain of the text, and yet never of its token first: the loss falls, and so does acceptance."""
    own = torch.eye(VOCAB)[TARGET.logits.argmax(-1)]
    other = torch.eye(VOCAB)[(TARGET.logits.argmax(-1) + 1) % VOCAB]
    served, candidate = (own * 0.3 + 0.14), (own * 0.49 + other * 0.5 + 0.0025)
    publisher = publisher_with(served.log())
    (records,) = traffic([0], temperature=0.0)
    ((logits, rows),) = Bigram(served).rows([{"logits": served.log()}, {"logits": candidate.log()}], records)
    losses = cross_entropy(logits, rows).mean(-1)
    assert losses[1] < losses[0]
    assert tried(publisher, candidate.log(), traffic(range(80), temperature=0.0))[0] is None
    assert publisher.history[0].paired.other_length == 1.0
    assert publisher.history[0].kind == "refused"


def test_a_candidate_that_is_not_finite_is_refused_once_and_never_raises(caplog):
    publisher = publisher_with(TARGET.logits)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        for bad in (math.nan, math.inf, math.nan):
            publisher.propose({"logits": TARGET.logits * bad})
            assert publisher.check() is None
    assert [event.reason for event in publisher.history] == ["the candidate's weights are not finite"]
    assert len(caplog.records) == 1
    assert publisher.served.version == 0


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ({"logits": torch.zeros(3, 3)}, r"logits is \(\(3, 3\), torch.float32\) in the candidate and \(\(6, 6\)"),
        ({"logits": TARGET.logits.half()}, "torch.float16"),
        ({}, "logits is no such tensor in the candidate"),
        ({"logits": TARGET.logits, "more": torch.zeros(1)}, "more is .* and no such tensor in what is served"),
    ],
)
def test_a_candidate_of_another_shape_is_refused_by_name(candidate, words):
    with pytest.raises(ValueError, match=words):
        publisher_with(TARGET.logits).propose(candidate)


def test_a_number_that_was_used_is_not_given_again():
    with pytest.raises(ValueError, match="next_version is 0, but version 0 is served already"):
        publisher_with(TARGET.logits, next_version=0)
    good, bad = better_and_worse()
    publisher = publisher_with(bad, next_version=40)
    assert tried(publisher, good, traffic(range(80)))[0].version == 40


# After a promotion


def promoted(served, candidate, **options):
    """A publisher that has just promoted a candidate."""
    publisher = publisher_with(served, **options)
    assert tried(publisher, candidate, traffic(range(80)))[0].version == 1
    return publisher


def checks(publisher, requests):
    """The first answer of `check` while requests come in, and after how many of them."""
    for num_requests in count(1):
        records = next(requests, None)
        if records is None:
            return None, num_requests
        publisher.offer(records)
        if weights := publisher.check():
            return weights, num_requests


OTHER_TRAFFIC = TableTarget(VOCAB, seed=5)


def test_a_version_that_is_worse_on_newer_traffic_is_rolled_back_under_a_new_number(caplog):
    """The gate was right about the old traffic; then another came, which the start was made for."""
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    publisher._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        newer = traffic(range(100, 200), version=1, table=OTHER_TRAFFIC, num_accepted=1)
        weights, num_requests = checks(publisher, newer)
    assert num_requests == 16
    assert weights.version == 2
    assert weights.params["logits"] is OTHER_TRAFFIC.logits
    event = publisher.history[-1]
    assert (event.kind, event.version, event.parent, event.restores) == ("rolled back", 2, 1, 0)
    assert event.paired.other_length > event.paired.served_length
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "version 1 is rolled back: its successor 2 is version 0 again" in caplog.text
    assert not publisher.has_canary
    assert checks(publisher, traffic(range(200, 300), version=2))[0] is None


def test_a_version_that_keeps_its_promise_is_confirmed_and_watched_no_more():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    assert checks(publisher, traffic(range(100, 200), version=1, num_accepted=2))[0] is None
    assert [event.kind for event in publisher.history] == ["promoted", "confirmed"]
    assert publisher.served.version == 1
    assert not publisher.has_canary


def test_what_the_old_version_served_says_nothing_of_the_new_one():
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    assert checks(publisher, traffic(range(100, 200), version=0, table=OTHER_TRAFFIC))[0] is None
    assert publisher.has_canary


def test_a_swap_that_went_wrong_is_taken_back_whatever_the_weights_say():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    weights, num_requests = checks(publisher, traffic(range(100, 200), version=1, num_accepted=0))
    assert weights.version == 2
    assert num_requests == 4  # of 23 steps each
    assert "kept in 0% of 92 steps, where these weights should have kept" in publisher.history[-1].reason


def test_drafts_that_fail_because_the_traffic_has_moved_are_no_collapse():
    """What is served drafts badly there, and on paper, too; so did what came before it."""
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    new = replace(TARGET, spread=-5 * TARGET.spread)
    publisher._drafter.target_logits_VV = new.logits
    publisher._origin = publisher.previous = publisher.served
    for records in traffic(range(100, 112), version=1, table=new, num_accepted=0):
        publisher.offer(records)
        publisher.check()
    assert publisher._canary.served_acceptance_prob < 0.2
    assert not any("was kept in" in event.reason for event in publisher.history)


def test_one_odd_text_is_no_collapse():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    publisher.offer(request("odd", text(0, 400), version=1, num_accepted=0))
    assert publisher.check() is None


def test_a_restart_goes_on_watching():
    first = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    again = publisher_with(
        TARGET.logits, served=first.served, next_version=first.next_version, promoted=first.history[-1],
        previous=DrafterWeights({"logits": OTHER_TRAFFIC.logits}, 0),
    )  # fmt: skip
    again._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    weights, _ = checks(again, traffic(range(100, 200), version=1, table=OTHER_TRAFFIC, num_accepted=1))
    assert weights.version == 2


def test_a_promotion_while_the_last_is_watched_can_still_go_back_to_what_is_known_to_be_good():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    longer = traffic(range(100, 130), version=1, num_accepted=2, num_tokens=40)
    weights, num_requests = tried(publisher, TARGET.logits, longer)
    assert weights.version == 2
    assert num_requests < 16  # before the watch looks for the first time
    assert publisher.previous.version == 0


def test_a_rollback_ends_a_trial_against_what_is_served_no_more():
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    publisher._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    newer = traffic(range(100, 200), version=1, table=OTHER_TRAFFIC, num_accepted=1)
    for _ in range(12):
        publisher.offer(next(newer))
    publisher.propose({"logits": TARGET.logits.clone()})
    weights, _ = checks(publisher, newer)
    assert weights.version == 2
    assert publisher.wants_candidate


# The way back to what learning began with


def away(**options):
    """A publisher that serves something learned; it began with what fits other traffic."""
    origin = DrafterWeights({"logits": OTHER_TRAFFIC.logits}, 0)
    served = DrafterWeights({"logits": TARGET.logits}, 7)
    return publisher_with(TARGET.logits, served=served, origin=origin, **options)


def test_old_traffic_that_comes_back_finds_the_drafter_that_fits_it(caplog):
    publisher = away()
    publisher._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    publisher.propose({"logits": TARGET.logits.clone()})
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        weights, num_requests = checks(publisher, traffic(range(100), version=7, table=OTHER_TRAFFIC))
    assert (weights.version, num_requests) == (8, 4)
    assert weights.params["logits"] is OTHER_TRAFFIC.logits
    event = publisher.history[-1]
    assert (event.kind, event.version, event.parent, event.restores) == ("returned", 8, 7, 0)
    assert "version 7 makes way for version 0, which learning began with, now 8" in caplog.text
    assert publisher.wants_candidate  # the one on trial was compared with what is served no more
    assert checks(publisher, traffic(range(100, 300), version=8, table=OTHER_TRAFFIC))[0] is None


def test_while_what_was_learned_fits_it_stays_and_the_first_is_asked_rarely(monkeypatch):
    publisher, begun = away(), []
    against = publisher._against
    monkeypatch.setattr(publisher, "_against", lambda *args: begun.append(len(seen)) or against(*args))
    seen = []
    for records in traffic(range(60), version=7):
        publisher.offer(records)
        seen.append(records)
        assert publisher.check() is None
    assert begun == [0, 27, 54]  # judged at the fourth request, and begun again at the 24th behind it
    assert not publisher.history


def test_a_watch_over_the_first_promotion_is_the_way_back_unless_the_traffic_moves():
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    publisher._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    newer = traffic(range(100, 200), version=1, table=OTHER_TRAFFIC, num_accepted=1)
    for _ in range(4):
        publisher.offer(next(newer))
    publisher.on_drift()
    weights, num_requests = checks(publisher, newer)
    assert (publisher.history[-1].kind, weights.version, num_requests) == ("returned", 2, 4)
    assert not publisher.has_canary


def test_a_restart_knows_what_learning_began_with(tmp_path):
    target = rigs.random_target()
    spec = TrainerSpec("eagle")
    served = DrafterWeights({n: p + 0.01 for n, p in load_drafter("eagle", target).weights.params.items()}, 3)
    publisher = spec.trainer(target, served, Budget(1.0, ClockMeter())).publisher
    first = load_drafter("eagle", target).weights.params
    assert all(torch.equal(publisher._origin.params[name], first[name]) for name in first)
    assert publisher.served.version == 3


def test_the_same_feedback_gives_the_same_history():
    histories = []
    for _ in range(2):
        good, bad = better_and_worse()
        publisher = promoted(bad, good)
        checks(publisher, traffic(range(100, 200), version=1, num_accepted=2))
        histories.append([timeless(event) for event in publisher.history])
    assert histories[0] == histories[1]


def timeless(event):
    return (event.kind, event.version, event.reason, event.paired)


# With a drafter that learns


def test_a_learned_drafter_is_promoted_on_requests_it_never_saw_and_its_start_is_refused(learned):
    target, drafter = learned
    start = Eagle.fresh(target).weights

    def served(numbers):
        loop = DecodeLoop(target, drafter, recorder := Recorder())
        for i in numbers:
            loop.complete([5, 9, 200 + i % 2, 31], GenerationParams(24), request_id=str(i))
        return recorder.feedback

    publisher = Publisher(drafter, PublishConfig(), served=start)
    publisher.propose(drafter.weights.params)
    publisher.offer(served(range(12)))
    weights = next(filter(None, (publisher.check() for _ in range(12))))
    assert weights.version == 1
    assert publisher.history[0].paired.other_length > publisher.history[0].paired.served_length + 0.5
    publisher.propose(start.params)
    publisher.offer(served(range(12, 24)))
    assert not any(publisher.check() for _ in range(12))
    assert publisher.history[-1].kind == "refused"
