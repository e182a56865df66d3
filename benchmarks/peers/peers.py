"""The same pair of models under transformers and under ours: tokens per second, and whether the tokens are the same.

    python benchmarks/peers/peers.py run --work DIR [--data builtin:prose FILE...]   rows to DIR/rows.jsonl
    VLLM_ENV/bin/python benchmarks/peers/vllm_peer.py DIR                            answers to DIR/vllm.jsonl
    python benchmarks/peers/peers.py join --work DIR                                 checks them, joins the rows
    python benchmarks/peers/peers.py tables DIR/rows.jsonl                           markdown

Every stream begins with drafters as they were loaded, so that its last third says what one domain's learning brings.
Arms take turns prompt by prompt, each time another one first. README.md beside this says what is compared.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from arms import ARMS, NONE, Answer, Arm, Models, Pair, folder_of, read_models
from ratios import Tables, run_tables
from rich.progress import track

from onlinespec.config import GenerationParams
from onlinespec.experiments.provenance import provenance
from onlinespec.experiments.ties import TIE_GAP
from onlinespec.models.checkpoint import find_folder
from onlinespec.models.loading import Target, load_target
from onlinespec.workloads import load_workload

BUILT_IN = ("builtin:prose", "builtin:sql", "builtin:arithmetic", "builtin:code")
ROWS, PROMPTS, VLLM = "rows.jsonl", "prompts.json", "vllm.jsonl"


@dataclass(frozen=True)
class Run:
    """Measure transformers and ours.

    Attributes:
        work: Folder for rows, and for the prompts that vLLM is to answer.
        data: Streams: built-in ones, or files of prompts. The first is what the shipped drafters were trained on.
        num_requests: Of each stream.
        warm_up: So many requests at a stream's start are answered, and learned from, but not counted.
        small_lm: Folder of the small model.
        arms: Those to run, in their order; the controls `transformers` and `none` are needed for ratios.
    """

    work: Path
    data: tuple[str, ...] = BUILT_IN
    num_requests: int = 60
    warm_up: int = 3
    repeats: int = 3
    max_new_tokens: int = 96
    num_draft_tokens: int = 4
    target: str = "demo"
    small_lm: str = "demo/small_lm"
    eagle: str = "demo"
    arms: tuple[str, ...] = tuple(ARMS)


@dataclass(frozen=True)
class Join:
    """Compare vLLM's answers with ours and add its rows.

    Attributes:
        work: The folder of `run`, to which `vllm_peer.py` has written.
    """

    work: Path


@dataclass
class Column:
    """One arm's figures over one stream, a number per request, as they go into a row."""

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    learn_seconds: list[float] = field(default_factory=list)
    identical: int = 0  # answers that are `none`'s, token for token
    ties: int = 0  # that part from it where the target's two best logits lie within TIE_GAP
    differing: list[str] = field(default_factory=list)  # prompts whose answers differ for no such reason

    def add(self, answer: Answer) -> None:
        self.tokens.append(len(answer.token_ids))
        self.steps.append(answer.steps)
        self.seconds.append(round(answer.seconds, 5))
        self.cpu_seconds.append(round(answer.cpu_seconds, 5))
        self.learn_seconds.append(round(answer.learn_seconds, 5))


# --- run ------------------------------------------------------------------------------------------------------------


def run(options: Run) -> None:
    """All streams, all repeats; a row per stream, repeat and arm as soon as it is known."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _refuse(options)
    target = load_target(options.target)
    params = GenerationParams(options.max_new_tokens, options.num_draft_tokens)
    pair = Pair(target, options.small_lm, options.eagle, params)
    streams = {load_workload(spec).name: _prompts(target, spec, options) for spec in options.data}
    models = read_models(pair, options.arms)
    origin = _origin(target, options, models)
    references: dict[str, list[list[int]]] = {}
    with (options.work / ROWS).open("a") as rows:
        for repeat in range(options.repeats):
            for data, prompts in streams.items():
                answered = _stream(models, options.arms, prompts, repeat, f"{data}, repeat {repeat + 1}")
                plain = [answers[NONE].token_ids for answers in answered]
                references.setdefault(data, plain)
                columns = _columns(target, options.arms, prompts, answered, plain)
                for arm, column in columns.items():
                    row = {"data": data, "arm": arm, "repeat": repeat, "warm_up": options.warm_up, **asdict(column)}
                    rows.write(json.dumps(row | {"provenance": origin}) + "\n")
                rows.flush()
                _export(options, pair, streams, references)


def _refuse(options: Run) -> None:
    """What would fail or mislead later."""
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise SystemExit(f"--arms names {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if NONE not in options.arms:
        raise SystemExit(f"--arms lacks {NONE}, whose tokens all others are compared with; add it")
    if options.num_requests < options.warm_up + 3:
        raise SystemExit(f"--num-requests is {options.num_requests}; give at least {options.warm_up + 3}")
    if (options.work / ROWS).exists():
        raise SystemExit(f"{options.work} holds the rows of another run; choose another --work, or move them away")
    folder_of(options.small_lm), folder_of(options.eagle)  # raise where there is none
    options.work.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Encoded:
    """A prompt as every arm gets it."""

    id: str
    token_ids: list[int]


def _prompts(target: Target, spec: str, options: Run) -> list[Encoded]:
    """The stream's first prompts that leave room for the answer: arms cut what does not fit in different ways."""
    most = target.decoder.config.max_positions - options.max_new_tokens - options.num_draft_tokens
    encoded = (Encoded(prompt.id, target.encode(prompt.text)) for prompt in load_workload(spec).prompts(0))
    return list(islice((prompt for prompt in encoded if len(prompt.token_ids) <= most), options.num_requests))


