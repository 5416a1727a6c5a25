"""The report: one page that needs nothing else, of what studies found and commands answered."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_answers import ADVICE, ALL, COMPARISON, changed

from sweeps import report
from sweeps.__main__ import main
from sweeps.answers import answer
from sweeps.store import REPORT, StoreError

ROOT = Path(__file__).resolve().parent.parent
SVG = """<?xml version="1.0"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9" xmlns="http://www.w3.org/2000/svg">
<metadata>made by</metadata>
<defs><clipPath id="p1"><rect/></clipPath><path id="glyph"/></defs>
<g id="axes_1" clip-path="url(#p1)"><use xlink:href="#glyph"/></g></svg>"""


def sweeps(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sweeps", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small real study with its figures."""
    root = tmp_path_factory.mktemp("study") / "rows"
    done = sweeps(
        *("run", "hexagon", "--quick", "--recipes", "metal", "--inputs", "gaussian,sink"),
        *("--max-context", 512, "--out", root),
    )
    assert done.returncode == 0, done.stderr
    return root


def failed(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command that ends early, in this process."""
    monkeypatch.setattr(sys, "argv", ["sweeps", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def json_of(folder: Path, **changes: object) -> Path:
    return written(folder / "x.json", json.dumps(ADVICE | changes))


def truncated(folder: Path) -> Path:
    return written(folder / "x.json", json.dumps(ADVICE)[:-9])


def test_a_page_of_a_study_and_an_answer(study, tmp_path):
    answer = written(tmp_path / "my_answer.txt", "kernel  NMSE\n<b>metal</b>  1e-6\n")
    done = sweeps("report", study, "--answer", answer)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == study / REPORT
    text = (study / REPORT).read_text()
    assert text.count("<svg") == len(list((study / "_figures").glob("*.svg"))) > 0
    assert "gaussian, sink" in text and "seed 0" in text and "256 to 512 keys" in text
    assert "my answer" in text and "&lt;b&gt;metal" in text and "<b>metal" not in text
    assert "python -m sweeps run hexagon" in text and "ggml-metal" in text  # made how, of what


def test_a_page_of_unfinished_rows_says_so(study, tmp_path):
    root = tmp_path / "part"
    shutil.copytree(study, root)
    next(root.glob("*.parquet")).unlink()
    assert sweeps("report", root).returncode == 0
    said = "Unfinished: what follows is of 1 of 2 parts."
    assert said in (root / REPORT).read_text()
    sweeps("report", study)
    assert "Unfinished" not in (study / REPORT).read_text()


def test_a_page_needs_nothing_else(study):
    sweeps("report", study)
    text = (study / REPORT).read_text()
    elsewhere = re.findall(r"""(?:src|href)=["'](?!#)[^"']*|url\((?!#)[^)]*""", text)
    assert elsewhere == [] and "<script" not in text and "default-src 'none'" in text
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r"""(?:href="#|url\(#)([^")]*)""", text)) <= set(names)


def test_the_same_study_runs_on_beside_its_page(study):
    sweeps("report", study)
    again = sweeps("run", "hexagon", "--quick", "--recipes", "metal", "--inputs", "gaussian,sink",
                   "--max-context", 512, "--out", study, "--no-figures")  # fmt: skip
    assert again.returncode == 0 and (study / REPORT).exists()


def test_pictures_share_a_page(tmp_path):
    path = written(tmp_path / "error_by_block.svg", SVG)
    first, second = report.picture(path, "a-"), report.picture(path, "b-")
    assert 'id="a-p1"' in first and "url(#a-p1)" in first and 'href="#a-glyph"' in first
    assert not set(re.findall('id="(.*?)"', first)) & set(re.findall('id="(.*?)"', second))
    assert first.startswith('<svg role="img" aria-label="error by block"')
    assert "made by" not in first and "<?xml" not in first


