"""A drafter that reads aux layers gets them wherever features go, and they are what one forward over the text gives."""

from __future__ import annotations

import aux_drafters
import pytest
import rigs
import torch
from aux_drafters import LAYERS, Keeping, Noting
from rigs import Recorder
from waiting import HANG_SECONDS, wait_until

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import Features
from onlinespec.engine.prefix_cache import PrefixCache
from onlinespec.engine.scheduler import Scheduler
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.replay import ReplayBuffer
from onlinespec.learning.update import InlineLearning
from onlinespec.offline.replay_stream import Replaying, record
from onlinespec.offline.target_answers import Answers
from onlinespec.publishing.learning_process import ProcessLearning
from onlinespec.publishing.protocol import Incoming, Outgoing, decode, encode
from onlinespec.publishing.workers import ThreadLearning, TrainerSpec
from onlinespec.workloads import Prompt

TARGET = rigs.random_target()
OFTEN = "online_gradient/min_interval=8/max_interval=8/replay_every=2/budget=inf"


def prompt(count, seed=0):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def forward(token_ids):
    """Features of a text in one forward, with the layers that are read."""
    cache = TARGET.decoder.new_cache()
    cache.take(0, len(token_ids))
    ids = torch.tensor(token_ids)
    return TARGET.decoder.forward(ids, [0], [len(ids)], cache, aux_layer_ids=LAYERS).features


def assert_of(features, token_ids):
    """They are those of the text, to the bit, as far as they go."""
    expected = forward(list(token_ids)[: len(features)])
    assert len(features)
    assert sorted(features.aux) == sorted(LAYERS)
    assert not torch.equal(features.aux[2], features.final_SD)
    for rows, wanted in zip(features.layers, expected.layers, strict=True):
        assert torch.equal(rows, wanted)


@pytest.mark.parametrize("pieces", [32, 64, 1000])
@pytest.mark.parametrize("wrong_at", [(), (131, 135, 136), range(200)], ids=["right", "rejections", "wrong"])
def test_after_prefill_in_pieces_and_through_drafts_and_rejections(pieces, wrong_at):
    ids, params = prompt(130), GenerationParams(16, num_draft_tokens=3)  # ends in a block of 32 that no forward fills
    text = rigs.plain(TARGET, ids, params).trace.token_ids
    drafter = Keeping(text, wrong_at)
    loop = DecodeLoop(TARGET, drafter)
    request = loop.open(ids, params)
    loop.admit(request)
    while not request.is_ready:
        loop.prefill([request], pieces)
    assert_of(drafter.told[request.slot], ids[:-1])
    while request.finish_reason is None:
        loop.step([request])
        assert_of(request.trace.features[: request.trace.num_features], text)
        if request.finish_reason is None:
            assert_of(drafter.told[request.slot], text)
            assert len(drafter.told[request.slot]) == len(request.trace.token_ids) - 1
    loop.finish(request)
    assert request.trace.token_ids == text
    ((_, is_finished),) = drafter.released
    assert is_finished


def test_from_the_prefix_cache():
    ids, params = prompt(150), GenerationParams(4)
    drafter = Keeping([])
    loop = DecodeLoop(TARGET, drafter, prefixes=PrefixCache(10**8))
    for end in (120, 150):
        request = loop.start(ids[:end], params)
        assert_of(drafter.told[request.slot], ids[: end - 1])
        loop.finish(request)
    assert request.num_cached == 96
    assert [is_finished for _, is_finished in drafter.released] == [False, False], "they were given up"


def test_of_requests_that_run_together_and_of_one_whose_step_failed():
    drafter = Keeping([])
    scheduler = Scheduler(DecodeLoop(TARGET, drafter), Limits(4))
    requests = [scheduler.loop.open(prompt(20 + 30 * i, seed=i), GenerationParams(9)) for i in range(3)]
    scheduler.submit(*requests)
    observe, calls = drafter.observe, []

    def failing_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("once")
        observe(*args)

    drafter.observe = failing_once
    while scheduler.has_work:
        scheduler.step()
        for request in scheduler.running:
            if request.is_drafting:
                assert_of(drafter.told[request.slot], request.trace.token_ids)
    assert all(request.finish_reason == "length" for request in requests)


def test_in_the_memory_that_replays_them():
    memory, recorder = ReplayBuffer(10**7), Recorder()
    loop = DecodeLoop(TARGET, Keeping([]), recorder)
    request = loop.complete(prompt(40), GenerationParams(12))
    kept = request.trace.features[: request.trace.num_features].num_bytes + 8 * len(request.trace.token_ids)
    memory.offer(recorder.feedback)
    request.trace.features.final_SD.zero_()
    assert memory.num_bytes == kept
    stored = memory.draw(64)[0].trace
    assert_of(stored.features, stored.token_ids)


