import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import add_tokens, save_tiny
from rigs import AcceptsEverything

import onlinespec.experiments.compare
import onlinespec.experiments.ties
import onlinespec.lossless.verify
from onlinespec.config import GenerationParams
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.compare import Comparing
from onlinespec.experiments.report_schema import RequestRecord, Segment, Totals, Window, read_report
from onlinespec.experiments.settings import Comparison
from onlinespec.experiments.ties import TIE_GAP, is_tie
from onlinespec.learning.round_costs import RoundCosts
from onlinespec.learning.settings import LearnConfig
from onlinespec.models.loading import load_target

LEARNERS = ("none", "frozen", "online_gradient")
PROMPTS = ("what is a b a b a b?", "one two one two", "sum 1 + 1, 2 + 2", "a a a a a a", "the end of the end")
CONTEXT = 128
TOO_LONG = "x" * CONTEXT


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(save_tiny(tmp_path_factory.mktemp("target"), max_position_embeddings=CONTEXT))


def write(folder, name="some", prompts=PROMPTS):
    """A data file; the ids of its rows start with its name."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "id": f"{name}{i}"}) + "\n" for i, p in enumerate(prompts)))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return partial(write, tmp_path)


@pytest.fixture(scope="module")
def usual(target, tmp_path_factory):
    """The report of a greedy comparison with the settings of `comparison_of`, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("usual")
    return run(target, write(folder), out=folder / "out"), folder / "out"


def comparison_of(*data, max_new_tokens=8, learn=LearnConfig(min_interval=8, max_interval=8), **more):
    settings = {"drafter": "eagle", "learners": LEARNERS, "num_requests": (0,)} | more
    return Comparison(data=data, generation=GenerationParams(max_new_tokens), learn=learn, **settings)


def run(target, *data, out=None, on_progress=lambda progress: None, **more):
    return Comparing(target, comparison_of(*data, **more), out).run(on_progress)


def run_of(report, learner):
    (found,) = [run for run in report.runs if run.learner == learner]
    return found


def lines_of(folder):
    content = (folder / "requests.jsonl").read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.splitlines()]


# --- what is written ---


def test_report_has_exactly_the_documented_fields(usual):
    report = json.loads((usual[1] / "report.json").read_text())
    totals = set(
        "requests skipped tokens steps acceptance_length acceptance_rate acceptance_by_position decode_seconds "
        "learn_seconds diagnostic_seconds tokens_per_second speedup_vs_none speedup_vs_frozen "
        "identical_to_plain ties".split()
    )
    assert set(report) == {"schema", "provenance", "runs"}
    assert report["schema"] == 1
    assert {"command", "commit", "target", "drafter", "fingerprint", "settings"} < set(report["provenance"])
    assert report["provenance"]["partial"] is False
    for one in report["runs"]:
        assert set(one) == {"learner", "temperature", "seed", "repeat", "totals", "segments"}
        assert set(one["totals"]) == totals == set(Totals.__struct_fields__)
        for segment in one["segments"]:
            assert set(segment) == totals | {"index", "data", "windows"} == set(Segment.__struct_fields__)
            assert all(set(window) == set(Window.__struct_fields__) for window in segment["windows"])


def test_telemetry_is_written_where_it_was_asked_for_and_read_back(target, data, tmp_path):
    learners = ("none", "frozen", "optimistic", "ensemble/with_frozen=true")
    learn = LearnConfig(min_interval=4, max_interval=4, telemetry=True)
    report = run(target, data(), out=tmp_path / "out", learners=learners, learn=learn)
    assert read_report(tmp_path / "out" / "report.json").runs == report.runs
    seen = {one.learner: one.telemetry for one in report.runs}
    assert seen["none"] is seen["frozen"] is None
    assert seen["optimistic"].hint_error_ratio > 0
    assert seen["optimistic"].regret_vs_best_expert is None
    assert seen["ensemble/with_frozen=true"].regret_vs_best_expert is not None
    assert run_of(report, "optimistic").totals.diagnostic_seconds > 0


def test_learners_of_many_rounds_and_of_few_that_do_as_well_look_alike(target, data):
    """Neither moves: what differs is the number of rounds alone."""
    learn = LearnConfig(step_size=0.0, min_interval=4, max_interval=4, telemetry=True, budget=float("inf"))
    learners = ("online_gradient", "online_gradient/min_interval=500/max_interval=500")
    report = run(target, data(), learners=learners, learn=learn)
    often, rarely = (one.telemetry for one in report.runs)
    assert len(often.rounds) > 3 * len(rarely.rounds)
    assert often.regret_upper > 3 * rarely.regret_upper
    assert often.num_rows == rarely.num_rows == report.runs[0].totals.tokens
    assert often.kl_per_row == pytest.approx(rarely.kl_per_row, rel=1e-4)
    assert often.regret_vs_frozen_per_row == pytest.approx(0.0, abs=1e-6)


