import math

import msgspec
import pytest

from onlinespec.learning.rounds import Round, summarise


def learned(loss=1.0, learner=None, **measured):
    unknown = ("data", "moved", "function_moved", "gradient_cosine", "is_update", "agreement", "is_undoing")
    rest = {name: 0 for name in Round.__struct_fields__ if name not in unknown}
    return Round(**(rest | {"data": "code", "num_rows": 1, "loss": loss, "learner": learner or {}} | measured))


def test_without_rounds_there_is_nothing_to_tell():
    assert summarise([]) is None


def test_regrets_are_sums_over_rounds():
    rounds = [learned(kl=1.0, frozen_kl=1.0), learned(kl=0.5, frozen_kl=1.25), learned(kl=0.25, frozen_kl=1.0)]
    told = summarise(rounds)
    assert told.regret_upper == 1.75
    assert told.regret_vs_frozen == -1.5
    assert told.rounds == tuple(rounds)


def test_one_large_round_does_not_look_better_than_many_small_ones_that_were_better_by_the_row():
    """A learner with a round for every eight requests has small sums, however little it learned."""
    rare = summarise([learned(kl=5.0, frozen_kl=5.0, num_rows=600)])
    often = summarise([learned(kl=4.0, frozen_kl=5.0, num_rows=60) for _ in range(10)])
    assert rare.regret_upper < often.regret_upper
    assert (rare.kl_per_row, often.kl_per_row) == (5.0, 4.0)
    assert (rare.regret_vs_frozen_per_row, often.regret_vs_frozen_per_row) == (0.0, -1.0)


def test_a_round_counts_by_the_rows_it_stands_for():
    small = learned(kl=2.0, frozen_kl=3.0, token_loss=1.0, num_rows=1)
    large = learned(kl=1.0, frozen_kl=1.0, token_loss=2.0, num_rows=3)
    told = summarise([small, large])
    assert told.num_rows == 4
    assert told.token_loss_per_row == 1.75
    assert told.kl_per_row == 1.25
    assert told.regret_vs_frozen_per_row == -0.25


def test_without_rows_nothing_is_told_by_the_row():
    told = summarise([learned(kl=1.0, num_rows=0)])
    assert told.regret_upper == 1.0
    assert told.token_loss_per_row is told.kl_per_row is told.regret_vs_frozen_per_row is None
    assert told.regret_vs_best_expert_per_row is None


def test_the_acceptance_length_bound_is_the_mean_over_the_steps_that_were_decoded():
    rounds = [learned(acceptance_length_bound=x, step=step) for x, step in ((1.0, 10), (1.5, 20), (3.0, 40))]
    assert summarise(rounds).acceptance_length_bound == (10 * 1.0 + 10 * 1.5 + 20 * 3.0) / 40


def test_the_cosine_of_successive_gradients_is_the_mean_of_the_rounds_that_have_one():
    rounds = [learned(), learned(gradient_cosine=0.5), learned(gradient_cosine=-0.25), learned()]
    assert summarise(rounds).gradient_cosine == 0.125
    assert summarise([learned()]).gradient_cosine is None


def experts(loss, num_rows=1, **expert_losses):
    return learned(loss, {"expert_losses": expert_losses}, num_rows=num_rows)


def test_the_best_expert_is_the_best_in_all_not_in_each_round():
    rounds = [experts(1.0, slow=0.5, fast=2.0), experts(1.0, slow=1.25, fast=0.5)]
    assert summarise(rounds).regret_vs_best_expert == 2.0 - 1.75


def test_by_the_row_the_best_expert_is_the_one_that_was_best_on_most_rows():
    rounds = [experts(1.0, slow=0.5, fast=2.0), experts(1.0, num_rows=3, slow=1.25, fast=0.5)]
    assert summarise(rounds).regret_vs_best_expert == 2.0 - 1.75
    assert summarise(rounds).regret_vs_best_expert_per_row == 1.0 - (2.0 + 3 * 0.5) / 4


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_an_expert_that_diverged_is_not_the_best(last):
    rounds = [experts(1.0, slow=2.0, fast=0.0), experts(1.0, slow=2.0, fast=last)]
    assert summarise(rounds).regret_vs_best_expert == -2.0


def test_where_all_experts_diverged_there_is_no_best():
    assert summarise([experts(1.0, slow=math.nan, fast=math.inf)]).regret_vs_best_expert is None


def test_rounds_without_experts_count_neither_for_nor_against_them():
    assert summarise([learned(9.0), experts(1.0, slow=2.0, fast=0.5)]).regret_vs_best_expert == 0.5


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
    told = summarise([hints(error=4.0, norm=4.0), hints(error=1.0, norm=6.0)])
    assert told.hint_error_ratio == 0.5
    assert told.direction_hint_error_ratio == 0.5


def test_rounds_that_reported_no_hint_are_left_out():
    assert summarise([learned(), hints(error=1.0, norm=2.0), learned()]).hint_error_ratio == 0.5


@pytest.mark.parametrize("rounds", [[learned()], [hints(error=0.0, norm=0.0)]], ids=["no hints", "no gradients"])
def test_what_no_learner_reported_is_not_made_up(rounds):
    told = summarise(rounds)
    assert told.hint_error_ratio is None
    assert told.direction_hint_error_ratio is None
    assert told.regret_vs_best_expert is None


def test_what_telemetry_tells_can_be_written_and_read():
    told = summarise([experts(1.0, slow=2.0, fast=math.nan), hints(error=1.0, norm=2.0)])
    read = msgspec.json.decode(msgspec.json.encode(told), type=type(told))
    assert (read.regret_vs_best_expert, read.hint_error_ratio) == (-1.0, 0.5)
    assert read.rounds[0].learner["expert_losses"] == {"slow": 2.0, "fast": None}
