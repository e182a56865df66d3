"""A drafter from a name: fresh, or as it was saved. A new family is a file here and a line in `registry.DRAFTERS`."""

from __future__ import annotations

from pathlib import Path

from onlinespec.drafters.checkpoints import drafter_folder, read_format, read_side
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.models.loading import Target
from onlinespec.registry import DRAFTERS, SHIPPED_DRAFTERS, resolve


def load_drafter(name_or_path: str | Path, target: Target, seed: int = 0, tuning: Tuning | None = None) -> Drafter:
    """A drafter for a target.

    Args:
        name_or_path: A table name for a fresh one, a directory or Hub id of a saved one, `demo` or `demo/small_lm`
            for those that ship, or "pkg.module:Class".
        tuning: What of it learns; None for its own default.

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
    """The class of a table name, or of "pkg.module:Class", which a saved drafter's config may name as well.

    Raises:
        ValueError: if there is no such name, or it is of something else: a config must not have any function called.
    """
    found = resolve(DRAFTERS, name, "drafter")
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise ValueError(f'drafter "{name}" is no Drafter but {found!r}; name a class that inherits onlinespec.Drafter')
    return found
