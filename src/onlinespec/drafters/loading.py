"""The loading of drafters by name, path or Hub id.

To add a family, add a file to this folder and a line to `registry.DRAFTERS`.
"""

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
        name_or_path: For an untrained drafter, a name in `registry.DRAFTERS` or "pkg.module:Class". For a saved
            drafter, its directory or Hub id. `demo` and `demo/small_lm` are shipped with the package.
        target: The target that it drafts for.
        seed: For the random weights of an untrained drafter.
        tuning: Which weights learn; None for the drafter's default.

    Raises:
        FileNotFoundError: if there is no such directory or Hub id.
        ValueError: if the drafter does not fit the target, its format is unknown, it does not support `tuning`, or the
            class of an untrained drafter is not found.
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
    """Returns the drafter class for a name in `registry.DRAFTERS` or for "pkg.module:Class".

    The config of a saved drafter may also name a "pkg.module:Class". Only subclasses of `Drafter` are accepted, so that
    a downloaded config can't make us call an arbitrary object.

    Raises:
        ValueError: if there is no such name, or it is not a subclass of `Drafter`.
    """
    found = resolve(DRAFTERS, name, "drafter")
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise ValueError(f'drafter "{name}" is no Drafter but {found!r}; name a class that inherits onlinespec.Drafter')
    return found