def test_several_settings_of_one_learner_are_runs_of_their_own(target, data):
    learners = ("online_gradient", "online_gradient/step_size=0", "online_gradient/replay_every=0")
    report = run(target, data(), learners=learners, num_requests=(1,))
    assert [one.learner for one in report.runs] == list(learners)


@pytest.mark.full
def test_what_learning_costs_is_measured_if_asked_and_told(target, data, usual):
    measuring = run(target, data(), measures_costs=True, num_requests=(1,))
    (measured,) = measuring.provenance["learn_costs"]
    assert 0 < measured["row_cost"] < 100
    assert 0 <= measured["round_cost"] < 100
    assert "learn_costs" not in usual[0].provenance


def test_costs_are_measured_as_requests_decode_at_each_temperature(target, data, monkeypatch):
    asked = []

    def measured(*_):
        return RoundCosts(1.0, 0.01 * len(asked))

    monkeypatch.setattr("onlinespec.experiments.compare.measure_round_costs", measured)
    monkeypatch.setattr(
        "onlinespec.experiments.compare.steps_to_learn_from",
        lambda target, drafter, params: asked.append(params.sampling.temperature),
    )
    report = run(target, data(), measures_costs=True, temperatures=(0.0, 0.8), repeats=2, num_requests=(1,))
    assert asked == [0.0, 0.8]
    told = [(costs["temperature"], costs["row_cost"]) for costs in report.provenance["learn_costs"]]
    assert told == [(0.0, 0.01), (0.8, 0.02)]


def test_a_round_that_scores_nothing_finite_leaves_a_report_that_can_be_read(target, data, tmp_path):
    learner = "ensemble/geometry=euclidean/step_size_pool=1e-2:1e30"
    learn = LearnConfig(min_interval=8, max_interval=8, telemetry=True)
    run(target, data(), learners=("none", learner), learn=learn, out=tmp_path)
    (watched,) = [one for one in read_report(tmp_path / "report.json").runs if one.learner == learner]
    assert watched.telemetry.rounds
    assert all(math.isfinite(one.kl) for one in watched.telemetry.rounds)


def test_the_report_says_what_each_learner_learns_by(target, data):
    learners = ("none", "online_gradient", "osd")
    loss = run(target, data(), learners=learners, num_requests=(1,)).provenance["loss"]
    assert set(loss) == {"online_gradient", "osd"}
    assert "75 % the committed token" in loss["online_gradient"][0]
    assert loss["osd"] == ["soft_cross_entropy"]


@pytest.mark.parametrize("line", ["magic", "online_gradient/magic=1", "ensemble/discount=2"])
def test_a_learner_that_does_not_exist_is_refused_before_anything_runs(line):
    with pytest.raises(ValueError, match=r"magic|discount is 2"):
        comparison_of("x.jsonl", learners=("none", line))


def test_every_learner_has_a_run_in_the_order_asked_for(usual):
    assert [one.learner for one in usual[0].runs] == list(LEARNERS)


@pytest.mark.parametrize("drafter", ["eagle", "ngram"])
def test_lines_of_requests_add_up_to_the_totals(target, data, tmp_path, drafter):
    learners = LEARNERS if drafter == "eagle" else ("none", "frozen")
    report = run(target, data(), data("more"), out=tmp_path / "out", drafter=drafter, learners=learners)
    lines = lines_of(tmp_path / "out")
    assert {tuple(line) for line in lines} == {RequestRecord.__struct_fields__}
    for one in report.runs:
        for segment in (None, 0, 1):
            figures = one.totals if segment is None else one.segments[segment]
            mine = [line for line in lines if line["learner"] == one.learner and segment in (None, line["segment"])]
            sums = {name: sum(line[name] for line in mine) for name in ("tokens", "steps", "accepted", "drafted")}
            assert len(mine) == figures.requests == len({line["index"] for line in mine})
            assert sums["tokens"] == figures.tokens
            assert sums["steps"] == figures.steps
            assert figures.acceptance_length == pytest.approx(1 + sums["accepted"] / sums["steps"])
            assert figures.acceptance_rate == pytest.approx(sums["accepted"] / max(1, sums["drafted"]))
            assert sum(line["decode_seconds"] for line in mine) == pytest.approx(figures.decode_seconds)
            assert sum(line["learn_seconds"] for line in mine) == pytest.approx(figures.learn_seconds)
            seconds = figures.decode_seconds + figures.learn_seconds
            assert figures.tokens_per_second == pytest.approx(figures.tokens / seconds)


