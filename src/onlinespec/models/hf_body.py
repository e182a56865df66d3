"""Inside a model of transformers: its layers found, left out for a while, and listened to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass
class States(BaseModelOutputWithPast):  # type: ignore[misc]
    """What the layers of any family would return, less all that is beside the point."""

    cross_attentions: None = None
    router_logits: None = None


class Given(nn.Module):
    """Stands where a model's layers were, and returns the states it is given as theirs."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> States:
        return States(last_hidden_state=inputs_embeds)


def find_body(model: PreTrainedModel) -> nn.Module:
    """What turns tokens into final states: what the family calls its decoder, else the part that is a model."""
    parts = [model.get_decoder(), *(part for part in model.children() if isinstance(part, PreTrainedModel))]
    body = next((part for part in parts if part is not model), None)
    if body is None:
        raise ValueError(f"{type(model).__name__} is not supported: its layers can't be told from its head")
    return body


def without_layers(model: PreTrainedModel, body: nn.Module) -> nn.Module:
    """A copy that shares all weights and takes final states as `inputs_embeds`: only what stands behind them runs."""
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
    """The outermost list of as many modules as there are layers."""
    return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def entering(rows: list[Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"])[0])

    return keep


def leaving(rows: list[Tensor]) -> Any:
    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output)[0])

    return keep
