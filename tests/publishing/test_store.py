"""Versions on disk: whole or not at all, whatever happens while they are written."""

import errno
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import rigs
import torch
from rigs import other_weights
from safetensors.torch import load_file, save_file

from onlinespec.cli.commands import Inspect
from onlinespec.cli.inspect import inspect
from onlinespec.cli.terminal import out
from onlinespec.config import GenerationParams
from onlinespec.core import DrafterWeights
from onlinespec.drafters import checkpoints
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners import Evaluation, make_learner
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.update import InlineLearning
from onlinespec.offline.inspection import describe, history_of
from onlinespec.publishing import store as versions
from onlinespec.publishing.gate import Publisher
from onlinespec.publishing.protocol import Event, Paired
from onlinespec.publishing.settings import PublishConfig
from onlinespec.publishing.state_io import flattened, rebuilt
from onlinespec.publishing.store import FolderLocked, NotSaved, Versions
from onlinespec.registry import DRAFTERS, GEOMETRIES, LEARNERS

TARGET = rigs.random_target()
NAME = TARGET.fingerprint
PAIRED = Paired(
    num_requests=16, num_anchors=640, served_length=2.0, other_length=2.25, served_acceptance_prob=0.6,
    other_acceptance_prob=0.7, difference=0.25, standard_error=0.05, level=0.025, is_other_better=True,
    is_served_better=False,
)  # fmt: skip


def happened(kind, version, parent=None, restores=None):
    return Event(
        kind=kind, at="2026-01-02T03:04:05+00:00", version=version, parent=parent, restores=restores, paired=PAIRED
    )


@pytest.fixture(scope="module")
def drafter():
    return Eagle.fresh(TARGET)


def weights_of(drafter, number):
    return DrafterWeights(other_weights(drafter.weights, number).params, number)


def save(store, drafter, number, event=None, fingerprint=NAME, **more):
    event = event or happened("promoted", number, number - 1)
    return store.save(drafter, weights_of(drafter, number), event, fingerprint, **more)


def filled(folder, drafter, numbers, **options):
    store = Versions(folder, **options)
    for number in numbers:
        save(store, drafter, number)
    return store


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# A learner's state


def rounds(numbers):
    """Losses that pull towards a goal which moves, and traffic of two domains."""

    def round_(i):
        goal = {"a": torch.full((3, 2), math.sin(i)), "b": torch.full((4,), math.cos(i))}

        def evaluate(*candidates, scored=()):
            def one(params):
                loss = sum(float((p - goal[name]).square().sum()) / 2 for name, p in params.items())
                return Evaluation(loss, loss, {n: (p - goal[n]).to(p.dtype) for n, p in params.items()}, "ab"[i % 2])

            return [one(params) for params in (*candidates, *scored)]

        return evaluate, "ab"[i % 2]

    return map(round_, numbers)


def play(learner, state, numbers):
    for evaluate, domain in rounds(numbers):
        state = learner.update(evaluate, learner.expect(domain, state))
    return state


def folder_of(kept, version):
    return kept / "versions" / f"{version.version:06d}"


def tensors_of(state):
    """Which tensors of a state are one and the same, in order: those are saved once."""
    if isinstance(state, torch.Tensor):
        return [id(state)]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple | list) else ()
    return [place for part in parts for place in tensors_of(part)]


def sharing(state):
    found = tensors_of(state)
    return [found.index(one) for one in found]


def through_files(state, folder):
    tensors, tree = flattened(state)
    save_file(tensors, folder / "state.safetensors")
    return rebuilt(load_file(folder / "state.safetensors"), json.loads(json.dumps(tree, allow_nan=False)))


