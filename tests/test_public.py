"""The list of public names: complete, and nothing behind it imported before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onlinespec


@pytest.mark.parametrize("name", onlinespec.__all__)
def test_public_name_is_found_and_listed(name):
    assert getattr(onlinespec, name) is not None
    assert name in dir(onlinespec)


def test_type_checkers_are_shown_the_same_names_at_the_same_places():
    tree = ast.parse(Path(onlinespec.__file__).read_text(encoding="utf-8"))
    imported = {
        node.module.removeprefix("onlinespec."): tuple(alias.name for alias in node.names)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("onlinespec.")
    }
    assert imported == onlinespec._MODULES
    assert sorted(name for names in imported.values() for name in names) == sorted(onlinespec.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'onlinespec' has no attribute 'load_tarket'"):
        _ = onlinespec.load_tarket


def test_importing_the_package_does_not_import_torch():
    code = "import sys, onlinespec; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
