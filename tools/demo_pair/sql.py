"""Text to SQL over small made-up databases, in the shape of Spider's prompts.

Questions name tables and columns as the schema does, blanks for underscores, so that the answer follows from the
prompt. SQL is written one way throughout: keywords in capitals, joined tables as T1, T2, T3 with the parent first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from demo_pair.generate import Draw, endless
from demo_pair.lexicon import CITIES, COUNTRIES, MEN, WOMEN
from demo_pair.sql_themes import POOLS, THEMES
from onlinespec.workloads.base import Prompt, Split

INSTRUCTION = (
    "Could you translate the following question into SQL. "
    "Please only generate SQL, don't include explanation in the answer."
)


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers have bounds, text has values."""

    name: str
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """A table of one prompt, with the nouns a question uses for its rows."""

    name: str
    one: str
    many: str
    columns: tuple[Column, ...]  # the first is what people call a row by; keys are not among them
    parents: tuple[str, ...]  # nouns whose `<noun>_id` this table refers to

    @property
    def label(self) -> Column:
        return self.columns[0]

    @property
    def texts(self) -> list[Column]:
        return [column for column in self.columns if column.values]

    @property
    def groups(self) -> list[Column]:
        return [column for column in self.columns[1:] if column.values] or [self.label]

    @property
    def numbers(self) -> list[Column]:
        return [column for column in self.columns if not column.values]


@dataclass(frozen=True)
class Link:
    """A foreign key: child.key = parent.key."""

    parent: Table
    child: Table

    @property
    def key(self) -> str:
        return f"{self.parent.one}_id"


@dataclass(frozen=True)
class Database:
    """The schema one prompt shows."""

    tables: tuple[Table, ...]
    links: tuple[Link, ...]

    def __str__(self) -> str:
        keys = [f"{link.child.name}.{link.key} = {link.parent.name}.{link.key}" for link in self.links]
        return "\n".join(["Database schema:", *map(_schema_line, self.tables), f"Foreign keys: {', '.join(keys)}"])


def _schema_line(table: Table) -> str:
    keys = [f"{noun}_id" for noun in (table.one, *table.parents)]
    return f"{table.name}({', '.join([keys[0], *(column.name for column in table.columns), *keys[1:]])})"


class Sql:
    """Endless questions over three dozen kinds of database, several about each; every answer runs on its schema."""

    name = "sql"

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        return endless(self.name, sit_down, seed, split)


def sit_down(rng: Random) -> Draw:
    """A database, and what asks about it."""
    database = draw_database(rng)
    return lambda rng: draw(rng, database)


def draw(rng: Random, database: Database) -> tuple[str, str]:
    """One prompt and its SQL."""
    ask = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0]
    asked = ask(rng, database)
    while asked is None:  # a question the schema has no columns for
        ask = rng.choice(list(QUESTIONS))
        asked = ask(rng, database)
    question, sql = asked
    return f"{database}\n\n{INSTRUCTION} {question[0].upper()}{question[1:]}", sql


# Databases


@dataclass(frozen=True)
class _Blueprint:
    """A line of THEMES: alternatives still open."""

    nouns: tuple[tuple[str, str], ...]  # (singular, plural)
    columns: tuple[tuple[tuple[str, ...], Column], ...]  # (names, a column without one)
    parents: tuple[str, ...]  # first singular noun of each parent


@cache
def _themes() -> list[list[_Blueprint]]:
    return [[_blueprint(line) for line in theme.splitlines()] for theme in THEMES.strip().split("\n\n")]


def _blueprint(line: str) -> _Blueprint:
    nouns, _, rest = line.partition(": ")
    singular, plural = (side.split("|") for side in nouns.split(" "))
    fields = rest.split(", ")
    columns = tuple(
        (tuple(names.split("|")), _kind(kind)) for names, _, kind in (f.partition("=") for f in fields) if kind
    )
    parents = tuple(field[1:] for field in fields if field.startswith(">"))
    return _Blueprint(tuple(zip(singular, plural, strict=True)), columns, parents)


