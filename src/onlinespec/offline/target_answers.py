"""The target's own answers on disk, with the hidden states of the pass that generated them: the data of distillation.

Answers are generated in batches of 8, and each batch is written to one shard, atomically. A process that is killed
loses at most the current shard, and the next run continues after the last one on disk. An answer depends on its prompt,
the prompt's index in the stream and the seed, but not on the rest of the batch.

Axis letters: S positions, D hidden size.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import Features, Feedback, Trace
from onlinespec.engine.request import Request, UnfitPrompt
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.loading import Target
from onlinespec.offline.replay_stream import Recorded
from onlinespec.workloads import Prompt

_AT_ONCE = 8  # prompts per shard, decoded as one batch
_DELETE = "delete it and those behind it, and their prompts are asked again"


@dataclass(frozen=True)
class _Place:
    """The location of an answer, and its metadata."""

    shard: Path
    index: int  # in the shard
    id: str
    domain: str
    num_prompt_tokens: int
    num_tokens: int
    max_tokens: int
    temperature: float
    seed: int  # of the sampling noise
    aux_layer_ids: tuple[int, ...]  # layers whose states are stored besides the final ones
    checksum: int | None = None  # CRC-32 of its tokens and states; None in files of older releases


class Answers:
    """The answers in a folder. Only their metadata is held in memory; tokens and states are read on request.

    Args:
        folder: Where the shards are; created if missing.
        target: The target that gives the answers.
        aux_layer_ids: Layers whose hidden states are stored besides the final ones.

    Raises:
        ValueError: if a shard is damaged or missing, was written with another target or by an older release, or lacks
            the states of these layers.
    """

    def __init__(self, folder: Path, target: Target, aux_layer_ids: Sequence[int] = ()) -> None:
        self.folder, self._target, self._aux_layer_ids = folder, target, tuple(aux_layer_ids)
        folder.mkdir(parents=True, exist_ok=True)
        self._places: list[_Place] = []
        self.num_prompts = 0  # processed so far, including those skipped
        self.num_skipped = 0  # prompts that don't fit the target
        self.seconds = 0.0  # spent generating, in all processes
        for shard in sorted(folder.glob("*.safetensors")):
            self._take(shard)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        """Tokens in all answers, without the prompts."""
        return sum(place.num_tokens - place.num_prompt_tokens for place in self._places)

    def ask(
        self,
        prompts: Sequence[Prompt],
        params_of: Callable[[int], GenerationParams],
        on_progress: Callable[[int], None] = lambda num_tokens: None,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        """Generates the answers that are still missing, in the order of the prompts.

        Args:
            prompts: The whole stream; those processed already are skipped.
            params_of: Returns the generation settings for the prompt at an index of the stream.
            on_progress: Called after every step with the number of tokens that this call has generated so far.
            has_time: Called before every shard; generation ends when it returns False.

        Raises:
            OSError: if a shard can't be written.
        """
        num_tokens = 0
        on_progress(num_tokens)
        while self.num_prompts < len(prompts) and has_time():
            first, began, before = self.num_prompts, time.monotonic(), num_tokens
            chosen = prompts[first : first + _AT_ONCE]
            # a new loop per shard, so that a shard does not depend on earlier ones
            loop = DecodeLoop(self._target, aux_layer_ids=self._aux_layer_ids)
            requests = self._started(loop, chosen, [params_of(first + i) for i in range(len(chosen))])
            while running := [request for request in requests if not request.finish_reason]:
                loop.step(running)
                num_tokens = before + sum(len(request.output_ids) for request in requests)
                on_progress(num_tokens)
            self._write(first, len(chosen), requests, time.monotonic() - began)
            on_progress(num_tokens)

    def recorded(self, index: int) -> Recorded:
        """Reads an answer with its states. Raises ValueError if its shard is damaged."""
        place = self._places[index]
        try:
            with safe_open(place.shard, framework="pt", device=str(self._target.decoder.device)) as shard:
                ids, final_SD = shard.get_tensor(f"ids.{place.index}"), shard.get_tensor(f"states.{place.index}")
                aux = {layer: shard.get_tensor(f"aux.{layer}.{place.index}") for layer in place.aux_layer_ids}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{place.shard} can't be read ({error}); {_DELETE}") from error
        features = Features(final_SD, aux)
        if place.checksum not in (None, _checksum(ids, *features.layers)):
            raise ValueError(f"{place.shard} can't be read (damaged); {_DELETE}")
        return Recorded(
            id=place.id,
            domain=place.domain,
            token_ids=tuple(ids.tolist()),
            num_prompt_tokens=place.num_prompt_tokens,
            features=features,
            max_tokens=place.max_tokens,
            sampling=SamplingParams(place.temperature),
            target_fingerprint=self._target.fingerprint,
            seed=place.seed,
        )

    def feedback(self, index: int) -> Feedback:
        """Reads an answer as one Feedback record of verified rows, without drafts. Raises as `recorded`."""
        recorded = self.recorded(index)
        features = recorded.features
        trace = Trace(list(recorded.token_ids), features, len(features), recorded.max_tokens)
        start = recorded.num_prompt_tokens - 1
        return Feedback(
            trace=trace,
            start=start,
            num_rows=len(recorded.token_ids) - recorded.num_prompt_tokens,
            num_draft_tokens=0,
            num_accepted=0,
            weights_version=0,
            request_id=recorded.id,
            domain=recorded.domain,
            target_fingerprint=recorded.target_fingerprint,
            temperature=recorded.sampling.temperature,
            seed=recorded.seed,
            is_last=True,
        )

    def _started(
        self, loop: DecodeLoop, prompts: Sequence[Prompt], params: Sequence[GenerationParams]
    ) -> list[Request]:
        """Starts the requests of a shard. Prompts that don't fit the target are skipped."""
        requests = []
        for prompt, its_params in zip(prompts, params, strict=True):
            try:
                ids = self._target.encode(prompt.text)
                requests.append(loop.start(ids, its_params, request_id=prompt.id, domain=prompt.domain))
            except UnfitPrompt:
                continue
        return requests

    def _write(self, first: int, num_prompts: int, requests: Sequence[Request], seconds: float) -> None:
        tensors: dict[str, Tensor] = {}
        known = []
        for i, request in enumerate(requests):
            trace = request.trace
            features = trace.features[: trace.num_features].map(Tensor.contiguous)
            ids = features.final_SD.new_tensor(trace.token_ids, dtype=torch.int64)
            tensors |= {f"ids.{i}": ids, f"states.{i}": features.final_SD}
            tensors |= {f"aux.{layer}.{i}": rows_SD for layer, rows_SD in features.aux.items()}
            known.append(
                {
                    "id": request.info.request_id,
                    "domain": request.info.domain,
                    "num_prompt_tokens": request.num_prompt_tokens,
                    "num_tokens": len(trace.token_ids),
                    "max_tokens": request.max_tokens,
                    "temperature": request.params.sampling.temperature,
                    "seed": request.params.seed,
                    "checksum": _checksum(ids, *features.layers),
                }
            )
        facts = {
            "target": self._target.fingerprint,
            "aux_layer_ids": list(self._aux_layer_ids),
            "num_prompts": num_prompts,
            "seconds": seconds,
            "answers": known,
        }
        shard = self.folder / f"{first:08d}.safetensors"
        with written(shard) as partial:
            save_file(tensors, partial, metadata={"onlinespec": json.dumps(facts)})
        self._take(shard)

    def _take(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                facts = json.loads(file.metadata()["onlinespec"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{shard} can't be read ({error}); {_DELETE}") from error
        if facts["target"] != self._target.fingerprint:
            raise ValueError(
                f"{shard} holds answers of target {facts['target']}, this target is {self._target.fingerprint}; "
                "choose another --out"
            )
        if missing := sorted({*self._aux_layer_ids} - {*facts.get("aux_layer_ids", ())}):
            raise ValueError(f"{shard} lacks the states of layers {missing}, which the drafter reads; {_DELETE}")
        if int(shard.stem) != self.num_prompts:
            raise ValueError(f"{self.folder} lacks the shard before {shard.name}; of {shard.name}: {_DELETE}")
        if any("seed" not in known for known in facts["answers"]):
            raise ValueError(
                f"{shard} can't be used: an older version wrote it, by another rule of sampling; {_DELETE}"
            )
        layers = tuple(facts.get("aux_layer_ids", ()))
        self._places += [_Place(shard, i, aux_layer_ids=layers, **known) for i, known in enumerate(facts["answers"])]
        self.num_prompts += facts["num_prompts"]
        self.seconds += facts.get("seconds", 0.0)
        self.num_skipped += facts["num_prompts"] - len(facts["answers"])


def _checksum(*tensors: Tensor) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.contiguous().cpu().view(torch.uint8).numpy().data, checksum)
    return checksum


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Writes a file atomically: yields a temporary path, which is renamed to the file when the block succeeds.

    Raises:
        OSError: if it can't be written; the message says how to continue.
    """
    partial = path.with_suffix(".partial")
    with told_if_full(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def told_if_full(path: Path) -> Iterator[None]:
    """Turns the errors that tensor writers raise on a full disk into an OSError whose message says how to continue."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} can't be written ({reason}); make room, then the same command goes on with what was written before"
        ) from error
