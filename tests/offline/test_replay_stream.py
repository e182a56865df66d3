from dataclasses import replace

import pytest
import rigs
import torch
from rigs import SOFT

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.offline.replay_stream import Replaying, record
from onlinespec.workloads import Prompt

TARGET = rigs.random_target(end_token_ids=range(0, 250, 9))
TEXTS = ["to the sea", "a ship", "wind in the evening, and then nothing", "x", "home again"]
PROMPTS = [Prompt(str(i), text, "one" if i < 3 else "other") for i, text in enumerate(TEXTS * 2)]
OFTEN = LearnConfig(min_interval=6, max_interval=12, replay_every=2, max_rows=12, step_size=5e-3)


def counts(stats):
    return stats.requests, stats.tokens, stats.steps, stats.drafted, stats.accepted, stats.accepted_by_position


SAMPLING = {"greedy": SamplingParams(), "soft": SOFT, "cut": SamplingParams(0.7, top_k=20)}
SHORT = {("frozen", "cut"), ("online_gradient", "soft"), ("ensemble/with_frozen=true", "greedy"), ("osd", "cut")}


@pytest.mark.parametrize(
    ("method", "sampling"),
    [
        pytest.param(method, sampling, marks=() if (method, sampling) in SHORT else pytest.mark.full)
        for method in ("frozen", "online_gradient", "ensemble/with_frozen=true", "osd")
        for sampling in SAMPLING
    ],
)
def test_counts_and_learned_weights_are_those_of_decoding(method, sampling):
    params = GenerationParams(30, 3, SAMPLING[sampling])
    drafters = [Eagle.fresh(TARGET) for _ in range(2)]
    real, replayed = (InlineLearning(drafter, config=parse_learner(method, OFTEN)) for drafter in drafters)
    loop = DecodeLoop(TARGET, drafters[0], real)
    decoded = [
        loop.complete(TARGET.encode(p.text), replace(params, seed=i), request_id=p.id, domain=p.domain).stats
        for i, p in enumerate(PROMPTS)
    ]
    replaying = Replaying(TARGET, drafters[1], replayed, 3)
    again = [replaying.replay(recorded) for recorded in record(TARGET, PROMPTS, params)]
    assert [counts(stats) for stats in again] == [counts(stats) for stats in decoded]
    assert real.num_rounds == replayed.num_rounds
    assert real.num_rounds > 0 or method == "frozen"
    one, other = (drafter.weights.params for drafter in drafters)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recording_of_another_target_is_refused():
    (recorded, *_) = record(TARGET, PROMPTS[:1], GenerationParams(5))
    other = rigs.random_target(seed=1)
    with pytest.raises(ValueError, match="recorded with target random-0, this target is random-1"):
        Replaying(other, Ngram(), None, 3).replay(recorded)


def test_prompts_beyond_the_context_are_left_out():
    small = rigs.random_target(context=16)
    prompts = [Prompt("short", "ab", ""), Prompt("long", "ab" * 40, "")]
    assert [recorded.id for recorded in record(small, prompts, GenerationParams(3))] == ["short"]
