"""Coupled acceptance, and its law: equality with plain decoding, and plain decoding's own law on an enumerable model.

Axis letters beyond those of `verify`: M committed tokens of a run, P positions of its random numbers, R runs.
"""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import TableTarget, chi_square_p, enumerate_law, sequence_counts, steady

from onlinespec.config import SamplingParams
from onlinespec.core import Draft
from onlinespec.lossless.noise import Noise, gumbel, uniforms
from onlinespec.lossless.sampling import Choice, choose, process_scores
from onlinespec.lossless.verify import Coupled, ScoredRows, verify

SOFT = SamplingParams(temperature=1.0)
VOCAB, LENGTH = 8, 3
FEW_RUNS = 4_000  # a wrong rule has a p-value below 1e-100 by then
NUM_RUNS = [FEW_RUNS, pytest.param(8_000, marks=pytest.mark.full)]


# One step


def verify_reference(draft_ids, target_ids, is_finite):
    """One request, by the book: what is committed."""
    committed = []
    for k, token_id in enumerate(target_ids):
        if not is_finite[k]:
            break
        committed.append(token_id)
        if k == len(draft_ids) or draft_ids[k] != token_id:
            break
    return committed


@steady
@given(seed=st.integers(0, 2**31), B=st.integers(1, 4), K=st.integers(0, 4), share_broken=st.sampled_from([0.0, 0.3]))
def test_verify_commits_exactly_what_the_reference_commits(seed, B, K, share_broken):
    generator = torch.Generator().manual_seed(seed)
    target_ids, draft_ids = (torch.randint(2, (B, n), generator=generator) for n in (K + 1, K))
    counts = torch.randint(K + 1, (B,), generator=generator)
    is_finite = torch.rand(B, K + 1, generator=generator) >= share_broken
    verdict = verify(Draft.by_one(draft_ids, counts, 0), Choice(target_ids, is_finite))
    for b, count in enumerate(counts.tolist()):
        finite = is_finite[b].tolist()
        committed = verify_reference(draft_ids[b, :count].tolist(), target_ids[b].tolist(), finite)
        assert verdict.token_ids_BL[b].tolist() == committed + [-1] * (K + 1 - len(committed))
        assert verdict.num_accepted_B[b] == max(0, len(committed) - 1)
        assert bool(verdict.is_finite_B[b]) == finite[0]


def test_the_noise_of_a_row_is_that_of_its_own_position():
    noise = Noise(7, 1, VOCAB)
    scores = process_scores(TableTarget(VOCAB, seed=1).logits[:3], SOFT)
    expected = [int((row + gumbel(uniforms(7, 1, 12 + i, VOCAB))).argmax()) for i, row in enumerate(scores.double())]
    draft = Draft.by_one(torch.tensor([expected[:2]]), torch.tensor([2]), 0)
    assert Coupled().judge(draft, [ScoredRows(scores, SOFT, noise, 12)]).token_ids_BL.tolist() == [expected]


