from dataclasses import replace
from itertools import chain

import pytest
import rigs
import torch
from checkpoints import END_TOKEN_ID, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import SOFT, Recorder, Script, hidden_states, plain, run_together
from toy import steady

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.request import ContextOverflow
from onlinespec.engine.step import DecodeLoop

TARGET = rigs.random_target()
PROMPT = [5, 9, 200, 31, 77, 14, 9]
ANSWER = plain(TARGET, PROMPT, GenerationParams(64)).output_ids


def scripted(wrong_at=(), target=TARGET, learning=None):
    """A loop whose drafter knows the greedy answer to PROMPT, but for some positions of the answer."""
    return DecodeLoop(target, Script(PROMPT + ANSWER, {len(PROMPT) + i for i in wrong_at}), learning)


def greedy_by_the_book(target, prompt_ids, count):
    """The whole text through the target for every token."""
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(int(target.decoder.head(hidden_states(target, ids)[-1:]).argmax()))
    return ids[len(prompt_ids) :]


# Which tokens


@pytest.mark.parametrize("prompt", [[7], PROMPT, PROMPT * 12], ids=len)
def test_plain_decoding_takes_the_targets_most_likely_token(prompt):
    assert plain(TARGET, prompt, GenerationParams(12)).output_ids == greedy_by_the_book(TARGET, prompt, 12)


def test_a_prompt_read_in_pieces_gives_the_same_states_as_in_one():
    prompt = torch.randint(256, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    request = DecodeLoop(TARGET).start(prompt, GenerationParams(4))
    assert request.trace.num_features == len(prompt) - 1
    assert torch.equal(request.trace.features.final_SD[: len(prompt) - 1], hidden_states(TARGET, prompt[:-1]))


@settings(steady, max_examples=60)
@given(wrong_at=st.sets(st.integers(0, 40)), num_draft_tokens=st.integers(0, 16), max_new_tokens=st.integers(1, 40))
def test_any_pattern_of_refusals_gives_the_plain_answer(wrong_at, num_draft_tokens, max_new_tokens):
    request = scripted(wrong_at).complete(PROMPT, GenerationParams(max_new_tokens, num_draft_tokens))
    assert request.output_ids == ANSWER[:max_new_tokens]


PENALTIES = [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(repetition_penalty=0.9, presence_penalty=-0.5, frequency_penalty=1.0),
]


@pytest.mark.parametrize("sampling", PENALTIES)
def test_penalties_count_drafted_tokens_as_plain_decoding_would(sampling):
    params = GenerationParams(40, sampling=sampling)
    expected = plain(TARGET, PROMPT, params)
    assert expected.output_ids != ANSWER[:40]
    script = Script(expected.trace.token_ids, wrong_at={len(PROMPT) + i for i in (3, 11, 12, 30)})
    request = DecodeLoop(TARGET, script).complete(PROMPT, params)
    assert request.output_ids == expected.output_ids
    assert request.stats.accepted > 20


SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95)


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_sampling_with_the_same_seed_gives_the_same_tokens(num_draft_tokens):
    params = GenerationParams(30, num_draft_tokens, sampling=SAMPLED, seed=5)
    first, second, other = (
        DecodeLoop(TARGET, Ngram()).complete(PROMPT, replace(params, seed=seed)).output_ids for seed in (5, 5, 6)
    )
    assert first == second != other


def test_a_sampled_request_does_not_depend_on_what_is_batched_beside_it():
    jobs = [(PROMPT[i:], GenerationParams(20, sampling=SAMPLED, seed=i)) for i in range(4)]
    together = run_together(DecodeLoop(TARGET, Ngram()), jobs, max_running=3)
    alone = [DecodeLoop(TARGET, Ngram()).complete(*job) for job in jobs]
    assert [request.output_ids for request in together] == [request.output_ids for request in alone]


# Where it ends


def test_an_end_token_ends_the_answer_and_does_not_show():
    ending = replace(TARGET, end_token_ids=frozenset([ANSWER[9]]))
    end = ANSWER.index(ANSWER[9])
    request = scripted(target=ending).complete(PROMPT, GenerationParams(64))
    assert (request.output_ids, request.finish_reason) == (ANSWER[: end + 1], "stop")
    assert request.text.text == TARGET.tokenizer.decode(ANSWER[:end], skip_special_tokens=True)


