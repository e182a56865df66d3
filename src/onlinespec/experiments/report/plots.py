"""Charts as inline SVG, drawn by matplotlib.

Colours become CSS variables, so that a plot follows the browser's light or dark mode.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from math import isnan
from typing import Any, NamedTuple
from unicodedata import east_asian_width

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from onlinespec.experiments.report.summaries import FROZEN, PLAIN, Place, Points

# name: (light mode, dark mode). The light colours must differ: they identify a colour in matplotlib's SVG.
COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#5b646e", "#a1a9b3"),
    "grid": ("#dfe3e8", "#30363d"),
    "edge": ("#9aa3ad", "#5a636d"),
    "shade": ("#f4f6f8", "#1c2127"),
    "plain": ("#2b3036", "#d5d9de"),
    "frozen": ("#858d96", "#8f98a3"),
    "line-0": ("#0072b2", "#56b4e9"),  # this and the following after Okabe and Ito, safe for colour-blind readers
    "line-1": ("#d55e00", "#ff8f50"),
    "line-2": ("#009e73", "#35cfa1"),
    "line-3": ("#b3478a", "#e79ac8"),
    "line-4": ("#b07d00", "#f0c75a"),
    "line-5": ("#4a9fd4", "#a9d8f5"),
}
_VARIABLES = {light: f"var(--{name}, {light})" for name, (light, _) in COLOURS.items()}
_LONG_NUMBER = re.compile(r"(\.\d\d)\d+\b")
_HEX_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
NUM_LINE_COLOURS = sum(name.startswith("line-") for name in COLOURS)
MARKERS = "o^Dv*XPp<>"
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1.5)))
FONT_SIZE = 12.0
WIDTHS = {"wide": 900, "narrow": 380}  # pixels; narrow is for phones
HEIGHT = 290
DENSE = 60  # lines with more points are drawn thinner
RIGHT, BOTTOM, TOP = 8, 42, 24  # margins of the axes, in pixels; the left one depends on the tick labels
LEAST_LEFT, BESIDE_NUMBERS = 52, 24


class Style(NamedTuple):
    """The line style of a learner, the same in all plots of a page."""

    colour: str  # a name in COLOURS
    marker: str
    dashes: Any
    width: float

    def kwargs(self) -> dict[str, Any]:
        """Returns keyword arguments of matplotlib's `plot`."""
        colour = COLOURS[self.colour][0]
        return {"color": colour, "marker": self.marker, "linestyle": self.dashes, "linewidth": self.width, "ms": 5.0}

    @property
    def faint(self) -> Style:
        """The style for values derived from a learner's measurements, such as a bound: dashed, without markers."""
        return Style(self.colour, "", (0, (4, 2.2)), 1.5)


class Curve(NamedTuple):
    """A line of a chart, with a band from lowest to highest where runs differ."""

    label: str
    style: Style
    points: Points