def _kind(kind: str) -> Column:
    if kind.startswith("@"):
        return Column("", _pools()[kind[1:]])
    if ".." in kind:
        low, high = kind.split("..")
        return Column("", low=int(low), high=int(high))
    return Column("", tuple(kind.split("/")))


@cache
def _pools() -> dict[str, tuple[str, ...]]:
    dates = [
        f"{year}-{month:02}-{day:02}" for year in (2021, 2022, 2023) for month in range(1, 13) for day in (3, 14, 25)
    ]
    codes = [f"{letter}{number}" for letter in "ABCDEFGH" for number in range(11, 99, 7)]
    pools = {**POOLS, "person": [*WOMEN, *MEN], "city": CITIES, "country": COUNTRIES, "date": dates, "code": codes}
    return {name: tuple(values) for name, values in pools.items()}


def draw_database(rng: Random) -> Database:
    """Two or three linked tables of one theme, some of their columns, in words chosen afresh."""
    theme = rng.choice(_themes())
    dropped = rng.choice(theme) if rng.random() < 0.4 else None
    kept = [blueprint for blueprint in theme if blueprint is not dropped]
    if not any(_refers(a, b) for a in kept for b in kept):
        kept = theme
    nouns = {blueprint.nouns[0][0]: _distinct_noun(rng, blueprint, kept) for blueprint in kept}
    plural_names = rng.random() < 0.3
    tables = {noun: _table(rng, b, nouns, plural_names) for b in kept for noun in [b.nouns[0][0]]}
    links = [Link(tables[p], tables[b.nouns[0][0]]) for b in kept for p in b.parents if p in tables]
    return Database(tuple(tables.values()), tuple(links))


def _refers(child: _Blueprint, parent: _Blueprint) -> bool:
    return parent.nouns[0][0] in child.parents


def _distinct_noun(rng: Random, blueprint: _Blueprint, kept: list[_Blueprint]) -> tuple[str, str]:
    taken = {noun for other in kept if other is not blueprint for noun in other.nouns}
    return rng.choice([noun for noun in blueprint.nouns if noun not in taken])


def _table(rng: Random, blueprint: _Blueprint, nouns: dict[str, tuple[str, str]], plural_names: bool) -> Table:
    first, *others = blueprint.columns
    kept = sorted(rng.sample(range(len(others)), rng.randint(min(3, len(others)), len(others))))
    if all(kind.values for _, kind in (first, *(others[i] for i in kept))):  # always a number to ask about
        kept = sorted({*kept, next(i for i, (_, kind) in enumerate(others) if not kind.values)})
    columns: list[Column] = []
    for names, kind in (first, *(others[i] for i in kept)):
        free = [name for name in names if name not in {column.name for column in columns}]
        columns += [Column(rng.choice(free), kind.values, kind.low, kind.high)] if free else []
    one, many = nouns[blueprint.nouns[0][0]]
    parents = tuple(nouns[parent][0] for parent in blueprint.parents if parent in nouns)
    return Table(many if plural_names else _safe(one), one, many, tuple(columns), parents)


def _safe(noun: str) -> str:
    return {"order": "customer_order", "case": "court_case", "group": "music_group", "check": "bridge_check"}.get(
        noun, noun
    )


# Conditions: (what the question says, what the SQL says). `at` is "" or "T1."

Asked = tuple[str, str]


def _quoted(value: str) -> str:
    return f"'{value}'"


def _text_condition(rng: Random, table: Table, at: str = "", but: Column | None = None) -> Asked:
    columns = [column for column in table.texts if column is not but] or table.texts
    column = rng.choice(columns)
    value = rng.choice(column.values)
    said = rng.choice(["whose {c} is {v}", "with {c} {v}", "where the {c} is {v}", "that have {v} as {c}"])
    return said.format(c=column.words, v=value), f"{at}{column.name} = {_quoted(value)}"


def _round_number(rng: Random, column: Column) -> int:
    low, high = column.low, column.high
    span = high - low
    step = 1 if span <= 60 or (low >= 1000 and high <= 2100) else 5 if span <= 400 else 50 if span <= 9000 else 1000
    value = round(rng.uniform(low + span * 0.1, high - span * 0.1) / step) * step
    return min(max(value, low), high)


