"""Which weights come to be served. Most of it with a drafter that is a table, so that acceptance is a known number."""

import gc
import logging
import math
import weakref
from dataclasses import replace
from itertools import count
from random import Random

import pytest
import rigs
import torch
from rigs import Recorder
from toy import TableTarget, chi_square_p, enumerate_law

from onlinespec import publish
from onlinespec.config import GenerationParams, PublishConfig, SamplingParams
from onlinespec.core import DrafterWeights, Feedback, Trace
from onlinespec.decode import DecodeLoop
from onlinespec.drafters.base import Drafter
from onlinespec.drafters.eagle import Eagle
from onlinespec.learn import InlineLearning
from onlinespec.losses import TargetRows, cross_entropy
from onlinespec.methods import parse
from onlinespec.publish import Gate, HoldOut, Lengths, Publisher, Watch, lengths_of, paired

VOCAB = 6
TARGET = TableTarget(VOCAB, seed=0)
QUICK = PublishConfig(holdout_every=2, new_requests=4)


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
        ids = torch.tensor(batch[0].trace.token_ids)[batch[0].start : batch[-1].start + batch[-1].num_rows + 1]
        temperatures = torch.full((len(ids) - 1,), batch[0].temperature)
        target = TargetRows(self.target_logits_VV[ids[:-1]].softmax(-1), ids[1:], temperatures)
        logits = torch.stack([params["logits"][ids[:-1]] for params in candidates])
        depths = range(min(num_depths, len(ids) - 1))
        return [(logits[:, depth:], TargetRows(*(part[depth:] for part in target))) for depth in depths]


Bigram.__abstractmethods__ = frozenset()


def text(seed, num_tokens, table=TARGET, sampling=None):
    """Token ids that the table says, greedy by default (from a start that the seed chooses)."""
    rows = table.rows(sampling or SamplingParams())
    generator, ids = torch.Generator().manual_seed(seed), [seed % VOCAB]
    while len(ids) < num_tokens:
        ids.append(int(rows[ids[-1]].multinomial(1, generator=generator)))
    return ids


def request(name, ids, temperature=0.0, version=0, num_accepted=0, num_draft_tokens=4):
    """The Feedback of a request whose every step kept as many drafts; the prompt is one token."""
    trace, size = Trace(list(ids), torch.zeros(len(ids) - 1, 1), len(ids) - 1), num_accepted + 1
    starts = range(0, len(ids) - 1, size)
    return [
        Feedback(
            trace, start, min(size, len(ids) - 1 - start), num_draft_tokens, num_accepted, version, request_id=name,
            temperature=temperature, is_last=start == starts[-1],
        )
        for start in starts
    ]  # fmt: skip


def traffic(numbers, version=0, table=TARGET, temperature=1.0, num_accepted=0, num_tokens=40):
    """Finished requests, one after the other; sampled ones by default, so that texts differ."""
    for i in numbers:
        ids = text(i, num_tokens, table, SamplingParams(temperature))
        yield request(f"r{i}", ids, temperature, version, num_accepted)


def better_and_worse(strength=1.0, seed=1):
    """Logits near the target's, and some that are not."""
    noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return TARGET.logits + 0.1 * noise, TARGET.logits + 3 * strength * noise


def offered(publisher, requests):
    for records in requests:
        publisher.offer(records)


