"""Inputs that no one should give, and someone will: a usable object, or an error that says what was wrong."""

from __future__ import annotations

import gc
import gzip
import math
import shutil
from dataclasses import fields, replace
from functools import cache

import pytest
import rigs
import torch
from checkpoints import CHAT_TEMPLATE, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import plain, run_together
from toy import steady

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.engine.request import ContextOverflow
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.settings import Comparison
from onlinespec.learning.learner_spec import learner_of, parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import load_target
from onlinespec.offline.settings import Distillation
from onlinespec.workloads import load_workload

TARGET = rigs.random_target(context=16_384)


def refusal(make):
    """What an error says; None if there is none. Only what callers are told to expect is caught."""
    try:
        make()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


# Settings

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([-1, 0, 2**70, -math.inf, math.nan, 1e308, (), (1, "x"), ["x"], {}, object()]),
)
SETTINGS = {
    SamplingParams: {},
    GenerationParams: {},
    LearnConfig: {},
    Tuning: {},
    Comparison: {"drafter": "eagle", "learners": ("none",), "data": ("a.jsonl",)},
    Distillation: {"drafter": "eagle", "data": ("a.jsonl",)},
}
NESTED = ("sampling", "generation", "learn", "options", "tuning")  # objects of their own, or checked where used
ELSEWHERE = ("loss", "num_requests", "minutes", "data")  # refusals that speak of what they name


@settings(steady, max_examples=100)
@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_settings_are_taken_or_refused_by_name(kind, data):
    name = data.draw(st.sampled_from([f.name for f in fields(kind) if f.init and f.name not in NESTED]))
    value = data.draw(ODD)
    words = refusal(lambda: kind(**(SETTINGS[kind] | {name: value})))
    assert words is None or name in words.replace("adapter ", "").replace("tuning", "what") or name in ELSEWHERE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GenerationParams(max_new_tokens=1.5), "max_new_tokens is 1.5; it must be a whole number"),
        (lambda: GenerationParams(num_draft_tokens=True), "num_draft_tokens is True; it must be a whole number"),
        (lambda: GenerationParams(stop_strings="end"), "stop_strings is 'end'; it must be a tuple"),
        (lambda: GenerationParams(stop_strings=(3,)), "stop_strings is 3; it must be a text"),
        (lambda: GenerationParams(seed=2**70), f"seed is {2**70}; it must be a number of 64 bits"),
        (lambda: SamplingParams(temperature="hot"), "temperature is 'hot'; it must be a number"),
        (lambda: SamplingParams(top_p=math.nan), "top_p is nan"),
        (lambda: LearnConfig(budget=None), "budget is None; it must be a number"),
        (lambda: LearnConfig(telemetry="yes"), "telemetry is 'yes'; it must be true or false"),
        (lambda: Tuning(rank=2.5), "rank is 2.5; it must be a whole number"),
        (lambda: Comparison("eagle", "none", ("a.jsonl",)), "learners is 'none'; it must be a tuple"),
        (lambda: Distillation("eagle", ("a.jsonl",), epochs="4"), "epochs is '4'; it must be a whole number"),
    ],
)
def test_another_type_is_refused_with_the_value_and_what_it_must_be(make, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below, as it stands
        make()
    assert message in str(raised.value)


@settings(steady, max_examples=400)
@given(
    line=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(["ensemble", "osd", "none", "step_size", "=", "/", ":", "1e-3", "-1", "nan", "", "x"])
        ).map("".join),
    )
)
def test_any_line_is_a_learner_or_an_error_in_words(line):
    assert refusal(lambda: learner_of(parse_learner(line))) != ""


# Prompts

EAGLE = load_drafter("eagle", TARGET)
STRANGE = {
    "one character": "a",
    "every plane": "".join(chr(c) for c in range(0x20, 0x110000, 0x1111) if not 0xD800 <= c <= 0xDFFF),
    "nothing to see": "\x00\u200b\ufeff\u2028",
    "right to left": "\u202eabc\u202c ﷽ שלום",
    "combining": "e" + "\u0301" * 50,
    "families": "👩\u200d👩\u200d👧\u200d👦" * 5,
    "special tokens": "<|end|><|user|>system<|assistant|></s><|im_start|>",
    "blanks": " \t\n\r " * 20,
}


IN_FULL = ("one character", "combining", "families", "blanks")


