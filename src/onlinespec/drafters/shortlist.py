"""A drafter's working vocabulary: the tokens seen lately, and a head for these alone.

The head is the largest product of a draft, and most of its rows are for tokens that this traffic never uses. FR-Spec
(arXiv:2502.14856) keeps the rows of the tokens most frequent in a corpus; here they follow the stream, prompts
included, so that a change of domain brings its own. On Spider, GSM8K and CodeSearchNet 1,024 of 4,096 tokens covered
96 to 99 % of what the demo target answered, and what they miss is what a drafter would hardly have guessed.

For greedy drafts: a token that is left out costs a draft and never exactness. A sampled answer would follow the same
law, but its tokens would hang on what was served before, and a seed promises the same ones.

Axis letters: N rows, S tokens of the list, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onlinespec.models.linear import MakeLinear

_LEAST_SIZE = 1024
_SHARE = 16  # of the vocabulary one token in so many, once that is more
_DECAY = 0.95  # of counts, from one request to the next


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
        self._token_ids_S = torch.empty(0, dtype=torch.int64)
        self.refresh()

    def note(self, token_ids: Sequence[int]) -> None:
        """These tokens were seen."""
        ids = torch.tensor(token_ids, dtype=torch.int64)
        self._counts_V.index_put_((ids,), torch.ones((), dtype=torch.float64), accumulate=True)

    def refresh(self) -> None:
        """Chooses again, as a request begins. Rows of the head are copied only if the choice changed."""
        chosen_S = (self._counts_V + self._unseen_V).topk(self._size).indices.sort().values.to(self._head_VD.device)
        if not torch.equal(chosen_S, self._token_ids_S):
            self._token_ids_S = chosen_S
            self._product = self._make_linear(self._head_VD[chosen_S], None)
        self._counts_V *= _DECAY

    def best(self, states_ND: Tensor) -> Tensor:
        """The likeliest listed token [N] after each state."""
        return self._token_ids_S[self._product(states_ND.to(self._head_VD.dtype)).argmax(-1)]
