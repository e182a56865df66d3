import math
from dataclasses import fields, replace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.core import DecodeStats
from onlinespec.experiments.metrics import (
    acceptance_length_at,
    coupled_distance,
    distance_bound,
    figures,
    greedy_distance_bound,
    speedup,
    telemetry,
    total,
    windows,
)
from onlinespec.experiments.report_schema import Round, Totals

ONE = DecodeStats(
    requests=1, tokens=6, steps=2, drafted=8, accepted=4, accepted_by_position=(2, 1, 1, 0), decode_seconds=2.0
)
SKIPPED = DecodeStats(skipped=1)

requests = st.builds(
    lambda tokens, steps, accepted, seconds: DecodeStats(1, 0, tokens, steps, accepted + 1, accepted, (), seconds),
    st.integers(0, 100),
    st.integers(1, 100),
    st.integers(0, 100),
    st.floats(0, 10),
)


def test_nothing_adds_up_to_nothing():
    assert total([]) == DecodeStats()
    assert total([]).acceptance_length == total([]).acceptance_rate == total([]).tokens_per_second == 0
    assert total([]).acceptance_by_position == ()


def test_a_total_counts_everything_once():
    other = replace(ONE, learn_seconds=1.0, ties=1, accepted_by_position=(1, 1))
    both = total([ONE, SKIPPED, other])
    for field in fields(DecodeStats):
        if field.name != "accepted_by_position":
            parts = [getattr(stats, field.name) for stats in (ONE, SKIPPED, other)]
            assert getattr(both, field.name) == sum(parts), field.name
    assert both.accepted_by_position == (3, 2, 1, 0)  # drafts of different lengths
    assert both.tokens_per_second == 12 / 5  # learning time is counted


def test_a_total_weighs_requests_by_their_steps():
    long, short = DecodeStats(steps=9, accepted=9), DecodeStats(steps=1, accepted=0)
    assert total([long, short]).acceptance_length == pytest.approx(1.9)


def test_speedup_is_a_ratio_of_net_rates():
    learning = replace(ONE, learn_seconds=2.0)
    assert speedup(ONE, ONE) == 1.0
    assert speedup(learning, ONE) == 0.5
    assert speedup(ONE, learning) == 2.0


@pytest.mark.parametrize("control", [None, DecodeStats(), SKIPPED])
def test_there_is_no_speedup_over_a_control_that_measured_nothing(control):
    assert speedup(ONE, control) is None


@pytest.mark.parametrize("is_identical", [True, False, None])
def test_figures_are_the_fields_of_the_report(is_identical):
    found = figures(ONE, replace(ONE, decode_seconds=4.0), None, is_identical)
    assert Totals(**found).identical_to_plain is is_identical
    assert (found["speedup_vs_none"], found["speedup_vs_frozen"]) == (2.0, None)
    assert found["acceptance_length"] == 3.0
    assert found["acceptance_by_position"] == (1.0, 0.5, 0.5, 0.0)


@given(st.lists(requests | st.just(SKIPPED), max_size=30), st.integers(1, 12))
def test_windows_split_the_requests_in_order(stats, size):
    found = windows(stats, size)
    assert len(found) == -(-len(stats) // size)
    assert sum(window.requests for window in found) == total(stats).requests
    for number, window in enumerate(found):
        group = total(stats[number * size : (number + 1) * size])
        assert window.acceptance_length == group.acceptance_length
        assert window.tokens_per_second == group.tokens_per_second


# What a loss guarantees

distances, depths = st.floats(0, 1), st.integers(0, 16)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, 16])
def test_all_is_kept_without_a_distance_and_nothing_at_the_greatest(num_draft_tokens):
    assert acceptance_length_at(0.0, num_draft_tokens) == num_draft_tokens + 1
    assert acceptance_length_at(1.0, num_draft_tokens) == 1.0


def test_the_acceptance_length_is_the_mean_of_steps_whose_tokens_are_kept_alike():
    keep = 0.7
    law = [keep**j * (1 - keep) for j in range(4)] + [keep**4]  # j drafts kept, and one token of the target's own
    assert acceptance_length_at(1 - keep, 4) == pytest.approx(sum((1 + j) * p for j, p in enumerate(law)))


@steady
@given(one=distances, other=distances, num_draft_tokens=depths)
def test_the_acceptance_length_falls_with_the_distance(one, other, num_draft_tokens):
    near, far = (acceptance_length_at(d, num_draft_tokens) for d in sorted((one, other)))
    assert 1 <= far <= near <= num_draft_tokens + 1


