"""The model families that our decoder runs: how their config.json is read, and which tensors they have.

Each family is one line of `FAMILIES`. A config with an option that the decoder can't compute is refused, and the error
message names the option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from onlinespec.models.base import ModelConfig
from onlinespec.models.checkpoint import check_tensors
from onlinespec.models.layer import LayerConfig
from onlinespec.models.rope import Rope

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """How a family's layers differ from Llama's.

    Args:
        has_qkv_bias: Whether q, k and v always have a bias. If False, q, k, v and o have one if config.json sets
            `attention_bias`.
        has_head_norms: Whether queries and keys are normalised per head.
        windowed: Which layers have the `sliding_window`: "all", "none", or "by type", which means those of type
            "sliding_attention" in `layer_types`. Like the family's own code, we ignore any other setting.
        has_partial_rotary: Whether the family uses `partial_rotary_factor`.
        fused: Published weights that are several of our weights stacked along their rows, with the names of these.
    """

    model_type: str  # transformers' name
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    windowed: Literal["none", "all", "by type"] = "none"
    has_partial_rotary: bool = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


_FUSED = (
    ("self_attn.qkv_proj.weight", tuple(f"self_attn.{n}_proj.weight" for n in "qkv")),
    ("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
)
FAMILIES = {
    "LlamaForCausalLM": Family("llama"),  # Llama 1 to 3, Vicuna, and others of that shape
    "MistralForCausalLM": Family("mistral", windowed="all"),
    "Phi3ForCausalLM": Family("phi3", windowed="all", has_partial_rotary=True, fused=_FUSED),
    "Qwen2ForCausalLM": Family("qwen2", has_qkv_bias=True, windowed="by type"),
    "Qwen3ForCausalLM": Family("qwen3", has_head_norms=True, windowed="by type"),
}
ARCHITECTURES = tuple(FAMILIES)
_SCALINGS = ("linear", "dynamic", "yarn", "longrope", "llama3")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


# --- config.json --------------------------------------------------------------------------------------------------


class NotOurs(ValueError):
    """Raised for a valid config that our decoder does not support, though transformers may."""


def decoder_config(config: PretrainedConfig, folder: Path) -> ModelConfig:
    """Returns the sizes of a model for our decoder.

    Args:
        folder: The checkpoint directory, for error messages.

    Raises:
        NotOurs: if the decoder does not support the activation function.
        ValueError: naming what is wrong with the config.
    """
    if config.hidden_act != "silu":
        raise NotOurs(f"{folder}: activation {config.hidden_act!r} is not supported; only 'silu' is")
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ValueError(f"{folder / 'config.json'}: {name} is {getattr(config, name)}; it must be at least 1")
    try:
        layer = LayerConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope=rope_of(config, FAMILIES[config.architectures[0]].has_partial_rotary),
        )
        windows = _windows(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    max_positions = _max_positions(config)
    return ModelConfig(layer, config.num_hidden_layers, config.vocab_size, max_positions, windows)


def rope_of(config: PretrainedConfig, has_partial_rotary: bool) -> Rope:
    """Returns a model's rotary embedding. Scaled frequencies are computed by transformers' functions.

    Raises:
        ValueError: for a scaling that is unknown or can't be computed.
    """
    rope = config.rope_parameters or {}
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    share = float(rope.get("partial_rotary_factor") or 1.0) if has_partial_rotary else 1.0
    if kind == "default":
        return Rope(theta, share)
    if kind not in _SCALINGS:
        known = ", ".join(("default", *_SCALINGS))
        raise ValueError(f"rotary scaling {kind!r} is not supported; supported are {known}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    init = ROPE_INIT_FUNCTIONS[kind]

    def scaled(length: int) -> tuple[Tensor, float]:
        frequencies, scale = init(config, torch.device("cpu"), seq_len=length or None)
        return frequencies.float(), float(scale)

    length_of = _LengthOf(kind, _original_length(config))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        for length in {length_of(1), length_of(length_of.original + 1)}:  # a short text, and one that is scaled
            _check_frequencies(*scaled(length), int(head_dim * share))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # a missing or wrong setting
        raise ValueError(f"rotary scaling {kind!r} can't be computed from {rope} ({error!r})") from error
    return Rope(theta, share, length_of, scaled)


def _check_frequencies(frequencies: Tensor, scale: float, rotary_dim: int) -> None:
    if len(frequencies) != rotary_dim // 2:
        raise ValueError(f"it gives {len(frequencies)} frequencies; {rotary_dim} elements of a head turn, in pairs")
    if not (frequencies.isfinite().all() and math.isfinite(scale)):
        raise ValueError("its frequencies are not finite")


def rope_in(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Returns the rotary embedding of a drafter, from a config.json with Llama's keys.

    Its architecture may be unknown to transformers.

    Raises:
        ValueError: as `rope_of`.
    """
    from transformers import LlamaConfig

    keys = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings",
            "original_max_position_embeddings")  # fmt: skip
    try:
        llama = LlamaConfig(head_dim=head_dim, **{key: config[key] for key in keys if config.get(key) is not None})
    except Exception as error:  # whatever transformers raises is a fault of the config
        raise ValueError(" ".join(str(error).split())) from error
    return rope_of(llama, has_partial_rotary=False)