VARIANTS = {name: (name, {}) for name in LEARNERS} | {
    "by_domain": ("optimistic", {"hint_by_domain": True}),
    "of_optimistic": ("ensemble", {"base": "optimistic", "with_frozen": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_rounds", [pytest.param(0, marks=pytest.mark.full), 7])
def test_a_state_that_was_saved_has_the_same_future_bit_for_bit(variant, geometry, dtype, num_rounds, tmp_path):
    name, options = VARIANTS[variant]
    learner = make_learner(name, 0.03, geometry, **options)
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(dims, generator=generator).to(dtype) for name, dims in (("a", (3, 2)), ("b", (4,)))}
    state = play(learner, learner.init(params), range(num_rounds))
    loaded = through_files(state, tmp_path)
    assert type(loaded) is type(state)
    assert sharing(loaded) == sharing(state)
    assert_equal(learner.played(loaded), learner.played(state))
    futures = [play(learner, each, range(7, 20)) for each in (state, loaded)]
    assert_equal(*map(learner.played, futures))
    assert str(learner.report(futures[0])) == str(learner.report(futures[1]))
    assert_equal(*map(learner.settled, futures))


@pytest.mark.parametrize(
    "part", [{3: "x"}, pytest.param(object(), id="object"), {1, 2}, 1j], ids=lambda part: type(part).__name__
)
def test_a_state_of_what_cannot_be_saved_is_refused_by_type(part):
    with pytest.raises(ValueError, match=f"holds a {type(part).__name__}, which can't be saved"):
        flattened((1, [part]))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "can't hold {}"),
        ({"tuple": 5}, "no description of a state"),
        ({"tensor": "9"}, "no description of a state"),
        ({"dict": [1, 2]}, "no description of a state"),
        ([["value", 3]], "saved by another version"),
        ({"code": "print"}, "can't hold {'code'"),
        ({"named": "antigravity:fly", "fields": {}}, "whose module is not loaded"),
        ({"named": "os:system", "fields": {"command": "true"}}, "os:system with .*, which has"),
        ({"tuple": [{"named": "onlinespec.learners.geometry:Point", "fields": {"x": 1}}]}, r"with \['x'\], which has"),
    ],
)
def test_a_description_that_is_none_is_refused_and_runs_no_code(tree, words):
    with pytest.raises(ValueError, match=words):
        rebuilt({}, tree)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {"rows": whole[1:], "columns": whole.T, "again": whole}
    loaded = through_files(state, tmp_path)
    assert_equal(loaded, state)


# A version


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_version_is_a_drafter_in_its_published_format(name, tmp_path):
    drafter = load_drafter(name, TARGET)
    weights = weights_of(drafter, 3)
    version = Versions(tmp_path).save(drafter, weights, happened("promoted", 3, 0), NAME)
    assert folder_of(tmp_path, version) == tmp_path / "versions" / "000003"
    loaded = load_drafter(folder_of(tmp_path, version), TARGET)
    Versions(tmp_path).resume(version, loaded)
    assert loaded.weights.version == (3 if loaded.is_trainable else 0)
    assert_equal(loaded.weights.params, weights.params)
    assert drafter.weights.version == 0  # it goes on as it was


def test_weights_come_back_exactly_whatever_dtype_they_are_published_in(tmp_path, drafter):
    published = Eagle(TARGET, drafter.config, drafter.weights.params, dtype=torch.bfloat16)
    version = save(Versions(tmp_path), published, 1)
    loaded = load_drafter(folder_of(tmp_path, version), TARGET)
    exact = weights_of(drafter, 1).params
    assert not torch.equal(loaded.weights.params["fc.weight"], exact["fc.weight"])
    Versions(tmp_path).resume(version, loaded)
    assert_equal(loaded.weights.params, exact)
    assert_equal(Versions(tmp_path).weights(version.version).params, exact)
    assert loaded.weights.version == 1


def test_what_played_when_it_was_saved_plays_when_it_is_loaded(tmp_path, drafter):
    learner = make_learner("ensemble", 1e-3)
    state = learner.init(drafter.weights.params)
    version = Versions(tmp_path).save(
        drafter, DrafterWeights(learner.played(state), 0), happened("started", 0), NAME, "ensemble", state
    )
    loaded = load_drafter(folder_of(tmp_path, version), TARGET)
    resumed = Versions(tmp_path).resume(version, loaded, "ensemble")
    assert_equal(learner.played(resumed), loaded.weights.params)


