"""What every learner of the table keeps, in every geometry: a new line in `LEARNERS` is tested by being there."""

import io
import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import steady

from onlinespec.learners import Evaluation, make_learner
from onlinespec.learners.ensemble import Ensemble, Hedge
from onlinespec.learners.geometry import Diagonal, Point, Preconditioned, averaged, clip_by_norm, is_finite
from onlinespec.learners.optimistic import OptimisticGradient
from onlinespec.registry import GEOMETRIES, LEARNERS

DOES_NOT_LEARN = {"frozen": "the control: it tracks nothing, on purpose"}
LEARNING = [name for name in LEARNERS if name not in DOES_NOT_LEARN]
ASKS_ELSEWHERE = {"ensemble": "for a gradient at each expert's own weights; so it can't be an expert itself"}
NO_BOUND = {
    "momentum": "each gradient is followed again in later rounds, at weights it was not taken at",
    "reset_to_merged": "the shares are chosen in-sample, and no expert lives long enough to be compared with",
}
BOUNDED = [name for name in LEARNING if name not in NO_BOUND]
MOVES_FARTHER = {"momentum": 5.42}  # than its step size says, in chunks of 16 rounds
# The surrogate's experts all follow the gradient of the mean, so that none comes back by itself: a high rate would
# throw the mean from one side of the goal to the other.
CALM = {"surrogate_ensemble": {"meta_step_size": 0.1}}

VARIANTS = {name: (name, CALM.get(name, {})) for name in LEARNERS} | {
    "optimistic-by_domain": ("optimistic", {"hint_by_domain": True}),
    "optimistic-averaged_hints": ("optimistic", {"hint_decay": 0.5}),
    "ensemble-of_optimistic": ("ensemble", {"base": "optimistic", "with_frozen": True}),
    "surrogate_ensemble-of_optimistic": ("surrogate_ensemble", {"base": "optimistic", **CALM["surrogate_ensemble"]}),
}
VARIANTS_LEARNING = [variant for variant, (name, _) in VARIANTS.items() if name in LEARNING]
EXACTLY = {"geometry": "euclidean", "clip_norm": math.inf}


@pytest.fixture(params=LEARNERS)
def name(request):
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=() if name in LEARNERS else pytest.mark.full) for name in VARIANTS])
def variant(request):
    return request.param


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.full if name == "diagonal" else ()) for name in GEOMETRIES]
)
def geometry(request):
    return request.param


@pytest.fixture
def learner(variant, geometry):
    name, options = VARIANTS[variant]
    step_size = 0.1 if geometry == "euclidean" else 0.03
    return make_learner(name, step_size / MOVES_FARTHER.get(name, 1.0), geometry, clip_norm=10.0, **options)


def start_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 2, generator=generator).to(dtype), "b": torch.randn(4, generator=generator).to(dtype)}


def at(*numbers):
    return {"w": torch.tensor(numbers, dtype=torch.float64)}


def copy(params):
    return {name: p.clone() for name, p in params.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one, other, tolerance=1e-9):
    for name, p in one.items():
        torch.testing.assert_close(p.double(), other[name].double(), atol=tolerance, rtol=tolerance)


def minus(one, other):
    return {name: p - other[name] for name, p in one.items()}


def inner(one, other):
    return sum(float((p * other[name]).sum()) for name, p in one.items())


def norm(params):
    return math.sqrt(inner(params, params))


def tensors(state):
    """All that a state holds, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


class Quadratic:
    """One round whose loss is |w - goal|^2 / 2; it remembers who asked for what."""

    def __init__(self, goal, domain=""):
        self.goal, self.domain = goal, domain
        self.candidates, self.scored = [], []

    def __call__(self, *candidates, scored=()):
        self.candidates += candidates
        self.scored += scored
        return [self.evaluate(p) for p in candidates] + [self.evaluate(p)._replace(grads={}) for p in scored]

    def evaluate(self, params):
        loss = sum(float(self.loss(p, self.goal[name]).sum(dtype=torch.float64)) for name, p in params.items())
        grads = {name: self.slope(p, self.goal[name]).to(p.dtype) for name, p in params.items()}
        return Evaluation(loss, loss, grads, self.domain)

    def loss(self, w, goal):
        return (w - goal) ** 2 / 2

    def slope(self, w, goal):
        return w - goal


class Absolute(Quadratic):
    """|w - goal|: convex, with slopes of 1 however near."""

    def loss(self, w, goal):
        return (w - goal).abs()

    def slope(self, w, goal):
        return (w - goal).sign()


class Linear(Quadratic):
    """<goal, w>: the gradient is the goal, wherever."""

    def loss(self, w, goal):
        return goal * w

    def slope(self, w, goal):
        return goal


class DoubleWell(Quadratic):
    """Least at the goal and at its mirror image, and worst between the two."""

    def loss(self, w, goal):
        return (w**2 - goal**2) ** 2

    def slope(self, w, goal):
        return 4 * w * (w**2 - goal**2)


def drifting_goal(round_):
    return {"a": torch.full((3, 2), math.sin(round_ / 100)), "b": torch.full((4,), math.cos(round_ / 100))}


def drifting(round_):
    return Quadratic(drifting_goal(round_), domain="ab"[round_ % 2])


def play(learner, state, rounds):
    """The state after the rounds, each announced before it comes."""
    for each in rounds:
        state = learner.update(each, learner.expect(each.domain, state))
    return state


def nearness(geometry):
    """Where steps are scaled they don't shrink near a goal: learners circle round it."""
    return 0.15 if geometry == "euclidean" else 0.35


def largest_error(learner, state, goal):
    return max(float((p - goal[name]).abs().max()) for name, p in learner.played(state).items())


# The contract


def test_round_0_plays_the_start_bit_for_bit(learner):
    assert_equal(learner.played(learner.init(start_params())), start_params())


def test_a_gradient_of_zero_moves_nothing(learner):
    state = play(learner, learner.init(start_params()), [Quadratic(start_params(), domain) for domain in "abaab"])
    assert_equal(learner.played(state), start_params())


