"""A run that was stopped ends where one that was not ends, whenever it was stopped, and loses no answer."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import rigs
import torch
from checkpoints import save_tiny
from safetensors.torch import load_file

from onlinespec import distill as module
from onlinespec.answers import Answers
from onlinespec.config import GenerationParams, SamplingParams, Tuning
from onlinespec.distill import Distillation, Distilling, Score, schedule
from onlinespec.drafters import DRAFTERS, load_drafter
from onlinespec.models.loading import load_target
from onlinespec.workloads import Prompt

TRAINABLE = ("eagle", "small_lm")
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


def settings_for(data, drafter="eagle", **changes):
    plain = Distillation(
        drafter, (data,), (0,), max_new_tokens=24, num_draft_tokens=3, epochs=2, step_size=5e-3, patience=9
    )
    return replace(plain, **changes)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_every_trainable_drafter_of_the_table_is_distilled_here(target):
    assert {name for name in DRAFTERS if load_drafter(name, target).is_trainable} == set(TRAINABLE)


@pytest.mark.parametrize("name", TRAINABLE)
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
        torch.testing.assert_close(recorded.hidden_states_SD, states, atol=1e-5, rtol=1e-4)
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
    rows = [{"prompt": "x" * (100 if i % 3 == 0 else 20)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = Distilling(small, settings_for(str(path)), tmp_path / "d").run()
    assert (outcome.num_prompts, outcome.num_skipped) == (20, 10)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    with pytest.raises(
        ValueError, match=r"8 prompts were answered \(4 were longer than the context\), at least 12 are"
    ):
        Distilling(small, settings_for(str(path)), tmp_path / "few").run()


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


def test_going_on_from_a_saved_drafter_starts_where_it_was(target, data, tmp_path):
    first = Distilling(target, settings_for(data, epochs=4), tmp_path / "first").run()
    second = Distilling(target, settings_for(data, str(tmp_path / "first"), epochs=1), tmp_path / "second").run()
    assert second.scores[0].acceptance_length == first.best.acceptance_length


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


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize(
    "moment", [("answering", 8), ("answering", 24), ("training", 1), ("training", 5), ("training", 9)]
)
def test_stopped_anywhere_it_ends_with_the_same_weights(name, moment, target, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    settings = settings_for(data, name)
    whole = Distilling(target, settings, tmp_path / "whole").run()

    def stop(event):
        if (event.phase, event.done) == moment:
            raise Stop

    with pytest.raises(Stop):
        Distilling(target, settings, tmp_path / "stopped").run(stop)
    again = Distilling(target, settings, tmp_path / "stopped")
    assert again.is_resumed
    seen = []
    resumed = again.run(lambda event: seen.append((event.phase, event.done)))
    assert resumed.scores == whole.scores
    expected, found = weights_of(whole.folder), weights_of(tmp_path / "stopped")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    first_step = min((done for phase, done in seen if phase == "training"), default=0)
    assert first_step == (moment[1] + 1 if moment[0] == "training" else 1), "training goes on behind its checkpoint"


ENV = os.environ | {"OMP_NUM_THREADS": "1"}
KILLED = """
import sys, time, torch
from onlinespec import distill as module
from onlinespec.cli import main
torch.set_num_threads(1)
module._CHECKPOINT_SECONDS = 0.0
step = module.Distilling._step
def slowly(self, *args):
    time.sleep(0.02)
    step(self, *args)
