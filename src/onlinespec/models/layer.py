"""A decoder layer of the Llama family, in two forms: a plain one for learning, and a fast one for serving.

`plain_layer` is ten lines of ordinary differentiable torch on whole sequences. It is the reference, and drafters learn
through it. `FastLayer` computes the same with fused projections, interleaved rotary pairs and a KV cache. Targets and
drafters use both.

Axis letters: N new tokens of a call (of all requests, one after the other), S keys, H heads, G key-value heads, M query
heads per key-value head, E head_dim, R rotated pairs of a head, D hidden size. The plain form can evaluate several sets
of weights at once: weights and rows then have a leading axis, one entry per set, but masks and rotations do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.host import to_device
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.linear import MakeLinear, Product, plain_product
from onlinespec.models.rope import Rope, RotaryTables

_MAX_SERIAL = 32768  # from this many elements on, torch splits an elementwise operator over threads, even inside a row


@dataclass(frozen=True)
class LayerConfig:
    """The sizes of a decoder layer.

    Raises:
        ValueError: if heads can't share key-value heads evenly, or head_dim or rotary_dim is odd or out of range.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads can't share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(f"{self.rotary_dim} of {self.head_dim} elements of a head turn; it must be an even number")

    @property
    def rotary_dim(self) -> int:
        """Number of elements of a head that are rotated."""
        return self.rope.rotary_dim(self.head_dim)


# --- the plain form ---------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Applies RMS norm over the last axis. Returns x unchanged if `weight` is None: the layer has no such norm."""
    if weight is None:
        return x
    if weight.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight.unflatten(0, (-1, *[1] * (x.dim() - 2)))


def rotary_at(positions_N: Tensor, config: LayerConfig, capacities: Iterable[int] | None = None) -> Tensor:
    """Returns the rotary embeddings of positions as complex numbers cos + i sin, [N, R].

    Args:
        capacities: Maximum number of tokens of each row's request; needed for scalings that depend on the text length.
    """
    rope = config.rope
    lengths = [rope.length_of(int(n)) for n in capacities] if capacities is not None else []
    lengths = lengths or [0]
    rotary_NR = rope.rotary(positions_N, config.head_dim, lengths[0])
    for length in set(lengths[1:]) - {lengths[0]}:
        at_M = to_device([i for i, one in enumerate(lengths) if one == length], positions_N.device)
        rotary_NR[at_M] = rope.rotary(positions_N[at_M], config.head_dim, length)
    return rotary_NR


def rotate_half(x_NHE: Tensor, rotary_NR: Tensor) -> Tensor:
    """Rotates queries or keys in the published layout: element i pairs with i + R; the rest of a head is unchanged."""
    cos, sin = rotary_NR.real[:, None], rotary_NR.imag[:, None]
    size = rotary_NR.shape[-1]
    a, b, still = x_NHE.split((size, size, x_NHE.shape[-1] - 2 * size), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)


