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

# From the ground up: a room imports from the rows above its own, and from itself. A new room gets its place here.
ROWS = (
    ("core", "config", "registry", "host"),  # the corridor: modules, not rooms
    ("lossless", "learners", "models", "control", "workloads"),
    ("drafters",),
    ("engine", "learning"),
    ("publishing",),
    ("offline",),
    ("experiments", "server", "integrations"),
    ("cli",),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
CORRIDOR = set(ROWS[0])

ROOT = ""  # onlinespec/__init__.py: the public list. It may import anything; from it, others take the version only

COMMAND_LINE = {"cli"}  # reads argv, and prints

# Packages that planted sources may import from.
FOUNDATION = {"": "", "learners": "", "drafters": "", "drafters.contract": "", "engine": "", "cli": ""}


def read_house() -> dict[str, str]:
    """Source by module, named from below onlinespec: `models.loading`, a package by its folder."""
    house = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        house[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return house


def room_of(module: str) -> str:
    """The first part of a module's name."""
    return module.split(".")[0]


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
        room = room_of(module)
        if module != ROOT and room not in ROW_OF:
            faults.append(f"{module}: {room} has no place in ROWS of tests/test_layering.py; give it one")
            continue
        for line, origin, name in imports(module, source, is_package=module in packages):
            where = f"{module or '__init__'}:{line}"
            if name == "*":
                faults.append(f"{where}: star import from {origin}")
            top, _, target = origin.partition(".")
            if top != "onlinespec":
                if room == "learners" and top != "torch" and top not in sys.stdlib_module_names:
                    faults.append(f"{where}: learners need torch and nothing else, not {origin}")
                if top == "vllm" and room != "integrations":
                    faults.append(f"{where}: only integrations may know vLLM's names")
                continue
            if module == ROOT:
                continue
            deeper = f"{target}.{name}".lstrip(".")  # `from onlinespec import core` names a module, not a name in one
            if deeper in house or deeper in ROW_OF:
                target = deeper
            faults += [f"{where}: {fault}" for fault in arrow_faults(module, target, name)]
    return faults


def arrow_faults(module: str, target: str, name: str | None) -> list[str]:
    if target == ROOT:
        return [] if name == "__version__" else ["imports the public list; import the module that has the name"]
    room, target_room = room_of(module), room_of(target)
    if target_room not in ROW_OF:
        return [f"imports {target}, which has no place in ROWS"]
    if room == target_room:
        return []
    if room == "learners" and target != "host" and (module, target) != ("learners", "registry"):
        return [f"imports {target}; learners import nothing of ours"]  # `host`: the one function that reads a device
    if ROW_OF[target_room] >= ROW_OF[room] and not {room, target_room} <= CORRIDOR:
        return [f"imports {target}, which is not below {room}"]
    return []


def circles(house: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, and those that wait for them."""
    below = {module: imported(module, source, house) - {module} for module, source in house.items()}
    while free := [module for module, names in below.items() if not names & below.keys()]:
        for module in free:
            del below[module]
    return sorted(below)


def imported(module: str, source: str, house: Mapping[str, str]) -> set[str]:
    """The modules of ours that a module imports, by their names from below onlinespec."""
    names = set()
    for _, origin, name in imports(module, source, is_package=False):
        top, _, target = origin.partition(".")
        if top == "onlinespec":
            deeper = f"{target}.{name}".lstrip(".")
            names.add(deeper if deeper in house else target)
    return names


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
        if room_of(module) not in COMMAND_LINE:
            faults += [f"{module or '__init__'}:{line}: reads the command line; cli does" for line in reads_argv]
        if room_of(module) not in COMMAND_LINE:
            faults += [f"{module or '__init__'}:{line}: prints; use logging, or return the text" for line in prints]
    return faults


def is_argv(origin: str, name: str | None) -> bool:
    return origin.split(".")[0] in {"tyro", "argparse"} or (origin, name) == ("sys", "argv")


def test_house_is_where_this_test_looks() -> None:
    assert ROOT in read_house()


def test_imports_go_one_way() -> None:
    assert import_faults(read_house()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    house = read_house()
    del house[ROOT]
    assert circles(house) == []
    assert circles({"engine.a": "import onlinespec.engine.b", "engine.b": "from onlinespec.engine import a"})


def test_print_and_argv_stay_in_the_command_line() -> None:
    assert word_faults(read_house()) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        (
            "models.rope",
            "from onlinespec.engine import step",
            "models.rope:1: imports engine, which is not below models",
        ),
        ("models.rope", "import onlinespec.lossless.noise", "imports lossless.noise, which is not below models"),
        ("control.costs", "def f():\n    from onlinespec import cli", "control.costs:2: imports cli"),
        (
            "lossless.verify",
            "if TYPE_CHECKING:\n    from onlinespec.drafters.contract import Drafter",
            "verify:2: imports drafters.contract, which is not below lossless",
        ),
        ("drafters.eagle", "from ..engine import step", "drafters.eagle:1: imports engine"),
        ("drafters", "from ..engine import step", "drafters:1: imports engine"),
        ("learning.update", "import onlinespec.engine.step", "imports engine.step, which is not below learning"),
        ("learning.update", "from onlinespec import learn_online", "imports the public list"),
        ("core", "from torch import *", "star import from torch"),
        ("core", "import onlinespec.drafters.eagle", "imports drafters.eagle, which is not below core"),
        ("newcomer", "", "newcomer has no place in ROWS"),
        ("attic.newcomer", "", "attic has no place in ROWS"),
        ("models.loading", "from onlinespec.cli import main", "imports cli, which is not below models"),
        ("learners.optimistic", "from onlinespec.core import Draft", "learners import nothing of ours"),
        ("learners.optimistic", "from onlinespec.registry import load", "learners import nothing of ours"),
        ("learners.optimistic", "import numpy", "learners need torch and nothing else"),
        ("engine.step", "import vllm", "only integrations may know"),
        ("server.app", "from onlinespec.cli.terminal import out", "imports cli.terminal, which is not below server"),
    ],
)
def test_a_planted_import_is_reported(module: str, source: str, words: str) -> None:
    (fault,) = import_faults({**FOUNDATION, module: source})
    assert words in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "from onlinespec.cli import main"),
        (
            "lossless.verify",
            "import torch\nfrom onlinespec.core import Draft\nfrom onlinespec import config, __version__",
        ),
        ("drafters.eagle", "from .contract import Drafter\nfrom ..models.loading import load"),
        ("learners", "from onlinespec.registry import load"),
        ("learners.optimistic", "import math\nimport torch\nfrom onlinespec.learners.base import Params"),
        ("learning.update", "from onlinespec.learners import LEARNERS"),
        ("cli", "from onlinespec.experiments.compare import write_html"),
        ("cli.other", "from onlinespec.cli import main\nfrom onlinespec.cli.terminal import out"),
    ],
)
def test_a_fitting_import_is_not_reported(module: str, source: str) -> None:
    assert import_faults({**FOUNDATION, module: source}) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print('done')", "engine.step:1: prints"),
        ("import sys\nname = sys.argv[1]", "engine.step:2: reads the command line"),
        ("from sys import argv", "engine.step:1: reads the command line"),
        ("import tyro", "engine.step:1: reads the command line"),
    ],
)
def test_planted_words_are_reported(source: str, words: str) -> None:
    (fault,) = word_faults({"engine.step": source})
    assert words in fault
    assert word_faults({"cli": source, "cli.other": source}) == []