def test_the_state_of_another_learner_is_left_and_said_once(tmp_path, drafter, caplog):
    version = save(Versions(tmp_path), drafter, 1, learner="momentum", state=(1.0, {"w": torch.ones(2)}))
    loaded = load_drafter(folder_of(tmp_path, version), TARGET)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        assert Versions(tmp_path).resume(version, loaded, "optimistic") is None
    assert loaded.weights.version == 1
    assert [r.message for r in caplog.records] == [
        'version 1 was learned by "momentum", now "optimistic" learns: it begins anew from these weights'
    ]


def test_a_drafter_that_learns_something_else_is_refused(tmp_path, drafter):
    version = save(Versions(tmp_path), drafter, 1)
    with pytest.raises(ValueError, match=r"fc.weight is \(32, 64\) in .*000001 and no tensor that learns .* --tune"):
        Versions(tmp_path).resume(version, load_drafter("ngram", TARGET))


@pytest.mark.parametrize(
    "method",
    [
        "optimistic",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("online_gradient", "ensemble/with_frozen=true", "momentum")
        ),
    ],
)
def test_learning_that_was_stopped_goes_on_as_if_it_had_not_been(method, tmp_path):
    line = f"{method}/requests_per_round=1/max_rows=1000/replay_every=0/budget=inf"

    def answer(drafter, learning, numbers):
        loop = DecodeLoop(TARGET, drafter, learning)
        for i in numbers:
            loop.complete([5, 9, 200 + i, 31], GenerationParams(16), request_id=str(i))

    whole = Eagle.fresh(TARGET)
    answer(whole, InlineLearning(whole, config=parse_learner(line)), range(8))

    first = Eagle.fresh(TARGET)
    learning = InlineLearning(first, config=parse_learner(line))
    answer(first, learning, range(4))
    event = happened("promoted", first.weights.version, 0)
    Versions(tmp_path).save(first, first.weights, event, NAME, line, learning._state)

    version = Versions(tmp_path).latest_good(NAME)
    again = load_drafter(folder_of(tmp_path, version), TARGET)
    state = Versions(tmp_path).resume(version, again, line)
    learning = InlineLearning(again, config=parse_learner(line))
    learning._state = state
    answer(again, learning, range(4, 8))
    assert again.weights.version == whole.weights.version == 8
    assert_equal(again.weights.params, whole.weights.params)


# Which versions there are


def test_a_folder_is_left_alone_until_something_is_saved(tmp_path):
    store = Versions(tmp_path / "new")
    assert store.latest_good(NAME) is None
    assert (store.next_version, store.history(), store.numbers()) == (0, [], [])
    assert store.reset() is None
    assert not (tmp_path / "new").exists()


def test_the_newest_stay_with_the_first_one(tmp_path, drafter):
    store = filled(tmp_path, drafter, range(9), keep=3)
    assert store.numbers() == [0, 6, 7, 8]
    assert [event.version for event in store.history()] == list(range(9))
    assert not list((tmp_path / "versions").glob(".*"))


def test_the_last_good_one_stays_however_many_were_rolled_back(tmp_path, drafter):
    store = filled(tmp_path, drafter, range(4), keep=1)
    for number in (4, 5):
        store.note(happened("rolled back", number + 10, number, 3))
    for number in (4, 5):
        save(store, drafter, number)
    assert store.numbers() == [0, 3, 5]
    assert store.latest_good(NAME).version == 3


def test_a_version_that_was_rolled_back_is_not_what_a_restart_begins_with(tmp_path, drafter):
    store = filled(tmp_path, drafter, [0, 1])
    event = happened("rolled back", 2, 1, 0)
    store.save(drafter, DrafterWeights(weights_of(drafter, 0).params, 2), event, NAME)
    assert Versions(tmp_path).latest_good(NAME).version == 2
    shutil.rmtree(tmp_path / "versions" / "000002")  # or it never came to be written
    assert Versions(tmp_path).latest_good(NAME).version == 0


