"""What a target needs of memory, told before its weights are read."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rigs
import torch
from checkpoints import byte_tokenizer, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning.footprint import MemoryBeside, copies_of
from onlinespec.learning.learner_spec import learner_of, parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models import loading, memory
from onlinespec.models.base import ModelConfig
from onlinespec.models.checkpoint import read_weights, tensor_shapes
from onlinespec.models.decoder import Decoder
from onlinespec.models.layer import LayerConfig
from onlinespec.models.linear import HalfLinear, PlainLinear, can_pack_half
from onlinespec.models.loading import load_target
from onlinespec.models.rope import Rope
from onlinespec.publishing.label_head import EmbeddingAndHead

GIB = 1 << 30


@pytest.fixture(scope="module", params=["llama", "olmo2"], ids=["own", "transformers"])
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"), request.param)


@pytest.fixture
def no_reading(monkeypatch):
    def refuse(*_):
        pytest.fail("weights were read before the refusal")

    monkeypatch.setattr(loading, "read_weights", refuse)
    monkeypatch.setattr("onlinespec.models.hf.load_hf", refuse)


def give(monkeypatch, size: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: size)


def test_what_does_not_fit_is_refused_before_weights_are_read(folder, monkeypatch, no_reading):
    give(monkeypatch, 100_000)
    with pytest.raises(ValueError, match=r"needs about .* GiB are available on cpu") as caught:
        load_target(folder)
    assert str(folder) in str(caught.value)


def test_the_refusal_names_what_is_needed_what_is_there_and_the_way_out(monkeypatch):
    give(monkeypatch, 23 * GIB)
    need = memory.Need(8_030_000_000, 37 * GIB, 1 << 17, 8192, torch.float32)
    with pytest.raises(ValueError, match="there needs about 37") as caught:
        memory.check_memory(need, torch.device("cpu"), Path("there"))
    assert str(caught.value) == (
        "there needs about 37.0 GiB of memory (8,030 million parameters in float32), 23.0 GiB are available on cpu; "
        "use --dtype bfloat16, another --device or a smaller model"
    )


def test_a_half_type_is_not_advised_to_who_asked_for_one(folder, monkeypatch, no_reading):
    give(monkeypatch, 100_000)
    with pytest.raises(ValueError, match="cpu; use another --device or a smaller model"):
        load_target(folder, dtype="bfloat16")


def test_a_half_type_needs_half(folder):
    shapes, shape = tensor_shapes(folder), load_target(folder).decoder.config
    whole, half = (memory.estimate(shapes, shape, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert whole.num_parameters == sum(torch.Size(dims).numel() for dims in shapes.values())
    assert whole.loading == pytest.approx(2 * half.loading, abs=2)
    assert whole.cache_per_token == 2 * half.cache_per_token


def test_a_token_takes_the_room_that_the_cache_takes(tmp_path):
    decoder = load_target(save_tiny(tmp_path)).decoder
    cache = decoder.new_cache()
    cache.take(0, 320)
    need = memory.estimate({}, decoder.config, torch.float32)
    assert cache.block(0).nbytes == 320 * need.cache_per_token


def test_a_context_that_does_not_fit_is_warned_of_with_what_would(folder, monkeypatch, caplog):
    shape = load_target(folder).decoder.config
    keeps_second_head = loading.linear_for(torch.device("cpu"), torch.float32) is loading.PackedLinear
    need = memory.estimate(
        tensor_shapes(folder), shape, torch.float32, keeps_second_head and load_target(folder).path == "own"
    )
    give(monkeypatch, need.loading + 500 * need.cache_per_token)
    caplog.clear()
    load_target(folder)
    assert "requests of about 500 tokens, not for the whole context of 1,024" in caplog.text


def test_nothing_is_said_where_all_fits_or_nothing_is_known(folder, monkeypatch, caplog):
    for size in (GIB, None):
        give(monkeypatch, size)
        with caplog.at_level(logging.WARNING):
            load_target(folder)
    assert "memory" not in caplog.text


def test_layers_are_taken_out_as_they_are_made_so_that_nothing_is_held_twice(tmp_path):
    folder = save_tiny(tmp_path)
    weights = read_weights(folder, torch.device("cpu"), torch.float32)
    Decoder(load_target(folder).decoder.config, weights)
    assert sorted(weights) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_weights_are_copies_that_do_not_keep_the_file_in_memory(tmp_path):
    weights = read_weights(save_tiny(tmp_path), torch.device("cpu"), torch.float32)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in weights.values())


# --- what is there --------------------------------------------------------------------------------------------------


def group(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def test_the_tightest_control_group_counts_and_its_file_pages_are_free(tmp_path):
    (tmp_path / "membership").write_text("1:name=systemd:/\n0::/outer/inner\n")
    groups = tmp_path / "groups"
    groups.mkdir()
    left = lambda: memory._left_in_group(groups, tmp_path / "membership")  # noqa: E731
    assert left() is None
    group(groups / "outer" / "inner", "max", 700)
    assert left() is None
    group(groups / "outer", "1000", 700, inactive=50)
    assert left() == 350
    group(groups / "outer" / "inner", "500", 400)
    assert left() == 100
    group(groups / "outer" / "inner", "500", 600)
    assert left() == 0


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert memory._left_in_group(tmp_path, tmp_path / "nowhere") is None
    (tmp_path / "membership").write_text("4:memory:/old\n")
    assert memory._left_in_group(tmp_path, tmp_path / "membership") is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="other systems are told in another way")
def test_what_is_available_is_no_more_than_what_is_built_in():
    available = memory.available_bytes(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available <= total


# --- the estimate, measured -----------------------------------------------------------------------------------------

MEASURED = """
import sys
from onlinespec.models import loading
import onlinespec.models.hf
needs, estimate = [], loading.estimate
loading.estimate = lambda *given, **more: needs.append(estimate(*given, **more)) or needs[-1]
loading.load_target(sys.argv[1])  # once, small: so that imports and first uses are not counted
def status(key):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key))) * 1024
before = status("VmRSS")
target = loading.load_target(sys.argv[2])
print(target.path, status("VmHWM") - before, needs[-1].loading)
"""
SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("config", "model"),
    [
        pytest.param(LlamaConfig, LlamaForCausalLM, id="own", marks=pytest.mark.full),
        pytest.param(Olmo2Config, Olmo2ForCausalLM, id="transformers", marks=pytest.mark.full),
    ],
)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(tmp_path, config, model):
    """110 million parameters in float32."""
    with torch.device("meta"):
        empty = model(config(**SIZES))
    large = empty.to_empty(device="cpu").apply(lambda module: [p.data.fill_(0.01) for p in module.parameters(False)])
    large.save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    small = save_tiny(tmp_path / "small", "llama" if model is LlamaForCausalLM else "olmo2")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, small, tmp_path / "large"], capture_output=True, text=True, check=True
    )
    path, peak, estimated = done.stdout.split()
    assert path == ("own" if model is LlamaForCausalLM else "transformers")
    assert int(estimated) == pytest.approx(int(peak), rel=0.25)


# --- beside the target: formulas against the tensors that are there ---------------------------------------------------


WIDE = rigs.random_target(vocab=20_000)  # its head is twenty times the rest
SHAPE = WIDE.decoder.config
ROUNDS = "min_interval=4/max_interval=4/budget=inf/replay_every=0"


def bytes_there() -> int:
    """Of all tensors that Python knows of, each memory once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    packed = {id(t): 4 * t.numel() if t.dtype == torch.float32 else 2 * t.numel() for t in tensors if t.is_mkldnn}
    plain = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_mkldnn}
    return sum(packed.values()) + sum(plain.values())