def project(weights: Mapping[str, Tensor], name: str, x: Tensor, product: Product = plain_product) -> Tensor:
    """Multiplies x by a named weight and adds its bias, if there is one; each set of weights multiplies its own x."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    projected = product(x, weight)
    return projected if bias is None else projected + bias.unsqueeze(-2)


def plain_keys_values(
    config: LayerConfig,
    weights: Mapping[str, Tensor],
    x_SD: Tensor,
    rotary_SR: Tensor,
    product: Product = plain_product,
) -> tuple[Tensor, Tensor]:
    """Returns rotated keys and values [S, G, E] for the layer input x."""
    x_SD = rms_norm(x_SD, weights.get("input_layernorm.weight"), config.rms_norm_eps)
    k = project(weights, "self_attn.k_proj", x_SD, product).unflatten(-1, (config.num_kv_heads, config.head_dim))
    v = project(weights, "self_attn.v_proj", x_SD, product).unflatten(-1, (config.num_kv_heads, config.head_dim))
    return rotate_half(rms_norm(k, weights.get("self_attn.k_norm.weight"), config.rms_norm_eps), rotary_SR), v


class Seen(NamedTuple):
    """Keys and values, and a mask of which of them each query attends to."""

    keys_SGE: Tensor
    values_SGE: Tensor
    is_visible_NS: Tensor  # bool: True where query n attends to key s


def plain_layer(
    config: LayerConfig,
    weights: Mapping[str, Tensor],
    x_ND: Tensor,
    rotary_NR: Tensor,
    seen: Sequence[Seen],
    product: Product = plain_product,
) -> Tensor:
    """Returns the layer's output [N, D] for input rows that attend to given keys and values: the reference.

    Args:
        weights: By their names in a checkpoint, without the layer prefix; a missing norm or bias is not applied.
        seen: The keys and values, in parts, because some parts need no gradient.
        product: Multiplies rows by a weight.
    """
    h = rms_norm(x_ND, weights.get("input_layernorm.weight"), config.rms_norm_eps)
    q = project(weights, "self_attn.q_proj", h, product).unflatten(-1, (config.num_heads, config.head_dim))
    q = rotate_half(rms_norm(q, weights.get("self_attn.q_norm.weight"), config.rms_norm_eps), rotary_NR)
    x_ND = x_ND + project(weights, "self_attn.o_proj", _attend_plainly(q, seen), product)
    h = rms_norm(x_ND, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    h = F.silu(project(weights, "mlp.gate_proj", h, product)) * project(weights, "mlp.up_proj", h, product)
    return x_ND + project(weights, "mlp.down_proj", h, product)


def _attend_plainly(q_NHE: Tensor, seen: Sequence[Seen]) -> Tensor:
    """Softmax attention over all parts together, [N, H * E].

    Queries that share a key-value head are rows of one product, so that keys need not be repeated.
    """
    q_NGME = q_NHE.unflatten(-2, (seen[0].keys_SGE.shape[-2], -1))
    N, group = q_NGME.shape[-4], q_NGME.shape[-2]
    q_GQE = q_NGME.transpose(-4, -3).flatten(-3, -2) * q_NHE.shape[-1] ** -0.5
    scores_GQS = torch.cat([q_GQE @ part.keys_SGE.transpose(-3, -2).mT for part in seen], dim=-1)
    is_visible_QS = torch.cat([part.is_visible_NS for part in seen], dim=-1).repeat_interleave(group, dim=0)
    probs = scores_GQS.masked_fill(~is_visible_QS, -math.inf).softmax(-1)
    shares = probs.split([part.is_visible_NS.shape[-1] for part in seen], dim=-1)
    pairs = zip(shares, seen, strict=True)
    mixed_GQE = torch.stack([share @ part.values_SGE.transpose(-3, -2) for share, part in pairs]).sum(0)
    return mixed_GQE.unflatten(-2, (N, group)).transpose(-4, -3).flatten(-3)


# --- the fast form ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The new tokens of a forward pass: `counts[i]` of slot `slots[i]`, at positions from `starts[i]` on."""

    slots: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


class Plan(NamedTuple):
    """What all layers of a forward pass share: rotary embeddings, and views of the cache to write to and to read."""

    rotations_NR: Tensor  # complex64; here R counts the pairs of all query and key heads, side by side
    counts: Sequence[int]  # new tokens of each request, in the order of `writes`
    writes: list[Sequence[Tensor]]  # for each request and layer, where new keys and values go: [count, 2G, E]
    sizes: Sequence[int]  # number of queries of each attention call
    calls: dict[int | None, list[_Attention]]  # attention calls, by sliding window


class _Attention(NamedTuple):
    """One attention call: some queries of a request over some of its keys, for all layers with the same window."""

    keys: Sequence[Tensor]  # by layer: [queries, G, S, E], or [G, 1, S, E] for a whole block
    values: Sequence[Tensor]
    mask: Tensor  # [queries, 1, 1, S], or [queries, S] for a whole block
    is_block: bool


