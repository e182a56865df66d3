"""A report, for eyes: one self-contained HTML page, and a table for the terminal.

The figures are medians over the runs (repeats and seeds) of a learner at one temperature. Colours are
CSS variables, also inside the plots, so that the page follows the reader's light or dark mode.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from io import StringIO
from math import isnan, nan
from os import PathLike
from statistics import median
from typing import Any, NamedTuple
from unicodedata import east_asian_width

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from onlinespec.records import Report, Run, Segment, Totals, Window, write_atomically

PLAIN, FROZEN = "none", "frozen"  # the controls: plain decoding, and a drafter that does not learn
_CONTROL_RANK = {FROZEN: 1, PLAIN: 2}

# name: (in light mode, in dark mode). The light ones are also how a colour is found again in an SVG: no two alike.
COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#5b646e", "#a1a9b3"),
    "grid": ("#dfe3e8", "#30363d"),
    "edge": ("#9aa3ad", "#5a636d"),
    "shade": ("#f4f6f8", "#1c2127"),
    "plain": ("#2b3036", "#d5d9de"),
    "frozen": ("#858d96", "#8f98a3"),
    "line-0": ("#0072b2", "#56b4e9"),  # from here on after Okabe and Ito, safe for colour-blind eyes
    "line-1": ("#d55e00", "#ff8f50"),
    "line-2": ("#009e73", "#35cfa1"),
    "line-3": ("#b3478a", "#e79ac8"),
    "line-4": ("#b07d00", "#f0c75a"),
    "line-5": ("#4a9fd4", "#a9d8f5"),
}
_VARIABLES = {light: f"var(--{name}, {light})" for name, (light, _) in COLOURS.items()}
_HEX_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
NUM_LINE_COLOURS = sum(name.startswith("line-") for name in COLOURS)
MARKERS = "o^Dv*XPp<>"
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1.5)))
FONT_SIZE = 12.0
WIDTHS = {"wide": 900, "narrow": 380}  # in pixels of the page; the narrow one is for phones
HEIGHT = 290
DENSE = 60  # points of a line from which on it is drawn thinner


class Spread(NamedTuple):
    """The same figure from several runs."""

    median: float
    low: float
    high: float


class Place(NamedTuple):
    """A segment's place in the stream, as plots and tables need it."""

    segment: int  # its index in the records
    data: str
    start: int  # requests before it
    length: int


class Style(NamedTuple):
    """How one learner is drawn, in every plot of a page."""

    colour: str  # a name in COLOURS
    marker: str
    dashes: Any
    width: float

    def kwargs(self) -> dict[str, Any]:
        colour = COLOURS[self.colour][0]
        return {"color": colour, "marker": self.marker, "linestyle": self.dashes, "linewidth": self.width, "ms": 5.0}


class Points(NamedTuple):
    """One learner's curve: a point per window, NaN where a segment is missing."""

    requests: list[float]
    medians: list[float]
    lows: list[float]
    highs: list[float]


class Metric(NamedTuple):
    """What a plot or a table of segments shows."""

    title: str
    unit: str
    of: Callable[[Totals | Window], float]
    digits: int


METRICS = (
    Metric("Acceptance length", "tokens per step", lambda counted: counted.acceptance_length, 2),
    Metric("Net tokens per second", "tokens per second", lambda counted: counted.tokens_per_second, 1),
)


