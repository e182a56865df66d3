"""What is kept of prompts: which blocks are found again, which are dropped, and what the bookkeeping costs."""

from __future__ import annotations

import random

import pytest
import rigs
import torch

from onlinespec.config import GenerationParams
from onlinespec.core import Features
from onlinespec.engine.prefix_cache import PrefixCache, PromptText
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.kv_cache import PAD, KVCache

TARGET = rigs.table_target(context=5000)  # no layers: reading a prompt is little but bookkeeping
HIDDEN = TARGET.decoder.config.layer.hidden_size


class Counted(list):
    """A list that counts how many of its items were looked at."""

    num_touched = 0

    def __getitem__(self, at):
        found = super().__getitem__(at)
        self.num_touched += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self):
        for item in super().__iter__():
            self.num_touched += 1
            yield item


class Token(int):
    """A token that counts how often tokens were hashed."""

    num_hashed = 0

    def __hash__(self):
        Token.num_hashed += 1
        return int.__hash__(self)


def work(num_tokens: int) -> int:
    """Tokens looked at or hashed while a prompt is read in pieces of one block."""
    loop = DecodeLoop(TARGET, prefixes=PrefixCache(10**9))
    request = loop.open([1] * (num_tokens + 1), GenerationParams(1))
    request.trace.token_ids = Counted(Token(i % 5) for i in range(num_tokens + 1))
    loop.admit(request)
    Token.num_hashed, request.trace.token_ids.num_touched = 0, 0
    while not request.is_ready:
        loop.prefill([request], PAD)
    return Token.num_hashed + request.trace.token_ids.num_touched


def test_reading_a_prompt_four_times_as_long_looks_at_four_times_as_many_tokens():
    short, long = work(1024), work(4096)
    assert long <= 4 * short
    assert long <= 4 * 4096


def test_look_ups_in_a_long_prompt_are_as_many_as_its_blocks(monkeypatch):
    keys = []
    make = PromptText.key
    monkeypatch.setattr(PromptText, "key", lambda text, index: keys.append(index) or make(text, index))
    work(4096)
    assert len(keys) <= 6 * 4096 // PAD


# --- against a cache that walks along every prompt from its beginning -----------------------------------------------


class Walking:
    """The reference: touches every block of a prompt whenever it is met, and drops what was touched longest ago, of
    one prompt's the last. By texts, not by digests."""

    def __init__(self, most_blocks: int) -> None:
        self.most_blocks, self.used, self.time = most_blocks, {}, 0

    def _prefixes(self, ids, scope):
        return [(scope, tuple(ids[: (i + 1) * PAD])) for i in range(len(ids) // PAD)]

    def known(self, ids, scope, first):
        prefixes = self._prefixes(ids, scope)
        last = first
        while last < len(prefixes) and prefixes[last] in self.used:
            last += 1
        if last > first:
            self._touch(prefixes[:last])
        return (last - first) * PAD

    def keep(self, ids, scope, length):
        kept = self._prefixes(ids, scope)[: min(length // PAD, self.most_blocks)]
        self._touch(kept)
        while len(self.used) > self.most_blocks:
            del self.used[min(self.used, key=lambda prefix: (self.used[prefix], -len(prefix[1])))]

    def _touch(self, prefixes):
        self.time += 1
        self.used |= dict.fromkeys(prefixes, self.time)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8))])
@pytest.mark.parametrize("most_blocks", [2, 5, 12, 1000])
def test_what_is_found_and_what_is_dropped_is_as_if_every_prompt_were_walked_along(seed, most_blocks):
    rng = random.Random(seed)
    cache = KVCache(1, 1, 2, torch.device("cpu"), torch.float32)
    states = Features(torch.zeros(8 * PAD, HIDDEN))
    size = PAD * (cache.bytes_per_token + HIDDEN * 4)
    real, reference = PrefixCache(most_blocks * size), Walking(most_blocks)
    reading, slots = [], iter(range(10**6))
    for _ in range(300):
        if len(reading) < 3:  # prompts are read side by side, each a block or more at a time
            ids = [block for i in range(rng.randint(1, 7)) for block in [rng.randint(0, 1)] * PAD]
            scope, slot = rng.choice(["a", "b"]), next(slots)
            cache.take(slot, len(states))
            reading.append((ids, scope, slot, PromptText(ids, scope)))
        ids, scope, slot, text = one = rng.choice(reading)
        first = cache.lengths[slot] // PAD
        assert real.restore(text, cache, slot, states) == reference.known(ids, scope, first)
        unread = len(ids) - cache.lengths[slot]
        cache.extend(slot, min(unread, rng.randint(1, 3) * PAD))
        real.store(text, cache, slot, states)
        reference.keep(ids, scope, cache.lengths[slot])
        assert {real_key[1] for real_key in real._blocks} == {
            PromptText(prefix, its_scope).key(len(prefix) // PAD - 1)[1] for its_scope, prefix in reference.used
        }
        assert real.num_bytes == sum(block.num_bytes for block in real._blocks.values()) <= most_blocks * size
        assert len(real._ends) <= 2 * len(real._blocks) + 1  # what is stale does not pile up
        if cache.lengths[slot] == len(ids):
            cache.release(slot)
            reading.remove(one)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_says_all_tokens_up_to_the_end_of_its_block_and_the_scope_and_no_more():
    ids = list(range(3 * PAD))
    text, same = PromptText([*ids, 7, 8], "a"), PromptText([*ids, 9], "a")
    assert text.num_blocks == 3
    assert [text.key(i) for i in range(3)] == [same.key(i) for i in (2, 1, 0)][::-1]
    earlier = PromptText([99, *ids[1:]], "a")
    assert all(earlier.key(i) != text.key(i) for i in range(3))
    assert all(PromptText(ids, "b").key(i) != text.key(i) for i in range(3))
    with pytest.raises(IndexError, match="block 3 of a prompt of 3"):
        text.key(3)
