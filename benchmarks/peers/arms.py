"""What is compared: transformers' ways to generate and ours, behind one door.

An arm takes a prompt's token ids and gives an answer with its wall time. All are greedy, in float32, end at the same
tokens, and read the same target and the same small model from their Hugging Face folders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from onlinespec.config import GenerationParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.profile import steps_to_learn_from
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.round_costs import RoundCosts, measure_round_costs
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.checkpoint import find_folder
from onlinespec.models.loading import Target
from onlinespec.registry import FROZEN, NONE, SHIPPED_DRAFTERS

LEARNER = "online_gradient"
PLAIN = "transformers"  # its plain `generate`: the control that every user has


@dataclass(frozen=True)
class Answer:
    """One prompt's answer by one arm."""

    token_ids: list[int]  # an end token included
    seconds: float  # by the clock on the wall, learning included
    cpu_seconds: float  # of this process: what a busy machine leaves of them
    learn_seconds: float
    steps: int  # forward passes of the target, without ours that only reads the prompt


class Stopwatch:
    """Started when made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds by the wall and of this process."""
        wall, cpu = self._began
        return time.perf_counter() - wall, time.process_time() - cpu


class Arm(Protocol):
    """One way to answer."""

    def answer(self, prompt_ids: Sequence[int]) -> Answer:
        """Decodes a prompt to its end."""
        ...


@dataclass(frozen=True)
class Pair:
    """The models that both sides read, and how requests decode."""

    target: Target
    small_lm: str  # a folder, a Hub id or `demo/small_lm`
    eagle: str
    params: GenerationParams

    def drafter(self, name: str) -> str:
        """What `load_drafter` is to load for a drafter's short name; a table's name stands for itself."""
        return {"small_lm": self.small_lm, "eagle": self.eagle}.get(name, name)


def folder_of(path_or_hub_id: str) -> Path:
    """The Hugging Face folder behind a name, those of the models that ship with the package included."""
    return Path(SHIPPED_DRAFTERS.get(path_or_hub_id) or find_folder(path_or_hub_id))


# --- transformers ---------------------------------------------------------------------------------------------------

# How the assistant's length is chosen: what its generation_config is given. `K` stands for num_draft_tokens.
SCHEDULES: dict[str, dict[str, Any]] = {
    "assisted": {
        "num_assistant_tokens": "K",
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    },
    "assisted_heuristic": {
        "num_assistant_tokens": "K",
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.0,
    },
    "assisted_default": {},  # its own: up to 20 tokens, while the assistant is 40 % sure of the next
}


class Generate:
    """transformers' `generate`.

    Args:
        model: The target; steps are counted by a hook on it.
        settings: For the target's generation_config, beside those that all share.
    """

    def __init__(
        self, model: PreTrainedModel, pair: Pair, assistant: PreTrainedModel | None = None, **settings: Any
    ) -> None:
        self._model, self._steps = model, 0
        self._assistant = {"assistant_model": assistant} if assistant is not None else {}
        self._config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=pair.params.max_new_tokens,
            eos_token_id=sorted(pair.target.end_token_ids) or None,
            pad_token_id=min(pair.target.end_token_ids, default=0),
            **settings,
        )

    def answer(self, prompt_ids: Sequence[int]) -> Answer:
        self._steps = 0
        with self._model.register_forward_hook(self._count):
            stopwatch = Stopwatch()
            ids = torch.tensor([prompt_ids])
            given = {"attention_mask": torch.ones_like(ids), "generation_config": self._config}
            out = self._model.generate(ids, **given, **self._assistant)[0, len(prompt_ids) :].tolist()
            taken = stopwatch.read()
        return Answer(out, *taken, 0.0, self._steps)

    def _count(self, *_: Any) -> None:
        self._steps += 1


def read_transformers(folder: Path) -> PreTrainedModel:
    """A model as transformers' users load it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _assisted(schedule: str) -> Callable[[Models], Generate]:
    """With an assistant of its own: schedules leave their state in its generation_config."""

    def make(models: Models) -> Generate:
        pair, assistant = models.pair, read_transformers(folder_of(models.pair.small_lm))
        for name, value in SCHEDULES[schedule].items():
            setattr(assistant.generation_config, name, pair.params.num_draft_tokens if value == "K" else value)
        return Generate(models.model, pair, assistant)

    return make


def _plain(models: Models) -> Generate:
    return Generate(models.model, models.pair)


def _lookup(models: Models) -> Generate:
    return Generate(models.model, models.pair, prompt_lookup_num_tokens=models.pair.params.num_draft_tokens)


# --- ours -----------------------------------------------------------------------------------------------------------


class Ours:
    """Our loop, with or without a drafter, as `onlinespec compare` runs it."""

    def __init__(self, loop: DecodeLoop, params: GenerationParams) -> None:
        self._loop, self._params = loop, params

    def answer(self, prompt_ids: Sequence[int]) -> Answer:
        stopwatch = Stopwatch()
        request = self._loop.complete(prompt_ids, self._params)
        return Answer(request.output_ids, *stopwatch.read(), request.stats.learn_seconds, request.stats.steps)


def _none(models: Models) -> Ours:
    return Ours(DecodeLoop(models.pair.target), models.pair.params)


def _ours(name: str, learner: str) -> Callable[[Models], Ours]:
    def make(models: Models) -> Ours:
        pair = models.pair
        drafter = load_drafter(pair.drafter(name), pair.target)
        costs = models.costs[name]._asdict() if learner != FROZEN else {}
        learning = InlineLearning(drafter, config=parse_learner(learner, replace(LearnConfig(), **costs)))
        return Ours(DecodeLoop(pair.target, drafter, learning), pair.params)

    return make


# --- all ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """What arms are made from."""

    pair: Pair
    model: PreTrainedModel  # the target as transformers runs it
    costs: Mapping[str, RoundCosts]  # of learning on this machine, by drafter


ARMS: dict[str, Callable[[Models], Arm]] = {
    PLAIN: _plain,
    "transformers/assisted": _assisted("assisted"),
    "transformers/assisted_heuristic": _assisted("assisted_heuristic"),
    "transformers/assisted_default": _assisted("assisted_default"),
    "transformers/prompt_lookup": _lookup,
    NONE: _none,
    "ngram": _ours("ngram", FROZEN),
    "small_lm/frozen": _ours("small_lm", FROZEN),
    f"small_lm/{LEARNER}": _ours("small_lm", LEARNER),
    "eagle/frozen": _ours("eagle", FROZEN),
    f"eagle/{LEARNER}": _ours("eagle", LEARNER),
}


def read_models(pair: Pair, arms: Sequence[str]) -> Models:
    """Reads the target, and measures what learning costs each drafter of the arms, as `onlinespec compare` does."""
    costs = {}
    for arm in arms:
        name, _, learner = arm.partition("/")
        if learner == LEARNER:
            drafter = load_drafter(pair.drafter(name), pair.target)
            steps = steps_to_learn_from(pair.target, drafter, pair.params)
            costs[name] = measure_round_costs(drafter, LearnConfig(), steps)
    return Models(pair, read_transformers(find_folder(pair.target.name)), costs)
