"""Figures of answers made here: what is drawn is what the file says, and no file breaks it."""

import copy
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from plots import answers, figures
from plots.__main__ import main


def recipe(price: float, error: object, **change: str) -> dict:
    worst = {"error": error, "input": "sink", "context": 16384}
    told = {"change": change, "price": price, "worst": worst, "safe_up_to": 256}
    return told | {"worse": [{"input": "biased_v", "ratio": 5.2}]}


ADVICE = {
    "question": "advise",
    "kernel": {"name": "narrow"},
    "metric": "nmse",
    "tolerance": 5e-4,
    "rows": "median",
    "contexts": [256, 16384],
    "inputs": ["sink", "biased_v"],
    "tried": 6,
    "as_it_stands": recipe(3.2, 2e-3),
    "recommended": [
        {"title": "cheapest that holds", **recipe(1.8, 3e-6, row_sum="float32", kv_block="512")},
        {"title": "by one change", **recipe(1.81, 3.1e-6, kv_block="512")},
        {"title": "worse on no input", **recipe(2.0, 4e-5, running_sum="float32")},
    ],
    "steps": [[1.8, 3e-6], [5.0, 1e-6]],
    "candidates": [[3.2, 2e-3], [1.8, 3e-6], [1.81, 3.1e-6], [2.0, 4e-5], [5.0, 1e-6], [9, "inf"]],
}
HEADS = [[1e-6, 2e-6, 3e-6]]
COMPARISON = {
    "question": "compare",
    "verdict": "errs as near does: correlation 0.999999",
    "remarks": ["head 2: all zero"],
    "observed": {"cosine": [[1.0] * 3], "nmse": HEADS},
    "recipes": [
        {
            "recipe": name,
            "correlation": 0.9,
            "unexplained": "nan",
            "correlation_by_head": [[0.9] * 3],
            "metrics": {"cosine": HEADS, "nmse": HEADS},
        }
        for name in ("near", "hexagon-far", "further", "furthest")
    ],
    "regions": [
        {
            "most": most,
            "observed": {"nmse": HEADS},
            "recipes": [{"recipe": "any", "nmse": HEADS} for _ in range(4)],
        }
        for most in (256, 512, 1024)
    ],
}
RATE, ALARM = [0, 8, 0.0, 0.3], [1, 8, 0.0, 0.5]
LIMITS = [
    {"context": n, "kernel": k, "lifted": 1e-7, "limit": 4e-7, "false_alarm": rate, "miss": RATE}
    for n, k, rate in ((256, 5e-7, ALARM), (512, 2e-6, RATE), (1024, "inf", RATE))
]
THRESHOLDS = {
    "question": "thresholds",
    "kernel": "narrow",
    "rule": "NMSE <= 0.0005, against float64",
    "statistic": "largest error in units of unfused PyTorch's",
    "longer": {"gaussian": {"limit": 5e-4}, "sink": {"limit": 5e-4}},
    "limits": {"gaussian": LIMITS, "sink": LIMITS},
    "tests": [
        {
            "name": "its test",
            "own": {"seen_from": 4096, "false_alarm_from": None},
            "add": ["a <longer> shape", "sees it"],
        }
    ],
}
ALL = {told["question"]: told for told in (ADVICE, COMPARISON, THRESHOLDS)}


@pytest.fixture(autouse=True)
def style():
    with plt.style.context(figures.STYLE):
        yield
    plt.close("all")


def drawn(tmp_path: Path, told: object) -> Figure:
    path = tmp_path / "answer.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return answers.figure_of(path)


def words(figure: Figure) -> list[Text]:
    """All that is written but the ticks."""
    parts = [[*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label] for ax in figure.axes]
    found = [*figure.texts, *(text for part in parts for text in part)]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    return [text for text in found if text.get_text()]


def test_a_kernel_that_holds_has_nothing_to_change(tmp_path):
    def title(error: float) -> str:
        stands = ADVICE["as_it_stands"]
        told = {**ADVICE, "as_it_stands": {**stands, "worst": {**stands["worst"], "error": error}}}
        return words(drawn(tmp_path, told))[0].get_text()

    assert "has to change" in title(2 * ADVICE["tolerance"])
    assert "holds as it stands" in title(ADVICE["tolerance"] / 2)