@dataclass(frozen=True)
class LearnerSummary:
    """All runs of one learner at one temperature."""

    learner: str
    runs: tuple[Run, ...]
    style: Style

    @cached_property
    def measured(self) -> tuple[Totals, ...]:
        """The totals of the runs that got as far as a request."""
        return tuple(run.totals for run in self.runs if run.totals.requests)

    def spread(self, name: str) -> Spread | None:
        """Of one figure of the totals; None where no run has it."""
        return spread_of(getattr(totals, name) for totals in self.measured)

    def segment_spread(self, index: int, metric: Metric) -> Spread | None:
        return spread_of(metric.of(segment) for segment in self.segments(index) if segment.requests)

    def segments(self, index: int) -> list[Segment]:
        """This segment in every run that has it."""
        return [segment for run in self.runs for segment in run.segments if segment.index == index]

    @property
    def acceptance_by_position(self) -> list[float]:
        """Medians over the runs that drafted that far."""
        rows = [totals.acceptance_by_position for totals in self.measured]
        width = max(map(len, rows), default=0)
        return [median(row[i] for row in rows if i < len(row)) for i in range(width)]

    @property
    def num_compared(self) -> int:
        """Requests, over all runs, whose output was compared with plain decoding."""
        return sum(totals.requests for totals in self.measured if totals.identical_to_plain is not None)

    @property
    def ties(self) -> int:
        return sum(totals.ties for totals in self.measured)

    @property
    def differs(self) -> bool:
        """Whether some output differs from plain decoding by more than a tie."""
        return any(totals.identical_to_plain is False for totals in self.measured)

    @property
    def identical(self) -> str:
        """For a table cell."""
        if self.differs:
            return "no"
        return f"{self.num_compared - self.ties:,} of {self.num_compared:,}" if self.num_compared else "–"

    def points(self, places: Sequence[Place], metric: Metric) -> Points:
        points = Points([], [], [], [])
        for place in places:
            for x, spread in self._windows(place, metric):
                for column, value in zip(points, (x, *(spread or (nan, nan, nan))), strict=False):
                    column.append(value)
        return points

    def _windows(self, place: Place, metric: Metric) -> Iterator[tuple[float, Spread | None]]:
        """Request number and figure of each window of a segment; a single gap where nothing was measured."""
        rows = [segment.windows for segment in self.segments(place.segment) if segment.windows]
        longest = max(rows, key=len, default=())
        if not longest:
            yield place.start + (place.length + 1) / 2, None
        start = place.start
        for i, window in enumerate(longest):
            values = (metric.of(row[i]) for row in rows if i < len(row) and row[i].requests)
            yield start + (window.requests + 1) / 2, spread_of(value for value in values if value > 0)
            start += window.requests


@dataclass(frozen=True)
class Group:
    """All learners at one temperature: what is compared with each other."""

    temperature: float
    learners: tuple[LearnerSummary, ...]

    @cached_property
    def measured(self) -> tuple[LearnerSummary, ...]:
        return tuple(learner for learner in self.learners if learner.measured)

    @cached_property
    def places(self) -> list[Place]:
        """The stream as the run that got furthest in each segment saw it."""
        furthest: dict[int, tuple[int, str]] = {}
        for segment in (segment for learner in self.learners for run in learner.runs for segment in run.segments):
            length = max(segment.requests, sum(window.requests for window in segment.windows))
            if length > furthest.get(segment.index, (0, ""))[0]:
                furthest[segment.index] = (length, segment.data)
        places, start = [], 0
        for index, (length, data) in sorted(furthest.items()):
            places.append(Place(index, " ".join(data.split()), start, length))
            start += length
        return places

    def segment_row(self, index: int, metric: Metric) -> list[tuple[Spread | None, bool]]:
        """A figure of every learner in one segment, and whether it is the highest."""
        spreads = [learner.segment_spread(index, metric) for learner in self.measured]
        highest = max((spread.median for spread in spreads if spread), default=0.0)
        return [(spread, len(spreads) > 1 and _median(spread) == highest) for spread in spreads]

    @property
    def num_runs(self) -> int:
        """The most runs that any learner has."""
        return max((len(learner.measured) for learner in self.measured), default=0)

    @property
    def num_positions(self) -> int:
        return max((len(learner.acceptance_by_position) for learner in self.measured), default=0)

    @property
    def has_windows(self) -> bool:
        """Whether there is anything to plot."""
        return any(segment.windows for learner in self.measured for run in learner.runs for segment in run.segments)

    @property
    def is_uneven(self) -> bool:
        """Whether the runs saw different numbers of requests, as in an interrupted stream."""
        return len({totals.requests for learner in self.measured for totals in learner.measured}) > 1

    @property
    def best(self) -> LearnerSummary | None:
        """The fastest of those that learn; a control if none does."""
        by_speed = sorted(self.measured, key=lambda learner: -_median(learner.spread("tokens_per_second")))
        return min(by_speed, key=lambda learner: _CONTROL_RANK.get(learner.learner, 0), default=None)

    @property
    def differing(self) -> list[str]:
        return [learner.learner for learner in self.measured if learner.differs]

    @property
    def verdict(self) -> str:
        """What is known about the output being that of plain decoding."""
        drafting = [learner for learner in self.measured if learner.learner != PLAIN]
        compared, ties = (sum(getattr(learner, name) for learner in drafting) for name in ("num_compared", "ties"))
        if self.differing:
            return f"Output differs from plain decoding with {', '.join(self.differing)}: requests.jsonl says where."
        if not drafting:
            return "Nothing was drafted."
        if not compared:
            sampled = "Sampled output is not compared token by token."
            return sampled if self.temperature else "Output was not compared with plain decoding."
        text = f"Output identical to plain decoding on {compared - ties:,} of {compared:,} answers"
        return f"{text}; the other {ties:,} first differ at a near-tie of the target." if ties else f"{text}."

    @property
    def headline(self) -> str:
        """The figures that matter, in words."""
        best = self.best
        if best is None:
            return "Nothing was measured."
        learning = [learner for learner in self.measured if learner.learner not in _CONTROL_RANK]
        opening = f"Fastest of {len(learning)} learners, {best.learner}" if len(learning) > 1 else best.learner
        speedups = [
            f"{_number(spread.median, 2)}× {other}{' (slower)' if round(spread.median, 2) < 1 else ''}"
            for name, other in (("speedup_vs_none", "plain decoding"), ("speedup_vs_frozen", "frozen"))
            if (spread := best.spread(name)) and best.learner not in (name.removeprefix("speedup_vs_"), PLAIN)
        ]
        text = " and ".join(speedups) or f"{_number(_median(best.spread('tokens_per_second')), 1)} tokens per second"
        if learning:
            text += f", learning counted ({_number(100 * _median(best.spread('learning_share')), 1)} % of decode time)"
        return f"{opening}: {text}. {self.verdict}"


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """None if there is not one value.

    >>> spread_of([1.5, None, 1.0, 2.5])
    Spread(median=1.5, low=1.0, high=2.5)
    """
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known)) if known else None


