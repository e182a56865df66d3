"""Loads drafters by name, path or Hub id. A new family is a file in this folder and a line in `registry.DRAFTERS`."""

from __future__ import annotations

from pathlib import Path

from onlinespec.drafters.checkpoints import drafter_folder, read_format, read_side
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.models.loading import Target
from onlinespec.registry import DRAFTERS, SHIPPED_DRAFTERS, resolve


def load_drafter(name_or_path: str | Path, target: Target, seed: int = 0, tuning: Tuning | None = None) -> Drafter:
    """Loads or creates a drafter for a target.

    Args:
        name_or_path: A table name or "pkg.module:Class" for an untrained drafter; a directory or Hub id of a saved one;
            or `demo` or `demo/small_lm` for the shipped ones.
        seed: Of an untrained drafter's weights.
        tuning: Which weights learn; None for the drafter's default.

    Raises:
        FileNotFoundError: if there is no such directory or Hub id.
        ValueError: if it does not fit the target, or is of an unknown format.
    """
    name = str(name_or_path)
    if name in DRAFTERS or (":" in name and not Path(name).exists()):
        drafter = drafter_class(name).fresh(target, seed)
    else:
        folder = SHIPPED_DRAFTERS.get(name) or drafter_folder(name, known=list(DRAFTERS))
        drafter = drafter_class(read_format(folder)).load(folder, target)
        drafter.notes = read_side(folder).get("notes", {})
    if tuning:
        drafter.tune(tuning)
    return drafter


def drafter_class(name: str) -> type[Drafter]:
    """Returns the class of a table name or of "pkg.module:Class", which the config of a saved drafter may name too.

    Raises:
        ValueError: if there is no such name, or if it is not a `Drafter`: a config must not choose what is called.
    """
    found = resolve(DRAFTERS, name, "drafter")
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise ValueError(f'drafter "{name}" is no Drafter but {found!r}; name a class that inherits onlinespec.Drafter')
    return found
