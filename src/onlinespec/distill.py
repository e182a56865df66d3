"""A first drafter, trained offline on the text that its target produces.

Two phases: the target answers prompts (`answers.py`), then the drafter learns the answers, epoch by epoch, from the
states of that one pass. Some prompts are left out, and say after every epoch how long runs the drafter would have had
accepted; the weights that did best are saved. Everything goes through a work folder beside the drafter's, so that the
same command goes on after Ctrl-C or a kill, and ends with the weights of a run that no one disturbed.

Reference: text of the target itself as training text, as in Online Speculative Decoding, arXiv:2310.07177 (section 3).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from onlinespec.answers import Answers
from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams, Tuning
from onlinespec.core import DecodeStats, DrafterWeights, Params
from onlinespec.drafters import load_drafter
from onlinespec.drafters.base import Drafter
from onlinespec.drafters.formats import SIDE_FILE
from onlinespec.learners.geometry import is_finite
from onlinespec.losses import LOSSES, RowLoss
from onlinespec.models.loading import Target
from onlinespec.recording import Replaying
from onlinespec.tables import resolve
from onlinespec.workloads import Prompt, load_workload

_LEAST_HELD_OUT = 8
_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Distillation:
    """What to train, on what."""

    drafter: str  # a table name for a fresh one, or a saved one to go on from
    data: tuple[str, ...]
    num_requests: tuple[int, ...] = (400,)  # for all data, or for each; 0 for all a file has
    temperature: float | None = None  # of the answers; None: every other one greedy, the others at 1
    max_new_tokens: int = 112
    num_draft_tokens: int = 4  # at which acceptance is measured
    holdout: int = 20  # one answer in so many is left out, at least 8
    epochs: int = 4
    patience: int = 2  # epochs without a longer acceptance before it stops
    batch_requests: int = 4
    step_size: float = 2e-3
    loss: str = "soft_cross_entropy"
    tuning: Tuning | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("no data given; name at least one")
        if len(self.num_requests) not in (1, len(self.data)):
            raise ValueError(
                f"num_requests has {len(self.num_requests)} numbers for {len(self.data)} data; "
                "give one for all or one for each"
            )
        least = {
            "max_new_tokens": 1,
            "num_draft_tokens": 1,
            "holdout": 2,
            "epochs": 1,
            "patience": 1,
            "batch_requests": 1,
        }
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {at_least}")
        if self.num_draft_tokens > MAX_DRAFT_TOKENS:
            raise ValueError(f"num_draft_tokens is {self.num_draft_tokens}; it must be at most {MAX_DRAFT_TOKENS}")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size is {self.step_size}; it must be positive")
        if min(self.num_requests) < 0:
            raise ValueError(f"num_requests is {min(self.num_requests)}; it must be at least 0")
        for spec, count in self.parts:
            if count == 0 and spec.startswith("builtin:"):
                raise ValueError(f"{spec} has no end; give a number of requests for it")
        resolve(LOSSES, self.loss, "loss")
        self.params_of(0), self.params_of(1)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(data, number of requests) of each data."""
        counts = self.num_requests * len(self.data) if len(self.num_requests) == 1 else self.num_requests
        return list(zip(self.data, counts, strict=True))

    def params_of(self, index: int) -> GenerationParams:
        """How the prompt at a place of the stream is answered."""
        temperature = float(index % 2) if self.temperature is None else self.temperature
        seed = self.seed * 1_000_003 + index
        return GenerationParams(self.max_new_tokens, 0, SamplingParams(temperature), seed=seed)


@dataclass(frozen=True)
class Score:
    """How a drafter does on the answers that were left out."""

    acceptance_length: float
    loss: float  # nats per row, at the first depth
    epoch: int  # 0 is before


@dataclass(frozen=True)
class Progress:
    """Told as it goes."""

    phase: str  # "answering", "training" or "scoring"
    done: int
    total: int
    rate: str = ""  # what is done per second, in words
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    folder: Path
    scores: tuple[Score, ...]  # before, and after every epoch
    best: Score
    num_prompts: int
    num_skipped: int
    num_tokens: int  # of all answers
    num_held_out: int
    num_steps: int
    seconds: dict[str, float]  # by phase, of this and of interrupted runs as far as they were noted


