"""One decoder layer of the Llama family: the plain form that learns, and the fast form that serves.

`plain_layer` is ten lines of ordinary torch, differentiable, whole sequences only: the reference, and what a
drafter trains through. `FastLayer` does the same with fused projections, interleaved rotary pairs and a KV cache.
Both serve the target and the drafters; there is no other forward.

Axis letters: N new tokens of a step (all requests, one after the other), S keys, H heads, G key-value heads,
E head_dim, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.linear import MakeLinear

_MAX_SERIAL = 32768  # elements from which torch splits an elementwise operator over threads, anywhere in a row


@dataclass(frozen=True)
class LayerConfig:
    """The sizes one layer needs."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads can't share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")


# --- the plain form ---------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis; no weight (a layer that has no such norm) leaves x alone."""
    return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_angles(positions_N: Tensor, config: LayerConfig) -> Tensor:
    """Angles [N, E/2] in radians, float32, computed in the same order as transformers does, for the same roundings."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions_N.device, dtype=torch.float32) / config.head_dim
    return positions_N[:, None].float() * (1.0 / config.rope_theta**exponents)


def rotate_half(x_NHE: Tensor, angles_NR: Tensor) -> Tensor:
    """Rotary positions as published checkpoints lay them out: element i pairs with element i + E/2."""
    cos, sin = angles_NR.cos()[:, None], angles_NR.sin()[:, None]
    a, b = x_NHE.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _project(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def plain_keys_values(
    config: LayerConfig, weights: Mapping[str, Tensor], x_SD: Tensor, angles_SR: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values [S, G, E] of positions whose layer input is x."""
    x_SD = rms_norm(x_SD, weights.get("input_layernorm.weight"), config.rms_norm_eps)
    k = _project(weights, "self_attn.k_proj", x_SD).unflatten(-1, (config.num_kv_heads, config.head_dim))
    v = _project(weights, "self_attn.v_proj", x_SD).unflatten(-1, (config.num_kv_heads, config.head_dim))
    return rotate_half(rms_norm(k, weights.get("self_attn.k_norm.weight"), config.rms_norm_eps), angles_SR), v


