import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import StringIO
from math import inf, isnan, nan
from xml.etree import ElementTree

import msgspec
import pytest
from markupsafe import Markup
from rich.console import Console

from onlinespec.experiments.report import plots
from onlinespec.experiments.report.charts import MOST_POINTS, SMOOTHING, Track, over_runs, positions, themes_of
from onlinespec.experiments.report.page import render_html, summary_table, write_html
from onlinespec.experiments.report.plots import COLOURS, MARKERS, styles_of
from onlinespec.experiments.report.statistics import METRICS
from onlinespec.experiments.report.summaries import groups_of, learner_names
from onlinespec.experiments.report_schema import Report, Run, Segment, Totals, Window
from onlinespec.learning.rounds import Round, summarise

VOID_TAGS = {"meta", "link", "img", "br", "hr", "input", "wbr"}


def figures(requests, acceptance_length, tokens_per_second, learning=0.0, identical=True, ties=0, **speedups):
    seconds = requests * 20 / tokens_per_second
    decode_seconds = seconds / (1 + learning)
    return {
        "requests": requests,
        "skipped": 0,
        "tokens": requests * 20,
        "steps": int(requests * 20 / acceptance_length),
        "acceptance_length": acceptance_length,
        "acceptance_rate": (acceptance_length - 1) / 4,
        "acceptance_by_position": (0.5, 0.25) if acceptance_length > 1 else (),
        "decode_seconds": decode_seconds,
        "learn_seconds": decode_seconds * learning,
        "tokens_per_second": tokens_per_second,
        "speedup_vs_none": speedups.get("vs_none"),
        "speedup_vs_frozen": speedups.get("vs_frozen"),
        "identical_to_plain": identical,
        "ties": ties,
    }


def make_run(learner, data=("sql", "code", "sql"), speed=10.0, length=2.0, repeat=0, temperature=0.0, **more):
    windows = tuple(
        Window(requests=5, acceptance_length=length + i / 10, tokens_per_second=speed + i) for i in range(5)
    )
    segments = tuple(
        Segment(index=i, data=name, windows=windows, **figures(25, length, speed, **more))
        for i, name in enumerate(data)
    )
    totals = Totals(**figures(25 * len(data), length, speed, **more))
    return Run(learner=learner, temperature=temperature, seed=0, repeat=repeat, totals=totals, segments=segments)


def make_report(*runs, **provenance):
    return Report(provenance={"target": "demo", "drafter": "eagle", **provenance}, runs=runs)


def full_report(repeats=3, temperatures=(0.0,)):
    runs = []
    for temperature in temperatures:
        for repeat in range(repeats):
            at = {"repeat": repeat, "temperature": temperature, "identical": None if temperature else True}
            runs += [
                make_run("none", speed=10 + repeat, length=1.0, vs_none=1.0, vs_frozen=1.3, **at),
                make_run("frozen", speed=8.0, length=1.4, vs_none=0.77, vs_frozen=1.0, **at),
                make_run(
                    "online_gradient",
                    speed=15.0,
                    vs_none=(1.4, 1.46, 1.5)[repeat % 3],
                    vs_frozen=1.9,
                    learning=0.078,
                    **at,
                ),
            ]
    return make_report(*runs)


@pytest.fixture(scope="module")
def full_html():
    """Drawn once, for all tests that only read it."""
    return render_html(full_report())


@pytest.fixture(scope="module")
def two_temperatures_html():
    return render_html(full_report(temperatures=(0.0, 0.7)))


@dataclass
class Page(HTMLParser):
    """Checks that tags nest, and keeps text, tags and ids."""

    open_tags: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] != "style":
            self.text += data

    def shows(self, words):
        return " ".join(words.split()) in " ".join(self.text.split())


def parse(html):
    page = Page()
    page.feed(html)
    page.close()
    assert page.open_tags == []
    return page


def headline(*runs):
    (group,) = groups_of(make_report(*runs))
    return group.headline


def terminal(report):
    console = Console(width=120, record=True, file=StringIO())
    console.print(summary_table(report))
    return console.export_text()


# --- the headline ---


def test_headline_has_the_figures_of_the_records(full_html):
    (group,) = groups_of(full_report())
    assert group.headline == (
        "online_gradient: 1.46× plain decoding and 1.90× frozen, learning counted (7.8 % of decode time). "
        "Output identical to plain decoding on 450 of 450 answers."
    )
    assert parse(full_html).shows(group.headline)


