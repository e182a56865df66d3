"""The test for near-ties of the target: a first difference from plain decoding at one is not an error."""

from __future__ import annotations

from dataclasses import replace

import torch

from onlinespec.engine.request import Request
from onlinespec.lossless.noise import gumbel
from onlinespec.lossless.sampling import process_step
from onlinespec.models.loading import Target

TIE_GAP = 1e-4  # gap of the target's two largest logits below which either token is correct


def is_tie(target: Target, answer: Request, plain: Request) -> bool:
    """Returns whether the first difference of two answers to one request is at a near-tie.

    It is if the scores of both tokens (logits with penalties and noise) lie within TIE_GAP of the best one, or within
    the rounding error of the target's dtype. Costs one forward pass, so call it only for answers that differ.

    Args:
        answer: The answer with drafting.
        plain: The answer of plain decoding.
    """
    pairs = list(zip(answer.output_ids, plain.output_ids, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return False
    num_prompt_tokens, sampling = plain.num_prompt_tokens, plain.params.sampling
    ids = plain.trace.token_ids[: num_prompt_tokens + first]
    cache, decoder = target.decoder.new_cache(), target.decoder
    cache.take(0, plain.max_tokens)  # the same maximum length as when decoding: RoPE scaling may depend on it
    output = decoder.forward(torch.tensor(ids, device=decoder.device), [0], [len(ids)], cache, [1])
    uncut = replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
    no_drafts = torch.empty(0, dtype=torch.int64, device=decoder.device)
    scores_V = process_step(output.logits_MV, uncut, ids, num_prompt_tokens, no_drafts)[0].double()
    if plain.noise:
        scores_V = scores_V + gumbel(plain.noise.row(len(ids)))
    both = scores_V[list(pairs[first])]
    best = float(scores_V.max() if uncut == sampling else both.max())
    rounding = 2 * float(output.logits_MV.float().abs().max()) * torch.finfo(decoder.dtype).eps
    return best - float(both.min()) < max(TIE_GAP, rounding) / (sampling.temperature or 1.0)