@pytest.mark.parametrize(
    "hostile",
    [
        "not a picture",
        SVG.replace("<g ", '<g onload ="alert(1)" '),
        SVG.replace("<metadata>", "<form action='/x'></form><metadata>"),
        SVG + "<p>more</p>",
        "<html xmlns='http://www.w3.org/1999/xhtml'/>",
        SVG.replace("<metadata>", "<script>alert(1)</script><metadata>"),
        SVG.replace("<g ", '<g onload="alert(1)" '),
        SVG.replace("#glyph", "https://example.org/x.svg#glyph"),
        SVG.replace('"#glyph"', "'javascript:alert(1)'"),
        SVG.replace("url(#p1)", "url(https://example.org)"),
        SVG.replace("<g ", "<style>@import 'https://example.org'</style><g "),
        SVG.replace("<g ", "<style>section{display:none}</style><g "),
    ],
)
def test_foreign_pictures_are_refused(tmp_path, hostile):
    with pytest.raises(StoreError, match="delete it, draw again"):
        report.picture(written(tmp_path / "x.svg", hostile), "a-")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, study, tmp: a.append(tmp / "nowhere"), "no such directory"),
        (lambda a, study, tmp: a.extend(["--answer", tmp / "none.txt"]), "none.txt"),
        (lambda a, study, tmp: a.extend(["--answer", written(tmp / "e.txt", " ")]), "not empty"),
        (lambda a, study, tmp: a.extend(["--answer", truncated(tmp)]), "not all of it"),
        (lambda a, study, tmp: a.extend(["--answer", json_of(tmp, question=1)]), "none of advise"),
        (lambda a, study, tmp: a.extend(["--answer", json_of(tmp, inputs=1)]), "advise --json"),
        (lambda a, study, tmp: a.extend(["--answer", json_of(tmp, steps=[])]), "holds no recipes"),
        (lambda a, study, tmp: a.extend(["--out", tmp / "no" / "page.html"]), "that is there"),
        (lambda a, study, tmp: a.extend(["--out", tmp]), "must be an .html file"),
    ],
    ids=[
        "directory",
        "answer",
        "empty answer",
        "truncated",
        "no question",
        "no numbers",
        "no figure",
        "out",
        "out a directory",
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    study, tmp_path, monkeypatch, capsys, change, words
):
    (study / REPORT).unlink(missing_ok=True)
    arguments = ["report", study]
    change(arguments, study, tmp_path)
    code, line = failed(monkeypatch, capsys, *arguments)
    assert code == 2 and words in line and line.count("\n") == 1
    assert not (study / REPORT).exists()


def test_what_run_wrote_not_is_said_before_anything_else(tmp_path, monkeypatch, capsys):
    code, line = failed(monkeypatch, capsys, "report", tmp_path / "nope")
    assert code == 2 and "nope: no such directory; `python -m sweeps run` writes one" in line


def test_a_page_shows_no_picture_but_what_plots_drew(study):
    extra = written(study / "_figures" / "mine.svg", SVG)
    assert sweeps("report", study).returncode == 0
    extra.unlink()
    ours = {path.stem for path in (study / "_figures").glob("*.svg")}
    labels = re.findall(r'<svg role="img" aria-label="(.*?)"', (study / REPORT).read_text())
    assert {label.replace(" ", "_") for label in labels} == ours


def test_a_run_of_other_rows_leaves_no_figure_to_a_page(study, monkeypatch, capsys):
    command = ["run", "hexagon", "--quick", "--inputs", "gaussian,sink", "--max-context", 512]
    before = {path.name for path in (study / "_figures").iterdir()}
    done = sweeps(*command, "--recipes", "float32", "--out", study, "--no-figures")
    assert done.returncode == 0 and "moved to" in done.stderr
    code, line = failed(monkeypatch, capsys, "report", study)
    assert code == 2 and "no figures are drawn; python -m plots" in line
    assert sweeps(*command, "--recipes", "metal", "--out", study, "--no-figures").returncode == 0
    written(study / "_figures" / "error_by_block.svg", SVG)  # as an older version left it
    assert sweeps(*command, "--recipes", "metal", "--out", study).returncode == 0
    assert {path.name for path in (study / "_figures").iterdir()} == before


def test_a_study_without_figures_says_how_to_draw_them(study, tmp_path, monkeypatch, capsys):
    (study / "_figures").rename(tmp_path / "away")
    try:
        code, line = failed(monkeypatch, capsys, "report", study)
    finally:
        (tmp_path / "away").rename(study / "_figures")
    assert code == 2 and "python -m plots" in line


SAID = {
    "advise": (
        "(1) cheapest that holds:",
        "row_sum=float32 kv_block=512",
        "3.00e-06 at worst (sink",
    ),
    "compare": ("errs as near does", "head 2: all zero", "observed", "0.900000"),
    "thresholds": ("gaussian", "1/8", "its test: as it is, sees it from 4,096 keys", "<longer>"),
}


@pytest.mark.parametrize("told", ALL.values(), ids=ALL)
def test_an_answer_in_json_is_a_figure_and_its_numbers(told, tmp_path):
    path = written(tmp_path / "my_x.json", json.dumps(told))
    got = answer(path, 4)
    assert got.title == "my x" and got.figure.startswith('<svg role="img" aria-label="my x"')
    assert set(re.findall(r'\bid="(..)', got.figure)) == {"a4"}
    assert all(words in got.text for words in SAID[told["question"]])
    page = report.page([], [got])
    assert got.figure in page and "<longer>" not in page
    assert list(tmp_path.iterdir()) == [path]


def test_words_of_an_answer_stay_words(tmp_path):
    told = changed(COMPARISON, "recipes", 0, "recipe", "<script>alert(1)</script>")
    told["verdict"] = told["remarks"][0] = '</pre><img src="x">'
    page = report.page([], [answer(written(tmp_path / "<b>.json", json.dumps(told)), 0)])
    for markup in ("<script", "<img", "<b>", "</pre><img"):
        assert markup not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;" in page


def test_json_that_is_no_answer_with_a_figure_is_shown_as_it_is(tmp_path):
    path = written(tmp_path / "kernel.json", '{"name": "metal"}')
    assert answer(path, 0)[2:] == ('{"name": "metal"}', "")