@pytest.mark.parametrize("variant", VARIANTS_LEARNING)
def test_a_moving_goal_is_tracked(learner, geometry):
    state = play(learner, learner.init(start_params()), map(drifting, range(150)))
    assert largest_error(learner, state, drifting_goal(150)) < nearness(geometry)


@pytest.mark.parametrize("variant", VARIANTS_LEARNING)
def test_a_goal_that_stays_is_reached(learner, geometry):
    state = play(learner, learner.init(start_params()), [drifting(0)] * 120)
    for _ in range(10):
        state = play(learner, state, [drifting(0)])
        assert largest_error(learner, state, drifting_goal(0)) < nearness(geometry)


@pytest.mark.parametrize("variant", DOES_NOT_LEARN)
def test_a_control_never_moves_and_asks_for_nothing(learner):
    each = drifting(0)
    state = play(learner, learner.init(start_params()), [each] * 3)
    assert_equal(learner.played(state), start_params())
    assert not learner.needs_gradient
    assert not each.candidates + each.scored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_keeps_its_dtype_and_shape(learner, dtype):
    played = learner.played(play(learner, learner.init(start_params(dtype)), map(drifting, range(3))))
    for name, p in start_params(dtype).items():
        assert (played[name].dtype, played[name].shape) == (p.dtype, p.shape)


@pytest.mark.parametrize("variant", VARIANTS_LEARNING)
def test_steps_far_below_the_resolution_of_bfloat16_add_up(variant, geometry):
    """Next to 1, bfloat16 has a number every 0.004; a step here moves 0.0001, which added in bfloat16 is nothing."""
    name, options = VARIANTS[variant]
    learner = make_learner(name, step_size=1e-4, geometry=geometry, clip_norm=10.0, **options)
    start = {"w": torch.ones(4, dtype=torch.bfloat16)}
    uphill = Linear({"w": torch.ones(4)})
    after_one = play(learner, learner.init(start), [uphill])
    assert_equal(learner.played(after_one), start)
    assert (learner.played(play(learner, after_one, [uphill] * 240))["w"] < 0.98).all()


def test_an_update_changes_neither_the_old_state_nor_the_given_weights(learner):
    params = start_params()
    state = play(learner, learner.init(params), map(drifting, range(3)))
    before = [tensor.clone() for tensor in tensors(state)]
    once, again = (play(learner, state, [drifting(3)]) for _ in range(2))
    assert_equal(params, start_params())
    assert all(map(torch.equal, tensors(state), before))
    assert_equal(learner.played(once), learner.played(again))


def test_the_gradients_of_a_round_are_left_alone(learner):
    given_out = []

    def evaluate(*candidates, scored=()):
        answer = drifting(0)(*candidates, scored=scored)
        given_out.extend((evaluation.grads, copy(evaluation.grads)) for evaluation in answer)
        return answer

    learner.update(evaluate, play(learner, learner.init(start_params()), [drifting(1)]))
    for grads, as_given in given_out:
        assert_equal(grads, as_given)


def test_a_state_saved_in_mid_stream_has_the_same_future(learner):
    state = play(learner, learner.init(start_params()), map(drifting, range(7)))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert_equal(learner.played(restored), learner.played(state))
    futures = [play(learner, s, map(drifting, range(7, 20))) for s in (state, restored)]
    assert_equal(*map(learner.played, futures))
    reports = [learner.report(future) for future in futures]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("variant", VARIANTS_LEARNING)
def test_what_played_is_scored_without_being_asked_for_again(learner):
    """At every round; an ensemble that scores its mean more rarely says so."""
    state = learner.init(start_params())
    for round_ in range(9):
        each = drifting(round_)
        state = learner.expect(each.domain, state)
        played, state = learner.played(state), learner.update(each, state)
        if round_ % getattr(learner, "gap_every", 1) == 0:
            assert any(params is played for params in each.candidates + each.scored)


@pytest.mark.parametrize("name", [name for name in LEARNING if name not in ASKS_ELSEWHERE])
def test_a_rule_asks_for_one_gradient_and_that_where_it_played(name, geometry):
    learner = make_learner(name, 0.05, geometry)
    state = learner.init(start_params())
    for each in map(drifting, range(4)):
        played, state = learner.played(state), learner.update(each, state)
        (asked,) = each.candidates
        assert asked is played


def test_before_the_first_round_no_traffic_is_expected_otherwise(learner):
    state = learner.init(start_params())
    assert learner.expect("a domain", state) is state
    assert isinstance(learner.report(state), dict)


# Regret


