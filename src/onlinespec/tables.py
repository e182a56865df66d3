"""Literal tables of lazy paths: a name stands for "package.module:Class", imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def resolve(table: Mapping[str, str], name: str, kind: str) -> Any:
    """What a name of the table stands for; "pkg.module:Class" reaches things outside the table.

    Args:
        kind: What the table holds ("learner", "workload"), for the messages.

    Raises:
        ValueError: the name is neither in the table nor an importable path.
    """
    path = table.get(name, name)
    if ":" not in path:
        known = ", ".join(sorted(table))
        raise ValueError(f'unknown {kind} "{name}"; known: {known}; or give "pkg.module:Class"')
    module_name, _, attribute = path.partition(":")
    if not module_name.strip(".") or not attribute:
        raise ValueError(f'{kind} "{name}" is not of the form "pkg.module:Class"')
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it imports is not
        raise ValueError(f'{kind} "{name}": no module named {error.name!r}') from error
    if not hasattr(module, attribute):
        raise ValueError(f'{kind} "{name}": module {module_name!r} has no {attribute!r}')
    return getattr(module, attribute)
