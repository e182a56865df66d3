"""The `Drafter` base class: the interface between the engine, the learner and a drafter.

A drafter serves many requests at once and knows each by a slot number. The calls for a request are `start` with its
prompt, then `propose` and `observe` in every step, then `release`. Weights change only between steps, by `swap`.
`docs/api.md` has a complete example.

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
    """The loss of one set of weights on a batch, in the unit of the row loss (nats for a cross-entropy)."""

    total: Tensor  # scalar with a gradient: the sum over all counted rows and drafting depths, divided by num_rows
    fresh: float  # mean over this round's counted rows at the first depth; for regret and the ensemble's Hedge weights
    num_rows: int  # number of rows that count, replayed rows included
    num_agreed: int = 0  # number of this round's rows whose first draft would have been the committed token ...
    num_fresh: int = 0  # ... out of this many; 0 if unknown


class Drafter(ABC):
    """The base class of drafters, which propose tokens.

    A trainable drafter also turns the target's verdicts (`Feedback`) into training batches and losses.
    """

    aux_layer_ids: tuple[int, ...] = ()  # target layers whose hidden states it needs in addition to the final ones
    is_trainable: bool = False  # whether it implements `batch`, `losses`, `rows` and `swap`
    weights: DrafterWeights  # the weights that it drafts with now
    draft_vocab: DraftVocab | None = None  # the tokens that it may propose; None for all
    drafts: bool = True  # False in a trainer, which never calls `propose`: what only drafting needs can be left out
    gives_probs: bool = False  # whether sampled drafts must carry `probs_BKV`, which the rejection rule needs
    longest_text: int | None = None  # longer texts get no drafts; in tokens, prompt included. None for no limit
    notes: Mapping[str, Any] = MappingProxyType({})  # facts saved with the drafter; `onlinespec inspect` shows them

    @property
    def bytes_per_token(self) -> int:
        """The size of the drafter's cache in bytes per token of a running request; 0 if it has none."""
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
            FileNotFoundError: if a file is missing.
            ValueError: if a file is broken, or the drafter does not fit the target; the message has both values that
                differ.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Saves the drafter in the published format of its family. The write is atomic.

        Raises:
            ValueError: if the folder can't be written to, or exists and holds anything but a saved drafter.
        """

    @abstractmethod
    def start(self, slot: int, info: RequestInfo, token_ids: Sequence[int], features: Features) -> None:
        """Starts a request. A request that is restarted begins with its prompt and the tokens generated so far.

        Args:
            slot: A number that no other running request has.
            token_ids: All tokens so far. The last one is the first anchor.
            features: The target's hidden states at all these tokens except the last, with the layers of
                `aux_layer_ids`. The rows are not modified later, so they need not be copied.
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

        It may draft fewer tokens, or none. The result depends only on the arguments and on earlier calls of `start`,
        `observe` and `swap`. The draft's tensors are on the target's device.

        Args:
            sampling: The drafter uses the temperature. Penalties, top-k, top-p and min-p apply to the target only.
            noise: The Gumbel noise with which the target's tokens will be sampled. A drafter that has scores for tokens
                takes the argmax of scores / temperature + noise, so that it often picks the target's token.
        """

    @abstractmethod
    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Features]) -> None:
        """Receives the tokens that the last step committed.

        Args:
            token_ids: For each request, the drafted tokens that were kept, then one token chosen by the target.
            features: For each request as many rows as tokens: the target's hidden states at the anchor and at the kept
                tokens. The last committed token has no row yet.
        """

    @abstractmethod
    def release(self, slot: int, is_finished: bool) -> None:
        """Ends a request: frees its slot and memory.

        Args:
            is_finished: Whether its answer is complete; False if it was cancelled, failed, or will be restarted.
        """

    def side(self, **facts: str) -> dict[str, Any]:
        """Returns the entries to save in `onlinespec.json`: the given ones, and `notes` if there are any."""
        return {**facts, "notes": dict(self.notes)} if self.notes else dict(facts)

    def swap(self, weights: DrafterWeights) -> None:
        """Replaces the weights from the next step on. Cached keys and values of running requests are not recomputed.

        Raises:
            TypeError: if the drafter has no weights.
        """
        raise TypeError(f"{type(self).__name__} has no weights to swap")

    def tune(self, tuning: Tuning) -> None:
        """Chooses which weights learn from now on. Drafts do not change; the names in `weights.params` may.

        Raises:
            ValueError: if the drafter offers no choice, or not this one.
        """
        raise ValueError(
            f"--tune {tuning.what} is for a small_lm; {type(self).__name__} leaves no choice: leave it out"
        )

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> Any:
        """Makes a training batch of verified rows.

        Args:
            feedback: This round's records. Those of the same request come one after the other.
            replayed: Records of earlier requests. They count in `Loss.total`, not in `Loss.fresh`.
            rejected_only: Only rows that rejected a drafted token count in the loss, as in Online Speculative Decoding
                (arXiv:2310.07177); the other rows serve as context.

        Returns:
            A batch for `losses` and `rows`; a falsy object if no fresh row can be learned from.

        Raises:
            TypeError: if the drafter does not learn.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def loss(self, params: Params, batch: Any, row_loss: RowLoss = soft_cross_entropy) -> Loss:
        """Returns the loss of one set of weights on a batch. See `losses`."""
        return self.losses([params], batch, row_loss)[0]

    def losses(self, candidates: Sequence[Params], batch: Any, row_loss: RowLoss = soft_cross_entropy) -> list[Loss]:
        """Returns the loss of each set of weights on a batch. Only the verified rows that count have a gradient.

        Args:
            candidates: E sets of weights, with the names of `weights.params`.
            batch: From `batch`; not falsy.
            row_loss: Compares drafted logits with the target's rows, and returns one loss per row.

        Raises:
            TypeError: if the drafter does not learn.
            ValueError: if the batch has no row that counts.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    def rows(self, candidates: Sequence[Params], batch: Any, num_depths: int = 1) -> list[tuple[Tensor, TargetRows]]:
        """Returns, for each drafting depth, the drafted logits [E, N, V] of this round's rows, and the target's rows.

        There is no gradient. At depth d (0 is the first) there are predictions for all rows but the first d of each run
        of consecutive rows of a request.

        Args:
            num_depths: Maximum number of depths. Fewer are returned if no run is that long.

        Raises:
            TypeError: if the drafter does not learn.
        """
        raise TypeError(f"{type(self).__name__} does not learn; use it with --learners none,frozen")

    @classmethod
    def size(cls, folder: Path | None, target: ModelConfig) -> DrafterSize | None:
        """Returns the size of a saved drafter, or of a fresh one if `folder` is None, without reading its weights.

        Returns None if its memory is negligible.
        """
        return None
