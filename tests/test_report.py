import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import StringIO
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from onlinespec.records import Report, Run, Segment, Totals, Window
from onlinespec.report import COLOURS, MARKERS, METRICS, groups_of, render_html, summary_table, write_html

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


def test_headline_has_the_figures_of_the_records():
    (group,) = groups_of(full_report())
    assert group.headline == (
        "online_gradient: 1.46× plain decoding and 1.90× frozen, learning counted (7.8 % of decode time). "
        "Output identical to plain decoding on 450 of 450 answers."
    )
    assert parse(render_html(full_report())).shows(group.headline)


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
        ({"identical": None, "temperature": 0.7}, "Sampled output is not compared token by token."),
    ],
)
def test_headline_never_claims_more_identity_than_was_seen(more, words):
    assert headline(make_run("optimistic", **more)).endswith(words)


def test_a_difference_from_plain_decoding_stands_out():
    html = render_html(make_report(make_run("optimistic", identical=False)))
    assert '<p class="headline bad">' in html
    assert '<td class="bad">no</td>' in html


# --- the page ---


def test_page_is_well_formed_and_ids_are_its_own():
    page = parse(render_html(full_report(temperatures=(0.0, 0.7))))
    assert len(page.ids) == len(set(page.ids))
    for svg in re.findall(r"<svg.*?</svg>", render_html(full_report()), flags=re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def test_references_inside_plots_are_met():
    html = render_html(full_report())
    wanted = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted
    assert wanted <= set(re.findall(r'id="([^"]+)"', html))


def test_page_needs_nothing_from_outside():
    html = render_html(full_report())
    assert not re.findall(r"https?:(?!//www\.w3\.org/(?:2000/svg|1999/xlink))", html)
    assert not re.findall(r"\bsrc\s*=|@import|url\((?!#)|href=\"(?!#)", html)
    assert not {"script", "link", "img", "iframe", "image"} & set(parse(html).tags)


def test_text_of_plots_is_text():
    assert re.search(r"<text [^>]*>tokens per second</text>", render_html(full_report()))


def test_plots_follow_the_colour_mode():
    plots = "".join(re.findall(r"<svg.*?</svg>", render_html(full_report()), flags=re.DOTALL))
    loose = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", plots)
    assert not set(re.findall(r"#[0-9a-f]{6}\b", loose))


def test_no_two_colours_are_alike_in_light_mode():
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_the_same_report_gives_the_same_page():
    assert render_html(full_report()) == render_html(full_report())


@pytest.mark.parametrize(
    "name", ["<b>bold</b>", "a & b", '"quoted"', "$x_1$", "--><i>", "漢字", "a\nb", "#0072b2", r"\1"]
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


def test_every_temperature_has_its_pair_of_plots():
    html = render_html(full_report(temperatures=(0.0, 0.7)))
    assert html.count("<figure>") == 4
    assert "Temperature 0 (greedy)" in html
    assert "Temperature 0.7" in html


def test_tables_have_medians_and_spread():
    page = parse(render_html(full_report()))
    assert page.shows("1.46× [1.40–1.50]")
    assert page.shows("11.0 [10.0–12.0]")


def test_segments_too_narrow_for_their_names_are_numbered():
    names = [f"a_rather_long_name_of_data_{i}" for i in range(12)]
    page = parse(render_html(make_report(make_run("optimistic", data=names))))
    assert page.shows("Segments: 1\u00a0a_rather_long_name_of_data_0, 2")


def test_learners_are_told_apart_without_colour():
    names = [f"learner_{i}" for i in range(10)]
    (group,) = groups_of(make_report(*map(make_run, names)))
    looks = {(learner.style.colour, learner.style.marker) for learner in group.learners}
    assert len(looks) == 10
    assert len({learner.style.marker for learner in group.learners}) == len(MARKERS)


def test_controls_come_first():
    (group,) = groups_of(make_report(*map(make_run, ("optimistic", "frozen", "none"))))
    assert [learner.learner for learner in group.learners] == ["none", "frozen", "optimistic"]


def test_provenance_is_folded_and_flat():
    html = render_html(make_report(make_run("none"), settings={"learn": {"step_size": 0.001}, "stop": [1, 2]}))
    folded = html[html.index("<details>") :]
    assert parse(folded.replace("</body>", "").replace("</html>", "")).shows("settings.learn.step_size0.001")
    assert "1, 2" in folded


def test_write_html_writes_the_page(tmp_path):
    write_html(full_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(full_report())


# --- little or nothing measured ---


def test_partial_reports_say_so():
    html = render_html(make_report(make_run("none"), make_run("optimistic", data=("sql",)), partial=True))
    assert "Partial report." in html
    assert "Not every run saw the same number of requests" in html
    assert "Partial report." not in render_html(full_report())


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
@pytest.mark.parametrize("data", [("sql",), ("sql", "code")])
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
