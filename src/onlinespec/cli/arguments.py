"""What may be asked on the command line, as dataclasses; tyro makes flags and help of them.

Imported by every command, `--help` too: nothing here takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from onlinespec.config import GenerationParams, LearnConfig, SamplingParams, Tuning, check_that
from onlinespec.registry import FROZEN, LEARNER_NAMES, NONE, SHIPPED_DRAFTERS, SHIPPED_TARGETS
from onlinespec.workloads import load_workload

TargetName = Annotated[Positional[str], arg(metavar="TARGET")]
SaveFolder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not saved)")]
_NAMES = (
    f"{NONE} (plain decoding, without a drafter), {FROZEN} (the drafter stays as it is), "
    f"{', '.join(name for name in LEARNER_NAMES if name not in (NONE, FROZEN))}; "
    "NAME/SETTING=VALUE/... changes settings"
)
Recommended = arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's in generate and serve, else off)")


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute."""

    device: str = "cpu"
    """Torch device the models live on: cpu, cuda, mps."""
    dtype: str = "float32"
    """Precision of the target: float32 (exact on a CPU), bfloat16 or float16."""
    num_threads: int = 1
    """CPU threads. One is best for small models and when other programs run; try all cores above 100M parameters."""
    seed: int = 0
    """Seed of prompts, fresh drafters and sampling."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drafted and chosen."""

    num_draft_tokens: int = 4
    """Tokens drafted per step, 0 to 16; 0 is plain decoding."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    top_k: Annotated[int | None, Recommended] = None
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Annotated[float | None, Recommended] = None
    """Sample among the likeliest tokens that make up this probability; 1 is off."""
    min_p: Annotated[float | None, Recommended] = None
    """Sample among tokens at least this likely, relative to the likeliest; 0 is off."""
    repetition_penalty: Annotated[float | None, Recommended] = None
    """Above 1 discourages tokens that occurred before; 1 is off."""

    def params(
        self, temperature: float | None = None, defaults: SamplingParams = SamplingParams(), **more: Any
    ) -> GenerationParams:
        """As the library takes them; `defaults` stands in for what was not given."""
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        given = {"temperature": temperature} | {name: getattr(self, name) for name in names}
        sampling = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        return GenerationParams(self.max_new_tokens, self.num_draft_tokens, sampling, **more)


@dataclass(frozen=True)
class Learning:
    """How the drafter learns, unless a learner's own line says otherwise."""

    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        LearnConfig.step_size
    )
    """Rate of learning: 1e-3 up to two million parameters that learn, then falling with the square root of their number
    (1.4e-4 for a hundred million)."""
    geometry: str = LearnConfig.geometry
    """Norm of the updates: preconditioned (per-weight scales), diagonal (Adam: averages gradients too) or
    euclidean (the gradient itself)."""
    loss: str = LearnConfig.loss
    """What is learned: auto (mostly the committed token when greedy, the whole row when sampled), soft_cross_entropy,
    cross_entropy, mix, reverse_kl, jsd, total_variation."""
    learn_budget: float = LearnConfig.budget
    """Most of decoding time that learning may take, or of one core's time where serve learns beside decoding; 0.08 is
    8 %. Some updates are lent at the start, so a short run shows more. inf is no limit."""
    learn_costs: Annotated[
        tuple[float, float] | None,
        arg(metavar="UPDATE ROW", help_behavior_hint="(default: measured; 1 and 0.03 in generate and serve)"),
    ] = None
    """What an update costs, in decode steps, by itself and for each of its rows: what the budget is counted in. (Where
    serve learns beside decoding, a clock counts.)"""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """What of a small_lm learns: layers (all but embedding and head), all, or adapters (low-rank, as peft has them)."""
    adapter_rank: int = Tuning.rank
    """Rank of those adapters."""
    replay_every: int = LearnConfig.replay_every
    """Every so many updates, rows of an earlier request are learned again; 0 for no memory."""
    replay_megabytes: float = LearnConfig.replay_megabytes
    """Size of that memory."""
    replay_minutes: float = LearnConfig.replay_minutes
    """After which a request is forgotten; inf is never."""
    min_interval: int = LearnConfig.min_interval
    """Steps between two updates while they bring something; up to four times as many where the loss is small."""
    max_interval: int = LearnConfig.max_interval
    """Most steps between two updates once they don't; up to four times as many where the loss is small. The same as
    --min-interval keeps them fixed."""

    def tuning(self) -> Tuning | None:
        """What of the drafter learns; None for the drafter's own choice."""
        return Tuning(self.tune, self.adapter_rank) if self.tune else None

    def config(self, telemetry: bool = False) -> LearnConfig:
        """As the library takes it."""
        return LearnConfig(
            step_size=self.step_size,
            geometry=self.geometry,
            loss=self.loss,
            budget=self.learn_budget,
            round_cost=self.learn_costs[0] if self.learn_costs else LearnConfig.round_cost,
            row_cost=self.learn_costs[1] if self.learn_costs else LearnConfig.row_cost,
            replay_every=self.replay_every,
            replay_megabytes=self.replay_megabytes,
            replay_minutes=self.replay_minutes,
            min_interval=self.min_interval,
            max_interval=self.max_interval,
            telemetry=telemetry,
        )


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
            help=f"How the drafter learns while it answers: {_NAMES}. What one answer teaches is lost without --save, "
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
        arg(metavar="LEARNERS", help=f"Separated by commas: {_NAMES}, as in ensemble/with_frozen=true."),
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