def plain_layer(
    config: LayerConfig,
    weights: Mapping[str, Tensor],
    x_ND: Tensor,
    angles_NR: Tensor,
    keys_SGE: Tensor,
    values_SGE: Tensor,
    is_visible_NS: Tensor,
) -> Tensor:
    """The layer's output for queries x over the given keys and values, as published models define it.

    Args:
        weights: Named as in a checkpoint, without the layer prefix; an absent norm or bias is left out.
    """
    h = rms_norm(x_ND, weights.get("input_layernorm.weight"), config.rms_norm_eps)
    q = _project(weights, "self_attn.q_proj", h).unflatten(-1, (config.num_heads, config.head_dim))
    q = rotate_half(rms_norm(q, weights.get("self_attn.q_norm.weight"), config.rms_norm_eps), angles_NR)
    group = config.num_heads // config.num_kv_heads
    k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys_SGE, values_SGE))
    mixed = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=is_visible_NS)[0]
    x_ND = x_ND + _project(weights, "self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
    h = rms_norm(x_ND, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    h = F.silu(_project(weights, "mlp.gate_proj", h)) * _project(weights, "mlp.up_proj", h)
    return x_ND + _project(weights, "mlp.down_proj", h)


# --- the fast form ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Which new tokens a forward holds: `counts[i]` of them for `slots[i]`, at positions from `starts[i]` on."""

    slots: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


class _Attention(NamedTuple):
    """One attention call: queries [first, last) of the step over a slot's first num_keys keys."""

    slot: int
    first: int
    last: int
    num_keys: int
    mask_N11S: Tensor


class Plan(NamedTuple):
    """What all layers of a forward share: where keys go, who sees what, the rotations."""

    rows: Rows
    calls: list[_Attention]
    rotations_N1R: Tensor  # complex64


class RotaryTable:
    """Rotations by position as complex numbers, computed once up to the longest position seen."""

    def __init__(self, config: LayerConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._table = torch.empty(0)

    def __call__(self, rows: Rows) -> Tensor:
        longest = max(start + count for start, count in zip(rows.starts, rows.counts, strict=True))
        if longest > len(self._table):
            angles = rotary_angles(torch.arange(max(256, 2 * longest), device=self._device), self._config)
            self._table = torch.polar(torch.ones_like(angles), angles)[:, None]
        spans = zip(rows.starts, rows.counts, strict=True)
        parts = [self._table[start : start + count] for start, count in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_plan(rows: Rows, rotary: RotaryTable) -> Plan:
    """Lays out the attention calls of a ragged step.

    Every query is a batch row of its own, and how many keys it is given follows from its position alone (the next
    multiple of PAD, masked): torch's CPU kernel then gives it the same bits whatever stands beside it. With a
    neighbour's keys, masked or not, it would not: from some 190 keys on, their number changes the order of the sums.
    """
    calls, offset = [], 0
    rotations = rotary(rows)
    for slot, start, count in zip(rows.slots, rows.starts, rows.counts, strict=True):
        end = start + count
        for num_keys in range((start // PAD + 1) * PAD, end + PAD, PAD):
            first, last = max(start, num_keys - PAD), min(end, num_keys)
            positions = torch.arange(first, last, device=rotations.device)
            is_hidden = torch.arange(num_keys, device=rotations.device) > positions[:, None]
            mask = torch.zeros(is_hidden.shape, device=rotations.device).masked_fill_(is_hidden, float("-inf"))
            calls.append(_Attention(slot, offset + first - start, offset + last - start, num_keys, mask[:, None, None]))
        offset += count
    return Plan(rows, calls, rotations)


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders each head's rows (0, E/2, 1, E/2 + 1, ...), so that rotary pairs lie side by side."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """An elementwise function of tensors with the same first axis, in parts small enough to stay on one thread.

    Where threads share a row, their vectorised loops end in other places and the bits differ.
    """
    rows = max(1, (_MAX_SERIAL - 1) // tensors[0][0].numel())
    if len(tensors[0]) <= rows:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(t.split(rows) for t in tensors), strict=True)])


class FastLayer:
    """One layer for serving: q, k and v in one product, gate and up in another, no gradient.

    A norm's weight is multiplied into the product behind it. Takes the same named weights as `plain_layer`.
    """

    def __init__(self, config: LayerConfig, weights: Mapping[str, Tensor], make_linear: MakeLinear) -> None:
        self._config = config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        norm = weights.get("input_layernorm.weight")
        self._has_input_norm = norm is not None
        q, k = (_interleave(weights[f"self_attn.{n}_proj.weight"], h) for n, h in (("q", heads), ("k", kv_heads)))
        qkv = torch.cat([q, k, weights["self_attn.v_proj.weight"]])
        bias = None
        if "self_attn.q_proj.bias" in weights:
            q, k = (_interleave(weights[f"self_attn.{n}_proj.bias"], h) for n, h in (("q", heads), ("k", kv_heads)))
            bias = torch.cat([q, k, weights["self_attn.v_proj.bias"]])
        self._qkv = make_linear(qkv if norm is None else qkv * norm, bias)
        self._head_norm_HE = None
        if "self_attn.q_norm.weight" in weights:
            norms = [_interleave(weights[f"self_attn.{n}_norm.weight"], 1) for n in ("q", "k")]
            self._head_norm_HE = torch.stack([norms[0]] * heads + [norms[1]] * kv_heads)
        self._o = make_linear(weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias"))
        gate_up = torch.cat([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
        biases = [weights[f"mlp.{n}_proj.bias"] for n in ("gate", "up") if f"mlp.{n}_proj.bias" in weights]
        norm = weights["post_attention_layernorm.weight"]
        self._gate_up = make_linear(gate_up * norm, torch.cat(biases) if biases else None)
        self._down = make_linear(weights["mlp.down_proj.weight"], weights.get("mlp.down_proj.bias"))

    def __call__(self, x_ND: Tensor, plan: Plan, cache: KVCache, layer: int) -> Tensor:
        """The layer's output; its keys and values are written at the rows' positions."""
        x_ND = x_ND + self._o(self._attend(self._qkv(self._unit(x_ND, self._has_input_norm)), plan, cache, layer))
        return x_ND + self._down(_by_rows(self._gate, self._gate_up(self._unit(x_ND, True))))

    def _gate(self, gate_up: Tensor) -> Tensor:
        size = self._config.intermediate_size
        return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])

    def _unit(self, x: Tensor, is_wanted: bool) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self._config.rms_norm_eps) if is_wanted else x

    def _attend(self, qkv: Tensor, plan: Plan, cache: KVCache, layer: int) -> Tensor:
        config = self._config
        heads = config.num_heads
        split = heads + config.num_kv_heads
        qkv = qkv.view(len(qkv), split + config.num_kv_heads, config.head_dim)
        qk_NHE, v_NGE = qkv[:, :split], qkv[:, split:]
        if self._head_norm_HE is not None:
            qk_NHE = self._unit(qk_NHE, True).mul_(self._head_norm_HE)
        pairs = torch.view_as_complex(qk_NHE.unflatten(-1, (-1, 2)).float())
        qk_NHE = torch.view_as_real(_by_rows(torch.mul, pairs, plan.rotations_N1R)).flatten(-2).to(qkv.dtype)
        offset = 0
        for slot, start, count in zip(*plan.rows, strict=True):
            block = cache.block(slot, layer)
            block[0, :, start : start + count] = qk_NHE[offset : offset + count, heads:].transpose(0, 1)
            block[1, :, start : start + count] = v_NGE[offset : offset + count].transpose(0, 1)
            offset += count
        q_NGME = qk_NHE[:, :heads].unflatten(1, (config.num_kv_heads, -1))
        group = q_NGME.shape[2]
        if group % 2:  # an odd one misaligns the scratch memory of torch's second thread, whose bits then differ
            q_NGME = torch.cat([q_NGME, q_NGME[:, :, :1]], dim=2)
        mixed = [self._attend_one(q_NGME, call, cache.block(call.slot, layer)) for call in plan.calls]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed))[:, :, :group].reshape(len(qkv), -1)

    def _attend_one(self, q_NGME: Tensor, call: _Attention, block: Tensor) -> Tensor:
        q = q_NGME[call.first : call.last]
        num_rows = len(q)
        if num_rows * self._config.num_kv_heads == 1:  # alone, its products would be shared by threads: other bits
            q = q.expand(2, -1, -1, -1)
        k, v = block[:, :, : call.num_keys].unsqueeze(1).expand(-1, len(q), -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask_N11S.to(q.dtype))[:num_rows]