def make_plan(
    rows: Rows,
    rotary: RotaryTables,
    cache: KVCache,
    num_heads: int,
    attends: bool = True,
    windows: Collection[int | None] = (None,),
) -> Plan:
    """Plans the cache writes and, if `attends`, the attention calls of a ragged forward pass.

    In decoding, every query is a batch row of its own. Its keys are padded to the next multiple of PAD and masked; with
    a sliding window they also begin at a multiple of PAD. So the number of keys depends only on the query's position,
    and torch's CPU kernel gives a query the same bits whatever is computed beside it. Masked keys matter, too: from
    about 190 keys on, their number changes the order of summation.

    In prefill, PAD new tokens that fill the positions between two multiples of PAD attend in one call, which is faster.
    A token in such a block gets the same bits wherever else the prompt is cut into pieces, but not the bits that it
    would get alone. Verification has at most MAX_DRAFT_TOKENS + 1 tokens and never fills a block.

    Args:
        num_heads: Number of query and key heads together.
        attends: False if the plan is only used for `FastLayer.write`.
        windows: The sliding windows that layers have, a query's own position included; None for no window.
    """
    writes: list[Sequence[Tensor]] = []
    rotations, sizes = [], []
    calls: dict[int | None, list[_Attention]] = {window: [] for window in windows}
    for slot, start, count in zip(rows.slots, rows.starts, rows.counts, strict=True):
        end, block = start + count, cache.block(slot)
        rotations.append(rotary(start, count, cache.limits[slot]))
        writes.append(block[..., start:end, :].flatten(1, 2).transpose(1, 2).unbind())
        for last_key in range((start // PAD + 1) * PAD, end + PAD, PAD) if attends else ():
            first, last = max(start, last_key - PAD), min(end, last_key)
            sizes.append(last - first)
            for window, its_calls in calls.items():
                first_key = 0 if window is None else max(0, last_key - PAD - window + 1) // PAD * PAD
                keys = _Keys(block[..., first_key:last_key, :], first_key, window)
                its_calls.append(_plan_attention(keys, first, last))
    rotations_NR = torch.cat([rotations[0] if len(rotations) == 1 else torch.cat(rotations)] * num_heads, dim=1)
    return Plan(rotations_NR, rows.counts, writes, sizes, calls)


class _Keys(NamedTuple):
    """Consecutive keys and values of a request, and the sliding window of its queries."""

    block_L2GSE: Tensor  # L layers, keys then values
    first: int  # position of the first key
    window: int | None


def _plan_attention(keys: _Keys, first: int, last: int) -> _Attention:
    """Returns the attention call of the queries at positions first to last - 1."""
    num_queries, (_, _, num_kv_heads, num_keys, _) = last - first, keys.block_L2GSE.shape
    hidden_NS = keys.block_L2GSE.new_full((num_queries, num_keys), float("-inf"))
    mask_NS = hidden_NS.triu(first - keys.first + 1)
    if keys.window is not None:
        mask_NS += hidden_NS.tril(first - keys.first - keys.window)
    if num_queries == PAD:
        k, v = keys.block_L2GSE[:, :, :, None].unbind(1)
        return _Attention(k.unbind(), v.unbind(), mask_NS, is_block=True)
    if num_queries * num_kv_heads == 1 and mask_NS.is_cpu:  # threads would split a single product, which changes bits
        num_queries = 2
    k, v = keys.block_L2GSE[:, :, None].expand(-1, -1, num_queries, -1, -1, -1).unbind(1)
    return _Attention(k.unbind(), v.unbind(), mask_NS[:, None, None], is_block=False)


class _Unit:
    """Scales the last axis, of length D, to unit norm: x / sqrt(sum(x^2) + D eps).

    This is RMS norm without the factor sqrt(D), in three operators instead of the eight of `F.rms_norm` on a CPU. hypot
    gives the same bits in vectorised loops and in their scalar remainders (none of 2.8 million values differed).
    """

    def __init__(self, like: Tensor, eps: float) -> None:
        self._floor = torch.tensor((like.shape[-1] * eps) ** 0.5, dtype=torch.float32, device=like.device)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.div(x, torch.hypot(norms, self._floor, out=norms), out=out).to(x.dtype)


def _for_unit(norm: Tensor) -> Tensor:
    """Returns a norm's weight [..., D] times sqrt(D), the factor that `_Unit` leaves out."""
    return norm * norm.shape[-1] ** 0.5


def _interleave(weight: Tensor, num_heads: int, rotary_dim: int) -> Tensor:
    """Reorders each head's rotated rows as 0, R, 1, R + 1, ..., so that rotary pairs are adjacent."""
    heads = weight.unflatten(0, (num_heads, -1))
    pairs = heads[:, :rotary_dim].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, heads[:, rotary_dim:]], dim=1).flatten(0, 1)


