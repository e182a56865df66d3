"""The prefix cache: keys, values and features of prompt blocks, reused by later prompts with the same beginning.

A block has `PAD` positions. Its key is a digest of all tokens up to its end, computed once per prompt, so a prompt of S
tokens costs hashing S tokens and S / PAD look-ups, in however many pieces it is prefilled. Only whole blocks that
prefill computed are kept: such a block attends as one product (`layer.make_plan`), so a restored block has the same
bits as one that is prefilled again.

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
    """The whole blocks of a prompt, and their keys.

    Two blocks have the same key if their scopes and all tokens from the beginning to their ends are equal. Tokens are
    compared by 256-bit digests (BLAKE2b), so that no one can construct a prompt that hits another prompt's block.

    Args:
        token_ids: The prompt's tokens, without the last one.
        scope: Blocks are shared within one scope only: the tenant, and whatever else their bits depend on.
    """

    def __init__(self, token_ids: Sequence[int], scope: Hashable = ()) -> None:
        self.num_blocks = len(token_ids) // PAD
        self._scope = scope
        self._token_ids = array("q", token_ids[: self.num_blocks * PAD])
        self._digests: list[bytes] = []

    def key(self, index: int) -> Hashable:
        """Returns the key of block `index`, from 0. Digests of earlier blocks are computed on the way, each once.

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
    before: _Block | None  # the block before it in its prompt; it is never evicted earlier
    keys_values: Tensor  # [layers, 2, G, C, E]
    features: Features
    used: int = 0  # when this block, or an evicted one after it, was last used
    num_behind: int = 0  # cached blocks that continue this one

    @property
    def num_bytes(self) -> int:
        return self.keys_values.numel() * self.keys_values.element_size() + self.features.num_bytes


class PrefixCache:
    """A cache of prompt blocks. It evicts the least recently used block that no other cached block continues.

    So a block is never cached without those before it, and using a block counts as using them, without walking along
    the prompt.

    Args:
        max_bytes: Of all blocks together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: dict[Hashable, _Block] = {}
        self._ends: list[tuple[int, int, _Block]] = []  # heap by `used`; entries whose block has changed are stale
        self._times, self._tie = itertools.count(1), itertools.count()
        self.num_bytes = 0
        self.num_restored = 0  # tokens restored so far

    def restore(self, text: PromptText, cache: KVCache, slot: int, features: Features) -> int:
        """Copies the cached blocks that follow a slot's content into the slot and into `features`.

        Returns:
            The number of tokens restored; 0 if the slot does not end at a block boundary.
        """
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
        """Caches the whole blocks of a prompt that were prefilled so far. Nothing of the answer is kept."""
        size = PAD * cache.bytes_per_token + features[:PAD].num_bytes
        most = self._max_bytes // size  # of a prompt that does not fit, the first blocks are worth most
        end = min(cache.lengths[slot] // PAD, text.num_blocks, most)
        first = end
        while first and text.key(first - 1) not in self._blocks:  # blocks before a cached one are cached
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
        """Pushes a block that no other continues onto the heap. Stale entries stay until they outnumber the blocks."""
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
