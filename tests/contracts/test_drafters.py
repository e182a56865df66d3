"""What every drafter of the table keeps, whatever it is: a new line in `DRAFTERS` is tested by being there."""

import json
import math
import os
from dataclasses import replace
from functools import cache
from itertools import pairwise
from random import Random

import pytest
import rigs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import SOFT, Recorder, hidden_states, other_weights, plain, run_together
from toy import chi_square_p, enumerate_law, sequence_counts, steady

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats, DrafterWeights, Features, RequestInfo
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners import make_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.lossless.noise import Noise, StepNoise
from onlinespec.lossless.rejection import Rejection
from onlinespec.registry import DRAFTERS

GREEDY = SamplingParams()


def random_ids(count, seed, vocab=256):
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_ids(count, seed) for seed, count in enumerate([1, 2, 200, 17])]


@cache
def the_target():
    return rigs.random_target()


@cache
def answers_to_learn():
    """What learning is told, step by step, while the target answers PROMPTS."""
    recorder = Recorder()
    loop = DecodeLoop(the_target(), load_drafter("ngram", the_target()), recorder)
    run_together(loop, [(prompt, GenerationParams(48, num_draft_tokens=0)) for prompt in PROMPTS])
    told = recorder.feedback
    return [told[i : i + len(PROMPTS)] for i in range(0, len(told), len(PROMPTS))]


@cache
def warm_params(name):
    """Weights that learned the target's answers to PROMPTS by heart, so that whole runs are accepted."""
    drafter = load_drafter(name, the_target())
    learner = make_learner("online_gradient", 5e-3)
    config = LearnConfig(min_interval=48, max_interval=48, replay_every=0, budget=math.inf, loss="soft_cross_entropy")
    learning = InlineLearning(drafter, learner, config)
    for told in answers_to_learn() * 9:
        learning.offer(told)
    assert not learning.is_frozen
    return drafter.weights.params


def make_drafter(name):
    drafter = load_drafter(name, the_target())
    if drafter.is_trainable:
        drafter.swap(DrafterWeights(warm_params(name), version=1))
    return drafter


@pytest.fixture(params=DRAFTERS)
def name(request):
    return request.param


@pytest.fixture
def drafter(name):
    return make_drafter(name)


@pytest.fixture
def target():
    return the_target()


@cache
def plain_answer(prompt_place, **params):
    return plain(the_target(), PROMPTS[prompt_place], GenerationParams(**params)).output_ids


def total(requests):
    return sum((request.stats for request in requests), DecodeStats())


# Greedy output is plain decoding's


@pytest.mark.parametrize("num_draft_tokens", [0, *(pytest.param(K, marks=pytest.mark.full) for K in (1, 4)), 16])
def test_greedy_output_equals_plain_decoding(drafter, target, num_draft_tokens):
    recorder = Recorder()
    loop = DecodeLoop(target, drafter, recorder)
    for place, prompt in enumerate(PROMPTS):
        request = loop.complete(prompt, GenerationParams(max_new_tokens=64, num_draft_tokens=num_draft_tokens))
        assert request.output_ids == plain_answer(place, max_new_tokens=64)
    if num_draft_tokens:
        drafted = [(record.num_rows - 1, record.num_draft_tokens) for record in recorder.feedback]
        assert any(accepted == 0 for accepted, count in drafted if count), "no draft was refused at once"
        assert any(accepted == count > 0 for accepted, count in drafted), "no draft was accepted whole"


def test_greedy_output_equals_plain_decoding_in_batches_that_requests_join_and_leave(drafter, target):
    lengths_and_drafts = [(3, 16), (40, 16), (9, 1), (64, 4), (1, 4), (30, 0), (25, 16), (50, 2)]
    places = [i % len(PROMPTS) for i in range(len(lengths_and_drafts))]
    jobs = [
        (PROMPTS[place], GenerationParams(max_new_tokens=length, num_draft_tokens=count))
        for place, (length, count) in zip(places, lengths_and_drafts, strict=True)
    ]
    done = run_together(DecodeLoop(target, drafter), jobs, max_running=3)
    for place, request in zip(places, done, strict=True):
        assert request.output_ids == plain_answer(place, max_new_tokens=64)[: len(request.output_ids)]
        assert len(request.output_ids) == request.params.max_new_tokens
    assert 0 < total(done).accepted < total(done).drafted