def bounded_options(name, num_rounds, loss_range):
    """The meta step size that the bound is for; three experts."""
    hedge = {"meta_step_size": math.sqrt(8 * math.log(3) / num_rounds), "discount": 1.0, "loss_range": loss_range}
    return {"ensemble": hedge, "surrogate_ensemble": hedge}.get(name, {})


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("num_rounds", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_regret_grows_like_the_root_of_the_number_of_rounds(name, num_rounds):
    """Losses |w - z_t| with z_t at either end of a line of length D = 2, step size D / sqrt(T), slopes of 1.

    Online gradient: D sqrt(T). Optimistic: hints may be off by 2, so 2.5 D sqrt(T) at most. An ensemble: online
    gradient's, which is among its experts, and 2 D sqrt(T ln(3) / 2) for finding it, below 2.5 D sqrt(T) too.
    """
    generator, length = torch.Generator().manual_seed(1), 2.0
    goals = [at(2.0 * z - 1) for z in (torch.rand(num_rounds, generator=generator) < 0.7).tolist()]
    options = bounded_options(name, num_rounds, 2 * length)
    learner = make_learner(name, length / math.sqrt(num_rounds), "euclidean", 1.0, **options)
    state, suffered = learner.init(at(-1.0)), 0.0
    for goal in goals:
        suffered += Absolute(goal).evaluate(learner.played(state)).fresh_loss
        state = learner.update(Absolute(goal), state)
    best = min(sum(Absolute(goal).evaluate(w).fresh_loss for goal in goals) for w in (at(-1.0), at(1.0)))
    assert suffered - best <= 2.5 * length * math.sqrt(num_rounds)


coordinates = st.floats(-1, 1)
jumps = st.lists(st.tuples(coordinates, coordinates), min_size=2, max_size=30)
drifts = jumps.map(lambda moves: list(accumulate(moves, lambda z, move: (z[0] + move[0] / 20, z[1] + move[1] / 20))))
streams = (jumps | drifts).map(lambda goals: [at(*goal) for goal in goals])


@pytest.mark.parametrize("name", ["online_gradient", "optimistic"])
@pytest.mark.parametrize("loss", [Quadratic, Absolute])
@pytest.mark.parametrize("is_comparator_moving", [False, True])
@settings(steady, max_examples=40)
@given(goals=streams, step_size=st.floats(0.01, 1.0))
def test_regret_stays_under_its_bound_whatever_the_stream(name, loss, is_comparator_moving, goals, step_size):
    """regret <= |v_0 - u_0|^2 / (2 eta) + D P / eta + eta / 2 * sum |g - h|^2, for any comparators u of path length P.

    With v_next = v - eta g and w = v - eta h, <g, w - u> is exactly

        (|v - u|^2 - |v_next - u|^2) / (2 eta) + eta / 2 * (|g - h|^2 - |h|^2).

    The first terms telescope for a fixed u, so P = 0; where u moves to u', |v_next - u'|^2 - |v_next - u|^2 is at most
    2 D |u' - u|, with D the longest way from any v to any u. Online gradient is the case h = 0. Convexity does the
    rest.
    """
    learner = make_learner(name, step_size, **EXACTLY)
    state = learner.init(at(0.5, 0.5))
    middle = at(*(sum(goal["w"][i] for goal in goals) / len(goals) for i in range(2)))
    comparators = goals if is_comparator_moving else [middle] * len(goals)
    regret, grads, learned = 0.0, [], [state.point.masters]
    for goal, comparator in zip(goals, comparators, strict=True):
        each = loss(goal)
        ours = each.evaluate(learner.played(state))
        regret += ours.fresh_loss - each.evaluate(comparator).fresh_loss
        state = learner.update(each, state)
        grads.append(ours.grads)
        learned.append(state.point.masters)
    hints = [at(0.0, 0.0), *grads[:-1]] if name == "optimistic" else [at(0.0, 0.0)] * len(grads)
    errors = sum(norm(minus(g, h)) ** 2 for g, h in zip(grads, hints, strict=True))
    path = sum(norm(minus(after, before)) for before, after in pairwise(comparators))
    diameter = max(norm(minus(v, u)) for v in learned for u in comparators) if path else 0.0
    first = norm(minus(learned[0], comparators[0])) ** 2 / (2 * step_size)
    assert regret <= first + diameter * path / step_size + step_size / 2 * errors + 1e-9


tables = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=1, max_size=40)
)


@steady
@given(table=tables, meta_step_size=st.floats(0.01, 20))
def test_meta_regret_stays_under_its_bound_whatever_the_losses(table, meta_step_size):
    hedge = Hedge(meta_step_size, discount=1.0, loss_range=1.0)
    n = len(table[0])
    costs, suffered = (0.0,) * n, 0.0
    for losses in table:
        weights = hedge.weights(costs)
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0
        suffered += sum(w * loss for w, loss in zip(weights, losses, strict=True))
        costs = hedge.charged(costs, losses)
    best = min(sum(losses[i] for losses in table) for i in range(n))
    assert suffered - best <= math.log(n) / meta_step_size + meta_step_size * len(table) / 8 + 1e-9


@pytest.mark.parametrize("name", ["ensemble", "surrogate_ensemble"])
@steady
@given(goals=streams, meta_step_size=st.floats(0.05, 5))
def test_what_plays_suffers_at_most_the_best_expert_and_the_meta_regret(name, goals, meta_step_size):
    """Jensen first: the mean of the weights loses at most the mean of the losses. Then Hedge."""
    pool, loss_range, num_rounds = (0.01, 0.1, 0.3), 8.0, len(goals)
    hedge = {"meta_step_size": meta_step_size, "discount": 1.0, "loss_range": loss_range}
    learner = make_learner(name, 0.1, **EXACTLY, step_size_pool=pool, **hedge)
    state, suffered, experts_suffered = learner.init(at(0.5, 0.5)), 0.0, [0.0] * 3
    for goal in goals:
        loss = Quadratic(goal).evaluate(learner.played(state)).fresh_loss
        weights = state.meta_weights
        state = learner.update(Quadratic(goal), state)
        losses = learner.report(state)["expert_losses"].values()
        assume(max(losses) - min(losses) <= loss_range)
        assert loss <= sum(w * one for w, one in zip(weights, losses, strict=True)) + 1e-6
        suffered += loss
        experts_suffered = [a + b for a, b in zip(experts_suffered, losses, strict=True)]
    meta_regret = loss_range * (math.log(3) / meta_step_size + meta_step_size * num_rounds / 8)
    assert suffered <= min(experts_suffered) + meta_regret + 1e-6


@pytest.mark.parametrize("num_experts", [2, 3, 4, 7])
@pytest.mark.parametrize("num_rounds", [10, 100, 1000, 100_000])
def test_at_the_shipped_settings_no_bound_says_more_than_that_losses_are_bounded(num_experts, num_rounds):
    """meta_step_size / 8 a round is more than a whole loss range; and what is forgotten is not bounded at all."""
    assert Hedge().regret_bound(num_experts, num_rounds) is None
    assert Hedge(discount=1.0).regret_bound(num_experts, num_rounds) is None
    assert Hedge(meta_step_size=0.2).regret_bound(num_experts, num_rounds) is None


@pytest.mark.parametrize("num_experts", [2, 3, 7])
@pytest.mark.parametrize("num_rounds", [10, 100, 1000])
def test_at_the_meta_step_size_of_the_theory_the_bound_is_a_small_part_of_what_could_be_lost(num_experts, num_rounds):
    best = math.sqrt(8 * math.log(num_experts) / num_rounds)
    bounds = [
        Hedge(best * f, discount=1.0, loss_range=2.0).regret_bound(num_experts, num_rounds) for f in (0.8, 1, 1.25)
    ]
    assert bounds[1] == pytest.approx(2.0 * math.sqrt(num_rounds * math.log(num_experts) / 2))
    assert bounds[1] == min(bounds)
    assert bounds[1] < 2.0 * num_rounds * 0.35


