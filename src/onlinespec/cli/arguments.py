"""Groups of flags that several commands share, as dataclasses; tyro makes flags and help of them.

Imported by every command, `--help` too: nothing here takes seconds to import.
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
from onlinespec.registry import FROZEN, LEARNER_NAMES, NONE

TargetName = Annotated[Positional[str], arg(metavar="TARGET")]
SaveFolder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not saved)")]
NAMES = (
    f"{NONE} (plain decoding, without a drafter), {FROZEN} (the drafter stays as it is), "
    f"{', '.join(name for name in LEARNER_NAMES if name not in (NONE, FROZEN))}; "
    "NAME/SETTING=VALUE/... changes settings"
)
Recommended = arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's in generate and serve, else off)")


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute."""

    device: str = "cpu"
    """Torch device the models live on: cpu, cuda, mps."""
    dtype: str = "float32"
    """Precision of the target: float32 (exact on a CPU), bfloat16 or float16."""
    num_threads: int = 1
    """CPU threads. One is best for small models and when other programs run; try all cores above 100M parameters."""
    seed: int = 0
    """Seed of prompts, fresh drafters and sampling."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drafted and chosen."""

    num_draft_tokens: int = 4
    """Tokens drafted per step, 0 to 16; 0 is plain decoding."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    top_k: Annotated[int | None, Recommended] = None
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Annotated[float | None, Recommended] = None
    """Sample among the likeliest tokens that make up this probability; 1 is off."""
    min_p: Annotated[float | None, Recommended] = None
    """Sample among tokens at least this likely, relative to the likeliest; 0 is off."""
    repetition_penalty: Annotated[float | None, Recommended] = None
    """Above 1 discourages tokens that occurred before; 1 is off."""

    def params(
        self, temperature: float | None = None, defaults: SamplingParams = SamplingParams(), **more: Any
    ) -> GenerationParams:
        """As the library takes them; `defaults` stands in for what was not given."""
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        given = {"temperature": temperature} | {name: getattr(self, name) for name in names}
        sampling = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        return GenerationParams(self.max_new_tokens, self.num_draft_tokens, sampling, **more)


@dataclass(frozen=True)
class EngineLimits(Limits):
    """What may run and wait at once."""

    def __post_init__(self) -> None:
        """Checked by `settings`, so that a mistake is told as all others are."""

    @property
    def settings(self) -> Limits:
        """As the library takes them.

        Raises:
            ValueError: naming what is not allowed.
        """
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


@dataclass(frozen=True)
class Learning:
    """How the drafter learns, unless a learner's own line says otherwise."""

    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        LearnConfig.step_size
    )
    """Rate of learning: 1e-3 up to two million parameters that learn, then falling with the square root of their number
    (1.4e-4 for a hundred million)."""
    geometry: str = LearnConfig.geometry
    """Norm of the updates: preconditioned (per-weight scales), diagonal (Adam: averages gradients too) or
    euclidean (the gradient itself)."""
    loss: str = LearnConfig.loss
    """What is learned: auto (mostly the committed token when greedy, the whole row when sampled), soft_cross_entropy,
    cross_entropy, mix, reverse_kl, jsd, total_variation."""
    learn_budget: float = LearnConfig.budget
    """Most of decoding time that learning may take, or of one core's time where serve learns beside decoding; 0.08 is
    8 %. Some updates are lent at the start, so a short run shows more. inf is no limit."""
    learn_costs: Annotated[
        tuple[float, float] | None,
        arg(metavar="UPDATE ROW", help_behavior_hint="(default: measured; 1 and 0.03 in generate and serve)"),
    ] = None
    """What an update costs, in decode steps, by itself and for each of its rows: what the budget is counted in. (Where
    serve learns beside decoding, a clock counts.)"""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """What of a small_lm learns: layers (all but embedding and head), all, or adapters (low-rank, as peft has them)."""
    adapter_rank: int = Tuning.rank
    """Rank of those adapters."""
    replay_every: int = LearnConfig.replay_every
    """Every so many updates, rows of an earlier request are learned again; 0 for no memory."""
    replay_megabytes: float = LearnConfig.replay_megabytes
    """Size of that memory."""
    replay_minutes: float = LearnConfig.replay_minutes
    """After which a request is forgotten; inf is never."""
    min_interval: int = LearnConfig.min_interval
    """Steps between two updates while they bring something; up to four times as many where the loss is small."""
    max_interval: int = LearnConfig.max_interval
    """Most steps between two updates once they don't; up to four times as many where the loss is small. The same as
    --min-interval keeps them fixed."""

    def tuning(self) -> Tuning | None:
        """What of the drafter learns; None for the drafter's own choice."""
        return Tuning(self.tune, self.adapter_rank) if self.tune else None

    def config(self, telemetry: bool = False) -> LearnConfig:
        """As the library takes it."""
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
