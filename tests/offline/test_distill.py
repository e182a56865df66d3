"""A run that was stopped ends where one that was not ends, whenever it was stopped, and loses no answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import rigs
import torch
from checkpoints import add_tokens, save_tiny
from safetensors import SafetensorError
from safetensors.torch import load_file
from waiting import HANG_SECONDS, wait_until

import onlinespec.offline.target_answers
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.models.loading import load_target
from onlinespec.offline import distill as module
from onlinespec.offline.distill import Distilling
from onlinespec.offline.outcome import Score
from onlinespec.offline.pace import schedule
from onlinespec.offline.settings import Distillation
from onlinespec.offline.target_answers import Answers
from onlinespec.registry import DRAFTERS
from onlinespec.workloads import Prompt

TRAINABLE = ("eagle", "small_lm")
full = pytest.mark.full
PROMPTS = [f"count {'ab' * (i % 3)} {i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("distill"), "qwen3")


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def some_answers(target, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    Distilling(target, settings_for(data), folder / "d")._answer()
    return folder / "d.work"


@pytest.fixture
def answered(some_answers, tmp_path):
    """Where a drafter is to lie whose run was stopped once the target had answered all."""
    shutil.copytree(some_answers, tmp_path / "d.work")
    return tmp_path / "d"


def settings_for(data, drafter="eagle", **changes):
    plain = Distillation(
        drafter, (data,), (0,), max_new_tokens=16, num_draft_tokens=3, epochs=2, step_size=5e-3, patience=9
    )
    return replace(plain, **changes)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_every_trainable_drafter_of_the_table_is_distilled_here(target):
    assert {name for name in DRAFTERS if load_drafter(name, target).is_trainable} == set(TRAINABLE)


@pytest.mark.parametrize("name", [TRAINABLE[0], *(pytest.param(name, marks=full) for name in TRAINABLE[1:])])
def test_it_lengthens_what_is_accepted_of_answers_left_out(name, target, data, tmp_path):
    outcome = Distilling(target, settings_for(data, name, epochs=6), tmp_path / "d").run()
    assert outcome.num_prompts == 30
    assert outcome.num_held_out == 8
    assert outcome.scores[0].epoch == 0
    assert outcome.best.loss < outcome.scores[0].loss - 0.3
    assert outcome.best.acceptance_length > outcome.scores[0].acceptance_length
    assert not (tmp_path / "d.work").exists()
    drafter = load_drafter(tmp_path / "d", target)
    assert drafter.weights.version == 0
    assert "30 prompts" in drafter.notes["distilled_on"]


def test_answers_are_the_targets_own_with_the_states_of_that_pass(target, tmp_path):
    before = target.decoder.num_forwards
    answers = Answers(tmp_path / "answers", target)
    prompts = [Prompt(text, str(i), "d") for i, text in enumerate(PROMPTS[:11])]

    def params_of(i):
        return GenerationParams(16, 0, SamplingParams(float(i % 2)), seed=i)

    answers.ask(prompts, params_of)
    asked = target.decoder.num_forwards - before
    for i, prompt in enumerate(prompts):
        recorded = answers.recorded(i)
        ids = target.encode(prompt.text)
        assert recorded.token_ids == tuple(ids + rigs.plain(target, ids, params_of(i)).output_ids)
        states = rigs.hidden_states(target, recorded.token_ids[:-1])
        torch.testing.assert_close(recorded.features.final_SD, states, atol=1e-5, rtol=1e-4)
        feedback = answers.feedback(i)
        assert (feedback.start, feedback.num_rows) == (len(ids) - 1, len(recorded.token_ids) - len(ids))
        assert feedback.temperature == float(i % 2)
    again = Answers(tmp_path / "answers", target)
    assert len(again) == 11
    before = target.decoder.num_forwards
    again.ask(prompts, params_of)
    assert target.decoder.num_forwards == before, "what is answered is not asked again"
    assert asked <= 11 + 2 * 16, "eight at a time, and no second pass for the states"


def test_training_never_runs_the_target(target, data, tmp_path, monkeypatch):
    distilling = Distilling(target, settings_for(data), tmp_path / "d")
    distilling._answer()
    monkeypatch.setattr(type(target.decoder), "forward", lambda *_: pytest.fail("the target ran"))
    distilling._train(*distilling._split())


def test_prompts_longer_than_the_context_are_skipped_and_counted(tmp_path):
    small = load_target(save_tiny(tmp_path / "target", max_position_embeddings=64))
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} " + "x" * (100 if i % 3 == 0 else 20)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = Distilling(small, settings_for(str(path)), tmp_path / "d").run()
    assert (outcome.num_prompts, outcome.num_skipped) == (20, 10)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    with pytest.raises(ValueError, match=r"8 prompts were answered \(4 did not fit the target\), at least 12 are"):
        Distilling(small, settings_for(str(path)), tmp_path / "few").run()


@full
def test_prompts_with_a_token_that_the_model_lacks_are_skipped_and_counted(tmp_path):
    folder = add_tokens(save_tiny(tmp_path / "target", vocab_size=259), "<pad>")
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} hello" + "<pad>" * (i % 3 == 0)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = Distilling(load_target(folder), settings_for(str(path)), tmp_path / "d").run()
    assert (outcome.num_prompts, outcome.num_skipped) == (20, 10)


def test_it_stops_when_epochs_bring_nothing_and_keeps_the_best(target, data, tmp_path, monkeypatch):
    lengths = iter([1.0, 1.5, 1.4, 1.3, 9.0])
    monkeypatch.setattr(Distilling, "_score", lambda self, state, held_out, epoch: Score(next(lengths), 1.0, epoch))
    states = []
    monkeypatch.setattr(
        Distilling, "_save", lambda self, state, outcome: states.append((state.best, state.played, outcome))
    )
    Distilling(target, settings_for(data, epochs=9, patience=2), tmp_path / "d").run()
    ((best, last, outcome),) = states
    assert [score.acceptance_length for score in outcome.scores] == [1.0, 1.5, 1.4, 1.3]
    assert outcome.best.epoch == 1
    assert any(not torch.equal(best[name], last[name]) for name in best)


@full
def test_going_on_from_a_saved_drafter_starts_where_it_was(target, data, tmp_path):
    first = Distilling(target, settings_for(data, epochs=2), tmp_path / "first").run()
    second = Distilling(target, settings_for(data, str(tmp_path / "first"), epochs=1), tmp_path / "second").run()
    assert second.scores[0].acceptance_length == first.best.acceptance_length


@full
def test_adapters_can_be_distilled(target, folder, data, tmp_path):
    tuning = Tuning("adapters", rank=4)
    other = save_tiny(tmp_path / "other", "llama", num_hidden_layers=1)
    outcome = Distilling(target, settings_for(data, str(other), tuning=tuning, epochs=3), tmp_path / "d").run()
    assert outcome.best.loss < outcome.scores[0].loss
    assert (tmp_path / "d" / "adapter_model.safetensors").is_file()
    assert load_drafter(tmp_path / "d", target).weights.params.keys()


# Stopped and started again


class Stop(Exception):
    pass


def halt(*_):
    raise Stop


@pytest.fixture(scope="module", params=["eagle", pytest.param("small_lm", marks=full)])
def whole(request, target, data, tmp_path_factory):
    """A run that no one disturbed, of each family."""
    settings = settings_for(data, request.param)
    return settings, Distilling(target, settings, tmp_path_factory.mktemp("whole") / "d").run()


def assert_same_weights(folder, other):
    expected, found = weights_of(other), weights_of(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(("answering", 8), marks=full),
        pytest.param(("answering", 24), marks=full),
        pytest.param(("training", 1), marks=full),
        ("training", 5),
        pytest.param(("training", 9), marks=full),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_weights(whole, moment, target, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CHECKPOINT_SHARE", 1e9)
    settings, undisturbed = whole

    def stop(event):
        if (event.phase, event.done) == moment:
            raise Stop

    with pytest.raises(Stop):
        Distilling(target, settings, tmp_path / "stopped").run(stop)
    again = Distilling(target, settings, tmp_path / "stopped")
    assert again.is_resumed
    seen = []
    resumed = again.run(lambda event: seen.append((event.phase, event.done)))
    assert resumed.scores == undisturbed.scores
    assert_same_weights(tmp_path / "stopped", undisturbed.folder)
    first_step = min((done for phase, done in seen if phase == "training"), default=0)
    assert first_step == (moment[1] + 1 if moment[0] == "training" else 1), "training goes on behind its checkpoint"


@pytest.mark.parametrize(
    "moment", [("training", 3), pytest.param(("scoring", 4), marks=full), pytest.param(("training", 7), marks=full)]
)
def test_ctrl_c_keeps_the_step_that_was_reached_without_waiting_for_a_checkpoint(whole, moment, target, tmp_path):
    settings, undisturbed = whole
    seen = []

    def stop(event):
        seen.append((event.phase, event.done))
        if seen[-1] == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distilling(target, settings, tmp_path / "d").run(stop)
    reached = max((done for phase, done in seen if phase == "training"), default=0)
    again = []
    Distilling(target, settings, tmp_path / "d").run(lambda event: again.append((event.phase, event.done)))
    assert min(done for phase, done in again if phase == "training") == reached + 1
    assert_same_weights(tmp_path / "d", undisturbed.folder)


@full
def test_ctrl_c_amid_a_move_of_the_weights_goes_back_to_the_last_checkpoint(whole, target, tmp_path, monkeypatch):
    settings, undisturbed = whole
    step, count = torch.optim.AdamW.step, []

    def torn(optimizer):
        step(optimizer)
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", torn)
        with pytest.raises(KeyboardInterrupt):
            Distilling(target, settings, tmp_path / "d").run()
    again = []
    Distilling(target, settings, tmp_path / "d").run(lambda event: again.append((event.phase, event.done)))
    assert min(done for phase, done in again if phase == "training") == 6, "behind the checkpoint of the first epoch"
    assert_same_weights(tmp_path / "d", undisturbed.folder)


def test_stopped_between_saving_and_clearing_up_it_only_clears_up(whole, target, tmp_path, monkeypatch):
    settings, undisturbed = whole
    with monkeypatch.context() as patch:
        patch.setattr(module, "discard", halt)
        with pytest.raises(Stop):
            Distilling(target, settings, tmp_path / "d").run()
    seen = []
    outcome = Distilling(target, settings, tmp_path / "d").run(lambda event: seen.append((event.phase, event.done)))
    assert seen == [("answering", 30)]
    assert outcome.scores == undisturbed.scores
    assert_same_weights(tmp_path / "d", undisturbed.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_stopped_while_clearing_up_it_is_finished(target, data, tmp_path, monkeypatch):
    def torn(folder):
        folder.rename(module.removed(folder))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "discard", torn)
        with pytest.raises(Stop):
            Distilling(target, settings_for(data, epochs=1), tmp_path / "d").run()
    assert {path.name for path in tmp_path.iterdir()} == {"d", ".d.work.removed"}
    with pytest.raises(ValueError, match="holds a drafter already"):
        Distilling(target, settings_for(data, epochs=1), tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("writer", ["save_file", pytest.param("save", marks=full)], ids=["answers", "checkpoint"])
def test_a_full_disk_loses_nothing_that_was_written(writer, whole, target, tmp_path, monkeypatch):
    settings, undisturbed = whole
    place = onlinespec.offline.target_answers if writer == "save_file" else torch
    write, count = getattr(place, writer), []

    def full(content, path, **more):
        count.append(1)
        if len(count) == 2:
            path.write_bytes(b"half of it")
            raise (
                SafetensorError("I/O error: no space left") if writer == "save_file" else RuntimeError("failed writing")
            )
        write(content, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, writer, full)
        with pytest.raises(OSError, match=r"can't be written .*; make room, then the same command goes on"):
            Distilling(target, settings, tmp_path / "d").run()
    assert not list(tmp_path.rglob("*.partial"))
    resumed = Distilling(target, settings, tmp_path / "d")
    assert len(resumed._answers) == (8 if writer == "save_file" else 30)
    resumed.run()
    assert_same_weights(tmp_path / "d", undisturbed.folder)


ENV = os.environ | {"OMP_NUM_THREADS": "1"}
STOPPED = """
import sys, time, torch
from pathlib import Path
from onlinespec.offline import distill as module
from onlinespec.cli import main
torch.set_num_threads(1)
module._CHECKPOINT_SECONDS, module._CHECKPOINT_SHARE = 0.0, 1e9
sign = Path(sys.argv.pop(1))

