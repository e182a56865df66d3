"""How distilling goes, and what it brought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onlinespec.core import Params


@dataclass(frozen=True)
class Score:
    """How a drafter does on the answers that were left out."""

    acceptance_length: float
    loss: float  # nats per row, at the first depth
    epoch: int  # after which, or in which if time ran out; 0 is before
    step: int = 0  # of training, after which

    def beats(self, other: Score) -> bool:
        """Longer acceptance; of equal ones the smaller loss: a cold drafter learns before it shows."""
        return (self.acceptance_length, -self.loss) > (other.acceptance_length, -other.loss)


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
    num_skipped: int  # that do not fit the target: longer than its context, or with tokens that it lacks
    num_repeated: int  # word for word as an earlier one
    num_tokens: int  # of all answers
    num_held_out: int
    num_steps: int
    step_size: float
    ended_by: str  # "epochs", "patience" or "minutes"
    seconds: dict[str, float]  # by phase, interrupted runs included as far as what they did was kept


@dataclass
class TrainingState:
    """Training between two steps: all that decides how it goes on."""

    params: Params
    step: int
    best: Params
    scores: list[Score]
    seconds: float
    is_whole: bool = True  # false while a step or a score is being taken over
    num_rows: int = 0  # trained by this process

    @property
    def best_score(self) -> Score:
        """The first that no other beats."""
        best = self.scores[0]
        for score in self.scores[1:]:
            best = score if score.beats(best) else best
        return best

    @property
    def played(self) -> Params:
        """The weights, without their gradients."""
        return {name: p.detach() for name, p in self.params.items()}
