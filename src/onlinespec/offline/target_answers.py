"""A target's own answers on disk, with the hidden states of the pass that made them: what distilling learns from.

Answers are made several at a time and written shard by shard, each aside and then renamed: whoever is killed loses at
most the shard under way, and goes on behind the last one that is there. A prompt's answer depends on the prompt, its
place in the stream and the seed, not on what ran beside it.

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

_AT_ONCE = 8  # answers of a shard: they run as one batch
_DELETE = "delete it and those behind it, and their prompts are asked again"


@dataclass(frozen=True)
class _Place:
    """Where an answer lies, and what is known of it without reading its states."""

    shard: Path
    index: int
    id: str
    domain: str
    num_prompt_tokens: int
    num_tokens: int
    max_tokens: int
    temperature: float
    seed: int  # its tokens were chosen with
    aux_layer_ids: tuple[int, ...]  # whose states lie beside the final ones
    checksum: int | None = None  # of its tokens and states; files of older versions have none


class Answers:
    """The answers in a folder. Nothing but their lengths is held in memory; states are read when asked for.

    Args:
        target: Whose answers they are; those of another are refused.
        aux_layer_ids: Layers whose states lie beside the final ones; answers without them are refused.
    """

    def __init__(self, folder: Path, target: Target, aux_layer_ids: Sequence[int] = ()) -> None:
        self.folder, self._target, self._aux_layer_ids = folder, target, tuple(aux_layer_ids)
        folder.mkdir(parents=True, exist_ok=True)
        self._places: list[_Place] = []
        self.num_prompts = 0  # asked so far, those that were too long included
        self.num_skipped = 0
        self.seconds = 0.0  # that the answers took, whichever process made them
        for shard in sorted(folder.glob("*.safetensors")):
            self._take(shard)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        """Of all answers, prompts left out."""
        return sum(place.num_tokens - place.num_prompt_tokens for place in self._places)

    def ask(
        self,
        prompts: Sequence[Prompt],
        params_of: Callable[[int], GenerationParams],
        on_progress: Callable[[int], None] = lambda num_tokens: None,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        """Has the target answer the prompts that it has not answered yet, in their order.

        Args:
            params_of: How to answer the prompt at a place of the stream.
            on_progress: Told after every step how many tokens this call has had answered, those under way included.
            has_time: Asked before every shard.
        """
        num_tokens = 0
        on_progress(num_tokens)
        while self.num_prompts < len(prompts) and has_time():
            first, began, before = self.num_prompts, time.monotonic(), num_tokens
            chosen = prompts[first : first + _AT_ONCE]
            loop = DecodeLoop(
                self._target, aux_layer_ids=self._aux_layer_ids
            )  # of its own: a shard depends on nothing that ran before
            requests = self._started(loop, chosen, [params_of(first + i) for i in range(len(chosen))])
            while running := [request for request in requests if not request.finish_reason]:
                loop.step(running)
                num_tokens = before + sum(len(request.output_ids) for request in requests)
                on_progress(num_tokens)
            self._write(first, len(chosen), requests, time.monotonic() - began)
            on_progress(num_tokens)

    def recorded(self, index: int) -> Recorded:
        """An answer, with its states."""
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
        """An answer as one run of verified rows."""
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
        """Requests of a shard; prompts that don't fit the target are left out."""
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
    """Gives a place beside a file, which takes the file's place when all is written: it is there whole or not at all.

    Raises:
        OSError: saying what to do, if it can't be written.
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
    """Turns what the writers of tensors raise where a disk is full into an OSError with the way out."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} can't be written ({reason}); make room, then the same command goes on with what was written before"
        ) from error