@pytest.mark.parametrize(
    "text",
    [pytest.param(text, id=name, marks=pytest.mark.full if name in IN_FULL else ()) for name, text in STRANGE.items()],
)
def test_any_text_is_answered_the_same_with_and_without_drafts(text):
    tokenizer = TARGET.tokenizer
    params = GenerationParams(max_new_tokens=24, num_draft_tokens=3)
    for is_chat in (False, True):
        tokenizer.chat_template = CHAT_TEMPLATE if is_chat else None
        ids = TARGET.encode(text)
        request = DecodeLoop(TARGET, EAGLE).complete(ids, params)
        assert request.output_ids == plain(TARGET, ids, params).output_ids
        assert text in tokenizer.decode(ids, skip_special_tokens=False)
    tokenizer.chat_template = None


def test_a_prompt_without_tokens_and_one_beyond_the_vocabulary_are_refused():
    loop = DecodeLoop(TARGET, EAGLE)
    with pytest.raises(ValueError, match="the prompt has no tokens; give at least one"):
        loop.complete(TARGET.encode(""), GenerationParams())
    for ids in ([5, 288], [-1]):
        with pytest.raises(ValueError, match=rf"token {ids[-1]}, outside the model's vocabulary of 288"):
            loop.complete(ids, GenerationParams())


@cache
def ten_thousand_tokens():
    """A prompt, what is asked for, and the answer of plain decoding."""
    ids = torch.randint(256, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    params = GenerationParams(max_new_tokens=12, num_draft_tokens=4)
    return ids, params, plain(TARGET, ids, params).output_ids


@pytest.mark.parametrize("name", ["eagle", *(pytest.param(n, marks=pytest.mark.full) for n in ("ngram", "small_lm"))])
def test_ten_thousand_tokens_are_read_and_answered_as_without_drafts(name):
    ids, params, expected = ten_thousand_tokens()
    request = DecodeLoop(TARGET, load_drafter(name, TARGET)).complete(ids, params)
    assert request.output_ids == expected
    with pytest.raises(ContextOverflow, match="the prompt has 20000 tokens, the target's context 16384"):
        DecodeLoop(TARGET).complete(ids * 2, params)


# Sampling and stops


@settings(steady, max_examples=25)
@given(
    temperature=st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1e9]),
    top_k=st.sampled_from([0, 1, 7, 10_000]),
    top_p=st.sampled_from([1e-9, 0.3, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition=st.sampled_from([1e-3, 1.0, 1e3]),
    presence=st.sampled_from([-2.0, 0.0, 2.0]),
    name=st.sampled_from(["ngram", "eagle"]),
)
def test_any_mix_of_sampling_settings_gives_tokens_and_greedy_ones_those_of_plain_decoding(
    temperature, top_k, top_p, min_p, repetition, presence, name
):
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition, presence, -presence)
    params = GenerationParams(max_new_tokens=12, num_draft_tokens=4, sampling=sampling, seed=3)
    ids = [7, 9, 7, 9, 7]
    request = DecodeLoop(TARGET, load_drafter(name, TARGET)).complete(ids, params)
    assert len(request.output_ids) == 12
    assert all(0 <= i < 288 for i in request.output_ids)
    if temperature == 0:
        assert request.output_ids == plain(TARGET, ids, params).output_ids


LOOP_IDS = [72, 101, 108, 108, 111, 32]
ANSWER = plain(TARGET, LOOP_IDS, GenerationParams(max_new_tokens=40))
WHOLE, WHOLE_IDS = ANSWER.text.text, ANSWER.output_ids


@settings(steady, max_examples=25)
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 6)), min_size=1, max_size=3),
    num_draft_tokens=st.integers(1, MAX_DRAFT_TOKENS),
)
def test_stop_strings_end_a_drafted_answer_where_they_end_a_plain_one(cuts, num_draft_tokens):
    """Drafts of the answer itself, so that stops fall inside runs that were accepted whole."""
    stops = tuple(WHOLE[start : start + length] for start, length in cuts)
    params = GenerationParams(max_new_tokens=len(WHOLE_IDS), stop_strings=stops)
    expected = plain(TARGET, LOOP_IDS, params)
    script = rigs.Script(LOOP_IDS + WHOLE_IDS)
    request = DecodeLoop(TARGET, script).complete(LOOP_IDS, replace(params, num_draft_tokens=num_draft_tokens))
    assert request.text.text == expected.text.text
    assert request.output_ids == expected.output_ids
    assert request.finish_reason == expected.finish_reason == "stop"
    assert not any(stop in request.text.text for stop in stops)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("rough"))