def test_windows_add_up_to_the_requests_of_their_segment(target, data):
    report = run(target, data(), data("more", PROMPTS[:2]), window=2)
    for one in report.runs:
        assert [[window.requests for window in segment.windows] for segment in one.segments] == [[2, 2, 1], [2]]


def test_only_the_learner_that_learns_has_new_weights(usual):
    lines = lines_of(usual[1])
    versions = {name: [line["weights_version"] for line in lines if line["learner"] == name] for name in LEARNERS}
    assert set(versions["none"] + versions["frozen"]) == {0}
    assert versions["online_gradient"][-1] > versions["online_gradient"][0]


# --- what is compared ---


def test_greedy_answers_are_checked_against_plain_decoding(usual):
    report, folder = usual
    assert [one.totals.identical_to_plain for one in report.runs] == [True] * 3
    assert [segment.identical_to_plain for one in report.runs for segment in one.segments] == [True] * 3
    assert all(line["identical_to_plain"] is True for line in lines_of(folder))


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.full)])
def test_sampled_answers_are_identical_to_plain_decodings(target, data, tmp_path, temperature):
    report = run(target, data(), out=tmp_path, temperatures=(temperature,))
    assert [one.totals.identical_to_plain for one in report.runs] == [True] * 3
    assert all(line["identical_to_plain"] for line in lines_of(tmp_path))
    assert run_of(report, "frozen").totals.acceptance_length > 1


def test_under_the_papers_rule_only_greedy_answers_are_called_identical(target, data, tmp_path):
    report = run(target, data(), out=tmp_path, temperatures=(0.9, 0.0), acceptance="rejection", num_requests=(2,))
    assert [one.totals.identical_to_plain for one in report.runs] == [None] * 3 + [True] * 3
    assert report.provenance["settings"]["acceptance"] == "rejection"


def test_an_unknown_rule_is_refused_by_name(target, data):
    with pytest.raises(ValueError, match="acceptance is 'typical'; it must be one of coupled, rejection"):
        run(target, data(), acceptance="typical")


def test_without_plain_decoding_nothing_is_called_identical(target, data):
    for one in run(target, data(), learners=("frozen", "online_gradient"), num_requests=(2,)).runs:
        assert one.totals.identical_to_plain is None
        assert one.totals.speedup_vs_none is None
        assert one.totals.speedup_vs_frozen is not None


def test_speedups_are_ratios_of_tokens_per_second(target, data, usual):
    none, frozen = run_of(usual[0], "none").totals, run_of(usual[0], "frozen").totals
    assert none.speedup_vs_none == frozen.speedup_vs_frozen == 1.0
    assert frozen.speedup_vs_none == pytest.approx(frozen.tokens_per_second / none.tokens_per_second)
    report = run(target, data(), learners=("none", "online_gradient"), num_requests=(1,))
    assert [one.totals.speedup_vs_frozen for one in report.runs] == [None, None]


def test_a_verification_that_is_not_lossless_is_found_out(target, data, tmp_path, monkeypatch):
    monkeypatch.setattr(onlinespec.lossless.verify.Coupled, "judge", AcceptsEverything.judge)
    report = run(target, data(), out=tmp_path)
    assert [one.totals.identical_to_plain for one in report.runs] == [True, False, False]
    assert {line["identical_to_plain"] for line in lines_of(tmp_path) if line["learner"] == "frozen"} == {False}


def test_a_difference_is_counted_in_its_segment_only(target, data, monkeypatch):
    def break_after_the_first_segment(progress):
        if progress.done == 2:
            monkeypatch.setattr(onlinespec.lossless.verify.Coupled, "judge", AcceptsEverything.judge)

    two = PROMPTS[:2]
    report = run(target, data("a", two), data("b", two), on_progress=break_after_the_first_segment)
    frozen = run_of(report, "frozen")
    assert [segment.identical_to_plain for segment in frozen.segments] == [True, False]
    assert frozen.totals.identical_to_plain is False


