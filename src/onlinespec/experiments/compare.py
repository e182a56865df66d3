"""A comparison of learners on one stream of prompts.

The runs of all learners are interleaved request by request, so that a machine whose speed drifts affects all alike.
Each run has its own copy of the drafter; all share the target. `none` is plain decoding and the reference: every answer
of every other run is compared with it token by token, at every temperature. Under `rejection`, where sampled text
depends on the drafts, only greedy answers are compared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import msgspec

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.profile import steps_to_learn_from
from onlinespec.engine.request import Request, UnfitPrompt
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.metrics import total, totals_of, windows
from onlinespec.experiments.provenance import provenance
from onlinespec.experiments.report_schema import Report, RequestRecord, Run, Segment, Totals, write_report
from onlinespec.experiments.results_folder import claim
from onlinespec.experiments.settings import Comparison
from onlinespec.experiments.ties import is_tie
from onlinespec.learners.losses import describe_loss
from onlinespec.learners.step_sizes import step_size_for
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.round_costs import measure_round_costs
from onlinespec.learning.rounds import TelemetrySummary, summarise
from onlinespec.learning.update import InlineLearning
from onlinespec.lossless.verify import Rule
from onlinespec.models.clock import clock_for
from onlinespec.models.loading import Target
from onlinespec.registry import ACCEPTANCE, FROZEN, NONE, resolve
from onlinespec.workloads import Prompt, Workload, load_workload

log = logging.getLogger(__name__)


@dataclass
class _Runner:
    """One learner's run: its own drafter, weights and statistics."""

    learner: str
    loop: DecodeLoop
    learning: InlineLearning | None
    stats: list[list[DecodeStats]] = field(default_factory=list)  # per segment, per request
    differing: set[int] = field(default_factory=set)  # segments with an answer that differs from plain decoding

    @property
    def weights_version(self) -> int:
        return self.loop.drafter.weights.version if self.loop.drafter else 0


@dataclass(frozen=True)
class Progress:
    """The progress after a request of the stream has been answered in all runs."""

    done: int  # requests so far
    expected: int | None  # requests in all; None if a file is taken whole
    segment: int  # index that keeps counting over repeats and temperatures
    data: str
    acceptance_lengths: dict[str, float]  # tokens per step in the latest request, by learner


