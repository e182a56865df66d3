"""What losses guarantee: from a mean KL or cross-entropy to the least acceptance length it allows. Pure arithmetic."""

from __future__ import annotations

import math


def acceptance_length_at(distance: float, num_draft_tokens: int) -> float:
    """Tokens per step if each drafted token is kept with probability 1 - distance: sum_j (1 - distance)^j, j = 0..K.

    Convex and decreasing, so that at a mean distance it bounds the mean from below.

    >>> acceptance_length_at(0.5, 2)
    1.75
    """
    return math.fsum((1 - distance) ** j for j in range(num_draft_tokens + 1))


def distance_bound(kl: float) -> float:
    """The most total variation that a mean KL allows: the lower of Pinsker's bound and Bretagnolle and Huber's.

    >>> distance_bound(0.0), distance_bound(0.02), distance_bound(50.0)
    (0.0, 0.1, 1.0)
    """
    if math.isnan(kl):
        return 1.0
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl))) if kl > 0 else 0.0


def coupled_distance(distance: float) -> float:
    """The largest share of sampled drafts that can differ from the target's token where both take the best of their own
    scores and the same Gumbel noise, from the total variation between their rows: 1 - (1 - d) / (1 + d).

    Concave and increasing, so that at a mean distance it bounds the mean from above.

    >>> coupled_distance(0.0), coupled_distance(0.25), coupled_distance(1.0)
    (0.0, 0.4, 1.0)

    Reference: arXiv:2408.07978.
    """
    return 2 * distance / (1 + distance)


def greedy_distance_bound(token_loss: float) -> float:
    """The largest share of greedy drafts that can differ from the target's token, from that token's mean cross-entropy.

    A draft's likeliest token is another one only if the right one has at most half its probability; then 1 is at most
    2 (1 - probability), and the mean of 1 - exp(-loss) is at most that of the mean loss.

    >>> greedy_distance_bound(math.log(4 / 3)), greedy_distance_bound(3.0)
    (0.5, 1.0)
    """
    return min(1.0, -2 * math.expm1(-token_loss))
