"""Bounds: the minimum acceptance length that a mean KL or cross-entropy guarantees. Pure arithmetic."""

from __future__ import annotations

import math


def acceptance_length_at(distance: float, num_draft_tokens: int) -> float:
    """Returns the acceptance length if each draft is kept with probability 1 - distance: sum_j (1 - distance)^j, j =
    0..K.

    It is convex and decreasing, so its value at a mean distance bounds the mean from below.

    >>> acceptance_length_at(0.5, 2)
    1.75
    """
    return math.fsum((1 - distance) ** j for j in range(num_draft_tokens + 1))


def distance_bound(kl: float) -> float:
    """Returns the maximum total variation for a mean KL, in nats: the lower of the bounds of Pinsker and
    Bretagnolle-Huber.

    >>> distance_bound(0.0), distance_bound(0.02), distance_bound(50.0)
    (0.0, 0.1, 1.0)
    """
    if math.isnan(kl):
        return 1.0
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl))) if kl > 0 else 0.0


def coupled_distance(distance: float) -> float:
    """Returns the maximum share of coupled drafts that differ from the target's token, at a total variation d between
    the two distributions: 1 - (1 - d) / (1 + d).

    It is concave and increasing, so its value at a mean distance bounds the mean from above.

    >>> coupled_distance(0.0), coupled_distance(0.25), coupled_distance(1.0)
    (0.0, 0.4, 1.0)

    Reference: arXiv:2408.07978.
    """
    return 2 * distance / (1 + distance)


def greedy_distance_bound(token_loss: float) -> float:
    """Returns the maximum share of greedy drafts that differ from the target's token, at its mean cross-entropy in
    nats.

    If the draft is another token, the target's has a draft probability of at most 1/2, so the indicator of a difference
    is at most 2 (1 - probability) = 2 (1 - exp(-loss)), which is concave in the loss.

    >>> greedy_distance_bound(math.log(4 / 3)), greedy_distance_bound(3.0)
    (0.5, 1.0)
    """
    return min(1.0, -2 * math.expm1(-token_loss))