class Comparing:
    """A comparison. `run` executes it; `report` gives the results so far at any time, also after an interruption.

    Args:
        out: Folder for report.json and requests.jsonl; None writes nothing.
        command: The command line, for the report.

    Raises:
        ValueError: if the drafter or a learner does not exist or they don't fit, or `out` holds results already.
    """

    def __init__(self, target: Target, comparison: Comparison, out: Path | None = None, command: str = "") -> None:
        self.target, self.comparison, self._out = target, comparison, out
        self._runs: list[Run] = []
        self._group: list[_Runner] = []
        self._setting: tuple[float, int] = (0.0, 0)
        self._is_partial, self._is_cut_short = True, False
        self._provenance = provenance(
            command, target.name, comparison.drafter, target.fingerprint, msgspec.to_builtins(comparison)
        )
        self._costs: dict[float, dict[str, Any]] = {}  # round_cost and row_cost, by temperature
        self._provenance["loss"] = {
            name: [describe_loss(parse_learner(name, comparison.learn).loss, t) for t in comparison.temperatures]
            for name in comparison.learners
            if name not in (NONE, FROZEN)
        }
        self._workloads: dict[str, Workload] = {spec: load_workload(spec) for spec in comparison.data}
        self._make_group()  # before anything is written, so that a wrong drafter or learner leaves no files
        if out:
            claim(out)

    @property
    def drafters(self) -> dict[str, tuple[Drafter, bool]]:
        """The drafters of the latest runs, by learner, and whether each was updated in its run."""
        return {
            runner.learner: (runner.loop.drafter, runner.learning is not None and runner.learning.num_rounds > 0)
            for runner in self._group
            if runner.loop.drafter
        }

    def run(self, on_progress: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Runs all learners at all temperatures, as often as asked.

        report.json is rewritten at each segment and at the end, also after an exception; requests.jsonl grows with
        every request.

        Args:
            on_progress: Called after every request.
        """
        comparison = self.comparison
        settings = [(t, r) for r in range(comparison.repeats) for t in comparison.temperatures]
        counts = [count for _, count in comparison.segments]
        known = sum(counts) * len(settings) if all(counts) else None
        done = 0
        try:
            for number, setting in enumerate(settings):
                self._setting = setting
                self._measure_costs()
                self._make_group()
                self._warm_up()
                for segment, index, prompt in self._stream():
                    lengths = self._request(segment, index, prompt)
                    done += 1
                    on_progress(Progress(done, known, number * len(counts) + segment, prompt.domain, lengths))
                self._runs += self._finished_runs()
                self._group_is_counted = True
            self._is_partial = False
        finally:
            report = self._write()
        return report

    def report(self) -> Report:
        """Returns the results so far."""
        runs = list(self._runs)
        if not self._group_is_counted:
            runs += self._finished_runs()
        state = {"partial": self._is_partial, "cut_short": self._is_cut_short}
        return Report(provenance=self._provenance | state, runs=tuple(runs))

    # --- the stream ---------------------------------------------------------------------------------------------

    def _stream(self) -> Iterator[tuple[int, int, Prompt]]:
        """Yields (segment, index of the request in the stream, prompt)."""
        index = 0
        iterators: dict[str, Iterator[Prompt]] = {}
        segments = zip(self.comparison.segments, self._deadlines(), strict=True)
        for segment, ((spec, count), deadline) in enumerate(segments):
            for runner in self._group:
                runner.stats.append([])
            for visited, prompt in enumerate(self._visit(iterators, spec, count or None)):
                if visited and time.monotonic() > deadline:
                    self._is_cut_short = True
                    break
                yield segment, index, prompt
                index += 1
            self._write()

    def _deadlines(self) -> list[float]:
        """The time at which each segment must end, by its share of the requests; unused time goes to the next ones."""
        comparison, now = self.comparison, time.monotonic()
        counts = [count for _, count in comparison.segments]
        if not comparison.minutes:
            return [float("inf")] * len(counts)
        seconds = comparison.minutes * 60 / comparison.repeats / len(comparison.temperatures)
        return [now + seconds * done / sum(counts) for done in accumulate(counts)]

    def _visit(self, iterators: dict[str, Iterator[Prompt]], spec: str, limit: int | None) -> list[Prompt]:
        iterators.setdefault(spec, self._workloads[spec].prompts(self.comparison.seed))
        prompts = list(islice(iterators[spec], limit))
        if not prompts:  # used up by an earlier segment: start again
            iterators[spec] = self._workloads[spec].prompts(self.comparison.seed)
            prompts = list(islice(iterators[spec], limit))
        return prompts

    def _request(self, segment: int, index: int, prompt: Prompt) -> dict[str, float]:
        """Answers one prompt in every run, skipped in all if it does not fit the target; which run is first rotates.

        Returns:
            The acceptance length of the answer, by learner.
        """
        prompt_ids = self.target.encode(prompt.text)
        shift = index % len(self._group)
        answers: dict[str, Request] = {}
        for runner in self._group[shift:] + self._group[:shift]:
            params = replace(self.comparison.generation, sampling=self._sampling(), seed=self._seed_of(index))
            try:
                answers[runner.learner] = runner.loop.complete(
                    prompt_ids, params, request_id=prompt.id, domain=prompt.domain
                )
            except UnfitPrompt as reason:
                log.info("%s is skipped: %s", prompt.id, reason)
                runner.stats[-1].append(DecodeStats(skipped=1))
        records = [
            self._record(runner, segment, index, prompt, answers[runner.learner], answers.get(NONE))
            for runner in self._group
            if runner.learner in answers
        ]
        if self._out:
            with (self._out / "requests.jsonl").open("ab") as lines:
                lines.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        return {runner.learner: runner.stats[-1][-1].acceptance_length for runner in self._group}

    def _sampling(self) -> SamplingParams:
        return replace(self.comparison.generation.sampling, temperature=self._setting[0])

    @property
    def _is_text_fixed(self) -> bool:
        """Whether the text must equal plain decoding's, because drafts can't influence it."""
        return self._sampling().is_greedy or self.comparison.acceptance == "coupled"

    def _seed_of(self, index: int) -> int:
        return self.comparison.seed * 1_000_003 + index

    def _record(
        self, runner: _Runner, segment: int, index: int, prompt: Prompt, answer: Request, plain: Request | None
    ) -> RequestRecord:
        stats = answer.stats
        is_identical = None
        if plain is not None and self._is_text_fixed:
            is_identical = answer.output_ids == plain.output_ids
            if not is_identical and is_tie(self.target, answer, plain):
                stats = replace(stats, ties=1)
            elif not is_identical:
                runner.differing.add(segment)
                log.error("%s: the answer of %s differs from plain decoding", prompt.id, runner.learner)
        runner.stats[-1].append(stats)
        return RequestRecord(
            learner=runner.learner,
            temperature=self._setting[0],
            repeat=self._setting[1],
            index=index,
            segment=segment,
            data=prompt.domain,
            id=prompt.id,
            prompt_tokens=answer.num_prompt_tokens,
            tokens=stats.tokens,
            steps=stats.steps,
            accepted=stats.accepted,
            drafted=stats.drafted,
            decode_seconds=stats.decode_seconds,
            learn_seconds=stats.learn_seconds,
            finish_reason=answer.finish_reason or "",
            identical_to_plain=is_identical,
            weights_version=runner.weights_version,
            text=answer.text.text,
        )

    # --- runs ---------------------------------------------------------------------------------------------------

    def _make_group(self) -> None:
        self._group = [self._make_runner(name) for name in self.comparison.learners]
        self._group_is_counted = False

    def _make_runner(self, name: str) -> _Runner:
        rule: Rule = resolve(ACCEPTANCE, self.comparison.acceptance, "acceptance")()
        if name == NONE:
            return _Runner(name, DecodeLoop(self.target, rule=rule), None)
        drafter = self._load_drafter()
        config = parse_learner(name, replace(self.comparison.learn, **self._costs.get(self._setting[0], {})))
        if config.learner != FROZEN and not drafter.is_trainable:
            raise ValueError(
                f"drafter {self.comparison.drafter} does not learn, so learner {name} has nothing to do; "
                "choose --learners none,frozen"
            )
        if config.step_size is None and config.learner != FROZEN:
            self._provenance["default_step_size"] = step_size_for(drafter.weights.params)
        learning = InlineLearning(drafter, config=config, seed=self.comparison.seed)
        return _Runner(name, DecodeLoop(self.target, drafter, learning, rule=rule), learning)

    def _load_drafter(self) -> Drafter:
        comparison = self.comparison
        return load_drafter(comparison.drafter, self.target, comparison.seed, comparison.tuning)

    def _measure_costs(self) -> None:
        """Measures the costs of learning on this machine before the first run at a temperature, if asked to."""
        is_asked = self.comparison.measures_costs and not {NONE, FROZEN}.issuperset(self.comparison.learners)
        temperature = self._setting[0]
        if not is_asked or temperature in self._costs:
            return
        drafter = self._load_drafter()
        params = replace(self.comparison.generation, sampling=self._sampling())
        self._costs[temperature] = measure_round_costs(
            drafter,
            self.comparison.learn,
            steps_to_learn_from(self.target, drafter, params),
            clock_for(self.target.decoder.device),
        )._asdict()
        told_so_far = self._provenance.setdefault("learn_costs", [])
        told_so_far.append({"temperature": temperature, **self._costs[temperature]})

    def _warm_up(self) -> None:
        """Decodes a few tokens per run without counting them, so that no run includes one-time costs."""
        params = GenerationParams(max_new_tokens=12, num_draft_tokens=self.comparison.generation.num_draft_tokens)
        prompt_ids = self.target.encode("Hello")
        for runner in self._group:
            DecodeLoop(self.target, runner.loop.drafter).complete(prompt_ids, params)

    def _finished_runs(self) -> list[Run]:
        controls = {runner.learner: runner for runner in self._group}
        return [self._finished_run(runner, controls.get(NONE), controls.get(FROZEN)) for runner in self._group]

    def _finished_run(self, runner: _Runner, none: _Runner | None, frozen: _Runner | None) -> Run:
        is_checked = none is not None and self._is_text_fixed

        def total_of(other: _Runner | None, segment: int | None) -> DecodeStats | None:
            if other is None:
                return None
            kept = other.stats if segment is None else [other.stats[segment]]
            return total([one for stats in kept for one in stats])

        def figures_of(segment: int | None) -> dict[str, Any]:
            own = total_of(runner, segment) or DecodeStats()
            differs = bool(runner.differing) if segment is None else segment in runner.differing
            is_identical = not differs if is_checked and own.requests else None
            return totals_of(own, total_of(none, segment), total_of(frozen, segment), is_identical)

        segments = [
            Segment(
                **figures_of(i),
                index=i,
                data=self._workloads[self.comparison.data[i]].name,
                windows=windows(stats, self.comparison.window),
            )
            for i, stats in enumerate(runner.stats)
        ]
        return Run(
            learner=runner.learner,
            temperature=self._setting[0],
            seed=self.comparison.seed,
            repeat=self._setting[1],
            totals=Totals(**figures_of(None)),
            segments=tuple(segments),
            telemetry=self._telemetry_of(runner),
        )

    def _telemetry_of(self, runner: _Runner) -> TelemetrySummary | None:
        return summarise(runner.learning.measured()) if runner.learning else None

    def _write(self) -> Report:
        report = self.report()
        if self._out:
            write_report(self._out / "report.json", report)
        return report