def test_a_bound_says_something_only_below_a_meta_step_size_of_8_and_after_enough_rounds():
    first = math.ceil(math.log(3) / (0.2 * (1 - 0.2 / 8)))
    told = [Hedge(0.2, discount=1.0).regret_bound(3, num_rounds) is not None for num_rounds in (first - 1, first)]
    assert told == [False, True]
    assert Hedge(7.9, discount=1.0).regret_bound(3, 10**6) is not None
    assert Hedge(8.0, discount=1.0).regret_bound(3, 10**6) is None


def swings(num_rounds, size):
    """Slopes for which two experts without memory of direction, a step size of 1 apart, lose by turns.

    After slopes that sum to G, such experts are G apart, and the next slope g parts their losses by g * G.
    """
    slopes, sum_of = [1.0], 1.0
    for t in range(1, num_rounds):
        slopes.append((size / 2 if t == 1 else size * (-1) ** t) / sum_of)
        sum_of += slopes[-1]
    return slopes


def suffered_in_swings(num_rounds, size, **hedge):
    """Losses of what played, of the experts, and the last report."""
    learner = make_learner("ensemble", 1.0, **EXACTLY, step_size_pool=(1.0, 2.0), loss_range=size, **hedge)
    state, suffered, experts_suffered = learner.init(at(0.0)), 0.0, [0.0, 0.0]
    for slope in swings(num_rounds, size):
        each = Linear(at(slope))
        suffered += each.evaluate(learner.played(state)).fresh_loss
        state = learner.update(each, state)
        losses = learner.report(state)["expert_losses"].values()
        experts_suffered = [a + b for a, b in zip(experts_suffered, losses, strict=True)]
    return suffered, experts_suffered, learner.report(state)


@pytest.mark.parametrize("num_rounds", [50, 400])
def test_on_a_convex_stream_that_swings_the_bound_holds_where_there_is_one_and_is_broken_at_the_shipped_settings(
    num_rounds,
):
    size = 0.1
    tuned = {"meta_step_size": math.sqrt(8 * math.log(2) / num_rounds), "discount": 1.0}
    suffered, experts, report = suffered_in_swings(num_rounds, size, **tuned)
    bound = report["regret_bound_per_round"] * num_rounds
    assert suffered - min(experts) <= bound + 1e-9
    assert bound == pytest.approx(size * math.sqrt(num_rounds * math.log(2) / 2))
    suffered, experts, report = suffered_in_swings(num_rounds, size)
    assert report["regret_bound_per_round"] is None
    assert suffered - min(experts) > 2 * bound


def test_with_an_expert_that_blew_up_no_bound_is_reported():
    learner = make_learner(
        "ensemble", 0.1, **EXACTLY, step_size_pool=(0.1, 5.0), meta_step_size=0.1, discount=1.0, loss_range=8.0
    )
    state = play(learner, learner.init(start_params()), [drifting(0)] * 25)
    assert learner.report(state)["regret_bound_per_round"] > 0
    state = play(learner, state, [drifting(0)] * 75)
    assert state.costs[1] == math.inf
    assert learner.report(state)["regret_bound_per_round"] is None


# Optimistic


def test_two_sequences_are_the_unrolled_rule(geometry):
    """w_next = w - 2 eta u + eta u_last, where u is the geometry's direction and u_last = 0 in round 0."""
    learner = make_learner("optimistic", 0.05, geometry, math.inf)
    state, w = learner.init(start_params()), start_params()
    last, memory = {name: torch.zeros_like(p) for name, p in w.items()}, learner.geometry.init(w)
    for each in map(drifting, range(40)):
        played = each.evaluate(learner.played(state))
        state = learner.update(each, state)
        u, memory = learner.geometry.direction(played.grads, played.total_loss, memory)
        w = {name: p - 2 * 0.05 * u[name] + 0.05 * last[name] for name, p in w.items()}
        last = u
        assert_close(learner.played(state), w, tolerance=1e-5)


def test_without_hints_it_is_online_gradient_bit_for_bit(geometry):
    """A domain never met has no hint, and here every round brings a new one."""
    optimistic = make_learner("optimistic", 0.05, geometry, hint_by_domain=True)
    plain = make_learner("online_gradient", 0.05, geometry)
    state, plain_state = optimistic.init(start_params()), plain.init(start_params())
    for round_ in range(20):
        each = Quadratic(drifting_goal(round_), domain=str(round_))
        state, plain_state = play(optimistic, state, [each]), play(plain, plain_state, [each])
        announced = optimistic.expect(str(round_ + 1), state)
        assert_equal(optimistic.played(announced), plain.played(plain_state))


def test_a_constant_gradient_moves_it_one_round_ahead_of_online_gradient_and_never_farther():
    """w_t = w_0 - eta (t + 1) g from round 1 on; momentum moves ten times as far."""
    steady_slope = Linear(at(1.0, -2.0))
    learner = make_learner("optimistic", 0.1, **EXACTLY)
    state = learner.init(at(0.0, 0.0))
    assert_equal(learner.played(state), at(0.0, 0.0))
    for t in range(1, 200):
        state = learner.update(steady_slope, state)
        assert_close(learner.played(state), at(-0.1 * (t + 1), 0.2 * (t + 1)))
    momentum = make_learner("momentum", 0.1, **EXACTLY, restart_every=0)
    far = play(momentum, momentum.init(at(0.0, 0.0)), [steady_slope] * 199)
    assert norm(momentum.played(far)) > 9 * norm(learner.played(state))


