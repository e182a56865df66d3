"""Rows of the toy head are random: every token is the likeliest one for some state."""

import pytest
import rigs
import torch
from rigs import SOFT, other_weights, plain

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.decode import DecodeLoop
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.shortlist import Shortlist
from onlinespec.models.linear import PlainLinear

VOCAB, HIDDEN = 64, 16
HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
STATES = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(1))
TARGET = rigs.random_target()
PROMPTS = [[5, 9, 200, 31, 77, 14, 9], [3], list(range(90, 140))]


def shortlist(size=None, head=HEAD, make_linear=PlainLinear):
    return Shortlist(head, make_linear, size)


def listed(some):
    """Every token the list can give."""
    return set(some.best(STATES).tolist())


def see(some, *requests):
    for token_ids in requests:
        some.note(token_ids)
        some.refresh()


def test_the_best_token_is_the_best_of_those_listed():
    some = shortlist(size=4)
    see(some, [50, 51, 52, 53])
    logits = STATES @ HEAD.T
    logits[:, [i for i in range(VOCAB) if i not in (50, 51, 52, 53)]] = -torch.inf
    assert some.best(STATES).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("size", [VOCAB, 10 * VOCAB, None])
def test_a_list_as_long_as_the_vocabulary_is_the_vocabulary(size):
    some = shortlist(size)
    see(some, [3, 4, 5])
    assert some.best(STATES).tolist() == (STATES @ HEAD.T).argmax(-1).tolist()


def test_before_anything_is_seen_low_ids_are_listed():
    assert listed(shortlist(size=8)) == set(range(8))


def test_a_prompts_tokens_are_listed_as_its_request_begins():
    some = shortlist(size=8)
    see(some, [60, 61, 60, 62])
    assert listed(some) == {60, 61, 62, 0, 1, 2, 3, 4}


def test_the_list_follows_the_stream_and_keeps_what_stays_frequent():
    some = shortlist(size=4)
    see(some, *[[10, 11, 12, 13]] * 50)
    assert listed(some) == {10, 11, 12, 13}
    see(some, *[[10, 20, 21, 22]] * 20)
    assert listed(some) == {10, 20, 21, 22}


def test_one_long_ago_yields_to_one_just_now():
    some = shortlist(size=1)
    see(some, [7], [8])
    assert listed(some) == {8}


def test_the_head_is_copied_only_when_the_list_changes():
    copies = []

    def counted(weight, bias):
        copies.append(len(weight))
        return PlainLinear(weight, bias)

    some = shortlist(4, make_linear=counted)
    see(some, [1, 2], [2, 3], [0])  # all listed from the start
    assert copies == [4]
    see(some, [9])
    assert copies == [4, 4]


def test_the_head_may_be_of_half_precision():
    some = shortlist(4, HEAD.bfloat16())
    see(some, [50, 51, 52, 53])
    assert set(some.best(STATES).tolist()) <= {50, 51, 52, 53}


# In a drafter


def eagle(size):
    """Weights that are far from random behaviour, drafting from a list of the given size."""
    fresh = Eagle.fresh(TARGET)
    params = other_weights(fresh.weights, seed=1, scale=0.2).params
    return Eagle(TARGET, fresh.config, params, make_linear=PlainLinear, shortlist=size)


@pytest.mark.parametrize("size", [1, 8, 40])
def test_answers_are_plain_decodings_whatever_is_listed(size):
    loop = DecodeLoop(TARGET, eagle(size))
    params = GenerationParams(max_new_tokens=40, num_draft_tokens=3)
    for prompt in PROMPTS:
        assert loop.complete(prompt, params).output_ids == plain(TARGET, prompt, params).output_ids


def proposals(size, sampling):
    """Every draft of some requests, and the tokens that had been seen before each."""
    drafter, drafts = eagle(size), []
    propose = drafter.propose

    def spy(slots, anchors, *rest):
        drafts.append(propose(slots, anchors, *rest))
        return drafts[-1]

    drafter.propose = spy
    loop = DecodeLoop(TARGET, drafter)
    for prompt in PROMPTS:
        loop.complete(prompt, GenerationParams(max_new_tokens=30, num_draft_tokens=3, sampling=sampling, seed=5))
    return drafts


def test_greedy_drafts_are_of_listed_tokens_only():
    drafts = proposals(len(PROMPTS[0]) + 1, SamplingParams())
    first = {i for draft in drafts[:5] for i in draft.token_ids_BK.flatten().tolist()}
    assert first <= {*PROMPTS[0], 0, 1}  # its distinct tokens, and unseen ones from below
    assert all(draft.probs_BKV is None for draft in drafts)


def test_sampled_drafts_are_over_the_whole_vocabulary_so_that_a_seed_gives_the_same_tokens():
    for some, whole in zip(proposals(4, SOFT), proposals(None, SOFT), strict=True):
        assert torch.equal(some.token_ids_BK, whole.token_ids_BK)
        if whole.num_draft_tokens_B.any():  # the last step has no room for a draft
            assert torch.equal(some.probs_BKV, whole.probs_BKV)
