import json
from pathlib import Path

import msgspec
import pytest

from onlinespec.experiments.report_schema import (
    Report,
    RequestRecord,
    Run,
    Segment,
    Totals,
    Window,
    read_report,
    write_report,
)

TOTALS_KEYS = {
    *("requests", "skipped", "tokens", "steps", "acceptance_length", "acceptance_rate", "acceptance_by_position"),
    *("decode_seconds", "learn_seconds", "diagnostic_seconds", "tokens_per_second"),
    *("speedup_vs_none", "speedup_vs_frozen", "identical_to_plain", "ties"),
}
FIGURES = {
    "requests": 3,
    "skipped": 1,
    "tokens": 60,
    "steps": 25,
    "acceptance_length": 2.4,
    "acceptance_rate": 0.35,
    "acceptance_by_position": (0.75, 0.4, 0.25),
    "decode_seconds": 2.0,
    "learn_seconds": 0.5,
    "tokens_per_second": 24.0,
    "speedup_vs_none": 1.5,
    "speedup_vs_frozen": None,
    "identical_to_plain": True,
    "ties": 0,
}
WINDOW = Window(requests=3, acceptance_length=2.4, tokens_per_second=24.0)
SEGMENT = Segment(index=0, data="sql", windows=(WINDOW,), **FIGURES)
RUN = Run(learner="optimistic", temperature=0.0, seed=0, repeat=1, totals=Totals(**FIGURES), segments=(SEGMENT,))
REPORT = Report(provenance={"target": "demo", "settings": {"step_size": 1e-3}}, runs=(RUN,))
RECORD = RequestRecord(
    learner="optimistic",
    temperature=0.0,
    repeat=0,
    index=7,
    segment=1,
    data="sql",
    id="sql-7",
    prompt_tokens=31,
    tokens=96,
    steps=40,
    accepted=56,
    drafted=160,
    decode_seconds=1.25,
    learn_seconds=0.125,
    finish_reason="length",
    identical_to_plain=None,
    weights_version=12,
    text="SELECT 1\n",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def test_a_report_comes_back_as_it_was_written(path):
    write_report(path, REPORT)
    assert read_report(path) == REPORT


def test_a_request_record_comes_back_from_its_line():
    line = msgspec.json.encode(RECORD)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=RequestRecord) == RECORD


def test_the_file_has_the_keys_that_the_design_names(path):
    write_report(path, REPORT)
    report = json.loads(path.read_text())
    assert set(report) == {"schema", "provenance", "runs"}
    assert report["schema"] == 1
    run = report["runs"][0]
    assert set(run) == {"learner", "temperature", "seed", "repeat", "totals", "segments"}
    assert set(run["totals"]) == TOTALS_KEYS
    segment = run["segments"][0]
    assert set(segment) == TOTALS_KEYS | {"index", "data", "windows"}
    assert set(segment["windows"][0]) == {"requests", "acceptance_length", "tokens_per_second"}


def test_a_request_line_has_the_keys_that_the_design_names():
    assert set(json.loads(msgspec.json.encode(RECORD))) == {
        *(
            "learner",
            "temperature",
            "repeat",
            "index",
            "segment",
            "data",
            "id",
            "prompt_tokens",
            "tokens",
            "steps",
            "accepted",
        ),
        *("drafted", "decode_seconds", "learn_seconds", "finish_reason", "identical_to_plain", "weights_version"),
        "text",
    }


def test_what_was_not_compared_is_null(path):
    write_report(path, REPORT)
    assert json.loads(path.read_text())["runs"][0]["totals"]["speedup_vs_frozen"] is None


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        REPORT.runs[0].totals.tokens = 0


def test_learning_share_is_of_decoding_time():
    assert SEGMENT.learning_share == 0.25
    assert msgspec.structs.replace(SEGMENT, decode_seconds=0.0, learn_seconds=0.0).learning_share == 0.0


def test_a_report_that_could_not_be_read_again_leaves_the_old_file(path):
    write_report(path, REPORT)
    bad_window = msgspec.structs.replace(WINDOW, tokens_per_second=float("nan"))
    bad_segment = msgspec.structs.replace(SEGMENT, windows=(bad_window,))
    bad = Report(provenance={}, runs=(msgspec.structs.replace(RUN, segments=(bad_segment,)),))
    with pytest.raises(ValueError, match=r"tokens_per_second|got `null`"):
        write_report(path, bad)
    assert read_report(path) == REPORT


def test_a_failed_move_leaves_the_old_file_and_nothing_beside_it(path, monkeypatch):
    write_report(path, REPORT)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, Report(provenance={}, runs=()))
    assert read_report(path) == REPORT
    assert list(path.parent.iterdir()) == [path]


def test_writing_makes_the_folder(tmp_path):
    write_report(tmp_path / "a" / "b" / "report.json", REPORT)
    assert read_report(tmp_path / "a" / "b" / "report.json") == REPORT


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 2, "provenance": {}, "runs": []}', '{"runs": 3}'])
def test_another_file_is_refused_by_name(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        read_report(path)


def test_fields_of_a_later_version_are_skipped(path):
    path.write_text('{"schema": 1, "provenance": {}, "runs": [], "later": 1}')
    assert read_report(path) == Report(provenance={}, runs=())
