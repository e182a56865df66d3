import math
import re
from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch

from onlinespec.learners import Euclidean, Evaluation
from onlinespec.learners.geometry import Diagonal, Preconditioned
from onlinespec.learning.learner_spec import learner_of, parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.registry import LEARNER_NAMES, LEARNERS, NONE, PRESETS, resolve

LINES = [*LEARNERS, *PRESETS]

SHARED = {  # a line of text for each setting that every learner has, and what it means
    "step_size": ("3e-4", 3e-4),
    "geometry": ("euclidean", "euclidean"),
    "clip_norm": ("inf", math.inf),
    "full_loss": ("0.5", 0.5),
    "loss": ("jsd", "jsd"),
    "rows": ("rejected", "rejected"),
    "min_interval": ("8", 8),
    "max_interval": ("400", 400),
    "requests_per_round": ("8", 8),
    "least_gain": ("0.5", 0.5),
    "max_rows": ("32", 32),
    "replay_every": ("0", 0),
    "replay_megabytes": ("0.5", 0.5),
    "replay_minutes": ("30", 30.0),
    "budget": ("inf", math.inf),
    "round_cost": ("2", 2.0),
    "row_cost": ("0.1", 0.1),
    "telemetry": ("true", True),
}
OWN = {
    "frozen": {},
    "online_gradient": {},
    "optimistic": {"hint_decay": ("0.5", 0.5), "hint_by_domain": ("true", True)},
    "ensemble": {
        "step_size_pool": ("3e-4:1e-3:3e-3", (3e-4, 1e-3, 3e-3)),
        "base": ("optimistic", "optimistic"),
        "with_frozen": ("true", True),
        "meta_step_size": ("5", 5.0),
        "discount": ("1", 1.0),
        "loss_range": ("0.5", 0.5),
        "gap_every": ("1", 1),
    },
    "momentum": {"momentum": ("0.5", 0.5), "restart_every": ("0", 0)},
    "reset_to_merged": {"step_size_pool": ("1e-3", (1e-3,)), "temperature": ("0.2", 0.2)},
}
OWN["surrogate_ensemble"] = OWN["ensemble"]


def line(name, settings):
    return "/".join([name, *(f"{key}={text}" for key, (text, _) in settings.items())])


# What a line stands for


@pytest.mark.parametrize("name", LINES)
def test_every_name_alone_is_a_line_that_makes_a_learner(name):
    config = parse_learner(name)
    assert type(learner_of(config)) is resolve(LEARNERS, config.learner, "learner")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learners_name_alone_changes_nothing_else(name):
    assert parse_learner(name) == LearnConfig(learner=name)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("key", [field.name for field in fields(LearnConfig) if field.name in SHARED])
def test_every_learner_has_every_shared_setting(name, key):
    text, value = SHARED[key]
    changed = parse_learner(f"{name}/{key}={text}")
    assert changed == replace(parse_learner(name), **{key: value})
    assert type(getattr(changed, key)) is type(value)


def test_every_setting_of_learning_has_a_line_above():
    assert set(SHARED) == {field.name for field in fields(LearnConfig)} - {"learner", "options"}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learners_own_settings_reach_it_with_their_types(name):
    config = parse_learner(line(name, OWN[name]))
    values = {key: value for key, (_, value) in OWN[name].items()}
    assert config == LearnConfig(learner=name, options=values)
    learner = learner_of(config)
    for key, value in values.items():
        assert getattr(learner, key) == value
        assert type(getattr(learner, key)) is type(value)


@pytest.mark.parametrize("name", LEARNERS)
def test_all_that_a_learner_is_made_from_can_be_said(name):
    own = {field.name for field in fields(resolve(LEARNERS, name, "learner"))}
    assert set(OWN[name]) == own - {"step_size", "geometry", "clip_norm"}


@pytest.mark.parametrize("name", LEARNERS)
def test_step_size_geometry_and_clip_norm_reach_the_learner(name):
    learner = learner_of(parse_learner(f"{name}/step_size=3e-4/geometry=euclidean/clip_norm=0.5"))
    assert (learner.step_size, learner.geometry, learner.clip_norm) == (3e-4, Euclidean(), 0.5)


@pytest.mark.parametrize("geometry", [Diagonal, Preconditioned])
def test_where_steps_shorten_reaches_the_geometries_that_can(geometry):
    line = f"optimistic/geometry={geometry.__name__.lower()}/full_loss=0.5"
    assert learner_of(parse_learner(line)).geometry == geometry(full_loss=0.5)


@pytest.mark.parametrize(
    ("loss", "full_loss"), [("auto", 4), ("soft_cross_entropy", 4), ("jsd", 0), ("total_variation", 0)]
)
def test_steps_shorten_by_themselves_only_with_losses_that_are_cross_entropies(loss, full_loss):
    assert learner_of(parse_learner(f"optimistic/loss={loss}")).geometry == Preconditioned(full_loss=full_loss)
    assert learner_of(parse_learner(f"optimistic/loss={loss}/full_loss=2")).geometry == Preconditioned(full_loss=2)


