"""The `ngram` drafter (prompt lookup): drafts what followed the last few tokens when they last occurred in the text.

It is the smallest example of a drafter: it has no weights and does not learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from onlinespec.config import SamplingParams
from onlinespec.core import Draft, DrafterWeights, Features, RequestInfo
from onlinespec.drafters.checkpoints import read_drafter_config, write_drafter
from onlinespec.drafters.contract import Drafter
from onlinespec.host import to_device
from onlinespec.lossless.noise import StepNoise
from onlinespec.models.loading import Target


@dataclass
class _History:
    """The tokens of a request, and for each n-gram in them the position after its last occurrence."""

    max_ngram: int
    token_ids: list[int] = field(default_factory=list)
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)

    def append(self, token_id: int) -> None:
        """Adds a token. The n-grams that end before it are now followed by something, so they can be looked up."""
        position = len(self.token_ids)
        for n in range(1, min(self.max_ngram, position) + 1):
            self.follows[tuple(self.token_ids[position - n :])] = position
        self.token_ids.append(token_id)

    def continuation(self, count: int) -> list[int]:
        """Returns up to `count` tokens that followed the longest n-gram at the end when it last occurred before."""
        for n in range(min(self.max_ngram, len(self.token_ids)), 0, -1):
            start = self.follows.get(tuple(self.token_ids[-n:]))
            if start is not None:
                return self.token_ids[start : start + count]
        return []


class Ngram(Drafter):
    """Looks for the last n tokens of the text at an earlier place, the latest one, and drafts what followed there.

    It tries n = `max_ngram` first, then shorter n-grams down to 1, and drafts nothing if none occurred before. The text
    is the request's prompt and output.

    Reference: prompt lookup decoding (Saxena, 2023); LLMA, arXiv:2304.04487.
    """

    def __init__(self, max_ngram: int = 3, device: torch.device | str = "cpu") -> None:
        self.max_ngram, self._device = max_ngram, torch.device(device)
        self.weights = DrafterWeights({}, version=0)
        self._histories: dict[int, _History] = {}

    @classmethod
    def fresh(cls, target: Target, seed: int = 0) -> Self:
        return cls(device=target.decoder.device)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        max_ngram = read_drafter_config(folder).get("max_ngram")
        if type(max_ngram) is not int or max_ngram < 1:
            raise ValueError(f"{folder / 'config.json'}: max_ngram is {max_ngram!r}; it must be a number of at least 1")
        return cls(max_ngram, target.decoder.device)

    def save(self, folder: Path) -> None:
        write_drafter(
            folder, {"architectures": ["NgramDrafter"], "max_ngram": self.max_ngram}, {}, self.weights.version
        )

    def start(self, slot: int, info: RequestInfo, token_ids: Sequence[int], features: Features) -> None:
        self._histories[slot] = _History(self.max_ngram)
        for token_id in token_ids:
            self._histories[slot].append(token_id)

    def propose(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        num_draft_tokens_B: Sequence[int],
        sampling: Sequence[SamplingParams],
        noise: StepNoise,
    ) -> Draft:
        wanted = zip(slots, num_draft_tokens_B, strict=True)
        drafted = [self._histories[slot].continuation(count) for slot, count in wanted]
        width = max(map(len, drafted), default=0)
        padded = [ids + [0] * (width - len(ids)) for ids in drafted]
        token_ids_BK = to_device(padded, self._device, torch.int64)
        counts_B = to_device([len(ids) for ids in drafted], self._device)
        return Draft.by_one(token_ids_BK.view(len(slots), width), counts_B, self.weights.version)

    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Features]) -> None:
        for slot, committed in zip(slots, token_ids, strict=True):
            for token_id in committed:
                self._histories[slot].append(token_id)

    def release(self, slot: int, is_finished: bool) -> None:
        del self._histories[slot]
