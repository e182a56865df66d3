"""What every learner of the table keeps, in every geometry: a new line in `LEARNERS` is tested by being there."""

import io
import math

import pytest
import torch

from onlinespec.learners import GEOMETRIES, LEARNERS, Diagonal, Evaluation, make_learner
from onlinespec.learners.geometry import clip_by_norm, descend

DOES_NOT_LEARN = {"frozen": "the control: it tracks nothing, on purpose"}
LEARNING = [name for name in LEARNERS if name not in DOES_NOT_LEARN]


@pytest.fixture(params=LEARNERS)
def name(request):
    return request.param


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    return request.param


@pytest.fixture
def learner(name, geometry):
    return make_learner(name, step_size=0.05, geometry=geometry, clip_norm=10.0)


def start_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 2, generator=generator).to(dtype), "b": torch.randn(4, generator=generator).to(dtype)}


def copy(params):
    return {name: p.clone() for name, p in params.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Quadratic:
    """The squared distance to a goal: f(w) = |w - goal|^2 / 2."""

    def __init__(self, goal):
        self.goal = goal
        self.asked = 0

    def __call__(self, *candidates):
        self.asked += len(candidates)
        return [self.evaluate(params) for params in candidates]

    def evaluate(self, params):
        grads = {name: (p - self.goal[name]).to(p.dtype) for name, p in params.items()}
        loss = sum(float((g.double() ** 2).sum()) for g in grads.values()) / 2
        return Evaluation(loss, loss, grads)


def drifting_goal(round_):
    return {"a": torch.full((3, 2), math.sin(round_ / 100)), "b": torch.full((4,), math.cos(round_ / 100))}


def run(learner, state, rounds):
    for round_ in rounds:
        state = learner.update(Quadratic(drifting_goal(round_)), state)
    return state


# The contract


def test_round_0_plays_the_start_bit_for_bit(learner):
    assert_equal(learner.played(learner.init(start_params())), start_params())


def test_a_gradient_of_zero_moves_nothing(learner):
    params = start_params()
    state = learner.init(params)
    for _ in range(5):
        state = learner.update(Quadratic(copy(params)), state)
    assert_equal(learner.played(state), params)


@pytest.mark.parametrize("name", LEARNING)
def test_a_moving_goal_is_tracked(learner):
    state = run(learner, learner.init(start_params()), range(400))
    goal = drifting_goal(400)
    error = max(float((p - goal[name]).abs().max()) for name, p in learner.played(state).items())
    assert error < 0.25


@pytest.mark.parametrize("name", DOES_NOT_LEARN)
def test_a_control_never_moves_and_asks_for_no_gradient(learner):
    quadratic = Quadratic(drifting_goal(0))
    state = learner.init(start_params())
    for _ in range(3):
        state = learner.update(quadratic, state)
    assert_equal(learner.played(state), start_params())
    assert quadratic.asked == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_keeps_its_dtype_and_shape(learner, dtype):
    played = learner.played(run(learner, learner.init(start_params(dtype)), range(3)))
    for name, p in start_params(dtype).items():
        assert (played[name].dtype, played[name].shape) == (p.dtype, p.shape)


def test_an_update_changes_neither_the_old_state_nor_the_given_weights(learner):
    params = start_params()
    state = run(learner, learner.init(params), range(3))
    before = copy(learner.played(state))
    once, again = (learner.update(Quadratic(drifting_goal(3)), state) for _ in range(2))
    assert_equal(params, start_params())
    assert_equal(learner.played(state), before)
    assert_equal(learner.played(once), learner.played(again))


def test_the_gradients_of_a_round_are_left_alone(learner):
    quadratic = Quadratic(drifting_goal(0))
    given = []

    def evaluate(*candidates):
        given.extend(quadratic(*candidates))
        return given

    learner.update(evaluate, learner.init(start_params()))
    for evaluation in given:
        assert_equal(evaluation.grads, quadratic.evaluate(start_params()).grads)


def test_a_state_saved_in_mid_stream_has_the_same_future(learner):
    state = run(learner, learner.init(start_params()), range(7))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    futures = [learner.played(run(learner, s, range(7, 20))) for s in (state, restored)]
    assert_equal(*futures)


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("num_rounds", [10, 100, 1000])
def test_regret_stays_under_its_bound_on_a_convex_stream(name, num_rounds):
    """f_t(w) = |w - z_t| with z_t on a line of length D: convex, gradients of norm G = 1, comparator in hindsight."""
    diameter, generator = 2.0, torch.Generator().manual_seed(1)
    goals = (torch.rand(num_rounds, generator=generator) < 0.7).float() * diameter - 1  # -1 or 1
    learner = make_learner(name, step_size=diameter / math.sqrt(num_rounds), geometry="euclidean", clip_norm=1.0)
    state, suffered = learner.init({"w": torch.tensor([-1.0])}), 0.0

    def evaluate(goal, *candidates):
        return [
            Evaluation(float((c["w"] - goal).abs()), float((c["w"] - goal).abs()), {"w": (c["w"] - goal).sign()})
            for c in candidates
        ]

    for goal in goals:
        suffered += float((learner.played(state)["w"] - goal).abs())
        state = learner.update(lambda *candidates, goal=goal: evaluate(goal, *candidates), state)
    best = min(float((w - goals).abs().sum()) for w in (-1.0, 1.0))  # a sum of such functions is least at a goal
    assert suffered - best <= diameter * math.sqrt(num_rounds)


# Geometries


def test_the_diagonal_geometry_is_adams_step_for_step():
    params = start_params()
    learner = make_learner("online_gradient", step_size=0.03, geometry="diagonal", clip_norm=math.inf)
    state = learner.init(params)
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    diagonal = Diagonal()
    adam = torch.optim.Adam(
        theirs.values(), lr=0.03, betas=(diagonal.first_decay, diagonal.second_decay), eps=diagonal.epsilon
    )
    for round_ in range(50):
        state = learner.update(Quadratic(drifting_goal(round_)), state)
        goal = drifting_goal(round_)
        for name, p in theirs.items():
            p.grad = p.detach() - goal[name]
        adam.step()
        for name, p in learner.played(state).items():
            torch.testing.assert_close(p, theirs[name].detach(), atol=1e-5, rtol=1e-5)


def test_the_euclidean_geometry_is_plain_gradient_descent():
    params, goal = start_params(), drifting_goal(0)
    learner = make_learner("online_gradient", step_size=0.1, geometry="euclidean", clip_norm=math.inf)
    played = learner.played(learner.update(Quadratic(goal), learner.init(params)))
    for name, p in params.items():
        torch.testing.assert_close(played[name], p - 0.1 * (p - goal[name]))


def test_gradients_are_clipped_before_they_move_anything():
    learner = make_learner("online_gradient", step_size=1.0, geometry="euclidean", clip_norm=0.5)
    params = start_params()
    far = {name: p + 1000 for name, p in params.items()}
    played = learner.played(learner.update(Quadratic(far), learner.init(params)))
    moved = torch.cat([(played[name] - p).flatten() for name, p in params.items()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


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


def test_descending_leaves_the_given_weights_alone():
    params = start_params()
    descend(params, start_params(), 1.0)
    assert_equal(params, start_params())


# Names


@pytest.mark.parametrize("arguments", [("momentun", 1e-3, "diagonal"), ("frozen", 1e-3, "diagnoal")])
def test_an_unknown_name_is_answered_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match="known: ") as raised:
        make_learner(*arguments)
    known = LEARNERS if arguments[0] not in LEARNERS else GEOMETRIES
    assert all(name in str(raised.value) for name in known)


def test_a_learner_of_another_package_is_found_by_its_path(name):
    assert type(make_learner(LEARNERS[name], 1e-3)) is type(make_learner(name, 1e-3))