def groups_of(report: Report) -> list[Group]:
    """The runs by temperature and learner: controls first, the others in the order in which they came."""
    names = list(dict.fromkeys(run.learner for run in report.runs))
    names.sort(key=lambda name: -_CONTROL_RANK.get(name, 0))
    styles = _styles(names)
    groups = []
    for temperature in sorted({run.temperature for run in report.runs}):
        runs = [run for run in report.runs if run.temperature == temperature]
        by_name = {name: tuple(run for run in runs if run.learner == name) for name in names}
        learners = (LearnerSummary(name, its_runs, styles[name]) for name, its_runs in by_name.items() if its_runs)
        groups.append(Group(temperature, tuple(learners)))
    return groups


# --- for the terminal ---


def summary_table(report: Report) -> Table:
    """A row per learner and temperature; medians over the repeats."""
    groups = groups_of(report)
    if not any(group.measured for group in groups):
        table = Table(box=None, show_header=False)
        table.add_row("Nothing was measured.")  # rich prints nothing of a table without columns
        return table
    has_temperatures = len(groups) > 1
    medians = "medians over the runs [lowest–highest]; " if any(group.num_runs > 1 for group in groups) else ""
    table = Table(
        box=SIMPLE_HEAD, caption=Text(f"{medians}tokens per second counts learning time"), caption_justify="left"
    )
    if has_temperatures:
        table.add_column("temp.", justify="right", no_wrap=True)
    table.add_column("learner", overflow="fold")
    for title in ("acceptance\nlength", "tokens/s", "vs none", "vs frozen", "learning", "identical\nto plain"):
        table.add_column(title, justify="right", no_wrap=True)
    for group in groups:
        for learner in group.measured:
            cells = [
                _spread_text(learner.spread("acceptance_length"), 2),
                _spread_text(learner.spread("tokens_per_second"), 1),
                _spread_text(learner.spread("speedup_vs_none"), 2, "×"),
                _spread_text(learner.spread("speedup_vs_frozen"), 2, "×"),
                _share_text(learner.spread("learning_share")),
                learner.identical,
            ]
            temperature = [f"{group.temperature:g}"] if has_temperatures else []
            table.add_row(*map(Text, [*temperature, learner.learner, *cells]))  # Text: no markup in a name
        table.add_section()
    return table