def test_headline_names_the_fastest_learner_and_how_many_there_were():
    slow, fast = make_run("ensemble", speed=9.0), make_run("optimistic", speed=12.0)
    control = make_run("frozen", speed=99.0)
    assert headline(control, slow, fast).startswith("Fastest of 2 learners, optimistic: ")


def test_headline_says_slower():
    assert "0.95× plain decoding (slower)" in headline(make_run("optimistic", vs_none=0.95))


def test_headline_without_controls_gives_the_rate():
    assert headline(make_run("optimistic", speed=12.5)).startswith("optimistic: 12.5 tokens per second, learning")


def test_headline_of_controls_alone_claims_no_learning():
    runs = make_run("none", length=1.0, vs_none=1.0), make_run("frozen", vs_none=1.2, vs_frozen=1.0)
    assert headline(*runs).startswith("frozen: 1.20× plain decoding. Output identical")
    assert headline(runs[0]) == "none: 10.0 tokens per second. Nothing was drafted."


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ties": 2}, "on 73 of 75 answers; the other 2 first differ at a near-tie of the target."),
        ({"identical": False}, "Output differs from plain decoding with optimistic: requests.jsonl says where."),
        ({"identical": None}, "Output was not compared with plain decoding."),
        ({"identical": None, "temperature": 0.7}, "Output was not compared with plain decoding."),
    ],
)
def test_headline_never_claims_more_identity_than_was_seen(more, words):
    assert headline(make_run("optimistic", **more)).endswith(words)


@pytest.mark.usefixtures("undrawn")
def test_a_difference_from_plain_decoding_stands_out():
    html = render_html(make_report(make_run("optimistic", identical=False)))
    assert '<p class="headline bad">' in html
    assert '<td class="bad">no</td>' in html


# --- the page ---


def test_page_is_well_formed_and_ids_are_its_own(two_temperatures_html):
    page = parse(two_temperatures_html)
    assert len(page.ids) == len(set(page.ids))
    for svg in re.findall(r"<svg.*?</svg>", two_temperatures_html, flags=re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def test_references_inside_plots_are_met(full_html):
    wanted = set(re.findall(r'href="#([^"]+)"', full_html)) | set(re.findall(r"url\(#([^)]+)\)", full_html))
    assert wanted
    assert wanted <= set(re.findall(r'id="([^"]+)"', full_html))


def test_page_needs_nothing_from_outside(full_html):
    assert not re.findall(r"https?:(?!//www\.w3\.org/(?:2000/svg|1999/xlink))", full_html)
    assert not re.findall(r"\bsrc\s*=|@import|url\((?!#)|href=\"(?!#)", full_html)
    assert not {"script", "link", "img", "iframe", "image"} & set(parse(full_html).tags)


def test_text_of_plots_is_text(full_html):
    assert re.search(r"<text [^>]*>tokens per second</text>", full_html)


def test_plots_follow_the_colour_mode(full_html):
    plots = "".join(re.findall(r"<svg.*?</svg>", full_html, flags=re.DOTALL))
    loose = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", plots)
    assert not set(re.findall(r"#[0-9a-f]{6}\b", loose))


def test_no_two_colours_are_alike_in_light_mode():
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_the_same_report_gives_the_same_page(full_html):
    assert render_html(full_report()) == full_html


@pytest.mark.parametrize(
    "name",
    [
        *("<b>bold</b>", "$x_1$", "--><i>", "漢字", "a\nb"),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("a & b", '"quoted"', "#0072b2", r"\1")),
    ],
)
def test_names_are_shown_as_they_are(name):
    run = make_run(name, data=(name,))
    html = render_html(make_report(run, target=name, settings={name: name}))
    page = parse(html)
    assert {"b", "i"}.isdisjoint(page.tags)
    assert page.text.count(" ".join(name.split()) if "\n" not in name else "a b") >= 2
    assert terminal(make_report(run))


def test_terminal_takes_no_markup_from_names():
    assert "[red]x" in terminal(make_report(make_run("[red]x")))


def test_every_temperature_has_its_pair_of_plots(two_temperatures_html):
    assert two_temperatures_html.count("<figure>") == 4
    assert "Temperature 0 (greedy)" in two_temperatures_html
    assert "Temperature 0.7" in two_temperatures_html


