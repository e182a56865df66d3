"""The tokens that a drafter may propose, and a head for these alone.

The head is the largest product of a draft and of its learning, and most of its rows are for tokens that this traffic
never uses. FR-Spec (arXiv:2502.14856) drafts with the rows of the tokens most frequent in a corpus; here they follow
the traffic, prompts included, so that a change of domain brings its own. On Spider, GSM8K and CodeSearchNet 1,024 of
4,096 tokens covered 96 to 99 % of what the demo target answered, and what they miss is what a drafter would hardly have
guessed. A drafter that was trained with a vocabulary of its own (EAGLE-3) keeps that one.

A token that is left out costs a draft and never exactness, nor the text that a seed gives: the target chooses from its
whole vocabulary.

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
_SHARE = 16  # of the vocabulary one token in so many, once that is more
_COLD = 2  # times as many tokens as there are draft tokens must have been seen
_DECAY = 0.95  # of counts, from one request to the next
_NEVER = -1e30  # below every score, and finite: a label of 0 times it is 0 and not NaN


def draft_vocab_size(vocab_size: int) -> int:
    """Tokens of a draft vocabulary, if its maker does not say."""
    return max(_LEAST_SIZE, vocab_size // _SHARE)


class DraftTokens:
    """A choice of tokens in the order of their ids, and their rows of the head; never changes.

    Args:
        draft_to_target: The target's ids of the tokens, on the host; `draft_to_target_S` on the device.
        labels_SD: Their rows of the target's head.
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
        self.head = FrozenProduct(head_SD, make_linear)  # as drafts are made
        self._labels_SD = labels_SD

    def target_logits(self, states_ND: Tensor) -> Tensor:
        """What the target says of these tokens, in full precision, float32 [N, S]."""
        return F.linear(states_ND, self._labels_SD).float()

    def target_to_draft(self, token_ids: Sequence[int]) -> Ids | None:
        """Where among these tokens each of the target's is; None unless all of them are there."""
        places = np.searchsorted(self.draft_to_target, token_ids).clip(max=len(self.draft_to_target) - 1)
        return places if np.array_equal(self.draft_to_target[places], token_ids) else None


class DraftVocab:
    """Chooses what to draft from: the tokens that weigh most in a decaying count of the traffic, or ever the same ones.

    Args:
        head_VD: The drafter's. Where the target has more tokens than rows here, those are never chosen, nor drafted.
        tokens: How many tokens, or which ones for good; by default 1,024 or a sixteenth of the vocabulary.
        labels_VD: The target's head, where it is another.

    Raises:
        ValueError: for no tokens at all, or one that the head has no row for.
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
        self._num_lacking = len(self._labels_VD) - V  # tokens of the target that there is no row for
        self._fixed = None if tokens is None or isinstance(tokens, int) else _checked(tokens, V)
        size = tokens if isinstance(tokens, int) else draft_vocab_size(V)
        if size < 1:
            raise ValueError(f"a draft vocabulary of {size} tokens can't be drafted from; it must have at least 1")
        self._size = min(V, size)
        # Among unseen tokens the low ids come first: byte-pair vocabularies are numbered by how frequent a token is.
        self._unseen_V = np.linspace(1e-6, 0, V)
        self._counts_V = np.zeros(len(self._labels_VD))
        self._uncounted: list[int] = []  # tokens that `_counts_V` does not have yet
        self._num_seen = 0
        self._chosen: DraftTokens | None = None
        self._is_stale = True

    # --- what to draft from -------------------------------------------------------------------------------------

    @property
    def is_cold(self) -> bool:
        """Whether too little was seen for a choice to stand for the traffic: drafts had better take all tokens."""
        return self._fixed is None and self._num_seen < _COLD * self._size

    @property
    def now(self) -> DraftTokens:
        """What to draft from: chosen as the newest request began. Work is done only when asked for."""
        if self._is_stale or self._chosen is None:
            self.settle()
            self._chosen, self._is_stale = self._choose(self._counts_V), False
        return self._chosen

    def holding(self, token_ids: Sequence[int]) -> DraftTokens:
        """A choice of the same size with these tokens before all others; what is drafted from stays as it is."""
        now = self.now
        if self._fixed is not None or now.target_to_draft(token_ids) is not None:
            return now
        self.settle()
        weights_V = self._counts_V.copy()
        weights_V[token_ids] = np.inf
        return self._choose(weights_V)

    @cached_property
    def whole(self) -> Linear:
        """The head for the whole vocabulary; made when a cold start, or a batch that a choice can't hold, asks."""
        product = FrozenProduct(self._head_VD, self._make_linear)
        return (lambda x_ND: self.widened(product(x_ND))) if self._num_lacking else product

    @property
    def dtype(self) -> torch.dtype:
        """Of the states that its heads take."""
        return self._head_VD.dtype

    def use_head(self, head_VD: Tensor) -> None:
        """Another head for the same tokens: a drafter's whose head learns."""
        self._head_VD, self._chosen = head_VD, None
        self.__dict__.pop("whole", None)

    # --- what traffic has ---------------------------------------------------------------------------------------

    def begin_request(self, prompt_ids: Sequence[int]) -> None:
        """One more request: what was seen before weighs less, and tokens are chosen anew."""
        self.settle()
        self._counts_V *= _DECAY
        self.observe_tokens(prompt_ids)
        self._is_stale = True

    def observe_tokens(self, token_ids: Sequence[int]) -> None:
        """These tokens were seen. They are counted when it matters: every step comes here."""
        self._num_seen += len(token_ids)
        self._uncounted.extend(token_ids)

    def settle(self) -> None:
        """Counts what was observed, so that nothing but counts is kept."""
        np.add.at(self._counts_V, np.array(self._uncounted, dtype=np.int64), 1.0)
        self._uncounted = []

    def saved(self) -> list[int]:
        """The tokens that traffic has brought so far, for the drafter's files: none while that is too little."""
        return [] if self.is_cold or self._fixed is not None else self.now.draft_to_target.tolist()

    def restore(self, token_ids: Sequence[int]) -> None:
        """Begins with tokens from `saved`, as if each had been seen twice; those that there is no row for are left out.

        More traffic soon outweighs them.
        """
        known = [i for i in token_ids if self.has_row(i)]
        self.observe_tokens(known * _COLD)
        self._is_stale = True

    # --- tokens without a row -----------------------------------------------------------------------------------

    def has_row(self, token_id: int) -> bool:
        """Whether the drafter's head has a row for one of the target's tokens."""
        return 0 <= token_id < len(self._head_VD)

    def widened(self, logits_V: Tensor) -> Tensor:
        """Logits over the target's vocabulary: tokens that there is no row for score so low that none is ever drafted,
        whatever noise is added."""
        return F.pad(logits_V.float(), (0, self._num_lacking), value=_NEVER) if self._num_lacking else logits_V

    def narrowed(self, probs_NV: Tensor) -> Tensor:
        """The target's rows with nothing on tokens that can't be drafted, and the rest made whole: labels."""
        if not self._num_lacking:
            return probs_NV
        known_NV = probs_NV[..., : len(self._head_VD)]
        return F.pad(known_NV / known_NV.sum(-1, keepdim=True), (0, self._num_lacking))

    # --- inside -------------------------------------------------------------------------------------------------

    def _choose(self, weights_V: Counts) -> DraftTokens:
        """Rows of the head are copied only if the choice differs from the last one."""
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
