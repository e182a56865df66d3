"""Prompts into the target's cache, piece by piece; what an earlier prompt left is taken over instead of read again."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

from onlinespec.engine.prefix_cache import PrefixCache, PromptText
from onlinespec.engine.request import Request
from onlinespec.host import to_device
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.loading import Target


class Prefill:
    """Reads prompts of admitted requests, all but each one's last token, which is the first anchor.

    Args:
        prefixes: What is kept of prompts that were read, for later ones that begin alike; None to keep nothing.
        aux_layer_ids: Layers whose states are wanted beside the final ones.

    Raises:
        ValueError: if prefixes are to be kept of a cache that can't be shared.
    """

    def __init__(
        self, target: Target, cache: Any, prefixes: PrefixCache | None, aux_layer_ids: Collection[int] = ()
    ) -> None:
        if prefixes and not isinstance(cache, KVCache):
            raise ValueError(
                f"{target.name} runs through transformers, whose caches can't be shared: leave prefixes out"
            )
        self._target, self._cache, self.prefixes, self._aux_layer_ids = target, cache, prefixes, aux_layer_ids

    def read(self, requests: Sequence[Request], max_tokens: int) -> list[tuple[Request, int]]:
        """Reads on in prompts, up to max_tokens tokens in all, the first request's first.

        One that goes on like a request before it waits, to take over what that one leaves.

        Args:
            max_tokens: At least 32. Pieces end between blocks of so many positions, where their end costs no bit.

        Returns:
            Requests whose turn it was, and how many tokens each had read: 0 for one that is known to its end.
        """
        pieces = self._pieces(requests, max_tokens)
        self._forward([(request, count) for request, count in pieces if count])
        for request, _ in pieces:
            self._store(request)
        return pieces

    def _pieces(self, requests: Sequence[Request], max_tokens: int) -> list[tuple[Request, int]]:
        pieces: list[tuple[Request, int]] = []
        nexts: set[Hashable] = set()
        for request in requests:
            self._restore(request)
            following = self._next_block(request)
            if following and following in nexts:
                continue
            count = _piece(request, max_tokens)
            if count or not request.num_unprefilled:
                pieces.append((request, count))
                max_tokens -= count
                nexts |= {following} if following else set()
        return pieces

    def _forward(self, pieces: Sequence[tuple[Request, int]]) -> None:
        if not pieces:
            return
        decoder = self._target.decoder
        slots, counts = [request.slot for request, _ in pieces], [count for _, count in pieces]
        ids_N = to_device([i for request, count in pieces for i in _unread(request, count)], decoder.device)
        output = decoder.forward(
            ids_N, slots, counts, self._cache, num_logits=[0] * len(slots), aux_layer_ids=self._aux_layer_ids
        )
        for (request, _), rows in zip(pieces, output.features.split(counts), strict=True):
            request.trace.append(rows)

    def _next_block(self, request: Request) -> Hashable | None:
        """The key of what others could take over, once it is read; None for less than a block."""
        if not self.prefixes or request.num_unprefilled < PAD:
            return None
        return self._text_of(request).key(request.trace.num_features // PAD)

    def _text_of(self, request: Request) -> PromptText:
        """What of a prompt can be shared; made when it is first asked for, and kept while the prompt is read."""
        if request.prompt_text is None:
            length = self._target.decoder.config.layer.rope.length_of(request.max_tokens)
            ids = request.trace.token_ids[: request.num_prompt_tokens - 1]
            request.prompt_text = PromptText(ids, (request.info.tenant, length))
        return request.prompt_text

    def _restore(self, request: Request) -> None:
        """Takes over what is known of the rest of a prompt."""
        if self.prefixes and request.num_unprefilled:
            trace = request.trace
            num_cached = self.prefixes.restore(self._text_of(request), self._cache, request.slot, trace.features)
            trace.num_features += num_cached
            request.num_cached += num_cached

    def _store(self, request: Request) -> None:
        if self.prefixes:
            self.prefixes.store(self._text_of(request), self._cache, request.slot, request.trace.features)
            if not request.num_unprefilled:
                request.prompt_text = None


def _piece(request: Request, max_tokens: int) -> int:
    """How many of its unread tokens a request may read: all, or as many as end with a block."""
    if request.num_unprefilled <= max_tokens:
        return request.num_unprefilled
    first = request.trace.num_features
    return max(0, (first + max_tokens) // PAD * PAD - first)


def _unread(request: Request, count: int) -> list[int]:
    """The next tokens of its prompt."""
    first = request.trace.num_features
    return request.trace.token_ids[first : first + count]