def test_tables_have_medians_and_spread(full_html):
    page = parse(full_html)
    assert page.shows("1.46× [1.40–1.50]")
    assert page.shows("11.0 [10.0–12.0]")


def test_segments_too_narrow_for_their_names_are_numbered():
    names = [f"a_rather_long_name_of_data_{i}" for i in range(12)]
    page = parse(render_html(make_report(make_run("optimistic", data=names))))
    assert page.shows("Segments: 1\u00a0a_rather_long_name_of_data_0, 2")


def test_learners_are_told_apart_without_colour():
    names = [f"learner_{i}" for i in range(10)]
    styles = [styles_of(names)[name] for name in names]
    assert len({(style.colour, style.marker) for style in styles}) == 10
    assert len({style.marker for style in styles}) == len(MARKERS)


def test_controls_come_first():
    (group,) = groups_of(make_report(*map(make_run, ("optimistic", "frozen", "none"))))
    assert [learner.learner for learner in group.learners] == ["none", "frozen", "optimistic"]


@pytest.mark.usefixtures("undrawn")
def test_provenance_is_folded_and_flat():
    html = render_html(make_report(make_run("none"), settings={"learn": {"step_size": 0.001}, "stop": [1, 2]}))
    folded = html[html.index("<details>") :]
    assert parse(folded.replace("</body>", "").replace("</html>", "")).shows("settings.learn.step_size0.001")
    assert "1, 2" in folded