def decode(drafter, learning=None):
    loop = DecodeLoop(WIDE, drafter, learning)
    for i, sampling in enumerate([SamplingParams(), SamplingParams(1.0)] * 2):
        ids = torch.randint(20_000, (200,), generator=torch.Generator().manual_seed(i)).tolist()
        loop.complete(ids, GenerationParams(24, 2, sampling, seed=i))


@pytest.fixture(params=[PlainLinear, HalfLinear], ids=["plain", "bfloat16"])
def products(request, monkeypatch):
    kind = request.param
    if kind is HalfLinear and not can_pack_half():
        pytest.skip("bfloat16 can't be packed here")
    for module in (
        "drafters.eagle",
        "drafters.small_lm.drafter",
        "drafters.small_lm.draft_model",
        "learning.footprint",
    ):
        monkeypatch.setattr(f"onlinespec.{module}.draft_linear_for", lambda *_: kind)
    return kind


METHODS = ("online_gradient/geometry=diagonal", "optimistic", "ensemble")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) == ("eagle", "ensemble") else pytest.mark.full)
        for name in ("eagle", "small_lm")
        for method in METHODS
    ],
)
def test_what_a_drafter_and_its_learning_hold_beside_a_wide_head_is_what_was_foretold(products, name, method):
    decode(load_drafter(name, WIDE))  # first uses are not counted
    told = MemoryBeside(name)(SHAPE, torch.float32, torch.device("cpu"))
    before = bytes_there()
    drafter = load_drafter(name, WIDE)
    drafter.draft_vocab._num_seen = 10**6  # so that lists are drafted from
    decode(drafter)
    _ = drafter.draft_vocab.whole
    seen = drafter.draft_vocab._counts_V.nbytes + drafter.draft_vocab._unseen_V.nbytes  # no tensors
    assert bytes_there() + seen - before == pytest.approx(told, rel=0.25)

    config = parse_learner(f"{method}/{ROUNDS}")
    told_learning = MemoryBeside(name, [config])(SHAPE, torch.float32, torch.device("cpu")) - told
    passing = 20_000 * 32 * (4 + 2) if products is HalfLinear else 0
    before = bytes_there()
    learning = InlineLearning(drafter, config=config)
    decode(drafter, learning)
    assert learning.num_rounds > 8
    assert bytes_there() - before == pytest.approx(told_learning - passing, rel=0.35)


