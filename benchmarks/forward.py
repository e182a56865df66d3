"""What one forward pass of a target costs: transformers' and ours, side by side, behind a context of 128 tokens.

    python benchmarks/forward.py                            all sizes, a table and benchmarks/results/forward.jsonl
    python benchmarks/forward.py --sizes 8M 30M --repeats 10

Three contenders take turns, so that a machine whose speed drifts hurts all alike:

- transformers: `AutoModelForCausalLM` with its DynamicCache, called as `generate` calls it;
- onlinespec: `Decoder.forward`, logits of every new position;
- products: nothing but our forward's matrix products, prepacked. The rest of a forward is on top of them.

Random weights in Llama's shape. float32 on a CPU. A single request.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import msgspec
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from onlinespec.experiments.provenance import provenance
from onlinespec.models.decoder import Decoder
from onlinespec.models.families import decoder_config
from onlinespec.models.linear import can_pack

# hidden size, layers, heads, key-value heads, intermediate size, vocabulary; head and embedding are one tensor
SIZES = {
    "8M": (256, 8, 4, 2, 768, 8192),
    "30M": (512, 8, 8, 4, 1408, 16384),
    "100M": (768, 12, 12, 4, 2048, 32000),
    "350M": (1024, 24, 16, 8, 2816, 64000),
}
POSITIONS = (1, 5, 8)  # plain decoding, a verification of 4 drafted tokens, one of 7
CONTENDERS = ("transformers", "onlinespec", "products")
NUM_WARM_UP = 3

Run = Callable[[], float]


@dataclass(frozen=True)
class Options:
    """Measure a target's forward pass."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """Models to measure, by number of parameters."""
    repeats: int = 40
    """Timed calls of every contender."""
    threads: int = 1
    """Threads torch may use."""
    context: int = 128
    """Tokens already in the cache."""
    attention: str = "sdpa"
    """transformers' attention: sdpa or eager."""
    out: Path = Path(__file__).parent / "results" / "forward.jsonl"
    """Rows are appended here."""


def build(size: str, attention: str, context: int) -> PreTrainedModel:
    """A random model of transformers'."""
    hidden, layers, heads, kv_heads, intermediate, vocab = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=context + max(POSITIONS),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def run_transformers(model: PreTrainedModel, context_ids: Tensor, new_ids: Tensor) -> Run:
    """transformers' forward over new_ids; the cache is cropped back outside the clock."""
    count, total = len(new_ids), len(context_ids) + len(new_ids)
    cache = DynamicCache(config=model.config)
    model(input_ids=context_ids[None], past_key_values=cache, use_cache=True)
    inputs = {
        "input_ids": new_ids[None],
        "attention_mask": torch.ones(1, total, dtype=torch.int64),
        "position_ids": torch.arange(total - count, total)[None],
        "past_key_values": cache,
        "use_cache": True,
        "return_dict": True,
    }

    def run() -> float:
        started = perf_counter()
        model(**inputs)
        seconds = perf_counter() - started
        cache.crop(-count)
        assert cache.get_seq_length() == total - count
        return seconds

    return run


def run_onlinespec(decoder: Decoder, context_ids: Tensor, new_ids: Tensor) -> Run:
    """Our forward over new_ids; the cache is cropped back outside the clock."""
    cache = decoder.new_cache()
    cache.take(0, len(context_ids) + len(new_ids))
    decoder.forward(context_ids, [0], [len(context_ids)], cache, num_logits=[0])

    def run() -> float:
        started = perf_counter()
        decoder.forward(new_ids, [0], [len(new_ids)], cache)
        seconds = perf_counter() - started
        cache.crop(0, len(context_ids))
        return seconds

    return run


def run_products(decoder: Decoder, size: str, count: int) -> Run:
    """Every matrix product of our forward, one after the other, on inputs that are ready."""
    hidden, _, heads, _, intermediate, _ = SIZES[size]
    head_dim = decoder.config.layer.head_dim
    widths = {"_qkv": hidden, "_o": heads * head_dim, "_gate_up": hidden, "_down": intermediate}
    inputs = {width: torch.randn(count, width) for width in widths.values()}
    products = [(getattr(layer, n), inputs[width]) for layer in decoder._layers for n, width in widths.items()]
    products.append((decoder._head, inputs[hidden]))

    def run() -> float:
        started = perf_counter()
        for product, x in products:
            product(x)
        return perf_counter() - started

    return run


@torch.inference_mode()
def measure(size: str, options: Options) -> tuple[int, dict[int, dict[str, list[float]]]]:
    """Number of parameters, and seconds of every call by new positions and contender."""
    model = build(size, options.attention, options.context)
    decoder = Decoder(decoder_config(model.config, Path(size)), {n: t.detach() for n, t in model.state_dict().items()})
    ids = torch.randint(model.config.vocab_size, (options.context + max(POSITIONS),))
    context_ids = ids[: options.context]
    runs: dict[tuple[int, str], Run] = {}
    for count in POSITIONS:
        new_ids = ids[options.context :][:count]
        runs[count, "transformers"] = run_transformers(model, context_ids, new_ids)
        runs[count, "onlinespec"] = run_onlinespec(decoder, context_ids, new_ids)
        runs[count, "products"] = run_products(decoder, size, count)
    seconds: dict[int, dict[str, list[float]]] = {count: {name: [] for name in CONTENDERS} for count in POSITIONS}
    for repeat in track(range(NUM_WARM_UP + options.repeats), description=size, transient=True):
        for (count, name), run in runs.items():
            taken = run()
            if repeat >= NUM_WARM_UP:
                seconds[count][name].append(taken)
    return sum(parameter.numel() for parameter in model.parameters()), seconds


def milliseconds(seconds: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    first, median, third = statistics.quantiles(seconds, n=4)
    return first * 1e3, median * 1e3, third * 1e3


def main(options: Options) -> None:
    """Measures, prints the table, appends the rows."""
    torch.set_num_threads(options.threads)
    if unknown := sorted(set(options.sizes) - SIZES.keys()):
        raise SystemExit(f"--sizes names {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if options.repeats < 2:
        raise SystemExit(f"--repeats is {options.repeats}; quartiles need at least 2")
    table = Table(
        "size",
        "new",
        *CONTENDERS,
        "ratio",
        title=f"one forward behind {options.context} tokens, in milliseconds; float32, {options.threads} thread(s)",
        caption="new: tokens in the call. Medians, quartiles in brackets. ratio: onlinespec / transformers.",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    settings = {name: value for name, value in asdict(options).items() if name != "out"} | {"is_packed": can_pack()}
    origin = provenance("benchmarks/forward.py", target="random", drafter="", fingerprint="", settings=settings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("ab") as file:
        for size in options.sizes:
            num_parameters, seconds = measure(size, options)
            for count, by_name in seconds.items():
                times = {name: milliseconds(taken) for name, taken in by_name.items()}
                medians = {name: median for name, (_, median, _) in times.items()}
                ratio = medians["onlinespec"] / medians["transformers"]
                row = {
                    "size": size,
                    "num_parameters": num_parameters,
                    "positions": count,
                    "milliseconds": {n: [round(t, 4) for t in q] for n, q in times.items()},  # quartiles 1, 2, 3
                    "ratio": round(ratio, 4),
                    "provenance": origin,
                }
                file.write(msgspec.json.encode(row) + b"\n")
                file.flush()
                table.add_row(
                    size,
                    str(count),
                    *(f"{median:.1f} ({first:.1f}–{third:.1f})" for first, median, third in times.values()),
                    f"{ratio:.2f}",
                )
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
