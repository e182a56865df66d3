"""Causal language models that transformers runs: one sequence at a time, each with its own cache.

The family's own code computes the layers and whatever follows the last state (a bias, a scale, a soft cap). What we
rely on is tested once at load: that layers and head can be run separately, and that a cropped cache continues
correctly. The output equals plain decoding's except for near-ties of logits, because the bits of transformers' products
change with the number of rows.

Axis letters: N new tokens of a call, M rows with logits, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from onlinespec.core import Features
from onlinespec.models.base import Model, ModelConfig, Output, check_call, last_rows
from onlinespec.models.hf_body import entering, find_body, find_layers, leaving, without_layers
from onlinespec.models.kv_cache import Slots
from onlinespec.models.layer import LayerConfig
from onlinespec.models.rope import Rope

log = logging.getLogger(__name__)

_TOLERANCES = {torch.float32: 1e-3}  # between two ways to compute logits, relative to the largest logit ...
_COARSE = 0.2  # ... and in other dtypes
_LOUD = 100.0  # logits so large that any soft cap in use changes them
_KEPT_STATES = ("full_attention", "sliding_attention", "chunked_attention")  # layer types whose cache can be cropped
_OLD_CONSTANTS = (".masked_bias", ".rotary_emb.inv_freq")  # buffers that older versions saved with the weights
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class HFCache(Slots):
    """A transformers cache for each slot. Keys outside a sliding window are kept, so that it can be cropped."""

    def __init__(self, bytes_per_token: int) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token
        self._caches: dict[int, DynamicCache] = {}

    def take(self, slot: int, capacity: int) -> None:
        super().take(slot, capacity)
        self._caches[slot] = DynamicCache()  # without a config it keeps all keys; masks apply the sliding windows

    def release(self, slot: int) -> None:
        super().release(slot)
        del self._caches[slot]

    def capacity(self, slot: int) -> int:
        return self.limits[slot]

    def crop(self, slot: int, length: int) -> None:
        super().crop(slot, length)
        for layer in self._caches[slot].layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def of(self, slot: int) -> DynamicCache:
        """Returns the transformers cache of a slot."""
        return self._caches[slot]


class HFModel(Model[HFCache]):
    """A model that transformers runs.

    `forward` also raises ValueError if aux layers are asked for and the model's layers were not found.

    Args:
        model: A causal language model loaded by transformers; its weights are used in place.

    Raises:
        ValueError: naming the architecture, if its layers and head can't be run separately, or its cache can't be
            cropped.
    """

    path = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        self._model = model.eval().requires_grad_(False)
        self.device, self.dtype = model.device, model.dtype
        self.config = model_config(model.config, self._name)
        self.embedding_VD = self._matrix(model.get_input_embeddings(), "embedding")
        self.head_VD = self._matrix(model.get_output_embeddings(), "head")
        self._body = find_body(model)
        self._behind = without_layers(model, self._body)
        self._layers = find_layers(self._body, self.config.num_layers)
        self.num_forwards = 0
        with torch.inference_mode():
            self._try()

    def new_cache(self) -> HFCache:
        layer = self.config.layer
        elements = 2 * self.config.num_layers * layer.num_kv_heads * layer.head_dim
        return HFCache(elements * self.dtype.itemsize)

    @torch.inference_mode()
    def forward(
        self,
        token_ids_N: Tensor,
        slots: Sequence[int],
        counts: Sequence[int],
        cache: HFCache,
        num_logits: Sequence[int] | None = None,
        aux_layer_ids: Collection[int] = (),
    ) -> Output:
        check_call(len(token_ids_N), slots, counts, num_logits)
        if aux_layer_ids and self._layers is None:
            raise ValueError(f"{self._name}: its layers were not found, so a drafter can't read their states")
        for slot, count in zip(slots, counts, strict=True):
            cache.check_room(slot, count)
        self.num_forwards += 1
        states: list[Tensor] = []
        aux: dict[int, list[Tensor]] = {layer_id: [] for layer_id in aux_layer_ids}
        with self._listening(aux):
            for slot, count, ids in zip(slots, counts, token_ids_N.split(list(counts)), strict=True):
                output = self._body(input_ids=ids[None], past_key_values=cache.of(slot), use_cache=True)
                states.append(output.last_hidden_state[0])
                cache.extend(slot, count)
        hidden_ND = torch.cat(states)
        logits_MV = self.head(last_rows(hidden_ND, counts, num_logits))
        aux_hidden_states = {layer_id: torch.cat(rows) for layer_id, rows in aux.items() if rows}
        return Output(logits_MV, Features(hidden_ND, aux_hidden_states))

    @torch.inference_mode()
    def head(self, hidden_states_MD: Tensor) -> Tensor:
        return self._behind(inputs_embeds=hidden_states_MD[None]).logits[0].float()

    # --- for weights that learn -------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights by their published names, not copied; a shared weight has one name."""
        return {name: p.detach() for name, p in self._model.named_parameters()}

    def weight_names(self) -> tuple[str, str]:
        """Returns the names of the embedding's and the head's weight."""
        modules = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        named = list(self._model.named_parameters())
        embedding, head = (next(name for name, p in named if p is module.weight) for module in modules)
        return embedding, head

    @torch.no_grad()
    def prepare(self, weights: Mapping[str, Tensor]) -> Callable[[], None]:
        """Prepares other weights. Returns a function that switches to them and can't fail. The cache is kept.

        Raises:
            ValueError: if a weight has another shape.
        """
        pairs = [(p, weights[name].detach().to(p.dtype)) for name, p in self._model.named_parameters()]
        for p, new in pairs:
            if new.shape != p.shape:
                raise ValueError(f"a weight has shape {tuple(new.shape)}, expected {tuple(p.shape)}")

        def take_over() -> None:
            for p, new in pairs:
                p.copy_(new)

        return take_over

    def states(self, weights: Mapping[str, Tensor], token_ids_N: Tensor) -> Tensor:
        """Returns the final states [N, D] of a whole text, differentiable in the given weights."""
        way = next(path for path, module in self._model.named_modules() if module is self._body)
        own = {name.removeprefix(f"{way}."): t for name, t in weights.items() if name.startswith(f"{way}.")}
        inputs = {"input_ids": token_ids_N[None], "use_cache": False}
        states_ND: Tensor = functional_call(self._body, own, kwargs=inputs).last_hidden_state[0]
        return states_ND

    def _matrix(self, module: nn.Module | None, role: str) -> Tensor:
        weight = getattr(module, "weight", None)
        dims = (self.config.vocab_size, self.config.layer.hidden_size)
        if weight is None or tuple(weight.shape) != dims:
            found = "none" if weight is None else tuple(weight.shape)
            raise ValueError(f"{self._name} is not supported: its {role} has shape {found}, drafters need {dims}")
        return weight.detach()

    @contextmanager
    def _listening(self, aux: dict[int, list[Tensor]]) -> Iterator[None]:
        """Inside the block, forward passes append the states [count, D] after layer n to `aux[n]`, for its keys n."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers or ()):
                if index == 0 and 0 in aux:
                    stack.enter_context(layer.register_forward_pre_hook(entering(aux[0]), with_kwargs=True))
                if index + 1 in aux:
                    stack.enter_context(layer.register_forward_hook(leaving(aux[index + 1])))
            yield

    # --- checks at load ---------------------------------------------------------------------------------------------

    def _try(self) -> None:
        """Checks that a pass in two pieces, with a cropped draft between them, gives the logits of a single call.

        Also checks that the head, applied to the last hidden states, gives the same logits.
        """
        size = min(8, self.config.max_positions)
        ids = torch.linspace(0, self.config.vocab_size - 1, size, device=self.device).long()
        try:
            whole_NV = self._model(input_ids=ids[None], use_cache=False).logits[0].float()
            states_ND = self._body(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            rebuilt_NV = self.head(states_ND)
            pieces_NV = self._run_with_a_wrong_draft(ids)
        except Exception as error:  # any exception type: unsupported families fail in different ways
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self._name} is not supported: its layers, head and cache can't be run apart ({reason})"
            ) from error
        if not self._is_close(rebuilt_NV, whole_NV):
            raise ValueError(f"{self._name} is not supported: its logits can't be rebuilt from its last hidden states")
        if not self._is_close(pieces_NV, whole_NV):
            raise ValueError(f"{self._name} is not supported: its cache does not forget drafts that were refused")
        self._find_head(states_ND)
        self.num_forwards = 0

    def _run_with_a_wrong_draft(self, ids: Tensor) -> Tensor:
        cache, half = self.new_cache(), len(ids) // 2
        cache.take(0, len(ids))
        first = self.forward(torch.cat([ids[:half], ids[:-half].flip(0)]), [0], [len(ids)], cache).logits_MV[:half]
        cache.crop(0, half)
        return torch.cat([first, self.forward(ids[half:], [0], [len(ids) - half], cache).logits_MV])

    def _is_close(self, logits_NV: Tensor, wanted_NV: Tensor) -> bool:
        error = (logits_NV - wanted_NV).abs().max() / wanted_NV.abs().max()
        return bool(error <= _TOLERANCES.get(self.dtype, _COARSE))

    def _find_head(self, states_ND: Tensor) -> None:
        """Sets `has_plain_head`: whether logits are a product with the head's matrix, or with a multiple of it.

        In the second case, head_VD becomes that multiple.
        """
        loud_ND = states_ND * (_LOUD / F.linear(states_ND, self.head_VD).float().abs().max()).to(self.dtype)
        plain_NV, logits_NV = F.linear(loud_ND, self.head_VD).float(), self.head(loud_ND)
        scale = (plain_NV * logits_NV).sum() / plain_NV.square().sum()
        error = (logits_NV - scale * plain_NV).abs().max() / logits_NV.abs().max()
        silence_NV = self.head(torch.zeros_like(states_ND))
        self.has_plain_head = bool(error <= 1e-2) and not silence_NV.any()
        if self.has_plain_head and (scale - 1).abs() > 1e-3:
            self.head_VD = (self.head_VD.float() * scale).to(self.dtype)


def load_hf(folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> HFModel:
    """Loads a checkpoint directory through transformers. Every tensor must be there, and finite.

    Raises:
        ValueError: naming the architecture if it is not supported, or the tensors that do not fit.
    """
    with _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **_attention(config),
            )
        except Exception as error:  # whatever transformers raises is a fault of the checkpoint
            raise ValueError(f"{folder}: transformers can't load it ({' '.join(str(error).split())[:300]})") from error
    _check_loading(info, folder)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {name} holds values that are not finite (NaN or infinity)")
    log.info("%s runs through transformers, one sequence at a time; ours is faster", type(model).__name__)
    try:
        return HFModel(model.to(device))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{folder}: {error}") from error


def check_architecture(config: PretrainedConfig, architecture: str, folder: Path) -> None:
    """Refuses unsupported architectures before any weights are read.

    Raises:
        ValueError: naming the architecture, if it is no causal language model or its cache can't be cropped.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"{folder}: architecture {architecture} is not supported: it has an encoder; give a decoder")
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    classes = found if isinstance(found, tuple) else (found,)
    known = [one.__name__ for one in classes]
    if architecture not in known:
        raise ValueError(
            f"{folder}: architecture {architecture} is not supported: the causal language model that transformers has "
            f"for model_type {config.model_type!r} is {' or '.join(known) or 'none'}"
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(_KEPT_STATES)
    if any(getattr(one, "_is_stateful", False) for one in classes) or kinds:
        raise ValueError(
            f"{folder}: architecture {architecture} is not supported: it keeps a state instead of keys and values, "
            "which can't go back when a draft is refused"
        )


def model_config(config: PretrainedConfig, name: str) -> ModelConfig:
    """Returns the sizes that decoding and drafters need. Families have various names for them in config.json.

    Raises:
        ValueError: naming the architecture, if a size is not in the config.
    """
    text = config.get_text_config()
    context = _first(text, *_CONTEXT_NAMES)
    if context is None:
        raise ValueError(f"{name}: config.json names no context length; add max_position_embeddings")
    num_layers, vocab_size = _first(text, "num_hidden_layers"), _first(text, "vocab_size")
    if num_layers is None or vocab_size is None:
        raise ValueError(f"{name}: config.json names no num_hidden_layers or no vocab_size")
    return ModelConfig(_layer_config(text, name), num_layers, vocab_size, context)


def _layer_config(config: PretrainedConfig, name: str) -> LayerConfig:
    """Returns the sizes of a layer, for memory estimates and new drafters. The model itself does not run on them."""
    hidden, heads = _first(config, "hidden_size"), _first(config, "num_attention_heads")
    if hidden is None or heads is None:
        raise ValueError(f"{name}: config.json names no hidden_size or no num_attention_heads")
    head_dim = _first(config, "head_dim") or hidden // heads
    eps = getattr(config, "rms_norm_eps", None)
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return LayerConfig(
        hidden_size=hidden,
        intermediate_size=_first(config, "intermediate_size", "ffn_dim") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=_first(config, "num_key_value_heads") or heads,
        head_dim=head_dim + head_dim % 2,
        rms_norm_eps=1e-6 if eps is None else float(eps),
        rope=Rope() if theta is None else Rope(float(theta)),
    )


def _first(config: PretrainedConfig, *names: str) -> int | None:
    """Returns the first of these fields that is a positive whole number; None if none is."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _attention(config: PretrainedConfig) -> dict[str, str]:
    """Chooses plain attention for models that cap scores, because torch's fused attention would ignore the cap."""
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if is_capped else {}


def _check_loading(info: dict[str, Any], folder: Path) -> None:
    faults = {"missing_keys": "missing", "unexpected_keys": "not part of the model", "mismatched_keys": "misshapen"}
    for key, words in faults.items():
        if names := sorted(str(name) for name in info[key] if not str(name).endswith(_OLD_CONSTANTS)):
            raise ValueError(
                f"{folder}: {len(names)} tensors are {words}, by what config.json describes: {', '.join(names[:3])}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and log lines; errors are still raised."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
