"""How the shipped pair was made; anyone can run it again, with or without the extra text.

    export PYTHONPATH=tools
    python -m demo_pair.recipe target --work DIR [--data DIR] --tokens 9e6
    torchrun --nproc-per-node 2 -m demo_pair.recipe target ...    # two processes share each batch
    python -m demo_pair.recipe export --work DIR --out src/onlinespec/demo/target
    python -m demo_pair.recipe drafter --target src/onlinespec/demo/target --out src/onlinespec/demo/drafter
    python -m demo_pair.recipe drafter --family small_lm --num-requests 1000 --epochs 6 --target ... --out D
    python -m demo_pair.recipe half --drafter D --out src/onlinespec/demo/small_lm

`target` makes the tokenizer, then trains; stop it at any time and start it again with the same arguments, it goes on
where its last checkpoint was. A larger `--tokens` on a finished run trains further.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demo_pair.corpus import Corpus, Document, packed_rows
from onlinespec.drafters.checkpoints import read_side, write_drafter
from onlinespec.models.checkpoint import read_json, read_weights
from onlinespec.models.linear import has_bfloat16_units
from onlinespec.models.loading import load_target
from onlinespec.offline.distill import Distilling
from onlinespec.offline.pace import schedule
from onlinespec.offline.settings import Distillation

log = logging.getLogger("onlinespec.recipe")

VOCAB_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPT_WEIGHT = 0.25  # prompts teach the language, answers the task


@dataclass
class TargetRecipe:
    """Train the demo target from nothing.

    Attributes:
        work: Folder of checkpoints; an interrupted run goes on from there.
        data: Folder of permissively licensed *.train.jsonl[.gz] files; without it the built-ins alone serve.
        tokens: Length of the whole run; the step size falls to zero over its last 40 %.
        micro_tokens: Tokens of one forward and backward pass; small enough for the processor's caches.
        long_share: Last part of the run on rows four times as long, so that long prompts are in range.
        initial: An exported target to go on from, with a tokenizer of its own and a fresh optimizer.
    """

    work: Path
    data: Path | None = None
    tokens: float = 9e6
    batch_tokens: int = 2048
    micro_tokens: int = 512
    row_length: int = 256
    long_share: float = 0.35
    step_size: float = 2.5e-3
    num_threads: int = 1
    seed: int = 0
    initial: Path | None = None


def config() -> Qwen3Config:
    """Deep and narrow: for the same size, a deep target leaves a one-layer drafter more to save."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def train_tokenizer(corpus: Corpus, num_documents: int = 30_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, so that arithmetic sees numbers as people write them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (document for _, document in islice(corpus.documents(), num_documents))
    bpe.train_from_iterator((f"{d.prompt}\n{d.answer}" for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[float]]:
    """Token ids as the chat template would lay them out, and each token's weight in the loss."""
    ids_of = tokenizer.backend_tokenizer.encode
    if not document.prompt:
        ids = [*ids_of(document.answer).ids, tokenizer.pad_token_id]
        return ids, [1.0] * len(ids)
    asked = ids_of(f"{TURN_START}user\n{document.prompt}{TURN_END}\n{TURN_START}assistant\n").ids
    answer = ids_of(document.answer + TURN_END).ids
    after = ids_of("\n").ids
    return asked + answer + after, [PROMPT_WEIGHT] * len(asked) + [1.0] * len(answer) + [0.0] * len(after)


def batches(
    recipe: TargetRecipe, tokenizer: PreTrainedTokenizerFast, done: list[float], rank: int, num_ranks: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """This process's share of each batch, in pieces of micro_tokens: token ids with loss weights.

    `done[0]` is the share of the run behind us.
    """

    def row_length() -> int:
        return recipe.row_length * (4 if done[0] > 1 - recipe.long_share else 1)

    corpus = Corpus(recipe.data, seed=recipe.seed + int(done[0] * 1e6) + 7919 * rank)
    rows = packed_rows(corpus, lambda document: encode(tokenizer, document), row_length)
    while True:
        length = row_length()
        alike = (row for row in rows if len(row[0]) == length + 1)
        pieces = []
        for _ in range(max(1, recipe.batch_tokens // num_ranks // max(recipe.micro_tokens, length))):
            piece = list(islice(alike, max(1, recipe.micro_tokens // length)))
            pieces.append((torch.tensor([ids for ids, _ in piece]), torch.tensor([weights for _, weights in piece])))
        yield pieces


def train_target(recipe: TargetRecipe) -> None:
    """Trains to recipe.tokens, with a checkpoint every few minutes."""
    rank, num_ranks = _join()
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    recipe.work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe) if rank == 0 else None
    if num_ranks > 1:
        dist.barrier()
    tokenizer = tokenizer or _tokenizer(recipe)
    model = Qwen3ForCausalLM(config())
    if recipe.initial:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(recipe.initial, dtype=torch.float32).state_dict())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.step_size,
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint, num_tokens = recipe.work / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        num_tokens = saved["num_tokens"]
    done = [num_tokens / recipe.tokens]
    average, start, saved_at, start_tokens = 0.0, time.monotonic(), time.monotonic(), num_tokens
    for step, pieces in enumerate(batches(recipe, tokenizer, done, rank, num_ranks)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.step_size * schedule(done[0])
        average = 0.98 * average + 0.02 * sum(_backward(model, ids, weights, len(pieces)) for ids, weights in pieces)
        _average_gradients(model, num_ranks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += num_ranks * sum(ids[:, 1:].numel() for ids, _ in pieces)
        done[0] = num_tokens / recipe.tokens
        finished = num_tokens >= recipe.tokens
        if rank == 0 and (step % 50 == 49 or finished):
            rate = (num_tokens - start_tokens) / (time.monotonic() - start)
            log.info(
                "%.2fM tokens, loss %.3f, %.0f tokens/s", num_tokens / 1e6, average / (1 - 0.98 ** (step + 1)), rate
            )
        if rank == 0 and (time.monotonic() - saved_at > 240 or finished):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "num_tokens": num_tokens}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            saved_at = time.monotonic()
        if finished:
            return


def _join() -> tuple[int, int]:
    """This process's number and how many there are; torchrun says so in the environment."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _tokenizer(recipe: TargetRecipe) -> PreTrainedTokenizerFast:
    """The run's own, made at its beginning."""
    if not (recipe.work / "tokenizer.json").exists():
        if recipe.initial:
            PreTrainedTokenizerFast.from_pretrained(recipe.initial).save_pretrained(recipe.work)
        else:
            log.info("training the tokenizer")
            train_tokenizer(Corpus(recipe.data, recipe.seed)).save_pretrained(recipe.work)
    return PreTrainedTokenizerFast.from_pretrained(recipe.work)


def _backward(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor, num_pieces: int) -> float:
    """Adds a piece's share to the gradients; its share of the loss."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16_units()):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum() / num_pieces
    loss.backward()
    return loss.item()


def _average_gradients(model: Qwen3ForCausalLM, num_ranks: int) -> None:
    if num_ranks > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.nn.utils.parameters_to_vector(grads)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / num_ranks, grads)


@dataclass
class Export:
    """Write a checkpoint as a Hugging Face folder in bf16."""

    work: Path
    out: Path


def export(options: Export) -> None:
    """Writes config, safetensors, tokenizer and generation config."""
    model = Qwen3ForCausalLM(config())
    model.load_state_dict(torch.load(options.work / "checkpoint.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(options.out)
    PreTrainedTokenizerFast.from_pretrained(options.work).save_pretrained(options.out)


@dataclass
class DrafterRecipe:
    """Warm a drafter for the target on prose alone, so that code, SQL and arithmetic are cold to it.

    Attributes:
        family: `eagle` or `small_lm`.
        num_requests: Prose prompts that the target answers, half of them greedy, half sampled.
    """

    target: Path
    out: Path
    family: str = "eagle"
    num_requests: int = 600
    epochs: int = 4
    num_threads: int = 2
    seed: int = 0


def train_drafter(recipe: DrafterRecipe) -> None:
    """Distils a fresh drafter."""
    torch.set_num_threads(recipe.num_threads)
    prose = ("builtin:prose",)
    settings = Distillation(recipe.family, prose, (recipe.num_requests,), epochs=recipe.epochs, seed=recipe.seed)
    outcome = Distilling(load_target(recipe.target), settings, recipe.out).run()
    for score in outcome.scores:
        log.info("epoch %d: acceptance length %.2f, loss %.2f", score.epoch, score.acceptance_length, score.loss)


@dataclass
class Half:
    """Write a distilled small_lm again in bf16: half the bytes in the package."""

    drafter: Path
    out: Path


def halve(options: Half) -> None:
    """Weights, config and notes; the tokenizer's files as they are."""
    config, side = read_json(options.drafter / "config.json"), read_side(options.drafter)
    tensors = read_weights(options.drafter, torch.device("cpu"), torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.drafter)
    version = side.pop("weights_version")
    config["torch_dtype"] = "bfloat16"
    write_drafter(options.out, config, tensors, version, side, also=tokenizer.save_pretrained)


def main() -> None:
    """The recipe's own command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    step = tyro.extras.subcommand_cli_from_dict(
        {"target": TargetRecipe, "export": Export, "drafter": DrafterRecipe, "half": Half}
    )
    if isinstance(step, TargetRecipe):
        train_target(step)
    elif isinstance(step, Export):
        export(step)
    elif isinstance(step, Half):
        halve(step)
    else:
        train_drafter(step)


if __name__ == "__main__":
    main()
