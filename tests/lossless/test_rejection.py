"""The papers' rule, and its law. Axis letters beyond those of `rejection`: M committed tokens of a run, P positions of
its random numbers."""

from functools import cache
from itertools import accumulate
from math import inf, nextafter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import TableTarget, chi_square_p, enumerate_law, sequence_counts, steady

from onlinespec.config import SamplingParams
from onlinespec.core import Draft
from onlinespec.lossless.noise import Noise
from onlinespec.lossless.rejection import sample_rows, uniforms, verify_by_rejection

DRAFT, ACCEPT, LAST = range(3)  # columns of a run's numbers: draws a draft, and the two that the rule reads


def verify(draft, target_probs_BLV, uniforms_BL3):
    return verify_by_rejection(draft, target_probs_BLV, uniforms_BL3[..., 1:])


# Agreement with the plain reference


def verify_reference(draft_ids, draft_rows, target_rows, uniforms_L3):
    """One request, by the book: the committed tokens. A point mass has its one-hot row among the draft rows."""
    for k, token_id in enumerate(draft_ids):
        if uniforms_L3[k][ACCEPT] * draft_rows[k][token_id] < target_rows[k][token_id]:
            continue
        excess = [max(0.0, target - draft) for target, draft in zip(target_rows[k], draft_rows[k], strict=True)]
        row = excess if any(excess) else target_rows[k]
        return [*draft_ids[:k], draw_reference(row, uniforms_L3[k][LAST])]
    bonus = draw_reference(target_rows[len(draft_ids)], uniforms_L3[len(draft_ids)][LAST])
    return [*draft_ids, bonus]


def draw_reference(row, uniform):
    cdf = list(accumulate(row))
    threshold = min(uniform * cdf[-1], nextafter(cdf[-1], -inf))
    return next(i for i, mass in enumerate(cdf) if mass > threshold)


def random_rows(generator, *shape):
    """Soft, truncated and one-hot rows, mixed."""
    logits = 2 * torch.randn(*shape, generator=generator)
    logits[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    logits[..., 0].clamp_(min=-3)
    one_hot = torch.zeros(shape).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    is_greedy = torch.rand(shape[:-1], generator=generator) < 0.3
    return torch.where(is_greedy[..., None], one_hot, logits.softmax(-1))


@steady
@given(seed=st.integers(0, 2**31), B=st.integers(1, 4), K=st.integers(0, 4), V=st.integers(1, 6), is_soft=st.booleans())
def test_verify_commits_exactly_what_the_reference_commits(seed, B, K, V, is_soft):
    generator = torch.Generator().manual_seed(seed)
    target_probs, draft_probs = random_rows(generator, B, K + 1, V), random_rows(generator, B, K, V)
    uniforms_BL3 = torch.rand(B, K + 1, 3, generator=generator, dtype=torch.float64)
    token_ids = sample_rows(draft_probs.flatten(0, 1), uniforms_BL3[:, :K, DRAFT].flatten()).view(B, K)
    num_draft_tokens = torch.randint(K + 1, (B,), generator=generator)
    draft = Draft.by_one(token_ids, num_draft_tokens, 0, draft_probs if is_soft else None)
    if not is_soft:
        draft_probs = torch.eye(V)[token_ids]

    verdict = verify(draft, target_probs, uniforms_BL3)

    for b, count in enumerate(num_draft_tokens.tolist()):
        rows = draft_probs[b].tolist(), target_probs[b].tolist(), uniforms_BL3[b].tolist()
        committed = verify_reference(token_ids[b, :count].tolist(), *rows)
        assert verdict.token_ids_BL[b].tolist() == committed + [-1] * (K + 1 - len(committed))
        assert verdict.num_accepted_B[b] == len(committed) - 1


# The law of whole runs

NUM_RUNS = 10_000
SOFT = SamplingParams(temperature=1.0)
GREEDY = SamplingParams()
SETTINGS = {
    "soft": SOFT,
    "cool": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.0, top_k=3),
    "top_p": SamplingParams(temperature=0.7, top_p=0.8),
    "greedy": GREEDY,
}


