import gc
import weakref
from itertools import accumulate, chain, pairwise, zip_longest

import pytest
import rigs
import torch
from hypothesis import given
from hypothesis import strategies as st
from rigs import Recorder, run_together
from toy import chi_square_p, steady

from onlinespec.config import GenerationParams
from onlinespec.core import Features, Feedback, Trace
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.replay import ReplayBuffer

HIDDEN = 4
ROW_BYTES = 4 * HIDDEN + 8  # a float32 state and a token id


def request(name="", step_rows=(3,), domain="", is_finished=True):
    """A request's Feedback, one record a step, over a trace with room to spare; its prompt is one token."""
    num_rows = sum(step_rows)
    states = torch.randn(num_rows + 50, HIDDEN, generator=torch.Generator().manual_seed(num_rows))
    trace = Trace(list(range(num_rows + 1)), Features(states), num_features=num_rows)
    ends = list(accumulate(step_rows))
    return [
        Feedback(
            trace, end - n, n, num_draft_tokens=4, num_accepted=n - 1, weights_version=0, request_id=name,
            domain=domain, is_last=is_finished and end == num_rows,
        )
        for n, end in zip(step_rows, ends, strict=True)
    ]  # fmt: skip


def cost(num_rows):
    """Of a stored request, in bytes: its prompt token has no row."""
    return num_rows * ROW_BYTES + 8


def filled(sizes, max_bytes, seed=0):
    """A buffer that was offered one request per size, named by their order."""
    buffer = ReplayBuffer(max_bytes, seed)
    for place, size in enumerate(sizes):
        buffer.offer(request(str(place), (size,)))
    return buffer


def held(buffer):
    """What is stored, by name, as far as many draws can tell."""
    return {record.request_id: record for _ in range(40 * len(buffer)) for record in buffer.draw(1)}


def names(buffer, num_draws=20):
    return [record.request_id for _ in range(num_draws) for record in buffer.draw(1)]


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=25)


# What is stored


def test_nothing_is_drawn_while_nothing_is_stored():
    assert ReplayBuffer(10_000).draw(64) == []


def test_only_finished_requests_are_stored():
    buffer, steps = ReplayBuffer(10_000), request("a", (3, 2, 4))
    for record in steps[:-1]:
        buffer.offer([record])
        assert (len(buffer), buffer.num_bytes, buffer.draw(64)) == (0, 0, [])
    buffer.offer([steps[-1]])
    assert [record.start for record in buffer.draw(64)] == [0, 3, 5]


def test_interleaved_requests_are_kept_apart():
    requests = [request("a", (3, 1, 2)), request("b", (1, 1)), request("c", (4, 2, 2, 1))]
    buffer = ReplayBuffer(10_000)
    for step in zip_longest(*requests):
        buffer.offer([record for record in step if record])
    assert len(buffer) == 3
    for _ in range(30):
        drawn = buffer.draw(64)
        (live,) = [records for records in requests if records[0].request_id == drawn[0].request_id]
        assert [(record.request_id, record.start) for record in drawn] == [(r.request_id, r.start) for r in live]
        assert len({id(record.trace) for record in drawn}) == 1


def test_a_request_that_is_given_up_does_not_stay_in_memory():
    buffer, given_up = ReplayBuffer(10_000), []
    for place in range(50):
        steps = request(str(place), (3, 2), is_finished=False)
        buffer.offer(steps)
        given_up.append(weakref.ref(steps[0].trace))
        del steps
    gc.collect()
    assert not any(trace() for trace in given_up)
    assert (len(buffer), buffer.num_bytes) == (0, 0)


def test_requests_that_run_for_long_are_still_stored_whole():
    buffer, long = ReplayBuffer(1_000_000), request("long", (1,) * 30)
    others = []
    for record in long:
        buffer.offer([record])
        others.append([request(str(i), (2, 2), is_finished=False) for i in range(100)])  # all of them run on
        buffer.offer(list(chain.from_iterable(others[-1])))
    assert [record.start for record in buffer.draw(64)] == list(range(30))