@pytest.mark.parametrize(
    ("draft_shape", "target_shape", "message"),
    [
        ((1, 2), (1, 2), r"token_ids of the target has shape \(1, 2\), expected \(1, 3\): 2 drafted"),
        ((1, 2), (2, 3), r"token_ids of the target has shape \(2, 3\), expected \(1, 3\)"),
    ],
)
def test_mismatched_shapes_are_refused_with_both_values(draft_shape, target_shape, message):
    draft = Draft.by_one(torch.zeros(draft_shape, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=message):
        verify(draft, Choice(torch.zeros(target_shape, dtype=torch.int64), torch.ones(target_shape, dtype=torch.bool)))


# Whole runs


@cache
def run_numbers(num_runs):
    """Each run is a request with a seed of its own: uniforms [R, P, V]."""
    return torch.stack([Noise(seed, 0, VOCAB).rows(0, LENGTH + 6) for seed in range(num_runs)])


def decode(drafter, target, sampling, num_draft_tokens, numbers_RPV, rule=None):
    """All runs at once, step by step from token 0 at position 0, until each has its tokens: [R, M].

    Args:
        num_draft_tokens: A number for every step, or a function of the runs and where they are.
    """
    R, K = len(numbers_RPV), 5
    token_ids = torch.zeros(R, 1 + LENGTH + K, dtype=torch.int64)
    lengths_R = torch.ones(R, dtype=torch.int64)
    while (running := (lengths_R <= LENGTH).nonzero().squeeze(-1)).numel():
        ahead = lengths_R[running, None] + torch.arange(K + 1)
        uniforms_RLV = numbers_RPV[running[:, None], ahead.clamp_max(numbers_RPV.shape[1] - 1)]
        anchors = token_ids[running, lengths_R[running] - 1]
        draft_ids = drafter(anchors, uniforms_RLV[:, :K], K)
        counts = torch.full_like(anchors, num_draft_tokens)
        if callable(rule):
            counts = rule(draft_ids, uniforms_RLV, running)
        rows = torch.cat([anchors[:, None], draft_ids], dim=1)
        scores = process_scores(target.logits[rows].flatten(0, 1), sampling)
        chosen = choose(scores, uniforms_RLV.flatten(0, 1))
        choice = Choice(*(part.view(len(running), K + 1) for part in chosen))
        verdict = verify(Draft.by_one(draft_ids, counts, 0), choice)
        token_ids[running[:, None], ahead] = verdict.token_ids_BL
        lengths_R[running] += verdict.num_accepted_B + 1
    return token_ids[:, 1 : 1 + LENGTH]


def coupled_drafter(seed, temperature=1.0):
    """A model of its own, drafting with the target's noise."""
    logits = TableTarget(VOCAB, seed=seed, spread=1.0).logits

    def draft(anchors_R, uniforms_RKV, count):
        ids, last = [], anchors_R
        for k in range(count):
            last = (logits[last] / temperature + gumbel(uniforms_RKV[:, k])).argmax(-1)
            ids.append(last)
        return torch.stack(ids, 1)

    return draft


def argmax_drafter(anchors_R, uniforms_RKV, count):
    """Its likeliest token, whatever the noise."""
    successor = TableTarget(VOCAB, seed=5).logits.argmax(-1)
    ids = [anchors_R]
    for _ in range(count):
        ids.append(successor[ids[-1]])
    return torch.stack(ids[1:], 1)


def cheating_drafter(anchors_R, uniforms_RKV, count):
    """The target itself, noise and all."""
    target = TableTarget(VOCAB, seed=1).logits
    ids = [anchors_R]
    for k in range(count):
        ids.append((target[ids[-1]] + gumbel(uniforms_RKV[:, k])).argmax(-1))
    return torch.stack(ids[1:], 1)


DRAFTERS = {
    "coupled": coupled_drafter(5),
    "cool": coupled_drafter(6, 0.3),
    "argmax": argmax_drafter,
    "target": cheating_drafter,
}
SETTINGS = {
    "soft": SOFT,
    "cool": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.0, top_k=3),
    "top_p": SamplingParams(temperature=0.7, top_p=0.8),
}


def any_number(draft_ids, uniforms_RLV, running):
    """As a chooser that is random."""
    return torch.randint(0, 6, (len(running),), generator=torch.Generator().manual_seed(len(running)))


def by_the_noise(draft_ids, uniforms_RLV, running):
    """As a chooser that reads the noise to come."""
    return (uniforms_RLV[:, :, 0].cumsum(-1) < 1.5).sum(-1).clamp_max(5)


def by_the_draft(draft_ids, uniforms_RLV, running):
    """As a drafter that takes back a token for what it turned out to be."""
    return (draft_ids % 3 > 0).long().cumprod(-1).sum(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(s, id=name, marks=pytest.mark.full if name in ("cool", "top_k") else ())
        for name, s in SETTINGS.items()
    ],
)
@pytest.mark.parametrize("num_runs", NUM_RUNS)
def test_plain_decoding_follows_the_target_law(sampling, num_runs):
    target = TableTarget(VOCAB, seed=1)
    token_ids = decode(argmax_drafter, target, sampling, 0, run_numbers(num_runs))
    law = enumerate_law(target.rows(sampling), 0, LENGTH)
    assert chi_square_p(sequence_counts(token_ids, VOCAB), law) > 1e-4


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "rule", [1, 2, 5, any_number, by_the_noise, by_the_draft], ids=lambda rule: getattr(rule, "__name__", rule)
)
def test_no_draft_and_no_choice_of_its_length_changes_a_token(drafter, rule):
    target, numbers = TableTarget(VOCAB, seed=1), run_numbers(FEW_RUNS)[:1000]
    for sampling in (SOFT, SETTINGS["top_p"]):
        plain = decode(argmax_drafter, target, sampling, 0, numbers)
        count, its_rule = (rule, None) if isinstance(rule, int) else (0, rule)
        assert torch.equal(decode(DRAFTERS[drafter], target, sampling, count, numbers, its_rule), plain)


