"""What users would otherwise run, beside ours: the same pair, prompts, K and thread, greedy, float32, interleaved.

    python benchmarks/peers/run.py [--data builtin:prose FILE ...] [--num-requests 60] [--repeats 2] --out ROWS.jsonl
    python benchmarks/peers/tables.py ROWS.jsonl [MORE.jsonl]

Every prompt goes through all arms, another one first each time. transformers: plain `generate`, with the small
language model as the assistant at a constant K and at its own changing length, and with prompt lookup. Ours: `none`,
`ngram`, and `small_lm` and `eagle` frozen and learning, learning time counted. Answers are compared token for token
with ours of `none`; where two differ, the target says whether it was a near tie. `--export` also writes the prompts for
vllm_peer.py, which runs in an environment of its own.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM

from onlinespec.calibration import measure_costs
from onlinespec.config import GenerationParams, LearnConfig
from onlinespec.decode import DecodeLoop
from onlinespec.drafters import load_drafter
from onlinespec.learn import InlineLearning
from onlinespec.methods import parse
from onlinespec.models.checkpoint import find_folder
from onlinespec.models.loading import Target, load_target
from onlinespec.provenance import provenance
from onlinespec.workloads import load_workload

TIE_GAP = 1e-4
WARM_UP = 2  # prompts of the first segment that no arm is timed on


@dataclass(frozen=True)
class Peers:
    """Time arms side by side.

    Attributes:
        small_lm: A language model with the target's tokenizer, in Hugging Face form: read by both sides.
        export: A file for the prompts' token ids and our plain answers, for vllm_peer.py.
    """

    out: Path
    target: str = "demo"
    small_lm: str = "demo/small_lm"
    eagle: str = "demo"
    data: tuple[str, ...] = ("builtin:prose", "builtin:sql")
    num_requests: int = 60
    num_draft_tokens: int = 2
    max_new_tokens: int = 96
    repeats: int = 1
    export: Path | None = None


@dataclass(frozen=True)
class Answer:
    """One arm's answer to a prompt."""

    token_ids: list[int]
    seconds: float
    acceptance_length: float | None = None


Arm = Callable[[Sequence[int]], Answer]


def their_arms(options: Peers, target: Target) -> dict[str, Arm]:
    """transformers' ways, on float32 copies of the same files."""
    folder = find_folder(options.target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assistant = AutoModelForCausalLM.from_pretrained(find_folder(options.small_lm), dtype=torch.float32).eval()
    constant = copy.deepcopy(assistant)
    constant.generation_config.num_assistant_tokens = options.num_draft_tokens
    constant.generation_config.num_assistant_tokens_schedule = "constant"
    constant.generation_config.assistant_confidence_threshold = 0.0
    ends = sorted(target.end_token_ids)
    fixed = {"do_sample": False, "max_new_tokens": options.max_new_tokens, "eos_token_id": ends, "pad_token_id": 0}

    def arm(**settings: Any) -> Arm:
        def answer(prompt_ids: Sequence[int]) -> Answer:
            ids = torch.tensor([list(prompt_ids)])
            began = time.perf_counter()
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **settings)
            return Answer(output[0, len(prompt_ids) :].tolist(), time.perf_counter() - began)

        return answer

    return {
        "transformers": arm(),
        "transformers assisted, constant": arm(assistant_model=constant),
        "transformers assisted, dynamic": arm(assistant_model=assistant),
        "transformers prompt lookup": arm(prompt_lookup_num_tokens=options.num_draft_tokens),
    }


def our_arms(options: Peers, target: Target) -> dict[str, Arm]:
    """Ours; those that learn have their costs measured here first."""
    params = GenerationParams(options.max_new_tokens, options.num_draft_tokens)

    def arm(drafter_name: str | None, method: str = "frozen") -> Arm:
        drafter = load_drafter(drafter_name, target) if drafter_name else None
        learning = None
        if drafter and method != "frozen":
            spare = load_drafter(drafter_name, target)
            costs = measure_costs(target, spare, LearnConfig(), params)._asdict()
            learning = InlineLearning(drafter, config=parse(method, LearnConfig(**costs)))
        loop = DecodeLoop(target, drafter, learning)

        def answer(prompt_ids: Sequence[int]) -> Answer:
            began = time.perf_counter()
            request = loop.complete(prompt_ids, params)
            return Answer(request.output_ids, time.perf_counter() - began, request.stats.acceptance_length)

        return answer

    return {
        "none": arm(None),
        "ngram": arm("ngram"),
        "small_lm frozen": arm(options.small_lm),
        "small_lm learning": arm(options.small_lm, "online_gradient"),
        "eagle frozen": arm(options.eagle),
        "eagle learning": arm(options.eagle, "online_gradient"),
    }


