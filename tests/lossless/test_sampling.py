from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import steady
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onlinespec.config import SamplingParams
from onlinespec.lossless.noise import gumbel
from onlinespec.lossless.sampling import choose, count_tokens, probs_of, process_logits, process_scores
from onlinespec.lossless.sampling import process_step as process_step_scores

VOCAB = 23


def process_step(logits_LV, params, history_ids, num_prompt_tokens, draft_ids):
    """A step's rows as probabilities."""
    scores = process_step_scores(logits_LV, params, history_ids, num_prompt_tokens, ids(draft_ids))
    return probs_of(scores, params)


def ids(token_ids):
    return torch.tensor(token_ids, dtype=torch.int64)


seeds = st.integers(0, 2**31)
sampled_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 3, 20, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
any_params = st.one_of(
    sampled_params,
    st.builds(SamplingParams),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
    ),
)


def random_logits(seed, num_rows=4, vocab=VOCAB):
    return 3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


def random_ids(seed, count, vocab=VOCAB):
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def transformers_probs(logits_NV, params, history_ids):
    """What `generate` would draw from, by transformers' own processors, in its own order."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([history_ids] * len(logits_NV)), logits_NV).softmax(-1)


def process_after(logits_NV, params, history_ids):
    """Every row stands behind the same history."""
    counts = count_tokens(history_ids, 0, ids([]), logits_NV.shape[-1])
    return process_logits(logits_NV, params, counts)


# The rows


@steady
@given(seed=seeds, params=sampled_params, num_history=st.integers(1, 30))
def test_rows_are_those_of_transformers(seed, params, num_history):
    logits, history_ids = random_logits(seed), random_ids(seed, num_history)
    expected = transformers_probs(logits, params, history_ids)
    torch.testing.assert_close(process_after(logits, params, history_ids), expected, atol=1e-5, rtol=1e-4)


@steady
@given(seed=seeds, params=sampled_params)
def test_ties_and_masked_tokens_are_treated_as_transformers_does(seed, params):
    whole_numbers = random_logits(seed).round().clamp(max=0)
    whole_numbers[:, seed % VOCAB] = 0
    whole_numbers[whole_numbers == -1] = -torch.inf
    expected = transformers_probs(whole_numbers, params, history_ids=[0])
    torch.testing.assert_close(process_after(whole_numbers, params, [0]), expected, atol=1e-6, rtol=1e-5)


@steady
@given(seed=seeds, params=any_params, num_masked=st.integers(0, VOCAB - 1))
def test_every_row_sums_to_one_and_never_revives_a_masked_token(seed, params, num_masked):
    logits = random_logits(seed)
    logits[:, random_ids(seed, num_masked)] = -torch.inf
    probs = process_step(logits, params, random_ids(seed, 9), 4, random_ids(seed + 1, 3))
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits)))
    assert (probs[logits == -torch.inf] == 0).all()
    assert (probs >= 0).all()


@steady
@given(seed=seeds, params=any_params)
def test_a_row_has_the_same_bits_alone_and_beside_others(seed, params):
    logits = random_logits(seed)
    counts = count_tokens(random_ids(seed, 9), 4, ids(random_ids(seed + 1, len(logits) - 1)), VOCAB)
    together = process_scores(logits, params, counts)
    for i in range(len(logits)):
        own_counts = type(counts)(*(count[i : i + 1] for count in counts))
        assert torch.equal(process_scores(logits[i : i + 1], params, own_counts), together[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_is_one_hot_at_the_first_argmax(dtype):
    logits = torch.tensor([[0.0, 5.0, 5.0], [-1.0, -2.0, -3.0]], dtype=dtype)
    probs = process_logits(logits, SamplingParams(top_k=2, top_p=0.5))
    assert probs.dtype == torch.float32
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
def test_a_vanishing_temperature_is_greedy_and_not_nan(temperature):
    logits = torch.tensor([[100.0, 90.0, -torch.inf]])
    assert process_logits(logits, SamplingParams(temperature=temperature)).tolist() == [[1, 0, 0]]


def test_a_boundless_temperature_is_uniform_over_what_is_not_masked():
    logits = torch.tensor([[100.0, 90.0, -torch.inf]])
    assert process_logits(logits, SamplingParams(temperature=1e300)).tolist() == [[0.5, 0.5, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_broken_logits_raise_and_name_the_row(temperature, broken):
    with pytest.raises(FloatingPointError, match=r"row 1 .*broken"):
        process_logits(torch.tensor([[0.0, 1.0], broken]), SamplingParams(temperature=temperature))


# Penalties over a step


@steady
@given(seed=seeds, params=any_params, num_drafts=st.integers(0, 4), num_output=st.integers(0, 9))
def test_a_row_of_a_step_is_the_row_plain_decoding_would_have_had(seed, params, num_drafts, num_output):
    logits, draft_ids = random_logits(seed, num_drafts + 1), random_ids(seed + 1, num_drafts)
    history_ids = random_ids(seed, 5 + num_output)
    step = process_step(logits, params, history_ids, 5, draft_ids)
    for j in range(num_drafts + 1):
        plain = process_step(logits[j : j + 1], params, history_ids + draft_ids[:j], 5, [])
        assert torch.equal(step[j : j + 1], plain)


def test_presence_and_frequency_count_the_output_only_and_repetition_the_prompt_too():
    logits, history_ids = torch.tensor([[4.0, 4.0, 4.0, -4.0]]), [0, 3, 1, 1]

    def scores(**penalties):
        params = SamplingParams(temperature=1.0, **penalties)
        return process_step(logits, params, history_ids, 2, []).log()[0]

    presence, frequency = scores(presence_penalty=0.5), scores(frequency_penalty=0.5)
    repetition = scores(repetition_penalty=2.0)
    torch.testing.assert_close(presence - presence[2], torch.tensor([0, -0.5, 0, -8.0]))
    torch.testing.assert_close(frequency - frequency[2], torch.tensor([0, -1.0, 0, -8.0]))
    torch.testing.assert_close(repetition - repetition[2], torch.tensor([-2.0, -2.0, 0, -12.0]))


def test_greedy_is_taken_after_penalties():
    logits, params = torch.tensor([[3.0, 2.0], [3.0, 2.0]]), SamplingParams(repetition_penalty=2.0)
    assert process_step(logits, params, [1], 1, [0]).argmax(-1).tolist() == [0, 0]
    assert process_step(logits, params, [1], 1, [1]).argmax(-1).tolist() == [0, 0]
    assert process_step(logits[:1], params, [0], 1, []).argmax(-1).tolist() == [1]


def test_history_beyond_the_vocabulary_is_left_out():
    params = SamplingParams(presence_penalty=1.0)
    assert process_step(torch.zeros(1, 3), params, [0, 99], 0, []).tolist() == [[0, 1, 0]]


def test_penalties_without_counts_are_refused():
    with pytest.raises(ValueError, match="pass token_counts"):
        process_logits(torch.zeros(1, 3), SamplingParams(presence_penalty=1.0))


def test_a_step_has_one_row_more_than_drafts():
    with pytest.raises(ValueError, match="3 rows of logits for 3 drafted"):
        process_step(torch.zeros(3, 5), SamplingParams(), [0], 1, [1, 2, 3])


# The token


def random_uniforms(seed, num_rows=4, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(num_rows, vocab, dtype=torch.float64, generator=generator).clamp_min(1e-9)


@steady
@given(seed=seeds, params=sampled_params)
def test_the_token_is_the_argmax_of_scores_and_noise_whatever_a_cut_left(seed, params):
    scores, uniforms = (
        process_scores(random_logits(seed), replace(params, repetition_penalty=1.0)),
        random_uniforms(seed),
    )
    chosen = choose(scores, uniforms)
    assert chosen.token_ids_N.tolist() == (scores.double() + gumbel(uniforms)).argmax(-1).tolist()
    assert chosen.is_finite_N.all()


def test_a_cut_that_leaves_few_tokens_of_many_draws_as_the_whole_row_would():
    scores = process_scores(random_logits(0, 200, 400), SamplingParams(temperature=2.0, top_k=7))
    uniforms = random_uniforms(0, 200, 400)
    assert (scores > -torch.inf).sum(-1).tolist() == [7] * 200
    assert torch.equal(choose(scores, uniforms).token_ids_N, (scores.double() + gumbel(uniforms)).argmax(-1))


@pytest.mark.parametrize("uniforms", [None, torch.full((2, 3), 0.5, dtype=torch.float64)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_whose_best_score_is_not_finite_is_noted_and_no_other(broken, uniforms):
    params = SamplingParams(temperature=0.0 if uniforms is None else 0.7)
    rows = torch.tensor(
        [[0.0, 1.0, 2.0], [0.0, broken, 2.0] if broken > -torch.inf or broken != broken else [broken] * 3]
    )
    chosen = choose(process_scores(rows, params), uniforms)
    assert chosen.is_finite_N.tolist() == [True, False]
