"""What was computed of prompts, kept for later ones that begin alike: a system prompt is read once.

Kept in blocks of `PAD` positions, keys, values and final hidden states (which is what drafters read), each under the
block before it and its own tokens. Only what a prompt's reading computed for a whole block is kept: it attends as one
product there, so that a block restored has the very bits that reading it again would give (`layer.make_plan`).

Axis letters: G key-value heads, C tokens of a block, E head_dim, S positions of a request, D hidden size.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from onlinespec.models.kv_cache import PAD, KVCache


class PromptText(NamedTuple):
    """The tokens of a prompt that the target reads, and what they can be shared within."""

    token_ids: tuple[int, ...]
    scope: Hashable = ()  # tenant, and what else their bits depend on


class _Block(NamedTuple):
    name: int
    keys_values: Tensor  # [layers, 2, G, C, E]
    hidden_states_CD: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys_values, self.hidden_states_CD))


class PrefixCache:
    """Blocks of prompts, those used longest ago dropped first.

    Args:
        max_bytes: Of all blocks together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._names = itertools.count(1)  # never used again: what lay under a dropped block is not found any more
        self._blocks: OrderedDict[Hashable, _Block] = OrderedDict()  # by scope, the name of the block before, tokens
        self.num_bytes = 0
        self.num_restored = 0  # tokens, so far

    def restore(self, text: PromptText, cache: KVCache, slot: int, hidden_states_SD: Tensor) -> int:
        """Fills up a slot, and the rows of the states, with what is known behind its whole blocks; how many tokens."""
        if cache.lengths[slot] % PAD:
            return 0
        known, first = list(self._known(text)), cache.lengths[slot] // PAD
        for i, (_, block) in enumerate(known[first:], start=first):
            at = slice(i * PAD, (i + 1) * PAD)
            cache.block(slot)[..., at, :] = block.keys_values
            hidden_states_SD[at] = block.hidden_states_CD
        self._touch([key for key, _ in known])
        length = max(0, len(known) - first) * PAD
        cache.extend(slot, length)
        self.num_restored += length
        return length

    def store(self, text: PromptText, cache: KVCache, slot: int, hidden_states_SD: Tensor) -> None:
        """Keeps the whole blocks of a prompt that were read so far, and of its answer nothing."""
        keys = [key for key, _ in self._known(text)]
        before = self._blocks[keys[-1]].name if keys else 0
        for i in range(len(keys), min(cache.lengths[slot], len(text.token_ids)) // PAD):
            at = slice(i * PAD, (i + 1) * PAD)
            block = _Block(next(self._names), cache.block(slot)[..., at, :].clone(), hidden_states_SD[at].clone())
            if block.num_bytes * (i + 1) > self._max_bytes:  # what comes first is worth most
                break
            keys.append(self._key(text, before, i))
            self._blocks[keys[-1]] = block
            self.num_bytes += block.num_bytes
            before = block.name
        self._touch(keys)
        while self.num_bytes > self._max_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.num_bytes -= dropped.num_bytes

    def _known(self, text: PromptText) -> Iterator[tuple[Hashable, _Block]]:
        before = 0
        for i in range(len(text.token_ids) // PAD):
            key = self._key(text, before, i)
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            before = block.name

    def _key(self, text: PromptText, before: int, i: int) -> Hashable:
        return text.scope, before, text.token_ids[i * PAD : (i + 1) * PAD]

    def _touch(self, keys: Sequence[Hashable]) -> None:
        """The last block first: it is dropped before those that lead to it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