class Chart(NamedTuple):
    """A chart over the requests of the stream."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None  # value of a horizontal reference line
    limits: tuple[float, float] | None = None  # of the y axis; None fits the values
    height: int = HEIGHT
    has_own_legend: bool = False  # because its curves differ from those of the charts beside it
    note: str = ""  # explanation below the chart

    @property
    def looks(self) -> dict[str, Style]:
        """The styles for a legend. Lines without markers are left out: they belong to a learner that is listed."""
        return {curve.label: curve.style for curve in self.curves if curve.style.marker}


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """Returns a style for each name, distinguishable without colour too; the controls have fixed styles."""
    styles = {PLAIN: Style("plain", "", (0, (5, 3)), 1.3), FROZEN: Style("frozen", "s", "-", 1.5)}
    for i, name in enumerate(name for name in names if name not in styles):
        turn, colour = divmod(i, NUM_LINE_COLOURS)
        dashes = DASHES[turn % len(DASHES)]
        styles[name] = Style(f"line-{colour}", MARKERS[i % len(MARKERS)], dashes, 1.7)
    return styles


def plot(chart: Chart, places: Sequence[Place], width: int, prefix: str) -> tuple[Markup, bool]:
    """Draws a chart.

    Args:
        places: The segments of the stream.
        width: In pixels.
        prefix: Of all ids in the SVG, so that they are unique on the page.

    Returns:
        The SVG, and whether a segment too narrow for its name shows its number instead, counted from 1.
    """
    figure = Figure(figsize=(width / 72, chart.height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    num_requests = sum(place.length for place in places)
    _set_axes(axes, num_requests, num_ticks=9 if width > 500 else 5)
    for number, curve in enumerate(chart.curves):
        _draw_curve(axes, curve, number, width // 25)
    if chart.level is not None:
        axes.axhline(chart.level, color=COLOURS["edge"][0], linewidth=1.2, zorder=1)
    if chart.limits:
        axes.set_ylim(*chart.limits)
    left = _place_axes(figure, axes, chart, width)
    is_numbered = _draw_segments(axes, places, (width - left - RIGHT) / max(num_requests, 1))
    labels = ", ".join(curve.label for curve in chart.curves)
    return _svg(figure, prefix, f"{chart.title}, one line each: {labels}"), is_numbered


def swatch(style: Style, prefix: str) -> Markup:
    """Draws a sample of a style for the legend."""
    width, height = 34, 14
    figure = Figure(figsize=(width / 72, height / 72))
    figure.add_artist(Line2D([0, 1], [0.5, 0.5], **(style.kwargs() | {"marker": ""})))
    figure.add_artist(Line2D([0.5], [0.5], **(style.kwargs() | {"linestyle": ""})))
    return _svg(figure, prefix, "")


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
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
    axes.tick_params(axis="both", color=edge, labelcolor=muted, labelsize=FONT_SIZE, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("request", color=ink, fontsize=FONT_SIZE)


def _place_axes(figure: Figure, axes: Axes, chart: Chart, width: int) -> float:
    """Sets the margins, with room for tick labels and unit on the left. Returns the left margin in pixels."""
    low, high = axes.get_ylim()
    numbers = (_tick(value) for value in axes.get_yticks() if low <= value <= high)
    left = max(LEAST_LEFT, BESIDE_NUMBERS + max(map(_text_width, numbers), default=0.0))
    inside = (width - left - RIGHT) / width, (chart.height - BOTTOM - TOP) / chart.height
    axes.set_position((left / width, BOTTOM / chart.height, *inside))
    label: dict[str, Any] = {
        "color": COLOURS["ink"][0],
        "fontsize": FONT_SIZE,
        "rotation": "vertical",
        "ha": "center",
        "va": "center",
    }
    figure.text(8 / width, BOTTOM / chart.height + inside[1] / 2, chart.unit, **label)
    return left


def _tick(value: float) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _draw_segments(axes: Axes, places: Sequence[Place], pixels_per_request: float) -> bool:
    """Draws bands, borders and names of the segments. Returns whether a number replaced a name."""
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
        if has_room or centre - _text_width(text) / 2 >= free_from:  # skips numbers that would overlap
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


def _draw_curve(axes: Axes, curve: Curve, number: int, max_markers: int) -> None:
    style = curve.style.kwargs()
    requests, medians, lows, highs = curve.points
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
    if alone and not style["marker"]:  # a line without markers would not show a single point
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
    """Converts a figure to inline SVG: ids with the prefix, colours as CSS variables, text as text, no fixed size."""
    page = StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "onlinespec", "axes.unicode_minus": True}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # irrelevant: the browser uses its own fonts
        figure.savefig(
            page, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = page.getvalue()
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", tag[0])
        text = _LONG_NUMBER.sub(r"\1", text)  # two decimals are precise enough
        return _HEX_COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), text)

    svg = re.sub("<[^>]*>", adapt, svg)  # in tags only: a segment's name is never rewritten
    about = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return Markup(
        re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {about} {found[1]}>", svg, count=1)
    )


def _text_width(text: str) -> float:
    """Estimates a label's width in pixels; the browser's font is unknown."""
    return sum(1.0 if east_asian_width(letter) in "WF" else 0.56 for letter in text) * FONT_SIZE
