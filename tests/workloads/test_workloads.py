"""Workloads: the built-ins keep their word, and a bad file is answered with a message one can act on."""

import gzip
import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from onlinespec.registry import WORKLOADS
from onlinespec.workloads import Prompt, Split, load_workload
from onlinespec.workloads.base import SPLITS

PACKED = gzip.compress(b'{"prompt": "a"}', mtime=0)  # part of test ids, which must be the same in every worker


def first(name: str, count: int, seed: int = 0, split: Split = "stream") -> list[Prompt]:
    return list(islice(load_workload(f"builtin:{name}").prompts(seed, split), count))


# The built-ins


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_seed_gives_the_same_prompts_in_an_order_of_its_own(name: str, split: Split) -> None:
    orders = [first(name, 2000, seed, split) for seed in (0, 1, 2, 1)]
    assert orders[1] == orders[3]
    assert len({tuple(one.id for one in order) for order in orders}) == 3
    assert len({frozenset(one.id for one in order) for order in orders}) == 1
    assert len(orders[0]) == 1000 or (name, split, len(orders[0])) == ("code", "stream", 492)


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_prompt_comes_twice_and_splits_share_none(name: str) -> None:
    prompts = [one for split in SPLITS for one in first(name, 2000, split=split)]
    assert len({one.text for one in prompts}) == len({one.id for one in prompts}) == len(prompts)
    assert {one.domain for one in prompts} == {load_workload(f"builtin:{name}").name} == {name}
    assert all(one.text.strip() for one in prompts)


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_unknown_split_is_refused_before_the_first_prompt(name: str) -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of stream, train"):
        load_workload(f"builtin:{name}").prompts(0, "test")  # type: ignore[arg-type]


# Names


@pytest.mark.parametrize("name", ["sqll", "", "SQL"])
def test_an_unknown_builtin_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f'unknown workload "{name}"; known: arithmetic, code, prose, sql'):
        load_workload(f"builtin:{name}")


