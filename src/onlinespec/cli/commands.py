"""The commands as dataclasses. tyro turns the fields into flags and help texts.

Every command imports this file, `--help` too, so it must not import torch or anything else that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from onlinespec.cli.arguments import (
    DRAFTER_HELP,
    LEARNER_HELP,
    Decoding,
    EngineLimits,
    Learning,
    Machine,
    SaveFolder,
    TargetName,
)
from onlinespec.config import GenerationParams, SamplingParams, check_that
from onlinespec.drafters.settings import Tuning
from onlinespec.learning.settings import LearnConfig
from onlinespec.offline.settings import Distillation
from onlinespec.registry import FROZEN, NONE, SHIPPED_DRAFTERS, SHIPPED_TARGETS
from onlinespec.workloads import load_workload


class _ChoosesDrafter:
    """What commands with an optional `--drafter` share."""

    target: str
    drafter: str | None
    default_drafter = "ngram"  # for any target but the shipped one

    @property
    def drafter_name(self) -> str:
        """The drafter to load, with the default filled in."""
        if self.drafter is not None:
            return self.drafter
        return "demo" if self.target == "demo" else self.default_drafter


@dataclass(frozen=True)
class Generate(_ChoosesDrafter):
    """Answer one prompt: streams the text, then prints acceptance length and speed."""

    target: TargetName
    """The model to run: directory or Hub id of a Hugging Face checkpoint, or `demo` for the shipped one."""
    prompt: Annotated[str, arg(aliases=["-p"], metavar="TEXT")]
    """The prompt; `-` reads it from standard input."""
    drafter: Annotated[
        str | None,
        arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else ngram)", help=DRAFTER_HELP),
    ] = None
    learner: Annotated[
        str,
        arg(
            metavar="LEARNER",
            help=f"How the drafter learns while it answers: {LEARNER_HELP}. What it learns from one answer is lost "
            f"without --save, so it learns only if one is named ({LearnConfig.learner} is what serve has).",
        ),
    ] = FROZEN
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's)")] = None
    """Sampling temperature; 0 is greedy."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Strings that end the answer; they are not included in it."""
    raw: bool = False
    """Use the prompt as it is, without the model's chat template."""
    save: SaveFolder = None
    """Save the adapted drafter to this directory."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()

    def params(self, defaults: SamplingParams = SamplingParams()) -> GenerationParams:
        """Returns the library's settings. Sampling flags that were not given are taken from `defaults`."""
        return self.decoding.params(self.temperature, defaults, stop_strings=self.stop, seed=self.machine.seed)


