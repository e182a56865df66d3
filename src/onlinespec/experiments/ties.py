"""Near-ties of the target, where a first difference from plain decoding is no fault."""

from __future__ import annotations

from dataclasses import replace

import torch

from onlinespec.engine.request import Request
from onlinespec.lossless.noise import gumbel
from onlinespec.lossless.sampling import process_step
from onlinespec.models.loading import Target

TIE_GAP = 1e-4  # of the target's two largest logits; where they are closer, either token is a right answer


def is_tie(target: Target, answer: Request, plain: Request) -> bool:
    """Whether the first difference of two answers to one request is at a near-tie.

    The target's logits of both tokens, as they were chosen (penalties, noise), lie within TIE_GAP of its best, or
    within what rounding both to the target's dtype may put between them. Costs a forward; called only when they differ.
    """
    pairs = list(zip(answer.output_ids, plain.output_ids, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return False
    num_prompt_tokens, sampling = plain.num_prompt_tokens, plain.params.sampling
    ids = plain.trace.token_ids[: num_prompt_tokens + first]
    cache, decoder = target.decoder.new_cache(), target.decoder
    cache.take(0, plain.max_tokens)  # as when it was decoded: a scaling may go by it
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