def test_end_tokens_can_be_ignored():
    ending = replace(TARGET, end_token_ids=frozenset([ANSWER[9]]))
    request = scripted(target=ending).complete(PROMPT, GenerationParams(32, ignore_end_tokens=True))
    assert (request.output_ids, request.finish_reason) == (ANSWER[:32], "length")


def test_a_request_has_stop_tokens_of_its_own():
    params = GenerationParams(32, stop_token_ids=(ANSWER[5],), ignore_end_tokens=True)
    request = scripted().complete(PROMPT, params)
    assert (request.output_ids[-1], request.finish_reason) == (ANSWER[5], "stop")


@pytest.mark.parametrize(("max_new_tokens", "reason"), [(1, "length"), (5, "length"), (6, "context"), (9, "context")])
def test_the_context_ends_what_the_limit_does_not(max_new_tokens, reason):
    small = rigs.random_target(context=len(PROMPT) + 5)
    request = DecodeLoop(small, Script(PROMPT + ANSWER)).complete(PROMPT, GenerationParams(max_new_tokens))
    assert request.output_ids == ANSWER[: min(5, max_new_tokens)]
    assert request.finish_reason == (reason if max_new_tokens != 5 else "length")


def test_a_prompt_one_short_of_the_context_gets_one_token():
    small = rigs.random_target(context=len(PROMPT) + 1)
    request = DecodeLoop(small).complete(PROMPT, GenerationParams(8))
    assert (request.output_ids, request.finish_reason) == (ANSWER[:1], "context")


# Stop strings


TEXT = "The quick😀brown"  # no byte twice
SPECIAL = END_TOKEN_ID + 1


def speller():
    """Says TEXT, a special token after each half, again and again: (target, prompt, answer ids)."""
    ids = byte_tokenizer()(TEXT)["input_ids"]
    cycle = [*ids[:9], SPECIAL, *ids[9:], SPECIAL + 1]
    return rigs.cycle_target(cycle, vocab=288, hidden=64), cycle[-2:], cycle


STOPS = sorted({TEXT[i : i + n] for n in (1, 2, 3, 7) for i in range(0, len(TEXT) - n, 2)})


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_inside_an_accepted_run_cuts_the_answer_there(stop):
    target, prompt, ids = speller()
    params = GenerationParams(24, num_draft_tokens=16, stop_strings=("never in it", stop))
    loop, pieces = DecodeLoop(target, Script(prompt + ids)), []
    for request in loop.generate(prompt, params):
        pieces.append(request.text.take())
    assert request.text.text == "".join(pieces) == TEXT[: TEXT.index(stop)]
    assert request.finish_reason == "stop"
    assert request.output_ids == plain(target, prompt, params).output_ids
    assert request.stats.tokens == request.stats.steps + request.stats.accepted == len(request.output_ids)


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_the_pieces_of_a_stream_add_up_to_the_decoded_answer(num_draft_tokens):
    pieces = []
    for request in scripted().generate(PROMPT, GenerationParams(64, num_draft_tokens)):
        pieces.append(request.text.take())
    assert request.text.text == "".join(pieces) == TARGET.tokenizer.decode(ANSWER, skip_special_tokens=True)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, 16])
def test_special_tokens_and_halves_of_characters_never_show(num_draft_tokens):
    target, prompt, ids = speller()
    loop, pieces = DecodeLoop(target, Script(prompt + ids * 3)), []
    for request in loop.generate(prompt, GenerationParams(3 * len(ids), num_draft_tokens)):
        pieces.append(request.text.take())
    assert request.output_ids == ids * 3
    assert request.text.text == "".join(pieces) == TEXT * 3
    assert not any("\ufffd" in piece for piece in pieces)


# Counts


@settings(steady, max_examples=25)
@given(wrong_at=st.sets(st.integers(0, 30)), num_draft_tokens=st.integers(0, 8))
def test_every_count_agrees_with_the_feedback(wrong_at, num_draft_tokens):
    recorder = Recorder()
    request = scripted(wrong_at, learning=recorder).complete(PROMPT, GenerationParams(30, num_draft_tokens))
    stats, feedback = request.stats, recorder.feedback
    assert stats.requests == 1
    assert stats.tokens == stats.steps + stats.accepted == len(request.output_ids) == 30
    assert stats.steps == len(feedback)
    assert stats.drafted == sum(record.num_draft_tokens for record in feedback)
    assert stats.accepted == sum(record.num_rows - 1 for record in feedback) == sum(stats.accepted_by_position)
    assert list(stats.accepted_by_position) == sorted(stats.accepted_by_position, reverse=True)
    assert stats.decode_seconds > 0


