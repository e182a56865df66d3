"""The `eagle` drafter (EAGLE-1): a one-layer draft head that extrapolates the target's hidden states.

The input of row t is the target's final hidden state after token t and the embedding of token t + 1. The output
estimates the hidden state after token t + 1, from which the target's LM head drafts token t + 2. For further drafts,
the target's state is not computed yet, so the estimate takes its place in the input. Embedding and LM head are shared
with the target and do not learn.

Axis letters: B requests, K drafted tokens, N, M rows, C context rows, S positions, D hidden size, V vocabulary.
Reference: EAGLE, arXiv:2401.15077. The file layout is the one that other engines read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.core import DrafterWeights, Features, Params
from onlinespec.drafters.autoregressive import Autoregressive
from onlinespec.drafters.checkpoints import (
    draft_tokens_in,
    draft_tokens_of,
    read_drafter_config,
    read_side,
    write_drafter,
)
from onlinespec.drafters.draft_vocab import DraftVocab
from onlinespec.drafters.training_rows import Layout
from onlinespec.host import to_device
from onlinespec.models.base import ModelConfig
from onlinespec.models.checkpoint import check_tensors, read_weights, tensor_shapes
from onlinespec.models.families import llama_config, llama_layer_shapes, rope_in
from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import (
    FastLayer,
    LayerConfig,
    Plan,
    Rows,
    Seen,
    make_plan,
    plain_keys_values,
    plain_layer,
    project,
    rotary_at,
)
from onlinespec.models.linear import (
    MakeLinear,
    Product,
    draft_linear_for,
    learn_product_for,
    plain_product,
)
from onlinespec.models.loading import Target
from onlinespec.models.memory import DrafterSize
from onlinespec.models.rope import RotaryTables

_LAYER = "layers.0."
_MANY_ROWS = 16  # from this many rows on, a separate call that only writes keys and values is cheaper


class Eagle(Autoregressive):
    """The EAGLE-1 drafter.

    Drafting uses the fastest matrix products of the machine (bfloat16, for instance). Learning uses float32 weights.

    Args:
        target: The target that it drafts for.
        config: The published config.json. Unknown fields are kept and saved again.
        params: Weights by their published names; converted to float32.
        version: The weights version.
        unroll: Number of drafting depths that a training row goes through. From the second on, the input is the
            drafter's own output, as in drafting.
        extra: Further tensors of the checkpoint. They are not used, but saved again.
        dtype: The dtype in which the weights are saved.
        make_linear: Makes the matrix products for drafting; by default the fastest ones for the device. If given,
            learning uses plain products, too.
        draft_tokens: Size or ids of the draft vocabulary; see `DraftVocab`.
    """

    num_before = 1
    reads_features = True
    _cache: KVCache

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
        draft_tokens: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(target)
        self.config = dict(config)
        self.unroll = unroll
        self._layer_config = _layer_config(config)
        device, target_dtype = self._decoder.device, self._decoder.dtype
        self._make_linear = make_linear or draft_linear_for(device, self._draft_dtype)
        self._product = plain_product if make_linear else learn_product_for(device)
        make_head = make_linear or draft_linear_for(device, target_dtype)
        self.draft_vocab = DraftVocab(self._decoder.head_VD, make_head, draft_tokens)
        self._embedding_VD = self._decoder.embedding_VD
        layer = self._layer_config
        self._cache = KVCache(1, layer.num_kv_heads, layer.head_dim, device, self._draft_dtype)
        self._rotary = RotaryTables(self._layer_config.rope, self._layer_config.head_dim, device)
        self._extra = dict(extra or {})
        self._dtype = dtype
        self.swap(DrafterWeights({name: p.float() for name, p in params.items()}, version))

    # --- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def fresh(cls, target: Target, seed: int = 0) -> Self:
        config = _fresh_config(target.decoder.config)
        generator = torch.Generator().manual_seed(seed)
        params = {
            name: torch.ones(dims) if len(dims) == 1 else torch.randn(dims, generator=generator) * 0.02
            for name, dims in _param_shapes(config).items()
        }
        hidden_size = target.decoder.config.layer.hidden_size
        params["fc.weight"][:, hidden_size:] += torch.eye(hidden_size)  # initially, the target's state passes through
        return cls(target, config, {name: p.to(target.decoder.device) for name, p in params.items()})

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        config, side = read_drafter_config(folder), read_side(folder)
        _check_fits(config, target, folder)
        tensors = read_weights(folder, target.decoder.device, dtype=None)
        try:
            shapes = _param_shapes(config, has_bias="fc.bias" in tensors)
        except KeyError as error:
            raise ValueError(f"{folder / 'config.json'} has no {error.args[0]}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
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
        drafter = cls(target, config, params, version, extra=extra, dtype=params["fc.weight"].dtype)
        drafter.draft_vocab.restore(draft_tokens_in(side))
        return drafter

    def save(self, folder: Path) -> None:
        tensors = {name: p.to(self._dtype) for name, p in self.weights.params.items()} | self._extra
        side = self.side(target_fingerprint=self._fingerprint, **draft_tokens_of(self.draft_vocab))
        write_drafter(folder, self.config, tensors, self.weights.version, side)

    @classmethod
    def size(cls, folder: Path | None, target: ModelConfig) -> DrafterSize:
        shapes = tensor_shapes(folder) if folder else _param_shapes(_fresh_config(target))
        count = sum(math.prod(dims) for dims in shapes.values())
        return DrafterSize(count, count)

    # --- drafting -----------------------------------------------------------------------------------------------

    def swap(self, weights: DrafterWeights) -> None:
        """Replaces the weights.

        Cached keys and values of older weights are kept. The output stays exact, and no effect on acceptance was
        measurable (docs/log.md).
        """
        if self.drafts:  # assign last, so that an error leaves no mixture of old and new weights
            params = {name: p.detach().to(self._draft_dtype) for name, p in weights.params.items()}
            fc = self._make_linear(params["fc.weight"], params.get("fc.bias"))
            layer = FastLayer(self._layer_config, _layer_weights(params), self._make_linear)
            self._fc, self._layer = fc, layer
        self.weights = weights

    def _prefill_waiting(self, slot: int) -> None:
        """Prefills the cache with all waiting tokens but the last, if there are many.

        Only keys and values are computed: the states of these tokens are not needed, so attention is skipped.
        """
        waiting = self._slots[slot]
        count = len(waiting.token_ids) - 1
        if count < _MANY_ROWS:
            return
        features, ids_N = Features.cat(waiting.features), to_device(waiting.token_ids[:-1], self._decoder.device)
        x_ND, plan = self._layer_inputs(ids_N, features.final_SD[:-1], [slot], [count], attends=False)
        self._layer.write(x_ND, plan, 0)
        self._cache.extend(slot, count)
        waiting.features, waiting.token_ids = [features[-1:]], waiting.token_ids[-1:]

    def _read(
        self, token_ids_N: Tensor, features: Features | None, slots: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        assert features is not None
        x_ND = self._layer(*self._layer_inputs(token_ids_N, features.final_SD, slots, counts), 0)
        for slot, count in zip(slots, counts, strict=True):
            self._cache.extend(slot, count)
        return x_ND

    def _layer_inputs(
        self, token_ids_N: Tensor, states_ND: Tensor, slots: Sequence[int], counts: Sequence[int], attends: bool = True
    ) -> tuple[Tensor, Plan]:
        """Returns the layer's input rows [N, D], and the plan of their cache writes and attention calls."""
        rows = Rows(slots, [self._cache.lengths[slot] for slot in slots], counts)
        embedded_ND = F.embedding(token_ids_N, self._embedding_VD)
        x_ND = self._fc(torch.cat([embedded_ND, states_ND], dim=-1).to(self._draft_dtype))
        num_heads = self._layer_config.num_heads + self._layer_config.num_kv_heads
        return x_ND, make_plan(rows, self._rotary, self._cache, num_heads, attends)

    # --- learning -----------------------------------------------------------------------------------------------

    def _depths(self, params: Params, rows: Layout, num_depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        config, weights = self._layer_config, _layer_weights(params)
        embedded_ND = F.embedding(rows.read_ids_N, self._embedding_VD).float()
        rotary_NR = rotary_at(rows.positions_N, config, rows.capacities)
        sets = params["fc.weight"].shape[:-2]  # (), or (E,) if E sets of weights are stacked
        device, states_MD = embedded_ND.device, rows.features_ND.expand(*sets, *rows.features_ND.shape)
        left, at = rows.left, np.arange(len(rows.left))  # on the host, so that there is no device synchronisation
        seen = [self._context(params, weights, rows, sets)]
        for depth in range(num_depths):
            if depth:  # rows with a next token in their span go on with it, and attend to their own earlier depths
                kept = np.flatnonzero(left > depth)
                left, at, kept_M = left[kept], at[kept] + 1, to_device(kept, device)
                states_MD = states_MD[..., kept_M, :]
                seen = [part._replace(is_visible_NS=part.is_visible_NS[kept_M]) for part in seen]
            if not len(at):
                return
            at_M = to_device(at, device)
            inputs_MD = _fuse(params, embedded_ND[at_M], states_MD, self._product)
            k, v = plain_keys_values(config, weights, inputs_MD, rotary_NR[at_M], self._product)
            own = torch.eye(len(at_M), dtype=torch.bool, device=at_M.device) if depth else rows.is_visible_NN
            seen.append(Seen(k, v, own))
            states_MD = plain_layer(config, weights, inputs_MD, rotary_NR[at_M], seen, self._product)
            yield at_M, states_MD

    @torch.no_grad()
    def _context(self, params: Params, weights: Params, rows: Layout, sets: Sequence[int]) -> Seen:
        """Returns keys and values [C, G, E] of the context rows, without gradient."""
        embedded_CD = F.embedding(rows.context_ids_C, self._embedding_VD).float()
        features_CD = rows.context_features_CD.expand(*sets, *rows.context_features_CD.shape)
        inputs_CD = _fuse(params, embedded_CD, features_CD, self._product)
        rotary_CR = rotary_at(rows.context_positions_C, self._layer_config, rows.context_capacities)
        keys_values = plain_keys_values(self._layer_config, weights, inputs_CD, rotary_CR, self._product)
        return Seen(*keys_values, rows.is_visible_NC)


def _fresh_config(target: ModelConfig) -> dict[str, Any]:
    one_layer = replace(target, num_layers=1)
    return llama_config(one_layer) | {"architectures": ["EagleLlamaForCausalLM"], "bias": False}


def _fuse(params: Params, embedded_ND: Tensor, states_ND: Tensor, product: Product) -> Tensor:
    return project(params, "fc", torch.cat([embedded_ND.expand_as(states_ND), states_ND], dim=-1), product)


def _layer_weights(params: Params) -> Params:
    return {name.removeprefix(_LAYER): p for name, p in params.items() if name.startswith(_LAYER)}


def _layer_config(config: Mapping[str, Any]) -> LayerConfig:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return LayerConfig(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope_in(config, head_dim),
    )


def _param_shapes(config: Mapping[str, Any], has_bias: bool = False) -> dict[str, tuple[int, ...]]:
    of_layer = llama_layer_shapes(_layer_config(config))
    del of_layer["input_layernorm.weight"]  # EAGLE-1 has no norm between `fc` and the layer
    d = int(config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (d, 2 * d)}
    shapes |= {f"{_LAYER}{name}": dims for name, dims in of_layer.items()}
    return shapes | {"fc.bias": (d,)} if has_bias else shapes


def _check_fits(config: Mapping[str, Any], target: Target, folder: Path) -> None:
    shape = target.decoder.config
    for key, expected in (("vocab_size", shape.vocab_size), ("hidden_size", shape.layer.hidden_size)):
        if key not in config:
            raise ValueError(f"{folder / 'config.json'} has no {key}; it can't be matched with the target")
        if config[key] != expected:
            raise ValueError(
                f"drafter {key} {config[key]} != target {key} {expected}: {folder} was made for another target"
            )
