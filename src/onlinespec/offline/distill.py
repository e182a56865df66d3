"""Distillation: trains a first drafter offline on text that its target generates.

There are two phases. First the target answers prompts (`target_answers.py`). Then the drafter is trained on the answers
for some epochs, from the hidden states stored in the first phase. Some answers are held out. After every epoch the
drafter's acceptance length is measured on them, and the best weights are saved. All intermediate results go to a work
folder beside the drafter's, so that after Ctrl-C or a kill the same command continues. Without a time limit it ends
with the same weights as an uninterrupted run.

Reference: training on the target's own text, as in Online Speculative Decoding, arXiv:2310.07177 (section 3).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from onlinespec.core import DecodeStats, DrafterWeights
from onlinespec.drafters.checkpoints import SIDE_FILE
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.learners.losses import RowLoss
from onlinespec.models.checkpoint import read_json
from onlinespec.models.loading import Target
from onlinespec.offline.outcome import Outcome, Progress, Score, TrainingState
from onlinespec.offline.pace import Clock, make_optimizer, offline_step_size, schedule
from onlinespec.offline.replay_stream import Replaying
from onlinespec.offline.settings import Distillation
from onlinespec.offline.target_answers import Answers, told_if_full, written
from onlinespec.offline.work_files import bytes_of, digest, discard, removed, write
from onlinespec.registry import DRAFTERS, LOSSES, resolve
from onlinespec.workloads import Prompt, load_workload

_LEAST_HELD_OUT = 8  # answers
_CHECKPOINT_SECONDS = 20.0  # between two checkpoints, at least
_CHECKPOINT_SHARE = 0.1  # largest share of the time that writing checkpoints may take
_ANSWERING_SHARE = 0.6  # share of the time limit that generating answers may take
# Names of all files and folders in a work folder:
_OURS = {"settings.json", "settings.partial", "finished.json", "finished.partial", "answers", "training"}
_DECIDE_ANSWERS = ("target", "dtype", "prompts", "temperature", "max_new_tokens", "seed")  # all that answers depend on


class Distilling:
    """One distillation, new or continued. `run` does whatever is left to do.

    Args:
        target: The model that answers the prompts.
        distillation: The settings.
        out: Folder to write the drafter to. The work folder lies beside it, with `.work` added to its name.
        restart: Train from the start, whatever is there. Answers are kept if the same ones would be generated again.

    Raises:
        FileNotFoundError, ValueError: as `load_drafter`, for the drafter to start from.
        ValueError: if the drafter is not trainable, there are too few prompts, `out` holds a finished drafter (without
            `restart`) or something else, or the work folder holds something else or was begun with other settings.
    """

    def __init__(self, target: Target, distillation: Distillation, out: Path, restart: bool = False) -> None:
        self.target, self.settings, self.out = target, distillation, out.absolute()
        self.work = self.out.with_name(self.out.name + ".work")
        self._drafter = self._load()
        if not self._drafter.is_trainable:
            raise ValueError(f"drafter {distillation.drafter} does not learn; choose another, eagle say")
        self.step_size = distillation.step_size or offline_step_size(self._drafter.weights.params)
        self._row_loss: RowLoss = resolve(LOSSES, distillation.loss, "loss")
        self._on_progress: Callable[[Progress], None] = lambda progress: None
        self._order: tuple[int, list[int]] = (-1, [])  # epoch, and its shuffled training answers
        self._prompts, self.num_repeated = self._stream()
        needed = _LEAST_HELD_OUT + distillation.batch_requests
        if len(self._prompts) < needed:
            told = f" ({self.num_repeated} more repeat one)" if self.num_repeated else ""
            raise ValueError(
                f"{', '.join(distillation.data)} hold {len(self._prompts)} prompts{told}, at least {needed} are "
                f"needed, {_LEAST_HELD_OUT} of them to measure on; give more data, or a larger --num-requests"
            )
        self._version = self._claim(restart)
        self._answers = Answers(self.work / "answers", target, self._drafter.aux_layer_ids)

    @property
    def is_resumed(self) -> bool:
        """Whether answers of an earlier run were found, so that this one continues it."""
        return bool(self._answers.num_prompts)

    def run(self, on_progress: Callable[[Progress], None] = lambda progress: None, keep_text: bool = False) -> Outcome:
        """Generates answers, trains, saves the drafter, and removes the work folder.

        Args:
            on_progress: Called with the progress of each phase, after every step or scored answer.
            keep_text: Keep the work folder with the answers, and remove only the training checkpoint.

        Raises:
            ValueError: if too few prompts were answered.
            FloatingPointError: if the loss or the weights are no longer finite.
            OSError: if writing fails, because the disk is full for instance. What was written before is kept.
        """
        self._on_progress = on_progress
        self._answer()
        trained, held_out = self._split()
        state, ended_by = self._train(trained, held_out)
        outcome = Outcome(
            folder=self.out,
            scores=tuple(state.scores),
            best=state.best_score,
            num_prompts=len(self._answers),
            num_skipped=self._answers.num_skipped,
            num_repeated=self.num_repeated,
            num_tokens=self._answers.num_tokens,
            num_held_out=len(held_out),
            num_steps=state.step,
            step_size=self.step_size,
            ended_by=ended_by,
            seconds={"answering": self._answers.seconds, "training": state.seconds},
        )
        self._save(state, outcome)
        if keep_text:
            write(self.work / "finished.json", json.dumps(asdict(outcome.best), indent=2))
            discard(self.work / "training")
        else:
            discard(self.work)
        return outcome

    # --- set-up -------------------------------------------------------------------------------------------------

    def _load(self) -> Drafter:
        return load_drafter(self.settings.drafter, self.target, self.settings.seed, self.settings.tuning)

    def _claim(self, restart: bool) -> int:
        """Creates the work folder, or checks that its settings match. Returns the version the drafter will have."""
        if (
            self.out.exists()
            and not (self.out / SIDE_FILE).is_file()
            and (self.out.is_file() or any(self.out.iterdir()))
        ):
            raise ValueError(f"{self.out} holds something that is no drafter of ours; choose another --out")
        tuning, is_same_place = self.settings.tuning, Path(self.settings.drafter).absolute() == self.out
        if tuning and tuning.what == "adapters" and is_same_place:
            raise ValueError(f"adapters refer to {self.out}, so they can't be written over it; choose another --out")
        for place in (self.work / "training", self.work):
            shutil.rmtree(removed(place), ignore_errors=True)  # finish an interrupted removal
        if self.work.exists() and not (self.work.is_dir() and {path.name for path in self.work.iterdir()} <= _OURS):
            raise ValueError(f"{self.work}, where the work would lie, holds something else; choose another --out")
        is_finished = not self.work.exists() or (self.work / "finished.json").is_file()
        if (self.out / SIDE_FILE).is_file() and is_finished and not restart:
            raise ValueError(f"{self.out} holds a drafter already; choose another --out, or --restart to make it anew")
        path = self.work / "settings.json"
        before = {} if restart else self._settings_before(path)
        noted = self._noted()
        if restart:
            with suppress(ValueError):  # unreadable settings: no answers are kept
                before = self._settings_before(path)
            has_answers = before and all(before.get(name) == noted[name] for name in _DECIDE_ANSWERS)
            for place in (self.work / "training",) if has_answers else (self.work,):
                discard(place)
            (self.work / "finished.json").unlink(missing_ok=True)
            before = {}
        if not before:
            version = self._drafter.weights.version + (self.settings.drafter not in DRAFTERS)
            write(path, json.dumps(noted | {"version": version}, indent=2))
            return version
        if (self.work / "training").exists():  # weights come from there, and `out` may be replaced
            noted["drafter_weights"] = before.get("drafter_weights")
        for name, value in noted.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.work} is of a run with {name} {before.get(name)!r}, this one has {value!r}; "
                    "choose another --out, or --restart to begin anew"
                )
        return int(before["version"])

    def _settings_before(self, path: Path) -> dict[str, Any]:
        """The settings of the run that created the work folder; empty if there is none."""
        try:
            before = read_json(path) if path.is_file() else {}
            return before | {"version": int(before["version"])} if before else {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); --restart begins anew") from error

    def _noted(self) -> dict[str, Any]:
        """Everything that the result of a run depends on, converted to JSON types for comparison."""
        noted = asdict(self.settings) | {
            "target": self.target.fingerprint,
            "dtype": str(self.target.decoder.dtype),
            "prompts": digest(f"{prompt.id}\n{prompt.text}\n".encode() for prompt in self._prompts),
            "drafter_weights": digest(bytes_of(p) for p in self._drafter.weights.params.values()),
        }
        content: dict[str, Any] = json.loads(json.dumps(noted))
        return content

    def _stream(self) -> tuple[list[Prompt], int]:
        """The prompts without repetitions, and how many were repeated: no text may be in both training and held-out."""
        prompts: dict[str, Prompt] = {}
        num_read = 0
        for spec, count in self.settings.parts:
            for prompt in islice(load_workload(spec).prompts(self.settings.seed, split="train"), count or None):
                prompts.setdefault(prompt.text, prompt)
                num_read += 1
        return list(prompts.values()), num_read - len(prompts)

    # --- phases -------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        began, total = time.monotonic(), len(self._prompts)

        def tell(num_tokens: int) -> None:
            rate = f"{num_tokens / max(time.monotonic() - began, 1e-3):.0f} tokens/s" if num_tokens else ""
            self._on_progress(Progress("answering", self._answers.num_prompts, total, rate))

        def has_time() -> bool:
            is_enough = len(self._answers) >= _LEAST_HELD_OUT + self.settings.batch_requests
            return not (is_enough and self._answers.seconds > self._seconds_for_all * _ANSWERING_SHARE)

        self._answers.ask(self._prompts, self.settings.params_of, tell, has_time)

    @property
    def _seconds_for_all(self) -> float:
        return self.settings.minutes * 60 or math.inf

    def _split(self) -> tuple[list[int], list[int]]:
        """Indices of the answers to train on, and of the held-out ones."""
        count = len(self._answers)
        num_held_out = max(_LEAST_HELD_OUT, count // self.settings.holdout)
        needed = num_held_out + self.settings.batch_requests
        if count < needed:
            raise ValueError(
                f"{count} prompts were answered ({self._answers.num_skipped} did not fit the target), at least "
                f"{needed} are needed, {num_held_out} of them to measure on; give more data, or a larger --num-requests"
            )
        held_out = sorted(Random(f"holdout/{self.settings.seed}").sample(range(count), num_held_out))
        return sorted(set(range(count)) - set(held_out)), held_out

    def _train(self, trained: Sequence[int], held_out: Sequence[int]) -> tuple[TrainingState, str]:
        """Does the training that is left. Returns the final state, and which limit ended it."""
        state, optimizer = self._resumed() or self._begun()
        try:
            return state, self._steps(state, optimizer, trained, held_out)
        except KeyboardInterrupt:
            if state.is_whole:
                self._checkpoint(state, optimizer)
            raise

    def _steps(
        self, state: TrainingState, optimizer: torch.optim.Optimizer, trained: Sequence[int], held_out: Sequence[int]
    ) -> str:
        clock, steps_per_epoch = Clock(state.seconds), len(trained) // self.settings.batch_requests
        num_steps = self.settings.epochs * steps_per_epoch
        seconds = max(self._seconds_for_all - self._answers.seconds, self._seconds_for_all * (1 - _ANSWERING_SHARE))
        saved, pause = clock.now, _CHECKPOINT_SECONDS
        while True:
            ended_by = "epochs" if state.step >= num_steps else "minutes" if state.seconds >= seconds else ""
            if ended_by or state.step % steps_per_epoch == 0:
                if not state.scores or state.scores[-1].step != state.step:
                    self._take_score(state, held_out, -(-state.step // steps_per_epoch))
                    state.seconds = clock.now
                    self._checkpoint(state, optimizer)
                ended_by = ended_by or ("patience" if self._has_stalled(state) else "")
            if ended_by:
                return ended_by
            for group in optimizer.param_groups:
                group["lr"] = self.step_size * schedule(max(state.step / num_steps, state.seconds / seconds))
            self._step(state, optimizer, self._chosen(trained, state.step, steps_per_epoch))
            state.seconds = clock.now
            if state.seconds - saved >= pause:
                self._checkpoint(state, optimizer)
                saved = clock.now
                pause = max(_CHECKPOINT_SECONDS, (saved - state.seconds) / _CHECKPOINT_SHARE)
            rate = f"{state.num_rows / max(clock.since_start, 1e-3):.0f} rows/s"
            self._on_progress(Progress("training", state.step, num_steps, rate, tuple(state.scores)))

    def _chosen(self, trained: Sequence[int], step: int, steps_per_epoch: int) -> list[int]:
        """The answers of a training step. Each epoch goes through the answers in a new order, in whole batches."""
        epoch, place = divmod(step, steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, Random(f"epoch/{self.settings.seed}/{epoch}").sample(list(trained), len(trained))
        size = self.settings.batch_requests
        return self._order[1][place * size : (place + 1) * size]

    def _step(self, state: TrainingState, optimizer: torch.optim.Optimizer, chosen: Sequence[int]) -> None:
        batch = self._drafter.batch([self._answers.feedback(i) for i in chosen])
        loss = self._drafter.loss(state.params, batch, self._row_loss) if batch else None
        if loss:
            self._check_finite(loss.total.detach(), "loss", state.step)
            optimizer.zero_grad()
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(state.params.values(), 1.0)
        state.is_whole = False
        if loss:
            optimizer.step()
            state.num_rows += loss.num_rows
        state.step += 1
        state.is_whole = True

    def _take_score(self, state: TrainingState, held_out: Sequence[int], epoch: int) -> None:
        for p in state.played.values():
            self._check_finite(p, "weights", state.step)
        score = self._score(state, held_out, epoch)
        state.is_whole = False
        if state.scores and score.beats(state.best_score):
            state.best = {name: p.clone() for name, p in state.played.items()}
        state.scores.append(score)
        state.is_whole = True

    def _check_finite(self, numbers: Tensor, name: str, num_steps: int) -> None:
        if not torch.isfinite(numbers).all():
            raise FloatingPointError(
                f"the {name} {'is' if name == 'loss' else 'are'} not finite after {num_steps} steps; choose a smaller "
                f"--step-size than {self.step_size:g}, and --restart (which keeps the answers)"
            )

    def _has_stalled(self, state: TrainingState) -> bool:
        """Whether the last `patience` epochs have not improved the score."""
        return len(state.scores) - 1 - state.scores.index(state.best_score) >= self.settings.patience

    def _score(self, state: TrainingState, held_out: Sequence[int], epoch: int) -> Score:
        """Scores the held-out answers with a separate drafter, so that its caches don't affect training."""
        drafter = self._load()
        drafter.swap(DrafterWeights(state.played, 0))
        replaying = Replaying(self.target, drafter, None, self.settings.num_draft_tokens)
        stats, losses = DecodeStats(), []
        for done, index in enumerate(held_out, start=1):
            stats += replaying.replay(self._answers.recorded(index))
            with torch.no_grad():
                if batch := self._drafter.batch([self._answers.feedback(index)]):
                    losses.append(self._drafter.loss(drafter.weights.params, batch, self._row_loss).fresh)
            self._on_progress(Progress("scoring", done, len(held_out), scores=tuple(state.scores)))
        return Score(stats.acceptance_length, fmean(losses) if losses else math.inf, epoch, state.step)

    # --- on disk ------------------------------------------------------------------------------------------------

    def _begun(self) -> tuple[TrainingState, torch.optim.Optimizer]:
        start = self._drafter.weights.params
        params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        return TrainingState(params, 0, dict(start), [], 0.0), make_optimizer(params, self.step_size)

    def _resumed(self) -> tuple[TrainingState, torch.optim.Optimizer] | None:
        path = self.work / "training" / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            kept = torch.load(path, map_location=self.target.decoder.device, weights_only=True)
        except Exception as error:  # a damaged file raises many kinds of error
            raise ValueError(f"{path} can't be read ({error}); delete it to train from the start") from error
        params = {name: p.requires_grad_() for name, p in kept["params"].items()}
        optimizer = make_optimizer(params, self.step_size)
        optimizer.load_state_dict(kept["optimizer"])
        scores = [Score(*score) for score in kept["scores"]]
        return TrainingState(params, kept["step"], kept["best"], scores, kept["seconds"]), optimizer

    def _checkpoint(self, state: TrainingState, optimizer: torch.optim.Optimizer) -> None:
        path = self.work / "training" / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        content = {
            "params": state.played,
            "optimizer": optimizer.state_dict(),
            "best": state.best,
            "step": state.step,
            "scores": [(s.acceptance_length, s.loss, s.epoch, s.step) for s in state.scores],
            "seconds": state.seconds,
        }
        with written(path) as partial:
            torch.save(content, partial)

    def _save(self, state: TrainingState, outcome: Outcome) -> None:
        drafter = self._load()
        start = drafter.weights.version
        drafter.swap(DrafterWeights(state.best, self._version))
        came_from = {"distilled_from": f"{self.settings.drafter}, weights version {start}"}
        drafter.notes = (came_from if self.settings.drafter not in DRAFTERS else {}) | {
            "distilled_on": f"{outcome.num_tokens} tokens of the target's answers to {outcome.num_prompts} prompts of "
            f"{', '.join(self.settings.data)}",
            "distilled_in": f"{outcome.num_steps} steps, the best after {outcome.best.step}",
            "acceptance_length": f"{outcome.scores[0].acceptance_length:.2f} before, "
            f"{outcome.best.acceptance_length:.2f} after, {self.settings.num_draft_tokens} drafted, "
            f"on {outcome.num_held_out} answers left out",
        }
        with told_if_full(self.out):
            drafter.save(self.out)