def test_a_class_outside_the_table_is_reached_by_its_path() -> None:
    workload = load_workload("builtin:onlinespec.workloads.builtin:Sql")
    assert next(workload.prompts(0)) == first("sql", 1)[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.module:Class", "no module named 'no_such_package'"),
        ("onlinespec.workloads.nosuch:Class", "no module named 'onlinespec.workloads.nosuch'"),
        ("onlinespec.workloads.builtin:Nosuch", "module 'onlinespec.workloads.builtin' has no 'Nosuch'"),
        (":Class", "is not of the form"),
        ("onlinespec.workloads.builtin:", "is not of the form"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_stops(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_workload(f"builtin:{path}")


# Files


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(content: str | bytes, name: str = "asked.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


Write = Callable[..., str]


def test_a_file_gives_its_rows_in_order_whatever_the_seed_and_split(write: Write) -> None:
    workload = load_workload(write('{"prompt": "one"}\n\n{"prompt": "two", "id": "b", "response": "2"}\n'))
    expected = [Prompt("asked-1", "one", "asked"), Prompt("b", "two", "asked", "2")]
    assert workload.name == "asked"
    assert list(workload.prompts(0)) == list(workload.prompts(9, "train")) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "caf\xc3\xa9"}\r\n{"prompt": "b"}\r\n',
        b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9"}\n{"prompt": "b"}',
        b'\n  \n{"prompt": "caf\xc3\xa9"}\n\t\n{"prompt": "b", "id": null, "response": null, "more": 1}\n\n',
        b'{"prompt": "caf\\u00e9"}\n{"prompt": "b", "id": 7}\n',
    ],
    ids=["crlf", "bom, no last newline", "blank lines", "escapes, number as id"],
)
def test_harmless_ways_to_write_a_file_are_taken(write: Write, content: bytes) -> None:
    assert [prompt.text for prompt in load_workload(write(content)).prompts(0)] == ["café", "b"]


def test_other_line_breaks_inside_a_string_do_not_end_a_row(write: Write) -> None:
    text = "a\u2028b\u0085c\x0c"
    path = write(json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    assert next(load_workload(path).prompts(0)).text == text


def test_a_packed_file_reads_like_the_plain_one(write: Write) -> None:
    rows = '{"prompt": "one"}\n{"prompt": "two"}\n'
    packed = load_workload(write(gzip.compress(rows.encode()), "asked.jsonl.gz"))
    assert list(packed.prompts(0)) == list(load_workload(write(rows)).prompts(0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"asked\.jsonl has no rows; write one object a line"),
        ("\n \n", r"asked\.jsonl has no rows"),
        ('{"prompt": "a"}\nhello there\n', r"line 2: not JSON .*: hello there; write"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', r'line 2: not JSON .*: {"prompt": "b"; write'),
        ("x" * 500, r"line 1: not JSON .*: x{60}\.\.\.; write"),
        ('{"prompt": "a"} {"prompt": "b"}', r"line 1: not JSON"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('["a"]', r"line 1: list instead of an object"),
        ('{"question": "a", "answer": "b"}', r'line 1: no "prompt"; the keys it has: question, answer; rename'),
        ("{}", r'line 1: no "prompt"; the keys it has: none'),
        ('\n{"prompt": 5}', r'line 2: "prompt" is int \(5\), not a string'),
        ('{"prompt": null}', r'"prompt" is NoneType \(null\), not a string'),
        ('{"prompt": ["a"]}', r'"prompt" is list \(\["a"\]\), not a string'),
        ('{"prompt": "  "}', r'line 1: "prompt" is empty'),
        ('{"prompt": "a", "response": 3}', r'"response" is int \(3\), not a string'),
        ('{"prompt": "a", "id": [1]}', r'"id" is list \(\[1\]\), not a string'),
        ('{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "id": "x"}', r"line 3: id 'x' is already used on line 1"),
        ('{"prompt": "a", "id": "asked-2"}\n{"prompt": "b"}', r"line 2: id 'asked-2' is already used on line 1"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', r"line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (PACKED, r"is not UTF-8; unpack it or name it \.gz"),
    ],
)
def test_a_bad_file_is_answered_with_its_name_the_line_and_a_way_out(
    write: Write, content: str | bytes, message: str
) -> None:
    path = write(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_workload(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("cut", [1, 8, 9, 30])
def test_a_gzip_file_that_is_cut_short_is_not_taken_for_a_whole_one(write: Write, cut: int) -> None:
    content = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % number for number in range(500)))
    with pytest.raises(ValueError, match=r"cut short: its gzip stream does not end"):
        load_workload(write(content[:-cut], "asked.jsonl.gz"))


@pytest.mark.parametrize("content", [b'{"prompt": "a"}', PACKED[:-6] + b"\0\0\0\0\0\0"])
def test_what_is_not_gzip_or_damaged_says_so(write: Write, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"is not a sound gzip file"):
        load_workload(write(content, "asked.jsonl.gz"))


def test_a_missing_file_says_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.jsonl; give a \.jsonl\[\.gz\] file, builtin:NAME"):
        load_workload(str(tmp_path / "missing.jsonl"))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory; name a \.jsonl or \.jsonl\.gz file in it"):
        load_workload(str(tmp_path))


# The Hub


def test_without_datasets_the_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'"hf:openai/gsm8k" needs the datasets package.*onlinespec\[hub\]'):
        load_workload("hf:openai/gsm8k")


class FakeRows(list[dict[str, object]]):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for `datasets`: remembers what was asked for and answers with `rows`."""
    rows = FakeRows()
    fake = SimpleNamespace(rows=rows, asked=None)

    def load_dataset(name: str, split: str) -> FakeRows:
        fake.asked = (name, split)
        return rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake


@pytest.mark.parametrize(("spec", "split"), [("hf:openai/gsm8k", "train"), ("hf:openai/gsm8k:test", "test")])
def test_hub_rows_become_prompts(hub: SimpleNamespace, spec: str, split: str) -> None:
    hub.rows.append({"text": "no", "question": "How many?", "answer": "72"})
    workload = load_workload(spec)
    assert hub.asked == ("openai/gsm8k", split)
    assert list(workload.prompts(0)) == [Prompt("gsm8k-0", "How many?", "gsm8k", "72")]


def test_hub_rows_without_a_known_column_name_what_they_have(hub: SimpleNamespace) -> None:
    hub.rows.append({"body": "x", "label": 1})
    with pytest.raises(ValueError, match="none of the columns prompt, question, text; it has body, label"):
        load_workload("hf:somebody/something")


def test_a_hub_spec_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="names no data set; write hf:dataset"):
        load_workload("hf:")
