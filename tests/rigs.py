"""Targets, drafters and ways of running requests that the decoding tests share.

A target here is made in memory, without files. `table_target` has no layers: its next token depends on the last one
only, so every sequence's probability is known (`toy.enumerate_law`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from checkpoints import byte_tokenizer
from torch import Tensor

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import Draft, DrafterWeights, Features, Feedback, Verdict
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.request import Request
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.base import ModelConfig
from onlinespec.models.decoder import Decoder
from onlinespec.models.layer import LayerConfig
from onlinespec.models.loading import Target
from onlinespec.models.rope import Rope

SOFT = SamplingParams(temperature=1.0)


def _target(
    weights: dict[str, Tensor], num_layers: int, context: int, end_token_ids: Iterable[int], name: str
) -> Target:
    vocab, hidden = weights["model.embed_tokens.weight"].shape
    layer = LayerConfig(hidden, 2 * hidden, 2, 1, hidden // 2, rms_norm_eps=1e-6, rope=Rope(10_000.0))
    decoder = Decoder(ModelConfig(layer, num_layers, vocab, context), weights)
    return Target(name, decoder, byte_tokenizer(), frozenset(end_token_ids), SamplingParams(), fingerprint=name)


def random_target(
    num_layers: int = 2,
    vocab: int = 288,
    context: int = 1024,
    end_token_ids: Iterable[int] = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Target:
    """Random weights, and the byte tokenizer of `checkpoints` (its 259 tokens fit the vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 32

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, columns, generator=generator) / columns**0.5

    weights = {"model.embed_tokens.weight": draw(vocab, hidden, 4), "model.norm.weight": torch.ones(hidden)}
    weights["lm_head.weight"] = draw(vocab, hidden, 2)
    for i in range(num_layers):
        rows = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "o": hidden}
        shapes = {f"self_attn.{n}_proj": (r, hidden) for n, r in rows.items()}
        shapes |= {"mlp.gate_proj": (2 * hidden, hidden), "mlp.up_proj": (2 * hidden, hidden)}
        shapes["mlp.down_proj"] = (hidden, 2 * hidden)
        weights |= {f"model.layers.{i}.{name}.weight": draw(*dims, 1.0) for name, dims in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        weights |= {f"model.layers.{i}.{name}.weight": torch.ones(hidden) for name in norms}
    weights = {name: weight.to(device, dtype) for name, weight in weights.items()}
    return _target(weights, num_layers, context, end_token_ids, f"random-{seed}")


def table_target(vocab: int = 5, hidden: int = 16, context: int = 64, seed: int = 0) -> Target:
    """No layers: the head applied to the last token's normed embedding. `table_logits` are its rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": 0.4 * torch.randn(vocab, hidden, generator=generator),
    }
    return _target(weights, 0, context, (), f"table-{seed}")


def cycle_target(cycle: Sequence[int], vocab: int, hidden: int, context: int = 256) -> Target:
    """Each token of the cycle is followed by the next one, the last by the first, with near certainty."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(vocab, hidden, generator=generator)
    if vocab <= hidden:
        embedding = torch.linalg.qr(embedding.T).Q.T
    embedding = embedding / embedding.norm(dim=-1, keepdim=True)
    head = torch.zeros_like(embedding)
    head[list(cycle)] = 2 * embedding[[cycle[-1], *cycle[:-1]]]
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden), "lm_head.weight": head}
    return _target(weights, 0, context, (), "cycle")


def counting_target() -> Target:
    """x is followed by x + 1, and 11 by 0."""
    return cycle_target(range(12), vocab=12, hidden=24)


def table_logits(target: Target) -> Tensor:
    """[V, V]: what follows each token, whatever came before."""
    return target.decoder.head(hidden_states(target, range(target.decoder.config.vocab_size)))


def hidden_states(target: Target, token_ids: Iterable[int]) -> Tensor:
    """The target's final hidden states [S, D] for a text."""
    ids = torch.tensor(list(token_ids))
    cache = target.decoder.new_cache()
    cache.take(0, len(ids))
    return target.decoder.forward(ids, [0], [len(ids)], cache).features.final_SD.clone()


def features_of(target: Target, token_ids: Sequence[int]) -> Features:
    """What a drafter without aux layers is told of a text."""
    return Features(hidden_states(target, token_ids))


def plain(target: Target, prompt_ids: Sequence[int], params: GenerationParams) -> Request:
    """What decoding without a drafter gives."""
    return DecodeLoop(target).complete(prompt_ids, params)