@steady
@given(sizes=sizes, capacity=st.integers(1, 100))
def test_memory_is_bounded_whatever_comes(sizes, capacity):
    buffer = ReplayBuffer(cost(capacity))
    for place, size in enumerate(sizes):
        buffer.offer(request(str(place), (size,)))
        assert buffer.num_bytes <= buffer.max_bytes
        assert bool(len(buffer)) == any(size <= capacity for size in sizes[: place + 1])
    stored = held(buffer)
    assert len(stored) == len(buffer)
    assert buffer.num_bytes == sum(cost(record.num_rows) for record in stored.values())


@steady
@given(sizes=sizes, seed=st.integers(0, 100))
def test_the_newest_requests_are_always_kept(sizes, seed):
    buffer = filled(sizes, max_bytes=cost(100), seed=seed)
    newest, num_bytes = {str(len(sizes) - 1)}, cost(sizes[-1])
    for place in reversed(range(len(sizes) - 1)):
        num_bytes += cost(sizes[place])
        if num_bytes > buffer.max_bytes / 4:
            break
        newest.add(str(place))
    assert newest <= set(held(buffer))


def test_a_request_is_forgotten_when_its_time_is_over():
    now = [0.0]
    buffer = ReplayBuffer(20 * cost(3), max_seconds=60, clock=lambda: now[0])
    for place in range(16):  # ring and reservoir
        now[0] = 10.0 * place
        buffer.offer(request(str(place)))
        assert len(buffer) == min(place + 1, 7)
        assert buffer.num_bytes == len(buffer) * cost(3)
    now[0] = 210.0
    assert {record.request_id for _ in range(50) for record in buffer.draw(10)} == {"15"}
    now[0] = 211.0
    assert buffer.draw(10) == []
    assert (len(buffer), buffer.num_bytes) == (0, 0)


def test_a_request_beyond_the_bound_changes_nothing():
    buffer = filled([10] * 8, max_bytes=cost(60))
    before = held(buffer)
    buffer.offer(request("too long", (61,)))
    assert set(held(buffer)) == set(before)


@pytest.mark.parametrize("seed", range(5))
def test_one_request_that_fills_the_memory_does_not_end_sampling(seed):
    buffer = filled([10] * 20 + [100] + [10] * 20, max_bytes=cost(100), seed=seed)
    assert len(buffer) > 4


# What left the ring is sampled evenly


MIXED = [5, 20, 7, 12, 9, 17, 6, 14] * 15