def test_a_learning_process_is_foretold_its_copies_of_the_targets_ends():
    shape, config = replace(SHAPE, vocab_size=128_256), LearnConfig()
    thread, process = (
        MemoryBeside("eagle", [config], place)(shape, torch.bfloat16, torch.device("cpu"))
        for place in ("thread", "process")
    )
    assert process - thread == 2 * 128_256 * 32 * 2


def test_a_learning_process_keeps_the_targets_ends_once():
    """The bytes that came are what its tensors lie over."""
    ends = EmbeddingAndHead.of(WIDE)
    before = bytes_there()
    target = ends.target()
    assert bytes_there() - before == 2 * 20_000 * 32 * 4
    data = (ends.embedding.data, ends.head.data)
    for matrix, held in zip((target.decoder.embedding_VD, target.decoder.head_VD), data, strict=True):
        assert matrix.numpy().__array_interface__["data"][0] == np.frombuffer(held, np.uint8).ctypes.data
    assert torch.equal(target.decoder.head_VD, WIDE.decoder.head_VD)


def test_an_8b_target_in_bfloat16_is_told_of_gigabytes_beside_it():
    layer = LayerConfig(4096, 14_336, 32, 8, 128, 1e-5, Rope(5e5))
    shape = ModelConfig(layer, 32, 128_256, 8192)
    head = 128_256 * 4096 * 2
    inline = MemoryBeside("eagle", [LearnConfig()])(shape, torch.bfloat16, torch.device("cpu"))
    assert inline > head, "the gradient's way back through the head"
    process = MemoryBeside("eagle", [LearnConfig()], "process")(shape, torch.bfloat16, torch.device("cpu"))
    assert process - inline > 2 * head
    assert MemoryBeside("ngram")(shape, torch.bfloat16, torch.device("cpu")) == 0


def test_a_target_that_fits_alone_is_refused_where_its_drafter_does_not(folder, monkeypatch, no_reading):
    give(monkeypatch, 10 * GIB)
    with pytest.raises(ValueError, match=r"needs about 0\.0 GiB .*learning 11\.0 GiB more, 10\.0 GiB are"):
        load_target(folder, beside=lambda *_: 11 * GIB)


def test_learners_hold_the_copies_that_their_states_say():
    assert copies_of(learner_of(parse_learner("frozen"))) == 1
    plain, adam = (
        copies_of(learner_of(parse_learner(f"online_gradient/geometry={g}"))) for g in ("euclidean", "diagonal")
    )
    assert adam == plain + 2, "two moments"
    assert copies_of(learner_of(parse_learner("ensemble"))) > 2 * copies_of(
        learner_of(parse_learner("online_gradient"))
    )
