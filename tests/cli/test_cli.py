import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from checkpoints import CHAT_TEMPLATE, save_tiny
from fastapi.testclient import TestClient
from rich.console import Console
from rigs import AcceptsEverything
from waiting import HANG_SECONDS, wait_until

import onlinespec.lossless.verify
from onlinespec import registry
from onlinespec.cli import checks, compare, dispatch, distill, progress
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.compare import Comparing, Progress
from onlinespec.experiments.report_schema import read_report
from onlinespec.experiments.settings import Comparison
from onlinespec.learning.round_costs import RoundCosts
from onlinespec.models import linear
from onlinespec.models.loading import load_target
from onlinespec.publishing.store import Versions
from onlinespec.registry import LEARNER_NAMES

PROMPT = "naïve 日本 🎌 a b a b"
CONTEXT = 1024
EARLY, LATE = True, False


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Targets, drafters and data, good and bad, in one folder that the tests run in."""
    root = tmp_path_factory.mktemp("cli")
    save_tiny(root / "target", chat_template=CHAT_TEMPLATE, max_position_embeddings=CONTEXT)
    for name, options in {
        "narrow": {"hidden_size": 32},
        "wordy": {"vocab_size": 320},
        "twin": {"seed": 1},  # fits in every shape, but is another model
    }.items():
        load_drafter("eagle", load_target(save_tiny(root / name, **options))).save(root / f"for_{name}")
    save_tiny(root / "gpt2", "gpt2", n_positions=CONTEXT)
    load_drafter("eagle", load_target(root / "target")).save(root / "drafter")
    cut = shutil.copytree(root / "target", root / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    strange = shutil.copytree(root / "target", root / "strange") / "config.json"
    strange.write_text(strange.read_text().replace("LlamaForCausalLM", "StrangeForCausalLM"))
    (root / "a.jsonl").write_text("".join(json.dumps({"prompt": f"a b {i} a b"}) + "\n" for i in range(4)))
    (root / "empty.jsonl").write_text("\n")
    (root / "bad.jsonl").write_text('{"prompt": "fine"}\nnot json\n')
    (root / "taken").mkdir()
    (root / "taken" / "report.json").write_text("{}")
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.txt").write_text("precious")
    return root


@pytest.fixture(autouse=True)
def in_files(files, monkeypatch):
    monkeypatch.chdir(files)


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Comparisons in this process measure no costs of learning, which takes far longer than what they then do."""
    monkeypatch.setattr("onlinespec.experiments.compare.measure_round_costs", lambda *_: RoundCosts(0.5, 0.02))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `onlinespec` with arguments; exit status, standard output and standard error."""

    def run_main(*argv, stdin=""):
        monkeypatch.setattr(sys, "argv", ["onlinespec", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exited:
            dispatch.main()
        return exited.value.code, *capsys.readouterr()

    return run_main


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if "__pycache__" not in path.parts}


def assert_refused(result, *words):
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


GENERATE = ("generate", "target", "-p", "hi")
COMPARE = ("compare", "target", "--data", "a.jsonl")
DISTILL = ("distill", "target", "--out", "new")
SERVE = ("serve", "target")


@pytest.mark.parametrize(
    ("argv", "is_early", "words"),
    [
        (("generate", "./nowhere", "-p", "hi"), LATE, ["nowhere", "no directory"]),
        (("generate", "a.jsonl", "-p", "hi"), LATE, ["a.jsonl is a file", "config.json"]),
        (("generate", "cut", "-p", "hi"), LATE, ["cut/model.safetensors", "cut short"]),
        (("generate", "strange", "-p", "hi"), LATE, ["StrangeForCausalLM", "LlamaForCausalLM"]),
        ((*GENERATE, "--drafter", "./nowhere"), LATE, ["nowhere", "ngram, eagle"]),
        ((*GENERATE, "--drafter", "for_narrow"), LATE, ["hidden_size 32", "64"]),
        ((*GENERATE, "--drafter", "for_wordy"), LATE, ["vocab_size 320", "288"]),
        ((*GENERATE, "--drafter", "for_twin"), LATE, ["for_twin was trained for target", "this target is"]),
        ((*GENERATE, "--drafter", "foreign"), LATE, ["config.json is missing"]),
        ((*GENERATE, "--tune", "adapters"), LATE, ["--tune adapters", "small_lm", "Ngram"]),
        ((*GENERATE, "--drafter", "small_lm", "--tune", "adapters"), LATE, ["adapters", "fresh", "--drafter DIR"]),
        ((*GENERATE, "--tune", "most"), EARLY, ["tuning is most", "layers, all, adapters"]),
        ((*GENERATE, "--tune", "adapters", "--adapter-rank", "0"), EARLY, ["adapter rank is 0", "at least 1"]),
        ((*GENERATE, "--learner", "online_gradient"), LATE, ["ngram does not learn", "--learner"]),
        (("generate", "target", "-p", "x" * CONTEXT), LATE, [f"context {CONTEXT}", "shorten"]),
        (("generate", "target", "-p", ""), EARLY, ["prompt is empty", "--prompt"]),
        (("generate", "target", "-p", " \n"), EARLY, ["prompt is empty"]),
        (("generate", "target", "-p", "-"), EARLY, ["prompt is empty", "standard input"]),
        (("generate", "target", "-p", "a\udcff"), EARLY, ["not UTF-8"]),
        ((*GENERATE, "--num-draft-tokens", "99"), EARLY, ["num_draft_tokens is 99", "16"]),
        ((*GENERATE, "--max-new-tokens", "0"), EARLY, ["max_new_tokens is 0", "at least 1"]),
        ((*GENERATE, "--temperature", "-1"), EARLY, ["temperature is -1", "0 (greedy)"]),
        ((*GENERATE, "--temperature", "nan"), EARLY, ["temperature is nan"]),
        ((*GENERATE, "--top-p", "0"), EARLY, ["top_p is 0"]),
        ((*GENERATE, "--stop", ""), EARLY, ["stop_strings", "non-empty"]),
        ((*GENERATE, "--learner", "magic"), EARLY, ["magic", "frozen, online_gradient"]),
        ((*GENERATE, "--learner", "no.such:Thing"), EARLY, ["no.such:Thing", "no module named"]),
        ((*GENERATE, "--geometry", "hyperbolic"), EARLY, ["hyperbolic", "diagonal, euclidean"]),
        ((*GENERATE, "--step-size", "-0.1"), EARLY, ["step_size is -0.1"]),
        ((*GENERATE, "--step-size", "nan"), EARLY, ["step_size is nan"]),
        ((*GENERATE, "--dtype", "int4"), EARLY, ["int4", "bfloat16"]),
        ((*GENERATE, "--device", "abacus"), EARLY, ["abacus", "--device cpu"]),
        ((*GENERATE, "--seed", "99999999999999999999"), EARLY, ["seed is 99999999999999999999", "64 bits"]),
        ((*GENERATE, "--num-threads", "0"), EARLY, ["num_threads is 0", "at least 1"]),
        ((*GENERATE, "--save", "foreign"), EARLY, ["foreign", "choose another"]),
        ((*GENERATE, "--save", "a.jsonl"), EARLY, ["a.jsonl", "choose another"]),
        ((*GENERATE, "--save", "a.jsonl/sub"), EARLY, ["a.jsonl/sub", "choose another --save"]),
        ((*GENERATE, "--save", "."), EARLY, ["choose another"]),
        ((*COMPARE[:3], "gone.jsonl"), EARLY, ["gone.jsonl", "builtin:NAME"]),
        ((*COMPARE[:3], "empty.jsonl"), EARLY, ["empty.jsonl has no rows"]),
        ((*COMPARE[:3], "bad.jsonl"), EARLY, ["bad.jsonl, line 2", "not json"]),
        ((*COMPARE[:3], "builtin:poems"), EARLY, ["poems", "prose"]),
        ((*COMPARE, "--num-requests", "-1"), EARLY, ["num_requests is -1", "at least 0"]),
        ((*COMPARE, "--repeats", "0"), EARLY, ["repeats is 0"]),
        ((*COMPARE, "--window", "0"), EARLY, ["window is 0"]),
        ((*COMPARE, "--temperature", "0", "-2"), EARLY, ["temperature is -2"]),
        ((*COMPARE, "--learners", "none,magic"), EARLY, ["magic", "none, frozen"]),
        ((*COMPARE, "--learners", " , "), EARLY, ["no learners"]),
        ((*COMPARE, "--learners", "none,ensemble/magic=1"), EARLY, ["magic=1", "ensemble", "step_size_pool"]),
        ((*COMPARE, "--learners", "none/step_size=1"), EARLY, ["step_size=1", "none", "takes no settings"]),
        ((*COMPARE, "--learners", "none/"), EARLY, ['"none/" takes no settings']),
        ((*COMPARE, "--learners", "frozen,step_size=1"), EARLY, ["step_size=1", "LEARNER/step_size=1"]),
        ((*COMPARE, "--learners", "frozen,online_gradient/step_size=x"), EARLY, ['"x" is not a number']),
        ((*COMPARE, "--loss", "magic"), EARLY, ["magic", "soft_cross_entropy"]),
        ((*COMPARE, "--learn-budget", "0"), EARLY, ["budget", "0"]),
        ((*COMPARE, "--learn-costs", "-1", "0.02"), EARLY, ["round_cost", "-1"]),
        ((*COMPARE, "--learn-costs", "1", "0"), EARLY, ["row_cost", "0"]),
        ((*COMPARE, "--out", "taken"), EARLY, ["taken", "holds results already", "--out"]),
        ((*COMPARE, "--out", "a.jsonl/sub"), EARLY, ["a.jsonl/sub", "choose another --out"]),
        ((*COMPARE, "--save", "foreign/../a.jsonl"), EARLY, ["a.jsonl/frozen", "choose another --save"]),
        ((*COMPARE, "--drafter", "ngram"), LATE, ["ngram does not learn", "--learners none,frozen"]),
        ((*COMPARE, "--drafter", "for_twin"), LATE, ["for_twin was trained for target"]),
        ((*DISTILL, "--data", "gone.jsonl"), EARLY, ["gone.jsonl", "builtin:NAME"]),
        ((*DISTILL, "--data", "a.jsonl", "--epochs", "0"), EARLY, ["epochs is 0", "at least 1"]),
        ((*DISTILL, "--data", "a.jsonl", "--tune", "most"), EARLY, ["tuning is most", "layers, all, adapters"]),
        (("distill", "target", "--data", "a.jsonl", "--out", "a.jsonl/sub"), EARLY, ["choose another --out"]),
        ((*DISTILL, "--data", "a.jsonl"), LATE, ["a.jsonl hold 4 prompts", "at least 12", "--num-requests"]),
        ((*DISTILL, "--data", "a.jsonl", "--drafter", "ngram"), LATE, ["ngram does not learn", "eagle"]),
        ((*DISTILL[:3], "foreign", "--data", "builtin:sql"), LATE, ["no drafter of ours", "--out"]),
        ((*SERVE, "--port", "70000"), EARLY, ["port is 70000", "65535"]),
        ((*SERVE, "--host", "no.such.host.invalid"), EARLY, ["no.such.host.invalid", "--host"]),
        ((*SERVE, "--host", "192.0.2.1", "--port", "0"), EARLY, ["can't listen on 192.0.2.1", "--host"]),
        ((*SERVE, "--api-key", ""), EARLY, ["api_key is empty"]),
        ((*SERVE, "--served-model-name", ""), EARLY, ["model", "a name"]),
        ((*SERVE, "--max-running", "0"), EARLY, ["max_running is 0"]),
        ((*SERVE, "--max-waiting", "-1"), EARLY, ["max_waiting is -1"]),
        ((*SERVE, "--cache-megabytes", "nan"), EARLY, ["cache_megabytes is nan"]),
        ((*SERVE, "--prefix-megabytes", "-1"), EARLY, ["prefix_megabytes is -1"]),
        ((*SERVE, "--max-body-megabytes", "0"), EARLY, ["max_body", "0"]),
        ((*SERVE, "--max-body-megabytes", "inf"), EARLY, ["max_body_megabytes is inf"]),
        ((*SERVE, "--max-prompt-tokens", "0"), EARLY, ["max_prompt_tokens is 0"]),
        ((*SERVE, "--grace-seconds", "-1"), EARLY, ["grace_seconds is -1"]),
        ((*SERVE, "--temperature", "-1"), EARLY, ["temperature is -1"]),
        ((*SERVE, "--learner", "magic"), EARLY, ["magic", "frozen, online_gradient"]),
        ((*SERVE, "--save", "foreign"), EARLY, ["foreign", "choose another"]),
        (("serve", "./nowhere", "--port", "0"), LATE, ["nowhere", "no directory"]),
        ((*SERVE, "--port", "0", "--learner", "optimistic"), LATE, ["ngram does not learn", "--learner"]),
        (("inspect", "./nowhere"), EARLY, ["nowhere"]),
        (("inspect", "foreign"), EARLY, ["config.json is missing"]),
    ],
)
def test_mistakes_are_refused_in_one_message_and_leave_nothing_behind(run, files, monkeypatch, argv, is_early, words):
    """EARLY: before a target is loaded."""
    if is_early:
        monkeypatch.setattr(
            checks, "load_target", lambda *_, **__: pytest.fail("a target was loaded before the refusal")
        )
    monkeypatch.setattr(DecodeLoop, "step", lambda *_: pytest.fail("there was a step before the refusal"))
    before = contents(files)
    assert_refused(run(*argv), *words)
    assert contents(files) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
@pytest.mark.parametrize("argv", [(*GENERATE, "--save"), (*COMPARE, "--out"), (*COMPARE, "--save")])
def test_a_place_that_nobody_can_write_to_is_refused(run, argv):
    assert_refused(run(*argv, "/proc/onlinespec"), "/proc/onlinespec", f"choose another {argv[-1]}")


def test_debug_shows_the_traceback_and_the_message(run):
    status, _, err = run(*GENERATE, "--num-threads", "0", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert "num_threads is 0" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "subcommand"),
        (("dance",), "dance"),
        (("generate", "target"), "--prompt"),
        ((*GENERATE, "--bogus", "3"), "--bogus"),
        ((*GENERATE, "--seed", "many"), "--seed"),
        ((*GENERATE, "--seed"), "--seed"),
        (("compare", "target"), "--data"),
    ],
)
def test_mistakes_in_flags_exit_with_the_same_status(run, argv, words):
    status, out, err = run(*argv)
    assert status == 2
    assert out == ""
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [("demo",), ("generate", "demo", "-p", "hi"), (*COMPARE, "--drafter", "demo")])
def test_a_demo_pair_that_is_not_there_is_said_to_be_missing(run, files, monkeypatch, argv):
    monkeypatch.setitem(registry.SHIPPED_TARGETS, "demo", files / "no_target")
    monkeypatch.setitem(registry.SHIPPED_DRAFTERS, "demo", files / "no_drafter")
    assert_refused(run(*argv), "demo pair did not come with this installation", "TARGET and --drafter")


def test_the_missing_package_for_hub_data_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_refused(run("compare", "target", "--data", "hf:some/thing"), 'pip install "onlinespec[hub]"')


@pytest.mark.parametrize("command", ["demo", "generate", "compare", "distill", "serve", "inspect"])
def test_help_names_every_choice_and_no_python(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "{None}" not in out
    assert "STR " not in out.replace("│ ", "")[:200]
    if command in ("generate", "compare"):
        assert all(name in out for name in ("TARGET", "ngram", "online_gradient", "--num-draft-tokens", "default: 4"))


@pytest.mark.parametrize("name", LEARNER_NAMES)
@pytest.mark.parametrize(
    "argv", [(*GENERATE, "--learner"), (*SERVE, "--port", "0", "--learner"), (*COMPARE, "--learners")]
)
def test_every_command_takes_every_name_of_a_learner(run, monkeypatch, argv, name):
    def reached(*_, **__):
        raise ValueError("the target is loaded")

    monkeypatch.setattr(checks, "load_target", reached)
    assert_refused(run(*argv, name), "the target is loaded")


@pytest.mark.parametrize("argv", [(*GENERATE, "--learner"), (*SERVE, "--learner"), (*COMPARE, "--learners")])
def test_every_command_names_all_learners_in_its_help_and_where_one_is_wrong(run, argv):
    assert_refused(run(*argv, "magic"), "magic", ", ".join(LEARNER_NAMES))
    shown = re.sub(r"[\s│]+", " ", run(argv[0], "--help")[1])
    assert all(name in shown for name in LEARNER_NAMES)
    learns_with = {"serve": "(default: online_gradient,", "compare": "(default: none,frozen,online_gradient)"}
    assert learns_with.get(argv[0], "(default: frozen)") in shown
    assert_refused(run(*argv, "none/step_size=1"), "step_size=1", "none", "takes no settings")


def test_plain_decoding_by_name_is_plain_decoding(run, tmp_path):
    options = ("-p", PROMPT, "--max-new-tokens", "20")
    status, out, err = run("generate", "target", *options, "--learner", "none", "--drafter", "drafter")
    assert (status, out) == (0, expected_text(max_new_tokens=20) + "\n")
    assert "20 tokens in 20 steps, acceptance length 1.00" in err
    refused = run("generate", "target", *options, "--learner", "none", "--save", tmp_path / "d")
    assert_refused(refused, "no drafter to save", "leave out --save")
    assert_refused(run(*SERVE, "--learner", "none", "--versions", tmp_path), "leave out --versions")


# --- generate ---


def expected_text(prompt=PROMPT, is_chat=True, **params):
    target = load_target("target")
    return DecodeLoop(target).complete(target.encode(prompt, is_chat), GenerationParams(**params)).text.text


@pytest.mark.parametrize("drafter", ["ngram", "eagle", "drafter"])
def test_standard_output_is_the_answer_and_nothing_else(run, drafter):
    status, out, err = run("generate", "target", "-p", PROMPT, "--drafter", drafter, "--max-new-tokens", "40")
    assert status == 0
    assert out == expected_text(max_new_tokens=40) + "\n"
    assert "40 tokens in" in err


def test_prompts_may_come_from_standard_input(run):
    _, piped, _ = run("generate", "target", "-p", "-", "--max-new-tokens", "20", stdin=PROMPT + "\n")
    assert piped == expected_text(max_new_tokens=20) + "\n"


def test_raw_leaves_the_chat_template_out(run):
    _, out, _ = run("generate", "target", "-p", PROMPT, "--raw", "--max-new-tokens", "20")
    assert out == expected_text(is_chat=False, max_new_tokens=20) + "\n" != expected_text(max_new_tokens=20) + "\n"


def test_answers_end_before_a_stop_string(run):
    whole = expected_text(max_new_tokens=40)
    stop = whole[20:22]
    _, out, _ = run("generate", "target", "-p", PROMPT, "--max-new-tokens", "40", "--stop", stop, "never")
    assert out == whole[: whole.index(stop)] + "\n"


def test_sampling_is_repeated_by_its_seed(run):
    def sampled(seed):
        options = ("--temperature", "0.8", "--max-new-tokens", "30", "--drafter", "drafter")
        return run("generate", "target", "-p", PROMPT, *options, "--seed", seed)[1]

    assert sampled(3) == sampled(3) != sampled(4)


def test_sampling_follows_the_checkpoint_where_nothing_is_said(run, monkeypatch):
    recommended = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    seen = []
    start = DecodeLoop.start

    def recording(loop, prompt_ids, params, **tags):
        seen.append(params.sampling)
        return start(loop, prompt_ids, params, **tags)

    monkeypatch.setattr(
        checks, "load_target", lambda *machine, **more: replace(load_target(*machine, **more), sampling=recommended)
    )
    monkeypatch.setattr(DecodeLoop, "start", recording)
    run(*GENERATE, "--max-new-tokens", "2")
    run(*GENERATE, "--max-new-tokens", "2", "--temperature", "0", "--top-k", "0")
    assert seen == [recommended, SamplingParams(temperature=0.0, top_k=0, top_p=0.9)]


def test_what_was_learned_is_saved_and_loaded_again(run, tmp_path):
    saved = tmp_path / "new" / "drafter"
    options = ("--max-new-tokens", "120", "--num-draft-tokens", "2", "--learner", "online_gradient", "--save", saved)
    status, _, err = run("generate", "target", "-p", PROMPT, "--drafter", "drafter", *options)
    assert status == 0
    version = json.loads((saved / "onlinespec.json").read_text())["weights_version"]
    assert version >= 1
    assert f"weights version {version}" in err
    assert run("generate", "target", "-p", PROMPT, "--drafter", saved, *options)[0] == 0  # and saved in place again
    assert json.loads((saved / "onlinespec.json").read_text())["weights_version"] > version
    assert f"{version}" in run("inspect", saved)[1]
    assert [path.name for path in saved.parent.iterdir()] == ["drafter"]


def test_a_drafter_that_learned_nothing_is_not_written_over_one_that_did(run, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    learning = ("--max-new-tokens", "120", "--num-draft-tokens", "2")
    assert run("generate", "target", "-p", PROMPT, "--drafter", "drafter", *learning, "--save", saved)[0] == 0
    learning += ("--num-requests", "1", "--save", tmp_path / "all", "--out", tmp_path / "a")
    assert run(*COMPARE, "--drafter", "drafter", *learning)[0] == 0
    places = (saved, tmp_path / "all" / "online_gradient")
    learned = [(place / "model.safetensors").read_bytes() for place in places]

    def interrupted(loop, *arguments, **tags):
        raise KeyboardInterrupt

    monkeypatch.setattr(DecodeLoop, "step", interrupted)
    status, _, err = run("generate", "target", "-p", PROMPT, "--drafter", "drafter", "--save", saved)
    assert (status, f"nothing was learned, so {saved} stays as it is" in err) == (130, True)
    status, _, err = run(*COMPARE, "--drafter", "drafter", "--save", tmp_path / "all", "--out", tmp_path / "b")
    assert (status, f"nothing was learned, so {places[1]} stays as it is" in err) == (130, True)
    assert [(place / "model.safetensors").read_bytes() for place in places] == learned


def test_an_empty_name_is_refused(run):
    assert_refused(run("generate", "target", "-p", PROMPT, "--drafter", ""), "name is empty")
    assert_refused(run(*COMPARE, "--drafter", ""), "name is empty")


def test_an_interrupted_answer_keeps_what_was_learned(run, tmp_path, monkeypatch):
    step, count, whole = DecodeLoop.step, [], expected_text()

    def interrupted(loop, requests):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        step(loop, requests)

    monkeypatch.setattr(DecodeLoop, "step", interrupted)
    saved = tmp_path / "saved"
    status, out, err = run("generate", "target", "-p", PROMPT, "--drafter", "drafter", "--save", saved)
    assert status == 130
    assert out
    assert whole.startswith(out)
    assert "in 7 steps" in err
    assert (saved / "model.safetensors").is_file()


# --- compare ---


def test_compare_writes_its_files_and_shows_the_table(run, tmp_path):
    out = tmp_path / "out"
    options = ("--out", out, "--save", tmp_path / "saved", "--max-new-tokens", "8", "--num-requests", "2")
    status, shown, _ = run(*COMPARE, "builtin:sql", "--drafter", "drafter", *options)
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "requests.jsonl"]
    assert [one.learner for one in read_report(out / "report.json").runs] == ["none", "frozen", "online_gradient"]
    assert all(name in shown for name in ("none", "frozen", "online_gradient", "4 of 4"))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["frozen", "online_gradient"]
    assert_refused(run(*COMPARE, "--out", out), "holds results already")


@pytest.fixture
def without_packing(monkeypatch):
    """A processor whose products have other bits for other numbers of rows."""
    monkeypatch.setattr(linear, "can_pack", lambda: False)
    assert linear.linear_for(torch.device("cpu"), torch.float32) is linear.PlainLinear


LEARNS_OFTEN = ("--learn-costs", 1, 0.01, "--learn-budget", "inf", "--min-interval", 4, "--max-interval", 4)


@pytest.mark.parametrize(
    "target", ["target", pytest.param("gpt2", marks=pytest.mark.full)], ids=["own", "transformers"]
)
def test_comparing_without_packing_or_through_transformers_gives_plain_answers_up_to_ties(
    run, tmp_path, without_packing, target
):
    options = ("--drafter", "eagle", "--out", tmp_path / "out", "--max-new-tokens", 40, "--num-requests", 2)
    status, _, err = run("compare", target, *COMPARE[2:], *options, *LEARNS_OFTEN)
    assert status == 0, err
    for one in read_report(tmp_path / "out" / "report.json").runs:
        lines = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
        differing = [row for row in lines if row["learner"] == one.learner and not row["identical_to_plain"]]
        assert len(differing) == one.totals.ties
        assert one.totals.identical_to_plain
    learned = read_report(tmp_path / "out" / "report.json").runs[-1]
    assert learned.totals.learn_seconds > 0


@pytest.mark.parametrize("target", ["target", "gpt2"], ids=["own", "transformers"])
def test_generating_without_packing_or_through_transformers_answers_as_without_a_drafter(run, without_packing, target):
    command = ("generate", target, "-p", "a b a b", "--drafter", "eagle", "--max-new-tokens", 40)
    plain = run(*command, "--num-draft-tokens", 0)
    learned = run(*command, "--learner", "online_gradient", *LEARNS_OFTEN)
    assert plain[0] == learned[0] == 0
    assert learned[1] == plain[1]


@pytest.mark.parametrize("target", ["target", "gpt2"], ids=["own", "transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_served_by_either_path(run, target, dtype):
    status, _, err = run("generate", target, "-p", "hi", "--drafter", "eagle", "--dtype", dtype, "--max-new-tokens", 8)
    assert status == 0
    assert "8 tokens" in err


def test_answers_that_differ_from_plain_decoding_fail_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onlinespec.lossless.verify.Coupled, "judge", AcceptsEverything.judge)
    options = ("--out", tmp_path / "out", "--max-new-tokens", "8", "--learners", "none,frozen")
    status, _, err = run(*COMPARE, *options)
    assert status == 1
    assert "answers of frozen differ from plain decoding" in err


def test_where_speculation_lost_it_is_said_with_what_to_try(run, tmp_path, monkeypatch):
    for ratio, is_said in ((0.9, True), (1.1, False)):
        monkeypatch.setattr("onlinespec.experiments.metrics.speedup", lambda stats, control, ratio=ratio: ratio)
        options = ("--out", tmp_path / str(ratio), "--max-new-tokens", "4", "--num-requests", "1")
        _, _, err = run(*COMPARE, *options)
        assert ("no drafter was faster than plain decoding here" in err.replace("\n", " ")) is is_said


def test_an_interrupted_comparison_is_shown_and_kept(run, tmp_path, monkeypatch):
    complete = DecodeLoop.complete

    def interrupted(loop, *arguments, request_id="", **tags):
        if request_id == "a-3":
            raise KeyboardInterrupt
        return complete(loop, *arguments, request_id=request_id, **tags)

    monkeypatch.setattr(DecodeLoop, "complete", interrupted)
    status, shown, err = run(*COMPARE, "--out", tmp_path / "out", "--max-new-tokens", "8")
    assert status == 130
    assert "what was finished is kept" in err
    assert "2 of 2" in shown
    assert (tmp_path / "out" / "report.html").is_file()
    assert read_report(tmp_path / "out" / "report.json").provenance["partial"] is True


def event(done, data, frozen, learning, expected=None, segment=0):
    lengths = {"none": float(frozen > 0), "frozen": frozen, "online_gradient": learning}
    return Progress(done, expected, segment, data, lengths)


def test_a_log_gets_a_line_per_stretch_with_the_means_of_its_requests(capsys):
    with progress.shown() as on_progress:
        on_progress(event(1, "a", 1.0, 1.5, expected=4))
        on_progress(event(2, "a", 2.0, 2.5, expected=4))
        assert capsys.readouterr().err == ""
        on_progress(event(3, "b", 1.0, 1.25, expected=4, segment=1))
        first = "2/4  a: 2 requests, mean acceptance length frozen 1.50, online_gradient 2.00\n"
        assert capsys.readouterr().err == first
    last = "3/4  b: 1 request, mean acceptance length frozen 1.00, online_gradient 1.25\n"
    assert capsys.readouterr().err == last  # cut short, by Ctrl-C say


def test_the_same_data_twice_in_a_row_is_two_stretches(capsys):
    with progress.shown() as on_progress:
        for done, segment in enumerate([0, 1, 1, 2], start=1):
            on_progress(event(done, "a", 1.0, 1.0, expected=6, segment=segment))
    starts = [line.partition(" request")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == ["1/6  a: 1", "3/6  a: 2", "4/6  a: 1"]


def test_skipped_requests_are_told_and_not_averaged(capsys):
    with progress.shown() as on_progress:
        on_progress(event(1, "a", 0.0, 0.0, expected=2))
        on_progress(event(2, "a", 2.0, 3.0, expected=2))
    shown = capsys.readouterr().err
    assert shown == "2/2  a: 1 request (1 skipped), mean acceptance length frozen 2.00, online_gradient 3.00\n"


def test_without_a_drafter_there_is_no_acceptance_length_to_tell(capsys):
    with progress.shown() as on_progress:
        on_progress(Progress(1, None, 0, "a", {"none": 1.0}))
    assert capsys.readouterr().err == "1/?  a: 1 request\n"


def test_a_comparison_tells_a_log_how_far_it_is(run, tmp_path):
    options = ("--out", tmp_path / "out", "--max-new-tokens", "4", "--num-requests", "2", "1", "--drafter", "drafter")
    err = run(*COMPARE, "builtin:sql", *options)[2]
    lines = [line.partition(",")[0] for line in err.splitlines() if "/3 " in line]
    assert lines == ["2/3  a: 2 requests", "3/3  sql: 1 request"]


@pytest.mark.parametrize("data", ["sql", "arithmetic", "code_search.stream"])
def test_the_bar_shows_every_figure_in_80_columns(monkeypatch, data):
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True, force_interactive=True, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    with progress.shown() as on_progress:
        on_progress(event(1234, data, 1.07, 10.48, expected=5000))
    last = shown.getvalue().split("\r")[-1]
    assert "1234/" in last
    assert f" {data[:6]}" in last
    assert "frozen 1.07  online_gradient 10.48" in last


@pytest.fixture(scope="session")
def report(files, tmp_path_factory):
    learners, data = ("none", "frozen", "online_gradient"), (str(files / "a.jsonl"),)
    comparison = Comparison("eagle", learners, data, (2,), generation=GenerationParams(8))
    return Comparing(load_target(files / "target"), comparison).run()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_stay_readable_in_narrow_terminals(report, tmp_path, monkeypatch, width):
    shown = io.StringIO()
    monkeypatch.setattr(compare, "out", Console(file=shown, width=width))
    compare._show(report, tmp_path)
    table = shown.getvalue().partition("the page")[0]
    assert all(len(line) <= width for line in table.splitlines())
    words = table.split()
    assert all(name in words for name in ("none", "frozen", "online_gradient"))
    assert "…" not in table
    assert words.count("of") == 3  # identical to plain: "2 of 2"


def test_inspecting_demo_shows_the_target_and_the_drafter(run):
    status, shown, _ = run("inspect", "demo")
    assert status == 0
    kinds = [line.split(maxsplit=1)[1].strip() for line in shown.splitlines() if line.startswith("kind ")]
    assert kinds == ["target", "drafter (eagle)"]


def test_inspect_shows_target_and_drafter(run):
    assert "LlamaForCausalLM" in run("inspect", "target")[1]
    status, out, err = run("inspect", "drafter")
    assert (status, err) == (0, "")
    assert "drafter (eagle)" in out


# --- distill ---


@pytest.fixture
def prompts(files):
    path = files / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"count {i % 20}"}) + "\n" for i in range(25)))
    return ("distill", "target", "--data", "prompts.jsonl", "--num-requests", "0", "--max-new-tokens", "12")


def test_distilling_tells_what_it_brought_and_leaves_a_drafter_with_its_history(run, prompts, tmp_path):
    out = tmp_path / "d"
    status, shown, err = run(*prompts, "--out", out, "--epochs", "3", "--step-size", "1e-2")
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    for words in (
        "before",
        "after epoch 3",
        "20 prompts in 240 tokens",
        "5 left out as repetitions",
        "9 steps",
        "0.01",
    ):
        assert words in shown
    assert f"onlinespec compare target --drafter {out} --data prompts.jsonl" in shown
    lines = [line.partition(" ")[0] for line in err.splitlines()]
    assert lines[0] == "answering"
    assert lines[-1] == "training"
    assert "20/20" in err
    assert "9/9" in err
    assert "240 tokens of the target's answers to 20" in " ".join(run("inspect", out)[1].split())
    assert_refused(run(*prompts, "--out", out), "holds a drafter already", "--restart")
    assert run("generate", "target", "-p", "hi", "--drafter", out, "--max-new-tokens", "4")[0] == 0


def test_a_stopped_distillation_says_how_to_go_on(run, prompts, tmp_path, monkeypatch):
    def interrupted(self, requests):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "step", interrupted)
        status, shown, err = run(*prompts, "--out", tmp_path / "d", "--restart")
    assert (status, shown) == (130, "")
    assert f"the same command without --restart goes on with what is in {tmp_path / 'd.work'}" in err
    assert run(*prompts, "--out", tmp_path / "d", "--epochs", "1")[0] == 2, "another command"
    assert run(*prompts, "--out", tmp_path / "d")[0] == 0


def test_training_that_brings_nothing_says_so(run, prompts, tmp_path):
    status, _, err = run(*prompts, "--out", tmp_path / "d", "--step-size", "1e-30", "--epochs", "1")
    assert status == 0
    assert "training brought nothing" in " ".join(err.split())


def distill_event(phase, done, rate, *scores):
    return distill.Progress(phase, done, 400, rate, tuple(distill.Score(1.5, 3.2, i, i) for i in range(len(scores))))


def test_a_log_of_distilling_gets_a_line_per_phase_score_and_quarter_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(distill, "monotonic", lambda: now[0])
    with distill.shown() as on_progress:
        for done in (0, 8, 16, 24):
            on_progress(distill_event("answering", done, "70 tokens/s"))
            now[0] += 10.0
        on_progress(distill_event("scoring", 3, ""))
        for done, scores in ((1, "a"), (2, "a"), (100, "ab"), (101, "ab")):
            on_progress(distill_event("training", done, "500 rows/s", *scores))
    assert capsys.readouterr().err.splitlines() == [
        "answering 0/400 70 tokens/s",
        "answering 16/400 70 tokens/s, 0:08:00 left",
        "training 1/400 500 rows/s, acceptance length 1.50 before",
        "training 100/400 500 rows/s, acceptance length 1.50 after epoch 1, 0:00:00 left",
    ]


def test_the_bars_of_distilling_fit_in_80_columns(monkeypatch):
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True, force_interactive=True, color_system=None)
    monkeypatch.setattr(distill, "err", console)
    with distill.shown() as on_progress:
        on_progress(distill_event("answering", 400, "1234 tokens/s"))
        on_progress(distill_event("training", 399, "12345 rows/s", "a", "b"))
    last = shown.getvalue().split("\x1b[2K")[-1]
    assert "12345 rows/s, 1.50 after epoch 1" in last
    assert "…" not in last


# --- as a process ---


def start(*argv, program=("-m", "onlinespec.cli"), **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, *program, *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process):
    def still_runs():
        assert process.poll() is None, process.communicate()

    wait_until(condition, still_runs)


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.full
def test_a_reader_that_has_seen_enough_gets_no_traceback():
    process = start("generate", "target", "-p", "hi", "--max-new-tokens", "400")
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(HANG_SECONDS) == 1
    assert "Traceback" not in err
    assert "Error" not in err
    assert "error" not in err


def test_a_reader_of_help_that_has_seen_enough_gets_no_traceback():
    process = start("compare", "--help")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(HANG_SECONDS)) == ("", 1)


@pytest.mark.full
def test_ctrl_c_leaves_whole_files(tmp_path):
    out = tmp_path / "out"
    process = start(*COMPARE[:3], "builtin:sql", "--num-requests", "5000", "--max-new-tokens", "8", "--out", out)
    wait_for(lambda: num_lines(out / "requests.jsonl") >= 9, process)
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "what was finished is kept" in err
    assert "online_gradient" in shown
    report = read_report(out / "report.json")
    assert report.provenance["partial"] is True
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == sum(one.totals.requests for one in report.runs) >= 9
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.full
def test_a_killed_comparison_leaves_whole_lines_and_the_finished_segments(tmp_path):
    out = tmp_path / "out"
    data = ("a.jsonl", "builtin:sql", "--num-requests", "4")
    process = start(*COMPARE[:3], *data, "--repeats", "1000", "--max-new-tokens", "8", "--out", out)
    wait_for(lambda: (out / "report.json").exists() and num_lines(out / "requests.jsonl") >= 3 * 4 + 3, process)
    process.kill()
    process.communicate(timeout=HANG_SECONDS)
    content = (out / "requests.jsonl").read_bytes()
    assert content.endswith(b"\n")
    lines = [json.loads(line) for line in content.splitlines()]
    report = read_report(out / "report.json")
    assert report.provenance["partial"] is True
    assert report.runs[0].segments[0].requests == 4
    assert len(lines) >= sum(one.totals.requests for one in report.runs) >= 3 * 4


# --- serve ---


def test_a_port_in_use_is_said_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(checks, "load_target", lambda *_, **__: pytest.fail("a target was loaded before the refusal"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(run(*SERVE, "--port", port), f"127.0.0.1:{port}", "in use", "another --port")


def test_the_missing_packages_for_serving_are_named(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("onlinespec.cli.serve", "onlinespec.server."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(run(*SERVE), "uvicorn", 'pip install "onlinespec[server]"')


@pytest.fixture
def greeting(run, monkeypatch):
    """What a server says as it begins, and its app; it ends at once, in this process."""
    apps = []

    def greet_and_end(app, engine, listener, grace_seconds, greet):
        greet()
        apps.append(app)
        return signal.SIGTERM

    def begin(*argv):
        flag = "--fixed-draft-length"  # else what steps cost is measured, which takes seconds
        status, _, said = run("serve", *argv, *(() if flag in argv else (flag,)), "--port", "0")
        assert status == 0, said
        return said, apps.pop()

    monkeypatch.setattr("onlinespec.cli.serve.run", greet_and_end)
    return begin


@contextmanager
def serving(*argv, **more):
    """A server as a process of its own, its address, and what it said when it began."""
    process = start("serve", *argv, "--port", "0", **more)
    try:
        said = []
        while not (said and said[-1].startswith("try: curl")):
            said.append(process.stderr.readline())
            assert said[-1], process.communicate()
        yield process, said[-1].split()[2].partition("/v1")[0], "".join(said)
    finally:
        process.kill()
        process.communicate()


def ask(url, **body):
    """Opens a stream; lines of it can be read."""
    raw = json.dumps({"stream": True, "ignore_eos": True, "temperature": 0} | body).encode()
    headers = {"Content-Type": "application/json"}
    return urlopen(Request(f"{url}/v1/completions", raw, headers), timeout=HANG_SECONDS)


def streamed(response):
    """Text of a stream to its end, and whether that came."""
    datas = [
        line.removeprefix(b"data: ").strip() for line in response.read().splitlines() if line.startswith(b"data: ")
    ]
    chunks = [json.loads(data) for data in datas if data != b"[DONE]"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if "choices" in chunk), datas[-1] == b"[DONE]"


def refusal(url):
    """The first answer that is none."""
    while True:
        try:
            ask(url, prompt="late", max_tokens=1).close()
        except HTTPError as error:
            return error


def test_the_end_under_load_lets_answers_finish_and_keeps_what_was_learned(tmp_path):
    options = ("--drafter", "drafter", "--save", tmp_path / "saved", "--learn-in", "inline", "--fixed-draft-length")
    options += ("--num-draft-tokens", "1", "--min-interval", "64", "--max-interval", "64")
    with serving("target", *options, "--grace-seconds", "600") as (process, url, said):
        assert "drafter drafter learns between steps (online_gradient)" in said
        assert "warning" not in said
        prompts = [f"a b {i} a b" for i in range(2)]
        streams = [ask(url, prompt=prompt, max_tokens=240) for prompt in prompts]
        process.send_signal(signal.SIGTERM)
        refused = refusal(url)
        assert (refused.code, refused.headers["Retry-After"]) == (503, "1")
        target, params = load_target("target"), GenerationParams(240, ignore_end_tokens=True)
        for prompt, stream in zip(prompts, streams, strict=True):
            expected = DecodeLoop(target).complete(target.encode(prompt, is_chat=False), params)
            assert streamed(stream) == (expected.text.text, True)
        _, err = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, err
        assert "saved to" in err
        assert re.search(r"stopping: \d answers have 600 seconds to end", err)
        assert "cut off" not in err
        assert err.endswith("stopped\n")
        assert "Traceback" not in err
    assert json.loads((tmp_path / "saved" / "onlinespec.json").read_text())["weights_version"] >= 1


# Its learning process yields to nobody, so that busy neighbours do not starve it.
EAGER = """
import functools
from onlinespec.cli import main, serve
serve.TrainerSpec = functools.partial(serve.TrainerSpec, niceness=0)
main()
"""


@pytest.mark.full
def test_a_server_that_is_killed_goes_on_from_the_newest_version(tmp_path, run, greeting):
    options = ("--drafter", "drafter", "--versions", tmp_path, "--learn-budget", "5", "--step-size", "5e-3")
    options += ("--min-interval", "8", "--max-interval", "8", "--fixed-draft-length")

    def live(url):
        return json.loads(urlopen(f"{url}/live", timeout=HANG_SECONDS).read())

    def answers(url):
        return [streamed(ask(url, prompt=f"a b {i}", max_tokens=60)) for i in range(4)]

    with serving("target", *options, program=("-c", EAGER)) as (process, url, said):
        assert "learns in a process of its own" in said
        first = answers(url)
        while not live(url)["learning"]["weights_version"]:
            assert answers(url) == first
        process.kill()
        process.communicate()
    _, history, _ = run("inspect", tmp_path)
    assert "promoted" in history
    with serving("target", *options) as (process, url, said):
        assert "going on with version" in said
        assert "begins anew" not in said
        assert live(url)["learning"]["weights_version"] >= 1
        assert answers(url) == first
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG_SECONDS)
    options += ("--learn-in", "thread")
    said, _ = greeting("target", *options, "--reset-drafter")
    assert "are kept in versions.reset-" in said
    assert "going on" not in said
    for record in tmp_path.glob("versions/*/version.json"):
        record.write_text("damaged")
    said, _ = greeting("target", *options)
    assert "can be served: beginning anew with drafter" in said
    code, _, err = run("serve", "target", "--reset-drafter")
    assert (code, "--reset-drafter moves the versions in --versions DIR aside; give that, too" in err) == (2, True)


def test_a_folder_that_can_not_take_versions_is_refused_before_anything_is_loaded(tmp_path, run, monkeypatch):
    monkeypatch.setattr("onlinespec.publishing.store._HANDOVER_SECONDS", 0.0)
    monkeypatch.setattr(checks, "load_target", lambda *_, **__: pytest.fail("a target was loaded before the refusal"))
    (tmp_path / "file").touch()
    code, _, err = run("serve", "target", "--port", "0", "--versions", tmp_path / "file")
    assert (code, "is a file; give a directory" in err) == (2, True)
    code, _, err = run("serve", "target", "--port", "0", "--versions", tmp_path / "file" / "below")
    assert (code, "no versions can be kept in" in err) == (2, True)
    with Versions(tmp_path) as held:
        held.hold()
        code, _, err = run("serve", "target", "--port", "0", "--versions", tmp_path)
    assert (code, "another one keeps its versions in" in err) == (2, True)


@pytest.mark.full
@pytest.mark.parametrize("seconds", ["0", "600"], ids=["no grace", "a second Ctrl-C"])
def test_what_may_not_finish_is_cut_off_and_told(seconds):
    options = ("--grace-seconds", seconds, "--num-draft-tokens", "0", "--max-running", "1")
    with serving("target", *options) as (process, url, _):
        streams = [ask(url, prompt="a b", max_tokens=1000, n=8) for _ in range(8)]  # half a minute's work at the least
        process.send_signal(signal.SIGINT)
        assert f"stopping: 64 answers have {seconds} seconds to end" in process.stderr.readline()
        if seconds != "0":
            process.send_signal(signal.SIGINT)
        ends = [streamed(stream)[1] for stream in streams]
        _, err = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert not all(ends)


def test_who_serves_everyone_without_a_key_is_warned_and_a_key_is_taken_from_the_environment(greeting, monkeypatch):
    said, _ = greeting("target", "--host", "0.0.0.0")
    assert "warning: anyone" in said
    assert "--api-key" in said
    monkeypatch.setenv("ONLINESPEC_API_KEY", "secret")
    said, app = greeting("target", "--host", "0.0.0.0")
    assert "warning" not in said
    assert "secret" not in said
    assert "Authorization: Bearer KEY" in said
    assert TestClient(app).post("/v1/completions", json={"prompt": "a"}).status_code == 401


def test_plain_decoding_is_served_by_name(greeting):
    said, app = greeting("target", "--learner", "none")
    assert "; plain decoding" in said
    target, params = load_target("target"), GenerationParams(20, ignore_end_tokens=True)
    expected = DecodeLoop(target).complete(target.encode("a b", is_chat=False), params)
    with TestClient(app) as client:
        body = {"prompt": "a b", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected.text.text
        assert client.get("/live").json()["learning"] == {}


def test_a_target_that_runs_through_transformers_says_that_it_serves_one_request_at_a_time(greeting):
    assert "one request at a time" in greeting("gpt2")[0]


@pytest.mark.full
def test_a_target_that_runs_through_transformers_is_served_one_request_at_a_time():
    with serving("gpt2") as (_, url, _):
        streams = [ask(url, prompt="a b", max_tokens=20) for _ in range(2)]
        first, second = map(streamed, streams)
        assert first == second
        assert first[1]


def run_python(code, *argv):
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


TELLING = """
import atexit, sys
from onlinespec.cli import main
atexit.register(lambda: print(*sys.modules))
main()
"""


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (("--help",), 0),
        (("serve", "--help"), 0),
        ((*GENERATE, "--num-draft-tokens", "99"), 2),
        ((*COMPARE[:3], "gone.jsonl"), 2),
        pytest.param(("demo", "--help"), 0, marks=pytest.mark.full),
        pytest.param((*SERVE, "--port", "-1"), 2, marks=pytest.mark.full),
        pytest.param(("dance",), 2, marks=pytest.mark.full),
        pytest.param((*GENERATE, "--bogus", "3"), 2, marks=pytest.mark.full),
        pytest.param((*GENERATE, "--num-threads", "0"), 2, marks=pytest.mark.full),
        pytest.param((*GENERATE, "--step-size", "-1"), 2, marks=pytest.mark.full),
        pytest.param((*GENERATE, "--stop", ""), 2, marks=pytest.mark.full),
        pytest.param((*COMPARE, "--temperature", "-1"), 2, marks=pytest.mark.full),
    ],
    ids=lambda part: part[-1] if isinstance(part, tuple) else "",
)
def test_help_and_plain_mistakes_wait_for_no_large_import(argv, status):
    done = run_python(TELLING, *argv)
    assert done.returncode == status, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "onlinespec.cli.dispatch" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "matplotlib", "huggingface_hub", "fastapi", "uvicorn"}


@pytest.mark.full
def test_inspecting_waits_for_torch_only():
    loaded = set(run_python(TELLING, "inspect", "drafter").stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "huggingface_hub"}


INTERRUPTED = """
import os, signal, sys, time
module = sys.argv.pop(1)