@pytest.mark.usefixtures("undrawn")
def test_write_html_writes_the_page(tmp_path):
    write_html(full_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(full_report())


# --- little or nothing measured ---


@pytest.mark.usefixtures("undrawn")
def test_partial_reports_say_so(full_html):
    html = render_html(make_report(make_run("none"), make_run("optimistic", data=("sql",)), partial=True))
    assert "Partial report." in html
    assert "Not every run saw the same number of requests" in html
    assert "Partial report." not in full_html


EMPTY = Run(
    learner="optimistic",
    temperature=0.0,
    seed=0,
    repeat=0,
    totals=Totals(**(figures(1, 1.0, 1.0) | {"requests": 0, "tokens": 0, "steps": 0, "acceptance_length": 0.0})),
    segments=(),
)


@pytest.mark.parametrize("report", [make_report(), make_report(EMPTY), Report(provenance={}, runs=())])
def test_empty_reports_say_that_nothing_was_measured(report):
    assert parse(render_html(report)).shows("Nothing was measured.")
    assert "Nothing was measured." in terminal(report)


def test_one_learner_that_never_started_does_not_hide_the_others():
    html = render_html(make_report(make_run("frozen"), EMPTY))
    assert "<figure>" in html


def with_windows(run, *windows):
    segment = msgspec.structs.replace(run.segments[0], windows=windows)
    return msgspec.structs.replace(run, segments=(segment, *run.segments[1:]))


NOTHING_IN_IT = Window(requests=0, acceptance_length=0.0, tokens_per_second=0.0)
ONE_REQUEST = Window(requests=1, acceptance_length=2.0, tokens_per_second=9.0)


@pytest.mark.parametrize("windows", [(), (NOTHING_IN_IT,), (ONE_REQUEST,), (ONE_REQUEST, NOTHING_IN_IT, ONE_REQUEST)])
@pytest.mark.parametrize("data", [pytest.param(("sql",), marks=pytest.mark.full), ("sql", "code")])
def test_any_windows_can_be_drawn(windows, data):
    runs = [with_windows(make_run(name, data=data), *windows) for name in ("none", "optimistic")]
    parse(render_html(make_report(*runs)))


def test_a_missing_segment_is_a_gap_in_the_line():
    whole, holed = make_run("frozen"), make_run("optimistic")
    holed = msgspec.structs.replace(holed, segments=(holed.segments[0], holed.segments[2]))
    (group,) = groups_of(make_report(whole, holed))
    lengths = {learner.learner: learner.segment_spread(1, METRICS[0]) for learner in group.learners}
    assert lengths["optimistic"] is None
    assert lengths["frozen"].median == 2.0
    points = group.learners[1].points(group.places, METRICS[0])
    assert points.requests[:6] == [3, 8, 13, 18, 23, 38]
    assert points.medians[5] != points.medians[5]  # NaN
    assert points.requests[6] == 53


# --- how it learned ---


def make_round(request=0, kl=1.0, frozen_kl=1.5, **more):
    """A round with all that a round can do without left out."""
    return Round(
        **{
            "step": 10 * request,
            "request": request,
            "data": "sql",
            "interval": 24.0,
            "loss": kl / 2,
            "kl": kl,
            "token_loss": kl,
            "acceptance_prob": 0.6,
            "frozen_kl": frozen_kl,
            "frozen_acceptance_prob": 0.5,
            "acceptance_length_bound": 1.25,
            "distance": request / 10,
            "num_rows": SMOOTHING // 8,
            **more,
        }
    )


def watch(run, rounds, seconds=2.0):
    totals = msgspec.structs.replace(run.totals, diagnostic_seconds=seconds)
    return msgspec.structs.replace(run, totals=totals, telemetry=summarise(rounds))


def with_learner(run, learner):
    """As if read back: what the learner reported in the first round need not be numbers."""
    first, *others = run.telemetry.rounds
    rounds = (msgspec.structs.replace(first, learner=learner), *others)
    return msgspec.structs.replace(run, telemetry=msgspec.structs.replace(run.telemetry, rounds=rounds))


def hinted(error, norm=2.0):
    return {
        "hint_error": error,
        "gradient_norm": norm,
        "direction_hint_error": error / 2,
        "direction_gradient_norm": norm,
    }


def weighed(first, gap=-0.1, is_best_played=False):
    return {
        "expert_losses": {"0.001": 0.4, "frozen": 0.75},
        "meta_weights": {"0.001": first, "frozen": None if first is None else 1 - first},
        "averaging_gap": gap,
        "is_best_played": is_best_played,
    }


ENSEMBLE = "ensemble/step_size_pool=3e-4:1e-3:3e-3/with_frozen=true"


def watched_report(repeats=1, temperatures=(0.0,)):
    """Three learners that were watched for 75 rounds, one a request, beside both controls."""
    runs = []
    for temperature in temperatures:
        for repeat in range(repeats):
            at = {"repeat": repeat, "temperature": temperature}
            runs += [make_run("none", length=1.0, **at), make_run("frozen", **at)]
            learners = {
                "online_gradient": lambda i: {},
                "optimistic": lambda i: hinted(1.5 + i % 2),
                ENSEMBLE: lambda i: weighed(i / 80, is_best_played=i % 5 == 0),
            }
            for name, report in learners.items():
                rounds = [
                    make_round(
                        i,
                        1.0 + repeat / 10,
                        function_moved=None if i % 16 else 0.1,
                        gradient_cosine=0.25 if i else None,
                        learner=report(i),
                    )
                    for i in range(75)
                ]
                runs.append(watch(make_run(name, **at), rounds))
    return make_report(*runs)


@pytest.fixture(scope="module")
def watched_html():
    return render_html(watched_report())


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of what stands beside the plots, which take most of a page's time."""
    monkeypatch.setattr(plots, "plot", lambda chart, places, width, prefix: ("", False))
    monkeypatch.setattr(plots, "swatch", lambda style, prefix: "")


def second_page(html):
    return html[html.index('<div id="learning"') :]


def learning_table(html):
    """Cells by learner and title; the first table of the second page."""
    table = re.search(r"<table>.*?</table>", second_page(html), flags=re.DOTALL)[0]
    texts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in table.split("<tr>")[1:]]
    titles, *rows = [["".join(re.split(r"<[^>]*>", cell)) for cell in row] for row in texts]
    return {row[0]: dict(zip(titles[1:], row[1:], strict=True)) for row in rows}


def charts_of(*runs):
    """By title, as they would be drawn."""
    report = make_report(*runs)
    (group,) = groups_of(report)
    themes = themes_of(group, styles_of(learner_names(report)))
    return {chart.title: chart for theme in themes for chart in theme.charts}


REGRET = "Regret against frozen, per row so far"
KL = "KL divergence from the target to the drafter"
BOUND = "Acceptance length, and its lower bound"
STREAM = "The stream: acceptance probability of the frozen drafter"
WEIGHTS = "The weights: distance from the start"
FUNCTION = "The function: how much the drafts changed"
COSINE = "Cosine of each round's gradient with the one before"
HINTS = "Error of the hints over the size of the gradients"


