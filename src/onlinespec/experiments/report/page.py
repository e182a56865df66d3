"""The rendered report: a self-contained HTML page, and a table for the terminal.

All statistics are medians over the runs (repeats and seeds) of a learner at one temperature.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from os import PathLike
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from onlinespec.experiments.report.statistics import METRICS, Spread, Statistic, number
from onlinespec.experiments.report.summaries import FROZEN, PLAIN, groups_of, learner_names
from onlinespec.experiments.report_schema import Report, write_atomically

# --- the terminal ---


def summary_table(report: Report) -> Table:
    """Returns the table for the terminal: a row per learner and temperature, with medians over the runs."""
    groups = groups_of(report)
    if not any(group.measured for group in groups):
        table = Table(box=None, show_header=False)
        table.add_row("Nothing was measured.")  # rich prints nothing for a table without columns
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
            table.add_row(*map(Text, [*temperature, learner.learner, *cells]))  # Text: no markup is parsed in names
        table.add_section()
    return table


# --- HTML ---


def write_html(report: Report, path: str | PathLike[str]) -> None:
    """Writes the HTML page: self-contained, without scripts, loading nothing."""
    write_atomically(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """Returns the HTML page. The same report always gives the same text."""
    from onlinespec.experiments.report import (
        charts,
        plots,  # imported here, because matplotlib takes a second and the table does not need it
    )

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "breakable": _breakable,
        "number": number,
        "share": _share_text,
        "spread": _spread_markup,
    }
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
    groups = [group for group in groups_of(report) if group.measured]
    return template.render(
        report=report,
        groups=groups,
        with_telemetry=[group for group in groups if group.with_telemetry],
        provenance=list(_flat(report.provenance)),
        colours=plots.COLOURS,
        styles=plots.styles_of(learner_names(report)),
        metrics=METRICS,
        widths=plots.WIDTHS,
        metric_chart=charts.metric_chart,
        themes_of=charts.themes_of,
        plot=plots.plot,
        swatch=plots.swatch,
        verdict=_verdict,
        plain=PLAIN,
        frozen=FROZEN,
    )


def _verdict(figure: Statistic, spread: Spread | None) -> str:
    """The CSS class of a cell, "good" or "bad", by the rounded value; empty if the statistic has no good side."""
    if spread is None or figure.good_below is None or round(spread.median, figure.digits) == figure.good_below:
        return ""
    return "good" if spread.median < figure.good_below else "bad"


def _range(spread: Spread, digits: int) -> str:
    """The range as text; empty if all runs agree to the last digit shown."""
    low, high = number(spread.low, digits), number(spread.high, digits)
    return ("–" if spread.low >= 0 else " to ").join((low, high)) if low != high else ""


def _spread_text(spread: Spread | None, digits: int, unit: str = "") -> str:
    if spread is None:
        return "–"
    extent = _range(spread, digits)
    return f"{number(spread.median, digits)}{unit}" + (f"\n[{extent}]" if extent else "")


def _spread_markup(spread: Spread | None, digits: int, unit: str = "") -> Markup:
    if spread is None:
        return Markup("–")
    extent = _range(spread, digits)
    text = Markup("{}{}").format(number(spread.median, digits), unit)
    return text + Markup(' <span class="range">[{}]</span>').format(extent) if extent else text


def _share_text(spread: Spread | None) -> str:
    return "–" if spread is None else f"{number(100 * spread.median, 1)} %"


def _breakable(name: str) -> Markup:
    """Allows line breaks after punctuation in a long name."""
    return Markup("<wbr>").join(re.split(r"(?<=[_.:=/\\-])", name))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields (name, value) of nested dicts as text, named `outer.inner`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "–" if value is None else str(value)
