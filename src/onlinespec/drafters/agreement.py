"""Agreement: whether given drafter weights would have drafted the token that was committed.

The sampling noise that chose the token is replayed, so the answer is exact for greedy and for sampled requests.

Axis letters: E sets of weights, N verified positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onlinespec.host import to_host
from onlinespec.learners.losses import TargetRows
from onlinespec.lossless.noise import gumbel_rows


def agrees(draft_logits_ENV: Tensor, target: TargetRows) -> Tensor:
    """Returns whether the argmax of logits / temperature + noise is the committed token; bool [E, N], or [N].

    False for a row whose largest logit is not finite.

    Args:
        draft_logits_ENV: Drafted logits of one set of weights [N, V], or of several [E, N, V]. Logits over a draft
            vocabulary are allowed only if all requests are greedy.
        target: The target's rows; its token ids index the logits.

    >>> logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> rows = TargetRows(torch.eye(2), torch.tensor([1, 1]), torch.tensor([0.0, 0.0]))
    >>> agrees(logits, rows).tolist()
    [True, False]
    """
    is_usable_EN = draft_logits_ENV.amax(-1).isfinite()  # -inf is allowed for single tokens
    scores_ENV, noise_NV = draft_logits_ENV, _noise(target, draft_logits_ENV.shape[-1])
    if noise_NV is not None:
        temperatures_N1 = torch.where(target.temperatures_N > 0, target.temperatures_N, 1.0)[:, None]
        scores_ENV = scores_ENV / temperatures_N1 + noise_NV
    return (scores_ENV.argmax(-1) == target.token_ids_N) & is_usable_EN


def _noise(target: TargetRows, vocab_size: int) -> Tensor | None:
    """Returns the noise that was added to the target's scores, float64 [N, V]; None if all rows are greedy."""
    keys_N3 = target.noise_keys_N3
    if keys_N3 is None:
        return None
    temperatures, keys = to_host(target.temperatures_N, keys_N3)
    if not any(temperatures):
        return None
    sampled = [i for i, temperature in enumerate(temperatures) if temperature]
    noise_NV = torch.zeros(len(keys), vocab_size, dtype=torch.float64, device=keys_N3.device)
    noise_NV[sampled] = gumbel_rows([tuple(keys[i]) for i in sampled], vocab_size).to(keys_N3.device)
    return noise_NV
