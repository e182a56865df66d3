"""The parts of a transformers model: finds its layers, runs its head without them, records what they read and write."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass
class States(BaseModelOutputWithPast):  # type: ignore[misc]
    """Stands in for the output class of a family's layers, with the final states only."""

    cross_attentions: None = None
    router_logits: None = None


class Given(nn.Module):
    """Stands in for a model's layers. Returns its input as their output."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> States:
        return States(last_hidden_state=inputs_embeds)


def find_body(model: PreTrainedModel) -> nn.Module:
    """Returns the module that turns tokens into final states: `get_decoder()`, or the first child that is a model.

    Raises:
        ValueError: if there is neither.
    """
    parts = [model.get_decoder(), *(part for part in model.children() if isinstance(part, PreTrainedModel))]
    body = next((part for part in parts if part is not model), None)
    if body is None:
        raise ValueError(f"{type(model).__name__} is not supported: its layers can't be told from its head")
    return body


def without_layers(model: PreTrainedModel, body: nn.Module) -> nn.Module:
    """Returns a copy of a model that runs only its head: it takes the final states as `inputs_embeds`.

    All weights are shared with the model, which is not changed.
    """
    *way, last = next(path for path, module in model.named_modules() if module is body).split(".")
    shell = owner = shallow(model)
    for step in way:
        owner._modules[step] = shallow(owner.get_submodule(step))
        owner = owner.get_submodule(step)
    owner._modules[last] = Given()
    return shell


def shallow(module: nn.Module) -> nn.Module:
    """Returns a copy with the same children, which can be replaced in it without changing the original."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def find_layers(body: nn.Module, count: int) -> nn.ModuleList | None:
    """Returns the model's layers, the outermost list with `count` modules; None if there is none."""
    return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def entering(rows: list[Tensor]) -> Any:
    """Returns a forward pre-hook that appends the states [tokens, D] that a layer reads to `rows`."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"])[0])

    return keep


def leaving(rows: list[Tensor]) -> Any:
    """Returns a forward hook that appends the states [tokens, D] that a layer returns to `rows`."""

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output)[0])

    return keep
