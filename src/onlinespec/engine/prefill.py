"""Prefill: prompts go through the target in pieces. Blocks found in the prefix cache are copied instead."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

from onlinespec.engine.prefix_cache import PrefixCache, PromptText
from onlinespec.engine.request import Request
from onlinespec.host import to_device
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.loading import Target


class Prefill:
    """Prefills the prompts of admitted requests, except each prompt's last token, which is the first anchor.

    Args:
        cache: The target's KV cache.
        prefixes: The prefix cache; None for none.
        aux_layer_ids: Layers whose hidden states are kept beside the final ones.

    Raises:
        ValueError: if there is a prefix cache, but the target's KV cache can't be shared (transformers).
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
        """Prefills up to max_tokens tokens in one forward pass, in the order of the requests.

        A request whose next block is the same as that of a request before it waits, and copies the block afterwards.

        Args:
            max_tokens: At least 32. A piece ends between blocks of 32 positions, where a cut does not change any bit.

        Returns:
            (request, number of tokens) for each request that made progress; the number is 0 if the prefix cache had
            the whole rest of its prompt.
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
        """The prefix cache's key of the block that is prefilled next; None if less than a block is left."""
        if not self.prefixes or request.num_unprefilled < PAD:
            return None
        return self._text_of(request).key(request.trace.num_features // PAD)

    def _text_of(self, request: Request) -> PromptText:
        """The prompt's hashed blocks, computed once and kept while the prompt is prefilled."""
        if request.prompt_text is None:
            length = self._target.decoder.config.layer.rope.length_of(request.max_tokens)
            ids = request.trace.token_ids[: request.num_prompt_tokens - 1]
            request.prompt_text = PromptText(ids, (request.info.tenant, length))
        return request.prompt_text

    def _restore(self, request: Request) -> None:
        """Copies from the prefix cache what it has of the rest of the prompt."""
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
    """How many tokens of a request to prefill now: all that are left, or as many as end at a block boundary."""
    if request.num_unprefilled <= max_tokens:
        return request.num_unprefilled
    first = request.trace.num_features
    return max(0, (first + max_tokens) // PAD * PAD - first)


def _unread(request: Request, count: int) -> list[int]:
    """The next `count` tokens of the prompt."""
    first = request.trace.num_features
    return request.trace.token_ids[first : first + count]