@dataclass
class _State:
    """Training between two steps: all that decides how it goes on."""

    params: Params
    step: int
    best: Params
    scores: list[Score]
    seconds: float

    @property
    def played(self) -> Params:
        """The weights, without their gradients."""
        return {name: p.detach() for name, p in self.params.items()}


class Distilling:
    """A distillation under way. `run` does what is left to do.

    Args:
        out: The drafter's folder. Work lies beside it, in one of the same name and `.work`.
        restart: Begin anew, whatever is there.

    Raises:
        ValueError: if the drafter can't learn, `out` holds something else, or the work there is of other settings.
    """

    def __init__(self, target: Target, distillation: Distillation, out: Path, restart: bool = False) -> None:
        self.target, self.settings, self.out = target, distillation, out.absolute()
        self.work = self.out.with_name(self.out.name + ".work")
        self._drafter = self._load()
        if not self._drafter.is_trainable:
            raise ValueError(f"drafter {distillation.drafter} does not learn; choose another, eagle say")
        self._row_loss: RowLoss = resolve(LOSSES, distillation.loss, "loss")
        self._on_progress: Callable[[Progress], None] = lambda progress: None
        self._prompts = list(self._stream())
        needed = _LEAST_HELD_OUT + distillation.batch_requests
        if len(self._prompts) < needed:
            raise ValueError(
                f"{', '.join(distillation.data)} hold {len(self._prompts)} prompts, at least {needed} are needed, "
                f"{_LEAST_HELD_OUT} of them to measure on; give more data, or a larger --num-requests"
            )
        self._claim(restart)
        self._answers = Answers(self.work / "answers", target)

    @property
    def is_resumed(self) -> bool:
        """Whether there is work of an earlier run to go on with."""
        return bool(self._answers.num_prompts)

    def run(self, on_progress: Callable[[Progress], None] = lambda progress: None, keep_text: bool = False) -> Outcome:
        """Answers, trains, saves; then removes the work folder, or all but the answers.

        Raises:
            ValueError: if too few prompts were answered.
        """
        self._on_progress = on_progress
        answering = self._answer()
        trained, held_out = self._split()
        state = self._train(trained, held_out)
        best = max(state.scores, key=lambda score: score.acceptance_length)
        outcome = Outcome(
            folder=self.out,
            scores=tuple(state.scores),
            best=best,
            num_prompts=len(self._answers),
            num_skipped=self._answers.num_skipped,
            num_tokens=self._answers.num_tokens,
            num_held_out=len(held_out),
            num_steps=state.step,
            seconds={"answering": answering, "training": state.seconds},
        )
        self._save(state, outcome)
        shutil.rmtree(self.work if not keep_text else self.work / "training", ignore_errors=True)
        return outcome

    # --- before it begins ---------------------------------------------------------------------------------------

    def _load(self) -> Drafter:
        return load_drafter(self.settings.drafter, self.target, self.settings.seed, self.settings.tuning)

    def _claim(self, restart: bool) -> None:
        """Makes the work folder, or finds one of the same settings."""
        if (
            self.out.exists()
            and not (self.out / SIDE_FILE).is_file()
            and (self.out.is_file() or any(self.out.iterdir()))
        ):
            raise ValueError(f"{self.out} holds something that is no drafter of ours; choose another --out")
        if restart:
            shutil.rmtree(self.work, ignore_errors=True)
        elif (self.out / SIDE_FILE).is_file() and not self.work.exists():
            raise ValueError(f"{self.out} holds a drafter already; choose another --out, or --restart to make it anew")
        noted, path = self._noted(), self.work / "settings.json"
        if not path.is_file():
            _write(path, json.dumps(noted, indent=2))
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in noted.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.work} is of a run with {name} {before.get(name)!r}, this one has {value!r}; "
                    "choose another --out, or --restart to begin anew"
                )

    def _noted(self) -> dict[str, Any]:
        """All that decides how a run goes, as JSON gives it back."""
        noted = asdict(self.settings) | {"target": self.target.fingerprint}
        content: dict[str, Any] = json.loads(json.dumps(noted))
        return content

    def _stream(self) -> Iterator[Prompt]:
        for spec, count in self.settings.parts:
            yield from islice(load_workload(spec).prompts(self.settings.seed, split="train"), count or None)

    # --- phases -------------------------------------------------------------------------------------------------

    def _answer(self) -> float:
        began, before = time.monotonic(), self._answers.num_tokens
        total = len(self._prompts)

        def tell() -> None:
            seconds = time.monotonic() - began
            rate = f"{(self._answers.num_tokens - before) / max(seconds, 1e-3):.0f} tokens/s"
            self._on_progress(Progress("answering", self._answers.num_prompts, total, rate))

        self._answers.ask(self._prompts, self.settings.params_of, tell)
        return time.monotonic() - began

    def _split(self) -> tuple[list[int], list[int]]:
        """Answers to train on, and those left out."""
        count = len(self._answers)
        num_held_out = max(_LEAST_HELD_OUT, count // self.settings.holdout)
        needed = num_held_out + self.settings.batch_requests
        if count < needed:
            raise ValueError(
                f"{count} prompts were answered ({self._answers.num_skipped} were longer than the context), at least "
                f"{needed} are needed, {num_held_out} of them to measure on; give more data, or a larger --num-requests"
            )
        held_out = sorted(Random(f"holdout/{self.settings.seed}").sample(range(count), num_held_out))
        return sorted(set(range(count)) - set(held_out)), held_out

    def _train(self, trained: Sequence[int], held_out: Sequence[int]) -> _State:
        settings = self.settings
        state, optimizer = self._resumed() or self._begun()
        if not state.scores:
            state.scores.append(self._score(state, held_out, 0))
        steps_per_epoch = len(trained) // settings.batch_requests
        num_steps = settings.epochs * steps_per_epoch
        began, saved = time.monotonic() - state.seconds, time.monotonic()
        first = state.step
        while state.step < num_steps and not self._has_stalled(state):
            for group in optimizer.param_groups:
                group["lr"] = settings.step_size * schedule(state.step / num_steps)
            self._step(state, optimizer, self._chosen(trained, state.step, steps_per_epoch))
            state.step += 1
            state.seconds = time.monotonic() - began
            if state.step % steps_per_epoch == 0:
                self._end_epoch(state, held_out, state.step // steps_per_epoch)
            if state.step == num_steps or time.monotonic() - saved > _CHECKPOINT_SECONDS or self._has_stalled(state):
                self._checkpoint(state, optimizer)
                saved = time.monotonic()
            rate = f"{(state.step - first) * settings.batch_requests / max(state.seconds, 1e-3):.1f} answers/s"
            self._on_progress(Progress("training", state.step, num_steps, rate, tuple(state.scores)))
        return state

    def _chosen(self, trained: Sequence[int], step: int, steps_per_epoch: int) -> list[int]:
        """The answers of a step: every epoch all of them, in an order of its own."""
        epoch, place = divmod(step, steps_per_epoch)
        order = Random(f"epoch/{self.settings.seed}/{epoch}").sample(list(trained), len(trained))
        size = self.settings.batch_requests
        return order[place * size : (place + 1) * size]

    def _step(self, state: _State, optimizer: torch.optim.Optimizer, chosen: Sequence[int]) -> None:
        batch = self._drafter.batch([self._answers.feedback(i) for i in chosen])
        if not batch:
            return
        optimizer.zero_grad()
        self._drafter.loss(state.params, batch, self._row_loss).total.backward()
        torch.nn.utils.clip_grad_norm_(state.params.values(), 1.0)
        optimizer.step()

    def _end_epoch(self, state: _State, held_out: Sequence[int], epoch: int) -> None:
        if not is_finite(state.played):
            raise ArithmeticError(
                f"the weights are not finite after {state.step} steps; choose a smaller --step-size than "
                f"{self.settings.step_size} and --restart"
            )
        score = self._score(state, held_out, epoch)
        if score.acceptance_length > max(one.acceptance_length for one in state.scores):
            state.best = {name: p.clone() for name, p in state.played.items()}
        state.scores.append(score)

    def _has_stalled(self, state: _State) -> bool:
        """Whether so many epochs brought nothing."""
        lengths = [score.acceptance_length for score in state.scores]
        best = lengths.index(max(lengths))
        return len(lengths) - 1 - best >= self.settings.patience and len(lengths) > 1

    def _score(self, state: _State, held_out: Sequence[int], epoch: int) -> Score:
        """On the answers left out, by a drafter of its own: what it sees while drafting must not reach training."""
        drafter = self._load()
        drafter.swap(DrafterWeights(state.played, 0))
        replaying = Replaying(self.target, drafter, None, self.settings.num_draft_tokens, self.settings.seed)
        stats, losses = DecodeStats(), []
        for done, index in enumerate(held_out, start=1):
            stats += replaying.replay(self._answers.recorded(index))
            with torch.no_grad():
                if batch := self._drafter.batch([self._answers.feedback(index)]):
                    losses.append(self._drafter.loss(drafter.weights.params, batch, self._row_loss).fresh)
            self._on_progress(Progress("scoring", done, len(held_out), scores=tuple(state.scores)))
        return Score(stats.acceptance_length, fmean(losses) if losses else math.nan, epoch)

    # --- on disk ------------------------------------------------------------------------------------------------

    def _begun(self) -> tuple[_State, torch.optim.Optimizer]:
        start = self._drafter.weights.params
        params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        return _State(params, 0, dict(start), [], 0.0), _optimizer(params, self.settings.step_size)

    def _resumed(self) -> tuple[_State, torch.optim.Optimizer] | None:
        path = self.work / "training" / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            kept = torch.load(path, map_location=self.target.decoder.device, weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(f"{path} can't be read ({error}); delete it to train from the start") from error
        params = {name: p.requires_grad_() for name, p in kept["params"].items()}
        optimizer = _optimizer(params, self.settings.step_size)
        optimizer.load_state_dict(kept["optimizer"])
        scores = [Score(*score) for score in kept["scores"]]
        return _State(params, kept["step"], kept["best"], scores, kept["seconds"]), optimizer

    def _checkpoint(self, state: _State, optimizer: torch.optim.Optimizer) -> None:
        path = self.work / "training" / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        content = {
            "params": state.played,
            "optimizer": optimizer.state_dict(),
            "best": state.best,
            "step": state.step,
            "scores": [(s.acceptance_length, s.loss, s.epoch) for s in state.scores],
            "seconds": state.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    def _save(self, state: _State, outcome: Outcome) -> None:
        drafter = self._load()
        drafter.swap(DrafterWeights(state.best, drafter.weights.version))
        drafter.notes = {
            "distilled_on": f"{outcome.num_tokens} tokens of the target's answers to {outcome.num_prompts} prompts of "
            f"{', '.join(self.settings.data)}",
            "distilled_in": f"{outcome.num_steps} steps, the best after epoch {outcome.best.epoch}",
            "acceptance_length": f"{outcome.scores[0].acceptance_length:.2f} before, "
            f"{outcome.best.acceptance_length:.2f} after, {self.settings.num_draft_tokens} drafted, "
            f"on {outcome.num_held_out} answers left out",
        }
        drafter.save(self.out)


def schedule(progress: float) -> float:
    """Warm up over 2 %, stay, then fall linearly to zero from 60 % on."""
    return min(1.0, progress / 0.02, max(0.0, (1 - progress) / 0.4))


def _optimizer(params: Params, step_size: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params.values(), lr=step_size, betas=(0.9, 0.99), weight_decay=0.0)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