module.Distilling._step = slowly
main()
"""


def command(folder, data, out):
    return [
        sys.executable, "-c", KILLED, "distill", str(folder), "--data", data, "--num-requests", "0", "--out", str(out),
        "--max-new-tokens", "24", "--epochs", "3", "--step-size", "5e-3", "--patience", "9",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_command(folder, data, tmp_path_factory):
    """The weights of a command that no one disturbed."""
    out = tmp_path_factory.mktemp("by_command") / "whole"
    subprocess.run(command(folder, data, out), check=True, capture_output=True, env=ENV)
    return weights_of(out)


@pytest.mark.parametrize(
    ("how", "status", "sign"),
    [
        (signal.SIGKILL, -9, "answers/00000000.safetensors"),
        (signal.SIGKILL, -9, "training/checkpoint.pt"),
        (signal.SIGINT, 130, "training/checkpoint.pt"),
    ],
    ids=["killed while answering", "killed while training", "Ctrl-C while training"],
)
def test_a_process_stopped_at_work_ends_as_if_nothing_had_been(how, status, sign, folder, data, by_command, tmp_path):
    out, work = tmp_path / "stopped", tmp_path / "stopped.work"
    process = subprocess.Popen(command(folder, data, out), stderr=subprocess.PIPE, env=ENV)
    while not (work / sign).exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert not out.exists()
    if how == signal.SIGINT:
        assert b"the same command goes on with what is in" in err
    done = subprocess.run(command(folder, data, out), check=True, capture_output=True, env=ENV, text=True)
    assert "going on with what is in" in done.stderr
    found = weights_of(out)
    assert all(torch.equal(found[key], by_command[key]) for key in by_command)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, this one has 1"),
        ({"epochs": 3}, "epochs 2, this one has 3"),
        ({"drafter": "small_lm"}, "drafter 'eagle', this one has 'small_lm'"),
    ],
)
def test_work_of_other_settings_is_not_gone_on_with(target, data, tmp_path, changes, message):
    Distilling(target, settings_for(data), tmp_path / "d")._answer()
    with pytest.raises(ValueError, match=rf"{message}; choose another --out, or --restart"):
        Distilling(target, settings_for(data, **changes), tmp_path / "d")
    fresh = Distilling(target, settings_for(data, **changes), tmp_path / "d", restart=True)
    assert not fresh.is_resumed


def test_work_on_another_target_is_not_gone_on_with(target, data, tmp_path):
    Distilling(target, settings_for(data), tmp_path / "d")._answer()
    other = load_target(save_tiny(tmp_path / "other", "qwen3", seed=5))
    with pytest.raises(ValueError, match=rf"target '{target.fingerprint}', this one has '{other.fingerprint}'"):
        Distilling(other, settings_for(data), tmp_path / "d")


def test_a_finished_drafter_is_not_made_again_unasked(target, data, tmp_path):
    Distilling(target, settings_for(data, epochs=1), tmp_path / "d").run()
    with pytest.raises(ValueError, match="holds a drafter already; choose another --out, or --restart"):
        Distilling(target, settings_for(data, epochs=1), tmp_path / "d")


def test_a_folder_of_someone_else_is_left_alone(target, data, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ValueError, match="no drafter of ours; choose another --out"):
            Distilling(target, settings_for(data), tmp_path / "d", restart)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "precious"


def test_too_few_prompts_and_drafters_that_do_not_learn_are_refused(target, data, tmp_path):
    with pytest.raises(ValueError, match=r"hold 9 prompts, at least 12 are needed, 8 of them to measure on; give more"):
        Distilling(target, settings_for(data, num_requests=(9,)), tmp_path / "d")
    with pytest.raises(ValueError, match="drafter ngram does not learn"):
        Distilling(target, settings_for(data, "ngram"), tmp_path / "n")
    assert not (tmp_path / "n.work").exists()


def test_a_damaged_shard_is_named_with_the_way_out(target, data, tmp_path):
    Distilling(target, settings_for(data), tmp_path / "d")._answer()
    shard = tmp_path / "d.work" / "answers" / "00000008.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00000008.safetensors can't be read .*; delete it and those behind it"):
        Distilling(target, settings_for(data), tmp_path / "d")
    for path in sorted(shard.parent.iterdir())[1:]:
        path.unlink()
    assert Distilling(target, settings_for(data), tmp_path / "d").run().num_prompts == 30


def test_weights_that_blow_up_end_the_run_with_the_way_out(target, data, tmp_path):
    with pytest.raises(ArithmeticError, match=r"not finite after \d+ steps; choose a smaller --step-size than 1e\+30"):
        Distilling(target, settings_for(data, step_size=1e30), tmp_path / "d").run()


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
        ({"data": ("builtin:sql",), "num_requests": (0,)}, "builtin:sql has no end"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(Distillation("eagle", ("a.jsonl",)), **changes)


def test_the_step_size_warms_up_stays_and_falls_to_zero():
    assert [schedule(at) for at in (0.0, 0.01, 0.02, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
