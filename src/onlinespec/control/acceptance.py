"""A running estimate of how likely drafted tokens are to be accepted, by position and by request.

It counts outcomes of verification: the tokens of a draft that were kept, and whether one after them was rejected. It is
deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


class Acceptance:
    """Estimates P(position kept | position reached), pooled over requests, and a factor of misses for each request.

    Counts at each position decay over some hundred steps. A position that was rarely reached takes the estimate of the
    position before it as a prior, so that an accepted drafter may try deeper drafts. If outcomes depart from the
    estimate by more than chance, old counts are dropped at once.

    A request misses `factor` times as often as the pool, at all positions. The factor is its misses over its expected
    misses, shrunk towards 1 by a pseudo-count; of three pseudo-counts the one with the best recent log-loss is used.
    """

    _FADING = 1 - 1 / 256  # decay of counts, per step that drafts
    _FIRST = 0.6  # prior of the first position ...
    _LEAN = 3.0  # ... and weight of a position's prior, in tokens
    _LEAST, _MOST = 0.01, 0.99

    _FAST = 1 - 1 / 16  # decay of the sum of surprises, per step that drafts
    _ALARM = 3.5  # standard deviations
    _LATELY = 1 - 1 / 8  # decay of the recent counts that replace the others after an alarm ...
    _KEPT_AFTER_ALARM = 4.0  # ... worth at most this many tokens at each position ...
    _FADING_AFTER_ALARM = 0.25  # ... and this share of each request's counts

    _REQUEST_FADING = 1 - 1 / 64  # decay of a request's counts, per token of its own ...
    _IDLE_FADING = 1 - 1 / 512  # ... or per step in which it drafts nothing, so that it is tried again
    _SHRINKAGES = (6.0, 24.0, 1e4)  # pseudo-counts in tokens; the last treats all requests alike
    _LOSS_FADING = 1 - 1 / 512  # decay of the log-losses, per token
    _EVIDENCE = 3.0  # nats by which telling requests apart must be better

    def __init__(self, max_draft_tokens: int) -> None:
        self._kept, self._reached = [0.0] * max_draft_tokens, [0.0] * max_draft_tokens
        self._lately_kept, self._lately_reached = self._kept.copy(), self._kept.copy()
        self._requests: dict[Hashable, _Misses] = {}
        self._losses = [0.0] * len(self._SHRINKAGES)  # log-loss of each pseudo-count, in nats
        self._surprise = self._surprise_variance = 0.0
        self.probs = [0.0] * max_draft_tokens  # the pooled estimate, by position
        self._estimate()

    def survival(self, request_id: Hashable, depth: int) -> list[float]:
        """Returns P(the first k tokens are kept) for k from 1 to depth."""
        miss_factor, survival, kept = self._factor(request_id), [], 1.0
        for prob in self.probs[:depth]:
            kept *= min(max(1 - miss_factor * (1 - prob), self._LEAST), self._MOST)
            survival.append(kept)
        return survival

    def observe(
        self, request_ids: Sequence[Hashable], num_draft_tokens_B: Iterable[int], num_accepted_B: Iterable[int]
    ) -> bool:
        """Updates the estimate with the outcome of a step.

        Returns:
            Whether the outcomes were so unlikely that old counts were dropped.
        """
        rows = list(zip(request_ids, num_draft_tokens_B, num_accepted_B, strict=True))
        self._kept = [self._FADING * count for count in self._kept]
        self._reached = [self._FADING * count for count in self._reached]
        self._lately_kept = [self._LATELY * count for count in self._lately_kept]
        self._lately_reached = [self._LATELY * count for count in self._lately_reached]
        self._surprise *= self._FAST
        self._surprise_variance *= self._FAST**2
        for request_id, num_drafted, num_accepted in rows:
            if num_drafted:
                self._observe_request(request_id, num_accepted, is_refused=num_drafted > num_accepted)
            elif request_id in self._requests:
                self._requests[request_id].fade(self._IDLE_FADING)
        is_alarm = abs(self._surprise) > self._ALARM * math.sqrt(self._surprise_variance + 0.25)
        if is_alarm:
            self._kept, self._reached = self._lately_kept.copy(), self._lately_reached.copy()
            self.discount(self._KEPT_AFTER_ALARM)
            for request in self._requests.values():
                request.fade(self._FADING_AFTER_ALARM)
            self._surprise = self._surprise_variance = 0.0
        self._estimate()
        return is_alarm

    def discount(self, num_tokens: float) -> None:
        """Keeps the estimate, but scales the counts down to at most this many tokens at each position."""
        for position, reached in enumerate(self._reached):
            if reached > num_tokens:
                self._kept[position] *= num_tokens / reached
                self._reached[position] = num_tokens
        self._lately_kept, self._lately_reached = [0.0] * len(self.probs), [0.0] * len(self.probs)

    def forget(self, request_id: Hashable) -> None:
        """Drops the counts of a request that has ended."""
        self._requests.pop(request_id, None)

    def _observe_request(self, request_id: Hashable, num_accepted: int, is_refused: bool) -> None:
        request = self._requests.setdefault(request_id, _Misses())
        factors = [self._shrunk(request, shrinkage) for shrinkage in self._SHRINKAGES]
        best, fading = self._best_shrinkage, self._LOSS_FADING
        for position in range(num_accepted + is_refused):
            is_kept = position < num_accepted
            self._kept[position] += is_kept
            self._reached[position] += 1
            self._lately_kept[position] += is_kept
            self._lately_reached[position] += 1
            miss_prob = 1 - self.probs[position]
            predicted = [min(max(1 - factor * miss_prob, self._LEAST), self._MOST) for factor in factors]
            self._losses = [
                fading * loss - math.log(prob if is_kept else 1 - prob)
                for loss, prob in zip(self._losses, predicted, strict=True)
            ]
            self._surprise += is_kept - predicted[best]
            self._surprise_variance += predicted[best] * (1 - predicted[best])
            request.fade(self._REQUEST_FADING)
            request.missed += not is_kept
            request.expected += miss_prob

    @property
    def _best_shrinkage(self) -> int:
        *told_apart, alike = self._losses
        best = min(told_apart)
        return told_apart.index(best) if best < alike - self._EVIDENCE else len(told_apart)

    def _factor(self, request_id: Hashable) -> float:
        request = self._requests.get(request_id)
        return self._shrunk(request, self._SHRINKAGES[self._best_shrinkage]) if request else 1.0

    def _shrunk(self, request: _Misses, num_tokens: float) -> float:
        imagined = num_tokens * max(1 - self.probs[0], 0.05)
        return (request.missed + imagined) / (request.expected + imagined)

    def _estimate(self) -> None:
        before = self._FIRST
        for position, (kept, reached) in enumerate(zip(self._kept, self._reached, strict=True)):
            before = (kept + self._LEAN * before) / (reached + self._LEAN)
            self.probs[position] = before


@dataclass
class _Misses:
    """One request's rejected tokens, and the number that the pooled estimate expected. Both decay."""

    missed: float = 0.0
    expected: float = 0.0

    def fade(self, rate: float) -> None:
        self.missed *= rate
        self.expected *= rate
