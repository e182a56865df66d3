"""Learning in a thread and in a process, as decoding sees it. Fates of the learner that serving must not feel."""

import errno
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import rigs
import torch
from rigs import plain
from waiting import HANG_SECONDS, wait_until

from onlinespec import load_drafter
from onlinespec.config import GenerationParams
from onlinespec.core import DrafterWeights
from onlinespec.engine.scheduler import Scheduler
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.budget import Budget, ClockMeter
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.update import InlineLearning
from onlinespec.publishing.label_head import EmbeddingAndHead
from onlinespec.publishing.learning_process import ProcessLearning
from onlinespec.publishing.store import FolderLocked, Versions
from onlinespec.publishing.trainer import StoreOptions, Trainer
from onlinespec.publishing.workers import ThreadLearning, TrainerSpec

TARGET = rigs.random_target()
PROMPTS = [[5, 9, 200 + i, 31] for i in range(4)]
PARAMS = GenerationParams(40, 2)
EAGER = TrainerSpec(
    "eagle",
    config=parse_learner("online_gradient/step_size=5e-3/min_interval=8/max_interval=8"),
    share=10.0,
    niceness=0,
)
EXPLODING = "online_gradient/step_size=1e38/clip_norm=1e38/geometry=euclidean/min_interval=8/max_interval=8"
full = pytest.mark.full
WAYS = {"thread": ThreadLearning, "process": ProcessLearning}


def make(way, spec=EAGER, target=TARGET, drafter=None, **options):
    drafter = drafter or load_drafter(spec.drafter, target)
    learning = WAYS[way](target, spec, drafter.weights, drafter.swap, **options)
    begin(learning)
    return DecodeLoop(target, drafter, learning), learning


def begin(learning):
    """Starts it; a process has then imported all it needs, and serving need not fill the time until it has."""
    before = learning._statistics
    learning.start()
    if isinstance(learning, ProcessLearning):
        wait_until(lambda: learning._statistics is not before or learning.failure)


def answers(loop, count=1):
    return [loop.complete(PROMPTS[i % len(PROMPTS)], PARAMS, request_id=str(i)) for i in range(count)]


PLAIN = [plain(TARGET, prompt, PARAMS).output_ids for prompt in PROMPTS]


def assert_exact(requests):
    for request in requests:
        assert request.output_ids == PLAIN[int(request.info.request_id) % len(PROMPTS)]


def until(condition, loop):
    """Serves until a condition holds."""
    served = []
    wait_until(condition, lambda: served.extend(answers(loop, 4)))
    return served


@pytest.mark.parametrize("way", ["thread", pytest.param("process", marks=full)])
def test_what_is_learned_beside_serving_comes_to_be_served(way):
    loop, learning = make(way)
    names = learning.statistics().keys()  # the same before anything was learned
    served = until(lambda: learning.num_published >= 2, loop)
    learning.stop(HANG_SECONDS)
    assert way == "thread" or learning.process.exitcode == 0
    assert_exact(served)
    assert learning.statistics().keys() == names | {"failure"}
    assert not learning.failure
    assert loop.drafter.weights.version >= 2
    first, last = served[:4], answers(loop, 4)
    accepted = [sum(request.stats.accepted for request in requests) for requests in (first, last)]
    assert accepted[1] > accepted[0] + 20
    figures = learning.statistics()
    assert figures["rounds"] > 0
    assert figures["dropped"] == 0
    assert 0 < figures["share_spent"] < 1.5


@pytest.mark.parametrize("way", WAYS)
def test_serving_never_waits_and_of_too_much_the_oldest_is_dropped(way):
    drafter = load_drafter("eagle", TARGET)
    learning = WAYS[way](
        TARGET, EAGER, drafter.weights, drafter.swap, queue_capacity=4
    )  # not started: no one takes anything
    requests = answers(DecodeLoop(TARGET, drafter, learning), 4)
    assert_exact(requests)
    num_steps = sum(request.stats.steps for request in requests)
    assert (learning.num_offered, learning.num_dropped) == (num_steps, num_steps - 4)
    assert [record.request_id for record in learning._waiting] == ["3"] * 4


@pytest.mark.parametrize("way", ["thread", pytest.param("process", marks=full)])
def test_a_learner_that_computes_nan_leaves_the_drafter_as_it_was(way, caplog):
    loop, learning = make(way, replace(EAGER, config=parse_learner(EXPLODING)))
    start = loop.drafter.weights
    served = until(lambda: learning.failure, loop)
    assert_exact(served + answers(loop, 4))
    assert loop.drafter.weights is start or all(p.isfinite().all() for p in loop.drafter.weights.params.values())
    assert caplog.text.count("learning stopped") == 1
    offered = learning.num_offered
    answers(loop, 1)
    assert learning.num_offered == offered
    learning.stop(HANG_SECONDS)