@dataclass(frozen=True)
class Compare(_ChoosesDrafter):
    """Compare learners on a stream of prompts: prints a table, writes report.json and an HTML report with plots."""

    default_drafter = "eagle"

    target: TargetName
    """The model to run: directory or Hub id of a Hugging Face checkpoint, or `demo` for the shipped one."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """Sources of prompts, one per segment of the stream; a source named again continues where it stopped.
    FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:NAME (prose, code, sql, arithmetic)."""
    drafter: Annotated[
        str | None,
        arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else eagle)", help=DRAFTER_HELP),
    ] = None
    learners: Annotated[
        str,
        arg(metavar="LEARNERS", help=f"Separated by commas: {LEARNER_HELP}, as in ensemble/with_frozen=true."),
    ] = f"{NONE},{FROZEN},{LearnConfig.learner}"
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/compare-<time>)")] = None
    """Directory for report.json, report.html and requests.jsonl."""
    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (50,)
    """Requests per segment: one number for all, or one per segment. 0 takes all of a file."""
    minutes: float = 0.0
    """Time limit for the comparison, in minutes; a slow machine runs fewer requests per segment. 0 is no limit."""
    temperature: Annotated[tuple[float, ...], arg(metavar="NUMBER [NUMBER ...]")] = (0.0,)
    """Sampling temperature; 0 is greedy. Several are run one after the other."""
    acceptance: Literal["coupled", "rejection"] = "coupled"
    """Acceptance rule: coupled keeps a drafted token if plain decoding with the same seed would choose it too.
    rejection is speculative sampling as published: same distribution, but a seed's text depends on the drafts."""
    repeats: int = 1
    """How often to run everything; the report shows medians and the spread of the timings."""
    window: int = 5
    """Requests averaged in one point of the plots."""
    telemetry: bool = False
    """Measure regret, gradients and drift, and add a page on them to the report. Not counted as learning time."""
    save: SaveFolder = None
    """Save the adapted drafters here, in a subdirectory per learner."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Demo:
    """Compare learners on the shipped pair, on a stream of prose, code, SQL, arithmetic, and prose again."""

    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (8, 25, 40, 40, 8)
    """Requests per segment of the stream: one number for all, or one per segment."""
    minutes: float = 3.5
    """Time limit for the whole stream, in minutes; a slow machine runs fewer requests per segment. 0 is no limit."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/demo-<time>)")] = None
    """Directory for report.json, report.html and requests.jsonl."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    save: SaveFolder = None
    """Save the adapted drafters here, in a subdirectory per learner."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding(num_draft_tokens=2)
    """Drafting and sampling. For this small pair, a third drafted token costs more time than it saves."""
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True, kw_only=True)
class Distill(Distillation):
    """Train a drafter offline, on the target's own answers. After an interruption, the same command continues."""

    target: TargetName
    """The model to run: directory or Hub id of a Hugging Face checkpoint, or `demo` for the shipped one."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Directory to save the drafter to. Answers and training state are kept in DIR.work until it is done."""
    drafter: Annotated[str, arg(metavar="DRAFTER")] = "eagle"
    """Name of a drafter to train from scratch (eagle, small_lm), or directory or Hub id of one to continue from."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """Sources of prompts to answer: FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:NAME."""
    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = Distillation.num_requests
    """Prompts to take from each source: one number for all, or one per source. 0 takes all of a file."""
    temperature: Annotated[
        float | None, arg(metavar="NUMBER", help_behavior_hint="(default: half greedy, half at 1)")
    ] = None
    """Sampling temperature of the target's answers; 0 is greedy."""
    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        None
    )
    """Step size (learning rate).
    The default is 2e-3 up to 2 million trainable parameters, then falls as 1/sqrt of their number (3e-4 at 100M)."""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """Weights of a small_lm to train: layers (all but embedding and head), all, or adapters (LoRA as in peft)."""
    adapter_rank: int = Tuning.rank
    """LoRA rank, for --tune adapters."""
    restart: bool = False
    """Train from the start, whatever is in DIR and DIR.work.
    Answers there are reused if the same ones would be generated again."""
    keep_text: bool = False
    """Keep the answers in DIR.work when done, so that another training with --restart can reuse them."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()
    tuning: tyro.conf.Suppress[Tuning | None] = None  # from --tune and --adapter-rank
    seed: tyro.conf.Suppress[int] = 0  # from the machine's group

    def __post_init__(self) -> None:
        """Checks nothing: `settings` does, so that a wrong value gives the same one-line error as any other."""

    @property
    def settings(self) -> Distillation:
        """The library's settings.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        tuning = Tuning(self.tune, self.adapter_rank) if self.tune else None
        given = {field.name: getattr(self, field.name) for field in fields(Distillation)}
        return Distillation(**given | {"tuning": tuning, "seed": self.machine.seed})


