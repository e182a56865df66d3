"""Short made-up stories: a person with a trade, a place, a day, and something that happens.

The prompt states the facts and the answer tells them. Which wording it gets follows from a hash of the prompt, so one
prompt has one answer, whatever the seed.
"""

import re
from collections.abc import Iterator
from functools import cache
from random import Random

from demo_pair.generate import endless
from demo_pair.lexicon import MEN, WOMEN
from demo_pair.prose_lexicon import (
    ANIMALS,
    CLOSINGS,
    EVENTS,
    KINDS,
    OPENINGS,
    PLACES,
    PRIZES,
    PROMPTS,
    RELATIVES,
    SKILLS,
    THINGS,
    TIMES,
    TRADES,
    WEATHERS,
    WORK,
)  # fmt: skip
from onlinespec.workloads.base import Prompt, Split

NUM_WORDS = range(60, 111)
WOMAN = {"he": "she", "his": "her", "him": "her", "himself": "herself", "He": "She", "His": "Her"}
MAN = {word: word for word in WOMAN}

# The order in which a paragraph is told: Opening, Weather, Place, worK, what Happens, Reaction, End, Closing
PLANS = ("OWKHRE", "WOKHREC", "OPKHRE", "OKHRE", "OKPHRE", "OWHREC", "POKHRE", "OKHREC", "WOHRE", "OPHRE", "WOKHRE")


class Prose:
    """Endless requests for a paragraph, answered in four to seven sentences of 60 to 110 words in all."""

    name = "prose"

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        return endless(self.name, lambda rng: draw, seed, split)  # no story follows from another


def draw(rng: Random) -> tuple[str, str]:
    """One request and its paragraph."""
    facts, sentences = _facts(rng)
    request = _worded(rng.choice(PROMPTS), facts)
    return request, _paragraph(Random(request), facts, sentences)


def _facts(rng: Random) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """What fills the braces, and for each letter of a plan the sentences to choose from."""
    is_woman = rng.random() < 0.5
    trade, at, tool, did, craft = rng.choice(_rows(TRADES))
    kind, landmark, sights = rng.choice(_rows(KINDS))
    adjective, seasons, skies = rng.choice(_rows(WEATHERS))
    event, happenings, reactions, ends = rng.choice(_rows(EVENTS))
    town, day = rng.choice(PLACES), f"{adjective} {rng.choice(seasons.split())} {rng.choice(TIMES)}"
    facts = {
        **(WOMAN if is_woman else MAN),
        "name": rng.choice(WOMEN if is_woman else MEN),
        "trade": trade, "a_trade": f"a {trade}", "at": at, "tool": tool, "did": did, "craft": craft,
        "town": town, "place": f"the {kind} of {town}", "landmark": landmark,
        "day": day, "when": f"on a {day}", "When": f"On a {day}",
        "thing": rng.choice(THINGS), "animal": rng.choice(ANIMALS), "relative": rng.choice(RELATIVES),
        "prize": rng.choice(PRIZES), "skill": rng.choice(SKILLS),
    }  # fmt: skip
    facts["event"] = event.format_map(facts)
    variants = {"W": skies, "P": sights, "H": happenings, "R": reactions, "E": ends}
    sentences = {letter: tuple(texts.split(" / ")) for letter, texts in variants.items()}
    return facts, {**sentences, "O": OPENINGS, "K": WORK, "C": CLOSINGS}


def _paragraph(rng: Random, facts: dict[str, str], sentences: dict[str, tuple[str, ...]]) -> str:
    chosen = {letter: rng.choice(texts) for letter, texts in sentences.items()}
    for plan in rng.sample(PLANS, len(PLANS)):
        paragraph = " ".join(_worded(chosen[letter], facts) for letter in plan)
        if len(paragraph.split()) in NUM_WORDS:
            return paragraph
    raise AssertionError(f"no plan of {PLANS} has {NUM_WORDS} words for {facts}")


def _worded(text: str, facts: dict[str, str]) -> str:
    filled = text.format_map(facts)
    return re.sub(r"\b([Aa]) (?=(?!one-)[aeiou])", r"\1n ", filled)


@cache
def _rows(table: str) -> list[list[str]]:
    return [line.split(" | ") for line in table.strip().splitlines()]