def _stream(
    models: Models, names: Sequence[str], prompts: Sequence[Encoded], repeat: int, label: str
) -> list[dict[str, Answer]]:
    """Answers by arm for each prompt. Arms are made anew: each stream begins with drafters as they were loaded."""
    arms: dict[str, Arm] = {name: ARMS[name](models) for name in names}
    answered = []
    for index, prompt in enumerate(track(prompts, description=label, transient=True)):
        shift = (index + repeat) % len(names)
        order = (*names[shift:], *names[:shift])
        answered.append({name: arms[name].answer(prompt.token_ids) for name in order})
    return answered


def _columns(
    target: Target,
    names: Sequence[str],
    prompts: Sequence[Encoded],
    answered: Sequence[dict[str, Answer]],
    references: Sequence[list[int]],
) -> dict[str, Column]:
    columns: dict[str, Column] = {name: Column() for name in names}
    for prompt, answers, reference in zip(prompts, answered, references, strict=True):
        for name, answer in answers.items():
            columns[name].add(answer)
            judge(target, columns[name], prompt.id, prompt.token_ids, answer.token_ids, reference)
    return columns


def judge(
    target: Target,
    column: Column,
    prompt_id: str,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    reference: Sequence[int],
) -> None:
    """Counts an answer as identical to the reference, a near-tie of the target, or differing."""
    if list(answer) == list(reference):
        column.identical += 1
    elif gap_of(target, prompt_ids, answer, reference) < TIE_GAP:
        column.ties += 1
    else:
        column.differing.append(prompt_id)


@torch.inference_mode()
def gap_of(target: Target, prompt_ids: Sequence[int], answer: Sequence[int], reference: Sequence[int]) -> float:
    """How far below its best the target's logit of either token lies where two answers part; inf if one just ends."""
    pairs = list(zip(answer, reference, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return float("inf")
    ids = [*prompt_ids, *reference[:first]]
    cache = target.decoder.new_cache()
    cache.take(0, len(ids))
    logits_V = target.decoder.forward(torch.tensor(ids), [0], [len(ids)], cache, [1]).logits_MV[0].float()
    return float(logits_V.max() - logits_V[list(pairs[first])].min())


def _origin(target: Target, options: Run, models: Models) -> dict[str, Any]:
    """Where the figures come from; of paths their last part only."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("work", "arms")}
    settings |= {"data": [_bare(spec) for spec in options.data], "small_lm": _bare(options.small_lm)}
    settings |= {"eagle": _bare(options.eagle), "target": _bare(options.target)}
    settings["learn_costs"] = {name: costs._asdict() for name, costs in models.costs.items()}
    settings["has_sklearn"] = find_spec("sklearn") is not None  # without it transformers leaves its threshold alone
    command = " ".join(["benchmarks/peers/peers.py", *(_bare(word) for word in sys.argv[1:])])
    return provenance(command, _bare(options.target), _bare(options.small_lm), target.fingerprint, settings)


def _bare(word: str) -> str:
    return word.rstrip("/").rpartition("/")[2] if word.startswith(("/", ".", "~")) else word


# --- vLLM -----------------------------------------------------------------------------------------------------------


def _export(
    options: Run, pair: Pair, streams: dict[str, list[Encoded]], references: dict[str, list[list[int]]]
) -> None:
    """What vllm_peer.py reads: it imports nothing of ours."""
    exported = {
        "target": str(find_folder(options.target).absolute()),
        "small_lm": str(folder_of(options.small_lm).absolute()),
        "eagle": str(folder_of(options.eagle).absolute()),
        "end_token_ids": sorted(pair.target.end_token_ids),
        "max_new_tokens": options.max_new_tokens,
        "num_draft_tokens": options.num_draft_tokens,
        "max_positions": pair.target.decoder.config.max_positions,
        "warm_up": options.warm_up,
        "streams": {
            data: [
                {"id": prompt.id, "token_ids": prompt.token_ids, "reference": reference}
                for prompt, reference in zip(streams[data], answers, strict=True)
            ]
            for data, answers in references.items()
        },
    }
    (options.work / PROMPTS).write_text(json.dumps(exported))


def join(options: Join) -> None:
    """Adds a row per stream, repeat and method of vLLM, of the same form, with transformers' times beside its own."""
    exported = json.loads((options.work / PROMPTS).read_text())
    target = load_target(exported["target"])
    prompts = {data: {one["id"]: one for one in stream} for data, stream in exported["streams"].items()}
    answers: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(options.work / VLLM):
        answers[line["data"], line["arm"], line["repeat"]].append(line)
    joined = [row for row in _lines(options.work / ROWS) if not row["arm"].startswith("vllm")]
    for (data, arm, repeat), lines in answers.items():
        column = Column()
        for line in lines:
            prompt = prompts[data][line["id"]]
            column.add(Answer(line["token_ids"], line["seconds"], line["cpu_seconds"], 0.0, line["steps"]))
            judge(target, column, line["id"], prompt["token_ids"], line["token_ids"], prompt["reference"])
        row = {"data": data, "arm": arm, "repeat": repeat, "warm_up": exported["warm_up"], **asdict(column)}
        for name in ("seconds", "cpu_seconds", "tokens"):
            row[f"control_{name}"] = [line[f"control_{name}"] for line in lines]
        joined.append(row | {"provenance": lines[0]["provenance"]})
    (options.work / ROWS).write_text("".join(json.dumps(row) + "\n" for row in joined))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """The benchmark's own command line."""
    step = tyro.extras.subcommand_cli_from_dict({"run": Run, "join": Join, "tables": Tables})
    {Run: run, Join: join, Tables: run_tables}[type(step)](step)


if __name__ == "__main__":
    main()