@dataclass(frozen=True)
class Distill:
    """Train a first drafter offline, on the target's own answers. The same command goes on where it was stopped."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """Prompts to have answered: FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:NAME."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where the drafter is written; work under way lies in DIR.work."""
    drafter: Annotated[str, arg(metavar="DRAFTER")] = "eagle"
    """Name of a fresh drafter (eagle, small_lm), or directory or Hub id of a saved one to go on from."""
    num_requests: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (400,)
    """Prompts of each data, one number for all or one for each; 0 takes all of a file."""
    temperature: Annotated[
        float | None, arg(metavar="NUMBER", help_behavior_hint="(default: half greedy, half at 1)")
    ] = None
    """At which the target answers; 0 is greedy."""
    max_new_tokens: int = 112
    """Longest answer, in tokens."""
    num_draft_tokens: int = 4
    """Tokens drafted per step where acceptance is measured."""
    holdout: int = 20
    """One answer in so many is left out of training and measures what it brought; never fewer than 8 answers."""
    epochs: int = 4
    """Passes over the answers; the step size falls to zero over the last two fifths."""
    patience: int = 2
    """Epochs without longer acceptance after which it stops; the best weights are kept."""
    batch_requests: int = 4
    """Answers per training step."""
    step_size: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: by the drafter's size)")] = (
        None
    )
    """Rate of learning: 2e-3 up to two million parameters that learn, then falling with the square root of their number
    (3e-4 for a hundred million)."""
    minutes: float = 0.0
    """Time for the whole, about; a slower machine answers fewer prompts and trains less on them, the step size still
    falling to zero. 0 is no limit."""
    loss: str = "soft_cross_entropy"
    """What is learned: soft_cross_entropy, auto, cross_entropy, mix, reverse_kl, jsd, total_variation."""
    tune: Annotated[str | None, arg(metavar="PART", help_behavior_hint="(default: layers, of a small_lm)")] = None
    """What of a small_lm learns: layers (all but embedding and head), all, or adapters (low-rank, as peft has them)."""
    adapter_rank: int = Tuning.rank
    """Rank of those adapters."""
    restart: bool = False
    """Train anew, whatever is in DIR and DIR.work. Answers there are kept if they would come out the same."""
    keep_text: bool = False
    """Leave the answers in DIR.work when done: with --restart another training takes them as they are."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


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
            help=f"How the drafter learns while it serves: {_NAMES}.",
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
    max_running: int = 16
    """Requests that decode at once."""
    max_waiting: int = 256
    """Requests that wait for their turn; more are turned away with 429."""
    cache_megabytes: float = 1024.0
    """Memory for the keys, values and states of requests that run."""
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