def test_a_rollback_is_known_from_the_version_itself_should_the_note_be_lost(tmp_path, drafter):
    store = filled(tmp_path, drafter, [0, 1])
    save(store, drafter, 2, happened("rolled back", 2, 1, 0))
    save(store, drafter, 3)
    (tmp_path / "history.jsonl").unlink()
    shutil.rmtree(tmp_path / "versions" / "000003")
    with (tmp_path / "versions" / "000002" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert Versions(tmp_path).latest_good(NAME).version == 0


def test_a_version_is_never_written_twice(tmp_path, drafter):
    store = filled(tmp_path, drafter, [0, 1])
    with pytest.raises(ValueError, match="000001 exists; a version is never written twice: the next number is 2"):
        save(store, drafter, 1)


def test_an_event_of_another_version_is_refused(tmp_path, drafter):
    with pytest.raises(ValueError, match="the event is of version 2, the weights are version 1"):
        save(Versions(tmp_path), drafter, 1, happened("promoted", 2, 0))
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_six_digits_are_numbers(tmp_path, drafter):
    store = filled(tmp_path, drafter, [999_999, 1_000_000])
    assert (store.numbers(), store.next_version) == ([999_999, 1_000_000], 1_000_001)
    assert store.latest_good(NAME).version == 1_000_000


def test_numbers_are_never_used_again_whatever_was_lost(tmp_path, drafter):
    store = filled(tmp_path, drafter, range(3))
    store.note(happened("promoted", 7, 2))  # served, and never saved
    assert Versions(tmp_path).next_version == 8
    (tmp_path / "history.jsonl").unlink()
    assert Versions(tmp_path).next_version == 3
    (tmp_path / "versions" / ".000011.tmp").mkdir()
    assert Versions(tmp_path).next_version == 12
    store.reset()
    assert Versions(tmp_path).next_version == 12


def test_versions_of_another_target_are_not_used(tmp_path, drafter):
    store = filled(tmp_path, drafter, [0, 1])
    with pytest.raises(
        ValueError, match=f"000001 was learned for target {NAME}, this target is other; .*--reset-drafter"
    ):
        store.latest_good("other")
    store.reset()
    assert store.latest_good("other") is None


def test_back_to_the_beginning_keeps_everything_aside(tmp_path, drafter):
    store = filled(tmp_path, drafter, [0, 1])
    before = sorted(path.relative_to(tmp_path / "versions") for path in (tmp_path / "versions").rglob("*"))
    aside = store.reset()
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == before
    assert aside.name.startswith("versions.reset-")
    assert store.numbers() == []
    assert store.next_version == 2
    assert [event.kind for event in store.history()] == ["promoted", "promoted", "reset"]
    save(store, drafter, 2, happened("started", 2))
    assert store.reset() != aside  # in the same second
    assert store.next_version == 3


@pytest.mark.parametrize("keep", [0, -1])
def test_nothing_to_keep_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep is {keep}; it must be at least 1"):
        Versions(tmp_path, keep)


# One writer


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(versions, "_HANDOVER_SECONDS", 0.0)


def test_a_folder_has_one_writer_and_any_number_of_readers(tmp_path, drafter, impatient):
    store, other = filled(tmp_path, drafter, range(2)), Versions(tmp_path)
    for write in (
        lambda: save(other, drafter, 2),
        lambda: other.note(happened("confirmed", 1)),
        other.reset,
        other.hold,
    ):
        with pytest.raises(FolderLocked, match=f"keeps its versions in {tmp_path}.* give each its own .* or stop the"):
            write()
    assert other.latest_good(NAME).version == 1
    assert len(other.history()) == 2
    assert describe(tmp_path)["on disk"] == "0, 1"
    assert save(store, drafter, 2).version == 2
    assert other.next_version == 3  # a reader reads anew
    store.close()
    assert save(other, drafter, 3).version == 3


def test_another_that_writes_does_not_sweep_away_what_is_being_written(tmp_path, drafter, impatient):
    store = filled(tmp_path, drafter, range(1))
    half = tmp_path / "versions" / ".000001.tmp"
    half.mkdir()
    with pytest.raises(FolderLocked):
        save(Versions(tmp_path), drafter, 1)
    assert half.exists()
    assert save(store, drafter, 1).version == 1
    assert not half.exists()


def test_a_folder_is_free_again_once_its_writer_is_closed_or_gone(tmp_path, drafter, impatient):
    with Versions(tmp_path) as store:
        save(store, drafter, 0)
    assert in_child(lambda: (save(Versions(tmp_path), drafter, 1), os.kill(os.getpid(), signal.SIGKILL))) == -9
    save(Versions(tmp_path), drafter, 2)
    save(Versions(tmp_path), drafter, 3)


def test_a_writer_reads_the_history_once_however_much_is_noted(tmp_path, drafter, monkeypatch):
    filled(tmp_path, drafter, range(3))
    store, read_bytes, reads = Versions(tmp_path), Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    for number in range(3, 40):
        store.note(happened("refused", number))
        assert store.next_version == number + 1
    save(store, drafter, 40)
    save(store, drafter, 41, happened("rolled back", 41, 40, 2))
    store.note(happened("confirmed", 41))
    assert store.latest_good(NAME).version == 41
    assert store.canary_reference(store.read(2)) is not None
    assert reads.count("history.jsonl") == 1
    assert store.history() == Versions(tmp_path).history()  # what it remembers is what is written


def test_a_note_that_failed_is_not_remembered(tmp_path, drafter, monkeypatch):
    store, fsync = filled(tmp_path, drafter, range(2)), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: fail())
    with pytest.raises(NotSaved):
        store.note(happened("confirmed", 1))
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(store.history()) == 2
    store.note(happened("confirmed", 1))
    assert store.history() == Versions(tmp_path).history()
    assert len(store.history()) == 3


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, RuntimeError, AttributeError, MemoryError])
def test_whatever_a_drafter_raises_when_saved_is_told_as_not_saved(error, tmp_path, drafter):
    class Broken(Eagle):
        def save(self, folder):
            super().save(folder)
            raise error("no such luck")

    store = filled(tmp_path, drafter, range(2))
    broken = Broken(TARGET, drafter.config, drafter.weights.params)
    with pytest.raises(NotSaved, match=rf"version 2 could not be saved to .* \({error.__name__}: .*no such luck"):
        save(store, broken, 2)
    assert store.numbers() == [0, 1]
    assert not list(tmp_path.glob("versions/.*"))
    with pytest.raises(NotSaved, match="holds a set, which can't be saved"):
        save(store, drafter, 2, state={1, 2})
    assert save(store, drafter, 2).version == 2


