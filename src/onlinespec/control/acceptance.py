"""How likely the next drafted tokens are to be kept: a running estimate, by position and by request.

Deterministic. Counted, not estimated: of a step's draft it uses the tokens that were kept, and whether one was refused
behind them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


class Acceptance:
    """P(position kept | position reached), pooled over requests, and how much oftener each request misses.

    Counts at each position fade over some hundred steps. A position that was not reached lately leans on the one
    before it, so a drafter that is accepted gets to try a deeper draft, and one that fails there is soon believed.
    When what is seen departs from what was expected by more than chance, old counts are forgotten at once.

    A request misses `factor` times as often as the pool, at all positions alike: misses over expected misses, shrunk
    towards 1 by as many imagined tokens as have foretold best, lately, how requests differ.
    """

    _FADING = 1 - 1 / 256  # by a step that drafts
    _FIRST = 0.6  # at the first position, before anything is known ...
    _LEAN = 3.0  # ... and on the position before it: in tokens
    _LEAST, _MOST = 0.01, 0.99

    _FAST = 1 - 1 / 16  # of surprises, by a step that drafts
    _ALARM = 3.5  # standard deviations
    _LATELY = 1 - 1 / 8  # counts, by a step that drafts, that an alarm starts from ...
    _KEPT_AFTER_ALARM = 4.0  # ... as so many tokens at each position ...
    _FADING_AFTER_ALARM = 0.25  # ... beside this share of a request's counts

    _REQUEST_FADING = 1 - 1 / 64  # of a request's counts, by a token of its own ...
    _IDLE_FADING = 1 - 1 / 512  # ... or by a step in which it drafts nothing, so that it is tried again
    _SHRINKAGES = (6.0, 24.0, 1e4)  # tokens; the last: all requests are alike
    _LOSS_FADING = 1 - 1 / 512  # by a token
    _EVIDENCE = 3.0  # nats, before requests are told apart

    def __init__(self, max_draft_tokens: int) -> None:
        self._kept, self._reached = [0.0] * max_draft_tokens, [0.0] * max_draft_tokens
        self._lately_kept, self._lately_reached = self._kept.copy(), self._kept.copy()
        self._requests: dict[Hashable, _Misses] = {}
        self._losses = [0.0] * len(self._SHRINKAGES)  # of each shrinkage, in nats
        self._surprise = self._surprise_variance = 0.0
        self.probs = [0.0] * max_draft_tokens  # the pool's, by position
        self._estimate()

    def survival(self, request_id: Hashable, depth: int) -> list[float]:
        """P(the first k tokens are kept) for k from 1 to depth."""
        miss_factor, survival, kept = self._factor(request_id), [], 1.0
        for prob in self.probs[:depth]:
            kept *= min(max(1 - miss_factor * (1 - prob), self._LEAST), self._MOST)
            survival.append(kept)
        return survival

    def observe(
        self, request_ids: Sequence[Hashable], num_draft_tokens_B: Iterable[int], num_accepted_B: Iterable[int]
    ) -> bool:
        """Hears what became of a step's drafts.

        Returns:
            Whether that came as such a surprise that most of what was believed is forgotten.
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
        """Keeps what is believed, but no more firmly than so many tokens at each position would make it believed."""
        for position, reached in enumerate(self._reached):
            if reached > num_tokens:
                self._kept[position] *= num_tokens / reached
                self._reached[position] = num_tokens
        self._lately_kept, self._lately_reached = [0.0] * len(self.probs), [0.0] * len(self.probs)

    def forget(self, request_id: Hashable) -> None:
        """The request is over."""
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
            foretold = [min(max(1 - factor * miss_prob, self._LEAST), self._MOST) for factor in factors]
            self._losses = [
                fading * loss - math.log(prob if is_kept else 1 - prob)
                for loss, prob in zip(self._losses, foretold, strict=True)
            ]
            self._surprise += is_kept - foretold[best]
            self._surprise_variance += foretold[best] * (1 - foretold[best])
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
    """One request's refused tokens, and how many the pool would have had in its place; both fade."""

    missed: float = 0.0
    expected: float = 0.0

    def fade(self, rate: float) -> None:
        self.missed *= rate
        self.expected *= rate
