"""Finds the layers inside a transformers model, runs a model without them, and records their inputs and outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass
class States(BaseModelOutputWithPast):  # type: ignore[misc]
    """A stand-in for the output of a family's layers: final states only."""

    cross_attentions: None = None
    router_logits: None = None


class Given(nn.Module):
    """Replaces a model's layers, and returns its input as their output."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> States:
        return States(last_hidden_state=inputs_embeds)


def find_body(model: PreTrainedModel) -> nn.Module:
    """Returns the module that turns tokens into final states: the family's decoder, or the part that is a model."""
    parts = [model.get_decoder(), *(part for part in model.children() if isinstance(part, PreTrainedModel))]
    body = next((part for part in parts if part is not model), None)
    if body is None:
        raise ValueError(f"{type(model).__name__} is not supported: its layers can't be told from its head")
    return body


def without_layers(model: PreTrainedModel, body: nn.Module) -> nn.Module:
    """Returns a copy that shares all weights and takes final states as `inputs_embeds`, so that only the head runs."""
    *way, last = next(path for path, module in model.named_modules() if module is body).split(".")
    shell = owner = shallow(model)
    for step in way:
        owner._modules[step] = shallow(owner.get_submodule(step))
        owner = owner.get_submodule(step)
    owner._modules[last] = Given()
    return shell


def shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def find_layers(body: nn.Module, count: int) -> nn.ModuleList | None:
    """Returns the outermost list with `count` modules; None if there is none."""
    return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def entering(rows: list[Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"])[0])

    return keep


def leaving(rows: list[Tensor]) -> Any:
    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output)[0])

    return keep
