"""The generators of the built-in prompts: answers are right, and prompts are what they claim to be."""

import ast
import re
import sqlite3
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import islice, pairwise
from random import Random

import pytest
from demo_pair.arithmetic import TEMPLATES, mark, shown
from demo_pair.freeze import GENERATORS
from demo_pair.generate import split_of
from demo_pair.prose import NUM_WORDS
from demo_pair.prose_lexicon import PLACES, TRADES
from demo_pair.sql import INSTRUCTION, QUESTIONS, draw_database

from onlinespec.workloads import Prompt, Split, load_workload
from onlinespec.workloads.base import SPLITS

ENDLESS = ["arithmetic", "prose", "sql"]


def first(name: str, count: int, seed: int = 0, split: Split = "stream") -> list[Prompt]:
    return list(islice(GENERATORS[name]().prompts(seed, split), count))


# All of them


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("split", ["stream", "train"])
def test_same_seed_and_split_give_the_same_prompts(name: str, split: Split) -> None:
    assert first(name, 50, seed=3, split=split) == first(name, 50, seed=3, split=split)


@pytest.mark.parametrize("name", GENERATORS)
def test_another_seed_gives_another_order(name: str) -> None:
    assert first(name, 20, seed=0) != first(name, 20, seed=1)


@pytest.mark.parametrize("name", GENERATORS)
def test_no_prompt_of_a_stream_is_in_train_whatever_the_seeds(name: str) -> None:
    streams = {prompt.text for seed in (0, 1) for prompt in first(name, 120, seed)}
    trains = {prompt.text for seed in (0, 1) for prompt in first(name, 120, seed, "train")}
    assert streams.isdisjoint(trains)
    assert {split_of(text) for text in streams} == {"stream"}
    assert {split_of(text) for text in trains} == {"train"}


@pytest.mark.parametrize("name", GENERATORS)
def test_no_prompt_or_id_comes_twice(name: str) -> None:
    prompts = first(name, 1000, split="train")
    assert len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == len(prompts) == 1000


def subjects(name: str, split: Split, count: int) -> list[str]:
    """What each of the first prompts is about: its database, or its module."""
    prompts = islice(GENERATORS[name]().prompts(0, split), count)
    return [p.text.split(INSTRUCTION)[0] if name == "sql" else p.id.split(":")[0] for p in prompts]


@pytest.mark.parametrize("name", ["sql", "code"])
def test_a_stream_stays_with_a_subject_for_a_while_and_training_text_does_not(name: str) -> None:
    streamed, trained = subjects(name, "stream", 60), subjects(name, "train", 60)
    assert len(set(streamed)) <= 25
    assert sum(a != b for a, b in pairwise(streamed)) == len(set(streamed)) - 1  # it does not come back either
    assert sum(a != b for a, b in pairwise(trained)) >= 40


@pytest.mark.parametrize("name", GENERATORS)
def test_every_prompt_has_an_answer_and_the_domain(name: str) -> None:
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


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("split", SPLITS)
def test_what_is_frozen_is_what_is_generated(name: str, split: Split) -> None:
    if name == "code" and sys.version_info[:2] != (3, 11):
        pytest.skip("frozen from another Python's library")
    frozen = islice(load_workload(f"builtin:{name}").prompts(0, split), 60)
    assert [(one.id, one.text) for one in frozen] == [(one.id, one.text) for one in first(name, 60, split=split)]


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
    visits = [{prompt.text for prompt in GENERATORS["code"]().prompts(seed)} for seed in (0, 1)]
    assert visits[0] == visits[1]