@pytest.mark.usefixtures("undrawn")
def test_second_page_is_there_exactly_when_learning_was_measured(full_html):
    for html, is_there in ((render_html(watched_report()), True), (full_html, False)):
        assert ('id="learning"' in html) == is_there
        assert ('href="#learning"' in html) == is_there
        assert parse(html).shows("How it learned") == is_there


def test_second_page_is_as_well_formed_as_the_first(watched_html):
    page = parse(watched_html)
    assert len(page.ids) == len(set(page.ids))
    wanted = set(re.findall(r'href="#([^"]+)"', watched_html)) | set(re.findall(r"url\(#([^)]+)\)", watched_html))
    assert {"learning", "results"} <= wanted <= set(page.ids)
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    for svg in re.findall(r"<svg.*?</svg>", watched_html, flags=re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        loose = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", svg)
        assert not re.findall(r"#[0-9a-f]{6}\b", loose)


@pytest.mark.full
def test_the_same_telemetry_gives_the_same_page(watched_html):
    assert render_html(watched_report()) == watched_html


@pytest.mark.usefixtures("undrawn")
def test_only_temperatures_with_telemetry_are_on_the_second_page():
    greedy, sampled = (watched_report(temperatures=(t,)).runs for t in (0.0, 0.7))
    both = second_page(render_html(make_report(*greedy, *sampled)))
    assert "Temperature 0 (greedy)" in both
    assert "Temperature 0.7" in both
    one = second_page(render_html(make_report(*greedy, *(msgspec.structs.replace(r, telemetry=None) for r in sampled))))
    assert "Temperature 0 (greedy)" in one
    assert "Temperature 0.7" not in one


@pytest.mark.usefixtures("undrawn")
def test_table_has_the_figures_of_the_records():
    plain, frozen = make_run("none", length=1.0), make_run("frozen")
    optimistic = watch(
        make_run("optimistic", learning=0.1),
        [
            make_round(0, 2.0, 2.5, distance=0.0, learner=hinted(2.0), num_rows=10),
            make_round(1, 1.0, 2.5, distance=0.25, learner=hinted(1.0), num_rows=30, gradient_cosine=0.25),
        ],
    )
    ensemble = watch(
        make_run("ensemble", learning=0.2),
        [
            make_round(0, 1.0, 0.75, loss=0.5, learner=weighed(0.5), num_rows=20),
            make_round(1, 1.0, 0.5, loss=0.6, distance=0.5, learner=weighed(0.5), num_rows=20),
        ],
        seconds=3.25,
    )
    table = learning_table(render_html(make_report(plain, frozen, optimistic, ensemble)))
    seconds = {run.learner: f"{run.totals.learn_seconds:.1f}" for run in (optimistic, ensemble)}
    assert table == {
        "frozen": dict.fromkeys(table["frozen"], "–") | {"Learning, seconds": "0.0"},
        "optimistic": {
            "Rounds": "2",
            "Rows": "40",
            "Token loss per row": "1.25",
            "Regret per row, at most": "1.25",
            "Regret per row vs frozen": "−1.25",
            "Regret per row vs best expert": "–",
            "Hint error": "0.75",
            "Hint error in geometry": "0.38",
            "Gradient cosine": "0.25",
            "Distance from start": "0.250",
            "Learning, seconds": seconds["optimistic"],
            "Measuring, seconds": "2.0",
        },
        "ensemble": {
            "Rounds": "2",
            "Rows": "40",
            "Token loss per row": "1.00",
            "Regret per row, at most": "1.00",
            "Regret per row vs frozen": "0.38",
            "Regret per row vs best expert": "0.150",
            "Hint error": "–",
            "Hint error in geometry": "–",
            "Gradient cosine": "–",
            "Distance from start": "0.500",
            "Learning, seconds": seconds["ensemble"],
            "Measuring, seconds": "3.2",
        },
    }


@pytest.mark.usefixtures("undrawn")
def test_regret_below_zero_and_useful_hints_stand_out():
    good = watch(make_run("good"), [make_round(0, 1.0, 2.0, learner=hinted(1.0))])
    bad = watch(make_run("bad"), [make_round(0, 2.0, 1.0, learner=hinted(5.0))])
    html = second_page(render_html(make_report(good, bad)))
    assert '<td class="good">−1.00</td>' in html
    assert '<td class="good">0.50</td>' in html
    assert '<td class="bad">1.00</td>' in html
    assert '<td class="bad">2.50</td>' in html


@pytest.mark.usefixtures("undrawn")
def test_a_learner_that_has_moved_nothing_is_neither_good_nor_bad():
    """Rounding may leave a billionth on either side."""
    idle = watch(make_run("osd"), [make_round(0, 1.0 - 1e-9, 1.0)])
    busy = watch(make_run("online_gradient"), [make_round(0, 1.0, 2.0)])
    html = second_page(render_html(make_report(idle, busy)))
    assert "<td>0.00</td>" in html
    assert '<td class="good">−1.00</td>' in html


@pytest.mark.usefixtures("undrawn")
def test_columns_that_no_learner_has_are_left_out():
    html = render_html(make_report(watch(make_run("online_gradient"), [make_round()])))
    assert "Hint error" not in html
    assert "best expert" not in html


@pytest.mark.usefixtures("undrawn")
def test_table_has_medians_and_spread_over_runs():
    runs = [watch(make_run("optimistic", repeat=i), [make_round(0, 1.0 - i, 2.0)]) for i in range(3)]
    (row,) = learning_table(render_html(make_report(*runs))).values()
    assert row["Regret per row vs frozen"] == "−2.00 [−3.00 to −1.00]"
    assert row["Rounds"] == "1"


@pytest.mark.usefixtures("undrawn")
def test_long_columns_have_few_digits():
    rounds = [make_round(i, 12.345, 100.0) for i in range(10)]
    (row,) = learning_table(render_html(make_report(watch(make_run("optimistic"), rounds)))).values()
    assert (row["Regret per row, at most"], row["Regret per row vs frozen"]) == ("12.3", "−87.7")


@pytest.mark.usefixtures("undrawn")
def test_the_rows_behind_the_last_round_are_no_round():
    rounds = [make_round(0, num_rows=10), make_round(1, loss=None, is_update=False, num_rows=5)]
    (row,) = learning_table(render_html(make_report(watch(make_run("optimistic"), rounds)))).values()
    assert (row["Rounds"], row["Rows"]) == ("1", "15")


@pytest.mark.usefixtures("undrawn")
def test_a_learner_of_one_round_that_learned_nothing_looks_best_nowhere():
    """A preset with a round for every eight requests has one where others have twenty: its sums are small."""
    rare = watch(make_run("osd"), [make_round(8, 5.0, 5.0, num_rows=600)])
    often = watch(make_run("online_gradient"), [make_round(i, 4.0, 5.0, num_rows=30) for i in range(20)])
    report = make_report(rare, often)
    table = learning_table(render_html(report))
    for title in ("Token loss per row", "Regret per row, at most", "Regret per row vs frozen"):
        figures = {name: float(row[title].replace("−", "-")) for name, row in table.items()}
        assert figures["online_gradient"] < figures["osd"], title
    assert table["osd"]["Rows"] == table["online_gradient"]["Rows"] == "600"
    (group,) = groups_of(report)
    assert group.regret_sentence.startswith("Of 2 learners, online_gradient did best: 1.00 nats a row below frozen")


@pytest.mark.parametrize(
    ("regrets", "words"),
    [
        ({"optimistic": (-4.0, 2)}, "optimistic: 2.00 nats a row below frozen, so learning paid."),
        ({"optimistic": (3.0, 1)}, "optimistic: 3.00 nats a row above frozen, so learning has not paid."),
        ({"a": (-4.0, 4), "b": (-3.0, 2)}, "Of 2 learners, b did best: 1.50 nats a row below frozen"),
    ],
)
def test_lesson_goes_by_the_row(regrets, words):
    runs = [
        watch(make_run(name), [make_round(i, 5 + sum_of / count, 5.0) for i in range(count)])
        for name, (sum_of, count) in regrets.items()
    ]
    (group,) = groups_of(make_report(*runs))
    assert group.regret_sentence.startswith(words)


@pytest.mark.usefixtures("undrawn")
def test_time_of_measuring_is_mentioned_where_it_was_spent(full_html):
    assert parse(render_html(watched_report())).shows("Measuring how they learned took another 6.0 seconds")
    assert not parse(full_html).shows("Measuring how they learned")


def test_every_figure_is_drawn_for_those_who_have_it():
    charts = charts_of(*watched_report().runs)
    learners = ["online_gradient", "optimistic", ENSEMBLE]
    labels = {title: [curve.label for curve in chart.curves] for title, chart in charts.items()}
    assert labels == {
        REGRET: learners,
        KL: [*learners, "frozen"],
        BOUND: 2 * learners,
        STREAM: ["frozen"],
        WEIGHTS: learners,
        FUNCTION: learners,
        f"Meta weights of {ENSEMBLE}": ["0.001", "frozen"],
        "Averaging gap": [ENSEMBLE],
        COSINE: learners,
        HINTS: 2 * ["optimistic"],
    }


def test_curves_have_the_figures_of_the_rounds():
    rounds = [make_round(i, 1.0 + i, 2.0, learner=hinted(1.0 + i), gradient_cosine=i / 4) for i in range(4)]
    charts = charts_of(watch(make_run("optimistic"), rounds))
    points = {title: charts[title].curves[0].points for title in (REGRET, KL, COSINE, HINTS, WEIGHTS, STREAM)}
    assert points[REGRET].requests == [0.5, 1.5, 2.5, 3.5]
    assert points[REGRET].medians == pytest.approx([-1.0, -0.5, 0.0, 0.5])
    assert points[KL].medians == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert points[COSINE].medians == pytest.approx([0.0, 0.125, 0.25, 0.375])
    assert points[HINTS].medians == pytest.approx([0.5, 0.75, 1.0, 1.25])
    assert points[WEIGHTS].medians == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert points[STREAM].medians == pytest.approx([0.5] * 4)


def test_moving_means_forget_what_is_more_rows_ago():
    rounds = [make_round(i, 9.0 if i == 0 else 1.0) for i in range(9)]
    medians = charts_of(watch(make_run("optimistic"), rounds))[KL].curves[0].points.medians
    assert medians[-2] == pytest.approx(2.0)
    assert medians[-1] == pytest.approx(1.0)


def test_a_round_of_many_rows_is_not_averaged_with_those_before():
    rounds = [make_round(i, kl, num_rows=SMOOTHING) for i, kl in enumerate((9.0, 1.0, 3.0))]
    assert charts_of(watch(make_run("osd"), rounds))[KL].curves[0].points.medians == [9.0, 1.0, 3.0]


def test_regret_so_far_counts_rounds_by_their_rows():
    """Three rows at -1 and one at 3 have come to nothing."""
    rounds = [make_round(1, 1.0, 2.0, num_rows=3), make_round(2, 5.0, 2.0, num_rows=1)]
    points = charts_of(watch(make_run("optimistic"), rounds))[REGRET].curves[0].points
    assert points.medians == pytest.approx([0.0, -1.0, 0.0])


def test_bound_is_told_from_what_was_measured():
    measured, bound = charts_of(watch(make_run("optimistic"), [make_round()]))[BOUND].curves
    assert measured.points.medians[0] == 2.0
    assert bound.points.medians == [1.25]
    assert measured.style.colour == bound.style.colour
    assert measured.style.marker
    assert not bound.style.marker
    assert bound.style.dashes not in ("-", measured.style.dashes)


def test_share_of_rounds_in_which_the_best_expert_played_is_told():
    rounds = [make_round(i, learner=weighed(0.5, is_best_played=i == 0)) for i in range(4)]
    assert "in 25 % of the rounds" in charts_of(watch(make_run("ensemble"), rounds))["Meta weights of ensemble"].note


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((None, None), "At its settings no regret bound says anything."),
        ((None, 0.0512), "the experts' mean loss is at most 0.051 a round above the best expert's."),
    ],
)
def test_what_the_ensembles_regret_bound_guarantees_is_told(bounds, words):
    rounds = [make_round(i, learner=weighed(0.5) | {"regret_bound_per_round": b}) for i, b in enumerate(bounds)]
    assert words in charts_of(watch(make_run("ensemble"), rounds))["Meta weights of ensemble"].note