# --- for the browser ---


def write_html(report: Report, path: str | PathLike[str]) -> None:
    """One page with everything in it: no scripts, nothing fetched."""
    write_atomically(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """The page itself. The same report gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "breakable": _breakable,
        "number": _number,
        "share": _share_text,
        "spread": _spread_markup,
    }
    template = environment.from_string(files("onlinespec").joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        report=report,
        groups=[group for group in groups_of(report) if group.measured],
        provenance=list(_flat(report.provenance)),
        colours=COLOURS,
        metrics=METRICS,
        widths=WIDTHS,
        plot=plot,
        swatch=swatch,
        plain=PLAIN,
    )


def plot(group: Group, metric: Metric, width: int, prefix: str) -> tuple[Markup, bool]:
    """The SVG of one metric over the stream, and whether segments were too narrow for their names.

    Where one was, its number stands for it, counted from 1. `prefix` keeps the ids of a page apart.
    """
    figure = Figure(figsize=(width / 72, HEIGHT / 72))
    left, right, bottom, top = (52, 8, 42, 24)
    axes = figure.add_axes((left / width, bottom / HEIGHT, 1 - (left + right) / width, 1 - (bottom + top) / HEIGHT))
    num_requests = sum(place.length for place in group.places)
    pixels_per_request = (width - left - right) / max(num_requests, 1)
    _set_axes(axes, num_requests, num_ticks=9 if width > 500 else 5)
    middle = (bottom + (HEIGHT - bottom - top) / 2) / HEIGHT
    label: dict[str, Any] = {
        "color": COLOURS["ink"][0],
        "fontsize": FONT_SIZE,
        "rotation": "vertical",
        "ha": "center",
        "va": "center",
    }
    figure.text(8 / width, middle, metric.unit, **label)
    is_numbered = _draw_segments(axes, group.places, pixels_per_request)
    for number, learner in enumerate(group.measured):
        _draw_learner(axes, learner, learner.points(group.places, metric), number, width // 25)
    names = ", ".join(learner.learner for learner in group.measured)
    return _svg(figure, prefix, f"{metric.title} over the stream, one line per learner: {names}"), is_numbered


def swatch(style: Style, prefix: str) -> Markup:
    """A bit of a learner's line, for the legend."""
    width, height = 34, 14
    figure = Figure(figsize=(width / 72, height / 72))
    figure.add_artist(Line2D([0, 1], [0.5, 0.5], **(style.kwargs() | {"marker": ""})))
    figure.add_artist(Line2D([0.5], [0.5], **(style.kwargs() | {"linestyle": ""})))
    return _svg(figure, prefix, "")


def _styles(names: Iterable[str]) -> dict[str, Style]:
    styles = {PLAIN: Style("plain", "", (0, (5, 3)), 1.3), FROZEN: Style("frozen", "s", "-", 1.5)}
    for i, name in enumerate(name for name in names if name not in styles):
        turn, colour = divmod(i, NUM_LINE_COLOURS)
        dashes = DASHES[turn % len(DASHES)]
        styles[name] = Style(f"line-{colour}", MARKERS[i % len(MARKERS)], dashes, 1.7)
    return styles


def _set_axes(axes: Axes, num_requests: int, num_ticks: int) -> None:
    ink, muted, grid, edge = (COLOURS[name][0] for name in ("ink", "muted", "grid", "edge"))
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(edge)
    axes.set_xlim(0.5, max(num_requests, 1) + 0.5)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.tick_params(axis="both", color=edge, labelcolor=muted, labelsize=FONT_SIZE, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("request", color=ink, fontsize=FONT_SIZE)


def _draw_segments(axes: Axes, places: Sequence[Place], pixels_per_request: float) -> bool:
    """Bands, borders and names; whether a name had to give way to a number."""
    muted, edge, shade = (COLOURS[name][0] for name in ("muted", "edge", "shade"))
    is_numbered, free_from = False, 0.0
    for number, place in enumerate(places, start=1):
        start, end = place.start + 0.5, place.start + place.length + 0.5
        if number % 2 == 0:
            axes.axvspan(start, end, facecolor=shade, edgecolor="none", zorder=0)
        if place.start:
            axes.axvline(start, color=edge, linewidth=0.8, dashes=(2, 2), zorder=0.5)
        room, centre = place.length * pixels_per_request, (start + end) / 2 * pixels_per_request
        has_room = _text_width(place.data) + 8 <= room
        is_numbered |= not has_room
        text = place.data if has_room else str(number)
        if has_room or centre - _text_width(text) / 2 >= free_from:  # where even numbers crowd, some are left out
            free_from = centre + _text_width(text) / 2 + 4
            style: dict[str, Any] = {
                "color": muted,
                "fontsize": FONT_SIZE,
                "ha": "center",
                "va": "bottom",
                "parse_math": False,
            }
            axes.text((start + end) / 2, 1.025, text, transform=axes.get_xaxis_transform(), **style)
    return is_numbered


def _draw_learner(axes: Axes, learner: LearnerSummary, points: Points, number: int, max_markers: int) -> None:
    style = learner.style.kwargs()
    requests, medians, lows, highs = points
    known = [not isnan(value) for value in medians]
    if any(low < high for low, high in zip(lows, highs, strict=True)):
        axes.fill_between(
            requests, lows, highs, color=style["color"], alpha=0.18, linewidth=0, zorder=1.5 + number / 100
        )
    if len(requests) > DENSE:
        style["linewidth"] *= 0.75
    every = max(1, -(-len(requests) // max_markers))
    alone = [
        i for i, is_known in enumerate(known) if is_known and not any(known[max(i - 1, 0) : i] + known[i + 1 : i + 2])
    ]
    marked = sorted({*range(number % every, len(requests), every), *alone})
    if alone and not style["marker"]:  # a point has no length to be seen by
        style |= {"marker": "_", "ms": 12.0}
        marked = alone
    axes.plot(
        requests,
        medians,
        **style,
        markevery=marked,
        markeredgewidth=1.6 if style["marker"] == "_" else 0.8,
        zorder=2 + number / 100,
    )


def _svg(figure: Figure, prefix: str, label: str) -> Markup:
    """Inline SVG: ids apart from those of other plots, colours as variables, text as text, no size of its own."""
    page = StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "onlinespec", "axes.unicode_minus": True}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has its own fonts
        figure.savefig(
            page, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = page.getvalue()
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", tag[0])
        return _HEX_COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), text)

    svg = re.sub("<[^>]*>", adapt, svg)  # in tags only: a segment's name is never rewritten
    about = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return Markup(
        re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {about} {found[1]}>", svg, count=1)
    )


def _text_width(text: str) -> float:
    """Pixels of a label, nearly: the reader's font is not known."""
    return sum(1.0 if east_asian_width(letter) in "WF" else 0.56 for letter in text) * FONT_SIZE


def _median(spread: Spread | None) -> float:
    return spread.median if spread else 0.0


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _range(spread: Spread, digits: int) -> str:
    """Empty where the runs agree to the last digit shown."""
    low, high = _number(spread.low, digits), _number(spread.high, digits)
    return f"{low}–{high}" if low != high else ""


def _spread_text(spread: Spread | None, digits: int, unit: str = "") -> str:
    if spread is None:
        return "–"
    extent = _range(spread, digits)
    return f"{_number(spread.median, digits)}{unit}" + (f"\n[{extent}]" if extent else "")


def _spread_markup(spread: Spread | None, digits: int, unit: str = "") -> Markup:
    if spread is None:
        return Markup("–")
    extent = _range(spread, digits)
    text = Markup("{}{}").format(_number(spread.median, digits), unit)
    return text + Markup(' <span class="range">[{}]</span>').format(extent) if extent else text


def _share_text(spread: Spread | None) -> str:
    return "–" if spread is None else f"{_number(100 * spread.median, 1)} %"


def _breakable(name: str) -> Markup:
    """Lets a long name break after its punctuation."""
    return Markup("<wbr>").join(re.split(r"(?<=[_.:/\\-])", name))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested dicts, as `outer.inner`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "–" if value is None else str(value)
