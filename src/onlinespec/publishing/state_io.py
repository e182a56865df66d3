"""A learner's state as tensors and a tree in JSON, and back: no pickle, so that reading one runs no code.

States are trees of named tuples, tuples, lists, dicts, tensors, numbers and texts. A tensor is stored once, however
many places hold it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_OURS = "onlinespec.learners."  # imported if need be; modules of others must have been


def flattened(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a state by number, and a tree in which their numbers stand for them.

    Raises:
        ValueError: naming the type of what is none of the above.

    >>> flattened({"rounds": 3, "pair": (torch.ones(2), None)})[1]
    {'dict': {'rounds': 3, 'pair': {'tuple': [{'tensor': '0'}, None]}}}
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by the id of a tensor, which the state keeps alive
    storages: set[int] = set()

    def named(tensor: Tensor) -> str:
        if id(tensor) not in names:
            name = names[id(tensor)] = str(len(names))
            storage = tensor.untyped_storage().data_ptr()
            is_shared = storage in storages  # a safetensors file refuses to hold the same memory twice
            storages.add(storage)
            own = tensor.detach()
            tensors[name] = own.clone(memory_format=torch.contiguous_format) if is_shared else own.contiguous()
        return names[id(tensor)]

    def tree(part: Any) -> Any:
        match part:
            case Tensor():
                return {"tensor": named(part)}
            case dict() if all(isinstance(key, str) for key in part):
                return {"dict": {key: tree(value) for key, value in part.items()}}
            case tuple() if hasattr(part, "_fields"):
                kind = type(part)
                fields = {name: tree(getattr(part, name)) for name in kind._fields}
                return {"named": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
            case tuple() | list():
                return {"tuple" if isinstance(part, tuple) else "list": [tree(each) for each in part]}
            case float() if not math.isfinite(part):
                return {"float": str(part)}  # JSON has no such numbers
            case None | bool() | int() | float() | str():
                return part
        raise ValueError(
            f"a learner's state holds a {type(part).__name__}, which can't be saved; make it of named tuples, tuples, "
            "lists, dicts with texts as keys, tensors, numbers and texts"
        )

    return tensors, tree(state)


def rebuilt(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The state that `flattened` took apart.

    Raises:
        ValueError: if the tree is none, or its classes are not those of today.
    """
    try:
        match tree:
            case {"tensor": name}:
                return tensors[name]
            case {"dict": content}:
                return {key: rebuilt(tensors, value) for key, value in content.items()}
            case {"named": path, "fields": fields}:
                return _named_tuple(path, {name: rebuilt(tensors, value) for name, value in fields.items()})
            case {"tuple": content}:
                return tuple(rebuilt(tensors, value) for value in content)
            case {"list": content}:
                return [rebuilt(tensors, value) for value in content]
            case {"float": text}:
                return float(text)
            case None | bool() | int() | float() | str():
                return tree
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"this is no description of a state ({type(error).__name__}: {error})") from error
    raise ValueError(f"a state can't hold {str(tree)[:40]}; it was saved by another version of onlinespec")


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
