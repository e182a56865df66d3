"""What every drafter does. Batched: a drafter serves many requests at once, each under a slot number.

The life of a request: `start` with its prompt, then for every step `propose` and `observe`, then `release`. Weights
change between steps only, through `swap`. Axis letters: B requests, K drafted tokens, D hidden size, S positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.core import Draft, DrafterWeights, Features, Feedback, Params, RequestInfo
from onlinespec.drafters.draft_vocab import DraftVocab
from onlinespec.drafters.settings import Tuning
from onlinespec.learners.losses import RowLoss, TargetRows, soft_cross_entropy
from onlinespec.lossless.noise import StepNoise
from onlinespec.models.base import ModelConfig
from onlinespec.models.loading import Target
from onlinespec.models.memory import DrafterSize


@dataclass(frozen=True)
class Loss:
    """What a drafter's loss says of a batch, in nats per row."""

    total: Tensor  # a scalar with a gradient, over all rows and drafting depths: what learning descends
    fresh: float  # of this round's rows at the first depth, at these weights: what regret is counted in
    num_rows: int  # that count, replayed ones included
    num_agreed: int = 0  # of the fresh rows, those whose first draft would have been the committed token ...
    num_fresh: int = 0  # ... of so many; 0 where that is not known


class Drafter(ABC):
    """A component that proposes tokens, and may learn from what became of them."""

    aux_layer_ids: tuple[int, ...] = ()  # target layers whose states it reads beside the final one
    is_trainable: bool = False  # whether `batch` and `loss` are there
    weights: DrafterWeights  # what it drafts with now
    draft_vocab: DraftVocab | None = None  # the tokens that it may propose; None: any
    drafts: bool = True  # one that learns beside another, which drafts, is spared what only drafting needs
    gives_probs: bool = False  # whether its drafts carry the rows they were drawn from, as the rejection rule needs
    longest_text: int | None = None  # tokens: behind a text that is longer it drafts nothing; None: behind any
    notes: Mapping[str, Any] = MappingProxyType({})  # what `inspect` should say of it; saved beside it

    @property
    def bytes_per_token(self) -> int:
        """Memory that a request takes here, for each of its tokens."""
        return 0

    @classmethod
    @abstractmethod
    def fresh(cls, target: Target, seed: int = 0) -> Self:
        """An untrained drafter for a target."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """A saved one. Raises ValueError naming both values if it does not fit the target."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes it in its published format, whole or not at all."""

    @abstractmethod
    def start(self, slot: int, info: RequestInfo, token_ids: Sequence[int], features: Features) -> None:
        """Begins a request.

        Args:
            token_ids: The prompt, its last token (the first anchor) included.
            features: The target's, of all prompt tokens but the last, with the layers of `aux_layer_ids`; these rows
                never change.
        """

    @abstractmethod
    def propose(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        num_draft_tokens_B: Sequence[int],
        sampling: Sequence[SamplingParams],
        noise: StepNoise,
    ) -> Draft:
        """Drafts up to num_draft_tokens_B[i] tokens behind each request's anchor, its last committed token.

        May draft fewer, none included. Pure in its arguments and the state that `start`, `observe` and `swap` left.
        The tensors of a draft lie on the target's device.

        Args:
            sampling: The temperature is the drafter's, too; cuts and penalties act on the target's rows alone.
            noise: What the target's own tokens behind the anchors will be chosen with. A drafter with scores of its own
                takes the argmax of scores / temperature + noise.
        """

    @abstractmethod
    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Features]) -> None:
        """Takes what the last step committed.

        Args:
            token_ids: For each request the committed tokens: the drafts that were kept, then one of the target's own.
            features: For each request as many rows of the target's features: of its anchor and the accepted tokens.
                The last committed token has none yet.
        """

    @abstractmethod
    def release(self, slot: int, is_finished: bool) -> None:
        """Forgets a request.

        Args:
            is_finished: It came to its own end; else it was given up, failed, or starts anew.
        """

    def side(self, **facts: str) -> dict[str, Any]:
        """What is saved beside the published files: the notes, if any, and the given facts."""
        return {**facts, "notes": dict(self.notes)} if self.notes else dict(facts)

    def swap(self, weights: DrafterWeights) -> None:
        """Drafts with other weights from the next step on. Running requests keep what the old ones computed."""
        raise TypeError(f"{type(self).__name__} has no weights to swap")

    def tune(self, tuning: Tuning) -> None:
        """Chooses what of it learns from now on. The weights stay what they are, under other names perhaps.

        Raises:
            ValueError: if it leaves no such choice.
        """
        raise ValueError(
            f"--tune {tuning.what} is for a small_lm; {type(self).__name__} leaves no choice: leave it out"
        )

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> Any:
        """Training inputs from verified rows; consecutive rows of a request become one span.

        False as a condition (an empty list, say) if none of the fresh rows can be learned from.

        Args:
            replayed: Rows of earlier rounds: they count in the total loss, not in the fresh one.
            rejected_only: Count only rows that refused a drafted token, as Online Speculative Decoding does; the others
                remain as context.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def loss(self, params: Params, batch: Any, row_loss: RowLoss = soft_cross_entropy) -> Loss:
        """The loss of given weights on a batch, with a gradient at exactly the verified rows that count."""
        return self.losses([params], batch, row_loss)[0]

    def losses(self, candidates: Sequence[Params], batch: Any, row_loss: RowLoss = soft_cross_entropy) -> list[Loss]:
        """The loss of several sets of weights on one batch, cheaper together than one by one."""
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def rows(self, candidates: Sequence[Params], batch: Any, num_depths: int = 1) -> list[tuple[Tensor, TargetRows]]:
        """Drafted logits [candidates, N, V] of the fresh rows, and the target's, per drafting depth; no gradient.

        A depth's rows are those that a draft of such a length reaches.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    @classmethod
    def size(cls, folder: Path | None, target: ModelConfig) -> DrafterSize | None:
        """How large a saved drafter is, or a fresh one if there is no folder, without reading weights; None where that
        is not worth counting."""
        return None

    def describe(self) -> dict[str, Any]:
        """What `inspect` prints of it."""
        params = self.weights.params
        return {
            "num_parameters": sum(p.numel() for p in params.values()),
            "weights_version": self.weights.version,
            "is_trainable": self.is_trainable,
        }