def test_the_hint_of_the_traffic_to_come_is_played():
    goals = {"code": at(1.0, 0.0), "prose": at(0.0, -1.0)}
    learner = make_learner("optimistic", 0.05, **EXACTLY, hint_by_domain=True)
    state, last = learner.init(at(0.0, 0.0)), {}
    for domain in ("code", "prose", "prose", "code", "prose", "code"):
        state = learner.expect(domain, state)
        hint = last.get(domain, at(0.0, 0.0))
        played = {name: p - 0.05 * hint[name] for name, p in state.point.masters.items()}
        assert_close(learner.played(state), played)
        each = Quadratic(goals[domain], domain)
        last[domain] = each.evaluate(learner.played(state)).grads
        state = learner.update(each, state)
    assert learner.played(learner.expect("a stranger", state)) is state.point.played


def test_on_traffic_that_alternates_only_hints_by_domain_come_near():
    goals = [at(1.0, 0.0), at(-1.0, 0.0)]
    shares = {}
    for by_domain in (False, True):
        learner = make_learner("optimistic", 0.05, **EXACTLY, hint_by_domain=by_domain)
        state, reports = learner.init(at(0.0, 0.0)), []
        for round_ in range(40):
            state = play(learner, state, [Quadratic(goals[round_ % 2], "ab"[round_ % 2])])
            reports.append(learner.report(state))
        shares[by_domain] = sum(r["hint_error"] for r in reports) / sum(r["gradient_norm"] for r in reports)
    assert shares[True] < 0.2
    assert shares[False] > 3  # a hint of the wrong sign is worse than none


def test_telemetry_tells_how_wrong_the_hint_was():
    """Squared norms; raw, whatever is clipped, and in the geometry, where a clipped gradient is what moves."""
    learner = make_learner("optimistic", 0.05, "euclidean", clip_norm=1.0)
    state = learner.init(at(0.0, 0.0))
    assert learner.report(state) == {}
    state = learner.update(Linear(at(3.0, 4.0)), state)
    first = {"hint_error": 25, "gradient_norm": 25, "direction_hint_error": 1, "direction_gradient_norm": 1}
    assert learner.report(state) == pytest.approx(first, rel=1e-5)
    state = learner.update(Linear(at(0.6, 0.0)), state)
    second = {"hint_error": 21.76, "gradient_norm": 0.36}
    second |= {"direction_hint_error": 0.64, "direction_gradient_norm": 0.36}
    assert learner.report(state) == pytest.approx(second, rel=1e-5)


def test_averaged_hints_keep_a_share_of_the_old():
    learner = make_learner("optimistic", 0.1, **EXACTLY, hint_decay=0.75)
    state, hint = learner.init(at(0.0)), None
    for slope in (1.0, -2.0, 0.5, 3.0, 0.0):
        state = learner.update(Linear(at(slope)), state)
        if hint is not None:
            assert learner.report(state)["hint_error"] == pytest.approx((hint - slope) ** 2)
        hint = slope if hint is None else 0.75 * hint + 0.25 * slope
        assert learner.played(state)["w"] == pytest.approx(float(state.point.masters["w"]) - 0.1 * hint)


# Ensembles

ENSEMBLES = ["ensemble", "surrogate_ensemble"]
BASES = [name for name in LEARNING if name not in ASKS_ELSEWHERE]


def plays(learner, state):
    return [expert.played(own) for expert, own in zip(learner.experts, state.experts, strict=True)]


@pytest.mark.parametrize(("meta_step_size", "expected"), [(0.2, (0.31, 0.19, 0.51)), (10.0, (0.0, 0.0, 1.0))])
def test_meta_weights_follow_what_the_experts_have_cost(meta_step_size, expected):
    hedge = Hedge(meta_step_size, discount=1.0, loss_range=1.0)
    costs = (0.0, 0.0, 0.0)
    assert hedge.weights(costs) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    for _ in range(50):
        costs = hedge.charged(costs, (1.00, 1.05, 0.95))
    assert hedge.weights(costs) == pytest.approx(expected, abs=0.006)


def test_a_cost_is_the_distance_from_the_rounds_best_in_loss_ranges_and_one_at_most():
    hedge = Hedge(discount=0.5, loss_range=2.0)
    assert hedge.charged((0.0, 1.0, 4.0, math.inf), (3.0, 4.0, 99.0, 3.0)) == (0.0, 1.0, 3.0, math.inf)
    assert hedge.charged((0.0, 0.0), (math.nan, -5.0)) == (math.inf, 0.0)


@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("pool", [(0.1,), (0.1, 0.4), (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)])
def test_a_pool_may_have_any_size_and_its_weights_stay_on_the_simplex(name, pool, geometry):
    learner = make_learner(name, 0.1, geometry, step_size_pool=pool, with_frozen=True)
    state = learner.init(start_params())
    for each in map(drifting, range(30)):
        assert len(state.meta_weights) == len(pool) + 1
        assert min(state.meta_weights) >= 0
        assert sum(state.meta_weights) == pytest.approx(1)
        assert_close(state.mean, averaged(plays(learner, state), state.meta_weights), tolerance=1e-6)
        state = learner.update(each, state)
    assert list(learner.report(state)["meta_weights"]) == [*(f"{size:.3g}" for size in pool), "frozen"]


@pytest.mark.parametrize("base", BASES)
def test_experts_learn_as_if_they_were_alone(base, geometry):
    learner = make_learner("ensemble", 0.05, geometry, 10.0, base=base, with_frozen=True)
    alone = [make_learner(base, 0.05 * factor, geometry, 10.0) for factor in (1 / 3, 1, 3)]
    state, alone_states = learner.init(start_params()), [one.init(start_params()) for one in alone]
    for each in map(drifting, range(30)):
        state = play(learner, state, [each])
        alone_states = [play(one, own, [each]) for one, own in zip(alone, alone_states, strict=True)]
        *learned, frozen = plays(learner, state)
        for params, one, own in zip(learned, alone, alone_states, strict=True):
            assert_equal(params, one.played(own))
        assert_equal(frozen, start_params())


@pytest.mark.parametrize("base", BASES)
def test_an_ensemble_of_one_is_its_expert_bit_for_bit(base, geometry):
    learner = make_learner("ensemble", 0.05, geometry, step_size_pool=(0.02,), base=base)
    alone = make_learner(base, 0.02, geometry)
    played, expected = (
        each.played(play(each, each.init(start_params()), map(drifting, range(20)))) for each in (learner, alone)
    )
    assert_equal(played, expected)