def test_a_learner_that_raises_is_said_once_and_serving_goes_on(caplog, monkeypatch):
    loop, learning = make("thread")
    update = learning.trainer.learning._learner.__class__.update
    calls = []

    def breaking(self, evaluate, state):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the learner broke")
        return update(self, evaluate, state)

    monkeypatch.setattr(learning.trainer.learning._learner.__class__, "update", breaking)
    served = until(lambda: learning.failure, loop)
    assert "RuntimeError: the learner broke" in learning.failure
    assert_exact(served + answers(loop, 2))
    assert caplog.text.count("learning stopped") == 1
    learning.stop(HANG_SECONDS)


def test_a_trainer_that_raises_outside_a_round_is_no_different(caplog, monkeypatch):
    loop, learning = make("thread")
    monkeypatch.setattr(learning.trainer.publisher, "check", lambda: 1 / 0)
    served = until(lambda: learning.failure, loop)
    assert learning.failure.startswith("ZeroDivisionError")
    assert_exact(served)
    learning.stop(HANG_SECONDS)


def test_a_process_outlives_the_signals_for_who_serves_and_one_that_is_killed_is_said_once(caplog):
    loop, learning = make("process")
    served = until(lambda: learning.statistics()["rounds"], loop)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(learning.process.pid, number)
    rounds = learning.statistics()["rounds"]
    served += until(lambda: learning.statistics()["rounds"] > rounds + 4, loop)
    assert not learning.failure
    os.kill(learning.process.pid, signal.SIGKILL)
    served += until(lambda: learning.failure, loop)
    version = loop.drafter.weights.version
    served += answers(loop, 4)
    assert_exact(served)
    assert loop.drafter.weights.version - version <= 1  # one that had arrived before
    assert "exit code -9" in learning.failure
    assert caplog.text.count("learning stopped") == 1
    learning.stop(1.0)


@full
def test_who_forgets_to_stop_a_process_can_still_end():
    script = (
        "import sys, test_workers as here\n"
        "if __name__ == '__main__':\n"
        "    loop, learning = here.make('process')\n"
        "    here.until(lambda: learning.statistics().get('rounds'), loop)\n"
        "    sys.exit(3)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, timeout=HANG_SECONDS, check=False)
    assert ended.returncode == 3


@pytest.mark.parametrize(
    ("way", "count"),
    [("thread", 30), *(pytest.param(way, 1000, marks=full) for way in WAYS)],
)
def test_swaps_under_load_change_no_token(way, count):
    """Versions of noise, a new one before every step of up to eight requests that come, go, and read long prompts."""
    loop, learning = make(way, replace(EAGER, share=1e-6))
    scheduler = Scheduler(loop, Limits(max_running=8, prefill_tokens=32))
    generator = torch.Generator().manual_seed(0)
    jobs = [(PROMPTS[i % 4] * (1 + 20 * (i % 3)), GenerationParams(20 + 7 * (i % 5), 1 + i % 4)) for i in range(16)]
    expected = [plain(TARGET, *job).output_ids for job in jobs]
    served, num_swaps, most_running = [], 0, 0
    while num_swaps < count:
        if len(scheduler.running) + len(scheduler.prefilling) < 8:
            served.append(loop.open(*jobs[len(served) % len(jobs)]))
            scheduler.submit(served[-1])
        noise = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in loop.drafter.weights.params.items()}
        before = loop.drafter.weights.version
        learning._offer_version(DrafterWeights(noise, before + 1))
        scheduler.step()
        num_swaps += loop.drafter.weights.version != before
        most_running = max(most_running, len(scheduler.running))
    while scheduler.has_work:
        scheduler.step()
    assert most_running == 8
    for i, request in enumerate(served):
        assert request.output_ids == expected[i % len(jobs)]
    learning.stop(HANG_SECONDS)


def test_a_version_that_can_not_be_taken_over_is_not_served_and_ends_learning_with_a_word(caplog):
    drafter, took = load_drafter("eagle", TARGET), []

    def refuse(weights):
        took.append(weights.version)
        raise RuntimeError("no room for it")

    learning = ThreadLearning(TARGET, EAGER, drafter.weights, refuse)
    loop = DecodeLoop(TARGET, drafter, learning)
    for version in (1, 2):
        learning._offer_version(DrafterWeights(drafter.weights.params, version))
        assert_exact(answers(loop, 2))
    assert took[0] == 1
    assert drafter.weights.version == learning.statistics()["weights_version"] == 0
    assert learning.num_published == 0
    assert "version 1 could not be taken over, RuntimeError: no room for it" in learning.failure
    assert caplog.text.count("learning stopped") == 1