def test_through_the_protocol():
    recorder, outgoing, incoming = Recorder(), Outgoing(), Incoming()
    loop = DecodeLoop(TARGET, Keeping([]), recorder)
    loop.complete(prompt(40), GenerationParams(12))
    arrived = [one for sent in recorder.feedback for one in incoming.records(decode(encode(outgoing.batch([sent]))))]
    trace = arrived[-1].trace
    assert_of(trace.features[: trace.num_features], trace.token_ids)
    assert trace.num_features == len(trace.token_ids) - 1


def noted(folder, kind=""):
    """What `Noting` wrote down, each checked."""
    paths = list(folder.glob(f"*{kind}.pt"))
    for path in paths:
        token_ids, final_SD, aux = torch.load(path)
        assert_of(Features(final_SD, aux), token_ids)
    return paths


def test_in_rounds_and_in_what_they_replay(tmp_path, monkeypatch):
    monkeypatch.setenv(aux_drafters.NOTES, str(tmp_path))
    drafter = Noting.fresh(TARGET)
    learning = InlineLearning(drafter, config=parse_learner(OFTEN))
    for i in range(4):
        DecodeLoop(TARGET, drafter, learning).complete(prompt(9 + i, i), GenerationParams(20), request_id=str(i))
    assert learning.num_rounds > 2
    assert not learning.is_frozen
    assert noted(tmp_path, "fresh")
    assert noted(tmp_path, "replayed")


SPEC = TrainerSpec("aux_drafters:Noting", config=parse_learner(OFTEN), share=1.0)


@pytest.mark.parametrize("way", [ThreadLearning, ProcessLearning])
def test_beside_serving_in_a_thread_or_another_process(way, tmp_path, monkeypatch):
    monkeypatch.setenv(aux_drafters.NOTES, str(tmp_path))
    drafter = Noting.fresh(TARGET)
    learning = way(TARGET, SPEC, drafter.weights, drafter.swap)
    learning.start()
    loop, served = DecodeLoop(TARGET, drafter, learning), []

    def serve():
        i = len(served)
        served.append(loop.complete(prompt(9 + i % 5, i), GenerationParams(20), request_id=str(i)))

    try:
        wait_until(lambda: len(noted(tmp_path, "fresh")) > 3 or learning.failure, serve)
    finally:
        learning.stop(HANG_SECONDS)
    assert not learning.failure


def test_from_disk(tmp_path):
    params = [GenerationParams(9, sampling=SamplingParams(temperature), seed=1) for temperature in (0.0, 1.0)]
    prompts = [Prompt(id="a", text="the sea", domain=""), Prompt(id="b", text="the wind and the ships", domain="")]
    Answers(tmp_path, TARGET, LAYERS).ask(prompts, params.__getitem__)
    read = Answers(tmp_path, TARGET, LAYERS)
    for i in range(2):
        trace = read.feedback(i).trace
        assert_of(trace.features, trace.token_ids)
    assert Answers(tmp_path, TARGET).feedback(0).num_rows, "who reads no aux layers may read them, too"


def test_answers_that_lack_a_layer_are_refused(tmp_path):
    Answers(tmp_path, TARGET, [2]).ask([Prompt(id="a", text="the sea", domain="")], lambda _: GenerationParams(4))
    with pytest.raises(ValueError, match=r"lacks the states of layers \[0\], which the drafter reads"):
        Answers(tmp_path, TARGET, LAYERS)


def test_from_a_recorded_stream():
    (recorded,) = record(
        TARGET, [Prompt(id="a", text="the sea", domain="")], GenerationParams(16), aux_layer_ids=LAYERS
    )
    drafter = Keeping(recorded.token_ids, wrong_at=(recorded.num_prompt_tokens + 2,))
    Replaying(TARGET, drafter, None, num_draft_tokens=3).replay(recorded)
    ((told, is_finished),) = drafter.released
    assert_of(told, recorded.token_ids)
    assert is_finished


def test_they_are_counted_where_memory_is():
    request = DecodeLoop(TARGET).open([1, 2, 3], GenerationParams(10))
    sizes = [DecodeLoop(TARGET, drafter).num_bytes(request) for drafter in (None, Keeping([]))]
    assert sizes[1] - sizes[0] == 13 * len(LAYERS) * TARGET.decoder.config.layer.hidden_size * 4