def run_together(
    loop: DecodeLoop,
    jobs: Sequence[tuple[Sequence[int], GenerationParams]],
    max_running: int = 1000,
    between_steps: Callable[[], None] = lambda: None,
) -> list[Request]:
    """Runs the jobs in one batch that some join as others leave; requests in the order of the jobs."""
    waiting, running, done = list(enumerate(jobs)), [], {}
    while waiting or running:
        while waiting and len(running) < max_running:
            place, (prompt_ids, params) = waiting.pop(0)
            running.append((place, loop.start(prompt_ids, params, request_id=str(place))))
        loop.step([request for _, request in running])
        between_steps()
        for place, request in running:
            if request.finish_reason:
                loop.finish(request)
                done[place] = request
        running = [(place, request) for place, request in running if not request.finish_reason]
    return [done[place] for place in range(len(jobs))]


def other_weights(weights: DrafterWeights, seed: int, scale: float = 0.3) -> DrafterWeights:
    """Random weights of the same shapes, one version on."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: p + scale * torch.randn(p.shape, generator=generator) for name, p in weights.params.items()}
    return DrafterWeights(params, weights.version + 1)


class ForcedNoise:
    """Stands where a step's noise does, for one request: so loud that given tokens are drafted, where there are any."""

    def __init__(self, token_ids: Sequence[int] = (), vocab: int = 288) -> None:
        self.token_ids, self.vocab = list(token_ids), vocab

    def take(self, places):
        return self

    def at(self, depth, token_ids_S=None):
        row = torch.zeros(1, self.vocab, dtype=torch.float64)
        if depth < len(self.token_ids):
            row[0, self.token_ids[depth]] = 1e9
        return row if token_ids_S is None else row[:, token_ids_S]


class AcceptsEverything:
    """What no rule may do."""

    needs_probs = False

    def judge(self, draft, rows):
        last = torch.stack([one.scores_LV[-1].argmax(-1) for one in rows])[:, None]
        ids = torch.nn.functional.pad(draft.token_ids_BK, (0, 1), value=-1)
        is_finite = torch.ones(len(rows), dtype=torch.bool)
        return Verdict(draft.num_draft_tokens_B, ids.scatter(1, draft.num_draft_tokens_B[:, None], last), is_finite)


class Recorder:
    """Stands where learning does, and keeps all feedback."""

    diagnostic_seconds = 0.0

    def __init__(self, passed_on_to=None) -> None:
        self.feedback: list[Feedback] = []
        self._next = passed_on_to

    def offer(self, feedback: Sequence[Feedback]) -> None:
        self.feedback.extend(feedback)
        if self._next:
            self._next.offer(feedback)

    num_published = 0

    def set_share(self, share: float) -> None:
        pass

    def of(self, request: Request) -> list[Feedback]:
        """One request's feedback, in order."""
        return [record for record in self.feedback if record.trace is request.trace]


class Script(Drafter):
    """Drafts what the text says comes next, wrong wherever the text position (counted from 0) is in `wrong_at`."""

    def __init__(self, text_ids: Sequence[int], wrong_at: Iterable[int] = (), vocab: int = 288) -> None:
        self.text_ids, self.wrong_at, self.vocab = list(text_ids), set(wrong_at), vocab
        self.weights = DrafterWeights({}, version=0)
        self.lengths: dict[int, int] = {}
        self.observed: list[list[int]] = []

    @classmethod
    def fresh(cls, target, seed=0):
        raise NotImplementedError

    load = fresh

    def save(self, folder):
        raise NotImplementedError

    def start(self, slot, info, token_ids, features):
        assert len(features) == len(token_ids) - 1
        self.lengths[slot] = len(token_ids)

    def propose(self, slots, anchors, num_draft_tokens_B, sampling, noise):
        rows = []
        for slot, count in zip(slots, num_draft_tokens_B, strict=True):
            places = range(self.lengths[slot], min(self.lengths[slot] + count, len(self.text_ids)))
            rows.append([(self.text_ids[i] + (i in self.wrong_at)) % self.vocab for i in places])
        width = max(num_draft_tokens_B)
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        return Draft.by_one(padded, torch.tensor([len(ids) for ids in rows]), self.weights.version)

    def observe(self, slots, token_ids, features):
        for slot, committed, rows in zip(slots, token_ids, features, strict=True):
            assert len(rows) == len(committed)
            self.observed.append(committed)
            self.lengths[slot] += len(committed)

    def release(self, slot, is_finished):
        del self.lengths[slot]