def _number_condition(rng: Random, table: Table, at: str = "", but: Column | None = None) -> Asked:
    columns = [column for column in table.numbers if column is not but] or table.numbers
    column = rng.choice(columns)
    value = _round_number(rng, column)
    words, sign = rng.choice([
        ("whose {c} is greater than {v}", ">"),
        ("with {c} above {v}", ">"),
        ("with {c} of more than {v}", ">"),
        ("whose {c} is less than {v}", "<"),
        ("with {c} below {v}", "<"),
        ("with {c} of at least {v}", ">="),
        ("whose {c} is at most {v}", "<="),
    ])  # fmt: skip
    return words.format(c=column.words, v=value), f"{at}{column.name} {sign} {value}"


def _condition(rng: Random, table: Table, at: str = "", but: Column | None = None) -> Asked:
    kinds = [
        kind
        for kind, columns in ((_text_condition, table.texts), (_number_condition, table.numbers))
        if columns != [but]
    ]
    return rng.choice(kinds)(rng, table, at, but)


def _shown(rng: Random, table: Table, most: int = 3) -> list[Column]:
    count = rng.randint(1, min(most, len(table.columns)))
    others = rng.sample(table.columns[1:], count - 1)
    return [table.label, *others] if rng.random() < 0.8 else rng.sample(table.columns, count)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _said(columns: list[Column]) -> str:
    return _listed([column.words for column in columns])


def _sql(columns: list[Column], at: str = "") -> str:
    return ", ".join(f"{at}{column.name}" for column in columns)


def _opening(rng: Random, many: str) -> str:
    what = "what are" if " and " in many or many.endswith("values") else "what is"
    return rng.choice(
        [f"{what} the {many}", f"show the {many}", f"list the {many}", f"find the {many}", f"give me the {many}"]
    )


def _closed(question: str) -> str:
    return question + ("?" if question.split()[0].lower() in {"what", "which", "how", "who", "is", "are"} else ".")


AGGREGATES = {
    "average": "AVG", "mean": "AVG", "maximum": "MAX", "highest": "MAX", "largest": "MAX", "minimum": "MIN",
    "lowest": "MIN", "smallest": "MIN", "total": "SUM",
}  # fmt: skip


def _aggregate(rng: Random, column: Column) -> tuple[str, str]:
    allowed = [word for word in AGGREGATES if word != "total" or column.low < 1000 or column.high > 2100]
    word = rng.choice(allowed)
    return f"{word} {column.words}", AGGREGATES[word]


# Questions on one table