@pytest.mark.parametrize("told", ALL.values(), ids=ALL)
def test_words_are_apart_and_on_the_page(told, tmp_path):
    figure = drawn(tmp_path, told)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in words(figure)]
    for i, one in enumerate(boxes):
        assert one.x0 >= -1 and one.x1 <= figure.bbox.x1 + 1 and 0 <= one.y0 < figure.bbox.y1
        for other in boxes[:i]:
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            assert wide < 2 or min(one.y1, other.y1) - max(one.y0, other.y0) < 2


def lines(ax: plt.Axes, colour: str) -> list[list[float]]:
    return [np.asarray(x.get_ydata()).tolist() for x in ax.lines if x.get_color() == colour]


def test_advice_shows_all_recipes_and_names_those_recommended(tmp_path):
    from plots import advise

    (ax,) = drawn(tmp_path, ADVICE).axes
    dots = next(x for x in ax.lines if x.get_marker() == "." and len(x.get_xdata()) == 6)
    top = ax.get_ylim()[1]
    assert dots.get_xydata().tolist() == [*ADVICE["candidates"][:5], [9.0, top]]
    marks = [x.get_xydata()[0].tolist() for x in ax.lines if x.get_marker() == "o"]
    assert marks == [[1.8, 3e-6], [1.81, 3.1e-6], [2.0, 4e-5]]
    assert [x.get_xydata()[0].tolist() for x in ax.lines if x.get_marker() == "s"] == [[3.2, 2e-3]]
    assert [5e-4, 5e-4] in lines(ax, advise.LIMIT)
    assert lines(ax, advise.FRONT)[0][-1] == 1e-6
    said = "\n".join(text.get_text() for text in ax.texts)
    said = said.replace("\u00a0", " ")
    assert "1  row_sum=float32 kv_block=512\n    (cheapest that holds)" in said
    assert "tolerance: nmse 0.0005" in said and "as it stands" in said


def test_comparison_shows_the_kernel_beside_the_three_nearest(tmp_path):
    from plots import compare

    figure = drawn(tmp_path, COMPARISON)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["head 0", "head 1", "head 2"]
    for error, ax in zip(HEADS[0], figure.axes, strict=True):
        assert lines(ax, compare.OBSERVED)[0] == [error] * 3
        assert {x.get_text() for x in ax.texts} >= {"observed", "near", "far", "further"}
        assert "furthest" not in {x.get_text() for x in ax.texts}
    (one,) = drawn(tmp_path, COMPARISON | {"regions": []}).axes
    assert lines(one, compare.OBSERVED)[0] == HEADS[0] and one.get_xlabel() == "head"


def test_thresholds_show_which_limits_err(tmp_path):
    from plots import thresholds

    figure = drawn(tmp_path, THRESHOLDS)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["gaussian", "sink"]
    ax = figure.axes[0]
    marks = [x for x in ax.lines if x.get_marker() == "o"]
    assert [x.get_markerfacecolor() for x in marks] == ["white"] + [thresholds.LIMIT] * 2
    assert lines(ax, thresholds.KERNEL)[0] == [5e-7, 2e-6, ax.get_ylim()[1]]
    assert lines(ax, thresholds.LIFTED)[0] == [1e-7] * 3
    assert [5e-4, 5e-4] in lines(ax, thresholds.RULE)


def test_a_file_becomes_two_pictures_beside_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my answer.json"
    path.write_text(json.dumps(THRESHOLDS))
    monkeypatch.setattr(sys, "argv", ["plots", str(path)])
    main()
    files = [tmp_path / "my answer.png", tmp_path / "my answer.svg"]
    assert capsys.readouterr().out.split("\n") == [*map(str, files), ""]
    first = [file.read_bytes() for file in files]
    main()
    assert first == [file.read_bytes() for file in files]  # the same answer, the same bytes


def changed(told: dict, *way: object) -> dict:
    """The answer with the value at the end of the way instead of the one before."""
    told = copy.deepcopy(told)
    *before, last, value = way
    at: object = told
    for step in before:
        at = at[step]
    at[last] = value
    return told