def test_rounds_stand_within_their_request():
    assert positions([make_round(request) for request in (0, 2, 2, 3)]) == [0.5, 2.5, 3.0, 3.5]


def test_curves_over_runs_are_medians_of_what_each_run_was_at():
    tracks = [Track([1.0, 3.0], [10.0, 30.0], end=5.5), Track([1.0, 2.0], [40.0, 60.0], end=2.5)]
    points = over_runs(tracks)
    assert points.requests == [1.0, 2.0, 3.0]
    assert points.medians == [25.0, 40.0, 30.0]  # the second run ended before the last
    assert points.lows == [10.0, 20.0, 30.0]
    assert points.highs == [40.0, 60.0, 30.0]


def test_long_curves_are_thinned_to_what_a_screen_shows_with_both_ends():
    requests = [float(i) for i in range(10 * MOST_POINTS + 7)]
    points = over_runs([Track(requests, requests, end=inf)])
    assert len(points.requests) <= MOST_POINTS + 1
    assert (points.medians[0], points.medians[-1]) == (requests[0], requests[-1])


def test_regret_starts_at_zero_for_runs_that_are_slow_to_learn():
    points = charts_of(watch(make_run("optimistic"), [make_round(3, 1.0, 2.0)]))[REGRET].curves[0].points
    assert (points.requests, points.medians) == ([0.5, 3.5], [0.0, -1.0])


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param([make_round()], marks=pytest.mark.full),
        [make_round(i, loss=nan, kl=inf, frozen_kl=nan, distance=nan, acceptance_length_bound=nan) for i in range(2)],
        pytest.param([make_round(i, learner=hinted(1.0) if i == 1 else {}) for i in range(3)], marks=pytest.mark.full),
        pytest.param([make_round(75), make_round(75)], marks=pytest.mark.full),
        pytest.param([make_round(0), make_round(1, loss=None, is_update=False)], marks=pytest.mark.full),
        pytest.param([make_round(0, loss=None, is_update=False)], marks=pytest.mark.full),
    ],
)
def test_any_rounds_can_be_drawn(rounds):
    parse(render_html(make_report(watch(make_run("frozen"), ()), watch(make_run("optimistic"), rounds))))