@steady
@given(each=st.lists(distances, min_size=1, max_size=10), num_draft_tokens=depths)
def test_the_acceptance_length_at_a_mean_distance_is_at_most_the_mean(each, num_draft_tokens):
    mean = math.fsum(acceptance_length_at(d, num_draft_tokens) for d in each) / len(each)
    assert acceptance_length_at(math.fsum(each) / len(each), num_draft_tokens) <= mean + 1e-9


def drawn_rows(seed, num_rows, vocab, spread, apart):
    """Target and drafted rows in float64; the draft is the target and so much of something else."""
    generator = torch.Generator().manual_seed(seed)
    target, other = spread * torch.randn(2, num_rows, vocab, generator=generator, dtype=torch.float64)
    return target.softmax(-1), (target + apart * other).softmax(-1)


row_pairs = st.builds(
    drawn_rows, st.integers(0, 1000), st.integers(1, 8), st.integers(2, 12), st.floats(0.1, 8), st.floats(0.01, 2)
)


@steady
@given(pair=row_pairs)
def test_no_rows_are_further_apart_than_their_mean_kl_allows(pair):
    p, draft = pair
    mean_kl = float((p * (p / draft).log()).sum(-1).mean())
    assert float((p - draft).abs().sum(-1).mean() / 2) <= distance_bound(mean_kl) + 1e-9


@steady
@given(pair=row_pairs)
def test_no_more_greedy_drafts_differ_than_the_mean_token_loss_allows(pair):
    p, draft = pair
    tokens = p.argmax(-1)
    token_loss = float(-draft[torch.arange(len(p)), tokens].log().mean())
    assert float((draft.argmax(-1) != tokens).double().mean()) <= greedy_distance_bound(token_loss) + 1e-9


@steady
@given(pair=row_pairs)
def test_no_more_sampled_drafts_differ_under_one_noise_than_the_mean_distance_allows(pair):
    """Both choose v with chance 1 / sum_u max(target_u / target_v, draft_u / draft_v): v's race is won in both."""
    p, draft = pair
    ratios = torch.maximum(p[:, None, :] / p[:, :, None], draft[:, None, :] / draft[:, :, None])
    differ = 1 - (1 / ratios.sum(-1)).sum(-1)
    mean_distance = float((p - draft).abs().sum(-1).mean() / 2)
    assert float(differ.mean()) <= coupled_distance(mean_distance) + 1e-9