# Torn files

FILES = ["config.json", "learner.json", "learner.safetensors", "model.safetensors", "onlinespec.json", "version.json"]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tear", [cut, spoil, Path.unlink], ids=lambda tear: tear.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_torn_version_is_passed_over_and_said_once(name, tear, tmp_path, drafter, caplog):
    store = filled(tmp_path, drafter, range(3))
    path = tmp_path / "versions" / "000002" / name
    assert sorted(other.name for other in path.parent.iterdir()) == FILES
    tear(path)
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        assert [store.latest_good(NAME).version for _ in range(2)] == [1, 1]
    assert len(caplog.records) == 1
    assert "000002 is not whole" in caplog.text
    assert save(store, drafter, 3).version == 3


def test_where_every_version_is_torn_there_is_none_to_begin_with(tmp_path, drafter, caplog):
    store = filled(tmp_path, drafter, range(3))
    for number in range(3):
        cut(tmp_path / "versions" / f"{number:06d}" / "model.safetensors")
    assert store.latest_good(NAME) is None
    assert len(caplog.records) == 3


def test_a_folder_that_was_renamed_is_not_taken_for_another_version(tmp_path, drafter):
    store = filled(tmp_path, drafter, range(2))
    os.rename(tmp_path / "versions" / "000001", tmp_path / "versions" / "000009")
    with pytest.raises(ValueError, match="000009 holds version 1; folders are not to be renamed"):
        store.read(9)


def test_a_torn_line_of_history_costs_that_line_alone(tmp_path, drafter, caplog):
    store = filled(tmp_path, drafter, range(3))
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    store.close()
    store.note(happened("confirmed", 2))
    for _ in range(2):
        events = [(event.kind, event.version) for event in store.history()]
        assert events == [("promoted", 0), ("promoted", 1), ("confirmed", 2)]
    assert len(caplog.records) == 1
    assert "line 3 of" in caplog.text
    path.write_bytes(b"\xff\xfe\n[]\n\n{}\n" + path.read_bytes())
    assert len(Versions(tmp_path).history()) == 3


