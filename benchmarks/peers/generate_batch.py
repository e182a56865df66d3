"""transformers' continuous batching, behind a pipe: a line of JSON in, a line of JSON out. Imports nothing of ours.

    python benchmarks/peers/generate_batch.py TARGET

In: `{"prompts": [[...]], "streams": 4, "max_tokens": 64, "end_token_ids": [...]}`. Out: `{"answers": [[...]],
"seconds": 1.2}`, the seconds of the `generate_batch` call alone. Its manager is kept from call to call, as a server
would, and made anew, outside the clock, when the number of streams changes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE, PAGES = 256, 128  # tokens of a page of its cache, which it can't size itself without a GPU; and how many


def main() -> None:
    """Answers until the input ends."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
    print("ready", flush=True)
    streams = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["streams"] != streams:
            model.destroy_cached_continuous_batching_manager()
            streams = asked["streams"]
            answer(model, asked)  # the manager is made
        began = time.perf_counter()
        answers = answer(model, asked)
        print(json.dumps({"answers": answers, "seconds": time.perf_counter() - began}), flush=True)


def answer(model: Any, asked: dict[str, Any]) -> list[list[int]]:
    """All prompts, so many at once as there are streams."""
    ends = asked["end_token_ids"]
    outputs = model.generate_batch(
        inputs=asked["prompts"],
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=asked["max_tokens"],
            eos_token_id=ends or None,
            pad_token_id=min(ends, default=0),
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=PAGES, max_batch_tokens=512, max_requests_per_batch=asked["streams"]
        ),
        persistent_manager=True,
    )
    return [list(output.generated_tokens) for output in outputs.values()]


if __name__ == "__main__":
    main()
