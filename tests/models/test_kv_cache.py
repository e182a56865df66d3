"""Slots: taken, cropped, filled, given back."""

from __future__ import annotations

import pytest
import torch

from onlinespec.models.kv_cache import PAD, KVCache


@pytest.fixture
def cache() -> KVCache:
    cache = KVCache(num_layers=3, num_kv_heads=2, head_dim=8, device=torch.device("cpu"), dtype=torch.float32)
    cache.take(5, 20)
    return cache


def test_a_slot_is_padded_and_starts_empty(cache):
    assert cache.capacity(5) == PAD
    assert cache.lengths[5] == 0
    assert cache.block(5).shape == (3, 2, 2, PAD, 8)


def test_a_taken_slot_is_refused_until_released(cache):
    with pytest.raises(ValueError, match="slot 5 is taken"):
        cache.take(5, 10)
    cache.release(5)
    cache.take(5, PAD + 1)
    assert cache.capacity(5) == 2 * PAD


def test_crop_rewinds_and_refuses_what_is_not_there(cache):
    cache.extend(5, 20)
    cache.crop(5, 7)
    assert cache.lengths[5] == 7
    with pytest.raises(ValueError, match="can't crop slot 5 to 8: it holds 7"):
        cache.crop(5, 8)


def test_a_full_slot_refuses_more(cache):
    cache.extend(5, PAD - 2)
    with pytest.raises(ValueError, match=f"holds {PAD - 2} of {PAD} tokens; 3 more"):
        cache.extend(5, 3)
    assert cache.lengths[5] == PAD - 2


def test_a_slot_s_memory_is_what_the_docstring_says(cache):
    assert cache.block(5).nbytes == 3 * 2 * 2 * PAD * 8 * 4