# The trainer by itself


def test_a_trainer_learns_what_inline_learning_learns():
    ours, theirs = (load_drafter("eagle", TARGET) for _ in range(2))
    config = replace(EAGER.config, budget=math.inf)
    recorder = rigs.Recorder()
    loop = DecodeLoop(TARGET, load_drafter("eagle", TARGET), recorder)
    answers(loop, 4)
    trainer = Trainer(ours, config)
    inline = InlineLearning(theirs, config=config)
    for record in recorder.feedback:
        trainer.offer([record])
        trainer_hears_first = trainer.learning.num_rounds
        inline.offer([record])
        assert inline.num_rounds == trainer_hears_first
    assert trainer.learning.num_rounds > 5


def test_the_ends_of_a_target_give_its_labels_and_never_run():
    ends = EmbeddingAndHead.of(TARGET)
    target = ends.target()
    states = rigs.hidden_states(TARGET, range(30))
    assert torch.allclose(target.decoder.head(states), TARGET.decoder.head(states), atol=1e-5)
    assert target.fingerprint == TARGET.fingerprint
    with pytest.raises(RuntimeError, match="never runs the target"):
        target.decoder.new_cache()
    with pytest.raises(RuntimeError, match="never runs the target"):
        target.decoder.forward(torch.tensor([1]), [0], [1], None)


def test_rounds_and_comparisons_take_turns_where_time_is_scarce(monkeypatch):
    """Each would take all of it: either is due whenever there is time again."""
    clock = SimpleNamespace(taken=0.0, passed=0.0)
    budget = Budget(0.1, ClockMeter(lambda: clock.taken, lambda: clock.passed))
    trainer, done = Trainer(load_drafter("eagle", TARGET), EAGER.config, budget=budget), []

    def work(what):
        done.append(what)
        clock.taken += 1

    def offer(records):
        if budget.has_room():
            work("round")
            trainer.learning.num_rounds += 1

    monkeypatch.setattr(trainer.learning, "offer", offer)
    monkeypatch.setattr(trainer.publisher, "check", lambda: work("comparison"))
    for _ in range(1000):
        clock.passed += 1
        trainer.offer([])
    assert clock.taken <= 0.1 * 1000 + 2 + 1  # what may be saved, and the last piece of work
    assert done.count("round") == pytest.approx(len(done) / 2, abs=2)


# Versions on disk


@pytest.mark.parametrize(
    ("num_newer", "is_undecided", "is_proposed"), [(3, True, False), (4, True, True), (9, False, False)]
)
def test_a_newer_candidate_takes_the_place_of_one_that_is_neither_better_nor_worse(
    num_newer, is_undecided, is_proposed, monkeypatch
):
    trainer, proposed = Trainer(load_drafter("eagle", TARGET), EAGER.config), []
    publisher = type(trainer.publisher)
    monkeypatch.setattr(publisher, "wants_candidate", False)
    monkeypatch.setattr(publisher, "is_undecided", is_undecided)
    monkeypatch.setattr(trainer.publisher, "propose", proposed.append)
    trainer.learning.num_rounds = num_newer
    trainer.offer([])
    assert len(proposed) == is_proposed


def test_what_is_offered_to_the_gate_is_what_was_learned_and_not_a_look_ahead(traffic, monkeypatch):
    config = replace(parse_learner("optimistic/step_size=5e-3/min_interval=8/max_interval=8"), budget=math.inf)
    trainer, proposed = Trainer(load_drafter("eagle", TARGET), config), []

    def propose(candidate):
        state = trainer.learning.state
        proposed.append((candidate is state.point.played, candidate is state.played))

    monkeypatch.setattr(trainer.publisher, "propose", propose)
    for record in traffic[:100]:
        trainer.offer([record])
    assert len(proposed) > 3
    assert set(proposed) == {(True, False)}


def store_of(folder):
    return StoreOptions(Versions(folder), TARGET.fingerprint, "online_gradient")


def trained(folder, feedback, drafter=None):
    """A trainer that saw some traffic until it published, and what that was."""
    config = replace(EAGER.config, budget=math.inf)
    trainer = Trainer(drafter or load_drafter("eagle", TARGET), config, store=store_of(folder))
    return trainer, list(islice((version for record in feedback if (version := trainer.offer([record]))), 1))


