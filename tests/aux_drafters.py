"""Drafters that read two aux layers of the target: one that keeps what it is told, one that learns in other places."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rigs import Script

from onlinespec.core import Features
from onlinespec.drafters.eagle import Eagle

LAYERS = (0, 2)  # the embedding, and the last layer's output before the final norm
NOTES = "ONLINESPEC_TEST_NOTES"  # a folder, in the environment, which processes inherit


class Keeping(Script):
    """A scripted drafter that keeps all features it is told of, by slot."""

    aux_layer_ids = LAYERS

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.told: dict[int, Features] = {}
        self.released: list[tuple[Features, bool]] = []

    def start(self, slot, info, token_ids, features):
        super().start(slot, info, token_ids, features)
        self.told[slot] = features.map(torch.clone)

    def observe(self, slots, token_ids, features):
        super().observe(slots, token_ids, features)
        for slot, rows in zip(slots, features, strict=True):
            self.told[slot] = Features.cat([self.told[slot], rows])

    def release(self, slot, is_finished):
        super().release(slot, is_finished)
        self.released.append((self.told.pop(slot), is_finished))


class Noting(Eagle):
    """An eagle that writes down the features of what it learns from, wherever that is."""

    aux_layer_ids = LAYERS

    def batch(self, feedback, replayed=(), rejected_only=False):
        for record in (*feedback, *replayed):
            rows = record.trace.features[: record.start + record.num_rows]
            kind = "fresh" if any(record is one for one in feedback) else "replayed"
            path = Path(os.environ[NOTES]) / f"{record.request_id}-{len(rows)}-{kind}.pt"
            torch.save((record.trace.token_ids[: len(rows)], rows.final_SD, rows.aux), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        return super().batch(feedback, replayed, rejected_only)