def test_a_drafter_equal_to_its_target_is_never_refused():
    numbers = run_numbers(FEW_RUNS)[:500, :6]
    target = TableTarget(VOCAB, seed=1)
    draft_ids = cheating_drafter(torch.zeros(500, dtype=torch.int64), numbers, 5)
    rows = torch.cat([torch.zeros(500, 1, dtype=torch.int64), draft_ids], 1)
    chosen = choose(process_scores(target.logits[rows].flatten(0, 1), SOFT), numbers.flatten(0, 1))
    choice = Choice(*(part.view(500, 6) for part in chosen))
    assert (verify(Draft.by_one(draft_ids, torch.full((500,), 5), 0), choice).num_accepted_B == 5).all()


@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 5), (0.5, 6)])
@pytest.mark.parametrize("num_runs", NUM_RUNS)
def test_coupled_drafts_are_kept_at_least_as_often_as_the_bound_says(temperature, seed, num_runs):
    """(1 - TV) / (1 + TV) for every row, and at most 1 - TV."""
    target, draft = (TableTarget(VOCAB, seed=s, spread=1.0).logits / temperature for s in (1, seed))
    noise = gumbel(run_numbers(num_runs)[:, 0])
    for row in range(VOCAB):
        distance = float((target[row].softmax(-1) - draft[row].softmax(-1)).abs().sum() / 2)
        is_same = (target[row] + noise).argmax(-1) == (draft[row] + noise).argmax(-1)
        error = 4 * 0.5 / num_runs**0.5
        assert (1 - distance) / (1 + distance) - error <= float(is_same.double().mean()) <= 1 - distance + error


# Wrong rules, which the tests above must catch


def law_p(numbers_RPV, drafter=argmax_drafter, num_draft_tokens=0):
    target = TableTarget(VOCAB, seed=1)
    token_ids = decode(drafter, target, SOFT, num_draft_tokens, numbers_RPV)
    return chi_square_p(sequence_counts(token_ids, VOCAB), enumerate_law(target.rows(SOFT), 0, LENGTH))


def test_the_law_test_catches_one_positions_noise_used_at_the_next():
    numbers = run_numbers(FEW_RUNS).clone()
    numbers[:, 2] = numbers[:, 1]
    assert law_p(numbers) < 1e-4


def test_the_law_test_catches_rows_that_share_words():
    """As they would if a row's counter were its position: four words of the next row are in this one."""

    def overlapping(seed):
        words = np.random.Philox(key=seed).random_raw(4 * (LENGTH + 8))
        row = torch.from_numpy(np.maximum((words >> np.uint64(11)) * 2.0**-53, 2.0**-54))
        return torch.stack([row[4 * p : 4 * p + VOCAB] for p in range(LENGTH + 6)])

    assert law_p(torch.stack([overlapping(seed) for seed in range(FEW_RUNS)])) < 1e-4


def test_the_law_test_catches_a_fresh_draw_after_a_mismatch():
    target, numbers = TableTarget(VOCAB, seed=1), run_numbers(FEW_RUNS)
    last, committed = torch.zeros(FEW_RUNS, dtype=torch.int64), []
    generator = torch.Generator().manual_seed(3)
    for position in range(LENGTH):
        own = choose(process_scores(target.logits[last], SOFT), numbers[:, 1 + position]).token_ids_N
        drafted = coupled_drafter(5)(last, numbers[:, 1 + position : 2 + position], 1)[:, 0]
        fresh = torch.multinomial(target.rows(SOFT)[last], 1, generator=generator)[:, 0]
        last = torch.where(drafted == own, own, fresh)  # WRONG: the token that the noise names is the one to commit
        committed.append(last)
    counts = sequence_counts(torch.stack(committed, 1), VOCAB)
    assert chi_square_p(counts, enumerate_law(target.rows(SOFT), 0, LENGTH)) < 1e-4
