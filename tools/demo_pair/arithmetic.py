"""Grade-school word problems in the style of GSM8K: sentences with <<48/2=24>> marks, and "#### 24" at the end.

A template draws its numbers, says the problem in one of a few ways, and works it out line by line. `mark` does the
sums, so an answer is right by construction. Numbers are whole; money may have cents.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from random import Random

from demo_pair.generate import Draw, endless
from demo_pair.lexicon import MEN, WOMEN
from onlinespec.workloads.base import Prompt, Split

Number = int | Fraction
Worked = tuple[str, list[str], Number]  # the problem, the lines of the solution, the result
OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


class Arithmetic:
    """Endless word problems of two to four steps with worked answers."""

    name = "arithmetic"

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        return endless(self.name, sit_down, seed, split)


def sit_down(rng: Random) -> Draw:
    """A kind of problem, and what sets one."""
    template = rng.choice(TEMPLATES)
    return lambda rng: draw(rng, template)


def draw(rng: Random, template: Callable[[Random], Worked]) -> tuple[str, str]:
    """One problem and its worked answer."""
    problem, lines, result = template(rng)
    return problem, "\n".join([*lines, f"#### {shown(result)}"])


def shown(value: Number) -> str:
    """A number as GSM8K prints it: 12, or 12.50 when there are cents."""
    value = Fraction(value)
    return str(value) if value.denominator == 1 else f"{float(value):.2f}"


def mark(*terms: Number | str) -> tuple[str, Number]:
    """A sum, worked out left to right: (4, "*", 3) gives "4*3=<<4*3=12>>12" and 12.

    All its operators must be of equal rank, so that left to right is also how people read it.
    """
    first, *rest = terms
    value = Fraction(first)
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATIONS[str(operator)](value, Fraction(operand))
    sum_shown = "".join(term if isinstance(term, str) else shown(term) for term in terms)
    result = int(value) if value.denominator == 1 else value
    return f"{sum_shown}=<<{sum_shown}={shown(result)}>>{shown(result)}", result


# What the problems are about

TOYS = "marbles stickers shells stamps coins beads cards buttons badges postcards pebbles feathers ribbons".split()
FRUITS = "apples oranges pears plums peaches lemons mangoes figs melons bananas".split()
GOODS = {
    "notebook": "notebooks", "pencil": "pencils", "cap": "caps", "mug": "mugs", "towel": "towels", "lamp": "lamps",
    "book": "books", "candle": "candles", "scarf": "scarves", "plate": "plates", "ball": "balls", "kite": "kites",
    "basket": "baskets", "puzzle": "puzzles", "plant": "plants", "brush": "brushes",
}  # fmt: skip
BAKED = "cookies muffins pies rolls tarts buns waffles scones cupcakes pretzels".split()
ANIMALS = "cows goats sheep horses ducks hens geese rabbits pigs donkeys".split()
WORKPLACES = "a bakery|a garage|a library|a cinema|a hotel|a farm|a clothes shop|a post office|a museum".split("|")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
RELATIVES = "brother sister cousin neighbour friend uncle aunt classmate".split()
VEHICLES = "car bus train truck motorbike van".split()


@cache
def _people() -> list[tuple[str, str, str]]:
    return [(name, "she", "her") for name in WOMEN] + [(name, "he", "his") for name in MEN]


def _person(rng: Random) -> tuple[str, str, str]:
    return rng.choice(_people())


def _two_names(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(_people(), 2)
    return first[0], second[0]


def _up(words: str) -> str:
    return words[0].upper() + words[1:]


# Templates


def spent_from_budget(rng: Random) -> Worked:
    name, he, his = _person(rng)
    (one, many), (other, others) = rng.sample(sorted(GOODS.items()), 2)
    a, b, price_a, price_b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 15), rng.randint(2, 15)
    budget = a * price_a + b * price_b + rng.randint(1, 60)
    problem = rng.choice([
        f"{name} has ${budget}. {_up(he)} buys {a} {many} for ${price_a} each and {b} {others} for ${price_b} each. "
        f"How much money does {name} have left?",
        f"At the market a {one} costs ${price_a} and a {other} costs ${price_b}. {name} takes ${budget} along and buys "
        f"{a} {many} and {b} {others}. How many dollars are left in {his} purse?",
    ])  # fmt: skip
    cost_a, value_a = mark(a, "*", price_a)
    cost_b, value_b = mark(b, "*", price_b)
    both, spent = mark(value_a, "+", value_b)
    left, result = mark(budget, "-", spent)
    return (
        problem,
        [
            f"The {many} cost {a}*${price_a}=${cost_a.split('=', 1)[1]}.",
            f"The {others} cost {b}*${price_b}=${cost_b.split('=', 1)[1]}.",
            f"In all {name} spends {both} dollars.",
            f"So {he} has {left} dollars left.",
        ],
        result,
    )


def sold_over_two_days(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    baked, day = rng.choice(BAKED), rng.randrange(6)
    half = rng.randint(6, 60)
    first = 2 * half
    word, operator, by = rng.choice([("half", "/", 2), ("twice", "*", 2), ("three times", "*", 3)])
    problem = rng.choice([
        f"{name} sold {first} {baked} on {DAYS[day]} and {word} as many on {DAYS[day + 1]}. "
        f"How many {baked} did {name} sell altogether?",
        f"On {DAYS[day]} {name} baked {first} {baked}. On {DAYS[day + 1]} {he} baked {word} as many. "
        f"How many {baked} did {he} bake on the two days?",
    ])  # fmt: skip
    verb = "sold" if "sold" in problem else "baked"
    second_said, second = mark(first, operator, by)
    total_said, total = mark(first, "+", second)
    return (
        problem,
        [
            f"On {DAYS[day + 1]} {name} {verb} {second_said} {baked}.",
            f"Altogether {name} {verb} {total_said} {baked}.",
        ],
        total,
    )


def shared_collection(rng: Random) -> Worked:
    name, he, his = _person(rng)
    things, relative = rng.choice(TOYS), rng.choice(RELATIVES)
    people, each, gift = rng.randint(2, 9), rng.randint(3, 25), rng.randint(2, 30)
    start = people * each + gift
    problem = rng.choice([
        f"{name} has {start} {things}. {_up(he)} gives {gift} to {his} {relative} and shares the rest equally among "
        f"{people} friends. How many {things} does each friend get?",
        f"From a box of {start} {things}, {name} takes out {gift} for {his} {relative}. The others are divided equally "
        f"between {people} children. How many {things} does each child receive?",
    ])  # fmt: skip
    rest_said, rest = mark(start, "-", gift)
    each_said, result = mark(rest, "/", people)
    return (
        problem,
        [
            f"After the gift there are {rest_said} {things} left.",
            f"Each one gets {each_said} {things}.",
        ],
        result,
    )


def weekly_wage(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    place = rng.choice(WORKPLACES)
    hours, days, rate, weeks = rng.randint(3, 9), rng.randint(3, 6), rng.randint(8, 30), rng.randint(2, 6)
    problem = rng.choice([
        f"{name} works at {place} for {hours} hours a day, {days} days a week. {_up(he)} earns ${rate} an hour. "
        f"How much does {name} earn in {weeks} weeks?",
        f"At {place}, {name} is paid ${rate} per hour. If {he} works {hours} hours on each of {days} days every week, "
        f"how many dollars does {he} make in {weeks} weeks?",
    ])  # fmt: skip
    week_said, week = mark(hours, "*", days)
    pay_said, pay = mark(week, "*", rate)
    total_said, total = mark(pay, "*", weeks)
    return (
        problem,
        [
            f"{name} works {week_said} hours a week.",
            f"That pays {pay_said} dollars a week.",
            f"In {weeks} weeks {he} earns {total_said} dollars.",
        ],
        total,
    )


def overtime(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    place = rng.choice(WORKPLACES)
    rate, extra, normal, over = rng.randint(8, 25), rng.randint(2, 9), rng.randint(20, 40), rng.randint(2, 12)
    problem = rng.choice([
        f"{name} earns ${rate} an hour at {place} for the first {normal} hours of the week and ${extra} more for every "
        f"hour after that. Last week {he} worked {normal + over} hours. How much did {name} earn?",
        f"{_up(place)} pays {name} ${rate} per hour, and ${extra} extra per hour beyond {normal} hours a week. "
        f"How many dollars does {he} get for a week of {normal + over} hours?",
    ])  # fmt: skip
    normal_said, normal_pay = mark(normal, "*", rate)
    over_said, over_hours = mark(normal + over, "-", normal)
    rate_said, over_rate = mark(rate, "+", extra)
    pay_said, over_pay = mark(over_hours, "*", over_rate)
    total_said, total = mark(normal_pay, "+", over_pay)
    return (
        problem,
        [
            f"The first {normal} hours pay {normal_said} dollars.",
            f"{name} worked {over_said} hours of overtime.",
            f"An hour of overtime pays {rate_said} dollars.",
            f"So the overtime pays {pay_said} dollars.",
            f"In all {name} earned {total_said} dollars.",
        ],
        total,
    )


def ages(rng: Random) -> Worked:
    older, younger = _two_names(rng)
    age, gap, later = rng.randint(4, 30), rng.randint(2, 20), rng.randint(2, 15)
    problem = rng.choice([
        f"{older} is {gap} years older than {younger}. {younger} is {age} years old now. "
        f"How old will {older} be in {later} years?",
        f"{younger}, who is {age}, is {gap} years younger than {older}. What will be the age of {older} in {later} "
        f"years?",
    ])  # fmt: skip
    now_said, now = mark(age, "+", gap)
    then_said, then = mark(now, "+", later)
    return (
        problem,
        [f"{older} is {now_said} years old now.", f"In {later} years {older} will be {then_said} years old."],
        then,
    )


def sum_of_ages(rng: Random) -> Worked:
    first, second = _two_names(rng)
    third = rng.choice([name for name, _, _ in _people() if name not in (first, second)])
    age, times, gap = rng.randint(3, 15), rng.randint(2, 5), rng.randint(1, 12)
    problem = rng.choice([
        f"{first} is {age} years old. {second} is {times} times as old as {first}, and {third} is {gap} years older "
        f"than {second}. What is the sum of their ages?",
        f"The youngest of three cousins, {first}, is {age}. {second} is {times} times that age. {third} is {gap} years "
        f"older than {second}. How old are the three together?",
    ])  # fmt: skip
    second_said, second_age = mark(age, "*", times)
    third_said, third_age = mark(second_age, "+", gap)
    total_said, total = mark(age, "+", second_age, "+", third_age)
    return (
        problem,
        [
            f"{second} is {second_said} years old.",
            f"{third} is {third_said} years old.",
            f"Together they are {total_said} years old.",
        ],
        total,
    )


def discount(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    one, many = rng.choice(sorted(GOODS.items()))
    percent, count = rng.choice([10, 20, 25, 30, 40, 50, 75]), rng.randint(2, 9)
    price = rng.randint(1, 12) * (20 if percent in (25, 75) else 10)
    problem = rng.choice([
        f"A {one} normally costs ${price}. Today there is a discount of {percent}%. How much does {name} pay for "
        f"{count} {many}?",
        f"{name} wants {count} {many}. The usual price is ${price} each, but the shop takes {percent}% off. "
        f"How many dollars does {he} pay?",
    ])  # fmt: skip
    off_said, off = mark(price, "*", percent, "/", 100)
    now_said, now = mark(price, "-", off)
    total_said, total = mark(now, "*", count)
    return (
        problem,
        [
            f"The discount on one {one} is {off_said} dollars.",
            f"So one {one} costs {now_said} dollars.",
            f"{count} {many} cost {total_said} dollars.",
        ],
        total,
    )


def distance_two_legs(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    vehicle = rng.choice(VEHICLES)
    speed_a, speed_b = rng.randint(4, 22) * 5, rng.randint(4, 22) * 5
    hours_a, hours_b = rng.randint(2, 6), rng.randint(2, 6)
    problem = rng.choice([
        f"{name} travels by {vehicle} for {hours_a} hours at {speed_a} miles per hour, and then for {hours_b} hours at "
        f"{speed_b} miles per hour. How far does {name} travel?",
        f"A {vehicle} goes {speed_a} miles per hour for the first {hours_a} hours of a trip and {speed_b} miles per "
        f"hour for the next {hours_b} hours. {name} is on board. How many miles does {he} cover?",
    ])  # fmt: skip
    said_a, leg_a = mark(speed_a, "*", hours_a)
    said_b, leg_b = mark(speed_b, "*", hours_b)
    total_said, total = mark(leg_a, "+", leg_b)
    return (
        problem,
        [
            f"The first part is {said_a} miles long.",
            f"The second part is {said_b} miles long.",
            f"In all that is {total_said} miles.",
        ],
        total,
    )


def remaining_trip(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    vehicle = rng.choice(VEHICLES)
    speed, done, left = rng.randint(6, 18) * 5, rng.randint(2, 6), rng.randint(2, 8)
    length = speed * (done + left)
    problem = rng.choice([
        f"{name} has a trip of {length} miles ahead. The {vehicle} goes {speed} miles per hour. After {done} hours, "
        f"how many more hours will the trip take?",
        f"A {vehicle} has to cover {length} miles at {speed} miles per hour. {name} has been on the road for {done} "
        f"hours. How many hours does {he} still have to travel?",
    ])  # fmt: skip
    done_said, miles = mark(speed, "*", done)
    left_said, rest = mark(length, "-", miles)
    hours_said, hours = mark(rest, "/", speed)
    return (
        problem,
        [
            f"In {done} hours the {vehicle} covers {done_said} miles.",
            f"There are {left_said} miles left.",
            f"That takes {hours_said} more hours.",
        ],
        hours,
    )


def boxes_and_bags(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    fruit = rng.choice(FRUITS)
    boxes, per_box, eaten = rng.randint(3, 15), rng.randint(4, 24), rng.randint(2, 11)
    loose = rng.randint(2, 30)
    problem = rng.choice([
        f"{name} has {boxes} boxes with {per_box} {fruit} each and {loose} loose {fruit}. {eaten} of them are rotten. "
        f"How many good {fruit} does {name} have?",
        f"A grocer packs {per_box} {fruit} into each of {boxes} boxes and keeps {loose} more on the counter. {name} "
        f"finds that {eaten} {fruit} are bad and throws them away. How many {fruit} remain?",
    ])  # fmt: skip
    boxed_said, boxed = mark(boxes, "*", per_box)
    all_said, everything = mark(boxed, "+", loose)
    good_said, good = mark(everything, "-", eaten)
    return (
        problem,
        [
            f"The boxes hold {boxed_said} {fruit}.",
            f"With the loose ones there are {all_said} {fruit}.",
            f"Without the bad ones {good_said} {fruit} remain.",
        ],
        good,
    )


def farm_legs(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    four = rng.choice([animal for animal in ANIMALS if animal not in ("ducks", "hens", "geese")])
    two = rng.choice(["ducks", "hens", "geese"])
    a, b = rng.randint(3, 30), rng.randint(3, 40)
    problem = rng.choice([
        f"On the farm of {name} there are {a} {four} and {b} {two}. How many legs do the animals have altogether?",
        f"{name} keeps {a} {four} and {b} {two}. If {he} counted all their legs, what number would {he} get?",
    ])  # fmt: skip
    said_a, legs_a = mark(a, "*", 4)
    said_b, legs_b = mark(b, "*", 2)
    total_said, total = mark(legs_a, "+", legs_b)
    return (
        problem,
        [
            f"The {four} have {said_a} legs.",
            f"The {two} have {said_b} legs.",
            f"Altogether there are {total_said} legs.",
        ],
        total,
    )


def eggs_sold(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    hens, per_hen, eaten, price = rng.randint(5, 30), rng.randint(1, 3), rng.randint(2, 5), rng.randint(1, 4)
    days = rng.randint(2, 9)
    problem = rng.choice([
        f"{name} has {hens} hens that lay {per_hen} eggs each per day. {_up(he)} eats {eaten} eggs a day and sells the "
        f"rest for ${price} each. How much does {name} make in {days} days?",
        f"Every day each of the {hens} hens of {name} lays {per_hen} eggs. The family uses {eaten} of them for "
        f"breakfast and sells the others at ${price} per egg. How many dollars do they make in {days} days?",
    ])  # fmt: skip
    problem = problem.replace("lay 1 eggs", "lay 1 egg").replace("lays 1 eggs", "lays 1 egg")
    laid_said, laid = mark(hens, "*", per_hen)
    sold_said, sold = mark(laid, "-", eaten)
    money_said, money = mark(sold, "*", price)
    total_said, total = mark(money, "*", days)
    return (
        problem,
        [
            f"The hens lay {laid_said} eggs a day.",
            f"Of these {sold_said} are sold.",
            f"That makes {money_said} dollars a day.",
            f"In {days} days it makes {total_said} dollars.",
        ],
        total,
    )


def reading_plan(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    per_day, days, faster, more_days = rng.randint(8, 30), rng.randint(2, 7), rng.randint(2, 15), rng.randint(2, 8)
    pages = per_day * days + (per_day + faster) * more_days
    problem = rng.choice([
        f"{name} is reading a book of {pages} pages. For {days} days {he} reads {per_day} pages a day, then {faster} "
        f"more pages a day than before. How many more days does {name} need to finish?",
        f"A book has {pages} pages. {name} reads {per_day} pages on each of the first {days} days and after that "
        f"{faster} pages more per day. How many days does the rest of the book take?",
    ])  # fmt: skip
    read_said, read = mark(per_day, "*", days)
    left_said, left = mark(pages, "-", read)
    pace_said, pace = mark(per_day, "+", faster)
    days_said, result = mark(left, "/", pace)
    return (
        problem,
        [
            f"In the first {days} days {name} reads {read_said} pages.",
            f"That leaves {left_said} pages.",
            f"The new pace is {pace_said} pages a day.",
            f"So the rest takes {days_said} days.",
        ],
        result,
    )


def saving_up(rng: Random) -> Worked:
    name, he, his = _person(rng)
    one = rng.choice(["bicycle", "guitar", "tablet", "camera", "tent", "skateboard", "telescope", "violin"])
    weekly, weeks, have = rng.randint(4, 25), rng.randint(3, 15), rng.randint(5, 80)
    price = weekly * weeks + have
    problem = rng.choice([
        f"{name} wants a {one} that costs ${price}. {_up(he)} already has ${have} and saves ${weekly} every week. "
        f"In how many weeks can {name} buy the {one}?",
        f"A {one} costs ${price}. With ${have} in {his} drawer, {name} puts aside ${weekly} a week. "
        f"How many weeks does it take until {he} can afford it?",
    ])  # fmt: skip
    need_said, need = mark(price, "-", have)
    weeks_said, result = mark(need, "/", weekly)
    return problem, [f"{name} still needs {need_said} dollars.", f"That takes {weeks_said} weeks."], result


def seats_in_hall(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    hall = rng.choice(["theatre", "cinema", "concert hall", "stadium", "lecture hall", "circus tent"])
    rows, seats, price = rng.randint(6, 30), rng.randint(6, 25), rng.randint(3, 20)
    empty = rng.randint(3, rows * seats // 2)
    problem = rng.choice([
        f"A {hall} has {rows} rows of {seats} seats. Tonight {empty} seats are empty. Every visitor paid ${price}. "
        f"How much money did {name}, the owner, take in?",
        f"{name} runs a {hall} with {rows} rows and {seats} seats in each row. A ticket costs ${price}. "
        f"If {empty} seats stay empty, how many dollars does {he} take in?",
    ])  # fmt: skip
    all_said, places = mark(rows, "*", seats)
    taken_said, taken = mark(places, "-", empty)
    money_said, money = mark(taken, "*", price)
    return (
        problem,
        [
            f"The {hall} has {all_said} seats.",
            f"Of these {taken_said} are taken.",
            f"The tickets bring in {money_said} dollars.",
        ],
        money,
    )


def percent_of_class(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    percent = rng.choice([10, 20, 25, 30, 40, 50, 60, 75, 80])
    pupils = rng.randint(2, 25) * (20 if percent in (25, 75) else 10)
    sport, other = rng.sample(["football", "tennis", "chess", "swimming", "judo", "dancing", "rowing", "painting"], 2)
    taken = int(pupils * percent / 100)
    some = rng.randint(1, pupils - taken - 1)
    problem = rng.choice([
        f"There are {pupils} pupils in the school of {name}. {percent}% of them choose {sport} and {some} choose "
        f"{other}. How many pupils choose neither?",
        f"{name} asks {pupils} pupils about their hobbies: {percent}% like {sport} best, {some} like {other} best and "
        f"the others have no favourite. How many have no favourite?",
    ])  # fmt: skip
    share_said, share = mark(pupils, "*", percent, "/", 100)
    both_said, both = mark(share, "+", some)
    rest_said, rest = mark(pupils, "-", both)
    return (
        problem,
        [
            f"{share_said} pupils named {sport}.",
            f"Together with {other} that is {both_said} pupils.",
            f"So {rest_said} pupils are left.",
        ],
        rest,
    )


def fraction_eaten(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    baked, other = rng.choice(BAKED), rng.choice(RELATIVES)
    denominator = rng.choice([2, 3, 4, 5, 6])
    words = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}[denominator]
    total = denominator * rng.randint(3, 20)
    gift = rng.randint(1, total - total // denominator - 1)
    problem = rng.choice([
        f"{name} made {total} {baked}. The guests ate {words} of them, and a {other} took {gift} home. "
        f"How many {baked} are left?",
        f"Of {total} {baked} on a tray, {words} were eaten at lunch. Later {name} gave {gift} to a {other}. "
        f"How many {baked} stayed on the tray?",
    ])  # fmt: skip
    eaten_said, eaten = mark(total, "/", denominator)
    after_said, after = mark(total, "-", eaten)
    left_said, left = mark(after, "-", gift)
    return (
        problem,
        [
            f"The number of {baked} eaten is {eaten_said}.",
            f"That left {after_said} {baked}.",
            f"After the gift there were {left_said} {baked}.",
        ],
        left,
    )


def compare_collections(rng: Random) -> Worked:
    first, second = _two_names(rng)
    things = rng.choice(TOYS)
    count, times, fewer = rng.randint(6, 40), rng.randint(2, 6), rng.randint(1, 30)
    fewer = min(fewer, count * times - 1)
    problem = rng.choice([
        f"{first} has {count} {things}. {second} has {fewer} fewer than {times} times as many. "
        f"How many {things} do they have together?",
        f"{second} counts {things}: {times} times the {count} {things} of {first}, less {fewer}. "
        f"How many {things} do {first} and {second} own in total?",
    ])  # fmt: skip
    times_said, product = mark(count, "*", times)
    second_said, owned = mark(product, "-", fewer)
    total_said, total = mark(count, "+", owned)
    return (
        problem,
        [
            f"{times} times as many would be {times_said} {things}.",
            f"So {second} has {second_said} {things}.",
            f"Together they have {total_said} {things}.",
        ],
        total,
    )


def change_from_note(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    (one, many), (other, _others) = rng.sample(sorted(GOODS.items()), 2)
    cents = rng.choice([25, 50, 75, 20, 40, 60, 80])
    price, count, single = Fraction(rng.randint(1, 5) * 100 + cents, 100), rng.randint(2, 8), rng.randint(1, 9)
    note = next(n for n in (10, 20, 50, 100) if n > price * count + single)
    problem = rng.choice([
        f"{name} buys {count} {many} at ${shown(price)} each and a {other} for ${single}. {_up(he)} pays with a "
        f"${note} note. How much change does {name} get?",
        f"A {one} costs ${shown(price)} and a {other} costs ${single}. {name} pays for {count} {many} and one {other} "
        f"with a ${note} note. How many dollars does {he} get back?",
    ])  # fmt: skip
    many_said, cost = mark(count, "*", price)
    total_said, total = mark(cost, "+", single)
    change_said, change = mark(note, "-", total)
    return (
        problem,
        [
            f"The {many} cost {many_said} dollars.",
            f"Together with the {other} that is {total_said} dollars.",
            f"The change is {change_said} dollars.",
        ],
        change,
    )


def garden_fence(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    place = rng.choice(["garden", "field", "playground", "yard", "pasture", "park"])
    length, width, price = rng.randint(6, 60), rng.randint(4, 50), rng.randint(2, 15)
    problem = rng.choice([
        f"{name} wants to put a fence around a {place} that is {length} meters long and {width} meters wide. "
        f"A meter of fence costs ${price}. How much will the fence cost?",
        f"A rectangular {place} measures {length} meters by {width} meters. {name} buys a fence for all four sides at "
        f"${price} a meter. How many dollars does {he} pay?",
    ])  # fmt: skip
    half_said, half = mark(length, "+", width)
    round_said, around = mark(half, "*", 2)
    cost_said, cost = mark(around, "*", price)
    return (
        problem,
        [
            f"Two sides together measure {half_said} meters.",
            f"All four sides measure {round_said} meters.",
            f"The fence costs {cost_said} dollars.",
        ],
        cost,
    )


def painted_walls(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    walls, width, height, door = rng.randint(2, 6), rng.randint(3, 12), rng.randint(2, 5), rng.randint(1, 6)
    minutes = rng.randint(2, 9)
    problem = rng.choice([
        f"{name} paints {walls} walls, each {width} meters wide and {height} meters high. Doors and windows take up "
        f"{door} square meters that need no paint. One square meter takes {minutes} minutes. How many minutes does "
        f"{name} need?",
        f"A room has {walls} walls of {width} by {height} meters, of which {door} square meters are windows. {name} "
        f"needs {minutes} minutes to paint a square meter. In how many minutes does {he} finish the walls?",
    ])  # fmt: skip
    wall_said, wall = mark(width, "*", height)
    all_said, area = mark(wall, "*", walls)
    paint_said, paint = mark(area, "-", door)
    time_said, time = mark(paint, "*", minutes)
    return (
        problem,
        [
            f"One wall measures {wall_said} square meters.",
            f"All the walls measure {all_said} square meters.",
            f"Of these {paint_said} square meters need paint.",
            f"That takes {time_said} minutes.",
        ],
        time,
    )


def average_score(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    subject = rng.choice(["maths", "history", "biology", "French", "geography", "music", "chemistry"])
    mean = rng.randint(60, 92)
    shifts = rng.randint(1, 8), rng.randint(1, 7)
    scores = [mean + shifts[0], mean - shifts[1], mean - shifts[0] + shifts[1]]
    rng.shuffle(scores)
    a, b, c = scores
    problem = rng.choice([
        f"{name} scored {a}, {b} and {c} points in three {subject} tests. What is the average score?",
        f"In {subject}, {name} got {a} points in the first test, {b} in the second and {c} in the third. "
        f"What average does {he} have?",
    ])  # fmt: skip
    total_said, total = mark(a, "+", b, "+", c)
    mean_said, result = mark(total, "/", 3)
    return problem, [f"The scores add up to {total_said} points.", f"The average is {mean_said} points."], result


def water_tank(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    vessel = rng.choice(["tank", "pool", "barrel", "pond", "cistern", "basin"])
    fill, leak, hours = rng.randint(8, 40), rng.randint(1, 7), rng.randint(2, 15)
    start = rng.randint(5, 90)
    problem = rng.choice([
        f"A {vessel} holds {start} liters of water. {name} fills in {fill} liters every hour, but {leak} liters leak "
        f"out every hour. How many liters are in the {vessel} after {hours} hours?",
        f"{name} pumps {fill} liters an hour into a {vessel}, which loses {leak} liters an hour through a crack. At "
        f"first it holds {start} liters. How much water is in it after {hours} hours?",
    ])  # fmt: skip
    gain_said, gain = mark(fill, "-", leak)
    more_said, more = mark(gain, "*", hours)
    total_said, total = mark(start, "+", more)
    return (
        problem,
        [
            f"The {vessel} gains {gain_said} liters an hour.",
            f"In {hours} hours it gains {more_said} liters.",
            f"Then it holds {total_said} liters.",
        ],
        total,
    )


def bus_stops(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    vehicle = rng.choice(["bus", "tram", "train", "ferry"])
    start, off = rng.randint(15, 60), rng.randint(2, 14)
    on = rng.randint(2, 20)
    off_again = min(rng.randint(1, 12), start - off + on)
    problem = rng.choice([
        f"There are {start} people on a {vehicle} when {name} looks around. At the first stop {off} get off and {on} "
        f"get on. At the next stop {off_again} get off. How many people are on the {vehicle} now?",
        f"{name} drives a {vehicle} with {start} passengers. {off} leave at one stop and {on} come aboard. Then "
        f"{off_again} leave at the following stop. How many passengers remain?",
    ])  # fmt: skip
    first_said, first = mark(start, "-", off)
    second_said, second = mark(first, "+", on)
    third_said, third = mark(second, "-", off_again)
    return (
        problem,
        [
            f"After {off} people get off there are {first_said} people.",
            f"With the new ones there are {second_said} people.",
            f"After the next stop there are {third_said} people.",
        ],
        third,
    )


def recipe_scaled(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    baked = rng.choice(BAKED)
    ingredient = rng.choice(["flour", "sugar", "butter", "milk", "cocoa", "oats", "honey"])
    per_batch, grams, batches, have = (
        rng.randint(4, 24),
        rng.randint(2, 30) * 10,
        rng.randint(2, 9),
        rng.randint(1, 9) * 10,
    )
    have = min(have, grams * batches - 10)
    total = per_batch * batches
    problem = rng.choice([
        f"A recipe for {per_batch} {baked} needs {grams} grams of {ingredient}. {name} wants to make {total} {baked} "
        f"and has {have} grams of {ingredient}. How many more grams does {he} need?",
        f"{name} plans to make {total} {baked}. For every {per_batch} {baked} {he} needs {grams} grams of "
        f"{ingredient}. There are {have} grams in the kitchen. How many grams must {he} buy?",
    ])  # fmt: skip
    batches_said, number = mark(total, "/", per_batch)
    need_said, need = mark(number, "*", grams)
    more_said, more = mark(need, "-", have)
    return (
        problem,
        [
            f"{name} makes the recipe {batches_said} times.",
            f"That needs {need_said} grams of {ingredient}.",
            f"So {he} needs {more_said} more grams.",
        ],
        more,
    )


def phone_plan(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    service = rng.choice(["phone plan", "gym card", "music service", "film club", "bike rental", "library pass"])
    fee, extra, used, months = rng.randint(5, 40), rng.randint(1, 5), rng.randint(2, 12), rng.randint(2, 12)
    problem = rng.choice([
        f"A {service} costs ${fee} a month plus ${extra} for each extra hour. {name} uses {used} extra hours every "
        f"month. How much does {he} pay in {months} months?",
        f"{name} pays ${fee} per month for a {service} and ${extra} for every extra hour, of which {he} takes {used} a "
        f"month. How many dollars is that in {months} months?",
    ])  # fmt: skip
    extra_said, cost = mark(used, "*", extra)
    month_said, month = mark(fee, "+", cost)
    total_said, total = mark(month, "*", months)
    return (
        problem,
        [
            f"The extra hours cost {extra_said} dollars a month.",
            f"So a month costs {month_said} dollars.",
            f"In {months} months {name} pays {total_said} dollars.",
        ],
        total,
    )


def profit_on_sales(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    one, many = rng.choice(sorted(GOODS.items()))
    bought, cost, margin, rent = rng.randint(6, 40), rng.randint(2, 15), rng.randint(2, 12), rng.randint(5, 60)
    rent = min(rent, bought * margin - 1)
    price = cost + margin
    problem = rng.choice([
        f"{name} buys {bought} {many} for ${cost} each and sells them all for ${price} each. The market stall costs "
        f"${rent}. How much profit does {name} make?",
        f"At a fair {name} sells {bought} {many} at ${price}. Each {one} had cost ${cost}, and the stall costs "
        f"${rent}. How many dollars does {he} gain?",
    ])  # fmt: skip
    margin_said, gained = mark(price, "-", cost)
    gross_said, gross = mark(bought, "*", gained)
    net_said, net = mark(gross, "-", rent)
    return (
        problem,
        [
            f"{name} gains {margin_said} dollars on each {one}.",
            f"On all the {many} that is {gross_said} dollars.",
            f"After paying for the stall {he} has {net_said} dollars of profit.",
        ],
        net,
    )


def split_bill(rng: Random) -> Worked:
    name, _, _ = _person(rng)
    friends = rng.randint(2, 8)
    meals, drinks = rng.randint(8, 25), rng.randint(2, 7)
    total = friends * (meals + drinks)
    tip = friends * rng.randint(1, 4)
    problem = rng.choice([
        f"{name} and {friends - 1} friends eat out. The bill is ${total} and they add a tip of ${tip}. "
        f"If they share equally, how much does each one pay?",
        f"A dinner for {friends} people, {name} among them, costs ${total}. They leave ${tip} as a tip and split "
        f"everything equally. How many dollars is the share of {name}?",
    ])  # fmt: skip
    problem = problem.replace("and 1 friends", "and a friend")
    sum_said, everything = mark(total, "+", tip)
    share_said, share = mark(everything, "/", friends)
    return problem, [f"With the tip they pay {sum_said} dollars.", f"Each one pays {share_said} dollars."], share


def training_runs(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    verb, past = rng.choice([("runs", "running"), ("swims", "swimming"), ("cycles", "cycling"), ("walks", "walking")])
    short, long, days, rest = rng.randint(2, 9), rng.randint(10, 25), rng.randint(3, 6), rng.randint(2, 10)
    problem = rng.choice([
        f"{name} {verb} {short} kilometers on each of {days} days of the week and {long} kilometers on the last day. "
        f"How many kilometers does {he} cover in {rest} weeks?",
        f"Every week {name} goes {past}: {short} kilometers on {days} days and once {long} kilometers. "
        f"How far is that in {rest} weeks, in kilometers?",
    ])  # fmt: skip
    short_said, shorts = mark(short, "*", days)
    week_said, week = mark(shorts, "+", long)
    total_said, total = mark(week, "*", rest)
    return (
        problem,
        [
            f"The short days add up to {short_said} kilometers.",
            f"A week has {week_said} kilometers.",
            f"In {rest} weeks that is {total_said} kilometers.",
        ],
        total,
    )


def minutes_to_hours(rng: Random) -> Worked:
    name, he, _ = _person(rng)
    work = rng.choice(["practises the piano", "draws", "studies Spanish", "plays chess", "writes letters", "knits"])
    days, hours = rng.randint(3, 10), rng.randint(2, 9)
    minutes = [m for m in (10, 12, 15, 20, 24, 30, 36, 40, 45) if (m * days) % 60 == 0] or [30]
    per_day = rng.choice(minutes)
    days = days if (per_day * days) % 60 == 0 else 2 * days
    problem = rng.choice([
        f"{name} {work} for {per_day} minutes a day for {days} days, and for {hours} hours on the day after. "
        f"How many hours is that in all?",
        f"For {days} days {name} {work} {per_day} minutes a day. Then {he} adds a long session of {hours} hours. "
        f"What is the total time in hours?",
    ])  # fmt: skip
    minutes_said, total_minutes = mark(per_day, "*", days)
    hours_said, in_hours = mark(total_minutes, "/", 60)
    total_said, total = mark(in_hours, "+", hours)
    return (
        problem,
        [
            f"In {days} days that is {minutes_said} minutes.",
            f"In hours this is {hours_said} hours.",
            f"With the long session it is {total_said} hours.",
        ],
        total,
    )


TEMPLATES: list[Callable[[Random], Worked]] = [
    spent_from_budget, sold_over_two_days, shared_collection, weekly_wage, overtime, ages, sum_of_ages, discount,
    distance_two_legs, remaining_trip, boxes_and_bags, farm_legs, eggs_sold, reading_plan, saving_up, seats_in_hall,
    percent_of_class, fraction_eaten, compare_collections, change_from_note, garden_fence, painted_walls,
    average_score, water_tank, bus_stops, recipe_scaled, phone_plan, profit_on_sales, split_bill, training_runs,
    minutes_to_hours,
]  # fmt: skip
