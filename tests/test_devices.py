"""A whole step and a round of learning on another device than the host's, without one.

Tensors are fake and of the `meta` device: they have shapes and a place, and no numbers. Every operator that would mix
two devices is refused, and every read of the host but `host.to_host` fails by itself, for there is nothing to read.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import rigs
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onlinespec import host
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners import make_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.registry import DRAFTERS, LEARNERS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

GREEDY = SamplingParams()
CUT = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01)
PENALISED = SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5)
PROMPTS = [[5, 9, 200, 5, 9], list(range(70)), [7, 7, 7]]
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}  # what moves tensors on purpose


class OneDevice(TorchDispatchMode):
    """Refuses an operator whose tensors lie on two devices; torch itself lets some through, and copies unseen."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if len(places) > 1 and func not in COPIES:
            raise RuntimeError(f"{func} mixes tensors of {' and '.join(sorted(places))}")
        return func(*args, **(kwargs or {}))


def prepared(tensor):
    """What a step or a round would read: no draft kept, the token 0 committed, all finite, losses of 1."""
    value = {torch.bool: True, torch.int64: 0}.get(tensor.dtype, 1.0)
    filled = value
    for size in reversed(tensor.shape):
        filled = [filled] * size
    return filled


@contextmanager
def a_device_without_numbers(monkeypatch):
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        patch.setattr(host, "_numbers", prepared)
        yield "meta"


@pytest.fixture
def device(monkeypatch):
    with a_device_without_numbers(monkeypatch) as name:
        yield name


def params(sampling, num_logprobs=None):
    return GenerationParams(40, 3, sampling, seed=1, num_logprobs=num_logprobs)


SAMPLING = {"greedy": GREEDY, "cut": CUT, "penalised": PENALISED}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if name in (None, "eagle") or kind == "greedy" else pytest.mark.full)
        for name in (None, *DRAFTERS)
        for kind in SAMPLING
    ],
)
def test_a_step_on_cuda_mixes_no_devices_and_reads_them_once(device, name, kind, monkeypatch):
    target = rigs.random_target(device=device)
    drafter = load_drafter(name, target) if name else None
    loop = DecodeLoop(target, drafter)
    requests = [loop.start(prompt, params(SAMPLING[kind], num_logprobs=2)) for prompt in PROMPTS]
    reads, read = [], host._numbers
    monkeypatch.setattr(
        "onlinespec.engine.step.to_host", lambda *tensors: reads.append(1) or [read(t) for t in tensors]
    )
    for _ in range(2):
        step = loop.step(requests)
        assert len(step.feedback) == 3
    assert len(reads) == 2
    assert all(len(request.output_ids) >= 2 for request in requests)
    assert all(request.trace.features.final_SD.device.type == device for request in requests)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "eagle" else pytest.mark.full) for n in DRAFTERS])
def test_a_step_on_cuda_takes_greedy_and_sampled_requests_together(device, name):
    target = rigs.random_target(device=device)
    loop = DecodeLoop(target, load_drafter(name, target))
    requests = [loop.start(prompt, params(s)) for prompt, s in zip(PROMPTS, (GREEDY, CUT, PENALISED), strict=True)]
    for counts in ([3, 0, 2], [1, 3, 3], [0, 0, 0]):
        loop.step(requests, counts)
    loop.undo_step(requests[0])
    loop.step(requests)
    for request in requests:
        loop.finish(request)


IN_SHORT = [("eagle", "online_gradient")]


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        pytest.param(*case, marks=() if case in IN_SHORT else pytest.mark.full)
        for case in itertools.product(["eagle", "small_lm"], LEARNERS)
    ],
)
def test_a_round_of_learning_on_cuda_mixes_no_devices_and_reads_them_through_one_function(device, name, learner):
    """Rounds of greedy rows, of sampled ones whose noise is replayed, and with replayed requests beside them."""
    target = rigs.random_target(num_layers=1, device=device)
    drafter = load_drafter(name, target)
    config = LearnConfig(min_interval=4, max_interval=4, replay_every=2, budget=math.inf)
    learning = InlineLearning(drafter, make_learner(learner, 1e-3), config)
    loop = DecodeLoop(target, drafter, learning)
    for sampling in (GREEDY, PENALISED):
        asked = replace(params(sampling), max_new_tokens=5, num_draft_tokens=2)
        requests = [loop.start(prompt, asked) for prompt in PROMPTS[:2]]
        while running := [request for request in requests if not request.finish_reason]:
            loop.step(running)
        for request in requests:
            loop.finish(request)
    assert not learning.is_frozen, learning
    assert learning.num_rounds >= 4 or learner == "frozen"
    assert all(p.device.type == device for p in drafter.weights.params.values())


@pytest.mark.parametrize("name", ["eagle", pytest.param("small_lm", marks=pytest.mark.full)])
def test_on_cuda_drafts_are_computed_in_the_targets_dtype(device, name):
    target = rigs.random_target(device=device, dtype=torch.bfloat16)
    drafter = load_drafter(name, target)
    loop = DecodeLoop(target, drafter)
    requests = [loop.start(prompt, params(CUT)) for prompt in PROMPTS]
    loop.step(requests)
    assert all(drafter._cache.block(request.slot).dtype == torch.bfloat16 for request in requests)
    assert all(p.dtype == torch.float32 for p in drafter.weights.params.values())


def test_the_mode_refuses_what_torch_would_let_through(device):
    rows = torch.zeros(4, 5, device=device)
    with pytest.raises(RuntimeError, match="mixes tensors of cpu and meta"):
        torch.nn.functional.embedding(torch.zeros(2, dtype=torch.int64), rows)
    with pytest.raises(RuntimeError, match="mixes tensors of cpu and meta"):
        rows[torch.zeros(2, dtype=torch.int64)]
