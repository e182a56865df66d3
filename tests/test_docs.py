"""What the pages say works as it stands there: the code, the files and links that they name, a drafter of your own."""

import re
import sys
from pathlib import Path

import pytest

import onlinespec as osp
from onlinespec.cli import dispatch
from onlinespec.learning.settings import LearnConfig
from onlinespec.publishing.paired import lengths_of

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("benchmarks/**/*.md"),
]
CURRENT = [page for page in PAGES if page.name != "log.md" and "results" not in page.parts]  # the log tells of the past
PLACES = [ROOT, ROOT / "src/onlinespec", ROOT / "docs", ROOT / "benchmarks"]
EXAMPLE = "two_ahead:TwoAhead"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w-]+\.py)\b", page.read_text()))
    places = [*PLACES, page.parent]
    assert sorted(path for path in named if not any((place / path).is_file() for place in places)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text())
    assert sorted({link for link in links if not (page.parent / link).exists()}) == []


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    exec(compile(code, page, "exec"), {})
    assert len(capsys.readouterr().out) > 100


@pytest.fixture(scope="module")
def demo():
    return osp.load_target("demo")


@pytest.fixture
def reachable(monkeypatch):
    """The example can be imported, as with PYTHONPATH, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "docs/examples"))
    yield
    sys.modules.pop("two_ahead", None)


def params(seed, temperature):
    return osp.GenerationParams(24, num_draft_tokens=3, sampling=osp.SamplingParams(temperature), seed=seed)


def test_a_drafter_from_elsewhere_is_exact_learns_and_comes_back_from_disk(demo, reachable, tmp_path):
    drafter, plain = osp.load_drafter(EXAMPLE, demo), osp.DecodeLoop(demo)
    learning = osp.InlineLearning(drafter, config=osp.parse_learner("online_gradient", LearnConfig(min_interval=8)))
    loop, prompts = osp.DecodeLoop(demo, drafter, learning), ["Write a short paragraph about a baker.", "x"]
    for seed in range(4):
        job = demo.encode(prompts[seed % 2]), params(seed, [0.0, 0.8][seed // 2])
        request = loop.complete(*job)
        assert request.output_ids == plain.complete(*job).output_ids
    assert learning.num_rounds > 2
    assert not learning.is_frozen
    assert 0 < request.stats.accepted < request.stats.drafted
    drafter.save(tmp_path / "saved")
    back = osp.load_drafter(tmp_path / "saved", demo)
    job = demo.encode(prompts[0]), params(0, 0.0)
    drafts = [osp.DecodeLoop(demo, each).complete(*job).stats for each in (drafter, back)]
    assert drafts[0].accepted == drafts[1].accepted > 0


def test_the_gate_compares_weights_of_a_drafter_from_elsewhere(demo, reachable):
    drafter, records = osp.load_drafter(EXAMPLE, demo), []
    learning = osp.InlineLearning(drafter, config=osp.parse_learner("online_gradient", LearnConfig(min_interval=8)))
    start, offer = drafter.weights.params, learning.offer
    learning.offer = lambda feedback: (records.extend(feedback), offer(feedback))
    job = demo.encode("Write a short paragraph about a baker."), params(0, 0.0)
    for _ in range(6):
        records.clear()
        osp.DecodeLoop(demo, drafter, learning).complete(*job)
    lengths = lengths_of(drafter, [start, drafter.weights.params], records, 2)
    assert lengths.accepted[1] > lengths.accepted[0]


def test_commands_take_a_drafter_from_elsewhere_by_name_and_by_folder(reachable, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["onlinespec", *argv])
        with pytest.raises(SystemExit) as ended:
            dispatch.main()
        assert ended.value.code == 0

    (tmp_path / "a.jsonl").write_text('{"prompt": "Write a short paragraph about a baker."}\n' * 3)
    data = ["--data", str(tmp_path / "a.jsonl"), "--max-new-tokens", "24", "--learn-costs", "1", "0.03"]
    out = ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "adapted"), "--learners", "none,online_gradient"]
    run("compare", "demo", "--drafter", EXAMPLE, *data, *out)
    saved = str(tmp_path / "adapted" / "online_gradient")
    run("generate", "demo", "--drafter", saved, "-p", "Write.", "--max-new-tokens", "9")
    run("inspect", saved)
    assert EXAMPLE in capsys.readouterr().out


def test_a_folder_that_names_a_class_which_is_no_drafter_is_refused(demo, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["torch.hub:download_url_to_file"]}')
    with pytest.raises(ValueError, match=r"torch.hub:download_url_to_file.* is no Drafter"):
        osp.load_drafter(tmp_path, demo)


def test_a_folder_whose_class_is_not_installed_says_so(demo, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["not_here_at_all:Drafter"]}')
    with pytest.raises(ValueError, match=r"no module named 'not_here_at_all'"):
        osp.load_drafter(tmp_path, demo)