class Finder:
    def find_spec(name, *_):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            except KeyboardInterrupt:
                pass  # as C code and destructors do, and the Ctrl-C is lost

sys.meta_path.insert(0, Finder)
from onlinespec.cli import main
main()
"""


@pytest.mark.parametrize(
    "module",
    ["tyro", "torch", pytest.param("transformers.models.auto.tokenization_auto", marks=pytest.mark.full)],
)
def test_ctrl_c_amid_an_import_ends_in_one_line(module):
    done = run_python(INTERRUPTED, module, *GENERATE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_an_ignored_ctrl_c_stays_ignored():
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = run_python(ignoring + INTERRUPTED, "torch", "inspect", "drafter")
    assert (done.returncode, done.stderr) == (0, "")
    assert "drafter (eagle)" in done.stdout


def test_ctrl_c_after_the_end_changes_nothing():
    at_exit = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    done = run_python(at_exit + "from onlinespec.cli import main; main()", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_is_one_line_of_a_process():
    process = start(*GENERATE, "--num-threads", "0")
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: num_threads is 0")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("lost"), AssertionError("never"), ZeroDivisionError("none"), IndexError(3)])
def test_what_no_one_foresaw_is_told_as_a_bug_in_one_line(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checks, "load_target", fail)
    status, out, err = run(*GENERATE)
    assert (status, out) == (70, "")
    assert err.startswith(f"error: this is a bug of onlinespec ({type(error).__name__}")
    assert "--debug" in err
    assert "Traceback" not in err
    _, _, err = run(*GENERATE, "--debug")
    assert "Traceback" in err
