"""Result types of a distillation: scores, progress, outcome, and the training state between steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onlinespec.core import Params


@dataclass(frozen=True)
class Score:
    """A drafter's score on the held-out answers."""

    acceptance_length: float
    loss: float  # nats per row at the first drafting depth, averaged over answers
    epoch: int  # the epoch just completed, or interrupted by the time limit; 0 is before training
    step: int = 0  # training steps done

    def beats(self, other: Score) -> bool:
        """Whether acceptance_length is larger, or equal with a smaller loss.

        The loss matters for an untrained drafter, whose loss falls before anything is accepted.
        """
        return (self.acceptance_length, -self.loss) > (other.acceptance_length, -other.loss)


@dataclass(frozen=True)
class Progress:
    """A progress report of one phase."""

    phase: str  # "answering", "training" or "scoring"
    done: int  # prompts, training steps or held-out answers, by phase
    total: int
    rate: str = ""  # speed as text, such as "120 tokens/s"
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a distillation."""

    folder: Path
    scores: tuple[Score, ...]  # before training, and after every epoch
    best: Score  # of the saved weights
    num_prompts: int  # answered
    num_skipped: int  # prompts that don't fit the target: too long, or with tokens outside its vocabulary
    num_repeated: int  # prompts with the same text as an earlier one
    num_tokens: int  # in all answers
    num_held_out: int  # answers
    num_steps: int
    step_size: float
    ended_by: str  # "epochs", "patience" or "minutes"
    seconds: dict[str, float]  # by phase; includes the saved work of interrupted runs


@dataclass
class TrainingState:
    """The training state between two steps, without the optimizer's."""

    params: Params
    step: int
    best: Params  # weights of the best score
    scores: list[Score]
    seconds: float  # of training, earlier processes included
    is_whole: bool = True  # false while a step or a score is being applied: not to be saved then
    num_rows: int = 0  # rows trained by this process

    @property
    def best_score(self) -> Score:
        """The best score; of equal ones the earliest."""
        best = self.scores[0]
        for score in self.scores[1:]:
            best = score if score.beats(best) else best
        return best

    @property
    def played(self) -> Params:
        """The current weights, detached from autograd."""
        return {name: p.detach() for name, p in self.params.items()}