def test_differences_at_near_ties_are_counted_apart(target, data, tmp_path, monkeypatch):
    monkeypatch.setattr(onlinespec.lossless.verify.Coupled, "judge", AcceptsEverything.judge)
    monkeypatch.setattr(onlinespec.experiments.compare, "is_tie", lambda target, answer, plain: True)
    frozen = run_of(run(target, data(), out=tmp_path), "frozen").totals
    assert (frozen.identical_to_plain, frozen.ties) == (True, len(PROMPTS))


@pytest.mark.parametrize(
    ("logits", "answered", "is_near", "dtype"),
    [
        ({1: 5.0, 2: 5.0}, 2, True, torch.float32),
        ({1: 5.0, 2: 5.0 - 0.9 * TIE_GAP}, 2, True, torch.float32),
        ({1: 5.0, 2: 5.0 - 1.2 * TIE_GAP}, 2, False, torch.float32),
        ({1: 5.0, 2: 5.0, 3: 4.0}, 3, False, torch.float32),  # there is a tie, but the answer took neither
        ({1: 5.0, 2: 5.0, 3: 5.0}, 3, True, torch.float32),
        ({1: 5.0, 2: 4.9375}, 2, True, torch.bfloat16),  # two steps of bfloat16
        ({1: 5.0, 2: 4.9}, 2, False, torch.bfloat16),
        ({1: 5.0, 2: 4.9375}, 2, False, torch.float16),
    ],
)
def test_a_tie_is_between_the_two_answers_tokens(logits, answered, is_near, dtype):
    logits_V = torch.zeros(8)
    for token_id, logit in logits.items():
        logits_V[token_id] = logit
    target = FixedTarget(logits_V, dtype)
    plain = answer_of([7, 7], [4, 1, 4])
    assert is_tie(target, answer_of([7, 7], [4, answered, 5]), plain) is is_near
    assert target.scored == [[7, 7, 4]]  # the text before the first difference, and no more


def test_answers_of_different_length_are_no_tie():
    assert not is_tie(FixedTarget(torch.zeros(8)), answer_of([7], [1, 2]), answer_of([7], [1, 2, 3]))


def answer_of(prompt, output):
    return SimpleNamespace(
        output_ids=output,
        num_prompt_tokens=len(prompt),
        max_tokens=len(prompt + output),
        trace=SimpleNamespace(token_ids=prompt + output),
        params=GenerationParams(),
        noise=None,
    )


