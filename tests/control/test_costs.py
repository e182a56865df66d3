import pytest
from simulator import Machine

from onlinespec.control.costs import StepCosts, TrackedCosts, profile

MACHINE = Machine()
SHAPES = ([0], [4], [2, 0, 1], [5] * 8, [0, 8, 3, 3] * 5)


def tracked():
    return TrackedCosts(MACHINE.profile())


def visit(costs, shape, factor=1.0, times=1):
    for _ in range(times):
        costs.observe(shape, factor * MACHINE.draft_seconds(shape), factor * MACHINE.verify_seconds(shape))


def expected_over_true(costs, shape):
    return sum(costs.step_seconds(shape)) / (MACHINE.draft_seconds(shape) + MACHINE.verify_seconds(shape))


def test_a_profile_is_made_of_medians_and_its_first_steps_are_not_timed():
    calls = []

    def measure(batch, depth):
        calls.append((batch, depth))
        turn = (len(calls) - 1) // 4  # 0 warms up
        return depth * [9e9, 1.0, 50.0, 2.0][turn], batch * [9e9, 3.0, 4.0, 90.0][turn]

    costs = profile(measure, (1, 2), (0, 3), repeats=3)
    assert calls[:4] == [(1, 0), (1, 3), (2, 0), (2, 3)]  # shapes take turns
    assert costs == StepCosts((1, 2), (0, 3), ((0.0, 6.0), (0.0, 6.0)), ((4.0, 4.0), (8.0, 8.0)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_between_and_beyond_the_measured_ones_are_interpolated(shape):
    assert expected_over_true(tracked(), shape) == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_add_up_to_the_step(shape):
    costs = tracked()
    visit(costs, [2] * 8, factor=1.3, times=20)
    by_depth = costs.draft_by_depth(len(shape), 8)
    draft = sum(by_depth[d][sum(d < count for count in shape)] for d in range(8))
    verify = costs.verify_by_rows(len(shape), sum(shape))[-1]
    assert (costs.scale * draft, costs.scale * verify) == pytest.approx(costs.step_seconds(shape))


def test_a_machine_that_slows_down_slows_all_shapes_down():
    costs = tracked()
    visit(costs, [4], times=100)
    visit(costs, [4], factor=2.0, times=30)
    assert expected_over_true(costs, [4]) == pytest.approx(2, rel=0.05)
    assert expected_over_true(costs, [0]) == pytest.approx(2, rel=0.2)


def test_a_shape_that_alone_is_wrong_is_corrected_alone():
    costs = tracked()
    visit(costs, [4], times=100)
    visit(costs, [0], factor=3.0, times=5)
    assert expected_over_true(costs, [0]) == pytest.approx(3, rel=0.1)
    assert expected_over_true(costs, [4]) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("times", [1, 50])
def test_a_hiccup_moves_nothing(times):
    costs = tracked()
    visit(costs, [4], times=times)
    visit(costs, [4], factor=10.0)
    visit(costs, [4])
    assert expected_over_true(costs, [4]) == pytest.approx(1, rel=0.02)


def test_a_deeper_draft_is_never_expected_to_cost_less():
    costs = MACHINE.profile()
    rows = tuple((*row[:3], 3 * row[3], *row[4:]) for row in costs.draft_seconds)
    mended = TrackedCosts(StepCosts(costs.batch_sizes, costs.num_draft_tokens, rows, costs.verify_seconds))
    assert [mended.step_seconds([depth])[0] for depth in range(9)] == pytest.approx(
        [MACHINE.draft_seconds([depth]) for depth in range(9)]
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_sizes": (2, 1)}, r"batch_sizes is \(2, 1\); give rising counts of at least 1"),
        ({"num_draft_tokens": (1, 2)}, "starts at 1; start at 0"),
        ({"draft_seconds": ((0.0, 1.0),)}, r"draft_seconds has shape \(1, 2\), expected \(2, 2\)"),
        ({"verify_seconds": ((1.0, 1.0), (1.0, -2.0))}, "verify_seconds has -2.0; .* measure again"),
    ],
)
def test_what_is_no_profile_is_refused(changed, words):
    fine = {
        "batch_sizes": (1, 2),
        "num_draft_tokens": (0, 4),
        "draft_seconds": ((0.0, 1.0), (0.0, 1.0)),
        "verify_seconds": ((1.0, 1.0), (1.0, 1.0)),
    }
    with pytest.raises(ValueError, match=words):
        StepCosts(**{**fine, **changed})