# Stopped in the middle, and a disk that is full


WRITES = ("open", "os.rename", "os.mkdir", "os.truncate", "os.chmod")
REMOVES = ("os.remove", "os.rmdir")


class Steps:
    """Calls `act` at the n-th thing that is done to files in a folder from now on. Only for processes that end soon."""

    def __init__(self, folder, n, act, things, times=1):
        self.things = things
        self.folder, self.n, self.act, self.times, self.num_done = str(folder), n, act, times, 0
        fsync = os.fsync
        os.fsync = lambda descriptor: (self.tick(), fsync(descriptor))
        for module in (versions, checkpoints):
            module.save_file = self.halfway(module.save_file)
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if event in self.things and any(isinstance(a, str | Path) and self.folder in str(a) for a in arguments[:2]):
            self.tick()

    def halfway(self, save_file):
        def save_half_then_all(tensors, path):
            save_file(tensors, path)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            self.tick()
            Path(path).write_bytes(whole)

        return save_half_then_all

    def tick(self):
        self.num_done += 1
        if self.n < self.num_done <= self.n + self.times:
            self.act()


def in_child(work):
    """The exit status of a process that does the work and nothing else; 0 if it came to its end."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_between_any_two_steps_nothing_is_lost_and_nothing_is_half_there(tmp_path, drafter):
    filled(tmp_path / "before", drafter, range(3), keep=2)
    states = {"old": 0, "new": 0}
    for n in count():
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(n))

        def work(folder=folder, n=n):
            Steps(folder, n, lambda: os.kill(os.getpid(), signal.SIGKILL), WRITES + REMOVES)
            save(Versions(folder, keep=2), drafter, 3)

        status = in_child(work)
        assert status in (0, -signal.SIGKILL)
        store = Versions(folder, keep=2)
        good = store.latest_good(NAME)
        assert good.version in (2, 3)
        assert [store.read(number).version for number in store.numbers()] == store.numbers()
        assert_equal(store.weights(good.version).params, weights_of(drafter, good.version).params)
        states["new" if good.version == 3 else "old"] += 1
        assert store.next_version in (3, 4)
        save(store, drafter, 4)
        assert store.latest_good(NAME).version == 4
        assert not list(store.folder.glob("versions/.*"))
        assert len(store.history()) >= 4
        shutil.rmtree(folder)
        if status == 0:
            break
    assert min(states.values()) > 3
    assert n > 25


def fail():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("times", [1, pytest.param(1000, marks=pytest.mark.full)], ids=["once", "from then on"])
def test_a_disk_that_is_full_at_any_step_leaves_what_was_there_and_says_so(times, tmp_path, drafter):
    filled(tmp_path / "before", drafter, range(3), keep=2)
    for n in count():
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(n))

        def work(folder=folder, n=n):
            steps, store = Steps(folder, n, fail, WRITES, times), Versions(folder, keep=2)
            with suppress(NotSaved):
                save(store, drafter, 3)
            is_done = steps.num_done <= n
            steps.times = 0
            store.close()
            if (folder / "versions" / "000003").exists():
                assert Versions(folder).latest_good(NAME).version == 3
            else:
                assert Versions(folder).latest_good(NAME).version == 2
                assert not list(folder.glob("versions/.*"))
                assert save(Versions(folder), drafter, 3).version == 3  # once there is room
            assert [event.version for event in Versions(folder).history()] == [0, 1, 2, 3]
            os._exit(77 if is_done else 0)

        status = in_child(work)
        assert status in (0, 77)
        shutil.rmtree(folder)
        if status == 77:
            break
    assert n > 25


@pytest.mark.parametrize("most_bytes", [0, 100, 600, 3000, 20_000])
def test_files_that_cannot_grow_leave_what_was_there(most_bytes, tmp_path, drafter):
    """The system itself refuses, in the middle of a write."""
    store = filled(tmp_path, drafter, range(3))
    store.close()
    (tmp_path / "history.jsonl").write_bytes(b"")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        with pytest.raises(NotSaved, match=r"version 3 could not be saved to .*what was saved before is as it was"):
            save(store, drafter, 3)

    assert in_child(work) == 0
    assert store.numbers() == [0, 1, 2]
    assert store.latest_good(NAME).version == 2
    assert not list(tmp_path.glob("versions/.*"))
    assert (tmp_path / "history.jsonl").read_bytes()[-1:] in (b"", b"\n")
    assert [event.version for event in store.history()] in ([], [3])
    assert save(store, drafter, 3).version == 3


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, drafter):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotSaved, match=r"version 0 could not be saved to .*file.* give another folder"):
        save(Versions(tmp_path / "file" / "in"), drafter, 0)
    with pytest.raises(NotSaved, match=r"the note .* could not be saved"):
        Versions(tmp_path / "file" / "in").note(happened("confirmed", 0))


# As a user sees it


def test_a_folder_of_versions_is_told_with_its_history(tmp_path, drafter):
    store = filled(tmp_path, drafter, range(3))
    store.note(happened("refused", 2))
    cut(tmp_path / "versions" / "000001" / "model.safetensors")
    facts = describe(tmp_path)
    assert facts["kind"] == "versions of a drafter"
    assert facts["on disk"] == "0, 1 (not whole), 2"
    assert facts["a restart begins with"].startswith("version 2, of ")
    assert facts["target fingerprint"] == NAME
    assert [event.kind for event in history_of(tmp_path)] == ["promoted"] * 3 + ["refused"]
    one = describe(tmp_path / "versions" / "000002")
    assert one["kind"] == "drafter (eagle)"
    assert one["how it came about"].endswith("version 2 is served, promoted after version 1")
    assert history_of(tmp_path / "versions" / "000002") == []


def test_inspect_prints_what_happened_the_newest_last(tmp_path, drafter, capsys, monkeypatch):
    monkeypatch.setattr(out, "_width", 150)
    store = filled(tmp_path, drafter, range(2))
    for number in range(10, 32):
        store.note(happened("refused", number))
    save(store, drafter, 40, happened("rolled back", 40, 1, 0))
    assert inspect(Inspect(str(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert "a restart begins with  version 40" in shown
    assert "history, the newest 20 of 25:" in shown
    *_, before, last = (" ".join(line.split()) for line in shown.splitlines() if line.startswith("2026"))
    assert last == (
        "2026-01-02 03:04:05 rolled back to 0 1 → 40 served 2.00, version before 2.25 16 requests +0.250 ± 0.050"
    )
    assert before == "2026-01-02 03:04:05 refused 31 served 2.00, candidate 2.25 16 requests +0.250 ± 0.050"


# Together with what decides


def test_a_restart_goes_on_where_a_killed_process_was(tmp_path, drafter):
    """Promoted, saved, killed; the next process serves the same weights, under the same number, and still watches."""
    start, better = weights_of(drafter, 0), weights_of(drafter, 1)
    store = filled(tmp_path, drafter, [0])
    event = happened("promoted", 1, 0)
    store.save(drafter, better, event, NAME)

    store = Versions(tmp_path)
    good = store.latest_good(NAME)
    again = load_drafter(folder_of(tmp_path, good), TARGET)
    store.resume(good, again)
    publisher = Publisher(
        again,
        PublishConfig(),
        next_version=store.next_version,
        promoted=good.event,
        previous=store.canary_reference(good),
    )
    assert publisher.served.version == 1
    assert_equal(publisher.served.params, better.params)
    assert publisher.next_version == 2
    assert publisher.has_canary
    assert_equal(publisher.previous.params, start.params)


def test_what_is_confirmed_or_was_not_promoted_is_watched_no_more(tmp_path, drafter, caplog):
    store = filled(tmp_path, drafter, [0, 1, 2])
    assert_equal(store.canary_reference(store.read(2)).params, weights_of(drafter, 1).params)
    cut(tmp_path / "versions" / "000001" / "model.safetensors")
    assert store.canary_reference(store.read(2)) is None
    assert "version 2 is served without a canary test" in caplog.text
    store = filled(tmp_path / "other", drafter, [0, 1])
    store.note(happened("confirmed", 1))
    assert store.canary_reference(store.read(1)) is None
    save(store, drafter, 2, happened("rolled back", 2, 1, 0))
    assert store.canary_reference(store.read(2)) is None
