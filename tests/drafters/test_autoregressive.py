"""A request is drafted as deep as it wants, whatever its neighbours want."""

from __future__ import annotations

import pytest
import rigs
import torch
from rigs import SOFT, hidden_states

from onlinespec.config import SamplingParams
from onlinespec.core import Features, RequestInfo
from onlinespec.drafters.loading import load_drafter
from onlinespec.lossless.noise import Noise, StepNoise

TARGET = rigs.random_target()
TEXTS = [[5, 9, 200, 31, 77], [3, 14], list(range(40, 60)), [8, 8, 8]]
TRAINABLE = ("eagle", "small_lm")


def propose(drafter, wanted, sampling=SamplingParams()):
    """A draft for the texts, from a fresh start."""
    for slot, ids in enumerate(TEXTS):
        drafter.start(slot, RequestInfo(capacity=64), ids, Features(hidden_states(TARGET, ids)[:-1]))
    noise = [None if sampling.is_greedy else Noise(slot, 0, 288) for slot in range(len(TEXTS))]
    draft = drafter.propose(
        list(range(len(TEXTS))),
        [ids[-1] for ids in TEXTS],
        wanted,
        [sampling] * len(TEXTS),
        StepNoise(noise, [len(ids) for ids in TEXTS]),
    )
    lengths = dict(drafter._cache.lengths)
    for slot in range(len(TEXTS)):
        drafter.release(slot, is_finished=False)
    counts = draft.num_draft_tokens_B.tolist()
    return [row[:count] for row, count in zip(draft.token_ids_BK.tolist(), counts, strict=True)], lengths


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_depth_reads_the_requests_that_go_beyond_it_and_no_others(name, monkeypatch):
    drafter, read = load_drafter(name, TARGET), []
    plain_read = drafter._read

    def noting(token_ids_N, features, slots, counts):
        read.append(list(slots))
        return plain_read(token_ids_N, features, slots, counts)

    monkeypatch.setattr(drafter, "_read", noting)
    _, lengths = propose(drafter, [3, 1, 0, 4])
    assert [sorted(slots) for slots in read] == [[0, 1, 3], [0, 3], [0, 3], [3]]
    rows = [len(ids) - drafter.num_before for ids in TEXTS]
    assert lengths == {0: rows[0], 1: rows[1], 2: 0, 3: rows[3]}, "the cache ends with what is real"


@pytest.mark.parametrize("sampling", [SamplingParams(), SOFT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_what_a_request_drafts_does_not_depend_on_how_deep_its_neighbours_go(name, sampling):
    drafter = load_drafter(name, TARGET)
    deep, _ = propose(drafter, [5, 5, 5, 5], sampling)
    for wanted in ([1, 2, 3, 4], [5, 0, 2, 1], [0, 0, 0, 3]):
        drafted, _ = propose(drafter, wanted, sampling)
        assert drafted == [ids[:count] for ids, count in zip(deep, wanted, strict=True)]


def test_a_batch_in_which_no_one_drafts_reads_nothing(monkeypatch):
    drafter = load_drafter("eagle", TARGET)
    monkeypatch.setattr(drafter, "_read", None)
    drafted, lengths = propose(drafter, [0, 0, 0, 0])
    assert drafted == [[]] * 4
    assert set(lengths.values()) == {0}


def test_tokens_of_a_request_that_may_not_be_learned_from_are_not_counted():
    drafter = load_drafter("eagle", TARGET)
    for slot, may_learn in enumerate([False, True]):
        info = RequestInfo(capacity=64, may_learn=may_learn)
        drafter.start(slot, info, [3, 4, 5], Features(torch.zeros(2, 32)))
        drafter.observe([slot], [[6, 7]], [Features(torch.zeros(2, 32))])
        assert drafter.draft_vocab._num_seen == 5 * may_learn
