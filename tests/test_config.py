import math

import pytest

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams
from onlinespec.learning.settings import LearnConfig

WRONG = [
    (SamplingParams, "temperature", [-0.1, math.inf, math.nan]),
    (SamplingParams, "top_k", [-1]),
    (SamplingParams, "top_p", [0, -1, 1.01, math.nan]),
    (SamplingParams, "min_p", [-0.1, 1.1, math.nan]),
    (SamplingParams, "repetition_penalty", [0, -1, math.inf, math.nan]),
    (SamplingParams, "presence_penalty", [-2.1, 2.1, math.nan]),
    (SamplingParams, "frequency_penalty", [-2.1, 2.1, math.nan]),
    (GenerationParams, "max_new_tokens", [0, -5]),
    (GenerationParams, "num_draft_tokens", [-1, MAX_DRAFT_TOKENS + 1]),
    (GenerationParams, "stop_strings", [("",), ("a", "")]),
    (LearnConfig, "step_size", [-1e-3, math.inf, math.nan]),
    (LearnConfig, "clip_norm", [0, -1, math.nan]),
    (LearnConfig, "full_loss", [-1, math.inf, math.nan]),
    (LearnConfig, "min_interval", [0]),
    (LearnConfig, "max_interval", [LearnConfig.min_interval - 1]),
    (LearnConfig, "max_rows", [0]),
]
RIGHT = [
    (SamplingParams, "temperature", [0, 1e-9, 100.0]),
    (SamplingParams, "top_p", [1e-9, 1]),
    (SamplingParams, "min_p", [0, 1]),
    (SamplingParams, "presence_penalty", [-2, 2]),
    (GenerationParams, "max_new_tokens", [1]),
    (GenerationParams, "num_draft_tokens", [0, MAX_DRAFT_TOKENS]),
    (LearnConfig, "step_size", [0]),
    (LearnConfig, "max_interval", [LearnConfig.min_interval]),
]


def cases(table):
    return [pytest.param(cls, name, value, id=f"{name}={value}") for cls, name, values in table for value in values]


@pytest.mark.parametrize(("cls", "name", "value"), cases(WRONG))
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(cls, name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be ") as raised:
        cls(**{name: value})
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(("cls", "name", "value"), cases(RIGHT))
def test_the_ends_of_the_range_are_allowed(cls, name, value):
    assert getattr(cls(**{name: value}), name) == value


def test_the_most_draft_tokens_are_sixteen():
    assert MAX_DRAFT_TOKENS == 16


def test_the_defaults_are_greedy_and_change_nothing():
    assert SamplingParams().is_greedy
    assert not SamplingParams().has_penalties
    assert GenerationParams().sampling == SamplingParams()
    assert GenerationParams().max_new_tokens == 96


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_makes_rows_depend_on_history(name):
    assert SamplingParams(**{name: 1.5}).has_penalties