def verdict(target: Target, prompt_ids: Sequence[int], answer: Sequence[int], plain: Sequence[int]) -> str:
    """`same`, `tie` or `differs`: whether two greedy answers part, and if so at two tokens that the target holds
    nearly alike."""
    if list(answer) == list(plain):
        return "same"
    pairs = list(zip(answer, plain, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return "differs"
    ids = torch.tensor([*prompt_ids, *plain[:first]])
    cache = target.decoder.new_cache()
    cache.take(0, len(ids))
    logits_V = target.decoder.forward(ids, [0], [len(ids)], cache, [1]).logits_MV[0]
    return "tie" if bool(logits_V.max() - logits_V[list(pairs[first])].min() < TIE_GAP) else "differs"


def prompts_of(options: Peers, target: Target) -> list[tuple[int, str, list[int]]]:
    """(segment, id, token ids); prompts that leave no room for a whole answer are left out."""
    room = target.decoder.config.max_positions - options.max_new_tokens
    chosen = []
    for segment, spec in enumerate(options.data):
        encoded = ((prompt.id, target.encode(prompt.text)) for prompt in load_workload(spec).prompts(0))
        fitting = ((segment, name, ids) for name, ids in encoded if len(ids) <= room)
        chosen += list(islice(fitting, options.num_requests))
    return chosen


def run(options: Peers) -> None:
    """Times all arms; a row per arm and prompt, the first row says where."""
    torch.set_num_threads(1)
    target = load_target(options.target)
    prompts = prompts_of(options, target)
    said = provenance(" ".join(sys.argv), options.target, options.small_lm, target.fingerprint, {})
    said["data"] = [Path(spec).name for spec in options.data]
    said["num_draft_tokens"] = options.num_draft_tokens
    exported = []
    with options.out.open("a") as lines:
        lines.write(json.dumps({"provenance": said}) + "\n")
        for repeat in range(options.repeats):
            arms = their_arms(options, target) | our_arms(options, target)
            for _, _, ids in prompts[:WARM_UP]:
                for name, arm in arms.items():
                    if "learning" not in name:
                        arm(ids)
            names = list(arms)
            for index, (segment, prompt_id, ids) in enumerate(prompts):
                shift = index % len(names)
                answers = {name: arms[name](ids) for name in names[shift:] + names[:shift]}
                plain = answers["none"].token_ids
                if not repeat:
                    exported.append({"segment": segment, "id": prompt_id, "prompt_ids": ids, "plain_ids": plain})
                for name, answer in answers.items():
                    row = {
                        "arm": name,
                        "repeat": repeat,
                        "segment": segment,
                        "index": index,
                        "id": prompt_id,
                        "tokens": len(answer.token_ids),
                        "seconds": answer.seconds,
                        "acceptance_length": answer.acceptance_length,
                        "verdict": verdict(target, ids, answer.token_ids, plain),
                    }
                    lines.write(json.dumps(row) + "\n")
                lines.flush()
                if (index + 1) % 20 == 0:
                    print(f"repeat {repeat}: {index + 1} of {len(prompts)} prompts", file=sys.stderr)
    if options.export:
        settings = {"num_draft_tokens": options.num_draft_tokens, "max_new_tokens": options.max_new_tokens}
        settings["end_token_ids"] = sorted(target.end_token_ids)
        settings |= {"target": str(find_folder(options.target)), "small_lm": str(find_folder(options.small_lm))}
        options.export.write_text(json.dumps(settings | {"data": said["data"], "prompts": exported}))


if __name__ == "__main__":
    run(tyro.cli(Peers))
