import sys
from collections import OrderedDict

import pytest

from onlinespec.learners import GEOMETRIES, LEARNERS
from onlinespec.registry import DRAFTERS, resolve
from onlinespec.workloads import WORKLOADS

TABLE = {"ordered": "collections:OrderedDict", "plain": "builtins:dict"}


def test_a_name_of_the_table_stands_for_what_its_path_leads_to():
    assert resolve(TABLE, "ordered", "mapping") is OrderedDict


def test_a_path_reaches_what_is_not_in_the_table():
    assert resolve(TABLE, "pathlib:Path", "mapping").__name__ == "Path"


def test_nothing_is_imported_before_it_is_asked_for():
    sys.modules.pop("this", None)
    resolve({**TABLE, "zen": "this:s"}, "plain", "mapping")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orderd", 'unknown mapping "orderd"; known: ordered, plain; or give "pkg.module:Class"'),
        ("no_such_package.thing:Class", "no module named 'no_such_package'"),
        ("collections.no_such:Class", "no module named 'collections.no_such'"),
        ("collections:NoSuch", "module 'collections' has no 'NoSuch'"),
        (":Class", 'is not of the form "pkg.module:Class"'),
        ("collections:", 'is not of the form "pkg.module:Class"'),
        ("", 'unknown mapping ""'),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_reason(name, message):
    with pytest.raises(ValueError, match=r"mapping") as raised:
        resolve(TABLE, name, "mapping")
    assert message in str(raised.value)


def test_an_import_that_fails_inside_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        resolve({}, "needs_more:Thing", "mapping")


@pytest.mark.parametrize(
    "table", [DRAFTERS, LEARNERS, GEOMETRIES, WORKLOADS], ids=["drafters", "learners", "geometries", "workloads"]
)
def test_every_line_of_our_tables_leads_somewhere(table):
    for name in table:
        assert resolve(table, name, "thing").__doc__