@pytest.fixture(scope="module")
def traffic():
    recorder = rigs.Recorder()
    answers(DecodeLoop(TARGET, load_drafter("eagle", TARGET), recorder), 16)
    return recorder.feedback


def test_what_is_published_lies_on_disk_and_a_restart_goes_on_from_it(tmp_path, traffic):
    first, published = trained(tmp_path, traffic)
    assert published
    good = Versions(tmp_path).latest_good(TARGET.fingerprint)
    assert good.version == published[-1].version
    kinds = [event.kind for event in Versions(tmp_path).history()]
    assert kinds[0] == "started"
    assert kinds.count("promoted") + kinds.count("rolled back") == len(published)
    first.close()

    drafter = load_drafter("eagle", TARGET)
    Versions(tmp_path).resume(good, drafter)
    assert drafter.weights.version == good.version
    again, more = trained(tmp_path, [], drafter)
    assert again.publisher.served.version == good.version
    assert again.publisher.has_canary
    assert again.publisher.previous is not None
    assert again.learning.state is not None
    assert not more
    for name, p in Versions(tmp_path).weights(good.version).params.items():
        assert torch.equal(again.publisher.served.params[name], p)
    assert again.publisher.next_version == first.publisher.next_version


@full
def test_numbers_go_on_after_versions_were_moved_aside(tmp_path, traffic):
    first, _ = trained(tmp_path, traffic)
    first.close()
    with Versions(tmp_path) as store:
        store.reset()
    _, published = trained(tmp_path, traffic)
    assert published[0].version >= first.publisher.next_version


def test_a_full_disk_costs_a_version_on_disk_and_nothing_else(tmp_path, traffic, monkeypatch, caplog):
    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onlinespec.publishing.store.save_file", no_room)
    trainer, published = trained(tmp_path, traffic)
    assert published
    assert trainer.num_unsaved == len(published) + 1
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert "No space left on device" in caplog.text
    assert not trainer.failure


class Breaking:
    """Stands before learning, and breaks a state of one request on its way there; decoding has none of it."""

    diagnostic_seconds, num_published = 0.0, 0

    def __init__(self, learning, request_id, value):
        self.learning, self._request_id, self._value = learning, request_id, value
        self._texts = {}

    def offer(self, feedback):
        self.learning.offer([self._broken(r) if r.request_id == self._request_id else r for r in feedback])

    def _broken(self, record):
        trace, end = record.trace, record.start + record.num_rows
        text = self._texts.setdefault(id(trace), replace(trace, features=trace.features.map(torch.clone)))
        text.token_ids, text.num_features = list(trace.token_ids), trace.num_features
        text.features.final_SD[:end] = trace.features.final_SD[:end]
        text.features.final_SD[min(8, end) : end] = self._value  # from some position of the answer on
        return replace(record, trace=text)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        ("inline", math.nan),
        pytest.param("inline", math.inf, marks=full),
        *(pytest.param(way, value, marks=full) for way in WAYS for value in (math.nan, math.inf)),
    ],
)
def test_a_state_that_is_not_finite_costs_its_own_text_and_learning_goes_on(way, value, caplog):
    drafter = load_drafter("eagle", TARGET)
    if way == "inline":
        learning = InlineLearning(drafter, config=replace(EAGER.config, budget=math.inf))
    else:
        learning = WAYS[way](TARGET, EAGER, drafter.weights, drafter.swap)
        begin(learning)
    loop = DecodeLoop(TARGET, drafter, Breaking(learning, "3", value))

    def figures():
        if way == "inline":
            return {"rounds": learning.num_rounds, "left_out": learning.finite.num_left_out}
        return learning.statistics()

    served = until(lambda: figures()["left_out"], loop)
    before = figures()["rounds"]
    served += until(lambda: figures()["rounds"] > before + 8, loop)
    num_bad = sum(request.info.request_id == "3" for request in served)
    assert num_bad <= figures()["left_out"] <= 40 * num_bad  # the steps from there on, of each
    assert caplog.text.count("is not finite: learning goes on without") == 1
    assert not (learning.is_frozen if way == "inline" else learning.failure)
    assert all(p.isfinite().all() for p in drafter.weights.params.values())
    assert_exact(served)
    if way != "inline":
        learning.stop(HANG_SECONDS)


def unsaveable(error):
    """Saving that fails as what is not ours may fail."""

    def fail(*args, **kwargs):
        raise error

    return fail


