"""vLLM's answers to the prompts of peers.py, with the same pair. Runs in its own environment, imports nothing of ours.

    VLLM_ENV/bin/python benchmarks/peers/vllm_peer.py DIR [--methods plain draft_model eagle] [--repeats 3]

DIR is the folder of `peers.py run`; lines go to DIR/vllm.jsonl, and `peers.py join` checks and joins them. One engine a
method, one after the other, one request at a time, one core. transformers' plain `generate` of the same target answers
each prompt beside vLLM, in turns: what a machine does that hour hurts both, and it ties these figures to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CORE = "0"  # on which vLLM's worker computes
OFFLINE = {  # read by vLLM when it is imported, and by its worker
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": CORE,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
METHODS: dict[str, str | None] = {"plain": None, "draft_model": "small_lm", "eagle": "eagle"}  # and whose model drafts

Timed = tuple[list[int], float, float]  # token ids, seconds on the wall, and processor seconds of all processes


def main() -> None:
    """Appends a line per method, repeat and prompt."""
    options = parsed()
    asked = json.loads((options.work / "prompts.json").read_text())
    for method in options.methods:
        try:
            engine = Engine(method, asked, options)
        except Exception as error:  # whatever a method lacks here is what is to be reported
            print(f"{method} does not start: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        with (options.work / "vllm.jsonl").open("a") as lines:
            for line in answers(engine, plain_generate(asked), method, asked, options):
                lines.write(json.dumps(line) + "\n")
        engine.close()


def parsed() -> argparse.Namespace:
    """The command line; the environment is set here, before vLLM is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that peers.py run wrote")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    os.environ.update(OFFLINE)
    return options


class Engine:
    """One vLLM engine with one way of speculating."""

    def __init__(self, method: str, asked: dict[str, Any], options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        drafts = METHODS[method]
        speculative = drafts and {
            "method": method,
            "model": asked[drafts],
            "num_speculative_tokens": asked["num_draft_tokens"],
        }
        self._llm = LLM(
            model=asked["target"],
            dtype=options.dtype,
            max_model_len=asked["max_positions"],
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,  # no arm remembers a prompt
            disable_log_stats=False,  # what was accepted is among the metrics
            speculative_config=speculative,
        )
        self._params = SamplingParams(
            temperature=0.0, max_tokens=asked["max_new_tokens"], stop_token_ids=asked["end_token_ids"], detokenize=False
        )

    def answer(self, prompt_ids: Sequence[int]) -> Timed:
        """One request, from call to answer."""
        began, used = time.perf_counter(), cpu_seconds()
        (request,) = self._llm.generate({"prompt_token_ids": list(prompt_ids)}, self._params, use_tqdm=False)
        taken = time.perf_counter() - began
        return list(request.outputs[0].token_ids), taken, cpu_seconds() - used

    def num_drafts(self) -> int | None:
        """How many drafts were verified so far; None where nothing drafts."""
        values = {metric.name: metric for metric in self._llm.get_metrics()}
        counted = values.get("vllm:spec_decode_num_drafts")
        return int(counted.value) if counted else None

    def close(self) -> None:
        """Ends the engine's process, so that the next method has the core."""
        self._llm.llm_engine.engine_core.shutdown()


def cpu_seconds() -> float:
    """Processor time of this process and of the engine's, so far."""
    import psutil

    process = psutil.Process()
    times = (one.cpu_times() for one in (process, *process.children(recursive=True)))
    return sum(one.user + one.system for one in times)


def plain_generate(asked: dict[str, Any]) -> Callable[[Sequence[int]], Timed]:
    """transformers' plain `generate`, as peers.py runs it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(asked["target"], dtype=torch.float32).eval()
    ends = asked["end_token_ids"]
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=asked["max_new_tokens"],
        eos_token_id=ends or None,
        pad_token_id=min(ends, default=0),
    )

    def answer(prompt_ids: Sequence[int]) -> Timed:
        began, used = time.perf_counter(), time.process_time()
        ids = torch.tensor([prompt_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        taken, cpu = time.perf_counter() - began, time.process_time() - used
        return out[0, len(prompt_ids) :].tolist(), taken, cpu

    return answer


def answers(
    engine: Engine,
    control: Callable[[Sequence[int]], Timed],
    method: str,
    asked: dict[str, Any],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """A line per repeat and prompt."""
    origin = provenance(options)
    for repeat in range(options.repeats):
        for data, prompts in asked["streams"].items():
            for index, prompt in enumerate(prompts):
                before = engine.num_drafts()
                turns = [engine.answer, control] if index % 2 else [control, engine.answer]
                timed = {turn: turn(prompt["token_ids"]) for turn in turns}
                (token_ids, seconds, cpu), (plain_ids, *plain_seconds) = timed[engine.answer], timed[control]
                after = engine.num_drafts()
                yield {
                    "data": data,
                    "arm": f"vllm/{method}",
                    "repeat": repeat,
                    "id": prompt["id"],
                    "token_ids": token_ids,
                    "seconds": round(seconds, 5),
                    "cpu_seconds": round(cpu, 5),
                    # the first token comes from reading the prompt, every other one from a verified draft
                    "steps": len(token_ids) if after is None else 1 + after - (before or 0),
                    "control_seconds": round(plain_seconds[0], 5),
                    "control_cpu_seconds": round(plain_seconds[1], 5),
                    "control_tokens": len(plain_ids),
                    "provenance": origin,
                }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from, in the words of `onlinespec.experiments.provenance`."""
    import torch
    import transformers
    import vllm

    settings = {name: value for name, value in vars(options).items() if name != "work"} | {"environment": OFFLINE}
    return {
        "command": f"benchmarks/peers/vllm_peer.py {options.work.name} {' '.join(sys.argv[2:])}".strip(),
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "num_threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
    }


def processor() -> str:
    """As /proc/cpuinfo names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