@cache
def run_uniforms():
    """Each run is a request with a seed of its own: [NUM_RUNS, P, 3]."""
    judging = torch.stack([uniforms(Noise(seed, 0, vocab_size=5), 0, 10) for seed in range(NUM_RUNS)])
    drafting = torch.rand(*judging.shape[:2], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([drafting, judging], dim=-1)


class SampledDrafter:
    """Draws each token from its row, and says so."""

    def __init__(self, rows_VV):
        self.rows_VV = rows_VV

    def propose(self, anchors_B, num_draft_tokens_B, uniforms_BK):
        token_ids, last_ids = [], anchors_B
        for uniforms_B in uniforms_BK.unbind(1):
            last_ids = self.draw(self.rows_VV[last_ids], uniforms_B)
            token_ids.append(last_ids)
        token_ids_BK = torch.stack(token_ids, dim=1)
        rows_BKV = self.rows_VV[torch.cat([anchors_B[:, None], token_ids_BK[:, :-1]], dim=1)]
        return Draft.by_one(token_ids_BK, num_draft_tokens_B, 0, self.probs(rows_BKV))

    def draw(self, rows_BV, uniforms_B):
        return sample_rows(rows_BV, uniforms_B)

    def probs(self, rows_BKV):
        return rows_BKV


class ArgmaxDrafter(SampledDrafter):
    """A point mass: the likeliest token, whatever the temperature."""

    def draw(self, rows_BV, uniforms_B):
        return rows_BV.argmax(-1)

    def probs(self, rows_BKV):
        return None


class LookupDrafter(ArgmaxDrafter):
    """A fixed successor for each token, good or not."""

    def __init__(self, rows_VV):
        vocab = len(rows_VV)
        super().__init__(torch.eye(vocab)[(torch.arange(vocab) * 3 + 1) % vocab])


class SampledAsPointMassDrafter(SampledDrafter):
    """Sampled, but judged as a point mass: wasteful, and still lossless."""

    def probs(self, rows_BKV):
        return None


class ArgmaxWithSoftRowsDrafter(ArgmaxDrafter):
    """WRONG: the argmax passed off as a draw from its soft row."""

    def probs(self, rows_BKV):
        return rows_BKV


class DroppingDrafter(SampledDrafter):
    """WRONG: takes a token back because of what it turned out to be."""

    def propose(self, anchors_B, num_draft_tokens_B, uniforms_BK):
        draft = super().propose(anchors_B, num_draft_tokens_B, uniforms_BK)
        is_sure_BK = draft.probs_BKV.gather(-1, draft.token_ids_BK[..., None]).squeeze(-1) > 0.3
        num_sure_B = is_sure_BK.cumprod(-1).sum(-1)
        return draft._replace(num_draft_tokens_B=torch.minimum(num_draft_tokens_B, num_sure_B))


class StoppingDrafter(SampledDrafter):
    """Drafts nothing more after a doubtful token, but leaves that one in."""

    def propose(self, anchors_B, num_draft_tokens_B, uniforms_BK):
        draft = super().propose(anchors_B, num_draft_tokens_B, uniforms_BK)
        is_sure_BK = draft.probs_BKV.gather(-1, draft.token_ids_BK[..., None]).squeeze(-1) > 0.3
        num_sure_B = is_sure_BK.cumprod(-1).sum(-1)
        return draft._replace(num_draft_tokens_B=torch.minimum(num_draft_tokens_B, num_sure_B + 1))


LOSSLESS = [SampledDrafter, ArgmaxDrafter, LookupDrafter, SampledAsPointMassDrafter, StoppingDrafter]


def decode(drafter, target_VV, num_new_tokens, num_draft_tokens, uniforms_BP3, is_ragged=False):
    """All runs at once, step by step from token 0 at position 0, until each has its tokens: [B, M].

    A position's uniforms are read again whenever a refusal before it made an earlier reading void.
    """
    K, B = num_draft_tokens, len(uniforms_BP3)
    token_ids = torch.zeros(B, 1 + num_new_tokens + K, dtype=torch.int64)
    lengths_B = torch.ones(B, dtype=torch.int64)
    while (running := (lengths_B <= num_new_tokens).nonzero().squeeze(-1)).numel():
        ahead = lengths_B[running, None] + torch.arange(K + 1)
        uniforms_BL3 = uniforms_BP3[running[:, None], ahead]
        anchors = token_ids[running, lengths_B[running] - 1]
        counts = (running + lengths_B[running]) % (K + 1) if is_ragged else torch.full_like(anchors, K)
        draft = drafter.propose(anchors, counts, uniforms_BL3[:, :K, DRAFT])
        target_probs = target_VV[torch.cat([anchors[:, None], draft.token_ids_BK], dim=1)]
        verdict = verify(draft, target_probs, uniforms_BL3)
        token_ids[running[:, None], ahead] = verdict.token_ids_BL
        lengths_B[running] += verdict.num_accepted_B + 1
    return token_ids[:, 1 : 1 + num_new_tokens]


def law_p(drafter_class, sampling=SOFT, num_draft_tokens=3, is_ragged=False, miswire=lambda numbers: numbers):
    """How well the first four committed tokens of 10,000 runs agree with the target's law."""
    vocab, length = 5, 4
    target_VV = TableTarget(vocab, seed=1).rows(sampling)
    drafter = drafter_class(TableTarget(vocab, seed=5, spread=1.0).rows(sampling))
    numbers = miswire(run_uniforms())
    token_ids = decode(drafter, target_VV, length, num_draft_tokens, numbers, is_ragged)
    return chi_square_p(sequence_counts(token_ids, vocab), enumerate_law(target_VV, 0, length))


def one_column_for_another(copied, over):
    def miswire(numbers):
        numbers = numbers.clone()
        numbers[..., over] = numbers[..., copied]
        return numbers

    return miswire


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
@pytest.mark.parametrize("drafter_class", LOSSLESS)
def test_committed_tokens_follow_the_target_law_for_every_draft_length(drafter_class, num_draft_tokens):
    assert law_p(drafter_class, num_draft_tokens=num_draft_tokens) > 1e-4


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("drafter_class", LOSSLESS)
def test_committed_tokens_follow_the_target_law_under_every_setting(drafter_class, sampling):
    assert law_p(drafter_class, sampling) > 1e-4


@pytest.mark.parametrize("drafter_class", LOSSLESS)
def test_committed_tokens_follow_the_target_law_with_ragged_drafts(drafter_class):
    assert law_p(drafter_class, num_draft_tokens=4, is_ragged=True) > 1e-4


@pytest.mark.parametrize("wrong_class", [ArgmaxWithSoftRowsDrafter, DroppingDrafter])
def test_the_law_test_catches_wrong_pairings(wrong_class):
    assert law_p(wrong_class) < 1e-4


@pytest.mark.parametrize(
    ("copied", "over", "drafter_class"),
    [
        (DRAFT, ACCEPT, SampledDrafter),
        (DRAFT, LAST, SampledDrafter),
        (ACCEPT, LAST, SampledDrafter),
        (ACCEPT, LAST, ArgmaxDrafter),
    ],
)
def test_the_law_test_catches_a_uniform_used_twice(copied, over, drafter_class):
    assert law_p(drafter_class, miswire=one_column_for_another(copied, over)) < 1e-4


def test_greedy_rows_commit_exactly_the_target_argmax():
    target_VV = TableTarget(8, seed=3).rows(GREEDY)
    drafter = SampledDrafter(TableTarget(8, seed=4).rows(SOFT))
    plain = [0]
    for _ in range(6):
        plain.append(int(target_VV[plain[-1]].argmax()))
    token_ids = decode(drafter, target_VV, 6, 3, run_uniforms()[:200])
    assert (token_ids == torch.tensor(plain[1:])).all()


def test_a_drafter_equal_to_its_target_is_never_refused():
    rows_VV = TableTarget(8, seed=3).rows(SamplingParams(temperature=0.7, top_p=0.9))
    numbers = run_uniforms()[:2000, :5]
    anchors, counts = torch.zeros(2000, dtype=torch.int64), torch.full((2000,), 4)
    draft = SampledDrafter(rows_VV).propose(anchors, counts, numbers[:, :4, DRAFT])
    target_probs = torch.cat([draft.probs_BKV, rows_VV[draft.token_ids_BK[:, -1:]]], dim=1)
    assert (verify(draft, target_probs, numbers).num_accepted_B == 4).all()


# Edges


def point_mass(token_ids, num_draft_tokens=None):
    token_ids = torch.tensor(token_ids, dtype=torch.int64)
    counts = torch.full((len(token_ids),), token_ids.shape[1]) if num_draft_tokens is None else num_draft_tokens
    return Draft.by_one(token_ids, counts, 0)


def one_hot(token_ids, vocab=4):
    return torch.eye(vocab)[torch.tensor(token_ids)]


def test_without_a_draft_the_bonus_token_is_the_targets():
    verdict = verify(point_mass([[], []]), one_hot([[3], [1]]), torch.rand(2, 1, 3))
    assert verdict.num_accepted_B.tolist() == [0, 0]
    assert verdict.token_ids_BL.tolist() == [[3], [1]]


def test_padding_is_never_judged():
    draft = point_mass([[1, -7, 99]], num_draft_tokens=torch.tensor([1]))
    target_probs = one_hot([[1, 2, 3, 3]])
    verdict = verify(draft, target_probs, torch.full((1, 4, 3), 0.5))
    assert verdict.num_accepted_B.tolist() == [1]
    assert verdict.token_ids_BL.tolist() == [[1, 2, -1, -1]]


def test_an_excess_that_rounds_to_nothing_gives_way_to_the_target_row():
    target = torch.tensor([0.25, 0.5, 0.25])
    draft_row = torch.nextafter(target, torch.ones(3))  # above the target everywhere: nothing is left over
    draft = point_mass([[0]])._replace(probs_BKV=draft_row[None, None])
    numbers = torch.tensor([[[0.0, 1 - 2**-53, 0.5], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    verdict = verify(draft, target.expand(1, 2, 3), numbers)
    assert verdict.num_accepted_B.tolist() == [0]
    assert verdict.token_ids_BL.tolist() == [[1, -1]]


def test_a_refused_point_mass_is_never_drawn_again():
    target_probs = torch.tensor([0.1, 0.8, 0.1]).expand(1000, 2, 3)
    numbers = run_uniforms()[:1000, :2]
    verdict = verify(point_mass([[1]] * 1000), target_probs, numbers)
    is_refused = verdict.num_accepted_B == 0
    assert is_refused.any()
    assert (verdict.token_ids_BL[is_refused, 0] != 1).all()


@pytest.mark.parametrize(
    ("target_shape", "uniforms_shape", "message"),
    [
        ((1, 2, 5), (1, 3, 3), r"target_probs_BLV has shape \(1, 2, 5\), expected \(1, 3, 5\)"),
        ((2, 3, 5), (1, 3, 3), r"target_probs_BLV has shape \(2, 3, 5\), expected \(1, 3, 5\)"),
        ((1, 3, 5), (1, 2, 3), r"uniforms_BL2 has shape \(1, 2, 2\), expected \(1, 3, 2\)"),
        ((1, 3, 6), (1, 3, 3), r"draft.probs_BKV has shape \(1, 2, 5\), expected \(1, 2, 6\)"),
    ],
)
def test_mismatched_shapes_are_refused_with_both_values(target_shape, uniforms_shape, message):
    draft = point_mass([[0, 1]])._replace(probs_BKV=torch.full((1, 2, 5), 0.2))
    with pytest.raises(ValueError, match=message):
        verify(draft, torch.full(target_shape, 0.2), torch.full(uniforms_shape, 0.5))


# Drawing

edge_uniforms = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 5e-324, 1 - 2**-53, 1.0]))
edge_weights = st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.sampled_from([1e-45, 1e-30, 1e-8]))


