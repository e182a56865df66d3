import itertools
import threading
from dataclasses import replace
from functools import cache

import pytest
import rigs
import torch
from rigs import Script, plain

from onlinespec import load_drafter
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.prefix_cache import PrefixCache
from onlinespec.engine.request import ContextOverflow
from onlinespec.engine.scheduler import CANCELLED, ERROR, Busy, Scheduler, TooLarge
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop

TARGET = rigs.random_target()
MEGABYTES = 16 * 10**6


def prompt(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM = prompt(150, seed=99)
JOBS = [  # short and long, some that begin alike, greedy and sampled, drafted and plain
    (prompt(3, 1), GenerationParams(30)),
    (prompt(400, 2), GenerationParams(12, 2)),
    (SYSTEM + prompt(20, 3), GenerationParams(25, 8)),
    (SYSTEM + prompt(70, 4), GenerationParams(5, 0)),
    (prompt(33, 5), GenerationParams(40, 3, SamplingParams(0.8, top_k=40), seed=5)),
    (prompt(1, 6), GenerationParams(17)),
    (SYSTEM + prompt(20, 3), GenerationParams(9, 1, SamplingParams(presence_penalty=0.5))),
    (prompt(700, 7), GenerationParams(4)),
    (SYSTEM[:64] + prompt(40, 8), GenerationParams(20, 5)),
]


def make(limits=None, drafter=None, prefixes=None, target=TARGET):
    return Scheduler(DecodeLoop(target, drafter, prefixes=prefixes), limits)


def submit(scheduler, jobs, **tags):
    requests = [scheduler.loop.open(*job, **tags) for job in jobs]
    for request in requests:
        scheduler.submit(request)
    return requests


def drain(scheduler, between_steps=lambda: None):
    while scheduler.has_work:
        scheduler.step()
        between_steps()


def is_empty(scheduler):
    loop = scheduler.loop
    is_free = not loop._cache.lengths and (not loop.drafter or not getattr(loop.drafter, "lengths", None))
    return (
        is_free and not (scheduler.prefilling or scheduler.running or scheduler.waiting) and scheduler._num_bytes == 0
    )


# Exactness


NAMES, MOST_RUNNING, PREFILLS = ("eagle", "ngram", None), (1, 3, 16), (32, 128, 1024)
IN_SHORT = [("eagle", 3, 32), ("eagle", 16, 1024), ("ngram", 16, 32), (None, 3, 128)]


def drafter_of(name):
    return load_drafter(name, TARGET) if name else None


@cache
def alone_with(name):
    return [DecodeLoop(TARGET, drafter_of(name)).complete(*job) for job in JOBS]


@pytest.mark.parametrize(
    ("name", "max_running", "prefill_tokens"),
    [
        pytest.param(*case, marks=() if case in IN_SHORT else pytest.mark.full)
        for case in itertools.product(NAMES, MOST_RUNNING, PREFILLS)
    ],
)
def test_every_answer_in_a_mixed_batch_is_the_one_it_has_alone(name, max_running, prefill_tokens):
    limits = Limits(max_running=max_running, prefill_tokens=prefill_tokens, prefill_alone=prefill_tokens)
    scheduler = make(limits, drafter_of(name), PrefixCache(MEGABYTES))
    requests = submit(scheduler, JOBS)
    drain(scheduler)
    for request, other in zip(requests, alone_with(name), strict=True):
        assert request.output_ids == other.output_ids
        assert request.finish_reason == other.finish_reason
        if request.params.sampling.is_greedy:  # and the very bits, whatever was read beside it
            size = other.trace.num_features
            assert torch.equal(request.trace.features.final_SD[:size], other.trace.features.final_SD[:size])
    assert is_empty(scheduler)


def test_requests_that_join_later_change_nothing_for_those_that_run():
    scheduler = make(Limits(max_running=4, prefill_tokens=64), Ngram(), PrefixCache(MEGABYTES))
    jobs, requests = list(JOBS), []

    def join():
        if jobs:
            requests.extend(submit(scheduler, [jobs.pop(0)]))

    join()
    drain(scheduler, join)
    assert [request.output_ids for request in requests] == [other.output_ids for other in alone_with("ngram")]


# Prompts


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_where_they_part():
    scheduler = make(prefixes=PrefixCache(MEGABYTES))
    first, second, other = JOBS[2], JOBS[3], JOBS[1]
    requests = []
    for job in (first, second, other):
        requests += submit(scheduler, [job])
        drain(scheduler)
    assert [request.num_cached for request in requests] == [0, len(SYSTEM) // 32 * 32, 0]


def test_prompts_that_begin_alike_and_come_together_are_read_once():
    scheduler = make(Limits(prefill_tokens=64, prefill_alone=64), prefixes=PrefixCache(MEGABYTES))
    seen = []
    forward = TARGET.decoder.forward

    def counting(token_ids, *args, **kwargs):
        seen.append(len(token_ids))
        return forward(token_ids, *args, **kwargs)

    requests = submit(scheduler, [([*SYSTEM, i], GenerationParams(1)) for i in range(8)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TARGET.decoder, "forward", counting)
        drain(scheduler)
    whole = len(SYSTEM) // 32 * 32
    assert sum(seen) == whole + 8 * (len(SYSTEM) - whole) + 8
    assert sum(request.num_cached for request in requests) == 7 * whole


def test_tenants_share_no_prefix():
    scheduler = make(prefixes=PrefixCache(MEGABYTES))
    requests = []
    for tenant in ("a", "b", "a"):
        requests += submit(scheduler, [JOBS[2]], tenant=tenant)
        drain(scheduler)
    assert [request.num_cached > 0 for request in requests] == [False, False, True]


def test_the_prefix_cache_keeps_to_its_size_and_forgets_what_was_used_longest_ago():
    size = DecodeLoop(TARGET)._cache.bytes_per_token + 4 * 32
    cache = PrefixCache(10 * 32 * size)
    scheduler = make(prefixes=cache)
    known = []
    for seed in (0, 1, 0, 2, 0, 1):  # five blocks each
        (request,) = submit(scheduler, [(prompt(161, seed), GenerationParams(1))])
        drain(scheduler)
        known.append(request.num_cached)
        assert cache.num_bytes <= 10 * 32 * size
    assert known == [0, 0, 160, 0, 160, 0]


def test_a_prefix_larger_than_the_cache_leaves_its_beginning():
    size = DecodeLoop(TARGET)._cache.bytes_per_token + 4 * 32
    scheduler = make(prefixes=PrefixCache(3 * 32 * size))
    known = []
    for _ in range(2):
        (request,) = submit(scheduler, [(prompt(300), GenerationParams(3))])
        drain(scheduler)
        known.append((request.num_cached, request.output_ids))
    assert known == [(0, known[0][1]), (96, known[0][1])]


def test_a_long_prompt_is_read_between_the_steps_of_others():
    scheduler = make(Limits(prefill_tokens=32))
    (short,) = submit(scheduler, [JOBS[0]])
    scheduler.step()
    (long,) = submit(scheduler, [JOBS[1]])
    while not long.is_ready:
        before = len(short.output_ids), long.trace.num_features
        scheduler.step()
        assert len(short.output_ids) == before[0] + 1
        assert 0 < long.trace.num_features - before[1] <= 33
    assert short.finish_reason is None


# Memory and the queue


def test_memory_bounds_what_runs_and_the_queue_keeps_its_order():
    loop = DecodeLoop(TARGET)
    job = (prompt(20), GenerationParams(12))
    one = loop.num_bytes(loop.open(*job))
    scheduler = make(Limits(cache_megabytes=2.5 * one / 1e6))
    requests, done, most = submit(scheduler, [job] * 5), [], 0
    while scheduler.has_work:
        for request in scheduler.step():
            if request.finish_reason:
                done.append(request)
        most = max(most, len(scheduler.running) + len(scheduler.prefilling))
    assert most == 2
    assert done == requests


def test_a_request_that_can_never_fit_is_refused_at_once():
    scheduler = make(Limits(cache_megabytes=0.1))
    with pytest.raises(TooLarge, match=r"up to 1024 tokens takes .* MB"):
        submit(scheduler, [(prompt(900), GenerationParams(500))])
    assert not scheduler.has_work


def test_a_full_queue_refuses_all_of_a_group_or_none():
    scheduler = make(Limits(max_running=1, max_waiting=2))
    submit(scheduler, [JOBS[0]])
    pair = [scheduler.loop.open(*JOBS[0]) for _ in range(3)]
    with pytest.raises(Busy, match="1 requests are waiting, of at most 2"):
        scheduler.submit(*pair)
    scheduler.submit(*pair[:2])
    with pytest.raises(Busy):
        scheduler.submit(pair[2])
    drain(scheduler)
    assert all(request.finish_reason == "length" for request in pair[:2])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cancelled_request_frees_its_slot_at_the_next_step(steps):
    scheduler = make(Limits(max_running=1, prefill_tokens=32, prefill_alone=32), Script(prompt(60)))
    first, second = submit(scheduler, [(prompt(60), GenerationParams(40)), JOBS[0]])
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel(first)
    scheduler.cancel(first)
    assert first in scheduler.step()
    assert first.finish_reason == CANCELLED
    assert first.slot == -1
    drain(scheduler)
    assert second.output_ids == plain(TARGET, *JOBS[0]).output_ids
    scheduler.cancel(second)
    drain(scheduler)
    assert second.finish_reason == "length"
    assert is_empty(scheduler)


def test_a_waiting_request_can_be_cancelled():
    scheduler = make(Limits(max_running=1))
    first, second = submit(scheduler, [JOBS[0], JOBS[1]])
    scheduler.step()
    scheduler.cancel(second)
    scheduler.step()
    assert second.finish_reason == CANCELLED
    assert not scheduler.waiting
    drain(scheduler)
    assert first.finish_reason == "length"


def test_many_threads_submit_and_cancel_while_one_steps():
    scheduler = make(Limits(max_running=4, max_waiting=1000), Ngram(), PrefixCache(MEGABYTES))
    kept, lock = [], threading.Lock()

    def client(seed):
        for i in range(10):
            job = JOBS[(seed + i) % len(JOBS)]
            (request,) = submit(scheduler, [job])
            if (seed + i) % 3 == 0:
                scheduler.cancel(request)
            else:
                with lock:
                    kept.append((job, request))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or scheduler.has_work:
        if scheduler.wait(0.01):
            scheduler.step()
    answers = {id(job): other.output_ids for job, other in zip(JOBS, alone_with("ngram"), strict=True)}
    assert len(kept) == 40
    for job, request in kept:
        assert request.output_ids == answers[id(job)]
    assert is_empty(scheduler)


# What chooses the number of drafts


class Noting:
    """A control that drafts two tokens for the first request and none for others, and notes what it hears."""

    learn_share = 0.5

    def __init__(self):
        self.records, self.forgotten, self.num_renewed = [], [], 0

    def choose(self, request_ids, limits_B):
        return [2 if i == 0 else 0 for i in range(len(limits_B))]

    def observe(self, record):
        self.records.append(record)

    def forget(self, request_id):
        self.forgotten.append(request_id)

    def on_new_weights(self):
        self.num_renewed += 1


class Told(rigs.Recorder):
    """Learning that notes its share, and publishes when it is told to."""

    def __init__(self):
        super().__init__()
        self.shares = []

    def set_share(self, share):
        self.shares.append(share)


def test_control_decides_within_what_requests_allow_and_hears_of_every_step():
    control, learning = Noting(), Told()
    jobs = [(prompt(3, 1), GenerationParams(12, 1)), (prompt(9, 2), GenerationParams(12, 4))]
    script = Script(plain(TARGET, *jobs[0]).trace.token_ids, wrong_at={5, 8})
    scheduler = Scheduler(DecodeLoop(TARGET, script, learning), control=control)
    requests = submit(scheduler, jobs)
    drain(scheduler)
    for request, job in zip(requests, jobs, strict=True):
        assert request.output_ids == plain(TARGET, *job).output_ids
    assert {record.num_draft_tokens_B[0] for record in control.records[:3]} == {1}
    assert {record.num_draft_tokens_B[1] for record in control.records[:3]} == {0}
    assert all(record.verify_seconds > 0 for record in control.records)
    assert set(control.forgotten) == set(requests)
    counters = scheduler.counters
    assert counters.tokens == 24
    assert counters.drafted == sum(sum(record.num_draft_tokens_B) for record in control.records)
    assert counters.batches == len(control.records)


@pytest.mark.parametrize("where", ["choose", "observe"])
def test_a_control_that_raises_costs_drafts_and_no_answer(where, monkeypatch, caplog):
    control = Noting()
    monkeypatch.setattr(control, where, lambda *args: 1 / 0)
    scheduler = Scheduler(DecodeLoop(TARGET, Ngram()), control=control)
    requests = submit(scheduler, JOBS[:2])
    drain(scheduler)
    for request, job in zip(requests, JOBS[:2], strict=True):
        assert request.output_ids == plain(TARGET, *job).output_ids
    assert caplog.text.count("this is said once") == 1
    assert is_empty(scheduler)


def test_learning_is_told_its_share_when_it_changes_and_control_of_better_weights():
    control, learning = Noting(), Told()
    scheduler = Scheduler(DecodeLoop(TARGET, Script(prompt(3, 1)), learning), control=control)
    submit(scheduler, [JOBS[0]])
    for share, published in ((0.5, 0), (0.5, 0), (0.01, 0), (0.01, 1), (0.5, 1)):
        control.learn_share, learning.num_published = share, published
        scheduler.step()
    assert learning.shares == [0.5, 0.01, 0.5]
    assert control.num_renewed == 1


# What fails


class Faulty(Script):
    """Drafts as Script does, and raises where it is told to."""

    def __init__(self, at, where="propose"):
        super().__init__(prompt(3, 1))
        self.at, self.where, self.calls = at, where, 0

    def _maybe(self, where):
        if where == self.where:
            self.calls += 1
            if self.calls == self.at:
                raise RuntimeError("the drafter broke")

    def start(self, *args):
        super().start(*args)
        self._maybe("start")

    def propose(self, *args):
        self._maybe("propose")
        return super().propose(*args)

    def observe(self, *args):
        self._maybe("observe")
        super().observe(*args)


@pytest.mark.parametrize("where", ["start", "propose", "observe"])
def test_a_drafter_that_raises_once_costs_nobody_the_drafter(where, caplog):
    jobs = [(prompt(n, n), GenerationParams(15)) for n in (3, 9, 40)]
    scheduler = make(drafter=Faulty(2, where))
    requests = submit(scheduler, jobs)
    drain(scheduler)
    for request, job in zip(requests, jobs, strict=True):
        assert request.output_ids == plain(TARGET, *job).output_ids
        assert request.finish_reason == "length"
        assert not request.is_plain
    assert caplog.text.count("the drafter broke); this is said once") == 1
    assert is_empty(scheduler)


def test_a_request_for_which_drafting_always_fails_goes_on_without_and_the_others_keep_theirs(caplog):
    class Refusing(Script):
        def propose(self, slots, *args):
            if self.refused in slots:
                raise RuntimeError("the drafter broke")
            return super().propose(slots, *args)

    jobs = [(prompt(3, 1), GenerationParams(15)) for _ in range(3)]
    answer = plain(TARGET, *jobs[0]).trace.token_ids
    drafter = Refusing(answer)
    drafter.refused = 1
    scheduler = make(drafter=drafter)
    requests = submit(scheduler, jobs)
    drain(scheduler)
    assert [request.output_ids for request in requests] == [answer[3:]] * 3
    assert [request.is_plain for request in requests] == [False, True, False]
    assert [request.stats.accepted > 0 for request in requests] == [True, False, True]
    assert caplog.text.count("this is said once") == 1
    assert is_empty(scheduler)


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_that_is_not_finite_once_costs_its_own_request_one_step(row, monkeypatch):
    """Row 0 is the anchor's: nothing is committed. Behind it, what comes before is."""
    jobs = [(prompt(3, 1), GenerationParams(15)) for _ in range(16)]
    answer = plain(TARGET, *jobs[0]).trace.token_ids
    scheduler, forward, steps = make(drafter=Script(answer)), TARGET.decoder.forward, []

    def poisoned(token_ids, slots, counts, *args, **kwargs):
        output = forward(token_ids, slots, counts, *args, **kwargs)
        if len(slots) == 16 and len(output.logits_MV):
            steps.append(counts)
            if len(steps) == 2:
                logits_MV = output.logits_MV.clone()
                logits_MV[sum(counts[:5]) + row] = float("nan")  # of the sixth request
                return output._replace(logits_MV=logits_MV)
        return output

    monkeypatch.setattr(TARGET.decoder, "forward", poisoned)
    requests = submit(scheduler, jobs)
    drain(scheduler)
    monkeypatch.undo()
    assert [request.output_ids for request in requests] == [answer[3:]] * 16
    assert not any(request.is_plain for request in requests)
    assert [request.stats.accepted for request in requests[:5]] == [12] * 5  # three steps of five tokens
    assert requests[5].stats.accepted == 11  # a step more, and a token of its own more
    assert [counts[5] for counts in steps] == ([5, 5, 1] if row == 0 else [5, 5, 5])
    assert is_empty(scheduler)


def test_a_request_whose_logits_are_broken_ends_alone(monkeypatch, caplog):
    poison, forward = 77, TARGET.decoder.forward

    def poisoned(token_ids, slots, counts, *args, **kwargs):
        output = forward(token_ids, slots, counts, *args, **kwargs)
        if len(output.logits_MV) < len(token_ids):
            return output
        broken_M1 = (token_ids == poison)[:, None]
        return output._replace(logits_MV=output.logits_MV.masked_fill(broken_M1, float("nan")))

    monkeypatch.setattr(TARGET.decoder, "forward", poisoned)
    scheduler = make(drafter=Ngram())
    bad, good = submit(scheduler, [([5, 6, poison], GenerationParams(5)), (prompt(9), GenerationParams(5))])
    drain(scheduler)
    monkeypatch.undo()
    assert bad.finish_reason == ERROR
    assert "logits are broken" in bad.error
    assert good.output_ids == plain(TARGET, prompt(9), GenerationParams(5)).output_ids
    assert is_empty(scheduler)


def test_memory_that_can_not_be_had_ends_the_request_that_asked(monkeypatch):
    scheduler = make()
    take = scheduler.loop._cache.take

    def refuse(slot, capacity):
        if capacity > 500:
            raise RuntimeError("can't allocate memory")
        take(slot, capacity)

    monkeypatch.setattr(scheduler.loop._cache, "take", refuse)
    large, small = submit(scheduler, [(prompt(490), GenerationParams(100)), JOBS[0]])
    drain(scheduler)
    assert (large.finish_reason, large.output_ids) == (ERROR, [])
    assert small.finish_reason == "length"
    assert is_empty(scheduler)


# What is asked wrongly


def test_a_prompt_that_can_not_be_answered_is_refused_before_it_is_queued():
    scheduler = make()
    for wrong in ([], [999], prompt(1024)):
        with pytest.raises((ValueError, ContextOverflow)):
            submit(scheduler, [(wrong, GenerationParams())])
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("name", "value"), [("max_running", 0), ("max_waiting", -1), ("cache_megabytes", 0.0), ("prefill_tokens", 31)]
)
def test_limits_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        replace(Limits(), **{name: value})
