"""What was computed of prompts, kept for later ones that begin alike: a system prompt is read once.

Kept in blocks of `PAD` positions, keys, values and features (which is what drafters read). A block's key is
a digest of all tokens up to its end, made once for each prompt, so that a prompt of S tokens costs S tokens to hash and
S / PAD look-ups, in however many pieces it is read. Only what a prompt's reading computed for a whole block is kept: it
attends as one product there, so that a block restored has the very bits that reading it again would give
(`layer.make_plan`).

Axis letters: G key-value heads, C tokens of a block, E head_dim, S positions of a request.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from onlinespec.core import Features
from onlinespec.models.kv_cache import PAD, KVCache


class PromptText:
    """The whole blocks of what the target reads of a prompt, and a key for each.

    Two blocks have one key if their scopes are equal and all tokens from the beginning to their ends. That is decided
    by 256-bit digests of the tokens: two texts of one digest can't be found, not even by who writes the prompts.

    Args:
        scope: What blocks can be shared within: the tenant, and what else their bits depend on.
    """

    def __init__(self, token_ids: Sequence[int], scope: Hashable = ()) -> None:
        self.num_blocks = len(token_ids) // PAD
        self._scope = scope
        self._token_ids = array("q", token_ids[: self.num_blocks * PAD])
        self._digests: list[bytes] = []

    def key(self, index: int) -> Hashable:
        """The key of a block, counted from 0; those before it are made on the way, each once.

        Raises:
            IndexError: if the prompt has no such block.
        """
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of a prompt of {self.num_blocks}")
        for i in range(len(self._digests), index + 1):
            before = self._digests[-1] if i else b""
            self._digests.append(blake2b(before + self._token_ids[i * PAD : (i + 1) * PAD], digest_size=32).digest())
        return self._scope, self._digests[index]


@dataclass(eq=False)
class _Block:
    key: Hashable
    before: _Block | None  # the block before it in its prompt, which is kept at least as long
    keys_values: Tensor  # [layers, 2, G, C, E]
    features: Features
    used: int = 0  # when this block, or one behind it that is gone, was last used
    num_behind: int = 0  # blocks kept that go on from this one

    @property
    def num_bytes(self) -> int:
        return self.keys_values.numel() * self.keys_values.element_size() + self.features.num_bytes


class PrefixCache:
    """Blocks of prompts; of those that no other goes on from, the one used longest ago is dropped first.

    So a block is never kept without those before it, and to use a block is to use them: nothing walks along a prompt.

    Args:
        max_bytes: Of all blocks together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: dict[Hashable, _Block] = {}
        self._ends: list[tuple[int, int, _Block]] = []  # a heap by `used`; an entry whose block has changed is stale
        self._times, self._tie = itertools.count(1), itertools.count()
        self.num_bytes = 0
        self.num_restored = 0  # tokens, so far

    def restore(self, text: PromptText, cache: KVCache, slot: int, features: Features) -> int:
        """Fills up a slot, and a text's features, with what is known behind its whole blocks; how many tokens."""
        if cache.lengths[slot] % PAD:
            return 0
        first = cache.lengths[slot] // PAD
        block, last = None, first
        while last < text.num_blocks and (found := self._blocks.get(text.key(last))):
            block, last = found, last + 1
            at = slice((last - 1) * PAD, last * PAD)
            cache.block(slot)[..., at, :] = block.keys_values
            features.write(at.start, block.features)
        if block is None:
            return 0
        self._use(block)
        length = (last - first) * PAD
        cache.extend(slot, length)
        self.num_restored += length
        return length

    def store(self, text: PromptText, cache: KVCache, slot: int, features: Features) -> None:
        """Keeps the whole blocks of a prompt that were read so far, and of its answer nothing."""
        size = PAD * cache.bytes_per_token + features[:PAD].num_bytes
        most = self._max_bytes // size  # of one prompt: what comes first is worth most
        end = min(cache.lengths[slot] // PAD, text.num_blocks, most)
        first = end
        while first and text.key(first - 1) not in self._blocks:  # those before one that is kept are kept
            first -= 1
        block = self._blocks[text.key(first - 1)] if first else None
        for i in range(first, end):
            at = slice(i * PAD, (i + 1) * PAD)
            keys_values = cache.block(slot)[..., at, :].clone()
            block = self._add(_Block(text.key(i), block, keys_values, features[at].map(Tensor.clone)))
        if block:
            self._use(block)
        while self.num_bytes > self._max_bytes:
            self._drop_one()

    def _add(self, block: _Block) -> _Block:
        self._blocks[block.key] = block
        self.num_bytes += block.num_bytes
        if block.before:
            block.before.num_behind += 1
        return block

    def _use(self, block: _Block) -> None:
        block.used = next(self._times)
        self._offer_as_end(block)

    def _offer_as_end(self, block: _Block) -> None:
        """Into the heap, if nothing goes on from it. Stale entries are left there until they outnumber the blocks."""
        if block.num_behind:
            return
        if len(self._ends) > 2 * len(self._blocks):
            self._ends = [entry for entry in self._ends if self._is_current(entry)]
            heapq.heapify(self._ends)
        heapq.heappush(self._ends, (block.used, next(self._tie), block))

    def _is_current(self, entry: tuple[int, int, _Block]) -> bool:
        used, _, block = entry
        return self._blocks.get(block.key) is block and not block.num_behind and block.used == used

    def _drop_one(self) -> None:
        while not self._is_current(entry := heapq.heappop(self._ends)):
            pass
        block = entry[2]
        del self._blocks[block.key]
        self.num_bytes -= block.num_bytes
        if block.before:
            block.before.num_behind -= 1
            block.before.used = max(block.before.used, block.used)
            self._offer_as_end(block.before)