def test_a_tie_is_judged_by_the_positions_that_decoding_had(tmp_path, monkeypatch):
    """A request that may grow beyond the trained length turns otherwise, from its first token on."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    target = load_target(save_tiny(tmp_path, max_position_embeddings=32, rope_parameters=rope))
    plain = DecodeLoop(target).complete(target.encode("a b"), GenerationParams(max_new_tokens=100))
    state = plain.trace.features.final_SD[plain.num_prompt_tokens + 2 : plain.num_prompt_tokens + 3]
    best, second = target.decoder.head(state)[0].topk(2)[0].tolist()
    other = int(target.decoder.head(state)[0].topk(2)[1][1])
    answer = answer_of(plain.trace.token_ids[: plain.num_prompt_tokens], [*plain.output_ids[:3], other])
    for share, is_near in ((1.01, True), (0.99, False)):
        monkeypatch.setattr(onlinespec.experiments.ties, "TIE_GAP", share * (best - second))
        assert is_tie(target, answer, plain) is is_near


class FixedTarget:
    """Gives the same logits whatever it reads, and remembers what that was."""

    def __init__(self, logits_V, dtype=torch.float32):
        self.dtype = dtype
        self.decoder, self.device, self.scored, self._logits = self, torch.device("cpu"), [], logits_V

    def new_cache(self):
        return SimpleNamespace(take=lambda slot, length: None)

    def forward(self, ids, slots, counts, cache, num_logits):
        self.scored.append(ids.tolist())
        return SimpleNamespace(logits_MV=self._logits[None])


# --- the stream ---


def test_prompts_longer_than_the_context_are_skipped_and_counted_in_every_run(target, data, tmp_path):
    report = run(target, data("some", [PROMPTS[0], TOO_LONG, PROMPTS[1]]), out=tmp_path, window=1)
    for one in report.runs:
        assert (one.totals.requests, one.totals.skipped) == (2, 1)
        assert (one.segments[0].requests, one.segments[0].skipped) == (2, 1)
        assert sum(window.requests for window in one.segments[0].windows) == 2
    assert [(line["index"], line["id"]) for line in lines_of(tmp_path)[::3]] == [(0, "some0"), (2, "some2")]


def test_prompts_with_a_token_that_the_model_lacks_are_skipped_and_counted_in_every_run(data, tmp_path):
    folder = add_tokens(save_tiny(tmp_path / "target", vocab_size=259), "<pad>")
    for one in run(load_target(folder), data("some", [PROMPTS[0], "hello <pad>", PROMPTS[1]]), out=tmp_path).runs:
        assert (one.totals.requests, one.totals.skipped) == (2, 1)


def test_where_all_was_skipped_nothing_is_called_identical(target, data, tmp_path):
    for one in run(target, data("some", [TOO_LONG]), out=tmp_path).runs:
        assert (one.totals.requests, one.totals.skipped, one.totals.identical_to_plain) == (0, 1, None)
    assert lines_of(tmp_path) == []


def test_data_named_twice_goes_on_where_it_was_left_and_starts_again_at_its_end(target, data, tmp_path):
    a, b = data("a", PROMPTS[:4]), data("b", PROMPTS[:2])
    report = run(target, a, b, a, a, out=tmp_path, num_requests=(2,), learners=("none",))
    lines = lines_of(tmp_path)
    assert [line["id"] for line in lines] == ["a0", "a1", "b0", "b1", "a2", "a3", "a0", "a1"]
    assert [line["index"] for line in lines] == list(range(8))
    assert [line["segment"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(segment.index, segment.data) for segment in report.runs[0].segments] == [*enumerate("abaa")]


def test_every_temperature_and_repeat_is_a_run_over_the_same_stream(target, data, tmp_path):
    report = run(target, data(), out=tmp_path, temperatures=(0.0, 0.8), repeats=2, num_requests=(1,))
    settings = [(one.learner, one.temperature, one.repeat) for one in report.runs]
    assert sorted(settings) == sorted((n, t, r) for n in LEARNERS for t in (0.0, 0.8) for r in (0, 1))
    lines = lines_of(tmp_path)
    keys = [(x["learner"], x["temperature"], x["repeat"], x["index"]) for x in lines]
    assert len(keys) == len(set(keys)) == 12
    assert all(x["id"] == f"some{x['index']}" for x in lines)
    texts = {(x["learner"], x["temperature"], x["repeat"], x["index"]): x["text"] for x in lines}
    assert all(text == texts[n, t, 1 - r, i] for (n, t, r, i), text in texts.items())


def test_each_request_is_answered_by_another_run_first(target, data, monkeypatch):
    order, complete = [], DecodeLoop.complete

    def recording(loop, *arguments, **tags):
        order.extend(one.learner for one in comparing._group if one.loop is loop)  # warm-up has loops of its own
        return complete(loop, *arguments, **tags)

    monkeypatch.setattr(DecodeLoop, "complete", recording)
    comparing = Comparing(target, comparison_of(data()))
    comparing.run()
    assert [order[i : i + 3] for i in range(0, 15, 3)] == [
        ["none", "frozen", "online_gradient"],
        ["frozen", "online_gradient", "none"],
        ["online_gradient", "none", "frozen"],
        ["none", "frozen", "online_gradient"],
        ["frozen", "online_gradient", "none"],
    ]


def test_the_same_seed_gives_the_same_tokens_and_acceptance(target, data, tmp_path):
    timings = ("decode_seconds", "learn_seconds")
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        run(target, data(), out=tmp_path / name, temperatures=(0.0, 1.0), seed=seed, num_requests=(2,))
    one, two, three = (
        [{k: v for k, v in line.items() if k not in timings} for line in lines_of(tmp_path / name)]
        for name in ("one", "two", "three")
    )
    assert one == two
    assert [line["text"] for line in one if line["temperature"]] != [x["text"] for x in three if x["temperature"]]


def test_progress_counts_up_to_what_is_expected(target, data):
    events = []
    run(target, data(), data("more"), num_requests=(1, 2), repeats=2, on_progress=events.append)
    assert [(event.done, event.expected) for event in events] == [(i, 6) for i in range(1, 7)]
    assert set(events[0].acceptance_lengths) == set(LEARNERS)


def test_segments_may_have_unlike_lengths(target, data):
    report = run(target, data("a"), data("b"), data("a"), num_requests=(1, 3, 2), learners=("none",))
    assert [segment.requests for segment in report.runs[0].segments] == [1, 3, 2]


def test_a_stream_out_of_time_is_cut_short_in_every_segment_but_skips_none(target, data):
    report = run(target, data("a"), data("b"), num_requests=(3,), minutes=1e-6)
    assert [[segment.requests for segment in one.segments] for one in report.runs] == [[1, 1]] * 3
    assert (report.provenance["partial"], report.provenance["cut_short"]) == (False, True)


def test_a_stream_in_time_is_left_alone(target, data):
    report = run(target, data("a"), data("b"), num_requests=(2,), minutes=60.0)
    assert [[segment.requests for segment in one.segments] for one in report.runs] == [[2, 2]] * 3
    assert report.provenance["cut_short"] is False


# --- what goes wrong ---


def test_a_learner_that_fails_freezes_and_the_run_goes_on(target, data, tmp_path, monkeypatch, caplog):
    (tmp_path / "failing_learner.py").write_text(
        "from onlinespec import Learner\n"
        "class Failing(Learner):\n"
        "    def __init__(self, **options): pass\n"
        "    def init(self, params): return params\n"
        "    def played(self, state): return state\n"
        "    def update(self, evaluate, state): raise ArithmeticError('planted')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    learners = ("none", "failing_learner:Failing")
    report = run(target, data(), out=tmp_path / "out", learners=learners)
    failing = report.runs[1].totals
    assert (failing.requests, failing.identical_to_plain) == (len(PROMPTS), True)
    assert {line["weights_version"] for line in lines_of(tmp_path / "out")} == {0}
    assert sum("planted" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("after", [1, *(pytest.param(after, marks=pytest.mark.full) for after in (3, 5)), 7])
def test_what_is_finished_at_an_interruption_is_kept(target, data, tmp_path, after):
    def stop(progress):
        if progress.done == after:
            raise KeyboardInterrupt

    two = PROMPTS[:2]
    comparing = Comparing(target, comparison_of(data("a", two), data("b", two), repeats=2), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        comparing.run(stop)
    report = read_report(tmp_path / "out" / "report.json")
    assert report.runs == comparing.report().runs
    assert report.provenance["partial"] is True
    assert len(lines_of(tmp_path / "out")) == 3 * after == sum(one.totals.requests for one in report.runs)


def test_an_interruption_inside_a_request_loses_that_request_only(target, data, tmp_path, monkeypatch):
    complete = DecodeLoop.complete

    def interrupted(loop, *arguments, request_id="", **tags):
        if request_id == "some2" and loop.learning and loop.drafter.weights.version:
            raise KeyboardInterrupt
        return complete(loop, *arguments, request_id=request_id, **tags)

    monkeypatch.setattr(DecodeLoop, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(target, data(), out=tmp_path / "out")
    report = read_report(tmp_path / "out" / "report.json")
    assert [one.totals.requests for one in report.runs] == [2, 2, 2]
    assert len(lines_of(tmp_path / "out")) == 6


def test_the_report_of_a_comparison_that_never_ran_is_empty(target, data):
    report = Comparing(target, comparison_of(data())).report()
    assert report.provenance["partial"] is True
    assert [one.segments for one in report.runs] == [()] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_requests": (-1,)}, "num_requests is -1 for some.jsonl; it must be at least 0"),
        ({"num_requests": (1, 2)}, "2 numbers for 1 data"),
        ({"minutes": -1.0}, "minutes is -1"),
        ({"minutes": 1.0}, "shares of time need a number"),
        ({"repeats": 0}, "repeats is 0"),
        ({"window": 0}, "window is 0"),
        ({"learners": ()}, "no learners"),
        ({"learners": ("none", "none")}, "none, none name one twice; leave it out once"),
        ({"temperatures": ()}, "no temperatures"),
        ({"temperatures": (0.0, -1.0)}, "temperature is -1"),
        ({"temperatures": (float("nan"),)}, "temperature is nan"),
        ({"temperatures": (0.5, 0.5)}, "0.5, 0.5 name one twice; leave it out once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        replace(comparison_of("some.jsonl"), **settings)


@pytest.mark.parametrize("name", ["report.json", "requests.jsonl"])
def test_results_are_never_overwritten(target, data, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ValueError, match="holds results already"):
        Comparing(target, comparison_of(data()), tmp_path / "out")
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [(name, "precious")]


def test_nothing_is_written_for_a_drafter_that_can_not_learn(target, data, tmp_path):
    with pytest.raises(ValueError, match="ngram does not learn"):
        Comparing(target, comparison_of(data(), drafter="ngram"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
