"""The `small_lm` drafter: an independent small language model with the target's tokenizer.

This is the kind of drafter that Online Speculative Decoding distils online. Its only input is the text, not the
target's hidden states, so any model with the same tokenizer can be used. It drafts on the decoder that also runs
targets, and learns on that decoder's differentiable form. Model families that the decoder does not support run through
transformers.

Axis letters: N rows of a call, S draft vocabulary, D hidden size, V the target's vocabulary, E sets of weights.
Reference: Online Speculative Decoding, arXiv:2310.07177; speculative sampling, arXiv:2211.17192.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS
from onlinespec.core import DrafterWeights, Features, Params, RequestInfo
from onlinespec.drafters.autoregressive import Autoregressive
from onlinespec.drafters.checkpoints import draft_tokens_in, draft_tokens_of, read_side, write_drafter
from onlinespec.drafters.draft_vocab import DraftTokens, DraftVocab
from onlinespec.drafters.head_training import Head, draft_dtype_for
from onlinespec.drafters.settings import Tuning
from onlinespec.drafters.small_lm import adapters
from onlinespec.drafters.small_lm.draft_model import DraftModel, HFDraftModel, OwnDraftModel
from onlinespec.drafters.training_rows import Layout
from onlinespec.host import to_device
from onlinespec.models.base import ModelConfig
from onlinespec.models.checkpoint import find_folder, fingerprint, read_json, read_tensors, tensor_shapes, weight_files
from onlinespec.models.families import llama_config, llama_layer_shapes
from onlinespec.models.linear import MakeLinear, draft_linear_for, learn_product_for, plain_product
from onlinespec.models.loading import Target, read_hf_model, read_model, read_tokenizer
from onlinespec.models.memory import DrafterSize
from onlinespec.models.rope import Rope

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FRESH_LAYERS = 2
_READ_AT_ONCE = 512  # maximum number of prompt tokens per forward pass of prefill


class SmallLM(Autoregressive):
    """A causal language model as the drafter.

    Args:
        target: The target that it drafts for.
        config: The content of its config.json.
        model: Its forward passes for drafting and learning.
        weights: Float32 weights by the names that `model` uses.
        version: The weights version.
        dtype: The dtype in which the weights are saved.
        base: The folder or Hub id that the model was loaded from. Saved adapters refer to it. Empty if untrained.
        make_linear: Makes the matrix products of the head for drafting; by default the fastest ones for the device. If
            given, learning uses plain products, too.
        draft_tokens: Size or ids of the draft vocabulary; see `DraftVocab`.
    """

    def __init__(
        self,
        target: Target,
        config: Mapping[str, Any],
        model: DraftModel,
        weights: Params,
        version: int = 0,
        dtype: torch.dtype = torch.float32,
        base: str = "",
        make_linear: MakeLinear | None = None,
        draft_tokens: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(target)
        self.config, self._dtype, self._base = dict(config), dtype, base
        self._tokenizer: PreTrainedTokenizerBase = target.tokenizer
        self._model, self._cache = model, model.cache
        self.max_context = model.max_context
        self.longest_text = model.config.max_positions - MAX_DRAFT_TOKENS
        self._weights = weights  # of the whole model, including those that do not learn
        self._tuning = Tuning()
        self._num_tokens = self._decoder.config.vocab_size
        device = self._decoder.device
        make_head = make_linear or draft_linear_for(device, self._draft_dtype)
        self._product = plain_product if make_linear else learn_product_for(device)
        head_VD = self._crop_head(weights[model.head_name]).to(self._draft_dtype)
        self.draft_vocab = DraftVocab(head_VD, make_head, draft_tokens, labels_VD=self._decoder.head_VD)
        self.swap(DrafterWeights(self._trained(weights), version))

    # --- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def fresh(cls, target: Target, seed: int = 0, make_linear: MakeLinear | None = None) -> Self:
        """Returns an untrained drafter: two random layers of the target's width, copies of its embedding and head."""
        model = target.decoder
        is_tied = model.head_VD.data_ptr() == model.embedding_VD.data_ptr()
        shape = _fresh_shape(model.config)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.ones(dims) if len(dims) == 1 else torch.randn(dims, generator=generator) * 0.02
            for name, dims in _fresh_shapes(shape).items()
        }
        weights = {name: t.to(model.device) for name, t in weights.items()}
        weights["model.embed_tokens.weight"] = model.embedding_VD.float().clone()
        if not is_tied:
            weights["lm_head.weight"] = model.head_VD.float().clone()
        config = llama_config(shape) | {"tie_word_embeddings": is_tied}
        draft_model = OwnDraftModel(shape, config, weights, make_linear, draft_dtype_for(model))
        return cls(target, config, draft_model, weights, make_linear=make_linear)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        if adapters.is_in(folder):
            return cls._with_adapters(folder, target)
        config, model, weights, dtype = _read(folder, target.decoder.device, draft_dtype_for(target.decoder))
        _check_tokenizer(folder, model.config, target)
        side = read_side(folder)
        if (made_for := side.get("target_fingerprint", target.fingerprint)) != target.fingerprint:
            log.warning(
                "%s was trained for target %s, this target is %s: its drafts may rarely be kept here",
                folder, made_for, target.fingerprint,
            )  # fmt: skip
        version = int(side.get("weights_version", 0))
        drafter = cls(target, config, model, weights, version, dtype, base=str(folder.absolute()))
        drafter.draft_vocab.restore(draft_tokens_in(side))
        return drafter

    @classmethod
    def _with_adapters(cls, folder: Path, target: Target) -> Self:
        config = read_json(folder / adapters.CONFIG)
        side = read_side(folder)
        place = adapters.base_of(config, folder)
        try:
            base = find_folder(place)
        except (ValueError, FileNotFoundError) as error:
            where = f"base_model_name_or_path in {folder / adapters.CONFIG}"
            raise type(error)(f"the model beneath the adapters is not found: {error}; correct {where}") from error
        expected = side.get("base_fingerprint")
        if expected and expected != fingerprint(base):
            raise ValueError(
                f"{folder} holds adapters for a model with fingerprint {expected}, {base} has {fingerprint(base)}; "
                f"correct base_model_name_or_path in {folder / adapters.CONFIG}"
            )
        drafter = cls.load(base, target)
        drafter._base = place
        drafter.tune(adapters.tuning_of(config, folder))
        params = adapters.read(folder, drafter._weights, drafter._tuning)
        drafter.swap(DrafterWeights(params, int(side.get("weights_version", 0))))
        return drafter

    @classmethod
    def size(cls, folder: Path | None, target: ModelConfig) -> DrafterSize:
        if folder is None:
            layers = sum(math.prod(dims) for dims in _fresh_shapes(_fresh_shape(target)).values())
            width = target.layer.hidden_size
            return DrafterSize(layers + 2 * target.vocab_size * width, layers, width)
        if adapters.is_in(folder):
            folder = find_folder(adapters.base_of(read_json(folder / adapters.CONFIG), folder))
        sizes = {name: math.prod(dims) for name, dims in tensor_shapes(folder).items()}
        matrices = {name: dims[-1] for name, dims in tensor_shapes(folder).items() if _is_of_vocabulary(name)}
        layers = sum(count for name, count in sizes.items() if name not in matrices)
        return DrafterSize(sum(sizes.values()), layers, max(matrices.values(), default=target.layer.hidden_size))

    def save(self, folder: Path) -> None:
        version, params = self.weights.version, self.weights.params
        side = self.side(target_fingerprint=self._fingerprint, **draft_tokens_of(self.draft_vocab))
        if self._tuning.what == "adapters":
            side["base_fingerprint"] = fingerprint(find_folder(self._base))
            config, names = adapters.config_of(self._tuning, self._base), (adapters.CONFIG, adapters.WEIGHTS)
            write_drafter(folder, config, adapters.published(params), version, side, names)
        else:
            whole = self._model.published(self._effective(params))
            tensors = {name: t.to(self._dtype) for name, t in whole.items()}
            write_drafter(folder, self.config, tensors, version, side, also=self._tokenizer.save_pretrained)

    def tune(self, tuning: Tuning) -> None:
        if tuning.what == "adapters" and not self._model.can_adapt:
            raise ValueError(
                f"adapters are for models that our decoder runs, not {self.config['architectures'][0]}; "
                "choose --tune layers or all"
            )
        if tuning.what == "adapters" and not self._base:
            raise ValueError(
                "adapters refer to a saved model, and this small_lm is fresh; save it first, and give --drafter DIR"
            )
        self._weights = self._effective(self.weights.params)
        self._tuning = tuning
        self.swap(DrafterWeights(self._trained(self._weights), self.weights.version))

    # --- weights ------------------------------------------------------------------------------------------------

    def _trained(self, weights: Params) -> Params:
        """Returns the part of the whole model's weights that learns, or new adapters if adapters learn."""
        if self._tuning.what == "adapters":
            return adapters.fresh(weights, self._tuning)
        still = () if self._tuning.what == "all" else (self._model.embedding_name, self._model.head_name)
        return {name: t for name, t in weights.items() if name not in still}

    def _effective(self, params: Params) -> Params:
        """Returns the weights of the whole model, differentiable in `params`, the weights that learn."""
        if self._tuning.what == "adapters":
            return self._weights | adapters.merged(self._weights, params, self._tuning)
        return self._weights | params

    def swap(self, weights: DrafterWeights) -> None:
        """Replaces the weights that learn.

        Cached keys and values of older weights are kept. The output stays exact, and no effect on acceptance was
        measurable (docs/log.md).
        """
        learns_head = self._tuning.what == "all"
        if self.drafts or learns_head:
            with torch.no_grad():  # switch last, so that an error leaves no mixture of old and new weights
                effective = self._effective(weights.params)
                head_VD = self._crop_head(effective[self._model.head_name]) if learns_head else None
                take_over = self._model.prepare(effective) if self.drafts else None
                if take_over:
                    take_over()
            if head_VD is not None:
                self.draft_vocab.use_head(head_VD)
        self.weights = weights

    def _crop_head(self, head_VD: Tensor) -> Tensor:
        """Cuts off rows of the head beyond the target's vocabulary. Missing rows are left to `DraftVocab`."""
        return head_VD[..., : self._num_tokens, :]

    # --- drafting -----------------------------------------------------------------------------------------------

    def _capacity(self, info: RequestInfo) -> int:
        return min(info.capacity, self._model.config.max_positions)

    def _can_draft(self, slot: int) -> bool:
        """Whether the longest draft still fits into the model's maximum number of positions."""
        length = self._cache.lengths[slot] + len(self._slots[slot].token_ids)
        return length + MAX_DRAFT_TOKENS <= self._model.config.max_positions

    def _prefill_waiting(self, slot: int) -> None:
        waiting = self._slots[slot]
        ids, num_read = waiting.token_ids, 0
        try:
            while len(ids) - num_read > _READ_AT_ONCE:
                piece = to_device(ids[num_read : num_read + _READ_AT_ONCE], self._decoder.device)
                self._read(piece, None, [slot], [_READ_AT_ONCE])
                num_read += _READ_AT_ONCE
        finally:  # tokens that are in the cache must not be processed again, even after an error
            waiting.token_ids = ids[num_read:]

    def _read(
        self, token_ids_N: Tensor, features: Features | None, slots: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        return self._model.read(self._model.known(token_ids_N), slots, counts)

    # --- learning -----------------------------------------------------------------------------------------------

    def _depths(self, params: Params, rows: Layout, num_depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `HeadTraining._depths`. All depths share their states, because only committed tokens are context.

        So depth d has the states of a draft whose first d tokens were all accepted.
        """
        states_ND = self._model.states(self._effective(params), rows, self._sets(params))
        for depth in range(num_depths):
            at = np.flatnonzero(rows.left > depth) + depth
            if not len(at):
                return
            at_M = to_device(at, states_ND.device)
            yield at_M, states_ND[..., at_M, :]

    def _sets(self, params: Params) -> tuple[int, ...]:
        """Returns (), or (E,) if E sets of weights are stacked."""
        name, one = next(iter(self.weights.params.items()))
        return params[name].shape[: params[name].dim() - one.dim()]

    def _learn_head(self, params: Params, tokens: DraftTokens | None) -> Head:
        if self._tuning.what != "all":
            return super()._learn_head(params, tokens)
        head_VD = self._crop_head(params[self._model.head_name])
        if tokens is None:
            return lambda states: self.draft_vocab.widened(self._product(states, head_VD))
        token_ids_S = tokens.draft_to_target_S.clone()  # autograd refuses tensors that were made in inference mode
        head_SD = head_VD[..., token_ids_S, :]
        return lambda states: self._product(states, head_SD)


def _read(
    folder: Path, device: torch.device, draft_dtype: torch.dtype
) -> tuple[dict[str, Any], DraftModel, Params, torch.dtype]:
    """Returns a checkpoint's config.json, the draft model, its float32 weights, and the dtype they are stored in.

    Raises:
        ValueError: if the model's logits are not a plain matrix product of its hidden states and its head.
    """
    found = read_model(folder, device)
    if found:
        config, shape, weights, dtype = found
        return config, OwnDraftModel(shape, config, weights, draft_dtype=draft_dtype), weights, dtype
    model, config = read_hf_model(folder, device), read_json(folder / "config.json")
    if not model.has_plain_head or model.head_VD.data_ptr() != model.weights[model.weight_names()[1]].data_ptr():
        raise ValueError(
            f"{folder} can't draft: {config['architectures'][0]} does more to its logits than multiply by its head"
        )
    weights = {name: t.clone() for name, t in model.weights.items()}
    stored = next(iter(read_tensors(weight_files(folder)[0], torch.device("cpu"), None).values()))
    return config, HFDraftModel(model), weights, stored.dtype


def _check_tokenizer(folder: Path, shape: ModelConfig, target: Target) -> None:
    """Checks that each token id stands for the same token in drafter and target, as far as both have it.

    Raises:
        ValueError: naming the first id that does not.
    """
    ours = {i: token for token, i in target.tokenizer.get_vocab().items()}
    theirs = {i: token for token, i in read_tokenizer(folder).get_vocab().items()}
    for i in range(min(shape.vocab_size, target.decoder.config.vocab_size)):
        if i in ours and i in theirs and ours[i] != theirs[i]:
            raise ValueError(
                f"the tokenizers differ: token {i} is {ours[i]!r} for the target and {theirs[i]!r} for the drafter "
                f"{folder}; a small_lm must have its target's tokenizer: take a model of the same family"
            )


def _is_of_vocabulary(name: str) -> bool:
    """Whether a tensor is an embedding or an LM head, according to its published name."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "embed_in.weight", "embed_out.weight", "wte.weight"))


def _fresh_shape(target: ModelConfig) -> ModelConfig:
    """Returns the shape of an untrained drafter: the target's, with two layers and without RoPE scaling."""
    layer = replace(target.layer, rope=Rope(target.layer.rope.theta))
    return ModelConfig(layer, _FRESH_LAYERS, target.vocab_size, target.max_positions)


def _fresh_shapes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors except embedding and head, by name."""
    of_layer = llama_layer_shapes(shape.layer)
    layers = {f"model.layers.{i}.{name}": dims for i in range(shape.num_layers) for name, dims in of_layer.items()}
    return layers | {"model.norm.weight": (shape.layer.hidden_size,)}