BAD = {
    "empty": "",
    "truncated": json.dumps(ADVICE)[:-20],
    "no JSON": "kernel  NMSE\nmetal 1e-6",
    "a list": "[1]",
    "deep": "[" * 100_000,
    "bytes": "\x00\x01",
    "no question": json.dumps({"kernel": "metal"}),
    "another question": json.dumps({"question": "why"}),
    "a question that is a list": json.dumps({"question": ["advise"]}),
    "long number": '{"question": "advise", "tolerance": ' + "9" * 5000 + "}",
    "nothing else": json.dumps({"question": "advise"}),
    **{
        f"advise {way}": changed(ADVICE, *way)
        for way in [
            ("candidates", []),
            ("candidates", [[1, 2, 3]]),
            ("candidates", [["x", 1]]),
            ("candidates", 0, [1e300, 1]),
            ("candidates", 0, [1, -1]),
            ("tolerance", True),
            ("tolerance", 0),
            ("tolerance", 10**400),
            ("kernel", []),
            ("kernel", "name", None),
            ("contexts", []),
            ("contexts", ["many"]),
            ("recommended", [3]),
            ("as_it_stands", "worst", {}),
        ]
    },
    **{
        f"compare {way}": changed(COMPARISON, *way)
        for way in [
            ("recipes", []),
            ("observed", {"cosine": [[1.0]]}),
            ("observed", "nmse", []),
            ("observed", "nmse", [[]]),
            ("observed", "nmse", [[1.0], [1.0, 2.0]]),
            ("regions", 0, "most", -4),
            ("regions", 1, "most", 4),
            ("regions", 0, "observed", {"nmse": [[1.0]]}),
            ("regions", 0, "recipes", []),
            ("recipes", 0, "correlation_by_head", []),
        ]
    },
    **{
        f"thresholds {way}": changed(THRESHOLDS, *way)
        for way in [
            ("limits", {}),
            ("limits", "gaussian", []),
            ("limits", []),
            ("longer", {}),
            ("limits", "gaussian", 0, "context", 4096),
            ("limits", "gaussian", 0, "miss", []),
            ("limits", "gaussian", 0, "kernel", [1]),
        ]
    },
}


@pytest.mark.parametrize("told", BAD.values(), ids=BAD)
def test_a_file_that_is_no_answer_is_one_line_and_exit_code_2(told, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    monkeypatch.setattr(sys, "argv", ["plots", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err.startswith(f"plots: {path}") and said.err.count("\n") == 1
    assert len(said.err) < len(str(path)) + 300 and list(tmp_path.iterdir()) == [path]


def test_no_figure_is_drawn_over_what_was_asked_for(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.svg"
    path.write_text(json.dumps(ADVICE))
    monkeypatch.setattr(sys, "argv", ["plots", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert "a figure, where the answer" in capsys.readouterr().err
    assert json.loads(path.read_text()) == ADVICE


NAMES = {
    "half mathematics": "$\\frac{$",
    "mathematics": "$x$",
    "control": "a\nb\x00",
    "markup": "<script>",
    "half a character": "\ud800",
    "foreign and long": "名" * 99,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_drawn_as_they_are_or_with_marks_for_what_cannot_be(name, tmp_path):
    for told in (
        changed(ADVICE, "kernel", "name", name),
        changed(ADVICE, "recommended", 0, "change", {name: name}),
        changed(COMPARISON, "recipes", 0, "recipe", name),
        changed(THRESHOLDS, "limits", {name: LIMITS}) | {"longer": {name: {"limit": 1}}},
    ):
        drawn(tmp_path, told).savefig(tmp_path / "x.svg")
        assert "<script" not in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("error", [0, 1e-300, 1e300, "inf", "nan"])
def test_errors_out_of_all_proportion_are_drawn_at_the_edge(error, tmp_path):
    for told in (
        changed(ADVICE, "candidates", [[1, error]]) | {"steps": [[1, error]]},
        changed(ADVICE, "as_it_stands", recipe(-3, error)) | {"candidates": [[-3, error]]},
        changed(COMPARISON, "regions", 0, "observed", {"nmse": [[error] * 3]}),
        changed(THRESHOLDS, "limits", "sink", 0, "kernel", error),
    ):
        drawn(tmp_path, told).draw_without_rendering()