@pytest.mark.parametrize("name", ["Unannotated", "part"])
def test_a_geometry_of_others_gets_where_steps_shorten_if_it_takes_that(tmp_path, monkeypatch, name):
    (tmp_path / "geometries_of_others.py").write_text(
        "from functools import partial\n"
        "from onlinespec.learners.geometry import Diagonal\n"
        "part = partial(Diagonal, second_decay=0.5)\n"
        "class Unannotated(Diagonal):\n"
        "    def __init__(self, full_loss=0.0):\n"
        "        super().__init__(second_decay=0.5, full_loss=full_loss)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    geometry = learner_of(parse_learner(f"optimistic/geometry=geometries_of_others:{name}/full_loss=3")).geometry
    assert (geometry.second_decay, geometry.full_loss) == (0.5, 3)


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_yes_and_no_are_written_as_true_and_false_or_digits(text, value):
    assert parse_learner(f"online_gradient/telemetry={text}").telemetry is value


@pytest.mark.parametrize("order", list(permutations(["min_interval=400", "max_interval=500", "step_size=0.5"])))
def test_settings_come_in_any_order(order):
    config = parse_learner("/".join(["online_gradient", *order]))
    assert (config.min_interval, config.max_interval, config.step_size) == (400, 500, 0.5)


def test_the_last_word_counts():
    assert parse_learner("optimistic/step_size=1/step_size=2/hint_decay=0/hint_decay=0.5") == LearnConfig(
        learner="optimistic", step_size=2.0, options={"hint_decay": 0.5}
    )


# Defaults


def test_what_a_line_does_not_name_is_as_in_the_defaults():
    defaults = LearnConfig(step_size=0.25, loss="jsd", max_rows=7, telemetry=True)
    config = parse_learner("optimistic/max_rows=9/hint_decay=0.5", defaults)
    assert config == replace(defaults, learner="optimistic", max_rows=9, options={"hint_decay": 0.5})


def test_defaults_keep_their_own_settings_for_the_same_learner_only():
    defaults = parse_learner("optimistic/hint_decay=0.5")
    assert learner_of(parse_learner("optimistic/hint_by_domain=true", defaults)).hint_decay == 0.5
    assert parse_learner("frozen", defaults) == LearnConfig(learner="frozen")
    assert defaults.options == {"hint_decay": 0.5}


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_itself_a_line(name):
    assert parse_learner(PRESETS[name]) == parse_learner(name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_more_than_the_defaults(name):
    defaults = LearnConfig(step_size=0.25, loss="jsd", budget=0.5, row_cost=0.7)
    config = parse_learner(name, defaults)
    assert config.step_size == parse_learner(name).step_size
    assert config.row_cost == 0.7  # which it does not name


def test_a_preset_can_be_changed_further():
    config = parse_learner("osd/rows=all/step_size=3e-4")
    assert config == replace(parse_learner("osd"), rows="all", step_size=3e-4)


def test_no_preset_hides_a_learner():
    assert not set(PRESETS) & set(LEARNERS)


def test_osd_is_what_the_paper_does():
    config = parse_learner("osd")
    assert (config.learner, config.loss, config.rows) == ("online_gradient", "soft_cross_entropy", "rejected")
    assert (config.requests_per_round, config.replay_every) == (8, 0)
    assert (config.step_size, config.geometry, config.max_rows) == (1e-4, "diagonal", 1_000_000)
    assert math.isinf(config.clip_norm)
    assert config.full_loss == 0
    assert math.isinf(config.budget)


# Names


def test_every_name_is_in_the_one_list_once():
    assert sorted(LEARNER_NAMES) == sorted({NONE, *LEARNERS, *PRESETS})


def test_plain_decoding_has_no_settings_and_says_so():
    with pytest.raises(ValueError, match='"none" is plain decoding'):
        parse_learner("none")


# What is kept of a learner


def rounds_of(learner, count=6):
    """The state after some rounds towards a goal that moves."""
    state = learner.init({"w": torch.zeros(4)})
    for i in range(count):
        goal = torch.full((4,), math.sin(i))

        def evaluate(*candidates, scored=(), goal=goal):
            losses = [float((params["w"] - goal).square().sum()) / 2 for params in (*candidates, *scored)]
            grads = [{"w": params["w"] - goal} for params in candidates] + [{}] * len(scored)
            return [Evaluation(loss, loss, grad) for loss, grad in zip(losses, grads, strict=True)]

        state = learner.update(evaluate, state)
    return state


@pytest.mark.parametrize("name", sorted(set(LINES) - {"optimistic"}))
def test_what_plays_is_what_is_kept_by_a_learner_without_a_look_ahead(name):
    learner = learner_of(parse_learner(name))
    state = rounds_of(learner)
    assert learner.settled(state) is learner.played(state)


def test_what_is_kept_of_an_optimistic_learner_is_what_it_learned_and_not_its_look_ahead():
    learner = learner_of(parse_learner("optimistic/step_size=0.1"))
    state = rounds_of(learner)
    assert learner.settled(state) is state.point.played
    assert not torch.equal(learner.settled(state)["w"], learner.played(state)["w"])
    assert learner.settled(learner.init({"w": torch.ones(4)}))["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("is_best_played", [False, True])
def test_what_is_kept_of_an_ensemble_is_made_of_what_its_experts_keep(is_best_played):
    learner = learner_of(parse_learner("ensemble/base=optimistic/step_size=0.1"))
    state = rounds_of(learner)
    if is_best_played:
        best = state.meta_weights.index(max(state.meta_weights))
        state = state._replace(best=best)
        expected = state.experts[best].point.played["w"]
    else:
        state = state._replace(best=None)
        expected = sum(w * own.point.played["w"] for w, own in zip(state.meta_weights, state.experts, strict=True))
    assert torch.allclose(learner.settled(state)["w"], expected)
    assert not torch.allclose(learner.played(state)["w"], expected)


# Learners of others

THEIRS = """
from __future__ import annotations

from dataclasses import dataclass

from onlinespec.learners import Learner
from onlinespec.learners.online_gradient import OnlineGradient


@dataclass(frozen=True)
class Boosted(OnlineGradient):
    boost: float = 1.0
    pool: tuple[int, ...] = ()


def make(step_size: float, geometry: object, clip_norm: float, boost: float = 1.0) -> Boosted:
    return Boosted(step_size, geometry, clip_norm, boost)


class Plain(Learner):
    def __init__(self, step_size, geometry, clip_norm, boost: float = 1.0):
        self.step_size, self.boost = step_size, boost
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "learners_of_others.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    return "learners_of_others"


@pytest.mark.parametrize("name", ["Boosted", "make", "Plain"])
def test_a_learner_from_elsewhere_takes_settings_like_ours(theirs, name):
    learner = learner_of(parse_learner(f"{theirs}:{name}/step_size=0.5/boost=2"))
    assert (learner.step_size, learner.boost) == (0.5, 2.0)


def test_a_learner_that_extends_ours_has_its_settings_too(theirs):
    config = parse_learner(f"{theirs}:Boosted/pool=1:2/clip_norm=inf")
    assert config.learner == f"{theirs}:Boosted"
    assert (learner_of(config).pool, type(learner_of(config).geometry)) == ((1, 2), Preconditioned)


# What is refused


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("optimistic/hint=0.5", ['"hint=0.5"', "of optimistic", "hint_decay", "step_size"]),
        ("online_gradient/hint_decay=0.5", ['"hint_decay=0.5"', "of online_gradient", "step_size"]),
        ("osd/hint_decay=0.5", ['"hint_decay=0.5" in "osd/', "of online_gradient", "step_size"]),
        ("ensemble/with_frozen", ['"with_frozen"', "of ensemble", "NAME=VALUE", "with_frozen"]),
        ("ensemble/", ['"" in "ensemble/"', "NAME=VALUE"]),
        ("ensemble/learner=frozen", ['"learner=frozen"', "of ensemble"]),
        ("ensemble/options=1", ['"options=1"', "of ensemble"]),
        ("ensembel/step_size=1", ['unknown learner "ensembel"', *LEARNERS]),
        ("", ['unknown learner ""', *LEARNERS]),
        ("no_such.module:Class", ["no_such.module:Class", "no module named"]),
    ],
)
def test_a_name_that_is_not_known_is_answered_with_the_known_ones(method, named):
    with pytest.raises(ValueError, match=r"known|no module") as raised:
        parse_learner(method)
    for part in named:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("step_size=large", '"large" is not a number'),
        ("step_size=", '"" is not a number'),
        ("full_loss=much", '"much" is not a number'),
        ("max_rows=1.5", '"1.5" is not a whole number'),
        ("telemetry=perhaps", '"perhaps" is not true or false'),
        ("step_size_pool=1e-3:x", "\"1e-3:x\" is not a number, or several joined by ':'"),
        ("step_size_pool=", "\"\" is not a number, or several joined by ':'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_is_meant(setting, words):
    with pytest.raises(ValueError, match=re.escape(f"{setting}: {words}") + "$"):
        parse_learner(f"ensemble/{setting}")


@pytest.mark.parametrize(
    "method",
    [
        "online_gradient/step_size=-1",
        "online_gradient/step_size=nan",
        "online_gradient/budget=0",
        "online_gradient/budget=nan",
        "online_gradient/rows=some",
        "online_gradient/min_interval=0",
        "online_gradient/min_interval=300",
        "osd/replay_every=-1",
        "optimistic/hint_decay=1",
        "momentum/momentum=1",
        "momentum/restart_every=-1",
        "ensemble/discount=1.5",
        "ensemble/meta_step_size=0",
        "ensemble/step_size_pool=1:1",
        "reset_to_merged/temperature=0",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(method):
    name = method.partition("/")[2].partition("=")[0]
    with pytest.raises(ValueError, match=rf"{name}.* "):
        learner_of(parse_learner(method))


@pytest.mark.parametrize("method", ["ensemble/base=ensembel", "optimistic/geometry=round"])
def test_a_name_inside_a_setting_is_answered_with_the_known_ones(method):
    with pytest.raises(ValueError, match=r"unknown .*; known: "):
        learner_of(parse_learner(method))