@pytest.mark.parametrize("base", ["online_gradient", "optimistic"])
def test_gradients_are_asked_for_at_each_learning_experts_own_weights(base):
    """And now and then the mean is scored, which none of them needs."""
    learner = make_learner("ensemble", 0.05, base=base, with_frozen=True, gap_every=3)
    state = learner.init(start_params())
    for number, each in enumerate(map(drifting, range(7))):
        *learned, frozen = plays(learner, state)
        mean, state = state.mean, learner.update(each, state)
        assert [id(params) for params in each.candidates] == [id(params) for params in learned]
        assert [id(params) for params in each.scored] == ([id(frozen)] if number % 3 else [id(frozen), id(mean)])


class Replayed(Quadratic):
    """A round with old rows beside the new ones: what is trained on has another loss than what just came."""

    def evaluate(self, params):
        evaluation = super().evaluate(params)
        return evaluation._replace(total_loss=-100 * evaluation.fresh_loss)


def test_experts_are_charged_for_what_they_would_have_served_before_they_learn_from_it():
    learner = make_learner("ensemble", 0.1, "euclidean", with_frozen=True)
    state = learner.init(start_params())
    for round_ in range(10):
        each = Replayed(drifting_goal(round_))
        losses = [each.evaluate(params).fresh_loss for params in plays(learner, state)]
        costs = learner.hedge.charged(state.costs, losses)
        state = learner.update(each, state)
        assert list(learner.report(state)["expert_losses"].values()) == losses
        assert state.costs == costs
        assert state.meta_weights == learner.hedge.weights(costs)


def test_the_meta_weights_return_to_the_start_where_learning_hurts():
    """The goal changes sides every round, so that what was learned is wrong when it is played."""
    learner = make_learner("ensemble", 1.0, **EXACTLY, with_frozen=True)
    state = learner.init(at(0.0, 0.0))
    for round_ in range(30):
        state = learner.update(Quadratic(at(1.0 - 2 * (round_ % 2), 0.0)), state)
    assert learner.report(state)["meta_weights"]["frozen"] > 0.99
    assert norm(learner.played(state)) < 0.01


class Cliff(Quadratic):
    """No loss can be had far from the goal."""

    def evaluate(self, params):
        evaluation = super().evaluate(params)
        lost = evaluation.fresh_loss > 1e6
        return evaluation._replace(fresh_loss=math.nan, total_loss=math.nan) if lost else evaluation


class Plateau(Quadratic):
    """Nothing loses more than 10: only the weights tell that something blew up."""

    def evaluate(self, params):
        evaluation = super().evaluate(params)
        loss = min(evaluation.fresh_loss, 10.0)
        return evaluation._replace(fresh_loss=loss, total_loss=loss)


@pytest.mark.parametrize("loss", [Quadratic, Cliff, Plateau])
@pytest.mark.parametrize("base", ["online_gradient", "optimistic"])
def test_an_expert_that_blows_up_is_out_for_good_and_the_rest_go_on(loss, base):
    learner = make_learner("ensemble", 0.1, **EXACTLY, step_size_pool=(0.1, 5.0), base=base)
    state = learner.init(start_params())
    for round_ in range(300):
        state = learner.update(loss(drifting_goal(round_)), state)
        assert is_finite(learner.played(state))
        assert is_finite(state.mean)
        assert math.isfinite(state.averaging_gap)
    assert state.costs[1] == math.inf
    assert state.meta_weights == (1.0, 0.0)
    last = loss(drifting_goal(300))
    state = learner.update(last, state)
    assert len(last.candidates) == 1
    assert largest_error(learner, state, drifting_goal(300)) < 0.25


def test_where_no_expert_is_left_nothing_finite_plays():
    """Whoever serves has to see it; there are no weights to go on with."""
    learner = make_learner("ensemble", 0.1, **EXACTLY, step_size_pool=(5.0, 6.0))
    state = play(learner, learner.init(start_params()), map(drifting, range(100)))
    assert state.costs == (math.inf, math.inf)
    assert not is_finite(learner.played(state))


def test_where_averaging_hurts_the_best_expert_plays_until_it_helps_again():
    learner = make_learner(
        "ensemble", 1.0, **EXACTLY, step_size_pool=(1.0,), with_frozen=True, meta_step_size=1e-3, gap_every=1
    )
    state = learner.update(Linear(at(-2.0)), learner.init(at(-1.0)))  # one expert goes to the other well
    gap, were_best = 0.0, []
    for each in [DoubleWell(at(1.0))] * 3 + [Quadratic(at(0.0))] * 12:
        experts = [each.evaluate(params).fresh_loss for params in plays(learner, state)]
        mean_loss = sum(w * loss for w, loss in zip(state.meta_weights, experts, strict=True))
        gap = 0.8 * gap + 0.2 * (each.evaluate(state.mean).fresh_loss - mean_loss)
        state = learner.update(each, state)
        report, best = learner.report(state), plays(learner, state)[state.meta_weights.index(max(state.meta_weights))]
        assert report["averaging_gap"] == pytest.approx(gap)
        assert report["is_best_played"] == (gap > 0)
        assert_equal(learner.played(state), best if gap > 0 else state.mean)
        were_best.append(report["is_best_played"])
    assert were_best[0]
    assert not were_best[-1]


@pytest.mark.parametrize("name", ENSEMBLES)
def test_where_averaging_changes_nothing_rounding_does_not_choose_what_plays(name):
    """In round 0 all experts are one; and a linear model never knows better. Up to the last bits, that is."""
    learner = make_learner(name, 0.1, "euclidean", meta_step_size=1e-6)
    state = learner.init(start_params())
    for each in [drifting(0)] + [drifting(1)] * (19 if name == "surrogate_ensemble" else 0):
        state = learner.update(each, state)
        assert not learner.report(state)["is_best_played"]


