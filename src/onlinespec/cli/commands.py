"""The commands as dataclasses; tyro makes flags and help of them.

Imported by every command, `--help` too: nothing here takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from onlinespec.cli.arguments import NAMES, Decoding, EngineLimits, Learning, Machine, SaveFolder, TargetName
from onlinespec.config import GenerationParams, SamplingParams, check_that
from onlinespec.drafters.settings import Tuning
from onlinespec.learning.settings import LearnConfig
from onlinespec.offline.settings import Distillation
from onlinespec.registry import FROZEN, NONE, SHIPPED_DRAFTERS, SHIPPED_TARGETS
from onlinespec.workloads import load_workload


@dataclass(frozen=True)
class Generate:
    """Answer a prompt; the text appears as it comes, the figures after it."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    prompt: Annotated[str, arg(aliases=["-p"], metavar="TEXT")]
    """What to ask; `-` reads it from standard input."""
    drafter: Annotated[
        str | None, arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else ngram)")
    ] = None
    """Directory or Hub id of a drafter, `demo`, `demo/small_lm`, or the name of a fresh one: ngram, eagle, small_lm."""
    learner: Annotated[
        str,
        arg(
            metavar="LEARNER",
            help=f"How the drafter learns while it answers: {NAMES}. What one answer teaches is lost without --save, "
            f"so nothing is learned unless a learner is named ({LearnConfig.learner} is what serve has).",
        ),
    ] = FROZEN
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's)")] = None
    """0 is greedy."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Strings that end the answer; they are not part of it."""
    raw: bool = False
    """Give the prompt as it stands, without the chat template."""
    save: SaveFolder = None
    """Write the adapted drafter to this directory."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()

    @property
    def drafter_name(self) -> str:
        return ("demo" if self.target == "demo" else "ngram") if self.drafter is None else self.drafter

    def params(self, defaults: SamplingParams = SamplingParams()) -> GenerationParams:
        """As the library takes them; `defaults` stands in for what was not given."""
        return self.decoding.params(self.temperature, defaults, stop_strings=self.stop, seed=self.machine.seed)


@dataclass(frozen=True)
class Compare:
    """Compare learners over a stream of prompts: a table, report.json, and a page with plots."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """What to ask, segment by segment: FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:prose,
    builtin:code, builtin:sql, builtin:arithmetic. Data named twice goes on where it was left."""
    drafter: Annotated[
        str | None, arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else eagle)")
    ] = None
    """Directory or Hub id of a drafter, `demo`, `demo/small_lm`, or the name of a fresh one: ngram, eagle, small_lm."""
    learners: Annotated[
        str,
        arg(metavar="LEARNERS", help=f"Separated by commas: {NAMES}, as in ensemble/with_frozen=true."),
    ] = f"{NONE},{FROZEN},{LearnConfig.learner}"
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/compare-<time>)")] = None
    """Folder for report.json, report.html and requests.jsonl."""
    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (50,)
    """Requests per segment, one number for all or one for each; 0 takes all of a file."""
    minutes: float = 0.0
    """Time for the whole stream; a slower one has each segment cut to its share. 0 is no limit."""
    temperature: Annotated[tuple[float, ...], arg(metavar="NUMBER [NUMBER ...]")] = (0.0,)
    """0 is greedy; several are run one after the other."""
    acceptance: Literal["coupled", "rejection"] = "coupled"
    """How drafts are judged: coupled (a draft is kept while it is the token that plain decoding commits with the same
    seed), or rejection (the papers' rule: the same law, but a seed's text depends on the drafts)."""
    repeats: int = 1
    """Repeat everything, to show the spread of the timings."""
    window: int = 5
    """Requests per point of the plots."""
    telemetry: bool = False
    """Measure regret, gradients and drift beside learning, for a second page; its time is kept apart."""
    save: SaveFolder = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()

    @property
    def drafter_name(self) -> str:
        return ("demo" if self.target == "demo" else "eagle") if self.drafter is None else self.drafter


@dataclass(frozen=True)
class Demo:
    """Watch the shipped drafter learn: a stream of prose, code, SQL, arithmetic, and prose again."""

    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (8, 25, 40, 40, 8)
    """Requests per stretch of the stream, one number for all or one for each."""
    minutes: float = 3.5
    """Time for the whole stream; a slower machine has each stretch cut to its share. 0 takes all requests."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/demo-<time>)")] = None
    """Folder for report.json, report.html and requests.jsonl."""
    temperature: float = 0.0
    """0 is greedy."""
    save: SaveFolder = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding(num_draft_tokens=2)
    """How answers are drafted and chosen. A third drafted token costs this small pair more than it brings."""
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True, kw_only=True)
class Distill(Distillation):
    """Train a first drafter offline, on the target's own answers. The same command goes on where it was stopped."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where the drafter is written; work under way lies in DIR.work."""
    drafter: Annotated[str, arg(metavar="DRAFTER")] = "eagle"
    """Name of a fresh drafter (eagle, small_lm), or directory or Hub id of a saved one to go on from."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """Prompts to have answered: FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:NAME."""
    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = Distillation.num_requests
    """Prompts of each data, one number for all or one for each; 0 takes all of a file."""
    temperature: Annotated[
        float | None, arg(metavar="NUMBER", help_behavior_hint="(default: half greedy, half at 1)")
    ] = None
    """At which the target answers; 0 is greedy."""
    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        None
    )
    """Rate of learning: 2e-3 up to two million parameters that learn, then falling with the square root of their number
    (3e-4 for a hundred million)."""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """What of a small_lm learns: layers (all but embedding and head), all, or adapters (low-rank, as peft has them)."""
    adapter_rank: int = Tuning.rank
    """Rank of those adapters."""
    restart: bool = False
    """Train anew, whatever is in DIR and DIR.work. Answers there are kept if they would come out the same."""
    keep_text: bool = False
    """Leave the answers in DIR.work when done: with --restart another training takes them as they are."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()
    tuning: tyro.conf.Suppress[Tuning | None] = None  # from --tune and --adapter-rank
    seed: tyro.conf.Suppress[int] = 0  # from the machine's group

    def __post_init__(self) -> None:
        """Checked by `settings`, so that a mistake is told as all others are."""

    @property
    def settings(self) -> Distillation:
        """As the library takes them.

        Raises:
            ValueError: naming what is not allowed.
        """
        tuning = Tuning(self.tune, self.adapter_rank) if self.tune else None
        given = {field.name: getattr(self, field.name) for field in fields(Distillation)}
        return Distillation(**given | {"tuning": tuning, "seed": self.machine.seed})