def evenness(sizes, group_of, num_seeds=200):
    """How often each group of requests was drawn, and its share of them all; the newest have a place of their own."""
    stream = [request(str(place), (size,)) for place, size in enumerate(sizes)]
    groups = torch.tensor([group_of(place) for place in range(len(sizes) - 20)])
    seen = torch.zeros(int(groups.max()) + 1)
    for seed in range(num_seeds):
        buffer = ReplayBuffer(30 * sum(map(cost, sizes)) // len(sizes), seed)
        for records in stream:
            buffer.offer(records)
        for name in set(names(buffer, 40)):
            if int(name) < len(groups):
                seen[groups[int(name)]] += 1
    return seen, groups.bincount() / len(groups)


@pytest.mark.parametrize("sizes", [pytest.param([10] * 120, marks=pytest.mark.full), MIXED], ids=["equal", "mixed"])
def test_old_requests_are_as_likely_to_be_kept_as_new_ones(sizes):
    seen, shares = evenness(sizes, group_of=lambda place: place // 10)
    assert seen.sum() > 1000
    assert chi_square_p(seen, shares) > 1e-3


def test_long_requests_are_nearly_as_likely_to_be_kept_as_short_ones():
    seen, shares = evenness(MIXED, group_of=lambda place: int(MIXED[place] > 11))
    short, long = (seen / shares).tolist()
    assert 0.9 < long / short < 1.05  # the last one kept has to fit


# What is drawn


@steady
@given(step_rows=st.lists(st.integers(1, 6), min_size=1, max_size=12), max_rows=st.integers(1, 30))
def test_a_draw_is_a_run_of_one_request_within_max_rows(step_rows, max_rows):
    buffer = ReplayBuffer(100_000)
    buffer.offer(request("a", step_rows))
    for _ in range(10):
        drawn = buffer.draw(max_rows)
        assert all(a.start + a.num_rows == b.start for a, b in pairwise(drawn))
        assert sum(record.num_rows for record in drawn) <= max_rows or len(drawn) == 1
        if sum(step_rows) <= max_rows:
            assert len(drawn) == len(step_rows)


def test_every_row_of_a_request_may_be_drawn():
    buffer = ReplayBuffer(100_000)
    buffer.offer(request("a", (2,) * 10))
    assert {record.start for _ in range(200) for record in buffer.draw(2)} == set(range(0, 20, 2))


def test_domains_are_drawn_evenly_however_many_requests_they_have():
    buffer = ReplayBuffer(1_000_000)
    for place in range(30):
        buffer.offer(request(domain="code" if place % 10 else "sql"))
    domains = [buffer.draw(1)[0].domain for _ in range(1000)]
    counts = torch.tensor([domains.count(domain) for domain in ("code", "sql")])
    assert chi_square_p(counts, torch.tensor([0.5, 0.5])) > 1e-3


def test_requests_of_a_domain_are_drawn_evenly():
    buffer = filled([1, 5, 10, 20, 40], max_bytes=1_000_000)
    drawn = names(buffer, 1000)
    counts = torch.tensor([drawn.count(str(place)) for place in range(5)])
    assert chi_square_p(counts, torch.full((5,), 0.2)) > 1e-3


def test_the_same_stream_and_seed_give_the_same_draws():
    stream = MIXED[:60]
    one, same, other = (filled(stream, cost(200), seed) for seed in (1, 1, 2))
    drawn = names(one)
    assert names(same) == drawn
    assert names(other) != drawn


# Stored requests are what the live ones were


def test_what_becomes_of_a_live_trace_does_not_reach_the_stored_one():
    buffer, (record,) = ReplayBuffer(10_000), request(step_rows=(5,))
    token_ids, states = list(record.trace.token_ids), record.trace.features.final_SD[:5].clone()
    record.trace.max_tokens = 70
    buffer.offer([record])
    record.trace.token_ids.append(99)
    record.trace.features.final_SD.zero_()
    record.trace.num_features = 40
    trace = buffer.draw(64)[0].trace
    assert (trace.token_ids, trace.num_features, trace.max_tokens) == (token_ids, 5, 70)
    assert torch.equal(trace.features.final_SD, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_request_holds_its_rows_and_no_more_memory(dtype):
    buffer, (record,) = ReplayBuffer(10_000), request(step_rows=(5,))
    record.trace.features = record.trace.features.map(lambda rows_SD: rows_SD.to(dtype))
    live = weakref.ref(record.trace)
    buffer.offer([record])
    del record
    gc.collect()
    assert live() is None
    states = buffer.draw(64)[0].trace.features.final_SD
    assert states.dtype == dtype
    assert states.untyped_storage().nbytes() == 5 * HIDDEN * dtype.itemsize
    assert buffer.num_bytes == states.untyped_storage().nbytes() + 6 * 8


def test_labels_of_stored_rows_equal_those_of_the_live_ones():
    target, recorder = rigs.random_target(), Recorder()
    jobs = [([5, 9, 200, 31, 77 + i], GenerationParams(20 + i)) for i in range(3)]
    done = run_together(DecodeLoop(target, Ngram(), recorder), jobs)
    buffer = ReplayBuffer(1_000_000)
    buffer.offer(recorder.feedback)
    assert len(buffer) == 3
    for _ in range(10):
        drawn = buffer.draw(1000)
        live = recorder.of(done[int(drawn[0].request_id)])
        assert len(drawn) == len(live)
        for stored, record in zip(drawn, live, strict=True):
            rows = slice(record.start, record.start + record.num_rows)
            labels, expected = (target.decoder.head(r.trace.features.final_SD[rows]) for r in (stored, record))
            assert torch.equal(labels, expected)
            assert labels.argmax(-1).tolist() == stored.trace.token_ids[rows.start + 1 : rows.stop + 1]
            assert (stored.temperature, stored.is_rejection) == (record.temperature, record.is_rejection)
