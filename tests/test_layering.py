"""Imports inside onlinespec go one way, and a few words stay where they belong.

The house is read as text, with `ast`: nothing is imported to check it. What runs only for a type
checker (`if TYPE_CHECKING`) and what runs inside a function count like any other import.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "onlinespec"

# From the ground up. A module imports from the rows above its own and from itself; a package's name stands for
# all its modules, unless one of them has a place of its own. A new module gets its place here.
LEVELS = (
    ("host",),
    (
        "core",
        "config",
        "tables",
        "randomness",
        "records",
        "provenance",
        "text",
        "learners",
        "demo",
    ),  # demo: the paths of the shipped pair
    (
        "sampling",
        "losses",
        "replay",
        "states",
        "cadence",
        "step_costs",
        "acceptance",
        "methods",
        "metrics",
        "summaries",
        "wire",
        "workloads",
    ),
    ("verify", "agreement", "models"),
    ("rejection",),
    ("drafters",),
    ("telemetry", "trial", "footprint", "finite"),
    ("decode", "learn", "publish", "versions", "control", "plots"),
    ("calibration", "recording", "trainer"),
    ("compare", "answers", "scheduler", "background", "inspection", "charts", "demo.corpus"),
    ("distill", "report", "server", "integrations"),
    ("demo.recipe",),
    ("cli",),
)
LEVEL = {place: level for level, row in enumerate(LEVELS) for place in row}

ROOT = ""  # onlinespec/__init__.py: the public list. It may import anything; from it, others take the version only

COMMAND_LINE = {"cli", "demo.recipe"}
PRINTS = {"cli"}

# Packages that planted sources may import from.
FOUNDATION = {"": "", "learners": "", "drafters": "", "drafters.base": "", "demo": ""}


def read_house() -> dict[str, str]:
    """Source by module, named from below onlinespec: `models.loading`, a package by its folder."""
    house = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        house[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return house


def place_of(module: str) -> str | None:
    """The entry of LEVELS that a module belongs to."""
    if module in LEVEL:
        return module
    package = module.split(".")[0]
    has_placed_modules = any(place.startswith(f"{package}.") for place in LEVEL)
    return package if package in LEVEL and not has_placed_modules else None


def imports(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str, str | None]]:
    """Line, absolute module, and the name taken from it (None for a plain `import`)."""
    here = ["onlinespec", *module.split(".")] if module else ["onlinespec"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = here[: len(here) - node.level + is_package]
                origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, origin, alias.name


def import_faults(house: Mapping[str, str]) -> list[str]:
    """What breaks the arrows, one line each."""
    packages = {".".join(module.split(".")[:-1]) for module in house}  # one without modules needs no relative imports
    faults = []
    for module, source in house.items():
        place = place_of(module)
        if module != ROOT and place is None:
            faults.append(f"{module}: has no place in LEVELS of tests/test_layering.py; give it one")
            continue
        for line, origin, name in imports(module, source, is_package=module in packages):
            where = f"{module or '__init__'}:{line}"
            if name == "*":
                faults.append(f"{where}: star import from {origin}")
            top, _, target = origin.partition(".")
            if top != "onlinespec":
                if place == "learners" and top != "torch" and top not in sys.stdlib_module_names:
                    faults.append(f"{where}: learners need torch and nothing else, not {origin}")
                if top == "vllm" and place != "integrations":
                    faults.append(f"{where}: only integrations may know vLLM's names")
                continue
            if module == ROOT:
                continue
            deeper = f"{target}.{name}".lstrip(".")  # `from onlinespec import core` names a module, not a name in one
            if deeper in house or deeper in LEVEL:
                target = deeper
            faults += [f"{where}: {fault}" for fault in arrow_faults(module, target, name)]
    return faults


def arrow_faults(module: str, target: str, name: str | None) -> list[str]:
    if target == ROOT:
        return [] if name == "__version__" else ["imports the public list; import the module that has the name"]
    place, target_place = place_of(module), place_of(target)
    if target_place is None:
        return [f"imports {target}, which has no place in LEVELS"]
    if place == target_place or (module == "learners" and target == "tables"):
        return []
    if place == "learners" and target_place != "host":  # a round reads its device through the one function that may
        return [f"imports {target}; learners import nothing of ours"]
    if LEVEL[target_place] >= LEVEL[place]:
        return [f"imports {target}, which is not below {place}"]
    return []


def word_faults(house: Mapping[str, str]) -> list[str]:
    """Printing and reading the command line where neither belongs."""
    faults = []
    for module, source in house.items():
        reads_argv = [line for line, origin, name in imports(module, source, False) if is_argv(origin, name)]
        prints = []
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Attribute(value=ast.Name(id="sys"), attr="argv"):
                    reads_argv.append(node.lineno)
                case ast.Call(func=ast.Name(id="print")):
                    prints.append(node.lineno)
        if place_of(module) not in COMMAND_LINE:
            faults += [f"{module or '__init__'}:{line}: reads the command line; cli does" for line in reads_argv]
        if place_of(module) not in PRINTS:
            faults += [f"{module or '__init__'}:{line}: prints; use logging, or return the text" for line in prints]
    return faults


def is_argv(origin: str, name: str | None) -> bool:
    return origin.split(".")[0] in {"tyro", "argparse"} or (origin, name) == ("sys", "argv")


def test_house_is_where_this_test_looks() -> None:
    assert ROOT in read_house()


def test_imports_go_one_way() -> None:
    assert import_faults(read_house()) == []


def test_print_and_argv_stay_in_the_command_line() -> None:
    assert word_faults(read_house()) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("losses", "from onlinespec.decode import step", "losses:1: imports decode, which is not below losses"),
        ("losses", "import onlinespec.sampling", "imports sampling, which is not below losses"),
        ("losses", "def f():\n    from onlinespec import compare", "losses:2: imports compare"),
        ("verify", "if TYPE_CHECKING:\n    from onlinespec.drafters.base import Drafter", "verify:2: imports drafters"),
        ("drafters.eagle", "from ..decode import step", "drafters.eagle:1: imports decode"),
        ("drafters", "from ..decode import step", "drafters:1: imports decode"),
        ("learn", "from onlinespec import learn_online", "imports the public list"),
        ("core", "from torch import *", "star import from torch"),
        ("newcomer", "", "newcomer: has no place in LEVELS"),
        ("demo.other", "", "demo.other: has no place in LEVELS"),
        ("demo", "from onlinespec.demo.recipe import train", "demo:1: imports demo.recipe"),
        ("models.loading", "from onlinespec.demo import recipe", "imports demo.recipe, which is not below models"),
        ("learners.optimistic", "from onlinespec.core import Draft", "learners import nothing of ours"),
        ("learners.optimistic", "from onlinespec.tables import load", "learners import nothing of ours"),
        ("learners.optimistic", "import numpy", "learners need torch and nothing else"),
        ("decode", "import vllm", "only integrations may know"),
        ("report", "from onlinespec.cli.terminal import out", "imports cli.terminal, which is not below report"),
    ],
)
def test_a_planted_import_is_reported(module: str, source: str, words: str) -> None:
    (fault,) = import_faults({**FOUNDATION, module: source})
    assert words in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "from onlinespec.cli import main"),
        ("losses", "import torch\nfrom onlinespec.core import Draft\nfrom onlinespec import config, __version__"),
        ("drafters.eagle", "from .base import Drafter\nfrom ..models.loading import load"),
        ("models.loading", "from onlinespec.demo import TARGET"),
        ("learners", "from onlinespec.tables import load"),
        ("learners.optimistic", "import math\nimport torch\nfrom onlinespec.learners.base import Params"),
        ("learn", "from onlinespec.learners import LEARNERS"),
        ("cli", "from onlinespec.report import write_html"),
        ("cli.other", "from onlinespec.cli import main\nfrom onlinespec.cli.terminal import out"),
    ],
)
def test_a_fitting_import_is_not_reported(module: str, source: str) -> None:
    assert import_faults({**FOUNDATION, module: source}) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print('done')", "decode:1: prints"),
        ("import sys\nname = sys.argv[1]", "decode:2: reads the command line"),
        ("from sys import argv", "decode:1: reads the command line"),
        ("import tyro", "decode:1: reads the command line"),
    ],
)
def test_planted_words_are_reported(source: str, words: str) -> None:
    (fault,) = word_faults({"decode": source})
    assert words in fault
    assert word_faults({"cli": source, "cli.other": source}) == []
