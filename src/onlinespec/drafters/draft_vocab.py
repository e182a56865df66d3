"""The draft vocabulary: the tokens that a drafter may propose, and an LM head for them.

The LM head is the largest matrix product in drafting and learning, and most of its rows belong to tokens that never
occur in the traffic. FR-Spec (arXiv:2502.14856) drafts from the most frequent tokens of a corpus. Here tokens are
counted in the traffic, prompts included, so that the draft vocabulary adapts to a change of domain. On Spider, GSM8K
and CodeSearchNet, 1,024 of 4,096 tokens covered 96 to 99 % of the demo target's answers, and a drafter would hardly
have proposed the others correctly. A drafter that was trained with a fixed draft vocabulary (EAGLE-3) keeps it.

The draft vocabulary affects acceptance, but never the output: the target chooses from its whole vocabulary.

Axis letters: N rows, S tokens of the draft vocabulary, V the target's vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onlinespec.host import to_device
from onlinespec.models.linear import FrozenProduct, Linear, MakeLinear

Ids = NDArray[np.int64]
Counts = NDArray[np.float64]

_LEAST_SIZE = 1024
_SHARE = 16  # the default size is a sixteenth of the vocabulary, if that is more than _LEAST_SIZE
_COLD = 2  # a draft vocabulary is not used until the number of observed tokens is this many times its size
_DECAY = 0.95  # factor on the counts at the start of every request
_MASKED_LOGIT = -1e30  # logit of a token that must not be drafted; finite, because 0 times infinity would be NaN


def draft_vocab_size(vocab_size: int) -> int:
    """Returns the default size of a draft vocabulary: 1,024, or a sixteenth of the vocabulary if that is more."""
    return max(_LEAST_SIZE, vocab_size // _SHARE)


class DraftTokens:
    """An immutable set of S tokens, sorted by id, with their rows of the drafter's and the target's LM head.

    Args:
        draft_to_target: The target's ids of the tokens, [S] on the host; `draft_to_target_S` is the same on the device.
        head_SD: The rows of the drafter's head for these tokens.
        labels_SD: The rows of the target's head for these tokens; training labels are computed with them.
        make_linear: Makes the matrix product with `head_SD`.
    """

    def __init__(
        self,
        draft_to_target: Ids,
        draft_to_target_S: Tensor,
        head_SD: Tensor,
        labels_SD: Tensor,
        make_linear: MakeLinear,
    ) -> None:
        self.draft_to_target, self.draft_to_target_S = draft_to_target, draft_to_target_S
        self.head = FrozenProduct(head_SD, make_linear)
        self._labels_SD = labels_SD

    def target_logits(self, states_ND: Tensor) -> Tensor:
        """Returns the target's logits for these tokens, float32 [N, S], if its head is a plain matrix product."""
        return F.linear(states_ND, self._labels_SD).float()

    def target_to_draft(self, token_ids: Sequence[int]) -> Ids | None:
        """Maps the target's token ids to indices into these tokens; None if any id is not among them."""
        places = np.searchsorted(self.draft_to_target, token_ids).clip(max=len(self.draft_to_target) - 1)
        return places if np.array_equal(self.draft_to_target[places], token_ids) else None