def test_greedy_and_sampled_requests_share_a_batch(drafter, target):
    sampled = GenerationParams(max_new_tokens=20, sampling=SOFT, seed=3)
    jobs = [(PROMPTS[0], GenerationParams(max_new_tokens=20)), (PROMPTS[1], sampled), (PROMPTS[2], sampled)]
    together = run_together(DecodeLoop(target, drafter), jobs)
    alone = [DecodeLoop(target, drafter).complete(*job) for job in jobs]
    assert [request.output_ids for request in together] == [request.output_ids for request in alone]
    assert together[0].output_ids == plain_answer(0, max_new_tokens=40)[:20]


def test_greedy_output_survives_other_weights_between_steps(drafter, target):
    if not drafter.is_trainable:
        pytest.skip("has no weights")

    def swap():
        drafter.swap(other_weights(drafter.weights, seed=drafter.weights.version, scale=0.02))

    recorder = Recorder()
    jobs = [(prompt, GenerationParams(max_new_tokens=40)) for prompt in PROMPTS]
    done = run_together(DecodeLoop(target, drafter, recorder), jobs, between_steps=swap)
    versions = {record.weights_version for record in recorder.feedback}
    assert len(versions) > 5
    assert total(done).accepted > 0
    for place, request in enumerate(done):
        assert request.output_ids == plain_answer(place, max_new_tokens=40)


def test_greedy_output_survives_learning_between_steps(drafter, target):
    learner = make_learner("online_gradient", step_size=1e-2)
    learning = InlineLearning(drafter, learner, LearnConfig(min_interval=8, max_interval=8, max_rows=16))
    jobs = [(prompt, GenerationParams(max_new_tokens=40)) for prompt in PROMPTS]
    done = run_together(DecodeLoop(target, drafter, learning), jobs, max_running=2)
    assert learning.num_rounds > 5 or not drafter.is_trainable
    assert learning.is_frozen == (not drafter.is_trainable)
    assert total(done).accepted > 0
    for place, request in enumerate(done):
        assert request.output_ids == plain_answer(place, max_new_tokens=40)


def test_an_end_token_inside_an_accepted_run_ends_the_answer(drafter, target):
    recorder = Recorder()
    whole = DecodeLoop(target, drafter, recorder).complete(PROMPTS[2], GenerationParams(max_new_tokens=64))
    text = whole.trace.token_ids
    runs = [text[: record.start + record.num_rows + 1] for record in recorder.feedback if record.num_rows >= 4]
    assert runs, "no run of three accepted tokens"
    for run, num_rows in zip(runs, (r.num_rows for r in recorder.feedback if r.num_rows >= 4), strict=True):
        prompt, answer = run[:-num_rows], run[-num_rows:]
        end = answer.index(answer[1])
        ending = replace(target, end_token_ids=frozenset([answer[end]]))
        steps = Recorder()
        request = DecodeLoop(ending, drafter, steps).complete(prompt, GenerationParams(max_new_tokens=64))
        assert request.output_ids == answer[: end + 1]
        assert request.finish_reason == "stop"
        (cut,) = steps.feedback
        assert cut.num_rows == end + 1 < cut.num_draft_tokens
        assert request.stats.tokens == request.stats.steps + request.stats.accepted


@pytest.mark.parametrize("max_new_tokens", range(1, 8))
def test_the_limit_of_new_tokens_is_kept_exactly(drafter, target, max_new_tokens):
    request = DecodeLoop(target, drafter).complete(PROMPTS[3], GenerationParams(max_new_tokens, num_draft_tokens=4))
    assert request.output_ids == plain_answer(3, max_new_tokens=64)[:max_new_tokens]
    assert request.finish_reason == "length"


def test_requests_near_their_end_are_batched_with_long_drafts(drafter, target):
    jobs = [(PROMPTS[3], GenerationParams(length, num_draft_tokens=16)) for length in range(1, 20)]
    for request in run_together(DecodeLoop(target, drafter), jobs):
        assert request.output_ids == plain_answer(3, max_new_tokens=64)[: request.params.max_new_tokens]