@dataclass(frozen=True)
class Serve(_ChoosesDrafter):
    """Serve an OpenAI-compatible HTTP API while the drafter learns. SIGTERM or Ctrl-C finishes running requests first.

    Settings in a request (temperature, max_tokens and so on) override the ones given here."""

    target: TargetName
    """The model to run: directory or Hub id of a Hugging Face checkpoint, or `demo` for the shipped one."""
    drafter: Annotated[
        str | None,
        arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else ngram)", help=DRAFTER_HELP),
    ] = None
    learner: Annotated[
        str | None,
        arg(
            metavar="LEARNER",
            help_behavior_hint=f"(default: {LearnConfig.learner}, where the drafter can learn)",
            help=f"How the drafter learns while it serves: {LEARNER_HELP}.",
        ),
    ] = None
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 accepts connections from this machine only, 0.0.0.0 from anywhere."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: Annotated[
        str | None, arg(metavar="KEY", help_behavior_hint="(default: ONLINESPEC_API_KEY, else none)")
    ] = None
    """Key that clients must send as `Authorization: Bearer KEY`.
    Give it in the environment variable to keep it out of the process list."""
    served_model_name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: TARGET)")] = None
    """Model name in the API."""
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's)")] = None
    """Default sampling temperature; 0 is greedy."""
    limits: tyro.conf.OmitArgPrefixes[EngineLimits] = EngineLimits()
    prefix_megabytes: float = 256.0
    """Size of the prefix cache, in megabytes: a prompt prefix that was seen before is not prefilled again. 0 is off."""
    max_body_megabytes: float = 4.0
    """Largest request body, in megabytes; larger ones get 413."""
    max_prompt_tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the context)")] = None
    """Longest prompt that is accepted, in tokens."""
    grace_seconds: float = 30.0
    """Seconds that running requests have to finish when the server is stopped."""
    fixed_draft_length: bool = False
    """Always draft --num-draft-tokens tokens. Otherwise that is the maximum; the number with the best goodput is used.
    It can be 0, and is computed from costs measured at the start and while serving."""
    learn_in: Annotated[
        Literal["process", "thread", "inline"] | None,
        arg(metavar="PLACE", help_behavior_hint="(default: process on a CPU, thread on a GPU)"),
    ] = None
    """Where learning runs: in a process or thread beside serving, or inline, between decode steps.
    A process or thread takes at most --learn-budget of one core.
    It serves new weights only once they have drafted better than the current ones on the same requests."""
    versions: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not kept)")] = None
    """Directory for the served weight versions and the learner's state.
    A restart continues from the newest good version."""
    reset_drafter: bool = False
    """Start from --drafter; the versions in --versions are moved aside."""
    save: SaveFolder = None
    """Save the adapted drafter to this directory when the server is stopped."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding(max_new_tokens=512, num_draft_tokens=8)
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning(learn_budget=0.25, replay_minutes=1440.0)
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()

    def defaults(self, defaults: SamplingParams = SamplingParams()) -> GenerationParams:
        """Returns the settings that requests may override. Flags that were not given are taken from `defaults`."""
        return self.decoding.params(self.temperature, defaults)


@dataclass(frozen=True)
class Inspect:
    """Describe a drafter or target directory: format, shape, size, weights version, and which target a drafter fits."""

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """Directory or Hub id; `demo` is the shipped pair."""
    debug: bool = False
    """Show Python's traceback when a command fails."""


Command = Demo | Generate | Compare | Distill | Serve | Inspect


COMMANDS: dict[str, Callable[..., Command]] = {
    "demo": Demo,
    "generate": Generate,
    "compare": Compare,
    "distill": Distill,
    "serve": Serve,
    "inspect": Inspect,
}


def check(command: Command) -> None:
    """Checks a command's settings before anything that takes seconds, such as importing torch or loading a model.

    Raises:
        ValueError, OSError, ImportError: with the value, and what to give instead.
    """
    if isinstance(command, Inspect):
        return _check_demo(command.path, command.path)
    machine = command.machine
    if machine.num_threads < 1:
        raise ValueError(f"num_threads is {machine.num_threads}; it must be at least 1")
    if not -(2**63) <= machine.seed < 2**63:
        raise ValueError(f"seed is {machine.seed}; it must fit in 64 bits, its sign included")
    if not isinstance(command, Distill):
        command.learning.config()
        command.learning.tuning()
    match command:
        case Generate():
            command.params()
            _check_demo(command.target, command.drafter_name)
        case Compare():
            for temperature in command.temperature:
                command.decoding.params(temperature)
            _check_demo(command.target, command.drafter_name)
            for spec in command.data:
                load_workload(spec)
        case Distill():
            _check_demo(command.target, command.drafter)
            for spec in command.data:
                load_workload(spec)
        case Serve():
            command.defaults()
            _ = command.limits.settings
            _check_demo(command.target, command.drafter_name)
            check_that(0 <= command.port < 2**16, "port", command.port, "between 0 (any that is free) and 65535")
            check_that(0 <= command.prefix_megabytes < inf, "prefix_megabytes", command.prefix_megabytes, "0 or a size")
            check_that(0 < command.max_body_megabytes < inf, "max_body_megabytes", command.max_body_megabytes, "a size")
        case Demo():
            command.decoding.params(command.temperature)
            _check_demo("demo", "demo")


def _check_demo(target: str, drafter: str) -> None:
    for folder in (SHIPPED_TARGETS.get(target), SHIPPED_DRAFTERS.get(drafter)):
        if folder and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"the demo pair did not come with this installation ({folder} is missing); "
                "name another TARGET and --drafter"
            )