@dataclass(frozen=True)
class Serve:
    """Answer over HTTP as OpenAI's API does, while the drafter learns. SIGTERM or Ctrl-C: what runs is finished first.

    What a request says of temperature, max_tokens and so on goes before what is said here."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    drafter: Annotated[
        str | None, arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else ngram)")
    ] = None
    """Directory or Hub id of a drafter, `demo`, `demo/small_lm`, or the name of a fresh one: ngram, eagle, small_lm."""
    learner: Annotated[
        str | None,
        arg(
            metavar="LEARNER",
            help_behavior_hint=f"(default: {LearnConfig.learner}, where the drafter can learn)",
            help=f"How the drafter learns while it serves: {NAMES}.",
        ),
    ] = None
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine alone, 0.0.0.0 from everywhere."""
    port: int = 8000
    """0 takes a free one."""
    api_key: Annotated[
        str | None, arg(metavar="KEY", help_behavior_hint="(default: ONLINESPEC_API_KEY, else none)")
    ] = None
    """What clients must send as `Authorization: Bearer KEY`. The environment keeps it out of the list of processes."""
    served_model_name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: TARGET)")] = None
    """What clients call the model."""
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's)")] = None
    """0 is greedy."""
    limits: tyro.conf.OmitArgPrefixes[EngineLimits] = EngineLimits()
    prefix_megabytes: float = 256.0
    """Memory for what was computed of prompts, so that what begins alike is read once; 0 is off."""
    max_body_megabytes: float = 4.0
    """Largest body that is read."""
    max_prompt_tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the context)")] = None
    """Longest prompt."""
    grace_seconds: float = 30.0
    """Time for requests that run when the server is stopped."""
    fixed_draft_length: bool = False
    """Always draft --num-draft-tokens, whatever that costs. Else that is the most: how many pay, none included, is
    measured at the start and all the time."""
    learn_in: Annotated[
        Literal["process", "thread", "inline"] | None,
        arg(metavar="PLACE", help_behavior_hint="(default: process on a CPU, thread on a GPU)"),
    ] = None
    """Where learning runs: process or thread, beside serving, --learn-budget being its share of a core; or inline,
    between steps. Beside serving, weights are served once they have drafted better on the same requests."""
    versions: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not kept)")] = None
    """Keep the versions that are served here, with the learner's state: a restart goes on from the newest good one."""
    reset_drafter: bool = False
    """Begin with --drafter as it is; what is in --versions is moved aside."""
    save: SaveFolder = None
    """Write the adapted drafter to this directory when the server is stopped."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding(max_new_tokens=512, num_draft_tokens=8)
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning(learn_budget=0.25, replay_minutes=1440.0)
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()

    @property
    def drafter_name(self) -> str:
        return ("demo" if self.target == "demo" else "ngram") if self.drafter is None else self.drafter

    def defaults(self, defaults: SamplingParams = SamplingParams()) -> GenerationParams:
        """What requests do not say; `defaults` stands in for what is not said here either."""
        return self.decoding.params(self.temperature, defaults)


@dataclass(frozen=True)
class Inspect:
    """Say what a drafter or target directory is: format, shape, size, version, whom it fits."""

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """Directory or Hub id; `demo` for the shipped pair."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


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
    """Refuses what can be refused at once, before anything that takes seconds.

    Raises:
        ValueError, OSError, ImportError: with the value and the way out.
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