# What weights would have kept


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_expected_number_of_kept_drafts_is_unbiased(temperature):
    """Over all texts that the target can say: the mean equals what verification keeps of such drafts, exactly."""
    num_tokens, K = 4, 3
    drafter = Bigram(better_and_worse(0.3)[1])
    draft_VV = (drafter.weights.params["logits"] / temperature).softmax(-1)
    target_VV = TARGET.rows(SamplingParams(temperature))
    kept_VV = torch.minimum(draft_VV, target_VV)

    def kept_from(token_id, depth):
        return sum(float(kept_VV[token_id, v]) * (1 + kept_from(v, depth - 1)) for v in range(VOCAB)) if depth else 0

    place_V = torch.zeros(VOCAB).index_fill_(0, torch.tensor(0), 1.0)
    expected = 0.0
    for position in range(num_tokens):
        depth = min(K, num_tokens - position)
        expected += sum(float(place_V[v]) * kept_from(v, depth) for v in range(VOCAB))
        place_V = place_V @ target_VV
    law = enumerate_law(target_VV, first_token=0, length=num_tokens)
    mean = 0.0
    for place, chance in enumerate(law.tolist()):
        ids = [0, *(place // VOCAB**i % VOCAB for i in reversed(range(num_tokens)))]
        lengths = lengths_of(drafter, [drafter.weights.params], request("a", ids, temperature), K)
        assert lengths.num_anchors == num_tokens
        mean += chance * lengths.accepted[0]
    assert mean == pytest.approx(expected, rel=1e-4)


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
    config = parse("online_gradient/step_size=5e-3/min_interval=24/max_interval=24/replay_every=0/budget=inf")
    loop = DecodeLoop(target, drafter, InlineLearning(drafter, config=config))
    for i in range(40):
        loop.complete([5, 9, 200 + i % 4, 31], GenerationParams(40))
    return target, drafter


def test_it_agrees_with_what_a_real_drafter_has_kept(learned):
    """At K = 1 every step begins where a text says; over all positions, drafted one by one."""
    target, drafter = learned
    recorder = Recorder()
    request_ = DecodeLoop(target, drafter, recorder).complete([5, 9, 202, 31], GenerationParams(40))
    ids, kept = request_.trace.token_ids, 0
    for n in range(3, len(ids) - 1):
        limit = min(4, len(ids) - 1 - n)
        step = DecodeLoop(target, drafter, again := Recorder())
        step.complete(ids[: n + 1], GenerationParams(5))
        kept += min(again.feedback[0].num_accepted, limit)
    lengths = lengths_of(drafter, [drafter.weights.params], recorder.feedback, 4)
    assert lengths.num_anchors == len(ids) - 4
    assert lengths.accepted[0] == pytest.approx(kept, abs=4)  # drafting rounds its products otherwise
    assert kept > 40


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


# The gate, however often it is asked


class Holding:
    """A hold-out of so many requests."""

    def __init__(self, num_ever, num_now):
        self.num_ever, self.num_now = num_ever, num_now

    def __len__(self):
        return self.num_now

    def newest(self):
        return [publish.Held((), 0, 0)] * self.num_now


@pytest.fixture
def drawn(monkeypatch):
    """Gates that judge drawn lengths: how many of 400 streams end with a promotion, and when."""

    def promotions(gain, num_judged, num_streams=400):
        promoted = 0
        for seed in range(num_streams):
            rng = Random(f"{seed}/{gain}")
            ease, served, num_held = [], [], 16
            gate = Gate(None, PublishConfig())
            for _ in range(num_judged):
                while len(ease) < num_held:
                    ease.append((rng.randint(4, 64), rng.expovariate(1.0)))
                    served.append(rng.expovariate(2.0))
                newest = list(zip(ease, served, strict=True))[-64:]
                lengths = [
                    Lengths(n, (n * (common + own), n * (common + rng.expovariate(2.0) + gain)), (0.0, 0.0))
                    for (n, common), own in newest
                ]
                answers = iter(lengths)
                monkeypatch.setattr(publish, "lengths_of", lambda *asked, answers=answers: next(answers))
                if gate.judge({}, {}, Holding(num_held, len(newest))).is_other_better:
                    promoted += 1
                    break
                num_held += 8
        return promoted / num_streams

    return promotions


def test_equal_drafters_are_hardly_ever_promoted_however_often_they_come_up(drawn):
    assert drawn(gain=0.0, num_judged=20) <= 0.05


@pytest.mark.parametrize(("gain", "least"), [(0.2, 0.5), (0.4, 0.98)])
def test_better_drafters_are_promoted(drawn, gain, least):
    """One request's difference spreads by 0.7 drafts per step; 20 candidates, 16 to 64 requests."""
    assert drawn(gain=gain, num_judged=20, num_streams=100) >= least


def test_a_candidate_waits_until_enough_new_requests_are_held_back():
    holdout, gate = HoldOut(QUICK), Gate(Bigram(TARGET.logits), QUICK)
    served, candidate = ({"logits": logits} for logits in reversed(better_and_worse()))
    judged, missing = [], gate.missing(holdout)
    assert missing == QUICK.min_requests
    for records in traffic(range(100)):
        before = len(holdout)
        holdout.offer(records)
        if gate.judge(served, candidate, holdout):
            judged.append(holdout.num_ever)
        elif len(holdout) > before:
            assert gate.missing(holdout) == missing - 1
        missing = gate.missing(holdout)
    assert judged == list(range(QUICK.min_requests, holdout.num_ever + 1, QUICK.new_requests))


# What is held back


@pytest.mark.parametrize("every", [2, 8])
def test_a_share_of_the_requests_is_held_back_whole_and_the_rest_goes_on(every):
    holdout = HoldOut(PublishConfig(holdout_every=every, holdout_requests=10_000))
    passed, names = set(), [f"r{i}" for i in range(400)]
    for i, name in enumerate(names):
        records = request(name, text(i, 12), num_accepted=i % 4)
        rest = [one for record in records for one in holdout.offer([record])]
        assert rest in ([], records)
        passed |= {record.request_id for record in rest}
    held = {one.records[0].request_id for one in holdout.newest()}
    assert held | passed == set(names)
    assert not held & passed
    assert chi_square_p(torch.tensor([len(held), len(passed)]), torch.tensor([1 / every, 1 - 1 / every])) > 1e-3


def test_whether_a_request_is_held_back_hangs_on_its_id_and_the_seed_alone():
    records = [request(f"r{i}", text(i, 5))[0] for i in range(200)]
    one, same, other = ([HoldOut(QUICK, seed).holds(r) for r in records] for seed in (1, 1, 2))
    assert one == same != other
    assert [HoldOut(QUICK, 1).holds(record) for record in reversed(records)] == one[::-1]


def test_requests_without_an_id_are_held_back_by_their_turn():
    holdout = HoldOut(QUICK)
    fates = []
    for i in range(60):
        first, *others = request("", text(i, 12))
        fates.append(holdout.holds(first))
        assert all(holdout.holds(record) == fates[-1] for record in others)
    assert 15 < sum(fates) < 45


def test_the_newest_are_kept_within_both_bounds():
    one = 40 * 8 + 39 * 4
    few = PublishConfig(holdout_every=2, holdout_requests=20)
    small = replace(few, holdout_megabytes=5.5 * one / 1e6)
    for config, most in ((few, 20), (small, 5)):
        holdout, seen = HoldOut(config), []
        for records in traffic(range(60)):
            if not holdout.offer(records):
                seen.insert(0, records[0].request_id)
            assert [held.records[0].request_id for held in holdout.newest()] == seen[:most]
            assert holdout.num_bytes == len(holdout) * one
        assert holdout.num_ever == len(seen) > 20


def test_a_request_that_fits_nowhere_changes_nothing():
    holdout = HoldOut(replace(QUICK, holdout_megabytes=1e-3))
    for i in range(20):
        holdout.offer(request(f"long{i}", text(i, 200)))
    assert (len(holdout), holdout.num_bytes, holdout.num_ever) == (0, 0, 0)


def test_of_a_long_request_some_rows_are_compared_wherever_they_are():
    holdout, places = HoldOut(replace(QUICK, max_rows=16)), set()
    for records in traffic(range(60), num_tokens=80, num_accepted=2):
        holdout.offer(records)
    for held in holdout.newest():
        assert 13 < sum(record.num_rows for record in held.records) <= 16
        assert all(a.start + a.num_rows == b.start for a, b in zip(held.records, held.records[1:], strict=False))
        places.add(held.records[0].start)
    assert len(places) > 8


def test_behind_a_gap_in_the_feedback_the_request_goes_on():
    records = request("a", text(0, 40), num_accepted=1)
    del records[3]
    run = publish.run_of(records, 1000)
    assert run[0].start == 8
    assert len(run) == len(records) - 3


def test_what_is_held_back_keeps_no_live_trace():
    holdout = HoldOut(QUICK)
    traces = []
    for records in traffic(range(20)):
        holdout.offer(records)
        traces.append(weakref.ref(records[0].trace))
    del records
    gc.collect()
    assert not any(trace() for trace in traces)


# What is served


def publisher_with(served_logits, config=QUICK, **options):
    return Publisher(Bigram(served_logits), config, **options)


def test_a_better_candidate_is_served_under_the_next_number():
    good, bad = better_and_worse()
    publisher = publisher_with(bad)
    assert publisher.consider({"logits": good}) is None  # nothing to judge by yet
    offered(publisher, traffic(range(80)))
    weights = publisher.consider({"logits": good})
    assert (weights.version, weights.params["logits"]) == (1, good)
    assert publisher.served is weights
    (event,) = publisher.history
    assert (event.kind, event.version, event.parent) == ("promoted", 1, 0)
    assert event.paired.other_length > event.paired.served_length
    assert "acceptance length" in event.reason
    assert publisher.is_watching


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_candidate_that_is_no_better_is_refused(temperature):
    good, bad = better_and_worse()
    for served, candidate in ((good, bad), (good, good.clone()), (good, good * 1.0001)):
        publisher = publisher_with(served)
        offered(publisher, traffic(range(80), temperature=temperature))
        assert publisher.consider({"logits": candidate}) is None
        assert [event.kind for event in publisher.history] == ["refused"]
        assert publisher.served.version == 0


def test_a_lower_training_loss_is_no_reason_to_promote():
    """More certain of the text, and yet never of its token first: the loss falls, and so does acceptance."""
    own = torch.eye(VOCAB)[TARGET.logits.argmax(-1)]
    other = torch.eye(VOCAB)[(TARGET.logits.argmax(-1) + 1) % VOCAB]
    served, candidate = (own * 0.3 + 0.14), (own * 0.49 + other * 0.5 + 0.0025)
    publisher = publisher_with(served.log())
    offered(publisher, traffic(range(80), temperature=0.0))
    batch = publisher.holdout.newest()[0].records
    ((logits, rows),) = Bigram(served).rows([{"logits": served.log()}, {"logits": candidate.log()}], batch)
    losses = cross_entropy(logits, rows).mean(-1)
    assert losses[1] < losses[0]
    assert publisher.consider({"logits": candidate.log()}) is None
    assert publisher.history[0].paired.other_length == 1.0
    assert publisher.history[0].kind == "refused"


def test_a_candidate_that_is_not_finite_is_refused_once_and_never_raises(caplog):
    publisher = publisher_with(TARGET.logits)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        for bad in (math.nan, math.inf, math.nan):
            assert publisher.consider({"logits": TARGET.logits * bad}) is None
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
        publisher_with(TARGET.logits).consider(candidate)


def test_a_number_that_was_used_is_not_given_again():
    with pytest.raises(ValueError, match="next_version is 0, but version 0 is served already"):
        publisher_with(TARGET.logits, next_version=0)
    good, bad = better_and_worse()
    publisher = publisher_with(bad, next_version=40)
    offered(publisher, traffic(range(80)))
    assert publisher.consider({"logits": good}).version == 40


# After a promotion


def promoted(served, candidate, **options):
    """A publisher that has just promoted a candidate."""
    publisher = publisher_with(served, **options)
    offered(publisher, traffic(range(80)))
    assert publisher.consider({"logits": candidate}).version == 1
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
    assert num_requests == QUICK.min_requests
    assert weights.version == 2
    assert weights.params["logits"] is OTHER_TRAFFIC.logits
    event = publisher.history[-1]
    assert (event.kind, event.version, event.parent, event.restores) == ("rolled back", 2, 1, 0)
    assert event.paired.other_length > event.paired.served_length
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "version 1 is rolled back: its successor 2 is version 0 again" in caplog.text
    assert not publisher.is_watching
    assert checks(publisher, traffic(range(200, 300), version=2))[0] is None


def test_a_version_that_keeps_its_promise_is_confirmed_and_watched_no_more():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    assert checks(publisher, traffic(range(100, 200), version=1, num_accepted=2))[0] is None
    assert [event.kind for event in publisher.history] == ["promoted", "confirmed"]
    assert publisher.served.version == 1
    assert not publisher.is_watching


def test_what_the_old_version_served_says_nothing_of_the_new_one():
    publisher = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    assert checks(publisher, traffic(range(100, 200), version=0, table=OTHER_TRAFFIC))[0] is None
    assert publisher.is_watching


def test_a_swap_that_went_wrong_is_taken_back_whatever_the_weights_say():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    weights, num_requests = checks(publisher, traffic(range(100, 200), version=1, num_accepted=0))
    assert weights.version == 2
    assert num_requests == 2  # of 39 steps each
    assert "the first draft was kept in 0% of 78 steps, where the gate had predicted" in publisher.history[-1].reason


def test_equal_versions_are_hardly_ever_rolled_back(monkeypatch):
    rolled_back = 0
    for seed in range(400):
        rng = Random(seed)
        monkeypatch.setattr(publish, "lengths_of", lambda *asked, rng=rng: drawn_lengths(rng))
        watch = Watch(None, DrafterWeights({}, 1), {}, 0.5, PublishConfig())
        (records,) = traffic([1], version=1, num_accepted=2)
        while not watch.is_over:
            watch.offer(records)
            figures = watch.look()
            if figures and figures.is_other_better:
                rolled_back += 1
                break
    assert rolled_back / 400 <= 0.05


def test_a_restart_goes_on_watching():
    first = promoted(OTHER_TRAFFIC.logits, TARGET.logits)
    again = publisher_with(
        TARGET.logits, served=first.served, next_version=first.next_version, promoted=first.history[-1],
        previous=DrafterWeights({"logits": OTHER_TRAFFIC.logits}, 0),
    )  # fmt: skip
    again._drafter.target_logits_VV = OTHER_TRAFFIC.logits
    weights, _ = checks(again, traffic(range(100, 200), version=1, table=OTHER_TRAFFIC, num_accepted=1))
    assert weights.version == 2


def test_a_new_promotion_is_watched_in_the_place_of_the_old_one():
    good, bad = better_and_worse()
    publisher = promoted(bad, good)
    offered(publisher, traffic(range(100, 130), version=1, num_accepted=2))
    assert publisher.consider({"logits": TARGET.logits}) is not None
    assert publisher.previous.version == 1
    assert publisher.served.version == 2


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
    publisher = Publisher(drafter, replace(QUICK, min_requests=8), served=start)
    loop = DecodeLoop(target, drafter, publisher_as_learning := Recorder())
    for i in range(24):
        loop.complete([5, 9, 200 + i % 4, 31], GenerationParams(24), request_id=str(i))
    publisher.offer(publisher_as_learning.feedback)
    weights = publisher.consider(drafter.weights.params)
    assert weights.version == 1
    assert publisher.history[0].paired.other_length > publisher.history[0].paired.served_length + 0.5
    assert publisher.consider(start.params) is None
