"""EAGLE-1: a one-layer head that continues the target's own hidden states.

Row t pairs the target's final hidden state after token t with the embedding of token t + 1, and estimates the hidden
state after token t + 1; the target's own head turns that into a draft of token t + 2. Drafting feeds the estimate
back in place of the state that is not there yet. Embedding and head are the target's, by reference, and never learn.

Axis letters: B requests, K drafted tokens, N rows of a call, S positions, D hidden size, V vocabulary.
Reference: EAGLE, arXiv:2401.15077; file layout as other engines read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, SamplingParams
from onlinespec.core import Draft, DrafterWeights, Feedback, Params, Verdict
from onlinespec.drafters.base import Drafter, Loss
from onlinespec.drafters.formats import read_drafter_config, read_side, write_drafter
from onlinespec.drafters.shortlist import Listed, Shortlist
from onlinespec.losses import RowLoss, TargetRows, soft_cross_entropy
from onlinespec.models.checkpoint import check_tensors, read_weights
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import (
    FastLayer,
    LayerConfig,
    Plan,
    RotaryTable,
    Rows,
    Seen,
    make_plan,
    plain_keys_values,
    plain_layer,
    project,
    rotary_angles,
)
from onlinespec.models.linear import (
    FrozenProduct,
    MakeLinear,
    Product,
    draft_linear_for,
    learn_product_for,
    plain_product,
)
from onlinespec.models.loading import Target
from onlinespec.sampling import process_logits, sample_rows

_LAYER = "layers.0."
_MANY_ROWS = 16  # from which the layer's work for rows that no one reads costs more than a second call


@dataclass
class _Slot:
    """What is known of a request but not yet in the drafter's cache: features, each with the token behind it."""

    features: list[Tensor] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)
    state_1D: Tensor | None = None  # the layer's output for the last row that is in the cache; drafting starts there


class Span(NamedTuple):
    """Consecutive verified rows of one request, as the drafter sees them."""

    features_SD: Tensor  # target states after tokens 0..S-1; the last rows are what the loss is on
    next_ids_S: Tensor  # tokens 1..S
    target_states_ND: Tensor  # target states after tokens S-N+1..S: their head rows are the labels
    token_ids_N: Tensor  # tokens S-N+2..S+1: what was committed there
    counts_N: Tensor  # bool: which of the rows the loss counts
    temperature: float  # at which the request decodes
    is_fresh: bool  # of this round, not replayed

    @property
    def num_context(self) -> int:
        """Rows that the loss is not on; they come first."""
        return len(self.next_ids_S) - len(self.target_states_ND)


class Batch(list[Span]):
    """The spans of a round, and the tokens they are learned over if all are greedy; None for the vocabulary."""

    def __init__(self, spans: Sequence[Span], listed: Listed | None) -> None:
        super().__init__(spans)
        self.listed = listed


