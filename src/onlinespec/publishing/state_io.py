"""A learner's state as tensors and a description in JSON, and back: no pickle, so that reading one runs no code.

States are trees of named tuples, tuples, lists, dicts, tensors, numbers and texts. The same object may hang in several
places of one, and learners ask with `is` (whether a hint was used, whether the mean plays): what was one object comes
back as one, and a tensor is stored once, however often it is met.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_OURS = "onlinespec.learners."  # imported if need be; modules of others must have been


def flattened(state: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors of a state by number, and its nodes, each behind those it is made of; the last is the state.

    Raises:
        ValueError: naming the type of what is none of the above.

    >>> tensors, nodes = flattened({"rounds": 3, "pair": (torch.ones(2), None)})
    >>> nodes
    [['value', 3], ['tensor', '0'], ['value', None], ['tuple', [1, 2]], ['dict', {'rounds': 0, 'pair': 3}]]
    """
    flat = _Flat()
    flat.add(state)
    return flat.tensors, flat.nodes


def rebuilt(tensors: Mapping[str, Tensor], nodes: Sequence[Any]) -> Any:
    """The state that `flattened` took apart.

    Raises:
        ValueError: if the description is not one, or its classes are not those of today.
    """
    made: list[Any] = []
    try:
        for kind, content, *names in nodes:
            made.append(_made(kind, content, names, made, tensors))
        return made[-1]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"this is no description of a state ({type(error).__name__}: {error})") from error


class _Flat:
    """A state being taken apart."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.nodes: list[Any] = []
        self._places: dict[int, int] = {}  # by the id of an object; all of them live as long as the state
        self._storages: set[int] = set()

    def add(self, part: Any) -> int:
        """The place of a part among the nodes."""
        if id(part) in self._places:
            return self._places[id(part)]
        node = self._node(part)
        self.nodes.append(node)
        if isinstance(part, Tensor | tuple | list | dict):
            self._places[id(part)] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _node(self, part: Any) -> list[Any]:
        match part:
            case Tensor():
                name = str(len(self.tensors))
                self.tensors[name] = self._own(part)
                return ["tensor", name]
            case dict() if all(isinstance(key, str) for key in part):
                return ["dict", {key: self.add(value) for key, value in part.items()}]
            case tuple() if hasattr(part, "_fields"):
                kind = type(part)
                fields = {name: self.add(getattr(part, name)) for name in kind._fields}
                return ["named", fields, f"{kind.__module__}:{kind.__qualname__}"]
            case tuple() | list():
                return ["tuple" if isinstance(part, tuple) else "list", [self.add(each) for each in part]]
            case float() if not math.isfinite(part):
                return ["float", str(part)]  # JSON has no such numbers
            case None | bool() | int() | float() | str():
                return ["value", part]
        raise ValueError(
            f"a learner's state holds a {type(part).__name__}, which can't be saved; make it of named tuples, tuples, "
            "lists, dicts with texts as keys, tensors, numbers and texts"
        )

    def _own(self, tensor: Tensor) -> Tensor:
        """In memory that no other tensor has: a safetensors file refuses to hold the same memory twice."""
        storage, tensor = tensor.untyped_storage().data_ptr(), tensor.detach()
        is_shared = storage in self._storages
        self._storages.add(storage)
        return tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()


def _made(kind: str, content: Any, names: Sequence[str], made: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: made[place] for key, place in content.items()}
        case "named":
            return _named_tuple(names[0], {name: made[place] for name, place in content.items()})
        case "tuple":
            return tuple(made[place] for place in content)
        case "list":
            return [made[place] for place in content]
        case "float":
            return float(content)
        case "value":
            return content
    raise ValueError(f"a state can't hold a {kind!r}; it was saved by another version of onlinespec")


def _named_tuple(path: str, fields: Mapping[str, Any]) -> Any:
    module_name, _, name = path.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name.startswith(_OURS):
        module = import_module(module_name)
    if module is None:
        raise ValueError(f"the state is of {path}, whose module is not loaded; make the learner before its state")
    kind: Any = module
    for part in name.split("."):
        kind = getattr(kind, part, None)
    known = tuple(getattr(kind, "_fields", ())) if isinstance(kind, type) and issubclass(kind, tuple) else ()
    if set(known) != set(fields):
        raise ValueError(f"the state is of {path} with {sorted(fields)}, which has {sorted(known)} today")
    return kind(**fields)
