"""On a CUDA device or Apple's, where there is one: the CPU's logits, and exact speculation up to ties."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from checkpoints import save_tiny
from torch import Tensor

from onlinespec.config import GenerationParams
from onlinespec.drafters.eagle import Eagle
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.ties import is_tie
from onlinespec.learners import make_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import Target, load_target

PATHS = {"llama": "own", "qwen3": "own", "gpt2": "transformers", "gemma3": "transformers"}
IS_THERE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
PROMPT = [ord(c) for c in "a b c a b c a b"]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=IS_THERE)
def device(request) -> str:
    if not IS_THERE[request.param]:
        pytest.skip(f"there is no {request.param} device")
    return request.param


@pytest.fixture(scope="module", params=PATHS)
def folder(request, device, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def logits(target: Target) -> Tensor:
    ids = torch.randint(0, 288, (40,), generator=torch.Generator().manual_seed(0)).to(target.decoder.device)
    cache = target.decoder.new_cache()
    cache.take(0, 40)
    pieces = [target.decoder.forward(part, [0], [len(part)], cache).logits_MV for part in ids.split([20, 1, 19])]
    return torch.cat(pieces).cpu()


def test_logits_are_near_the_cpus(folder, device):
    on_device = load_target(folder, device=device)
    assert on_device.path in PATHS.values()
    assert on_device.decoder.device.type == device
    torch.testing.assert_close(logits(on_device), logits(load_target(folder)), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_run(folder, device, dtype):
    assert logits(load_target(folder, device=device, dtype=dtype)).isfinite().all()


def test_greedy_with_eagle_that_learns_equals_plain_decoding_up_to_ties(folder, device):
    target, params = load_target(folder, device=device), GenerationParams(80, ignore_end_tokens=True)
    drafter = Eagle.fresh(target)
    config = LearnConfig(min_interval=4, max_interval=4, budget=math.inf)
    learning = InlineLearning(drafter, make_learner("online_gradient", 5e-3, "preconditioned"), config)
    plain = DecodeLoop(target).complete(PROMPT, params)
    for _ in range(2):
        answer = DecodeLoop(target, drafter, learning).complete(PROMPT, params)
        assert answer.output_ids == plain.output_ids or is_tie(target, answer, plain)
    assert learning.num_rounds >= 4
    assert not learning.is_frozen