@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_a_surrogate_asks_for_one_gradient_and_charges_its_linear_model(num_experts):
    pool = tuple(0.05 * 2**i for i in range(num_experts))
    learner = make_learner("surrogate_ensemble", 0.1, "euclidean", 1e6, step_size_pool=pool, loss_range=100.0)
    state = learner.init(start_params())
    for each in map(drifting, range(10)):
        mean, before, own = state.mean, plays(learner, state), state.experts
        fresh_loss, grads = each.evaluate(mean).fresh_loss, each.evaluate(mean).grads
        state = learner.update(each, state)
        (asked,) = each.candidates
        assert asked is mean
        assert not each.scored
        expected = [fresh_loss + inner(grads, minus(params, mean)) for params in before]
        assert list(learner.report(state)["expert_losses"].values()) == pytest.approx(expected, rel=1e-5)
        for params, size, old in zip(plays(learner, state), pool, own, strict=True):
            assert_close(params, {n: p - size * grads[n] for n, p in old.point.masters.items()}, tolerance=1e-6)


class EnsembleByDomain(Ensemble):
    """Experts that mind whose traffic comes next."""

    @property
    def experts(self):
        return tuple(OptimisticGradient(size, hint_by_domain=True) for size in (0.01, 0.1))


def test_experts_are_told_whose_traffic_comes_next():
    learner = EnsembleByDomain(0.1)
    state = play(learner, learner.init(start_params()), map(drifting, range(5)))
    told = learner.expect("b", state)
    for expert, own, params in zip(learner.experts, state.experts, plays(learner, told), strict=True):
        assert_equal(params, expert.played(expert.expect("b", own)))
    assert_equal(learner.played(told), averaged(plays(learner, told), state.meta_weights))
    assert learner.expect("b", told) is told


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ensemble", {"step_size_pool": (0.1, 0.1)}, "twice"),
        ("ensemble", {"base": "momentun"}, "known: "),
        ("ensemble", {"meta_step_size": 0.0}, "meta_step_size is 0.0"),
        ("ensemble", {"discount": 1.1}, "discount is 1.1"),
        ("surrogate_ensemble", {"loss_range": -1.0}, "loss_range is -1.0"),
        ("optimistic", {"hint_decay": 1.0}, "hint_decay is 1.0"),
        ("momentum", {"momentum": 1.0}, "momentum is 1.0"),
        ("momentum", {"restart_every": -1}, "restart_every is -1"),
        ("reset_to_merged", {"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_learner(name, 0.1, **options)


# Momentum


@pytest.mark.parametrize("restart_every", [0, 1, 4])
def test_momentum_is_that_of_torch_step_for_step(restart_every):
    learner = make_learner("momentum", 0.05, **EXACTLY, restart_every=restart_every)
    state = learner.init(start_params())
    theirs = {name: p.clone().requires_grad_() for name, p in start_params().items()}
    for round_ in range(20):
        if round_ == 0 or (restart_every and round_ % restart_every == 0):
            sgd = torch.optim.SGD(theirs.values(), lr=0.05, momentum=0.9)
        for name, p in theirs.items():
            p.grad = p.detach() - drifting_goal(round_)[name]
        sgd.step()
        state = learner.update(drifting(round_), state)
        assert_close(learner.played(state), {name: p.detach() for name, p in theirs.items()}, tolerance=1e-6)


@pytest.mark.parametrize("restart_every", [1, 4, 16])
def test_over_whole_chunks_momentum_moves_like_online_gradient_at_its_effective_step(restart_every):
    momentum = make_learner("momentum", 0.1, **EXACTLY, restart_every=restart_every)
    control = make_learner("online_gradient", momentum.effective_step, **EXACTLY)
    slope = [Linear(at(1.0, -0.5))] * (3 * restart_every)
    played = [each.played(play(each, each.init(at(0.0, 0.0)), slope)) for each in (momentum, control)]
    assert_close(*played)


def test_momentum_that_never_restarts_moves_by_its_effective_step_in_the_long_run():
    momentum = make_learner("momentum", 0.1, **EXACTLY, restart_every=0)
    state = play(momentum, momentum.init(at(0.0)), [Linear(at(1.0))] * 300)
    after = momentum.update(Linear(at(1.0)), state)
    assert momentum.effective_step == pytest.approx(1.0)
    assert_close(minus(momentum.played(state), momentum.played(after)), at(momentum.effective_step))


def test_in_a_chunk_of_16_rounds_momentum_moves_about_five_times_as_far():
    assert make_learner("momentum", 1.0).effective_step == pytest.approx(MOVES_FARTHER["momentum"], abs=0.01)


def test_the_velocity_of_bfloat16_weights_is_not_rounded():
    start, slope = {"w": torch.ones(4, dtype=torch.bfloat16)}, Linear({"w": torch.full((4,), 0.3)})
    learner = make_learner("momentum", 1e-3, **EXACTLY, restart_every=0)
    state = play(learner, learner.init(start), [slope] * 100)
    torch.testing.assert_close(state.velocity["w"].float(), torch.full((4,), 3.0), rtol=3e-3, atol=0)


# Reset to merged


def test_shares_come_from_the_loss_after_the_step_and_all_start_again_at_the_merged_weights():
    learner = make_learner("reset_to_merged", 0.1, **EXACTLY, temperature=0.2)
    state, w = learner.init(at(0.0, 0.0)), at(0.0, 0.0)["w"]
    for round_ in range(10):
        goal = at(math.sin(round_), math.cos(round_))
        each = Quadratic(goal)
        state = learner.update(each, state)
        experts = torch.stack([w - size * (w - goal["w"]) for size in (0.1 / 3, 0.1, 0.3)])
        shares = torch.softmax(-((experts - goal["w"]) ** 2).sum(-1) / 2 / 0.2, 0)
        w = shares @ experts
        assert (len(each.candidates), len(each.scored)) == (1, 3)
        assert_close(learner.played(state), {"w": w})
        assert list(learner.report(state)["meta_weights"].values()) == pytest.approx(shares.tolist())


def test_shares_are_of_all_that_was_trained_on_and_leave_out_what_blew_up():
    learner = make_learner("reset_to_merged", 0.1, **EXACTLY, step_size_pool=(0.1, 2000.0))
    state = learner.update(Cliff(at(0.0)), learner.init(at(10.0)))
    assert learner.report(state)["meta_weights"] == {"0.1": 1.0, "2e+03": 0.0}
    assert_close(learner.played(state), at(9.0))
    state = learner.update(Replayed(at(0.0)), learner.init(at(10.0)))
    assert learner.report(state)["meta_weights"] == {"0.1": 0.0, "2e+03": 1.0}


def test_with_even_shares_it_moves_like_online_gradient_at_its_effective_step():
    merged = make_learner("reset_to_merged", 0.1, **EXACTLY, temperature=1e12)
    control = make_learner("online_gradient", merged.effective_step, **EXACTLY)
    played = [each.played(play(each, each.init(at(1.0)), [Quadratic(at(0.0))] * 9)) for each in (merged, control)]
    assert_close(*played)


# Geometries


@pytest.mark.parametrize("full_loss", [0.0, 3.0])
@pytest.mark.parametrize(("geometry", "betas"), [(Diagonal, (0.9, 0.99)), (Preconditioned, (0.0, 0.99))])
def test_the_diagonal_geometries_are_adams_step_for_step(geometry, betas, full_loss):
    """Preconditioned goes against the newest gradient alone, which is Adam without its first average. Below a loss of
    `full_loss` steps shorten in proportion."""
    learner = make_learner("online_gradient", 0.03, geometry(full_loss=full_loss), clip_norm=math.inf)
    state = learner.init(start_params())
    theirs = {name: p.clone().requires_grad_() for name, p in start_params().items()}
    adam, losses = torch.optim.Adam(theirs.values(), lr=0.03, betas=betas, eps=1e-8), []
    for round_ in range(50):
        losses.append(drifting(round_).evaluate(learner.played(state)).total_loss)
        state = learner.update(drifting(round_), state)
        for name, p in theirs.items():
            p.grad = p.detach() - drifting_goal(round_)[name]
        adam.param_groups[0]["lr"] = 0.03 * (min(1.0, losses[-1] / full_loss) if full_loss else 1.0)
        adam.step()
        assert_close(learner.played(state), {name: p.detach() for name, p in theirs.items()}, tolerance=1e-5)
    assert min(losses) < 3 < max(losses)


@pytest.mark.parametrize("loss", [-1.0, 0.0, math.nan])
def test_a_loss_that_has_nothing_left_to_fall_or_is_unknown_moves_nothing(loss):
    geometry, grads = Diagonal(full_loss=1.0), at(1.0, -2.0)
    direction, _ = geometry.direction(grads, loss, geometry.init(grads))
    assert_equal(direction, at(0.0, 0.0))


def test_the_euclidean_geometry_is_plain_gradient_descent():
    params, goal = start_params(), drifting_goal(0)
    learner = make_learner("online_gradient", step_size=0.1, **EXACTLY)
    played = learner.played(learner.update(Quadratic(goal), learner.init(params)))
    assert_close(played, {name: p - 0.1 * (p - goal[name]) for name, p in params.items()}, tolerance=1e-6)


@pytest.mark.parametrize(("name", "bound"), [("online_gradient", 0.5), ("optimistic", 1.0), ("momentum", 0.5)])
def test_gradients_are_clipped_before_they_move_anything(name, bound):
    """Optimistic plays a step and a look-ahead."""
    learner = make_learner(name, step_size=1.0, geometry="euclidean", clip_norm=0.5)
    params = start_params()
    far = {name: p + 1000 for name, p in params.items()}
    played = learner.played(learner.update(Quadratic(far), learner.init(params)))
    assert norm(minus(played, params)) == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.1, 5.0, 13.0, 100.0])
