"""A drafter's working vocabulary: the tokens seen lately, and a head for these alone.

The head is the largest product of a draft and of its learning, and most of its rows are for tokens that this traffic
never uses. FR-Spec (arXiv:2502.14856) drafts with the rows of the tokens most frequent in a corpus; here they follow
the stream, prompts included, so that a change of domain brings its own. On Spider, GSM8K and CodeSearchNet 1,024 of
4,096 tokens covered 96 to 99 % of what the demo target answered, and what they miss is what a drafter would hardly have
guessed.

For greedy requests: a token that is left out costs a draft and never exactness. A sampled answer would follow the same
law, but its tokens would hang on what was served before, and a seed promises the same ones.

Axis letters: N rows, S tokens of the list, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onlinespec.models.linear import FrozenProduct, MakeLinear

_LEAST_SIZE = 1024
_SHARE = 16  # of the vocabulary one token in so many, once that is more
_DECAY = 0.95  # of counts, from one request to the next


class Listed(NamedTuple):
    """The tokens of a list, in the order of their ids, and their rows of the head."""

    token_ids_S: Tensor
    head: FrozenProduct

    def columns(self, token_ids_N: Tensor) -> Tensor | None:
        """Where in the list each token is; None unless all of them are there."""
        columns_N = torch.searchsorted(self.token_ids_S, token_ids_N).clamp_max(len(self.token_ids_S) - 1)
        return columns_N if torch.equal(self.token_ids_S[columns_N], token_ids_N) else None


class Shortlist:
    """The tokens that weigh most in a decaying count of what was seen.

    Args:
        size: How many tokens; by default 1,024 or a sixteenth of the vocabulary.
    """

    def __init__(self, head_VD: Tensor, make_linear: MakeLinear, size: int | None = None) -> None:
        self._head_VD, self._make_linear = head_VD, make_linear
        V = len(head_VD)
        self._size = min(V, size or max(_LEAST_SIZE, V // _SHARE))
        # Among unseen tokens the low ids come first: byte-pair vocabularies are numbered by how frequent a token is.
        self._unseen_V = torch.linspace(1e-6, 0, V, dtype=torch.float64)
        self._counts_V = torch.zeros(V, dtype=torch.float64)
        self._now: Listed | None = None

    @property
    def now(self) -> Listed:
        """The list as it was last chosen."""
        return self._now or self.choose()

    def note(self, token_ids: Sequence[int] | Tensor) -> None:
        """These tokens were seen."""
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu")
        self._counts_V.index_put_((ids,), torch.ones((), dtype=torch.float64), accumulate=True)

    def age(self) -> None:
        """One more request: what was seen before weighs less."""
        self._counts_V *= _DECAY

    def choose(self) -> Listed:
        """Chooses anew. Rows of the head are copied only if the choice changed."""
        chosen_S = (self._counts_V + self._unseen_V).topk(self._size).indices.sort().values.to(self._head_VD.device)
        if self._now is None or not torch.equal(chosen_S, self._now.token_ids_S):
            self._now = Listed(chosen_S, FrozenProduct(self._head_VD[chosen_S], self._make_linear))
        return self._now