class Eagle(Drafter):
    """The EAGLE-1 head.

    Drafting runs on the cheapest products the machine has (bfloat16, say), learning on the float32 masters.

    Args:
        config: As published beside the weights; unknown fields are kept and saved again.
        params: Float32 masters under their published names.
        unroll: How many drafting depths a training row goes through; deeper rows read the drafter's own output, as
            they do when drafting.
        shortlist: How many tokens drafts choose from where all requests of a step are greedy, those seen lately; None
            for `Shortlist`'s own choice.
    """

    is_trainable = True

    def __init__(
        self,
        target: Target,
        config: Mapping[str, Any],
        params: Params,
        version: int = 0,
        unroll: int = 2,
        extra: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        make_linear: MakeLinear | None = None,
        shortlist: int | None = None,
    ) -> None:
        self.config = dict(config)
        self.unroll = unroll
        self._layer_config = _layer_config(config)
        self._decoder = target.decoder
        self._fingerprint = target.fingerprint
        device, target_dtype = target.decoder.device, target.decoder.dtype
        self._make_linear = make_linear or draft_linear_for(device, torch.float32)
        make_head = make_linear or draft_linear_for(device, target_dtype)
        self._product = plain_product if make_linear else learn_product_for(device)
        self._head = FrozenProduct(target.decoder.head_VD, make_head)
        self._shortlist = Shortlist(target.decoder.head_VD, make_head, shortlist)
        self._embedding_VD = target.decoder.embedding_VD
        self._cache = KVCache(
            1, self._layer_config.num_kv_heads, self._layer_config.head_dim, self._decoder.device, torch.float32
        )
        self._rotary = RotaryTable(self._layer_config, self._decoder.device)
        self._slots: dict[int, _Slot] = {}
        self._extra = dict(extra or {})
        self._dtype = dtype
        self.swap(DrafterWeights({name: p.float() for name, p in params.items()}, version))

    # --- where it comes from and goes to ------------------------------------------------------------------------

    @classmethod
    def fresh(cls, target: Target, seed: int = 0) -> Self:
        shape = target.decoder.config
        layer = shape.layer
        config = {
            "architectures": ["EagleLlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": layer.rms_norm_eps,
            "rope_theta": layer.rope_theta,
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": shape.max_positions,
            "bias": False,
            "torch_dtype": "float32",
        }
        generator = torch.Generator().manual_seed(seed)
        params = {
            name: torch.ones(dims) if len(dims) == 1 else torch.randn(dims, generator=generator) * 0.02
            for name, dims in _param_shapes(config).items()
        }
        params["fc.weight"][:, layer.hidden_size :] += torch.eye(layer.hidden_size)  # start from the state itself
        return cls(target, config, {name: p.to(target.decoder.device) for name, p in params.items()})

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        config, side = read_drafter_config(folder), read_side(folder)
        _check_fits(config, target, folder)
        tensors = read_weights(folder, target.decoder.device, dtype=None)
        shapes = _param_shapes(config, has_bias="fc.bias" in tensors)
        check_tensors(tensors, shapes, folder, may_have=("embed_tokens.weight",))
        made_for = side.get("target_fingerprint")
        if made_for and made_for != target.fingerprint:
            raise ValueError(
                f"{folder} was trained for target {made_for}, this target is {target.fingerprint}; "
                f"delete {folder / 'onlinespec.json'} to use it all the same"
            )
        params = {name: tensors[name] for name in shapes}
        extra = {name: t for name, t in tensors.items() if name not in shapes}
        version = int(side.get("weights_version", 0))
        return cls(target, config, params, version, extra=extra, dtype=params["fc.weight"].dtype)

    def save(self, folder: Path) -> None:
        tensors = {name: p.to(self._dtype) for name, p in self.weights.params.items()} | self._extra
        write_drafter(folder, self.config, tensors, self.weights.version, target_fingerprint=self._fingerprint)

    # --- drafting -----------------------------------------------------------------------------------------------

    def start(self, slot: int, token_ids: Sequence[int], features_SD: Tensor, capacity: int) -> None:
        self._cache.take(slot, capacity + MAX_DRAFT_TOKENS)  # a batch drafts as deep as its longest draft
        self._slots[slot] = _Slot([features_SD] if len(features_SD) else [], list(token_ids[1:]))
        self._shortlist.begin(token_ids)

    def observe(self, slots: Sequence[int], verdict: Verdict, features: Sequence[Tensor]) -> None:
        for slot, token_ids, rows_ND in zip(slots, verdict.token_ids_BL.tolist(), features, strict=True):
            committed = token_ids[: len(rows_ND)]
            self._slots[slot].features.append(rows_ND)
            self._slots[slot].next_ids.extend(committed)
            self._shortlist.note(committed)

    def release(self, slot: int) -> None:
        self._cache.release(slot)
        del self._slots[slot]

    def swap(self, weights: DrafterWeights) -> None:
        """Rows that older weights wrote into the cache stay: they cost no exactness, and no acceptance that shows."""
        self.weights = weights
        params = weights.params
        self._fc = self._make_linear(params["fc.weight"], params.get("fc.bias"))
        self._layer = FastLayer(self._layer_config, _layer_weights(params), self._make_linear)

    @torch.inference_mode()
    def propose(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        num_draft_tokens_B: Sequence[int],
        sampling: Sequence[SamplingParams],
        uniforms_BK: Tensor,
    ) -> Draft:
        B, device = len(slots), self._decoder.device
        wanted = zip(slots, num_draft_tokens_B, strict=True)
        ready = [i for i, (slot, count) in enumerate(wanted) if count and self._has_rows(slot)]
        counts_B = torch.zeros(B, dtype=torch.int64)
        counts_B[ready] = torch.tensor([num_draft_tokens_B[i] for i in ready], dtype=torch.int64)
        K = int(counts_B.max()) if ready else 0
        token_ids_BK, probs_BKV = torch.zeros(B, K, dtype=torch.int64, device=device), None
        if ready:
            chosen = [slots[i] for i in ready]
            ids_RK, probs_RKV = self._chain(chosen, K, [sampling[i] for i in ready], uniforms_BK[ready])
            token_ids_BK[ready] = ids_RK
            if probs_RKV is not None:
                probs_BKV = torch.zeros(B, K, probs_RKV.shape[-1], device=device)
                probs_BKV[ready] = probs_RKV
        return Draft(token_ids_BK, counts_B, probs_BKV, self.weights.version)

    def _chain(
        self, slots: Sequence[int], num_draft_tokens: int, sampling: Sequence[SamplingParams], uniforms_RK: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids [R, K] for R requests and the rows they were drawn from; the cache ends with the real rows."""
        state_RD, drafted, rows = self._absorb(slots), [], []
        lengths = [self._cache.lengths[slot] for slot in slots]
        for k in range(num_draft_tokens):
            ids_R, probs_RV = self._draw(state_RD, sampling, uniforms_RK[:, k])
            drafted.append(ids_R)
            if probs_RV is not None:
                rows.append(probs_RV)
            if k + 1 < num_draft_tokens:
                state_RD = self._forward(ids_R, state_RD, slots, [1] * len(slots))
        for slot, length in zip(slots, lengths, strict=True):
            self._cache.crop(slot, length)
        return torch.stack(drafted, 1), torch.stack(rows, 1) if rows else None

    def _draw(
        self, states_RD: Tensor, sampling: Sequence[SamplingParams], uniforms_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A token per state, and the row it was drawn from; where all are greedy, a point mass of a listed token.

        Penalties are the target's.
        """
        if all(params.is_greedy for params in sampling):
            listed = self._shortlist.now
            return listed.token_ids_S[self._logits(states_RD, listed.head).argmax(-1)], None
        plain = [SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p) for s in sampling]
        logits_RV = self._logits(states_RD, self._head)
        logits_RV = logits_RV.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4)  # weights that blew up may still draft
        probs_RV = process_logits(logits_RV, plain[0] if len(plain) == 1 else plain)
        return sample_rows(probs_RV, uniforms_R.to(probs_RV.device)), probs_RV

    def _has_rows(self, slot: int) -> bool:
        """Whether there is a feature to start from; a request whose prompt is one token has none in its first step."""
        return bool(self._slots[slot].next_ids) or self._slots[slot].state_1D is not None

    def _absorb(self, slots: Sequence[int]) -> Tensor:
        """Runs the rows that became real since the last draft; the last of each request is where drafting starts."""
        if pending := [slot for slot in slots if self._slots[slot].next_ids]:
            for slot in pending:
                self._remember(slot)
            waiting = [self._slots[slot] for slot in pending]
            counts = [len(state.next_ids) for state in waiting]
            next_ids = torch.tensor([i for state in waiting for i in state.next_ids], device=self._decoder.device)
            features_ND = torch.cat([rows for state in waiting for rows in state.features])
            out_ND = self._forward(next_ids, features_ND, pending, counts)
            for slot, rows_ND in zip(pending, out_ND.split(counts), strict=True):
                self._slots[slot] = _Slot(state_1D=rows_ND[-1:])
        states = [state for slot in slots if (state := self._slots[slot].state_1D) is not None]
        return states[0] if len(states) == 1 else torch.cat(states)

    def _remember(self, slot: int) -> None:
        """Of many rows at once, a prompt's, only the last is drafted from: the others leave their keys and values."""
        state = self._slots[slot]
        count = len(state.next_ids) - 1
        if count < _MANY_ROWS:
            return
        features_ND, next_ids = torch.cat(state.features), torch.tensor(state.next_ids, device=self._decoder.device)
        x_ND, plan = self._enter(next_ids[:-1], features_ND[:-1], [slot], [count], attends=False)
        self._layer.write(x_ND, plan, 0)
        self._cache.extend(slot, count)
        state.features, state.next_ids = [features_ND[-1:]], state.next_ids[-1:]

    def _logits(self, states_ND: Tensor, head: FrozenProduct) -> Tensor:
        return head(states_ND.to(self._decoder.dtype)).float()

    def _forward(self, next_ids_N: Tensor, states_ND: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        x_ND = self._layer(*self._enter(next_ids_N, states_ND, slots, counts), 0)
        for slot, count in zip(slots, counts, strict=True):
            self._cache.extend(slot, count)
        return x_ND

    def _enter(
        self, next_ids_N: Tensor, states_ND: Tensor, slots: Sequence[int], counts: Sequence[int], attends: bool = True
    ) -> tuple[Tensor, Plan]:
        """What goes into the layer, and where its rows lie."""
        rows = Rows(slots, [self._cache.lengths[slot] for slot in slots], counts)
        x_ND = self._fc(torch.cat([F.embedding(next_ids_N, self._embedding_VD), states_ND], dim=-1).float())
        return x_ND, make_plan(rows, self._rotary, self._cache, attends)

    # --- learning -----------------------------------------------------------------------------------------------

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> list[Span]:
        fresh = [self._span(run, rejected_only, is_fresh=True) for run in _runs(feedback)]
        if not any(span.counts_N.any() for span in fresh):
            return []
        spans = fresh + [self._span(run, rejected_only, is_fresh=False) for run in _runs(replayed)]
        is_greedy = not any(span.temperature for span in spans)
        listed = self._shortlist.holding(torch.cat([span.token_ids_N for span in spans])) if is_greedy else None
        return Batch(spans, listed)

    def _span(self, records: Sequence[Feedback], rejected_only: bool, is_fresh: bool) -> Span:
        trace, first = records[0].trace, max(1, records[0].start)  # row 0 has no state before it
        last = records[-1].start + records[-1].num_rows
        states = trace.hidden_states_SD
        ids = torch.tensor(trace.token_ids[1 : last + 1], device=states.device)
        counts = [
            not rejected_only or (record.is_rejection and i == record.num_rows - 1)
            for record in records
            for i in range(record.num_rows)
        ]
        return Span(
            features_SD=states[: last - 1].float(),
            next_ids_S=ids[: last - 1],
            target_states_ND=states[first:last].clone(),
            token_ids_N=ids[first:last],
            counts_N=torch.tensor(counts[first - records[0].start :], device=states.device),
            temperature=records[0].temperature,
            is_fresh=is_fresh,
        )

    def losses(
        self, candidates: Sequence[Params], batch: Sequence[Span], row_loss: RowLoss = soft_cross_entropy
    ) -> list[Loss]:
        if not any(span.counts_N.any() for span in batch):
            raise ValueError("a batch without verified rows has no loss")
        layout = _lay_out(batch)
        (head, target), counts_N = self._scope(batch, layout), layout.counts_N.float()
        num_rows, weights_EN = counts_N.sum(), []
        for at_M, states_EMD in self._depths(_stacked(candidates), layout, self.unroll):
            rows = TargetRows(*(part[at_M] for part in target))
            logits = self._logits(states_EMD.flatten(0, -2), head).view(*states_EMD.shape[:-1], -1)
            weights_EN.append(row_loss(logits, rows).view(len(candidates), -1) * counts_N[at_M])
        totals_E = torch.stack([weighted.sum(-1) for weighted in weights_EN]).sum(0) / num_rows
        fresh_N = layout.is_fresh_N & layout.counts_N
        fresh_E = weights_EN[0].detach()[:, fresh_N].sum(-1) / fresh_N.sum()
        return [Loss(total, fresh, int(num_rows)) for total, fresh in zip(totals_E, fresh_E.tolist(), strict=True)]

    @torch.no_grad()
    def rows(
        self, candidates: Sequence[Params], batch: Sequence[Span], num_depths: int = 1
    ) -> list[tuple[Tensor, TargetRows]]:
        layout = _lay_out([span for span in batch if span.is_fresh])
        target, depths = self._target_rows(layout), []
        for at_M, states_MD in self._depths(_stacked(candidates), layout, num_depths):
            logits = self._logits(states_MD.flatten(0, -2), self._head).view(len(candidates), len(at_M), -1)
            depths.append((logits, TargetRows(*(part[at_M] for part in target))))
        return depths

    def _scope(self, batch: Sequence[Span], layout: _Layout) -> tuple[FrozenProduct, TargetRows]:
        """The head to learn through, and the target's rows over its tokens: greedy rows learn what greedy drafts choose
        from, if their own tokens are all there."""
        listed = batch.listed if isinstance(batch, Batch) else None
        columns_N = listed.columns(layout.token_ids_N) if listed else None
        if listed is None or columns_N is None:
            return self._head, self._target_rows(layout)
        logits_NS = self._target_logits(listed, layout.target_states_ND)
        return listed.head, TargetRows(logits_NS.softmax(-1), columns_N, layout.temperatures_N)

    def _target_logits(self, listed: Listed, states_ND: Tensor) -> Tensor:
        """The target's own, of the listed tokens: the short product will do where its head is nothing else."""
        if self._decoder.has_plain_head:
            return listed.target_logits(states_ND)
        return self._decoder.head(states_ND)[:, listed.token_ids_S]

    def _target_rows(self, layout: _Layout) -> TargetRows:
        probs_NV = self._decoder.head(layout.target_states_ND).softmax(-1)
        return TargetRows(probs_NV, layout.token_ids_N, layout.temperatures_N)

    def _depths(self, params: Params, rows: _Layout, num_depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each drafting depth, which trained rows it reaches, and the states drafted there.

        Stacked params give states with an axis of sets in front.
        """
        config, weights = self._layer_config, _layer_weights(params)
        embedded_ND = F.embedding(rows.next_ids_N, self._embedding_VD).float()
        angles_NR = rotary_angles(rows.positions_N, config)
        sets = params["fc.weight"].shape[:-2]  # (), or how many
        states_MD, left_M = rows.states_ND.expand(*sets, *rows.states_ND.shape), rows.left_N
        is_kept_M = at_M = torch.arange(len(left_M), device=left_M.device)
        seen = [self._context(params, weights, rows, sets)]
        for depth in range(num_depths):
            if depth:  # each row that its span goes on behind reads the next token, and its own earlier depths
                is_kept_M = left_M > depth
                states_MD, left_M, at_M = states_MD[..., is_kept_M, :], left_M[is_kept_M], at_M[is_kept_M] + 1
                seen = [part._replace(is_visible_NS=part.is_visible_NS[is_kept_M]) for part in seen]
            if not len(at_M):
                return
            inputs_MD = _fuse(params, embedded_ND[at_M], states_MD, self._product)
            k, v = plain_keys_values(config, weights, inputs_MD, angles_NR[at_M], self._product)
            own = torch.eye(len(at_M), dtype=torch.bool, device=at_M.device) if depth else rows.is_visible_NN
            seen.append(Seen(k, v, own))
            states_MD = plain_layer(config, weights, inputs_MD, angles_NR[at_M], seen, self._product)
            yield at_M, states_MD

    @torch.no_grad()
    def _context(self, params: Params, weights: Params, rows: _Layout, sets: Sequence[int]) -> Seen:
        """Keys and values of the context rows; their own gradient is left out."""
        embedded_CD = F.embedding(rows.context_next_ids_C, self._embedding_VD).float()
        features_CD = rows.features_CD.expand(*sets, *rows.features_CD.shape)
        inputs_CD = _fuse(params, embedded_CD, features_CD, self._product)
        angles_CR = rotary_angles(rows.context_positions_C, self._layer_config)
        keys_values = plain_keys_values(self._layer_config, weights, inputs_CD, angles_CR, self._product)
        return Seen(*keys_values, rows.is_visible_NC)


class _Layout(NamedTuple):
    """The spans of a batch side by side: the loss is on N rows, the other C are context."""

    context_next_ids_C: Tensor
    context_positions_C: Tensor  # inside the request
    features_CD: Tensor
    next_ids_N: Tensor  # a span's rows follow each other
    positions_N: Tensor
    left_N: Tensor  # rows of the span from this one on, itself included
    states_ND: Tensor  # features of the trained rows
    target_states_ND: Tensor
    token_ids_N: Tensor
    counts_N: Tensor
    temperatures_N: Tensor
    is_fresh_N: Tensor
    is_visible_NC: Tensor  # of the same span
    is_visible_NN: Tensor  # of the same span and no later


def _runs(feedback: Sequence[Feedback]) -> list[list[Feedback]]:
    """Records that continue each other side by side, each run with at least one row to learn from."""
    runs: list[list[Feedback]] = []
    for record in feedback:
        newest = runs[-1][-1] if runs else None
        if newest and newest.trace is record.trace and newest.start + newest.num_rows == record.start:
            runs[-1].append(record)
        else:
            runs.append([record])
    return [run for run in runs if run[-1].start + run[-1].num_rows > max(1, run[0].start)]


def _stacked(candidates: Sequence[Params]) -> Params:
    """One set of weights as it is; several with an axis in front, for one product instead of several."""
    if len(candidates) == 1:
        return candidates[0]
    return {name: torch.stack([params[name] for params in candidates]) for name in candidates[0]}


def _lay_out(batch: Sequence[Span]) -> _Layout:
    device = batch[0].features_SD.device
    contexts = [span.num_context for span in batch]
    sizes = [len(span.target_states_ND) for span in batch]
    positions_N = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, sizes, strict=True)])
    span_C = torch.arange(len(batch)).repeat_interleave(torch.tensor(contexts))
    span_N = _per_row(range(len(batch)), batch)
    ends_N = _per_row([c + n for c, n in zip(contexts, sizes, strict=True)], batch)
    is_same_NN = span_N[:, None] == span_N
    return _Layout(
        context_next_ids_C=torch.cat([span.next_ids_S[: span.num_context] for span in batch]),
        context_positions_C=torch.cat([torch.arange(c) for c in contexts]).to(device),
        features_CD=torch.cat([span.features_SD[: span.num_context] for span in batch]),
        next_ids_N=torch.cat([span.next_ids_S[span.num_context :] for span in batch]),
        positions_N=positions_N.to(device),
        left_N=(ends_N - positions_N).to(device),
        states_ND=torch.cat([span.features_SD[span.num_context :] for span in batch]),
        target_states_ND=torch.cat([span.target_states_ND for span in batch]),
        token_ids_N=torch.cat([span.token_ids_N for span in batch]),
        counts_N=torch.cat([span.counts_N for span in batch]),
        temperatures_N=_per_row([span.temperature for span in batch], batch).to(device),
        is_fresh_N=_per_row([span.is_fresh for span in batch], batch).to(device),
        is_visible_NC=(span_N[:, None] == span_C).to(device),
        is_visible_NN=(is_same_NN & (positions_N[:, None] >= positions_N)).to(device),
    )


def _per_row(values: Sequence[float], batch: Sequence[Span]) -> Tensor:
    """Each span's value for each of its trained rows."""
    return torch.tensor(values).repeat_interleave(torch.tensor([len(span.target_states_ND) for span in batch]))


def _fuse(params: Params, embedded_ND: Tensor, states_ND: Tensor, product: Product) -> Tensor:
    return project(params, "fc", torch.cat([embedded_ND.expand_as(states_ND), states_ND], dim=-1), product)


def _layer_weights(params: Params) -> Params:
    return {name.removeprefix(_LAYER): p for name, p in params.items() if name.startswith(_LAYER)}


def _layer_config(config: Mapping[str, Any]) -> LayerConfig:
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or config
    return LayerConfig(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def _param_shapes(config: Mapping[str, Any], has_bias: bool = False) -> dict[str, tuple[int, ...]]:
    layer = _layer_config(config)
    d, f = layer.hidden_size, layer.intermediate_size
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, 2 * d),
        f"{_LAYER}self_attn.q_proj.weight": (q, d),
        f"{_LAYER}self_attn.k_proj.weight": (kv, d),
        f"{_LAYER}self_attn.v_proj.weight": (kv, d),
        f"{_LAYER}self_attn.o_proj.weight": (d, q),
        f"{_LAYER}mlp.gate_proj.weight": (f, d),
        f"{_LAYER}mlp.up_proj.weight": (f, d),
        f"{_LAYER}mlp.down_proj.weight": (d, f),
        f"{_LAYER}post_attention_layernorm.weight": (d,),
    }
    return shapes | {"fc.bias": (d,)} if has_bias else shapes


def _check_fits(config: Mapping[str, Any], target: Target, folder: Path) -> None:
    shape = target.decoder.config
    for key, expected in (("vocab_size", shape.vocab_size), ("hidden_size", shape.layer.hidden_size)):
        if key not in config:
            raise ValueError(f"{folder / 'config.json'} has no {key}; it can't be matched with the target")
        if int(config[key]) != expected:
            raise ValueError(
                f"drafter {key} {config[key]} != target {key} {expected}: {folder} was made for another target"
            )