def test_clipping_keeps_the_direction_and_bounds_the_joint_norm(max_norm):
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}  # norm 13
    clipped = clip_by_norm(grads, max_norm)
    scale = min(1.0, max_norm / 13)
    for name, g in grads.items():
        torch.testing.assert_close(clipped[name], g * scale)
    if max_norm >= 13:
        assert_equal(clipped, grads)


def test_clipping_a_gradient_of_zero_gives_zero():
    grads = {"a": torch.zeros(3)}
    assert_equal(clip_by_norm(grads, 1.0), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_point_that_moves_leaves_the_old_one_alone(dtype):
    params = start_params(dtype)
    old = Point.at(params)
    moved = old.moved(start_params(dtype), 0.5)
    assert_equal(params, start_params(dtype))
    assert_equal(old.played, start_params(dtype))
    assert_close(moved.masters, {name: p.float() / 2 for name, p in params.items()})
    assert all(moved.played[name].dtype == dtype for name in params)


def test_the_mean_of_equal_points_is_that_point_bit_for_bit():
    assert_equal(averaged([start_params()] * 3, (1 / 3,) * 3), start_params())
    assert_equal(averaged([start_params()] * 7, (1 / 7,) * 7), start_params())


def test_a_point_without_weight_is_left_out_of_the_mean_whatever_it_holds():
    lost = {name: torch.full_like(p, math.nan) for name, p in start_params().items()}
    assert_equal(averaged([lost, start_params(), lost], (0.0, 1.0, 0.0)), start_params())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_what_holds_a_nan_or_an_infinity_is_not_finite(dtype):
    """However large: half a million ones sum to more than float16 can hold."""
    ones = torch.ones(500_000, dtype=dtype)
    assert is_finite({"a": ones})
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite({"a": ones, "b": torch.tensor([1.0, bad], dtype=dtype)})
    assert not is_finite({"a": torch.tensor([math.inf, -math.inf], dtype=dtype)})


# Names


@pytest.mark.parametrize("arguments", [("momentun", 1e-3, "diagonal"), ("frozen", 1e-3, "diagnoal")])
def test_an_unknown_name_is_answered_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match="known: ") as raised:
        make_learner(*arguments)
    known = LEARNERS if arguments[0] not in LEARNERS else GEOMETRIES
    assert all(name in str(raised.value) for name in known)


def test_a_learner_of_another_package_is_found_by_its_path(name):
    assert type(make_learner(LEARNERS[name], 1e-3)) is type(make_learner(name, 1e-3))