class DraftVocab:
    """Chooses the tokens to draft from: those with the largest decayed counts in the traffic, or a fixed set.

    Args:
        head_VD: The drafter's head. It may have fewer rows than the target's; tokens without a row are never chosen.
        make_linear: Makes the matrix product of a head.
        tokens: The size, or the ids of a fixed set. By default, the size is `draft_vocab_size`.
        labels_VD: The target's head, if it is not also the drafter's.

    Raises:
        ValueError: if the size is below 1, the set is empty, or the head has no row for an id.
    """

    def __init__(
        self,
        head_VD: Tensor,
        make_linear: MakeLinear,
        tokens: int | Sequence[int] | None = None,
        labels_VD: Tensor | None = None,
    ) -> None:
        self._head_VD, self._make_linear = head_VD, make_linear
        self._labels_VD = head_VD if labels_VD is None else labels_VD
        V = len(head_VD)
        self._num_lacking = len(self._labels_VD) - V  # number of target tokens without a row in the drafter's head
        self._fixed = None if tokens is None or isinstance(tokens, int) else _checked(tokens, V)
        size = tokens if isinstance(tokens, int) else draft_vocab_size(V)
        if size < 1:
            raise ValueError(f"a draft vocabulary of {size} tokens can't be drafted from; it must have at least 1")
        self._size = min(V, size)
        # Unseen tokens are ranked by id, because ids of byte-pair vocabularies are in order of frequency.
        self._unseen_V = np.linspace(1e-6, 0, V)
        self._counts_V = np.zeros(len(self._labels_VD))
        self._uncounted: list[int] = []  # observed tokens that are not yet in `_counts_V`
        self._num_seen = 0
        self._chosen: DraftTokens | None = None
        self._is_stale = True

    # --- choosing tokens ----------------------------------------------------------------------------------------

    @property
    def is_cold(self) -> bool:
        """Whether too few tokens were observed to choose by. Drafts should then use the whole vocabulary."""
        return self._fixed is None and self._num_seen < _COLD * self._size

    @property
    def now(self) -> DraftTokens:
        """The tokens to draft from. They are chosen again when this is first read after a request has started."""
        if self._is_stale or self._chosen is None:
            self.settle()
            self._chosen, self._is_stale = self._choose(self._counts_V), False
        return self._chosen

    def including(self, token_ids: Sequence[int]) -> DraftTokens:
        """Returns a set of the same size that includes these tokens, as far as they fit. `now` does not change.

        A fixed set is returned unchanged.
        """
        now = self.now
        if self._fixed is not None or now.target_to_draft(token_ids) is not None:
            return now
        self.settle()
        weights_V = self._counts_V.copy()
        weights_V[token_ids] = np.inf
        return self._choose(weights_V)

    @cached_property
    def whole(self) -> Linear:
        """The drafter's head over the target's whole vocabulary, from [N, D] to [N, V]. Made at the first use."""
        product = FrozenProduct(self._head_VD, self._make_linear)
        return (lambda x_ND: self.widened(product(x_ND))) if self._num_lacking else product

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states that the heads expect."""
        return self._head_VD.dtype

    def use_head(self, head_VD: Tensor) -> None:
        """Replaces the drafter's head. For drafters whose head learns."""
        self._head_VD, self._chosen = head_VD, None
        self.__dict__.pop("whole", None)

    # --- observing traffic --------------------------------------------------------------------------------------

    def begin_request(self, prompt_ids: Sequence[int]) -> None:
        """Starts a request: decays earlier counts, counts the prompt, and marks `now` to be chosen again."""
        self.settle()
        self._counts_V *= _DECAY
        self.observe_tokens(prompt_ids)
        self._is_stale = True

    def observe_tokens(self, token_ids: Sequence[int]) -> None:
        """Records committed tokens. `settle` counts them later, because every step calls this and it must be fast."""
        self._num_seen += len(token_ids)
        self._uncounted.extend(token_ids)

    def settle(self) -> None:
        """Adds the recorded tokens to the counts."""
        np.add.at(self._counts_V, np.array(self._uncounted, dtype=np.int64), 1.0)
        self._uncounted = []

    def saved(self) -> list[int]:
        """Returns the token ids to save with the drafter; empty if too few were observed, or if the set is fixed."""
        return [] if self.is_cold or self._fixed is not None else self.now.draft_to_target.tolist()

    def restore(self, token_ids: Sequence[int]) -> None:
        """Starts from saved tokens, as if each had been observed twice. Ids without a row in the head are skipped.

        Counts decay, so new traffic soon outweighs these.
        """
        known = [i for i in token_ids if self.has_row(i)]
        self.observe_tokens(known * _COLD)
        self._is_stale = True

    # --- tokens without a row -----------------------------------------------------------------------------------

    def has_row(self, token_id: int) -> bool:
        """Whether the drafter's head has a row for this token of the target."""
        return 0 <= token_id < len(self._head_VD)

    def widened(self, logits_V: Tensor) -> Tensor:
        """Pads logits to the target's vocabulary. Tokens without a row get a logit so low that they are not drafted."""
        return F.pad(logits_V.float(), (0, self._num_lacking), value=_MASKED_LOGIT) if self._num_lacking else logits_V

    def narrowed(self, probs_NV: Tensor) -> Tensor:
        """Turns the target's distributions [N, V] into labels: 0 for tokens without a row, the rest renormalised."""
        if not self._num_lacking:
            return probs_NV
        known_NV = probs_NV[..., : len(self._head_VD)]
        return F.pad(known_NV / known_NV.sum(-1, keepdim=True), (0, self._num_lacking))

    # --- choosing, internal -------------------------------------------------------------------------------------

    def _choose(self, weights_V: Counts) -> DraftTokens:
        """Returns the tokens with the largest weights, or the fixed set. Copies rows of the head only for a new set."""
        chosen = self._fixed if self._fixed is not None else self._heaviest(weights_V)
        if self._chosen is not None and np.array_equal(chosen, self._chosen.draft_to_target):
            return self._chosen
        chosen_S = to_device(chosen, self._head_VD.device)
        head_SD = self._head_VD[chosen_S]
        labels_SD = head_SD if self._labels_VD is self._head_VD else self._labels_VD[chosen_S]
        return DraftTokens(chosen, chosen_S, head_SD, labels_SD, self._make_linear)

    def _heaviest(self, weights_V: Counts) -> Ids:
        known_V = weights_V[: len(self._unseen_V)] + self._unseen_V
        return np.sort(np.argpartition(-known_V, self._size - 1)[: self._size])


def _checked(token_ids: Sequence[int], num_rows: int) -> Ids:
    ids = np.unique(np.array(token_ids, dtype=np.int64))
    if not len(ids) or ids[0] < 0 or ids[-1] >= num_rows:
        ends = f"{ids[0]} to {ids[-1]}" if len(ids) else "none"
        raise ValueError(f"draft tokens are {ends}; give some of 0 to {num_rows - 1}, for which the head has rows")
    return ids
