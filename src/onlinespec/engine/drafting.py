"""The engine's calls of the drafter: start, propose, observe, release.

Axis letters: B requests, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch

from onlinespec.core import Draft, Features
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.request import Request
from onlinespec.lossless.noise import StepNoise
from onlinespec.models.loading import Target

log = logging.getLogger(__name__)


class Drafting:
    """Calls the drafter for those requests of a step that it has state for. Without a drafter, drafts are empty.

    Args:
        gives_probs: Whether drafts must carry their distributions (`Draft.probs_BKV`), as the rejection rule needs.
    """

    def __init__(self, target: Target, drafter: Drafter | None, gives_probs: bool = False) -> None:
        self._target, self._drafter = target, drafter
        self._has_said_where_drafts_end = False
        if drafter:
            drafter.gives_probs = gives_probs

    def follow(self, request: Request) -> None:
        """Starts a request in the drafter, with its text so far. Raises whatever the drafter raises."""
        if not self._drafter or request.is_plain:
            return
        trace = request.trace
        try:
            self._drafter.start(request.slot, request.info, trace.token_ids, trace.features[: trace.num_features])
        except BaseException:
            with suppress(Exception):  # free what `start` took before it failed
                self._drafter.release(request.slot, is_finished=False)
            raise
        request.is_drafting = True

    def leave(self, request: Request) -> None:
        """Releases a request in the drafter, if it was started there."""
        if self._drafter and request.is_drafting:
            request.is_drafting = False
            self._drafter.release(request.slot, is_finished=request.has_ended_by_itself)

    def counts(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None) -> list[int]:
        """Returns how many tokens to draft for each request: as given, but at most `Request.most_draft_tokens`.

        Args:
            num_draft_tokens: For each request; None takes the maximum.
        """
        most = [request.most_draft_tokens if request.is_drafting else 0 for request in requests]
        return most if num_draft_tokens is None else [min(pair) for pair in zip(most, num_draft_tokens, strict=True)]

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> Draft:
        """Returns a draft of up to `counts[i]` tokens for each request."""
        if not self._drafter or not any(counts):
            return self._nothing(len(requests))
        places = [i for i, request in enumerate(requests) if request.is_drafting]
        chosen = [requests[i] for i in places]
        draft = self._drafter.propose(
            [request.slot for request in chosen],
            [request.trace.token_ids[-1] for request in chosen],
            [counts[i] for i in places],
            [request.params.sampling for request in chosen],
            StepNoise([request.noise for request in chosen], [len(request.trace.token_ids) for request in chosen]),
        )
        return draft if len(places) == len(requests) else self._spread(draft, places, len(requests))

    def observe(
        self, requests: Sequence[Request], token_ids: Sequence[Sequence[int]], features: Sequence[Features]
    ) -> None:
        """Passes what a step committed to the drafter, for requests that have not ended.

        Args:
            token_ids: The committed tokens of each request; empty if its logits were not finite.
            features: For each request, the features of its anchor and its accepted tokens.
        """
        if not self._drafter:
            return
        running = [
            i
            for i, request in enumerate(requests)
            if request.finish_reason is None and request.is_drafting and token_ids[i]
        ]
        self._drafter.observe(
            [requests[i].slot for i in running], [token_ids[i] for i in running], [features[i] for i in running]
        )
        self._say_where_drafts_end(requests)

    def _nothing(self, num_requests: int) -> Draft:
        device, version = self._target.decoder.device, self._drafter.weights.version if self._drafter else 0
        none_BK = torch.zeros(num_requests, 0, dtype=torch.int64, device=device)
        return Draft.by_one(none_BK, torch.zeros(num_requests, dtype=torch.int64, device=device), version)

    def _spread(self, draft: Draft, places: Sequence[int], num_requests: int) -> Draft:
        """Widens a draft for the requests at `places` to all requests of a step; the others have no drafts."""
        whole = self._nothing(num_requests)
        token_ids_BK = draft.token_ids_BK.new_zeros(num_requests, draft.token_ids_BK.shape[1])
        token_ids_BK[places] = draft.token_ids_BK
        whole.num_draft_tokens_B[places] = draft.num_draft_tokens_B
        members, versions = list(whole.member_B), list(whole.weights_version_B)
        for place, member, version in zip(places, draft.member_B, draft.weights_version_B, strict=True):
            members[place], versions[place] = member, version
        probs_BKV = None
        if draft.probs_BKV is not None:
            probs_BKV = draft.probs_BKV.new_zeros(num_requests, *draft.probs_BKV.shape[1:])
            probs_BKV[places] = draft.probs_BKV
        return Draft(token_ids_BK, whole.num_draft_tokens_B, tuple(members), tuple(versions), probs_BKV)

    def _say_where_drafts_end(self, requests: Sequence[Request]) -> None:
        """Logs once that an answer continues without drafts because it is longer than the drafter's context."""
        if not self._has_said_where_drafts_end and any(request.num_beyond_drafter for request in requests):
            self._has_said_where_drafts_end = True
            log.warning(
                "the drafter drafts for texts of up to %d tokens, the target takes %d: what is longer goes on without "
                "drafts, exact as ever (this is said once)",
                requests[0].longest_drafted,
                self._target.decoder.config.max_positions,
            )