@steady
@given(weights=st.lists(edge_weights, min_size=1, max_size=12).filter(any), uniform=edge_uniforms)
def test_a_token_of_probability_zero_is_never_drawn(weights, uniform):
    probs = torch.tensor([weights], dtype=torch.float32)
    drawn = sample_rows(probs, torch.tensor([uniform], dtype=torch.float64))
    assert probs[0, drawn] > 0


@steady
@given(seed=st.integers(0, 2**31), uniform=st.floats(0, 1, exclude_max=True))
def test_the_token_drawn_is_where_the_running_sum_passes_the_uniform(seed, uniform):
    row = (3 * torch.randn(1, 23, generator=torch.Generator().manual_seed(seed))).softmax(-1).double()
    drawn = int(sample_rows(row, torch.tensor([uniform], dtype=torch.float64)))
    cdf = (row[0].cumsum(0) / row[0].sum()).tolist()
    assert cdf[drawn - 1] * (drawn > 0) - 1e-12 <= uniform <= cdf[drawn] + 1e-12


def test_the_ends_of_the_interval_draw_the_first_and_last_possible_token():
    row = torch.tensor([[0.0, 0.3, 0.0, 0.6999, 0.0]])  # sums to less than one
    for uniform, token_id in [(0.0, 1), (1 - 2**-53, 3), (1.0, 3)]:
        assert sample_rows(row, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token_id]


@pytest.mark.parametrize("row", [[0.0, 0.0], [torch.nan, 0.5]])
def test_a_row_without_probability_is_refused(row):
    with pytest.raises(ValueError, match="nothing to draw"):
        sample_rows(torch.tensor([row]), torch.zeros(1))


def test_drawing_wants_one_uniform_a_row():
    with pytest.raises(ValueError, match=r"\(3,\) for 2 rows"):
        sample_rows(torch.ones(2, 4), torch.zeros(3))