@dataclass(frozen=True)
class _LengthOf:
    """Maps the maximum number of tokens of a request to the text length that its scaling is computed for.

    Only two kinds of scaling depend on it. For `longrope` all that matters is whether it exceeds `original`.
    """

    kind: str
    original: int  # the context length in tokens that the model was trained with, before scaling

    def __call__(self, capacity: int) -> int:
        lengths = {"dynamic": max(capacity, self.original), "longrope": self.original + (capacity > self.original)}
        return lengths.get(self.kind, 0)


def _original_length(config: PretrainedConfig) -> int:
    rope = config.rope_parameters or {}
    named = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(config.max_position_embeddings if rope.get("rope_type") == "dynamic" or not named else named)


def _max_positions(config: PretrainedConfig) -> int:
    """Returns the context length in tokens. For dynamic scaling, config.json has the length without scaling."""
    rope = config.rope_parameters or {}
    factor = float(rope["factor"]) if rope.get("rope_type") == "dynamic" else 1.0
    return int(config.max_position_embeddings * factor)


def _windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer in tokens; () if no layer has one."""
    windowed, count = FAMILIES[config.architectures[0]].windowed, config.num_hidden_layers
    if windowed == "none":
        return ()
    kinds = config.layer_types if windowed == "by type" else ["sliding_attention"] * count
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types name {sorted(unknown)}, which are not supported")
    if len(kinds) != count:
        raise ValueError(f"layer_types name {len(kinds)} layers, num_hidden_layers {count}")
    window = config.sliding_window
    if "sliding_attention" not in kinds or (window is None and windowed == "all"):
        return ()
    if window is None or window < 1:
        raise ValueError(f"sliding_window is {window} where layers have one; it must be at least 1")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# --- tensors ------------------------------------------------------------------------------------------------------


def llama_config(shape: ModelConfig) -> dict[str, Any]:
    """Returns the content of config.json for a float32 Llama of these sizes."""
    layer = shape.layer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": layer.rope.theta,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "torch_dtype": "float32",
    }


def llama_layer_shapes(layer: LayerConfig) -> Shapes:
    """Returns the shapes of the tensors of a Llama's decoder layer, by their published names."""
    d, f = layer.hidden_size, layer.intermediate_size
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    return {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }


def _layer_shapes(config: PretrainedConfig, layer: LayerConfig) -> Shapes:
    """Returns the shapes of a layer's tensors by name, with fused ones split."""
    family = FAMILIES[config.architectures[0]]
    d, f, e = layer.hidden_size, layer.intermediate_size, layer.head_dim
    q, kv = layer.num_heads * e, layer.num_kv_heads * e
    shapes = llama_layer_shapes(layer)
    has_attention_bias = getattr(config, "attention_bias", False)
    if has_attention_bias or family.has_qkv_bias:
        shapes |= {f"self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
    if has_attention_bias and not family.has_qkv_bias:
        shapes["self_attn.o_proj.bias"] = (d,)
    if getattr(config, "mlp_bias", False):
        shapes |= {f"mlp.{n}_proj.bias": (d if n == "down" else f,) for n in ("gate", "up", "down")}
    if family.has_head_norms:
        shapes |= {f"self_attn.{n}_norm.weight": (e,) for n in "qk"}
    return shapes


def checked_weights(
    weights: Mapping[str, Tensor], config: PretrainedConfig, shape: ModelConfig, folder: Path
) -> dict[str, Tensor]:
    """Returns a checkpoint's tensors by our decoder's names, with fused ones split. Every tensor is checked.

    Args:
        weights: The tensors by their published names.
        folder: The checkpoint directory, for error messages.

    Raises:
        ValueError: naming what is missing, unexpected, of another shape, or not finite.
    """
    parts = _layer_shapes(config, shape.layer)
    fused = FAMILIES[config.architectures[0]].fused
    published = dict(parts)
    for name, its_parts in fused:
        rows = sum(published.pop(part)[0] for part in its_parts)
        published[name] = (rows, shape.layer.hidden_size)
    expected: Shapes = {
        f"model.layers.{i}.{name}": dims for i in range(shape.num_layers) for name, dims in published.items()
    }
    hidden = shape.layer.hidden_size
    expected |= {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings or "lm_head.weight" in weights:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    check_tensors(weights, expected, folder)
    unfused = dict(weights)
    for i in range(shape.num_layers):
        for name, its_parts in fused:
            whole = unfused.pop(f"model.layers.{i}.{name}")
            pieces = whole.split([parts[part][0] for part in its_parts])
            unfused |= {f"model.layers.{i}.{part}": piece for part, piece in zip(its_parts, pieces, strict=True)}
    return unfused


def published_weights(weights: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Returns our decoder's tensors by the family's published names, fused again where the family fuses them."""
    fused = FAMILIES[architecture].fused
    published = dict(weights)
    for name, parts in fused:
        prefixes = [key.removesuffix(parts[0]) for key in weights if key.endswith(parts[0])]
        for prefix in prefixes:
            published[prefix + name] = torch.cat([published.pop(prefix + part) for part in parts])
    return published
