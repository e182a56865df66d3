"""The families that our own decoder runs: what their config.json means to it, and the tensors they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from onlinespec.models.base import ModelConfig
from onlinespec.models.checkpoint import check_tensors
from onlinespec.models.layer import LayerConfig

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


class NotOurs(ValueError):
    """A sound config that asks for what our forward does not compute; transformers may."""


def decoder_config(config: PretrainedConfig, folder: Path) -> ModelConfig:
    """The sizes our forward needs.

    Raises:
        NotOurs: naming what it does not compute.
        ValueError: naming what is wrong with the config.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise NotOurs(f"{folder}: rotary scaling {rope['rope_type']!r} is not supported; only 'default' is")
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if has_window or getattr(config, "use_sliding_window", False):
        raise NotOurs(f"{folder}: sliding-window attention is not supported")
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
            rope_theta=float(rope["rope_theta"]),
        )
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return ModelConfig(layer, config.num_hidden_layers, config.vocab_size, config.max_position_embeddings)


def _layer_shapes(config: PretrainedConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    d, f, e = layer.hidden_size, layer.intermediate_size, layer.head_dim
    q, kv = layer.num_heads * e, layer.num_kv_heads * e
    is_qwen2, is_qwen3 = config.model_type == "qwen2", config.model_type == "qwen3"
    shapes: dict[str, tuple[int, ...]] = {
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
    has_attention_bias = is_qwen2 or getattr(config, "attention_bias", False)
    if has_attention_bias:
        shapes |= {f"self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
    if has_attention_bias and not is_qwen2:
        shapes["self_attn.o_proj.bias"] = (d,)
    if getattr(config, "mlp_bias", False):
        shapes |= {f"mlp.{n}_proj.bias": (d if n == "down" else f,) for n in ("gate", "up", "down")}
    if is_qwen3:
        shapes |= {f"self_attn.{n}_norm.weight": (e,) for n in "qk"}
    return shapes


def check_weights(weights: Mapping[str, Tensor], config: PretrainedConfig, shape: ModelConfig, folder: Path) -> None:
    layer_shapes = _layer_shapes(config, shape.layer)
    expected: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}": dims for i in range(shape.num_layers) for name, dims in layer_shapes.items()
    }
    hidden = shape.layer.hidden_size
    expected |= {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings or "lm_head.weight" in weights:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    check_tensors(weights, expected, folder)
