"""A drafter's working vocabulary: the tokens seen lately, and a head for these alone.

The head is the largest product of a draft and of its learning, and most of its rows are for tokens that this traffic
never uses. FR-Spec (arXiv:2502.14856) drafts with the rows of the tokens most frequent in a corpus; here they follow
the stream, prompts included, so that a change of domain brings its own. On Spider, GSM8K and CodeSearchNet 1,024 of
4,096 tokens covered 96 to 99 % of what the demo target answered, and what they miss is what a drafter would hardly have
guessed.

A token that is left out costs a draft and never exactness, nor the text that a seed gives: the target chooses from its
whole vocabulary.

Axis letters: N rows, S tokens of the list, V vocabulary, D hidden size.
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
_COLD = 2  # times as many tokens as the list holds must have been seen
_DECAY = 0.95  # of counts, from one request to the next
_NEVER = -1e30  # below every score, and finite: a label of 0 times it is 0 and not NaN


def list_size(vocab_size: int) -> int:
    """Tokens on a list, if its maker does not say."""
    return max(_LEAST_SIZE, vocab_size // _SHARE)


class Listed:
    """The tokens of a list, in the order of their ids, and their rows of the head; never changes.

    Args:
        token_ids: On the host, and `token_ids_S` on the device.
    """

    def __init__(
        self, token_ids: Ids, token_ids_S: Tensor, head_SD: Tensor, labels_SD: Tensor, make_linear: MakeLinear
    ) -> None:
        self.token_ids, self.token_ids_S = token_ids, token_ids_S
        self.head = FrozenProduct(head_SD, make_linear)  # as drafts are made
        self._labels_SD = labels_SD

    def target_logits(self, states_ND: Tensor) -> Tensor:
        """What the target says of the listed tokens, in full precision, float32 [N, S]."""
        return F.linear(states_ND, self._labels_SD).float()

    def columns(self, token_ids: Sequence[int]) -> Ids | None:
        """Where in the list each token is; None unless all of them are there."""
        columns = np.searchsorted(self.token_ids, token_ids).clip(max=len(self.token_ids) - 1)
        return columns if np.array_equal(self.token_ids[columns], token_ids) else None


class Shortlist:
    """The tokens that weigh most in a decaying count of what was seen.

    Args:
        head_VD: The drafter's. Where the target has more tokens than rows here, those are never listed, nor drafted.
        size: How many tokens; by default 1,024 or a sixteenth of the vocabulary.
        labels_VD: The target's head, where it is another.
    """

    def __init__(
        self, head_VD: Tensor, make_linear: MakeLinear, size: int | None = None, labels_VD: Tensor | None = None
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"a shortlist of {size} tokens can't be drafted from; it must have at least 1")
        self._head_VD, self._make_linear = head_VD, make_linear
        self._labels_VD = head_VD if labels_VD is None else labels_VD
        V = len(head_VD)
        self._num_lacking = len(self._labels_VD) - V  # tokens of the target that there is no row for
        self._size = min(V, size or list_size(V))
        # Among unseen tokens the low ids come first: byte-pair vocabularies are numbered by how frequent a token is.
        self._unseen_V = np.linspace(1e-6, 0, V)
        self._counts_V = np.zeros(len(self._labels_VD))
        self._noted: list[int] = []  # tokens that `_counts_V` does not have yet
        self._num_seen = 0
        self._chosen: Listed | None = None
        self._is_stale = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the states that its heads take."""
        return self._head_VD.dtype

    @cached_property
    def whole(self) -> Linear:
        """The head for the whole vocabulary; made when a cold list, or a batch that the list can't hold, asks."""
        product = FrozenProduct(self._head_VD, self._make_linear)
        return (lambda x_ND: self.widened(product(x_ND))) if self._num_lacking else product

    def widened(self, logits_V: Tensor) -> Tensor:
        """Logits over the target's vocabulary: tokens that there is no row for score so low that none is ever drafted,
        whatever noise is added."""
        return F.pad(logits_V.float(), (0, self._num_lacking), value=_NEVER) if self._num_lacking else logits_V

    def can_draft(self, token_id: int) -> bool:
        """Whether there is a row for one of the target's tokens."""
        return token_id < len(self._head_VD)

    def narrowed(self, probs_NV: Tensor) -> Tensor:
        """The target's rows with nothing on tokens that can't be drafted, and the rest made whole: labels."""
        if not self._num_lacking:
            return probs_NV
        known_NV = probs_NV[..., : len(self._head_VD)]
        return F.pad(known_NV / known_NV.sum(-1, keepdim=True), (0, self._num_lacking))

    def use(self, head_VD: Tensor) -> None:
        """Another head for the same tokens: a drafter's whose head learns."""
        self._head_VD, self._chosen = head_VD, None
        self.__dict__.pop("whole", None)

    @property
    def is_cold(self) -> bool:
        """Whether too little was seen for a list to stand for the traffic: drafts had better choose from all tokens."""
        return self._num_seen < _COLD * self._size

    @property
    def now(self) -> Listed:
        """What to draft from: chosen as the newest request began. Work is done only when asked for."""
        if self._is_stale or self._chosen is None:
            self.settle()
            self._chosen, self._is_stale = self._choose(self._counts_V), False
        return self._chosen

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """One more request: what was seen before weighs less, and the list is chosen anew."""
        self.settle()
        self._counts_V *= _DECAY
        self.note(prompt_ids)
        self._is_stale = True

    def note(self, token_ids: Sequence[int]) -> None:
        """These tokens were seen. They are counted when it matters: every step comes here."""
        self._num_seen += len(token_ids)
        self._noted.extend(token_ids)

    def settle(self) -> None:
        """Counts what was noted, so that nothing but counts is kept."""
        np.add.at(self._counts_V, np.array(self._noted, dtype=np.int64), 1.0)
        self._noted = []

    def holding(self, token_ids: Sequence[int]) -> Listed:
        """A list of the same size with these tokens on it before all others; what is drafted from stays as it is."""
        listed = self.now
        if listed.columns(token_ids) is not None:
            return listed
        self.settle()
        weights_V = self._counts_V.copy()
        weights_V[token_ids] = np.inf
        return self._choose(weights_V)

    def _choose(self, weights_V: Counts) -> Listed:
        """Rows of the head are copied only if the choice differs from the last one."""
        known_V = weights_V[: len(self._unseen_V)] + self._unseen_V
        order_V = np.argpartition(-known_V, self._size - 1)
        chosen = np.sort(order_V[: self._size])
        if self._chosen is not None and np.array_equal(chosen, self._chosen.token_ids):
            return self._chosen
        chosen_S = to_device(chosen, self._head_VD.device)
        head_SD = self._head_VD[chosen_S]
        labels_SD = head_SD if self._labels_VD is self._head_VD else self._labels_VD[chosen_S]
        return Listed(chosen, chosen_S, head_SD, labels_SD, self._make_linear)