def test_the_greedy_bound_is_reached_where_two_tokens_are_alike():
    assert greedy_distance_bound(math.log(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("bound", [distance_bound, greedy_distance_bound])
def test_a_bound_grows_with_the_loss_from_0_to_1(bound):
    bounds = [bound(loss / 100) for loss in range(2000)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == pytest.approx(1)


def test_a_kl_that_rounds_below_zero_allows_nothing():
    assert distance_bound(-1e-8) == 0


# What learning did


def learned(loss=1.0, learner=None, **measured):
    unknown = ("data", "moved", "function_moved", "gradient_cosine", "is_update", "agreement", "is_undoing")
    rest = {name: 0 for name in Round.__struct_fields__ if name not in unknown}
    return Round(**(rest | {"data": "code", "num_rows": 1, "loss": loss, "learner": learner or {}} | measured))


def test_without_rounds_there_is_nothing_to_tell():
    assert telemetry([]) is None


def test_regrets_are_sums_over_rounds():
    rounds = [learned(kl=1.0, frozen_kl=1.0), learned(kl=0.5, frozen_kl=1.25), learned(kl=0.25, frozen_kl=1.0)]
    told = telemetry(rounds)
    assert told.regret_upper == 1.75
    assert told.regret_vs_frozen == -1.5
    assert told.rounds == tuple(rounds)


def test_one_large_round_does_not_look_better_than_many_small_ones_that_were_better_by_the_row():
    """A learner with a round for every eight requests has small sums, however little it learned."""
    rare = telemetry([learned(kl=5.0, frozen_kl=5.0, num_rows=600)])
    often = telemetry([learned(kl=4.0, frozen_kl=5.0, num_rows=60) for _ in range(10)])
    assert rare.regret_upper < often.regret_upper
    assert (rare.kl_per_row, often.kl_per_row) == (5.0, 4.0)
    assert (rare.regret_vs_frozen_per_row, often.regret_vs_frozen_per_row) == (0.0, -1.0)


def test_a_round_counts_by_the_rows_it_stands_for():
    small = learned(kl=2.0, frozen_kl=3.0, token_loss=1.0, num_rows=1)
    large = learned(kl=1.0, frozen_kl=1.0, token_loss=2.0, num_rows=3)
    told = telemetry([small, large])
    assert told.num_rows == 4
    assert told.token_loss_per_row == 1.75
    assert told.kl_per_row == 1.25
    assert told.regret_vs_frozen_per_row == -0.25


def test_without_rows_nothing_is_told_by_the_row():
    told = telemetry([learned(kl=1.0, num_rows=0)])
    assert told.regret_upper == 1.0
    assert told.token_loss_per_row is told.kl_per_row is told.regret_vs_frozen_per_row is None
    assert told.regret_vs_best_expert_per_row is None


def test_the_acceptance_length_bound_is_the_mean_over_the_steps_that_were_decoded():
    rounds = [learned(acceptance_length_bound=x, step=step) for x, step in ((1.0, 10), (1.5, 20), (3.0, 40))]
    assert telemetry(rounds).acceptance_length_bound == (10 * 1.0 + 10 * 1.5 + 20 * 3.0) / 40


def test_the_cosine_of_successive_gradients_is_the_mean_of_the_rounds_that_have_one():
    rounds = [learned(), learned(gradient_cosine=0.5), learned(gradient_cosine=-0.25), learned()]
    assert telemetry(rounds).gradient_cosine == 0.125
    assert telemetry([learned()]).gradient_cosine is None


def experts(loss, num_rows=1, **expert_losses):
    return learned(loss, {"expert_losses": expert_losses}, num_rows=num_rows)


def test_the_best_expert_is_the_best_in_all_not_in_each_round():
    rounds = [experts(1.0, slow=0.5, fast=2.0), experts(1.0, slow=1.25, fast=0.5)]
    assert telemetry(rounds).regret_vs_best_expert == 2.0 - 1.75


def test_by_the_row_the_best_expert_is_the_one_that_was_best_on_most_rows():
    rounds = [experts(1.0, slow=0.5, fast=2.0), experts(1.0, num_rows=3, slow=1.25, fast=0.5)]
    assert telemetry(rounds).regret_vs_best_expert == 2.0 - 1.75
    assert telemetry(rounds).regret_vs_best_expert_per_row == 1.0 - (2.0 + 3 * 0.5) / 4


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_an_expert_that_diverged_is_not_the_best(last):
    rounds = [experts(1.0, slow=2.0, fast=0.0), experts(1.0, slow=2.0, fast=last)]
    assert telemetry(rounds).regret_vs_best_expert == -2.0


def test_where_all_experts_diverged_there_is_no_best():
    assert telemetry([experts(1.0, slow=math.nan, fast=math.inf)]).regret_vs_best_expert is None


def test_rounds_without_experts_count_neither_for_nor_against_them():
    assert telemetry([learned(9.0), experts(1.0, slow=2.0, fast=0.5)]).regret_vs_best_expert == 0.5


def hints(error, norm):
    return learned(
        learner={
            "hint_error": error,
            "gradient_norm": norm,
            "direction_hint_error": norm,
            "direction_gradient_norm": 2 * norm,
        }
    )


def test_hint_errors_are_counted_against_the_gradients_own_size_over_all_rounds():
    told = telemetry([hints(error=4.0, norm=4.0), hints(error=1.0, norm=6.0)])
    assert told.hint_error_ratio == 0.5
    assert told.direction_hint_error_ratio == 0.5


def test_rounds_that_reported_no_hint_are_left_out():
    assert telemetry([learned(), hints(error=1.0, norm=2.0), learned()]).hint_error_ratio == 0.5


@pytest.mark.parametrize("rounds", [[learned()], [hints(error=0.0, norm=0.0)]], ids=["no hints", "no gradients"])
def test_what_no_learner_reported_is_not_made_up(rounds):
    told = telemetry(rounds)
    assert told.hint_error_ratio is None
    assert told.direction_hint_error_ratio is None
    assert told.regret_vs_best_expert is None


def test_what_telemetry_tells_can_be_written_and_read():
    told = telemetry([experts(1.0, slow=2.0, fast=math.nan), hints(error=1.0, norm=2.0)])
    read = msgspec.json.decode(msgspec.json.encode(told), type=type(told))
    assert (read.regret_vs_best_expert, read.hint_error_ratio) == (-1.0, 0.5)
    assert read.rounds[0].learner["expert_losses"] == {"slow": 2.0, "fast": None}