def _by_rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits tensors along their first axis into parts so small that an elementwise operator runs on one CPU thread.

    If threads share a row, their vectorised loops end at other elements, and bits differ. On other devices nothing is
    split, because each part would cost a kernel launch.
    """
    size = tensors[0].numel()
    if size < _MAX_SERIAL or tensors[0].device.type != "cpu":
        return [tensors]
    rows = max(1, (_MAX_SERIAL - 1) * tensors[0].shape[0] // size)
    return list(zip(*(t.split(rows) for t in tensors), strict=True))


class FastLayer:
    """A layer for serving, without gradient: q, k and v are one fused product, gate and up another.

    The weight of a norm is folded into the product after it. Takes the same named weights as `plain_layer`.
    """

    def __init__(
        self,
        config: LayerConfig,
        weights: Mapping[str, Tensor],
        make_linear: MakeLinear,
        window: int | None = None,
    ) -> None:
        self._config, self._window = config, window
        heads, kv_heads, turning = config.num_heads, config.num_kv_heads, config.rotary_dim
        norm = weights.get("input_layernorm.weight")
        self._has_input_norm = norm is not None
        q, k = (
            _interleave(weights[f"self_attn.{n}_proj.weight"], h, turning) for n, h in (("q", heads), ("k", kv_heads))
        )
        qkv = torch.cat([q, k, weights["self_attn.v_proj.weight"]])
        bias = None
        if "self_attn.q_proj.bias" in weights:
            q, k = (
                _interleave(weights[f"self_attn.{n}_proj.bias"], h, turning) for n, h in (("q", heads), ("k", kv_heads))
            )
            bias = torch.cat([q, k, weights["self_attn.v_proj.bias"]])
        self._qkv = make_linear(qkv if norm is None else qkv * _for_unit(norm), bias)
        self._head_norm_HE = None
        if "self_attn.q_norm.weight" in weights:
            norms = [_interleave(weights[f"self_attn.{n}_norm.weight"], 1, turning) for n in ("q", "k")]
            self._head_unit = _Unit(norms[0], config.rms_norm_eps)
            self._head_norm_HE = _for_unit(torch.stack([norms[0]] * heads + [norms[1]] * kv_heads))
        self._o = make_linear(weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias"))
        gate_up = torch.cat([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
        biases = [weights[f"mlp.{n}_proj.bias"] for n in ("gate", "up") if f"mlp.{n}_proj.bias" in weights]
        norm = weights["post_attention_layernorm.weight"]
        self._unit = _Unit(norm, config.rms_norm_eps)
        self._gate_up = make_linear(gate_up * _for_unit(norm), torch.cat(biases) if biases else None)
        self._down = make_linear(weights["mlp.down_proj.weight"], weights.get("mlp.down_proj.bias"))

    def __call__(self, x_ND: Tensor, plan: Plan, index: int) -> Tensor:
        """Returns the layer's output [N, D], and writes keys and values to the cache as planned for layer `index`."""
        x_ND = x_ND + self._o(self._attend(self.write(x_ND, plan, index), plan, index))
        return x_ND + self._down(self._gate(self._gate_up(self._unit(x_ND))))

    def write(self, x_ND: Tensor, plan: Plan, index: int) -> Tensor:
        """Writes the keys and values of input rows to the cache, without attending. Returns the queries [N, H, E]."""
        qkv_NW = self._qkv(self._unit(x_ND) if self._has_input_norm else x_ND)
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        if self._head_norm_HE is not None:
            qk_NHE = qkv_NW.view(-1, heads + 2 * kv_heads, self._config.head_dim)[:, : heads + kv_heads]
            self._head_unit(qk_NHE, out=qk_NHE).mul_(self._head_norm_HE)
        qkv_NW = self._rotate(qkv_NW, plan.rotations_NR)
        q_NHE, kv_NGE = qkv_NW.view(-1, heads + 2 * kv_heads, self._config.head_dim).split((heads, 2 * kv_heads), dim=1)
        for rows, written in zip(kv_NGE.split(plan.counts), plan.writes, strict=True):
            written[index].copy_(rows)
        return q_NHE

    def _gate(self, gate_up_NF: Tensor) -> Tensor:
        parts = []
        for (part_NF,) in _by_rows(gate_up_NF):
            gate_NF, up_NF = part_NF.chunk(2, dim=-1)
            parts.append(F.silu(gate_NF).mul_(up_NF))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q_NHE: Tensor, plan: Plan, index: int) -> Tensor:
        q_NGME = q_NHE.unflatten(1, (self._config.num_kv_heads, -1))
        pairs = zip(q_NGME.split(plan.sizes), plan.calls[self._window], strict=True)
        mixed = [(_attend_block if call.is_block else _attend_alone)(q, call, index) for q, call in pairs]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).flatten(1)

    @staticmethod
    def _rotate(qkv_NW: Tensor, rotations_NR: Tensor) -> Tensor:
        """Rotates queries and keys, in place if they are float32."""
        wide_NW = qkv_NW.float()
        pairs_NR = wide_NW.view(torch.complex64)[:, : rotations_NR.shape[1]]
        for pairs, rotations in _by_rows(pairs_NR, rotations_NR):
            pairs.mul_(rotations)
        return wide_NW.to(qkv_NW.dtype)