@pytest.mark.parametrize("num_draft_tokens", [1, 16])
def test_the_context_is_filled_to_its_last_position(name, num_draft_tokens):
    small = rigs.random_target(context=61)
    params = GenerationParams(max_new_tokens=100, num_draft_tokens=num_draft_tokens)
    request = DecodeLoop(small, load_drafter(name, small)).complete(PROMPTS[3], params)
    assert request.finish_reason == "context"
    assert len(request.trace.token_ids) == 61
    assert request.output_ids == plain_answer(3, max_new_tokens=64)[: 61 - 17]


# Sampled output is plain decoding's, too, with the same seed

COOL = SamplingParams(temperature=0.8, top_k=60, presence_penalty=0.7)
SAMPLED = [  # two choices of one seed, and others
    (PROMPTS[i % 4], GenerationParams(16, K, sampling=sampling, seed=i // 3, choice=i % 3))
    for i, (K, sampling) in enumerate([(0, SOFT), (2, SOFT), (5, COOL), (16, SOFT), (2, COOL), (5, SOFT)] * 3)
]


@cache
def plain_samples():
    return [plain(the_target(), *job).output_ids for job in SAMPLED]


def outputs(requests):
    return [request.output_ids for request in requests]


def test_sampled_output_equals_plain_decoding_alone_and_among_sixteen(drafter, target):
    together = run_together(DecodeLoop(target, drafter), SAMPLED, max_running=16)
    assert outputs(together) == plain_samples()
    assert [DecodeLoop(target, drafter).complete(*job).output_ids for job in SAMPLED[:6]] == plain_samples()[:6]
    assert 0 < total(together).accepted < total(together).drafted


@pytest.mark.parametrize("temperature", [1e-50, 1e-30])
def test_a_vanishing_temperature_drafts_as_greedy_does(drafter, target, temperature):
    greedy, params = GenerationParams(24), GenerationParams(24, sampling=SamplingParams(temperature=temperature))
    stats = [DecodeLoop(target, drafter).complete(PROMPTS[2], each).stats for each in (greedy, params)]
    assert stats[0].accepted == stats[1].accepted > 0


def test_choices_of_one_seed_are_different_answers():
    answers = [tuple(plain(the_target(), PROMPTS[1], replace(SAMPLED[0][1], choice=i)).output_ids) for i in range(3)]
    assert len(set(answers)) == 3


def test_sampled_output_survives_learning_between_steps(drafter, target):
    learner = make_learner("online_gradient", step_size=1e-2)
    learning = InlineLearning(drafter, learner, LearnConfig(min_interval=8, max_interval=8, max_rows=16))
    done = run_together(DecodeLoop(target, drafter, learning), SAMPLED[:9], max_running=5)
    assert outputs(done) == plain_samples()[:9]
    assert learning.num_rounds > 5 or not drafter.is_trainable


def test_sampled_output_survives_other_weights_between_steps(drafter, target):
    if not drafter.is_trainable:
        pytest.skip("has no weights")

    def swap():
        drafter.swap(other_weights(drafter.weights, seed=drafter.weights.version, scale=0.02))

    done = run_together(DecodeLoop(target, drafter), SAMPLED[:9], between_steps=swap)
    assert outputs(done) == plain_samples()[:9]


def by_chance(requests, rng=Random(3)):  # noqa: B008  (one stream for all steps)
    """A chooser that is random."""
    return [rng.randrange(17) for _ in requests]


def by_the_noise(requests):
    """A chooser that reads the noise of the tokens to come."""
    rows = [request.noise.row(len(request.trace.token_ids)) for request in requests]
    return [int(row.argmax()) % 17 for row in rows]


@pytest.mark.parametrize("choose", [by_chance, by_the_noise])
def test_a_choice_of_draft_lengths_may_depend_on_anything(drafter, target, choose):
    jobs = [(prompt, replace(params, num_draft_tokens=16)) for prompt, params in SAMPLED[:8]]
    loop = DecodeLoop(target, drafter)
    requests = [loop.start(*job) for job in jobs]
    while running := [request for request in requests if not request.finish_reason]:
        loop.step(running, choose(running))
    assert outputs(requests) == plain_samples()[:8]
    assert 0 < total(requests).accepted < total(requests).drafted


# Its law is the target's

LAW_VOCAB, LAW_TOKENS = 5, 4
FEW_RUNS = 600  # enough to catch a wrong rule
NUM_RUNS = [FEW_RUNS, pytest.param(4000, marks=pytest.mark.full)]
LAW_PROMPT = [0, 3, 0, 1, 0, 2, 0]  # lookup finds something behind every token


class ArgmaxWithSoftRows(Eagle):
    """WRONG: drafts the likeliest token and passes it off as drawn from its row."""

    def propose(self, *args):
        draft = super().propose(*args)
        return draft if draft.probs_BKV is None else draft._replace(token_ids_BK=draft.probs_BKV.argmax(-1))


def law_runs(drafter, target, num_runs, rule=None, num_draft_tokens=3):
    sampling = replace(SOFT, temperature=0.9)
    jobs = [
        (LAW_PROMPT, GenerationParams(LAW_TOKENS, num_draft_tokens, sampling=sampling, seed=seed))
        for seed in range(num_runs)
    ]
    done = run_together(DecodeLoop(target, drafter, rule=rule), jobs)
    if drafter:
        assert 0.05 < total(done).acceptance_rate < 0.97, "hardly a draft was accepted, or refused"
    counts = sequence_counts(torch.tensor(outputs(done)), LAW_VOCAB)
    rows = (rigs.table_logits(target) / sampling.temperature).softmax(-1)
    return chi_square_p(counts, enumerate_law(rows, LAW_PROMPT[-1], LAW_TOKENS))


def middling(name, target):
    """A drafter that is right now and then: a fresh one may know a target without layers by heart."""
    drafter = load_drafter(name, target)
    if drafter.is_trainable:
        drafter.swap(other_weights(drafter.weights, seed=0))
    return drafter


@pytest.fixture(scope="module")
def law_target():
    return rigs.table_target(LAW_VOCAB)


@pytest.mark.parametrize("num_runs", NUM_RUNS)
def test_sampled_plain_decoding_follows_the_target_law(law_target, num_runs):
    assert law_runs(None, law_target, num_runs) > 1e-4


@pytest.mark.parametrize("num_runs", NUM_RUNS)
def test_the_papers_rule_follows_the_target_law_with_every_drafter(name, law_target, num_runs):
    assert law_runs(middling(name, law_target), law_target, num_runs, Rejection()) > 1e-4


def test_the_law_test_catches_an_argmax_passed_off_as_a_draw(law_target):
    assert law_runs(ArgmaxWithSoftRows.fresh(law_target), law_target, FEW_RUNS, Rejection()) < 1e-4


# Drafts


def start(drafter, target, slot, token_ids, capacity=400):
    drafter.start(slot, RequestInfo(capacity=capacity), token_ids, Features(hidden_states(target, token_ids)[:-1]))


def propose(drafter, texts, sampling=SOFT, num_draft_tokens=5, slots=None, seed=0):
    """A draft for each text, under slots 0, 1, ... or the given ones."""
    is_greedy, vocab = sampling.is_greedy, the_target().decoder.config.vocab_size
    noise = StepNoise(
        [None if is_greedy else Noise(seed + slot, 0, vocab) for slot in texts], [len(ids) for ids in texts.values()]
    )
    anchors = [ids[-1] for ids in texts.values()]
    return drafter.propose(list(texts), anchors, [num_draft_tokens] * len(texts), [sampling] * len(texts), noise)


def assert_same_draft(one, other):
    assert one.num_draft_tokens_B.tolist() == other.num_draft_tokens_B.tolist()
    assert drafted_ids(one) == drafted_ids(other)
    assert (one.probs_BKV is None) == (other.probs_BKV is None)
    if one.probs_BKV is not None:
        torch.testing.assert_close(one.probs_BKV, other.probs_BKV, atol=1e-5, rtol=1e-3)


def drafted_ids(draft):
    rows = zip(draft.token_ids_BK.tolist(), draft.num_draft_tokens_B.tolist(), strict=True)
    return [ids[:count] for ids, count in rows]


TEXTS = {slot: random_ids(count, seed=slot, vocab=9) for slot, count in enumerate([40, 2, 130, 31])}


@pytest.fixture
def started(drafter, target):
    for slot, ids in TEXTS.items():
        start(drafter, target, slot, ids)
    return drafter


@pytest.mark.parametrize("sampling", [SOFT, GREEDY], ids=["soft", "greedy"])
def test_drafted_tokens_come_from_rows_that_sum_to_one(started, target, sampling):
    started.gives_probs = True
    draft = propose(started, TEXTS, sampling)
    assert draft.weights_version_B == (started.weights.version,) * len(TEXTS)
    assert draft.member_B == (0,) * len(TEXTS)
    assert draft.num_draft_tokens_B.sum() > 0
    assert all(0 <= i < target.decoder.config.vocab_size for ids in drafted_ids(draft) for i in ids)
    assert (draft.probs_BKV is None) == (not started.is_trainable or sampling.is_greedy)
    if draft.probs_BKV is not None:
        for row, ids in zip(draft.probs_BKV, drafted_ids(draft), strict=True):
            torch.testing.assert_close(row[: len(ids)].sum(-1), torch.ones(len(ids)))
            assert (row[torch.arange(len(ids)), ids] > 0).all()


@pytest.mark.parametrize("sampling", [SOFT, GREEDY], ids=["soft", "greedy"])
def test_proposing_twice_gives_the_same_draft(started, sampling):
    assert_same_draft(propose(started, TEXTS, sampling), propose(started, TEXTS, sampling))


def test_the_order_of_requests_in_a_batch_does_not_matter(started):
    forward, backward = propose(started, TEXTS), propose(started, dict(reversed(TEXTS.items())))
    assert drafted_ids(forward) == drafted_ids(backward)[::-1]
    alone = [drafted_ids(propose(started, {slot: ids}))[0] for slot, ids in TEXTS.items()]
    assert drafted_ids(forward) == alone


def test_the_same_seed_gives_the_same_tokens(drafter, target):
    jobs = [(prompt, GenerationParams(16, sampling=SOFT, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
    first, second = (run_together(DecodeLoop(target, drafter), jobs) for _ in range(2))
    assert [request.output_ids for request in first] == [request.output_ids for request in second]
    assert [request.stats.accepted for request in first] == [request.stats.accepted for request in second]


verdicts = st.tuples(
    st.booleans(),  # whether there was a draft at all
    st.integers(0, 5),  # how many of its tokens were accepted, at most
    st.integers(0, 8),  # the recovered or bonus token
)


@settings(steady, max_examples=25)
@pytest.mark.parametrize("name", DRAFTERS)
@given(history=st.lists(verdicts, max_size=8), num_prompt=st.integers(1, 20))
def test_state_after_any_history_equals_state_from_scratch(name, history, num_prompt):
    target, drafter = the_target(), load_drafter(name, the_target())
    text = random_ids(num_prompt, seed=num_prompt, vocab=9)
    start(drafter, target, 0, text)
    for is_drafted, num_accepted, last_id in history:
        kept = drafted_ids(propose(drafter, {0: text}))[0][:num_accepted] if is_drafted else []
        committed = [*kept, last_id]
        features = Features(hidden_states(target, text + kept))[-len(committed) :]
        drafter.observe([0], [committed], [features])
        text = text + committed
    after_history = propose(drafter, {0: text})
    drafter.release(0, is_finished=True)
    start(drafter, target, 0, text)
    assert_same_draft(after_history, propose(drafter, {0: text}))


@pytest.mark.parametrize("place", [0, 2, -1], ids=["first", "third", "last"])
def test_a_swap_that_fails_leaves_what_was_there(started, place):
    if not started.is_trainable:
        pytest.skip("has no weights")
    weights, before = started.weights, propose(started, TEXTS, num_draft_tokens=3)
    broken = dict(other_weights(weights, seed=1).params)
    broken[list(broken)[place]] = None
    with pytest.raises((AttributeError, TypeError)):
        started.swap(DrafterWeights(broken, weights.version + 1))
    assert started.weights is weights
    assert_same_draft(propose(started, TEXTS, num_draft_tokens=3), before)


# On disk


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_drafter_drafts_the_same_and_keeps_its_version(started, target, tmp_path):
    if started.is_trainable:
        started.swap(replace(started.weights, version=7))
    started.save(tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter", target)
    assert type(loaded) is type(started)
    assert loaded.weights.version == started.weights.version
    for slot, ids in TEXTS.items():
        start(loaded, target, slot, ids)
    assert_same_draft(propose(loaded, TEXTS), propose(started, TEXTS))


def test_saving_again_replaces_what_was_saved_and_leaves_nothing_beside_it(drafter, target, tmp_path):
    drafter.save(tmp_path / "drafter")
    if drafter.is_trainable:
        drafter.swap(other_weights(drafter.weights, seed=1))
    drafter.save(tmp_path / "drafter")
    assert load_drafter(tmp_path / "drafter", target).weights.version == drafter.weights.version
    assert os.listdir(tmp_path) == ["drafter"]


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("broken", [(json, "dumps"), (os, "rename")], ids=["write", "rename"])
def test_a_save_that_fails_leaves_the_old_files(drafter, tmp_path, monkeypatch, broken, call):
    drafter.save(tmp_path / "drafter")
    before = files_of(tmp_path / "drafter")
    module, function = broken
    working, calls = getattr(module, function), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise OSError("no space left on device")
        return working(*args, **kwargs)

    monkeypatch.setattr(module, function, fail)
    if drafter.is_trainable:
        drafter.swap(other_weights(drafter.weights, seed=1))
    try:
        drafter.save(tmp_path / "drafter")
    except OSError:
        assert files_of(tmp_path / "drafter") == before
    else:
        assert len(calls) <= call
    assert os.listdir(tmp_path) == ["drafter"]


def test_a_directory_of_someone_else_is_not_overwritten(drafter, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not written by onlinespec"):
        drafter.save(tmp_path)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


# Memory


def footprint(thing, seen=None):
    """Bytes of tensors and entries of containers that an object of ours holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, dict):
        return len(thing) + sum(footprint(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple | set):
        return len(thing) + sum(footprint(value, seen) for value in thing)
    is_ours = type(thing).__module__.startswith("onlinespec")
    return footprint(vars(thing), seen) if is_ours and hasattr(thing, "__dict__") else 0


def test_a_released_request_leaves_nothing_behind(drafter, target):
    loop = DecodeLoop(target, drafter)
    job = PROMPTS[2], GenerationParams(max_new_tokens=60)
    for _ in range(4):  # what a drafter makes once it has seen enough is there
        loop.complete(*job)
    before = footprint(drafter)
    requests = [loop.start(*job) for _ in range(3)]
    loop.step(requests[:2])
    assert footprint(drafter) > before
    for request in requests:
        loop.finish(request)
    assert footprint(drafter) == before


def test_slots_are_used_again(drafter, target):
    loop = DecodeLoop(target, drafter)
    for place in (0, 1, 2):
        first, second = (loop.start(PROMPTS[place], GenerationParams(max_new_tokens=9)) for _ in range(2))
        assert {first.slot, second.slot} == {0, 1}
        loop.finish(first)
        loop.finish(second)


@pytest.mark.parametrize("failing", ["prefill", "drafter"])
def test_a_start_that_fails_leaves_nothing_behind(drafter, target, monkeypatch, failing):
    loop = DecodeLoop(target, drafter)
    job = PROMPTS[2], GenerationParams(max_new_tokens=9)
    expected = loop.complete(*job).output_ids
    before = footprint(loop)

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        owner, function = (target.decoder, "forward") if failing == "prefill" else (drafter, "start")
        patch.setattr(owner, function, fail)
        for _ in range(3):
            with pytest.raises(MemoryError):
                loop.start(*job)
    assert footprint(loop) == before
    assert loop.complete(*job).output_ids == expected


def test_the_target_learns_nothing(drafter, target):
    before = target.decoder.embedding_VD.clone(), target.decoder.head_VD.clone()
    learning = InlineLearning(drafter, make_learner("online_gradient", 1e-2), LearnConfig(min_interval=8))
    DecodeLoop(target, drafter, learning).complete(PROMPTS[3], GenerationParams(max_new_tokens=40))
    assert torch.equal(target.decoder.embedding_VD, before[0])
    assert torch.equal(target.decoder.head_VD, before[1])


def test_the_prompts_have_something_to_look_up():
    """Else the tests above would say little about lookup."""
    for place in range(len(PROMPTS)):
        answer = plain_answer(place, max_new_tokens=64)
        assert len(set(pairwise(answer))) < len(answer) - 1
