"""Groups of flags that several commands share, as dataclasses. tyro turns the fields into flags and help texts.

Every command imports this file, `--help` too, so it must not import torch or anything else that takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.settings import Tuning
from onlinespec.engine.settings import Limits
from onlinespec.learning.settings import LearnConfig
from onlinespec.registry import DRAFTERS, FROZEN, LEARNER_NAMES, LOSSES, NONE, SHIPPED_DRAFTERS

TargetName = Annotated[Positional[str], arg(metavar="TARGET")]
SaveFolder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not saved)")]
_SHIPPED = " or ".join(SHIPPED_DRAFTERS)
DRAFTER_HELP = f"Directory or Hub id of a drafter, {_SHIPPED}, or the name of a new one: {', '.join(DRAFTERS)}."
LOSS_HELP = (
    f"Training loss: {', '.join(LOSSES)}. auto trains mostly on the committed token when greedy, on the target's "
    "whole distribution when sampled."
)
LEARNER_HELP = (
    f"{NONE} (plain decoding, without a drafter), {FROZEN} (the drafter stays as it is), "
    f"{', '.join(name for name in LEARNER_NAMES if name not in (NONE, FROZEN))}; "
    "NAME/SETTING=VALUE/... changes settings"
)
Recommended = arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's in generate and serve, else off)")


@dataclass(frozen=True)
class Machine:
    """Device, precision, threads and random seed."""

    device: str = "cpu"
    """Torch device of target and drafter: cpu, cuda or mps."""
    dtype: str = "float32"
    """Data type of the target: float32 (reproduces plain decoding exactly on a CPU), bfloat16 or float16."""
    num_threads: int = 1
    """CPU threads. 1 is fastest for small models and on a busy machine; above 100M parameters, try all cores."""
    seed: int = 0
    """Random seed for prompts, freshly initialised drafters and sampling."""
    debug: bool = False
    """Show Python's traceback when a command fails."""


@dataclass(frozen=True)
class Decoding:
    """Drafting and sampling."""

    num_draft_tokens: int = 4
    """Tokens drafted per decode step, 0 to 16; 0 is plain decoding."""
    max_new_tokens: int = 96
    """Maximum length of an answer, in tokens."""
    top_k: Annotated[int | None, Recommended] = None
    """Sample from the k most likely tokens only; 0 is off."""
    top_p: Annotated[float | None, Recommended] = None
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to this; 1 is off."""
    min_p: Annotated[float | None, Recommended] = None
    """Sample only from tokens with at least this fraction of the most likely token's probability; 0 is off."""
    repetition_penalty: Annotated[float | None, Recommended] = None
    """Above 1, makes tokens that occurred in the prompt or the answer less likely; 1 is off."""

    def params(
        self, temperature: float | None = None, defaults: SamplingParams = SamplingParams(), **more: Any
    ) -> GenerationParams:
        """Returns the library's settings. Sampling flags that were not given are taken from `defaults`.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        given = {"temperature": temperature} | {name: getattr(self, name) for name in names}
        sampling = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        return GenerationParams(self.max_new_tokens, self.num_draft_tokens, sampling, **more)


@dataclass(frozen=True)
class EngineLimits(Limits):
    """How many requests run and wait at once, and how much memory they may take."""

    def __post_init__(self) -> None:
        """Checks nothing: `settings` does, so that a wrong value gives the same one-line error as any other."""

    @property
    def settings(self) -> Limits:
        """The library's settings.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


@dataclass(frozen=True)
class Learning:
    """How the drafter learns. Settings given with a learner (NAME/SETTING=VALUE) override these."""

    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        LearnConfig.step_size
    )
    """Step size (learning rate).
    The default is 1e-3 up to 2 million trainable parameters, then falls as 1/sqrt of their number (1.4e-4 at 100M)."""
    geometry: str = LearnConfig.geometry
    """Gradient scaling: preconditioned (per weight), diagonal (Adam: averages gradients too) or euclidean (none)."""
    loss: Annotated[str, arg(help=LOSS_HELP)] = LearnConfig.loss
    learn_budget: float = LearnConfig.budget
    """Maximum share of decoding time spent on learning, or of one core where serve learns in a process or thread.
    0.08 is 8 %; inf is no limit. A few updates are allowed in advance, so a short run can exceed the share."""
    learn_costs: Annotated[
        tuple[float, float] | None,
        arg(metavar="UPDATE ROW", help_behavior_hint="(default: measured; 1 and 0.03 in generate and serve)"),
    ] = None
    """Cost of an update, in decode steps: a fixed part, and a part per training row. --learn-budget is counted in them.
    Unused where serve learns in a process or thread; time is measured there."""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """Weights of a small_lm to train: layers (all but embedding and head), all, or adapters (LoRA as in peft)."""
    adapter_rank: int = Tuning.rank
    """LoRA rank, for --tune adapters."""
    replay_every: int = LearnConfig.replay_every
    """Every this many updates, training rows of an earlier request are replayed; 0 turns replay off."""
    replay_megabytes: float = LearnConfig.replay_megabytes
    """Size of the replay memory, in megabytes."""
    replay_minutes: float = LearnConfig.replay_minutes
    """Minutes after which a request is dropped from the replay memory; inf is never."""
    min_interval: int = LearnConfig.min_interval
    """Decode steps between updates while they lower the loss; up to four times as many where the loss is small."""
    max_interval: int = LearnConfig.max_interval
    """Decode steps between updates once they no longer help; up to four times as many where the loss is small.
    The same value as --min-interval keeps the interval fixed."""

    def tuning(self) -> Tuning | None:
        """Returns which weights are trained; None leaves the choice to the drafter."""
        return Tuning(self.tune, self.adapter_rank) if self.tune else None

    def config(self, telemetry: bool = False) -> LearnConfig:
        """Returns the library's settings.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        return LearnConfig(
            step_size=self.step_size,
            geometry=self.geometry,
            loss=self.loss,
            budget=self.learn_budget,
            round_cost=self.learn_costs[0] if self.learn_costs else LearnConfig.round_cost,
            row_cost=self.learn_costs[1] if self.learn_costs else LearnConfig.row_cost,
            replay_every=self.replay_every,
            replay_megabytes=self.replay_megabytes,
            replay_minutes=self.replay_minutes,
            min_interval=self.min_interval,
            max_interval=self.max_interval,
            telemetry=telemetry,
        )