def _attend_alone(q_NGME: Tensor, call: _Attention, index: int) -> Tensor:
    """Computes attention with each query as a batch row of its own; returns [queries, G, M, E]."""
    keys_NGSE, (num_queries, _, group, _) = call.keys[index], q_NGME.shape
    if group % 2 and q_NGME.is_cpu:  # an odd size misaligns the scratch memory of torch's second thread; bits change
        q_NGME = torch.cat([q_NGME, q_NGME[:, :, :1]], dim=2)
    if len(keys_NGSE) > num_queries:
        q_NGME = q_NGME.expand(2, -1, -1, -1)
    mixed = F.scaled_dot_product_attention(q_NGME, keys_NGSE, call.values[index], attn_mask=call.mask)
    return mixed[:num_queries, :, :group]


def _attend_block(q_NGME: Tensor, call: _Attention, index: int) -> Tensor:
    """Computes attention of a whole block: each key-value head is a batch row, with its query heads as heads."""
    q_GMNE = q_NGME.permute(1, 2, 0, 3)
    keys_GMSE, values_GMSE = (part[index].expand(-1, q_GMNE.shape[1], -1, -1) for part in (call.keys, call.values))
    return F.scaled_dot_product_attention(q_GMNE, keys_GMSE, values_GMSE, attn_mask=call.mask).permute(2, 0, 1, 3)