def test_whatever_a_learner_reports_can_be_drawn():
    reports = [
        {"meta_weights": {}, "averaging_gap": nan, "hint_error": 0.0, "gradient_norm": 0.0},
        {"meta_weights": None, "averaging_gap": None, "hint_error": None, "gradient_norm": None},
        weighed(None, gap=None, is_best_played=None),
    ]
    rounds = [make_round(), make_round(1)]
    runs = [with_learner(watch(make_run(f"learner_{i}"), rounds), told) for i, told in enumerate(reports)]
    parse(render_html(make_report(*runs)))


def test_a_null_read_back_is_a_gap():
    run = watch(make_run("ensemble"), [make_round(i, learner=weighed(0.5, gap=(nan, 1.0)[i % 2])) for i in range(4)])
    report = msgspec.json.decode(msgspec.json.encode(make_report(run)), type=Report)
    assert report.runs[0].telemetry.rounds[0].learner["averaging_gap"] is None
    (gap,) = charts_of(*report.runs)["Averaging gap"].curves
    assert gap.points.requests == [1.5, 3.5]
    assert not any(map(isnan, gap.points.medians))


def test_names_of_learners_and_experts_are_shown_as_they_are():
    names = [ENSEMBLE, '<b>a & "b"</b>', "$x_1$"]
    rounds = {name: [make_round(i, learner={"meta_weights": {name: 1.0}}) for i in range(2)] for name in names}
    html = render_html(make_report(*(watch(make_run(name), rounds[name]) for name in names)))
    assert set(learning_table(html)) == {str(Markup.escape(name)) for name in names}
    assert "b" not in parse(html).tags
    second = parse(second_page(html).replace("</body>", "").replace("</html>", ""))
    assert all(second.text.count(name) >= 5 for name in names)


def test_runs_of_different_length_are_drawn_as_far_as_they_got():
    runs = [
        watch(make_run("optimistic"), [make_round(i) for i in range(75)]),
        watch(make_run("optimistic", data=("sql",), repeat=1), [make_round(i, 2.0) for i in range(25)]),
    ]
    regret = charts_of(*runs)[REGRET].curves[0].points
    assert (regret.requests[-1], regret.medians[-1]) == (74.5, pytest.approx(-0.5))  # the other ended at 0.5


def test_the_table_of_the_terminal_needs_no_drawing():
    heavy = {"matplotlib", "numpy", "torch"}
    code = f"import sys, onlinespec.experiments.report.page; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
