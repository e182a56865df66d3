"""The drafter contract. A drafter serves many requests at once, each under a slot number.

The calls for a request are `start` with its prompt, then `propose` and `observe` for every step, then `release`.
Weights change between steps only, by `swap`. `docs/api.md` has a complete example.
Axis letters: B requests, K drafted tokens, E sets of weights, N rows, V vocabulary, D hidden size, S positions.
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
    """The loss of one set of weights on a batch, in nats per row."""

    total: Tensor  # scalar with a gradient: the mean over all rows, summed over drafting depths
    fresh: float  # mean over this round's rows at the first depth; regret and Hedge use it
    num_rows: int  # rows that count, replayed ones included
    num_agreed: int = 0  # fresh rows whose first draft would have been the committed token ...
    num_fresh: int = 0  # ... out of this many; 0 if unknown


class Drafter(ABC):
    """Proposes tokens. If it is trainable, it also turns Feedback into training batches and losses."""

    aux_layer_ids: tuple[int, ...] = ()  # target layers whose states it reads beside the final ones
    is_trainable: bool = False  # whether it has `batch`, `losses`, `rows` and `swap`
    weights: DrafterWeights  # the weights that it drafts with now
    draft_vocab: DraftVocab | None = None  # the tokens that it may propose; None for all
    drafts: bool = True  # False for a trainer's drafter, which never drafts: it can skip what only drafting needs
    gives_probs: bool = False  # whether drafts must carry `probs_BKV`, as the rejection rule needs
    longest_text: int | None = None  # in tokens; it drafts nothing once a text is longer. None for no limit
    notes: Mapping[str, Any] = MappingProxyType({})  # facts for `inspect`, saved with the drafter

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the drafter holds for each token of a request."""
        return 0

    @classmethod
    @abstractmethod
    def fresh(cls, target: Target, seed: int = 0) -> Self:
        """Returns an untrained drafter for a target."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """Loads a saved drafter.

        Raises:
            ValueError: naming both values, if it does not fit the target.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Saves the drafter in its published format; an interrupted save leaves no partial folder.

        Raises:
            ValueError: if the folder can't be written to, or holds something else.
        """

    @abstractmethod
    def start(self, slot: int, info: RequestInfo, token_ids: Sequence[int], features: Features) -> None:
        """Starts a request, or restarts it from its text so far.

        Args:
            token_ids: The prompt, including its last token, which is the first anchor.
            features: The target's features of all these tokens except the last, with the layers of `aux_layer_ids`. The
                rows never change.
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
        """Drafts up to num_draft_tokens_B[i] tokens after each request's anchor, its last committed token.

        It may draft fewer, or none. The result depends only on the arguments and on earlier calls of `start`, `observe`
        and `swap`. The tensors of the draft are on the target's device.

        Args:
            sampling: The drafter uses the temperature. Cuts and penalties apply to the target's rows only.
            noise: The noise that will choose the target's tokens. A drafter with scores takes the argmax of
                scores / temperature + noise.
        """

    @abstractmethod
    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Features]) -> None:
        """Takes the tokens that the last step committed.

        Args:
            token_ids: For each request, the drafts that were kept, then one token of the target's own.
            features: For each request, the same number of rows: the target's features of its anchor and of the kept
                drafts. The last committed token has no row yet.
        """

    @abstractmethod
    def release(self, slot: int, is_finished: bool) -> None:
        """Frees what is held for a request.

        Args:
            is_finished: Whether its answer is complete; False if it was cancelled, failed, or will be restarted.
        """

    def side(self, **facts: str) -> dict[str, Any]:
        """Returns what is saved in `onlinespec.json`, beside the published files: the given facts and the notes."""
        return {**facts, "notes": dict(self.notes)} if self.notes else dict(facts)

    def swap(self, weights: DrafterWeights) -> None:
        """Drafts with other weights from the next step on. Cached rows of running requests stay as they are.

        Raises:
            TypeError: if the drafter has no weights.
        """
        raise TypeError(f"{type(self).__name__} has no weights to swap")

    def tune(self, tuning: Tuning) -> None:
        """Chooses which weights learn from now on. Their values do not change, their names may.

        Raises:
            ValueError: if the drafter has no such choice.
        """
        raise ValueError(
            f"--tune {tuning.what} is for a small_lm; {type(self).__name__} leaves no choice: leave it out"
        )

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> Any:
        """Makes a training batch of verified rows.

        Args:
            feedback: This round's records; those of a request follow each other.
            replayed: Records of earlier requests. They count in the total loss, not in the fresh one.
            rejected_only: Count only rows that rejected a drafted token, as Online Speculative Decoding does
                (arXiv:2310.07177); the others serve as context.

        Returns:
            A batch for `losses` and `rows`; something false if no fresh row can be learned from.

        Raises:
            TypeError: if the drafter does not learn.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def loss(self, params: Params, batch: Any, row_loss: RowLoss = soft_cross_entropy) -> Loss:
        """Returns the loss of one set of weights on a batch; see `losses`."""
        return self.losses([params], batch, row_loss)[0]

    def losses(self, candidates: Sequence[Params], batch: Any, row_loss: RowLoss = soft_cross_entropy) -> list[Loss]:
        """Returns the loss of each set of weights on a batch. Exactly the verified rows that count have a gradient.

        Raises:
            TypeError: if the drafter does not learn.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def rows(self, candidates: Sequence[Params], batch: Any, num_depths: int = 1) -> list[tuple[Tensor, TargetRows]]:
        """Returns drafted logits [E, N, V] of the fresh rows and the target's rows, for each depth; without gradient.

        At depth d these are the N rows that are followed by d more rows of their request.

        Raises:
            TypeError: if the drafter does not learn.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    @classmethod
    def size(cls, folder: Path | None, target: ModelConfig) -> DrafterSize | None:
        """Returns the size of a saved drafter, or of a fresh one if `folder` is None, without reading weights.

        None if it takes no memory worth counting.
        """
        return None
