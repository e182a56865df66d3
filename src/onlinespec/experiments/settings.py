"""Settings of a comparison. Imports torch only to check a learner."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onlinespec.config import GenerationParams, check_types
from onlinespec.drafters.settings import Tuning
from onlinespec.learning.settings import LearnConfig
from onlinespec.registry import ACCEPTANCE, NONE


def check_learner(method: str, defaults: LearnConfig) -> None:
    """Raises ValueError if a learner's spec can't be parsed. Imports torch, which learners need."""
    from onlinespec.learning.learner_spec import learner_of, parse_learner

    learner_of(parse_learner(method, defaults))


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison: which drafter and learners, on which prompts, and how.

    Raises:
        ValueError: naming the setting and what is allowed.
    """

    drafter: str  # directory, Hub id or name, as `load_drafter` takes it
    learners: tuple[str, ...]  # "none", or specs as `parse_learner` takes them
    data: tuple[str, ...]  # sources of the segments, in order; one named twice continues where it stopped
    num_requests: tuple[int, ...] = (50,)  # one for all segments, or one per segment; 0 takes all of a file
    minutes: float = 0.0  # time limit; segments that exceed their share of it are cut short; 0 is no limit
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0
    repeats: int = 1
    window: int = 5  # requests averaged in one point of the report's plots
    generation: GenerationParams = GenerationParams()
    learn: LearnConfig = LearnConfig()  # defaults for settings that a learner's spec leaves out
    tuning: Tuning | None = None  # which weights are trained; None leaves the choice to the drafter
    acceptance: str = "coupled"  # acceptance rule; or "rejection", speculative sampling as published
    measures_costs: bool = False  # measure the costs of learning here, instead of using those in `learn`

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("repeats", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.minutes < float("inf"):
            raise ValueError(f"minutes is {self.minutes}; it must be 0 (no limit) or a positive number")
        if self.acceptance not in ACCEPTANCE:
            raise ValueError(f"acceptance is {self.acceptance!r}; it must be one of {', '.join(ACCEPTANCE)}")
        for name in ("learners", "data", "temperatures"):
            if not getattr(self, name):
                raise ValueError(f"no {name} given; name at least one")
        for name in ("learners", "temperatures"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {', '.join(map(str, values))} name one twice; leave it out once")
        for method in self.learners:
            if method != NONE:
                check_learner(method, self.learn)
        for temperature in self.temperatures:
            replace(self.generation.sampling, temperature=temperature)  # raises now, not after the first run
        for spec, count in self.segments:
            if count < 0:
                raise ValueError(f"num_requests is {count} for {spec}; it must be at least 0")
            if count == 0 and self.minutes:
                raise ValueError(
                    f"minutes is {self.minutes} but num_requests 0 for {spec}: shares of time need a number"
                )

    @property
    def segments(self) -> list[tuple[str, int]]:
        """(source, number of requests) of every segment.

        >>> Comparison("eagle", ("none",), ("a.jsonl", "b.jsonl"), num_requests=(7,)).segments
        [('a.jsonl', 7), ('b.jsonl', 7)]
        """
        counts = self.num_requests * len(self.data) if len(self.num_requests) == 1 else self.num_requests
        if len(counts) != len(self.data):
            raise ValueError(
                f"num_requests has {len(counts)} numbers for {len(self.data)} data; give one for all or one for each"
            )
        return list(zip(self.data, counts, strict=True))