def damage(folder, data):
    """Cuts, flips or adds something in one file of a folder."""
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = folder / data.draw(st.sampled_from(files))
    path.write_bytes(changed(path.read_bytes(), data))


def changed(content, data):
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    how = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + b"\x00\xff{" + content[at:]
    flipped = bytes(byte ^ data.draw(st.integers(1, 255)) for byte in content[at : at + 1])
    return content[:at] + flipped + content[at + 1 :]


@settings(steady, max_examples=40)
@given(data=st.data())
def test_a_checkpoint_damaged_anywhere_is_refused_by_file_or_reads_as_one(checkpoint, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(checkpoint, folder)
    damage(folder, data)
    words = refusal(lambda: load_target(folder))
    shutil.rmtree(folder)
    assert words is None or str(folder) in words


@pytest.fixture(scope="module")
def saved_drafters(checkpoint, tmp_path_factory):
    """A target and a directory for every kind of drafter that can be saved."""
    target, root = load_target(checkpoint), tmp_path_factory.mktemp("drafters")
    for name in ("ngram", "eagle", "small_lm"):
        load_drafter(name, target).save(root / name)
    adapted = load_drafter(str(root / "small_lm"), target)
    adapted.tune(Tuning("adapters", rank=2))
    adapted.save(root / "adapters")
    return target, root


@pytest.mark.parametrize("name", ["ngram", "eagle", "small_lm", "adapters"])
@settings(steady, max_examples=40)
@given(data=st.data())
def test_a_drafter_damaged_anywhere_is_refused_by_file_or_drafts(saved_drafters, tmp_path_factory, name, data):
    target, root = saved_drafters
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(root / name, folder)
    damage(folder, data)
    loaded = []
    words = refusal(lambda: loaded.append(load_drafter(folder, target)))
    shutil.rmtree(folder)
    if words is None:
        params = GenerationParams(max_new_tokens=6, num_draft_tokens=3)
        ids = target.encode("a b a b")
        assert DecodeLoop(target, loaded[0]).complete(ids, params).output_ids == plain(target, ids, params).output_ids
    else:
        assert str(folder) in words or str(root) in words


# Data


ROW = '{"prompt": "what is a b?", "id": "one"}'


@settings(steady, max_examples=150)
@given(data=st.data())
def test_a_data_file_damaged_anywhere_is_refused_by_name_or_gives_prompts(tmp_path_factory, data):
    ends = data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\n"]))
    rows = data.draw(st.lists(st.sampled_from([ROW, ROW.replace("one", "two"), '{"prompt": "x"}']), max_size=4))
    content = ends.join(rows).encode()
    is_packed = data.draw(st.booleans())
    content = gzip.compress(content, mtime=0) if is_packed else content
    if data.draw(st.booleans()):
        content = changed(content, data)
    path = tmp_path_factory.mktemp("rows") / ("rows.jsonl.gz" if is_packed else "rows.jsonl")
    path.write_bytes(content)
    words = refusal(lambda: [prompt.text.encode() for prompt in load_workload(str(path)).prompts(0)])
    assert words is None or path.name in words


# Long runs


def live_tensors():
    gc.collect()
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.full)])
def test_after_many_requests_there_is_no_more_in_memory_than_before(count):
    target = rigs.random_target()
    drafter = load_drafter("eagle", target)
    replayed = 2.5e-4 * count  # megabytes
    config = LearnConfig(min_interval=4, max_interval=4, budget=math.inf, replay_megabytes=replayed)
    learning = InlineLearning(drafter, config=config)
    loop = DecodeLoop(target, drafter, learning)
    params = GenerationParams(max_new_tokens=8, num_draft_tokens=2)

    def serve(count, seed):
        rng = torch.Generator().manual_seed(seed)
        jobs = [(torch.randint(256, (9,), generator=rng).tolist(), params) for _ in range(count)]
        run_together(loop, jobs, max_running=4)
        return live_tensors()

    before = serve(count // 2, 0)  # memory is full
    assert not learning.is_frozen
    assert learning.replay.num_bytes <= 1e6 * replayed
    after = serve(count, 1)
    assert after < before + count // 2, "fewer than one for two requests: how many fit into the memory varies a little"
