"""Low-rank adapters (LoRA) of a model's linear layers, saved in the file format of peft.

A weight W [F, D] becomes W + alpha / rank * B @ A with A [rank, D] and B [F, rank]; B is initially zero. Only A and B
learn. Embedding, LM head and norms have no adapters.
Reference: LoRA, arXiv:2106.09685; the file layout is peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onlinespec.core import Params
from onlinespec.drafters.settings import Tuning
from onlinespec.models.checkpoint import check_tensors, read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_PLAIN = {  # peft's options for variants of LoRA, which are not supported, with the values that mean ordinary LoRA
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


def is_in(folder: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (folder / CONFIG).is_file()


def fresh(weights: Mapping[str, Tensor], tuning: Tuning) -> Params:
    """Returns new float32 adapters for all linear layers of the decoder layers.

    A is random and B is zero, so the model's output does not change yet.

    Args:
        weights: The weights of the model, by our decoder's names.
    """
    generator, params = torch.Generator().manual_seed(0), {}
    for name, weight in weights.items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            module, (num_outputs, num_inputs) = name.removesuffix(".weight"), weight.shape
            a = torch.randn(tuning.rank, num_inputs, generator=generator) / num_inputs**0.5
            params[module + _A] = a.to(weight.device)
            params[module + _B] = torch.zeros(num_outputs, tuning.rank, device=weight.device)
    return params


def merged(weights: Mapping[str, Tensor], params: Params, tuning: Tuning) -> Params:
    """Returns the adapted weights, W + alpha / rank * B @ A, differentiable in the adapters.

    Weights without an adapter are left out. Adapters of E sets, stacked to [E, ...], give stacked weights.
    """
    scale = tuning.alpha / tuning.rank
    modules = [name.removesuffix(_A) for name in params if name.endswith(_A)]
    return {f"{m}.weight": weights[f"{m}.weight"] + scale * (params[m + _B] @ params[m + _A]) for m in modules}


def config_of(tuning: Tuning, base: str) -> dict[str, Any]:
    """Returns the content of adapter_config.json for adapters made by `fresh`.

    Args:
        base: Path or Hub id of the model that the adapters are for.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def published(params: Params) -> Params:
    """Returns the adapters by the names that peft gives them."""
    return {_PREFIX + name: t for name, t in params.items()}


def base_of(config: Mapping[str, Any], folder: Path) -> str:
    """Returns the path or Hub id of the model that adapters are for.

    Raises:
        ValueError: if the config does not name it.
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / CONFIG}: base_model_name_or_path is {base!r}; it must name the model underneath")
    return base


def tuning_of(config: Mapping[str, Any], folder: Path) -> Tuning:
    """Returns the rank and alpha of saved adapters.

    Raises:
        ValueError: if the config is not ordinary LoRA (the message names the option), or rank and alpha are not valid
            numbers.
    """
    path = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is supported")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise ValueError(f"{path}: {key} is {config[key]!r}, which is not supported; it must be {plain[0]!r}")
    try:
        return Tuning("adapters", int(config["r"]), float(config["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: r and lora_alpha must be numbers ({error})") from error


def read(folder: Path, weights: Mapping[str, Tensor], tuning: Tuning) -> Params:
    """Reads saved adapters as float32 on the device of the weights.

    Args:
        weights: The weights of the model that the adapters are for, by our decoder's names.
        tuning: The rank and alpha of the adapters, from `tuning_of`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if there are no adapters, or one does not fit the model's weights; the message names it.
    """
    some = next(iter(weights.values()))
    tensors = read_tensors(folder / WEIGHTS, some.device, torch.float32)
    params = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for module in {name.removesuffix(_A).removesuffix(_B) for name in params}:
        weight = weights.get(f"{module}.weight")
        if weight is None or weight.dim() != 2:
            raise ValueError(f"{folder / WEIGHTS}: {module} is no product of the model underneath")
        expected |= {module + _A: (tuning.rank, weight.shape[1]), module + _B: (weight.shape[0], tuning.rank)}
    if not params:
        raise ValueError(f"{folder / WEIGHTS} holds no adapters")
    check_tensors(params, expected, folder)
    return params
