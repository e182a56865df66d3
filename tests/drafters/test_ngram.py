import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rigs import random_target
from toy import steady

from onlinespec.config import SamplingParams
from onlinespec.core import Features, RequestInfo
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.ngram import Ngram
from onlinespec.lossless.noise import StepNoise

NO_FEATURES, INFO = Features(torch.empty(0, 32)), RequestInfo(capacity=100)


def draft(text, num_draft_tokens=4, max_ngram=3, drafter=None):
    drafter = drafter or Ngram(max_ngram)
    drafter.start(0, INFO, text, NO_FEATURES)
    return proposed(drafter, text, num_draft_tokens)


def proposed(drafter, text, num_draft_tokens=4):
    found = drafter.propose([0], [text[-1]], [num_draft_tokens], [SamplingParams()], StepNoise([None], [len(text)]))
    assert found.probs_BKV is None
    return found.token_ids_BK[0, : found.num_draft_tokens_B[0]].tolist()


def continuation_by_the_book(text, count, max_ngram):
    """The longest end of the text that occurs earlier, where it occurs last."""
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + count]
    return []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 3, 9, 2, 4, 1, 2], [3, 9, 2, 4]),  # the longer match wins over the later one
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2]),  # of equally long ones, the later
        ([7, 7], [7]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_the_continuation_of_the_longest_and_latest_match_is_drafted(text, expected):
    assert draft(text) == expected


@steady
@given(text=st.lists(st.integers(0, 4), min_size=1, max_size=40), count=st.integers(1, 8), max_ngram=st.integers(1, 4))
def test_the_table_finds_what_a_search_through_the_text_finds(text, count, max_ngram):
    assert draft(text, count, max_ngram) == continuation_by_the_book(text, count, max_ngram)


@steady
@given(
    text=st.lists(st.integers(0, 4), min_size=1, max_size=10),
    steps=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=6),
)
def test_committed_tokens_are_found_like_those_of_the_prompt(text, steps):
    drafter = Ngram()
    drafter.start(0, INFO, text, NO_FEATURES)
    for committed in steps:
        drafter.observe([0], [committed], [NO_FEATURES])
        text = text + committed
    assert proposed(drafter, text) == continuation_by_the_book(text, 4, 3)


def test_requests_of_a_batch_look_into_their_own_text_only():
    drafter = Ngram()
    drafter.start(0, INFO, [1, 2, 1], NO_FEATURES)
    drafter.start(1, INFO, [1, 5, 1], NO_FEATURES)
    drafter.start(2, INFO, [1], NO_FEATURES)
    found = drafter.propose([2, 0, 1], [1, 1, 1], [2, 2, 1], [SamplingParams()] * 3, StepNoise([None] * 3, [3] * 3))
    assert found.num_draft_tokens_B.tolist() == [0, 2, 1]
    assert found.token_ids_BK.tolist() == [[0, 0], [2, 1], [5, 0]]


def test_it_does_not_learn_and_says_so():
    drafter = Ngram()
    assert not drafter.is_trainable
    for refused in (lambda: drafter.batch([]), lambda: drafter.loss({}, []), lambda: drafter.swap(drafter.weights)):
        with pytest.raises(TypeError, match="Ngram"):
            refused()


def test_the_length_of_its_matches_is_saved(tmp_path):
    Ngram(max_ngram=5).save(tmp_path / "drafter")
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["max_ngram"] == 5
    assert load_drafter(tmp_path / "drafter", random_target()).max_ngram == 5


@pytest.mark.parametrize("given", [{}, {"max_ngram": "3"}, {"max_ngram": 0}, {"max_ngram": True}])
def test_a_folder_without_a_usable_length_is_refused_by_name(tmp_path, given):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NgramDrafter"], **given}))
    with pytest.raises(ValueError, match="max_ngram is"):
        load_drafter(tmp_path, random_target())