def ask_filter(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    columns = _shown(rng, table)
    said, where = _condition(rng, table)
    question = f"{_opening(rng, _said(columns))} of {rng.choice(['all', 'the'])} {table.many} {said}"
    return _closed(question), f"SELECT {_sql(columns)} FROM {table.name} WHERE {where}"


def ask_two_filters(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    columns = _shown(rng, table)
    said_text, where_text = _text_condition(rng, table)
    said_number, where_number = _number_condition(rng, table)
    word = rng.choice(["and", "or"])
    question = f"{_opening(rng, _said(columns))} of {table.many} {said_text} {word} {said_number}"
    return _closed(question), (
        f"SELECT {_sql(columns)} FROM {table.name} WHERE {where_text} {word.upper()} {where_number}"
    )


def ask_either(rng: Random, database: Database) -> Asked | None:
    table = rng.choice(database.tables)
    column = rng.choice(table.groups)
    if len(column.values) < 2:
        return None
    first, second = rng.sample(column.values, 2)
    columns = _shown(rng, table)
    question = f"{_opening(rng, _said(columns))} of {table.many} whose {column.words} is {first} or {second}"
    return _closed(question), (
        f"SELECT {_sql(columns)} FROM {table.name} "
        f"WHERE {column.name} = {_quoted(first)} OR {column.name} = {_quoted(second)}"
    )


def ask_top(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    by = rng.choice(table.numbers)
    columns = _shown(rng, table, 2)
    count = rng.randint(1, 10)
    word, order = rng.choice([("highest", "DESC"), ("lowest", "ASC"), ("largest", "DESC"), ("smallest", "ASC")])
    where_said, where = _condition(rng, table, but=by) if rng.random() < 0.4 else ("", "")
    who = f"{count} {table.many}" if count > 1 else table.one
    question = f"{_opening(rng, _said(columns))} of the {who} with the {word} {by.words}"
    if where:
        question = f"{rng.choice(['among', 'considering only'])} the {table.many} {where_said}, {question}."
    else:
        question = _closed(question)
    filtered = f" WHERE {where}" if where else ""
    return question, f"SELECT {_sql(columns)} FROM {table.name}{filtered} ORDER BY {by.name} {order} LIMIT {count}"


def ask_sorted(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    columns = _shown(rng, table)
    by = rng.choice(table.columns)
    words, order = rng.choice([
        ("in ascending order of {c}", "ASC"),
        ("in descending order of {c}", "DESC"),
        ("sorted by {c} from high to low", "DESC"),
        ("sorted by {c} from low to high", "ASC"),
        ("ordered by {c}", "ASC"),
    ])  # fmt: skip
    said, where = _condition(rng, table, but=by)
    question = f"{_opening(rng, _said(columns))} of {table.many} {said}, {words.format(c=by.words)}"
    return _closed(question), f"SELECT {_sql(columns)} FROM {table.name} WHERE {where} ORDER BY {by.name} {order}"


def ask_count(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    said, where = _condition(rng, table)
    question = rng.choice([
        f"how many {table.many} are there {said}?",
        f"count the {table.many} {said}.",
        f"what is the number of {table.many} {said}?",
        f"find the number of {table.many} {said}.",
    ])  # fmt: skip
    return question, f"SELECT COUNT(*) FROM {table.name} WHERE {where}"


def ask_aggregate(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    column = rng.choice(table.numbers)
    said, function = _aggregate(rng, column)
    condition, where = _condition(rng, table, but=column)
    question = rng.choice([
        f"what is the {said} of the {table.many} {condition}?",
        f"find the {said} among {table.many} {condition}.",
        f"for the {table.many} {condition}, what is the {said}?",
    ])  # fmt: skip
    return question, f"SELECT {function}({column.name}) FROM {table.name} WHERE {where}"


def ask_three_aggregates(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    column = rng.choice(table.numbers)
    words = rng.sample(["average", "minimum", "maximum"], rng.randint(2, 3))
    condition, where = _condition(rng, table, but=column)
    question = f"{_opening(rng, _listed(words))} {column.words} of all {table.many} {condition}"
    selected = ", ".join(f"{AGGREGATES[word]}({column.name})" for word in words)
    return _closed(question), f"SELECT {selected} FROM {table.name} WHERE {where}"


def ask_group(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    by, number = rng.choice(table.groups), rng.choice(table.numbers)
    said, function = _aggregate(rng, number)
    question, tail = rng.choice([
        (f"for each {by.words}, what is the {said} of the {table.many}?", ""),
        (f"show each {by.words} with the {said} of its {table.many}, highest value first.",
         f" ORDER BY {function}({number.name}) DESC"),
        (f"list every {by.words} of {table.many} together with its {said}, sorted by {by.words}.",
         f" ORDER BY {by.name} ASC"),
    ])  # fmt: skip
    return question, (f"SELECT {by.name}, {function}({number.name}) FROM {table.name} GROUP BY {by.name}{tail}")


def ask_group_having(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    by, number = rng.choice(table.groups), rng.choice(table.numbers)
    count, value = rng.randint(2, 12), _round_number(rng, number)
    question, having = rng.choice([
        (f"which {by.words} values are shared by more than {count} {table.many}?", f"COUNT(*) > {count}"),
        (f"show each {by.words} that has at least {count} {table.many}.", f"COUNT(*) >= {count}"),
        (f"find every {by.words} for which the average {number.words} of its {table.many} is above {value}.",
         f"AVG({number.name}) > {value}"),
        (f"which {by.words} values have {table.many} with an average {number.words} below {value}?",
         f"AVG({number.name}) < {value}"),
    ])  # fmt: skip
    where_said, where = _condition(rng, table, but=by) if rng.random() < 0.4 else ("", "")
    filtered = f" WHERE {where}" if where else ""
    lead = f"consider only the {table.many} {where_said}: " if where else ""
    return lead + question, f"SELECT {by.name} FROM {table.name}{filtered} GROUP BY {by.name} HAVING {having}"


def ask_most_common(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    by = rng.choice(table.groups)
    word, order = rng.choice([("most", "DESC"), ("fewest", "ASC")])
    said, where = _condition(rng, table, but=by)
    question = f"which {by.words} has the {word} {table.many} {said}?"
    return question, (
        f"SELECT {by.name} FROM {table.name} WHERE {where} GROUP BY {by.name} ORDER BY COUNT(*) {order} LIMIT 1"
    )


def ask_between(rng: Random, database: Database) -> Asked | None:
    table = rng.choice(database.tables)
    column = rng.choice(table.numbers)
    low, high = sorted((_round_number(rng, column), _round_number(rng, column)))
    if low == high:
        return None
    columns = _shown(rng, table)
    words = rng.choice(["with {c} between {a} and {b}", "whose {c} lies between {a} and {b}"])
    question = f"{_opening(rng, _said(columns))} of {table.many} {words.format(c=column.words, a=low, b=high)}"
    return _closed(question), (f"SELECT {_sql(columns)} FROM {table.name} WHERE {column.name} BETWEEN {low} AND {high}")


def ask_like(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    column = rng.choice(table.texts)
    value = rng.choice(column.values)
    piece = value[:1] if rng.random() < 0.5 else value[1:4]
    words, pattern = rng.choice([
        ("starts with {p}", "{p}%"),
        ("contains {p}", "%{p}%"),
        ("ends with {p}", "%{p}"),
        ("includes the substring {p}", "%{p}%"),
    ])  # fmt: skip
    columns = _shown(rng, table)
    question = f"{_opening(rng, _said(columns))} of {table.many} whose {column.words} {words.format(p=piece)}"
    return _closed(question), (
        f"SELECT {_sql(columns)} FROM {table.name} WHERE {column.name} LIKE {_quoted(pattern.format(p=piece))}"
    )


def ask_distinct(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    column = rng.choice(table.groups)
    said, where = _condition(rng, table, but=column)
    if rng.random() < 0.5:
        return f"how many different {column.words} values do the {table.many} {said} have?", (
            f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name} WHERE {where}"
        )
    word = rng.choice(["distinct", "different", "unique"])
    question = f"{_opening(rng, f'{word} {column.words} values')} of the {table.many} {said}"
    return _closed(question), f"SELECT DISTINCT {column.name} FROM {table.name} WHERE {where}"


def ask_above_average(rng: Random, database: Database) -> Asked:
    table = rng.choice(database.tables)
    number = rng.choice(table.numbers)
    columns = _shown(rng, table)
    word, sign = rng.choice([("above", ">"), ("below", "<"), ("higher than", ">"), ("lower than", "<")])
    question = f"{_opening(rng, _said(columns))} of {table.many} whose {number.words} is {word} the average"
    return _closed(question), (
        f"SELECT {_sql(columns)} FROM {table.name} "
        f"WHERE {number.name} {sign} (SELECT AVG({number.name}) FROM {table.name})"
    )


# Questions over a foreign key


def _joined(link: Link) -> str:
    return f"FROM {link.parent.name} AS T1 JOIN {link.child.name} AS T2 ON T1.{link.key} = T2.{link.key}"


def ask_children(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns = _shown(rng, link.child)
    said, where = _condition(rng, link.parent, "T1.")
    whose = rng.choice([f"of the {link.child.many} that belong to", f"of {link.child.many} linked to"])
    question = f"{_opening(rng, _said(columns))} {whose} {link.parent.many} {said}"
    return _closed(question), f"SELECT {_sql(columns, 'T2.')} {_joined(link)} WHERE {where}"


def ask_parents(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns = _shown(rng, link.parent)
    said, where = _condition(rng, link.child, "T2.")
    has = rng.choice(["that have", "with"])
    question = f"{_opening(rng, f'distinct {_said(columns)}')} of {link.parent.many} {has} {link.child.many} {said}"
    return _closed(question), f"SELECT DISTINCT {_sql(columns, 'T1.')} {_joined(link)} WHERE {where}"


def ask_pairs(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    mine, theirs = link.child.label, link.parent.label
    said_child, where_child = _condition(rng, link.child, "T2.")
    said_parent, where_parent = _condition(rng, link.parent, "T1.")
    question = rng.choice([
        f"for every {link.child.one} {said_child} that belongs to a {link.parent.one} {said_parent}, "
        f"show its {mine.words} and the {theirs.words} of the {link.parent.one}",
        f"show the {mine.words} of each {link.child.one} and the {theirs.words} of its {link.parent.one}, "
        f"for {link.child.many} {said_child} and {link.parent.many} {said_parent}",
    ])  # fmt: skip
    return _closed(question), (
        f"SELECT T2.{mine.name}, T1.{theirs.name} {_joined(link)} WHERE {where_child} AND {where_parent}"
    )


def ask_children_sorted(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns, by = _shown(rng, link.child, 2), rng.choice(link.child.numbers)
    said, where = _text_condition(rng, link.parent, "T1.")
    word, order = rng.choice([("highest", "DESC"), ("lowest", "ASC")])
    count = rng.randint(2, 9)
    question = (
        f"{_opening(rng, _said(columns))} of the {count} {link.child.many} with the {word} {by.words} "
        f"among those of {link.parent.many} {said}"
    )
    return _closed(question), (
        f"SELECT {_sql(columns, 'T2.')} {_joined(link)} WHERE {where} ORDER BY T2.{by.name} {order} LIMIT {count}"
    )


def ask_count_per_parent(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    label = link.parent.label
    said, where = _condition(rng, link.child, "T2.") if rng.random() < 0.5 else ("", "")
    children = f"{link.child.many} {said}".strip()
    question = rng.choice([
        f"for each {link.parent.one}, show its {label.words} and the number of its {children}.",
        f"how many {children} does each {link.parent.one} have? Show the {label.words} and the count.",
    ])  # fmt: skip
    filtered = f" WHERE {where}" if where else ""
    return question, f"SELECT T1.{label.name}, COUNT(*) {_joined(link)}{filtered} GROUP BY T1.{link.key}"


def ask_parent_with_most(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns = _shown(rng, link.parent, 2)
    word, order = rng.choice([("most", "DESC"), ("fewest", "ASC")])
    said, where = _condition(rng, link.child, "T2.") if rng.random() < 0.5 else ("", "")
    question = f"{_opening(rng, _said(columns))} of the {link.parent.one} that has the {word} {link.child.many} {said}"
    filtered = f" WHERE {where}" if where else ""
    return _closed(question.strip()), (
        f"SELECT {_sql(columns, 'T1.')} {_joined(link)}{filtered} "
        f"GROUP BY T1.{link.key} ORDER BY COUNT(*) {order} LIMIT 1"
    )


def ask_parents_having(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns, number = _shown(rng, link.parent, 2), rng.choice(link.child.numbers)
    count, value = rng.randint(2, 9), _round_number(rng, number)
    said, having = rng.choice([
        (f"with at least {count} {link.child.many}", f"COUNT(*) >= {count}"),
        (f"that have more than {count} {link.child.many}", f"COUNT(*) > {count}"),
        (f"whose {link.child.many} have an average {number.words} above {value}", f"AVG(T2.{number.name}) > {value}"),
    ])  # fmt: skip
    question = f"{_opening(rng, _said(columns))} of all {link.parent.many} {said}"
    return _closed(question), (f"SELECT {_sql(columns, 'T1.')} {_joined(link)} GROUP BY T1.{link.key} HAVING {having}")


def ask_aggregate_over_link(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    number = rng.choice(link.child.numbers)
    said, function = _aggregate(rng, number)
    condition, where = _condition(rng, link.parent, "T1.")
    question = rng.choice([
        f"what is the {said} of {link.child.many} that belong to {link.parent.many} {condition}?",
        f"find the {said} of the {link.child.many} of all {link.parent.many} {condition}.",
    ])  # fmt: skip
    return question, f"SELECT {function}(T2.{number.name}) {_joined(link)} WHERE {where}"


def ask_group_over_link(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    by, number = rng.choice(link.parent.groups), rng.choice(link.child.numbers)
    said, function = _aggregate(rng, number)
    condition, where = _condition(rng, link.child, "T2.", but=number)
    question = (
        f"for each {by.words} of the {link.parent.many}, show the {said} of their {link.child.many} {condition}, "
        f"sorted from high to low."
    )
    return question, (
        f"SELECT T1.{by.name}, {function}(T2.{number.name}) {_joined(link)} WHERE {where} "
        f"GROUP BY T1.{by.name} ORDER BY {function}(T2.{number.name}) DESC"
    )


def ask_in(rng: Random, database: Database) -> Asked:
    link = rng.choice(database.links)
    columns = _shown(rng, link.parent, 2)
    said, where = _condition(rng, link.child)
    words, verb = rng.choice([("that have no", "NOT IN"), ("without any", "NOT IN"), ("that have some of the", "IN")])
    question = f"{_opening(rng, _said(columns))} of {link.parent.many} {words} {link.child.many} {said}"
    return _closed(question), (
        f"SELECT {_sql(columns)} FROM {link.parent.name} "
        f"WHERE {link.key} {verb} (SELECT {link.key} FROM {link.child.name} WHERE {where})"
    )


def ask_three_tables(rng: Random, database: Database) -> Asked | None:
    if len(database.links) < 2:
        return None
    first, second = database.links[:2]
    if first.child is second.parent:  # a chain: T1 has T2s, T2 has T3s
        last, tail = second.child, f"JOIN {second.child.name} AS T3 ON T2.{second.key} = T3.{second.key}"
    elif first.child is second.child:  # T2 stands between two parents
        last, tail = second.parent, f"JOIN {second.parent.name} AS T3 ON T2.{second.key} = T3.{second.key}"
    else:
        return None
    columns = _shown(rng, last, 2)
    said, where = _condition(rng, first.parent, "T1.")
    said_middle, where_middle = _condition(rng, first.child, "T2.")
    joined = f"{_joined(first)} {tail}"
    if rng.random() < 0.5:
        question = (
            f"{_opening(rng, f'distinct {_said(columns)}')} of {last.many} linked to {first.child.many} {said_middle} "
            f"that belong to {first.parent.many} {said}"
        )
        return _closed(question), (f"SELECT DISTINCT {_sql(columns, 'T3.')} {joined} WHERE {where_middle} AND {where}")
    question = f"how many {last.many} are linked to {first.child.many} that belong to {first.parent.many} {said}?"
    return question, f"SELECT COUNT(*) {joined} WHERE {where}"


# How often each question is asked
QUESTIONS: dict[Callable[[Random, Database], Asked | None], int] = {
    ask_filter: 3,
    ask_two_filters: 5,
    ask_either: 4,
    ask_top: 4,
    ask_sorted: 4,
    ask_count: 2,
    ask_aggregate: 3,
    ask_three_aggregates: 3,
    ask_group: 3,
    ask_group_having: 4,
    ask_most_common: 3,
    ask_between: 3,
    ask_like: 3,
    ask_distinct: 3,
    ask_above_average: 4,
    ask_children: 7,
    ask_parents: 7,
    ask_pairs: 9,
    ask_children_sorted: 8,
    ask_count_per_parent: 7,
    ask_parent_with_most: 8,
    ask_parents_having: 8,
    ask_aggregate_over_link: 7,
    ask_group_over_link: 9,
    ask_in: 7,
    ask_three_tables: 12,
}
