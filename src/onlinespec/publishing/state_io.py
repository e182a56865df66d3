"""Serialisation of a learner's state to tensors and a JSON tree, and back. No pickle, so loading runs no foreign code.

A state is a tree of named tuples, tuples, lists, dicts with string keys, tensors, numbers, strings and None. A tensor
that occurs several times is stored once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_OURS = "onlinespec.learners."  # imported on demand; other modules must be imported already


def flattened(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Splits a state into its tensors, by number, and a JSON tree that refers to them by number.

    Raises:
        ValueError: if the state holds an object of another type; the message names it.

    >>> flattened({"rounds": 3, "pair": (torch.ones(2), None)})[1]
    {'dict': {'rounds': 3, 'pair': {'tuple': [{'tensor': '0'}, None]}}}
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by id(tensor); the state keeps the tensors alive
    storages: set[int] = set()

    def named(tensor: Tensor) -> str:
        if id(tensor) not in names:
            name = names[id(tensor)] = str(len(names))
            storage = tensor.untyped_storage().data_ptr()
            is_shared = storage in storages  # safetensors refuses tensors that share memory
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
                return {"float": str(part)}  # JSON has no inf or nan
            case None | bool() | int() | float() | str():
                return part
        raise ValueError(
            f"a learner's state holds a {type(part).__name__}, which can't be saved; make it of named tuples, tuples, "
            "lists, dicts with texts as keys, tensors, numbers and texts"
        )

    return tensors, tree(state)


def rebuilt(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Rebuilds a state from the result of `flattened`.

    Raises:
        ValueError: if the tree is malformed, or a named tuple in it has other fields now or its module is not imported.
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