def stopping(work):
    def until_stopped(*args):
        while sign.is_file():  # from then on only a signal ends it
            time.sleep(0.01)
        work(*args)
    return until_stopped

module.Distilling._step = stopping(module.Distilling._step)
module.Answers._write = stopping(module.Answers._write)
main()
"""


def command(folder, data, out, sign="never"):
    """A process that checkpoints after every step, and waits for its end once there is a certain file."""
    return [
        sys.executable, "-c", STOPPED, str(sign), "distill", str(folder), "--data", data, "--num-requests", "0",
        "--out", str(out), "--max-new-tokens", "24", "--epochs", "3", "--step-size", "5e-3", "--patience", "9",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_command(folder, data, tmp_path_factory):
    """The weights of a command that no one disturbed."""
    out = tmp_path_factory.mktemp("by_command") / "whole"
    subprocess.run(command(folder, data, out), check=True, capture_output=True, env=ENV)
    return weights_of(out)


@full
@pytest.mark.parametrize(
    ("how", "status", "sign"),
    [
        pytest.param(signal.SIGKILL, -9, "answers/00000000.safetensors", id="killed while answering"),
        pytest.param(signal.SIGINT, 130, "answers/00000008.safetensors", id="Ctrl-C while answering"),
        pytest.param(signal.SIGKILL, -9, "training/checkpoint.pt", id="killed while training"),
        pytest.param(signal.SIGINT, 130, "training/checkpoint.pt", id="Ctrl-C while training"),
    ],
)
def test_a_process_stopped_at_work_ends_as_if_nothing_had_been(how, status, sign, folder, data, by_command, tmp_path):
    out, work = tmp_path / "stopped", tmp_path / "stopped.work"
    process = subprocess.Popen(command(folder, data, out, work / sign), stderr=subprocess.PIPE, env=ENV)
    wait_until(lambda: (work / sign).exists() or process.poll() is not None)
    process.send_signal(how)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == status
    assert not out.exists()
    if how == signal.SIGINT:
        assert b"the same command goes on with what is in" in err
    done = subprocess.run(command(folder, data, out), check=True, capture_output=True, env=ENV, text=True)
    assert "going on with what is in" in done.stderr
    found = weights_of(out)
    assert all(torch.equal(found[key], by_command[key]) for key in by_command)


# A time limit


def test_out_of_time_it_answers_and_trains_on_fewer_and_saves(target, data, tmp_path):
    outcome = Distilling(target, settings_for(data, minutes=1e-6), tmp_path / "d").run()
    assert (outcome.num_prompts, outcome.num_steps, outcome.ended_by) == (16, 1, "minutes")
    assert load_drafter(tmp_path / "d", target).is_trainable


@full
def test_the_step_size_falls_to_zero_by_the_clock_where_time_is_short(target, data, tmp_path, monkeypatch):
    class Clock(module.Clock):
        ticks = 0

        @property
        def now(self):
            Clock.ticks += 1
            return float(Clock.ticks)

    step, step_sizes = Distilling._step, []

    def seen(self, state, optimizer, chosen):
        step_sizes.append(optimizer.param_groups[0]["lr"])
        step(self, state, optimizer, chosen)

    monkeypatch.setattr(module, "Clock", Clock)
    monkeypatch.setattr(Distilling, "_step", seen)
    outcome = Distilling(target, settings_for(data, epochs=100, patience=99, minutes=1.0), tmp_path / "d").run()
    assert outcome.ended_by == "minutes"
    assert 25 < outcome.num_steps == len(step_sizes) < 60
    assert outcome.scores[-1].step == outcome.num_steps, "the last weights are measured too"
    assert max(step_sizes) == 5e-3
    assert step_sizes[-1] < 0.06 * max(step_sizes)


@pytest.mark.parametrize(("num_weights", "step_size"), [(900_000, 2e-3), (2_000_000, 2e-3), (200_000_000, 2e-4)])
def test_the_step_size_is_twice_that_of_online_rounds(num_weights, step_size):
    weights = {"one": torch.empty(num_weights // 2), "other": torch.empty(num_weights // 2)}
    assert module.offline_step_size(weights) == pytest.approx(step_size)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, this one has 1"),
        ({"epochs": 3}, "epochs 2, this one has 3"),
        ({"drafter": "small_lm"}, "drafter 'eagle', this one has 'small_lm'"),
    ],
)
def test_work_of_other_settings_is_not_gone_on_with(target, data, tmp_path, answered, changes, message):
    with pytest.raises(ValueError, match=rf"{message}; choose another --out, or --restart"):
        Distilling(target, settings_for(data, **changes), tmp_path / "d")
    fresh = Distilling(target, settings_for(data, **changes), tmp_path / "d", restart=True)
    assert fresh.is_resumed == ("seed" not in changes), "answers that would come out the same are kept"


def test_prompts_that_changed_in_their_file_are_not_gone_on_with(target, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    Distilling(target, settings_for(str(path)), tmp_path / "d")._answer()
    path.write_text("".join(json.dumps({"prompt": prompt + "!"}) + "\n" for prompt in PROMPTS))
    with pytest.raises(ValueError, match=r"is of a run with prompts .*, or --restart"):
        Distilling(target, settings_for(str(path)), tmp_path / "d")
    assert not Distilling(target, settings_for(str(path)), tmp_path / "d", restart=True).is_resumed


def test_a_drafter_that_changed_in_its_folder_is_not_gone_on_with(target, data, tmp_path):
    settings = settings_for(data, str(tmp_path / "saved"))
    load_drafter("eagle", target).save(tmp_path / "saved")
    Distilling(target, settings, tmp_path / "d")._answer()
    load_drafter("eagle", target, seed=1).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="is of a run with drafter_weights"):
        Distilling(target, settings, tmp_path / "d")


def test_a_drafter_may_be_trained_on_in_its_own_folder(target, data, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    settings = settings_for(data, str(folder), epochs=1)
    load_drafter("eagle", target).save(folder)
    with pytest.raises(ValueError, match="holds a drafter already"):
        Distilling(target, settings, folder)
    stopped = Distilling(target, settings, folder, restart=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "discard", halt)
        with pytest.raises(Stop):
            stopped.run()
    saved = weights_of(folder)
    Distilling(target, settings, folder).run()
    assert all(torch.equal(saved[name], p) for name, p in weights_of(folder).items())
    drafter = load_drafter(folder, target)
    assert drafter.weights.version == 1
    assert "d, weights version" in drafter.notes["distilled_from"]


def test_text_that_was_kept_serves_another_training_without_the_target(target, data, tmp_path, monkeypatch):
    settings = settings_for(data, epochs=1)
    Distilling(target, settings, tmp_path / "d").run(keep_text=True)
    assert not (tmp_path / "d.work" / "training").exists()
    with pytest.raises(ValueError, match="holds a drafter already"):
        Distilling(target, settings, tmp_path / "d")
    monkeypatch.setattr(Answers, "_started", lambda *_: pytest.fail("the target was asked"))
    other = Distilling(target, replace(settings, drafter="small_lm"), tmp_path / "d", restart=True).run()
    assert other.num_prompts == 30
    assert not (tmp_path / "d.work").exists()


def test_no_prompt_is_both_trained_on_and_left_out(target, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:15] * 2))
    outcome = Distilling(target, settings_for(str(path), epochs=1), tmp_path / "d").run()
    assert (outcome.num_prompts, outcome.num_repeated) == (15, 15)
    with pytest.raises(ValueError, match=r"hold 9 prompts \(9 more repeat one\), at least 12"):
        Distilling(target, replace(settings_for(str(path)), data=(str(path),) * 2, num_requests=(9,)), tmp_path / "few")


def test_work_on_another_target_is_not_gone_on_with(target, data, tmp_path, answered):
    other = load_target(save_tiny(tmp_path / "other", "qwen3", seed=5))
    with pytest.raises(ValueError, match=rf"target '{target.fingerprint}', this one has '{other.fingerprint}'"):
        Distilling(other, settings_for(data), tmp_path / "d")


def test_a_finished_drafter_is_not_made_again_unasked(whole, target):
    settings, done = whole
    with pytest.raises(ValueError, match="holds a drafter already; choose another --out, or --restart"):
        Distilling(target, settings, done.folder)


def test_a_folder_of_someone_else_is_left_alone(target, data, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ValueError, match="no drafter of ours; choose another --out"):
            Distilling(target, settings_for(data), tmp_path / "d", restart)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "precious"


def test_a_work_folder_of_someone_else_is_left_alone(target, data, tmp_path):
    (tmp_path / "d.work").mkdir()
    (tmp_path / "d.work" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"d\.work, where the work would lie, holds something else"):
            Distilling(target, settings_for(data), tmp_path / "d", restart)
    assert (tmp_path / "d.work" / "thesis.txt").read_text() == "precious"


def test_too_few_prompts_and_drafters_that_do_not_learn_are_refused(target, data, tmp_path):
    with pytest.raises(ValueError, match=r"hold 9 prompts, at least 12 are needed, 8 of them to measure on; give more"):
        Distilling(target, settings_for(data, num_requests=(9,)), tmp_path / "d")
    with pytest.raises(ValueError, match="drafter ngram does not learn"):
        Distilling(target, settings_for(data, "ngram"), tmp_path / "n")
    assert not (tmp_path / "n.work").exists()


def test_a_damaged_shard_is_named_with_the_way_out(target, data, tmp_path, answered):
    shard = tmp_path / "d.work" / "answers" / "00000008.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00000008.safetensors can't be read .*; delete it and those behind it"):
        Distilling(target, settings_for(data), tmp_path / "d")
    for path in sorted(shard.parent.iterdir())[1:]:
        path.unlink()
    assert Distilling(target, settings_for(data), tmp_path / "d").run().num_prompts == 30


def test_an_answer_with_a_flipped_bit_is_found_before_anything_learns_from_it(target, data, tmp_path, answered):
    shard = tmp_path / "d.work" / "answers" / "00000008.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 64
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000008.safetensors can't be read \(damaged\); delete it and those behind"):
        Distilling(target, settings_for(data), tmp_path / "d").run()


@pytest.mark.parametrize("content", ["", *(pytest.param(text, marks=full) for text in ("{", "[]")), '{"version": "x"}'])
def test_damaged_settings_are_named_and_restart_gets_past_them(target, data, tmp_path, answered, content):
    (tmp_path / "d.work" / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"d.work.*--restart"):
        Distilling(target, settings_for(data), tmp_path / "d")
    again = Distilling(target, settings_for(data), tmp_path / "d", restart=True)
    again._answer()
    assert len(again._answers) == 30


def test_weights_that_blow_up_end_the_run_with_the_way_out(target, data, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"not finite after \d+ steps; choose a smaller --step-size than 1e\+30, and --restart"
    ):
        Distilling(target, settings_for(data, step_size=1e30), tmp_path / "d").run()
    again = Distilling(target, settings_for(data, step_size=1e-3), tmp_path / "d", restart=True)
    assert len(again._answers) == 30


def test_equal_acceptance_is_decided_by_the_loss(target, data, tmp_path, monkeypatch):
    """A drafter that is still cold learns for a while before any of its drafts is kept."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 1.0])
    monkeypatch.setattr(Distilling, "_score", lambda self, state, *_: Score(1.0, next(losses), 0, state.step))
    outcome = Distilling(target, settings_for(data, epochs=9, patience=2), tmp_path / "d").run()
    assert [score.loss for score in outcome.scores] == [5.0, 4.0, 3.0, 3.5, 3.6]
    assert (outcome.best.loss, outcome.ended_by) == (3.0, "patience")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"holdout": 1}, "holdout is 1; it must be at least 2"),
        ({"num_draft_tokens": 99}, "num_draft_tokens is 99; it must be at most 16"),
        ({"step_size": float("nan")}, "step_size is nan; it must be positive"),
        ({"num_requests": (1, 2)}, "num_requests has 2 numbers for 1 data"),
        ({"num_requests": (-1,)}, "num_requests is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"loss": "magic"}, 'unknown loss "magic"'),
        ({"data": ()}, "no data given"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(Distillation("eagle", ("a.jsonl",)), **changes)


def test_the_step_size_warms_up_stays_and_falls_to_zero():
    assert [schedule(at) for at in (0.0, 0.01, 0.02, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