def test_plain_decoding_drafts_nothing():
    request = plain(TARGET, PROMPT, GenerationParams(10, num_draft_tokens=4))
    assert (request.stats.steps, request.stats.drafted, request.stats.acceptance_length) == (10, 0, 1.0)


def test_a_perfect_drafter_needs_a_step_for_every_k_plus_one_tokens():
    request = scripted().complete(PROMPT, GenerationParams(40, num_draft_tokens=4))
    assert request.stats.steps == 8
    assert request.stats.acceptance_length == 5.0


def test_the_drafter_hears_of_every_step_but_the_last():
    loop = scripted(wrong_at={3})
    request = loop.complete(PROMPT, GenerationParams(20))
    assert len(loop.drafter.observed) == request.stats.steps - 1
    heard = list(chain.from_iterable(loop.drafter.observed))
    assert heard == ANSWER[: len(heard)]


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.7, top_p=0.9, presence_penalty=1.0)])
def test_log_probabilities_are_those_of_the_raw_rows_however_tokens_were_drafted(num_draft_tokens, sampling):
    params = GenerationParams(20, num_draft_tokens, sampling, num_logprobs=3)
    request = scripted(wrong_at={2, 9}).complete(PROMPT, params)
    rows = TARGET.decoder.head(hidden_states(TARGET, request.trace.token_ids[:-1]))[len(PROMPT) - 1 :].log_softmax(-1)
    assert [one.token_id for one in request.logprobs] == request.output_ids
    assert [one.logprob for one in request.logprobs] == [
        float(row[i]) for row, i in zip(rows, request.output_ids, strict=True)
    ]
    assert [[i for i, _ in one.top] for one in request.logprobs] == rows.topk(3).indices.tolist()


def test_log_probabilities_are_not_computed_unless_asked_for():
    assert scripted().complete(PROMPT, GenerationParams(5)).logprobs == []


# Memory


def is_empty(loop):
    return not loop._cache.lengths and not loop.drafter.lengths


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "the prompt has no tokens"),
        ([5] * 1024, ContextOverflow, "the prompt has 1024 tokens, the target's context 1024"),
        ([5] * 2000, ContextOverflow, "2000 tokens"),
        ([5, 288], ValueError, "vocabulary of 288"),
        ([-1], ValueError, "vocabulary of 288"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_and_leaves_nothing(prompt, error, message):
    loop = scripted()
    with pytest.raises(error, match=message):
        loop.start(prompt, GenerationParams())
    with pytest.raises(error, match=message):
        loop.complete(prompt, GenerationParams())
    assert is_empty(loop)
    assert loop.complete(PROMPT, GenerationParams(9)).output_ids == ANSWER[:9]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_closing_the_stream_early_frees_the_request(num_steps):
    loop = scripted()
    stream = loop.generate(PROMPT, GenerationParams(40))
    for _ in range(num_steps):
        next(stream)
    stream.close()
    assert is_empty(loop)


def test_a_step_that_fails_frees_the_request(monkeypatch):
    loop = scripted()
    stream = loop.generate(PROMPT, GenerationParams(40))
    next(stream)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TARGET.decoder, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert is_empty(loop)
    assert loop.complete(PROMPT, GenerationParams(9)).output_ids == ANSWER[:9]


def test_finishing_twice_is_finishing_once():
    loop = scripted()
    requests = [loop.start(PROMPT, GenerationParams(9)) for _ in range(2)]
    loop.finish(requests[0])
    loop.finish(requests[0])
    third = loop.start(PROMPT, GenerationParams(9))
    assert third.slot != requests[1].slot
    for request in (requests[1], third):
        loop.finish(request)
    assert is_empty(loop)


def test_a_finished_request_keeps_its_answer():
    loop = scripted()
    request = loop.complete(PROMPT, GenerationParams(9))
    loop.complete(PROMPT, GenerationParams(20, sampling=SOFT))
    assert request.output_ids == ANSWER[:9]
    assert request.slot == -1
    assert sum([request.stats, DecodeStats()], DecodeStats()).tokens == 9
