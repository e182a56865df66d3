"""Workloads: the built-ins are what they claim to be, and a bad file is answered with a message one can act on."""

import ast
import gzip
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import pytest

from onlinespec.registry import WORKLOADS
from onlinespec.workloads import Prompt, Split, load_workload, split_of
from onlinespec.workloads.arithmetic import TEMPLATES, mark, shown
from onlinespec.workloads.prose import NUM_WORDS
from onlinespec.workloads.prose_lexicon import PLACES, TRADES
from onlinespec.workloads.sql import INSTRUCTION, QUESTIONS, draw_database

ENDLESS = ["arithmetic", "prose", "sql"]
PACKED = gzip.compress(b'{"prompt": "a"}', mtime=0)  # part of test ids, which must be the same in every worker


def first(name: str, count: int, seed: int = 0, split: Split = "stream") -> list[Prompt]:
    return list(islice(load_workload(f"builtin:{name}").prompts(seed, split), count))


# All built-ins


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("split", ["stream", "train"])
def test_same_seed_and_split_give_the_same_prompts(name: str, split: Split) -> None:
    assert first(name, 50, seed=3, split=split) == first(name, 50, seed=3, split=split)


@pytest.mark.parametrize("name", WORKLOADS)
def test_another_seed_gives_another_order(name: str) -> None:
    assert first(name, 20, seed=0) != first(name, 20, seed=1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_prompt_of_a_stream_is_in_train_whatever_the_seeds(name: str) -> None:
    streams = {prompt.text for seed in (0, 1) for prompt in first(name, 120, seed)}
    trains = {prompt.text for seed in (0, 1) for prompt in first(name, 120, seed, "train")}
    assert streams.isdisjoint(trains)
    assert {split_of(text) for text in streams} == {"stream"}
    assert {split_of(text) for text in trains} == {"train"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_prompt_or_id_comes_twice(name: str) -> None:
    prompts = first(name, 1000, split="train")
    assert len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == len(prompts) == 1000


def subjects(name: str, split: Split, count: int) -> list[str]:
    """What each of the first prompts is about: its database, or its module."""
    prompts = islice(load_workload(f"builtin:{name}").prompts(0, split), count)
    return [p.text.split(INSTRUCTION)[0] if name == "sql" else p.id.split(":")[0] for p in prompts]


@pytest.mark.parametrize("name", ["sql", "code"])
def test_a_stream_stays_with_a_subject_for_a_while_and_training_text_does_not(name: str) -> None:
    streamed, trained = subjects(name, "stream", 60), subjects(name, "train", 60)
    assert len(set(streamed)) <= 25
    assert sum(a != b for a, b in pairwise(streamed)) == len(set(streamed)) - 1  # it does not come back either
    assert sum(a != b for a, b in pairwise(trained)) >= 40


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_prompt_has_an_answer_and_the_domain(name: str) -> None:
    assert load_workload(f"builtin:{name}").name == name
    for prompt in first(name, 100):
        assert prompt.domain == name
        assert prompt.reference
        assert "{" not in prompt.text or name == "code"


@pytest.mark.parametrize("name", ENDLESS)
def test_one_prompt_has_one_answer_in_every_stream(name: str) -> None:
    """A fresh draw that says the same must also answer the same, else nobody could learn it."""
    answers: dict[str, str | None] = {}
    for seed in range(5):
        for prompt in first(name, 250, seed, "train"):
            assert answers.setdefault(prompt.text, prompt.reference) == prompt.reference


@pytest.mark.parametrize("name", ENDLESS)
def test_two_seeds_share_almost_no_prompt(name: str) -> None:
    one, other = ({prompt.text for prompt in first(name, 2000, seed, "train")} for seed in (0, 1))
    assert len(one & other) < 20  # 2000 of a pool of a few hundred thousand


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_unknown_split_is_refused_before_the_first_prompt(name: str) -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of stream, train"):
        load_workload(f"builtin:{name}").prompts(0, "test")  # type: ignore[arg-type]


# SQL


def schema_of(text: str) -> list[str]:
    return re.findall(r"^\w+\(.*\)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("split", ["stream", "train"])
def test_every_query_runs_on_the_schema_of_its_prompt(split: Split) -> None:
    for prompt in first("sql", 1000, seed=7, split=split):
        tables = schema_of(prompt.text)
        assert len(tables) in (2, 3)
        with_tables = sqlite3.connect(":memory:")
        for table in tables:
            with_tables.execute(f"CREATE TABLE {table}")
        with_tables.execute(str(prompt.reference)).fetchall()
        with_tables.close()


@pytest.mark.parametrize("ask", QUESTIONS, ids=lambda ask: ask.__name__)
def test_every_kind_of_question_is_asked_in_its_own_words(ask: Callable[..., tuple[str, str] | None]) -> None:
    rng = Random(0)
    asked = [ask(rng, draw_database(rng)) for _ in range(60)]
    assert len({pair[0] for pair in asked if pair}) > 10


def test_foreign_keys_name_columns_of_the_schema() -> None:
    for prompt in first("sql", 300):
        columns = dict(re.findall(r"^(\w+)\((.*)\)$", prompt.text, flags=re.MULTILINE))
        keys = re.search(r"Foreign keys: (.*)", prompt.text)
        assert keys
        for table, column in re.findall(r"(\w+)\.(\w+)", keys[1]):
            assert column in columns[table].split(", ")


def test_every_literal_of_a_query_stands_in_the_question() -> None:
    for prompt in first("sql", 500):
        question = prompt.text.partition(INSTRUCTION)[2].lower()
        for literal in re.findall(r"'%?([^%']+)%?'", str(prompt.reference)):
            assert literal.lower() in question
        for number in re.findall(r"(?<= )\d+", str(prompt.reference).replace("LIMIT 1", "")):
            assert number in question


def test_sql_answers_are_not_trivially_short() -> None:
    words = [len(str(prompt.reference).split()) for prompt in first("sql", 1000)]
    assert 15 <= sum(words) / len(words) <= 45


# Arithmetic


def value_of(written: str) -> Fraction:
    numbers = [Fraction(number) for number in re.split(r"[-+*/]", written)]
    value = numbers[0]
    for operator, number in zip(re.findall(r"[-+*/]", written), numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value / (number or 1)}[operator]
    return value


def test_every_mark_is_right_and_the_last_one_is_the_answer() -> None:
    for prompt in first("arithmetic", 3000, split="train"):
        assert prompt.reference
        *lines, last = prompt.reference.splitlines()
        marks = re.findall(r"<<([^=]+)=([^>]+)>>([\d.]*\d)", "\n".join(lines))
        assert len(marks) == prompt.reference.count("<<") >= 2
        for written, result, repeated in marks:
            assert value_of(written) == Fraction(result) >= 0, prompt
            assert result == repeated
            assert re.fullmatch(r"\d+(\.\d\d)?", result)
        assert last == f"#### {marks[-1][1]}"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.__name__)
def test_every_template_draws_sound_problems(template: Callable[[Random], tuple[str, list[str], int]]) -> None:
    for seed in range(200):
        problem, lines, result = template(Random(seed))
        assert problem.rstrip().endswith(("?", "."))
        assert all(line.endswith(".") for line in lines)
        assert 0 <= result < 100_000
        assert "-" not in re.sub(r"<<.*?>>", "", problem)


def test_a_solution_starts_from_numbers_of_the_problem() -> None:
    for prompt in first("arithmetic", 500):
        written = re.search(r"<<(\d+(?:\.\d\d)?)", str(prompt.reference))
        assert written
        assert written[1] in prompt.text


def test_marks_are_worked_out_from_left_to_right() -> None:
    assert mark(48, "/", 2) == ("48/2=<<48/2=24>>24", 24)
    assert mark(60, "*", 25, "/", 100)[1] == 15
    assert mark(Fraction(5, 2), "*", 3)[0] == "2.50*3=<<2.50*3=7.50>>7.50"
    assert shown(Fraction(1, 4)) == "0.25"


# Prose


def test_a_paragraph_tells_the_facts_of_its_prompt() -> None:
    trades = [line.split(" | ")[0] for line in TRADES.strip().splitlines()]
    for prompt in first("prose", 1000, split="train"):
        answer = str(prompt.reference)
        known = [trade for trade in trades if re.search(rf"\b{trade}\b", prompt.text)]
        assert any(trade in answer for trade in known)
        assert any(place in answer for place in PLACES if place in prompt.text)
        day = re.search(r"\w+ (spring|summer|autumn|winter) (morning|afternoon|evening)", prompt.text)
        assert day
        assert day[0] in answer
        names = re.findall(r"\b[A-Z][a-z]+\b", prompt.text)
        opening = re.search(r"\b([A-Z][a-z]+)(?:,| the| was| worked)", answer)
        assert opening
        assert any(re.search(rf"\b{name}\b", answer) for name in names)


def test_a_paragraph_has_four_to_seven_sentences_and_60_to_110_words() -> None:
    for prompt in first("prose", 2000, split="train"):
        answer = str(prompt.reference)
        assert len(answer.split()) in NUM_WORDS
        assert 4 <= len(re.findall(r"[.?!](?= |$)", answer)) <= 9  # two of the stock sentences are pairs
        assert not re.search(r"[{}|]|  | / |\ba [aeio](?!ne-)", prompt.text + answer), prompt


# Code


def test_every_code_answer_parses_and_documents_what_was_asked() -> None:
    prompts = first("code", 400)
    assert len(prompts) > 200
    for prompt in prompts:
        (node,) = ast.parse(str(prompt.reference)).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        asked = f"Please generate code based on the following doc:\n{ast.get_docstring(node)}"
        assert prompt.text.rstrip() == asked.rstrip()  # blanks after the last line are kept as the source has them
        assert node.name == prompt.id.partition(":")[2].rpartition(".")[2]
        assert 4 <= len(str(prompt.reference).splitlines()) <= 30


def test_code_ends_when_the_library_is_exhausted_and_every_seed_visits_the_same_prompts() -> None:
    visits = [{prompt.text for prompt in load_workload("builtin:code").prompts(seed)} for seed in (0, 1)]
    assert visits[0] == visits[1]


# Names


@pytest.mark.parametrize("name", ["sqll", "", "SQL"])
def test_an_unknown_builtin_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f'unknown workload "{name}"; known: arithmetic, code, prose, sql'):
        load_workload(f"builtin:{name}")


def test_a_class_outside_the_table_is_reached_by_its_path() -> None:
    workload = load_workload("builtin:onlinespec.workloads.sql:Sql")
    assert next(workload.prompts(0)) == first("sql", 1)[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.module:Class", "no module named 'no_such_package'"),
        ("onlinespec.workloads.nosuch:Class", "no module named 'onlinespec.workloads.nosuch'"),
        ("onlinespec.workloads.sql:Nosuch", "module 'onlinespec.workloads.sql' has no 'Nosuch'"),
        (":Class", "is not of the form"),
        ("onlinespec.workloads.sql:", "is not of the form"),
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
