"""A drafter outside of onlinespec: the first head of Medusa (arXiv:2401.10774), which drafts one token a step."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import onlinespec as osp
from onlinespec.drafters.checkpoints import write_drafter
from onlinespec.drafters.contract import Loss
from onlinespec.learners.losses import TargetRows, soft_cross_entropy


class TwoAhead(osp.Drafter):
    """Guesses the token behind the anchor from the target's states of the token before the anchor."""

    is_trainable = True

    def __init__(self, target, params, version=0):
        self._decoder = target.decoder
        self.aux_layer_ids = (target.decoder.config.num_layers // 2,)  # read beside the final state
        self.weights = osp.DrafterWeights(params, version)
        self._states = {}  # by slot: the states before the anchor, [1, 2 D], or [0, 2 D] before there are any

    @classmethod
    def fresh(cls, target, seed=0):
        size = target.decoder.config.layer.hidden_size
        return cls(target, {"mix.weight": torch.zeros(size, 2 * size, device=target.decoder.device)})

    @classmethod
    def load(cls, folder, target):
        return cls(target, load_file(Path(folder) / "model.safetensors", str(target.decoder.device)))

    def save(self, folder):
        config = {"architectures": ["two_ahead:TwoAhead"]}  # so that the folder can be named wherever a drafter is
        write_drafter(folder, config, self.weights.params, self.weights.version)

    # Drafting

    def start(self, slot, info, token_ids, features):
        self._states[slot] = joined(features[-1:])

    def observe(self, slots, token_ids, features):
        for slot, rows in zip(slots, features, strict=True):
            self._states[slot] = joined(rows[-1:])

    def release(self, slot, is_finished):
        del self._states[slot]

    def swap(self, weights):
        self.weights = weights

    @torch.no_grad()
    def propose(self, slots, anchors, num_draft_tokens_B, sampling, noise):
        device = self._decoder.device
        counts = [min(1, n, len(self._states[slot])) for slot, n in zip(slots, num_draft_tokens_B, strict=True)]
        token_ids_B1 = torch.zeros(len(slots), 1, dtype=torch.int64, device=device)
        if at := [i for i, count in enumerate(counts) if count]:
            scores = self._logits(self.weights.params, torch.cat([self._states[slots[i]] for i in at]))
            added = noise.take(at).at(0)  # None where all are greedy
            if added is not None:
                temperatures = [sampling[i].temperature or 1.0 for i in at]
                scores = scores / torch.tensor(temperatures, device=device)[:, None] + added
            token_ids_B1[at, 0] = scores.argmax(-1)
        return osp.Draft.by_one(token_ids_B1, torch.tensor(counts, device=device), self.weights.version)

    # Learning

    def batch(self, feedback, replayed=(), rejected_only=False):
        """Input states and target rows of all verified rows that have a state before them; fresh ones first."""
        counted = [record for record in feedback if record.is_rejection or not rejected_only]
        places = [(record, i) for record in (*counted, *replayed) for i in range(record.num_rows) if record.start + i]
        num_fresh = sum(record.num_rows - (record.start == 0) for record in counted)
        if not num_fresh:
            return None
        states = [joined(record.trace.features[record.start + i - 1 : record.start + i]) for record, i in places]
        final = [record.trace.features.final_SD[record.start + i] for record, i in places]
        keys = [(record.seed, record.choice, record.start + i + 1) for record, i in places]
        device = self._decoder.device
        target = TargetRows(
            self._decoder.head(torch.stack(final)).softmax(-1),
            torch.tensor([record.trace.token_ids[record.start + i + 1] for record, i in places], device=device),
            torch.tensor([record.temperature for record, _ in places], device=device),
            torch.tensor(keys, device=device),
        )
        return torch.cat(states), target, num_fresh

    def losses(self, candidates, batch, row_loss=soft_cross_entropy):
        states, target, num_fresh = batch
        rows = [row_loss(self._logits(params, states), target) for params in candidates]
        return [Loss(row.mean(), float(row[:num_fresh].detach().mean()), len(row)) for row in rows]

    @torch.no_grad()
    def rows(self, candidates, batch, num_depths=1):
        """For the gate of `serve`, which compares weights by the drafts that they would have made."""
        states, target, num_fresh = batch
        fresh = torch.arange(num_fresh, device=states.device)
        return [(torch.stack([self._logits(p, states[:num_fresh]) for p in candidates]), target.take(fresh))]

    def _logits(self, params, states):
        final = states[:, : states.shape[1] // 2]
        return F.linear(final + F.silu(F.linear(states, params["mix.weight"])), self._decoder.head_VD.float())


def joined(features):
    """The final states and those of the one aux layer, side by side."""
    return torch.cat([rows.float() for rows in features.layers], dim=-1)
