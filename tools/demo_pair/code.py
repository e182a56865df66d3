"""Docstring to code, from the standard library of the Python that is running.

Nothing is imported: the files are parsed, and functions with a docstring become prompts. Another Python version has
other files, so its stream differs.
"""

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from textwrap import dedent

from demo_pair.generate import split_of
from onlinespec.workloads.base import Prompt, Split, check_split

INSTRUCTION = "Please generate code based on the following doc:\n"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__"}
DOC_CHARACTERS = range(20, 401)
SOURCE_LINES = range(4, 31)
# Parsed and mixed together. A stream goes through the library module by module, as somebody who works on one does;
# training text is mixed, but its first prompt does not wait for the whole library.
FILES_AT_A_TIME = {"stream": 1, "train": 32}

Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Code:
    """Each documented function of the standard library once, in an order drawn from the seed. Ends."""

    name = "code"

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        check_split(split)
        return _shuffled(seed, split)


def _shuffled(seed: int, split: Split) -> Iterator[Prompt]:
    rng = Random(f"code/{seed}")
    paths = rng.sample(_paths(), len(_paths()))
    seen: set[str] = set()
    count = FILES_AT_A_TIME[split]
    for start in range(0, len(paths), count):
        group = [prompt for path in paths[start : start + count] for prompt in _functions(path)]
        for prompt in rng.sample(group, len(group)):
            if split_of(prompt.text) == split and prompt.text not in seen:
                seen.add(prompt.text)
                yield prompt


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _paths() -> tuple[Path, ...]:
    root = _stdlib()
    return tuple(
        path for path in sorted(root.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    )


@cache
def _functions(path: Path) -> tuple[Prompt, ...]:
    """The documented functions and methods of a file, each qualified name once; none if it cannot be parsed."""
    module = ".".join(path.relative_to(_stdlib()).with_suffix("").parts).removesuffix(".__init__")
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            source = file.read()
            warnings.simplefilter("ignore")  # old code is full of odd escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return ()
    lines = source.splitlines(keepends=True)
    found: dict[str, Prompt] = {}
    for qualified_name, node in _definitions(tree.body, ""):
        doc, code = ast.get_docstring(node), _code(node, lines)
        if doc and len(doc) in DOC_CHARACTERS and code:
            prompt = Prompt(f"{module}:{qualified_name}", INSTRUCTION + doc.rstrip(), Code.name, code)
            found.setdefault(prompt.id, prompt)
    return tuple(found.values())


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)


def _code(node: Definition, lines: list[str]) -> str | None:
    """The dedented source, decorators included; None if it is too short, too long or will not dedent."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    code = dedent("".join(lines[first - 1 : node.end_lineno])).rstrip()
    fits = len(code.splitlines()) in SOURCE_LINES and not code[0].isspace()
    return code if fits else None