STATE, WEIGHTS = "onlinespec.publishing.store.flattened", "onlinespec.drafters.eagle.Eagle.save"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (STATE, ValueError("odd")),
        (WEIGHTS, RuntimeError("shared memory")),
        *(pytest.param(place, KeyError("name"), marks=full) for place in (STATE, WEIGHTS)),
        *(pytest.param(place, TypeError("x"), marks=full) for place in (STATE, WEIGHTS)),
        pytest.param(STATE, RuntimeError("shared memory"), marks=full),
        pytest.param(WEIGHTS, ValueError("odd"), marks=full),
    ],
)
def test_whatever_saving_raises_is_said_once_and_learning_goes_on(where, error, tmp_path, traffic, monkeypatch, caplog):
    monkeypatch.setattr(where, unsaveable(error))
    trainer, published = trained(tmp_path, traffic)
    assert published
    assert trainer.num_unsaved == len(published) + 1
    assert not trainer.failure
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert type(error).__name__ in caplog.text


def test_a_number_that_someone_else_put_into_the_folder_costs_that_version_alone(tmp_path, traffic):
    config = replace(EAGER.config, budget=math.inf)
    trainer = Trainer(load_drafter("eagle", TARGET), config, store=store_of(tmp_path))
    (tmp_path / "versions" / "000001").mkdir()
    published = (version for record in traffic if (version := trainer.offer([record])))
    assert next(published).version == 1
    assert trainer.num_unsaved == 1
    assert not trainer.failure


ODD = """
from typing import NamedTuple
from onlinespec.learners.online_gradient import OnlineGradient

class Odd(NamedTuple):
    point: object
    geometry: object
    more: object = frozenset()

class Learner(OnlineGradient):
    def init(self, params):
        return Odd(*super().init(params))

    def update(self, evaluate, state):
        return Odd(*super().update(evaluate, state))
"""


@full
def test_a_process_whose_learner_can_not_be_saved_learns_and_publishes(tmp_path, monkeypatch, caplog):
    (tmp_path / "odd_learner.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    line = "odd_learner:Learner/step_size=5e-3/min_interval=8/max_interval=8"
    spec = replace(EAGER, config=parse_learner(line), learner=line, versions=str(tmp_path / "kept"))
    loop, learning = make("process", spec)
    served = until(lambda: learning.num_published >= 2 and learning.statistics()["unsaved"] >= 2, loop)
    learning.stop(HANG_SECONDS)
    assert not learning.failure
    assert_exact(served)
    assert caplog.text.count("holds a frozenset, which can't be saved") == 1


def test_a_process_that_can_not_begin_says_why(tmp_path, caplog):
    loop, learning = make(
        "process", replace(EAGER, drafter=str(tmp_path / "gone")), drafter=load_drafter("eagle", TARGET)
    )
    served = until(lambda: learning.failure, loop)
    assert "gone" in learning.failure
    assert_exact(served + answers(loop, 2))
    learning.stop(HANG_SECONDS)
    assert caplog.text.count("learning stopped") == 1


@pytest.mark.parametrize("way", ["thread", pytest.param("process", marks=full)])
def test_who_would_write_to_a_folder_of_another_is_refused_where_it_is_noticed(way, tmp_path, monkeypatch):
    monkeypatch.setattr("onlinespec.publishing.store._HANDOVER_SECONDS", 0.0)
    spec, drafter = replace(EAGER, versions=str(tmp_path)), load_drafter("eagle", TARGET)
    with Versions(tmp_path) as first:
        first.hold()
        with pytest.raises(FolderLocked, match=f"another one keeps its versions in {tmp_path}"):
            WAYS[way](TARGET, spec, drafter.weights, drafter.swap).start()
    loop, learning = make(way, spec)
    until(lambda: learning.statistics()["rounds"], loop)
    with pytest.raises(FolderLocked):
        Versions(tmp_path).hold()
    learning.stop(HANG_SECONDS)
    Versions(tmp_path).hold()


@full
def test_a_process_keeps_versions_and_the_next_one_goes_on(tmp_path):
    spec = replace(EAGER, versions=str(tmp_path))
    loop, learning = make("process", spec)
    until(lambda: learning.num_published >= 1, loop)
    os.kill(learning.process.pid, signal.SIGKILL)
    wait_until(lambda: learning.failure)
    learning.stop(1.0)
    good = Versions(tmp_path).latest_good(TARGET.fingerprint)
    drafter = load_drafter("eagle", TARGET)
    Versions(tmp_path).resume(good, drafter)
    again = ProcessLearning(TARGET, spec, drafter.weights, drafter.swap)
    begin(again)
    loop = DecodeLoop(TARGET, drafter, again)
    served = until(lambda: again.statistics().get("rounds"), loop)
    assert_exact(served)
    assert again.statistics()["published"] >= good.version
    again.stop(HANG_SECONDS)
    assert not again.failure
