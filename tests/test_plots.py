"""Figures from rows made here: what is drawn is what the rows say, and labels do not overlap."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from plots import atlas, fidelity
from plots import figures as fig
from plots.__main__ import main
from plots.crossings import passing_contexts
from plots.curves import FLOOR, block_colours, context_axis, draw_curve, error_axis, recipe_colours
from plots.labels import label_ends, spread
from plots.rows import TOLERANCE, crossings, featured, read, summarise, with_panels

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = tuple(2**k for k in range(8, 18))
RECIPES = ("hexagon-hmx-fp16", "hexagon-pr24389", "hexagon-hmx-fp32", "ggml-cpu-decode", "float32")
REGIMES = ("gaussian", "biased_v", "flat", "sink")


def made_rows(
    inputs: tuple[str, ...] = REGIMES, recipes: tuple[str, ...] = RECIPES, seeds: int = 3
) -> pd.DataFrame:
    """Rows whose NMSE grows with the context and falls with the block, with some noise."""
    noise = np.random.default_rng(0)
    rows = []
    for source in inputs:
        for place, recipe in enumerate(recipes):
            several = recipe.startswith("hexagon")
            for block in ("64", "512", "rule") if several else ("rule",):
                size = int(block) if block.isdigit() else 1024 if several else 1
                for n in CONTEXTS:
                    for seed in range(seeds):
                        for head in range(2):
                            nmse = 1e-9 * n / size * 10.0 ** (place + noise.normal() / 4)
                            rows.append((recipe, source, seed, block, size, n, head, nmse))
    columns = ["recipe", "inputs", "seed", "block", "kv_block", "context", "head", "nmse"]
    frame = pd.DataFrame(rows, columns=columns).astype({"nmse": np.float32})
    return frame.assign(overflow=False, stagnated=False)


def one_curve(
    nmse: list[float], predicted: pd.DataFrame | None = None, **columns: object
) -> pd.DataFrame:
    """Summary lines of one recipe at one block, with the given medians."""
    frame = pd.DataFrame({"context": CONTEXTS[: len(nmse)], "nmse": np.array(nmse)})
    frame = frame.assign(recipe="a", inputs="i", seed=0, block="rule", kv_block=64, head=0)
    frame = frame.assign(overflow=False, stagnated=False).assign(**columns)
    return summarise(with_panels(frame, {"i": "regime"}), predicted)


@pytest.fixture
def style() -> Iterator[None]:
    with plt.style.context(fig.STYLE):
        yield
    plt.close("all")


# rows


def test_summary_is_the_median_and_the_range_of_the_seeds():
    rows = pd.concat([made_rows(("i",), ("float32",), 3)] * 2)
    lines = summarise(with_panels(rows, {"i": "regime"}))
    one = rows[rows["context"] == 1024]
    line = lines[lines["context"] == 1024].iloc[0]
    seeds = [np.median(one[one["seed"] == s]["nmse"].astype(float)) for s in range(3)]
    assert line["nmse"] == np.median(one["nmse"].astype(float))
    assert (line["low"], line["high"]) == (min(seeds), max(seeds))
    assert len(lines) == len(CONTEXTS)


def test_one_seed_has_quartiles_for_a_band():
    rows = made_rows(("i",), ("float32",), 1)
    rows = pd.concat([rows.assign(nmse=rows["nmse"] * f) for f in (1, 2, 3, 4, 5)])
    lines = summarise(with_panels(rows, {"i": "regime"}))
    assert (lines["low"] < lines["nmse"]).all() and (lines["nmse"] < lines["high"]).all()


def test_rows_that_are_not_finite_count_as_infinitely_wrong():
    lines = one_curve([1e-6, np.nan, np.inf], overflow=[False, True, True])
    assert lines["nmse"].tolist() == [1e-6, np.inf, np.inf]
    assert crossings(lines)["context"].tolist() == [CONTEXTS[1]]


def test_crossings_end_where_a_curve_is_within_the_tolerance_again():
    overflow = [False, True, True]
    found = crossings(one_curve([1e-3, 1e-6, 1e-3], overflow=overflow)).iloc[0]
    assert found[["context", "until", "overflow"]].tolist() == [CONTEXTS[0], *CONTEXTS[1:2] * 2]
    found = crossings(one_curve([1e-6, 1e-3, 1e-3])).iloc[0]
    assert found["context"] == CONTEXTS[1] and found[["until", "overflow"]].isna().all()


@pytest.mark.parametrize(
    "nmse, first", [([1e-6, 1e-3, 1e-6], CONTEXTS[1]), ([1e-6, TOLERANCE, 1e-6], np.nan)]
)
def test_crossings_are_above_the_tolerance(nmse, first):
    found = crossings(one_curve(nmse))["context"].item()
    assert found == first or (np.isnan(found) and np.isnan(first))


def test_stagnation_is_of_half_of_the_rows():
    rows = pd.concat([made_rows(("i",), ("float32",), 1)] * 2)
    rows["stagnated"] = (rows["context"] >= 4096) & (rows["head"] == 0)
    rows["overflow"] = (rows["context"] >= 65536) & (rows["head"] == 0)
    lines = summarise(with_panels(rows, {"i": "regime"}))
    assert lines[lines["stagnated"]]["context"].min() == 4096
    assert lines[lines["overflow"]]["context"].min() == 65536
    rows["stagnated"] &= np.arange(len(rows)) < len(rows) // 2
    assert not summarise(with_panels(rows, {"i": "regime"}))["stagnated"].any()


def test_a_capture_has_a_panel_for_each_head():
    rows = made_rows(("mine",), seeds=1)
    assert set(with_panels(rows, {"mine": "capture"})["panel"]) == {"head 0", "head 1"}
    assert set(with_panels(rows, {"mine": "regime"})["panel"]) == {"mine"}
    many = rows.assign(head=np.arange(len(rows)) % 9)
    assert set(with_panels(many, {"mine": "capture"})["panel"]) == {"mine"}


def test_featured_are_before_after_and_the_oracle():
    lines = summarise(with_panels(made_rows(), {}))
    assert featured(lines, RECIPES) == (
        ["hexagon-hmx-fp16", "hexagon-hmx-fp32"],
        ["ggml-cpu-decode"],
    )
    mine = ("hexagon-pr24389", "hexagon-pr24389+running_sum=fp22", "float32")
    lines = summarise(with_panels(made_rows(recipes=mine), {}))
    assert featured(lines, mine) == (list(mine[:2]), ["float32"])


def test_a_changed_kernel_is_featured_beside_itself():
    changed = [f"{name}+running_sum=fp22" for name in RECIPES[:2]]
    names = ("hexagon-hmx-fp32", RECIPES[0], changed[0], RECIPES[1], changed[1], "float32")
    lines = summarise(with_panels(made_rows(recipes=names), {}))
    assert featured(lines, names) == ([RECIPES[0], changed[0]], ["float32"])


# labels


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_keep_their_distance_their_order_and_their_room(wanted, gap):
    places = spread(wanted, gap, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    kept = min(gap, 1 / max(1, len(wanted) - 1))
    assert (np.diff(np.array(places)[order]) >= kept - 1e-9).all()
    assert min(places) >= -1e-9 and max(places) <= 1 + 1e-9


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True))
def test_labels_with_room_stay_where_they_are(places):
    wanted = [0.04 + 0.045 * place for place in places]
    np.testing.assert_allclose(spread(wanted, 0.04, 0.0, 1.0), wanted, rtol=0, atol=1e-12)


def overlaps(figure: Figure, texts: list[Text]) -> list[tuple[str, str]]:
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in texts]
    return [
        (a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)
    ]


def assert_tidy(figure: Figure, name: str) -> None:
    """No text lies on another, and all of them on the page."""
    texts = [text for ax in figure.axes for text in ax.texts] + list(figure.texts)
    texts += [ax.title for ax in figure.axes] + figure.legends[:1]
    assert not overlaps(figure, [t for t in texts if isinstance(t, Text)]), name
    box = figure.get_tightbbox()
    assert box.x0 >= -0.02 and box.x1 <= figure.get_figwidth() + 0.02, name
    assert box.y0 >= -0.02 and box.y1 <= figure.get_figheight() + 0.02, name


def test_labels_of_lines_that_end_together_do_not_overlap(style):
    figure, (ax,) = fig.grid(1, label=1.0)
    error_axis(ax, 1e-8, 1.0, label=False)
    context_axis(ax, CONTEXTS)
    label_ends(ax, [(CONTEXTS[-1], 1e-4 * (1 + i / 9), f"line {i}", "#000000") for i in range(9)])
    assert len(ax.texts) == 9 and not overlaps(figure, list(ax.texts))


# panels


def test_a_line_ends_where_its_values_do_and_marks_say_why(style):
    figure, (ax,) = fig.grid(1, label=0.3)
    error_axis(ax, 1e-8, 1.0, label=True)
    context_axis(ax, CONTEXTS)
    nmse = [1e-6, 1e-5, 1e-4, np.inf, np.inf]
    flags = {"overflow": [False] * 3 + [True] * 2, "stagnated": [False, True, True, True, True]}
    end = draw_curve(ax, one_curve(nmse, **flags), "#D55E00")
    assert end == (CONTEXTS[2], 1e-4)
    line, stagnated, overflow = ax.lines[-3:]
    np.testing.assert_array_equal(line.get_xdata(), CONTEXTS[:3])
    np.testing.assert_array_equal(line.get_ydata(), nmse[:3])
    assert (stagnated.get_marker(), *stagnated.get_xdata()) == ("|", CONTEXTS[1])
    assert (overflow.get_marker(), *overflow.get_xdata()) == ("x", CONTEXTS[3])
    assert list(overflow.get_ydata()) == [1.0]
    assert [text.get_text().replace("\n", " ") for text in ax.texts] == ["llama.cpp test tolerance"]
    assert TOLERANCE in [line.get_ydata()[0] for line in ax.lines]


def test_what_theory_expects_is_a_thin_line_with_small_marks(style):
    figure, (ax,) = fig.grid(1, label=0.3)
    error_axis(ax, 1e-8, 1.0, label=False)
    expected = pd.DataFrame({"context": CONTEXTS[:3], "nmse": [2e-6, np.inf, 3e-4]})
    expected = expected.assign(recipe="a", inputs="i", block="rule", head=-1, overflow=False)
    expected["stagnated"] = [False, False, True]
    lines = one_curve([1e-6, 1e-5, 1e-4], predicted=expected)
    draw_curve(ax, lines, "#D55E00")
    line, theory, stagnated = ax.lines[-3:]
    np.testing.assert_array_equal(theory.get_xdata(), [CONTEXTS[0], CONTEXTS[2]])
    assert theory.get_linewidth() < line.get_linewidth() / 1.5
    assert (stagnated.get_marker(), *stagnated.get_xdata()) == ("|", CONTEXTS[2])
    assert [handle.get_label() for handle in fig.marks(lines)] == ["theory"]
    assert not fig.marks(one_curve([1e-6]))


def test_errors_of_zero_are_drawn_at_the_floor(style):
    _, (ax,) = fig.grid(1, label=0.3)
    error_axis(ax, FLOOR, 1.0, label=False)
    assert draw_curve(ax, one_curve([0.0, 0.0]), "#000000") == (CONTEXTS[1], FLOOR)


def test_a_curve_that_never_is_finite_draws_no_line(style):
    _, (ax,) = fig.grid(1, label=0.3)
    error_axis(ax, FLOOR, 1.0, label=False)
    assert draw_curve(ax, one_curve([np.nan, np.nan]), "#000000") is None


def test_a_filled_mark_passes_and_a_hollow_one_does_not(style):
    lines = pd.concat(
        [
            one_curve([1e-6, 1e-3]).assign(block="64"),
            one_curve([1e-6, 1e-5]).assign(block="512"),
        ]
    )
    _, (ax,) = fig.grid(1, label=0.1)
    colours = block_colours(["64", "512"])
    passing_contexts(ax, crossings(lines), "i", ["a"], {b: colours[b] for b in ("64", "512")}, 9e9)
    marks = [line for line in ax.lines if line.get_marker() != "None"]
    assert [line.get_xdata()[0] for line in marks] == [CONTEXTS[1], 9e9]
    assert [line.get_markerfacecolor() for line in marks] == [colours["64"], "white"]


def test_colours_are_told_apart():
    colours = recipe_colours([*RECIPES, "mine", "yours"])
    assert len(set(colours.values())) == 7
    assert len(set(block_colours(["64", "128", "512", "rule"]).values())) == 4


# whole figures


@pytest.mark.parametrize(
    "inputs, kinds",
    [
        (REGIMES, dict.fromkeys(REGIMES, "regime")),
        (("gaussian",), {"gaussian": "regime"}),
        (("mine",), {"mine": "capture"}),
    ],
)
def test_figures_label_every_panel_and_overlap_nowhere(style, inputs, kinds):
    drawn = dict(fig.figures_of(made_rows(inputs), RECIPES, kinds))
    assert list(drawn) == [
        "error_by_block",
        "error_by_recipe_64",
        "error_by_recipe_rule",
        "passing",
    ]
    panels = ["head 0", "head 1"] if "mine" in inputs else list(inputs)
    for name, figure in drawn.items():
        assert [ax.get_title(loc="left") for ax in figure.axes] == panels
        assert_tidy(figure, name)


def test_long_names_take_fewer_columns(style):
    names = ("hexagon-hmx-fp16", "hexagon-hmx-fp16+running_sum=fp22+output=float32", "float32")
    kinds = dict.fromkeys(REGIMES, "regime")
    drawn = dict(fig.figures_of(made_rows(recipes=names), names, kinds))
    for name, figure in drawn.items():
        box = figure.get_tightbbox()
        assert box.x0 >= -0.02 and box.x1 <= figure.get_figwidth() + 0.02, name
        assert min(ax.get_position().width for ax in figure.axes) * fig.WIDTH > 0.8, name


def test_rows_of_one_block_have_no_figure_by_block(style):
    drawn = dict(fig.figures_of(made_rows(recipes=("float32",)), ["float32"], {}))
    assert list(drawn) == ["error_by_recipe_rule", "passing"]


def test_an_atlas_has_a_panel_for_every_kernel(style):
    names = [*RECIPES, "a-kernel-of-a-rather-long-name-bf16"]
    rows = made_rows(REGIMES[:2], names)
    figure = atlas.small_multiples(rows, names, dict.fromkeys(REGIMES[:2], "regime"))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title.replace("\n", "") for title in titles] == names
    assert max(len(line) for title in titles for line in title.splitlines()) <= atlas.LINE + 1
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert all(len(ax.lines) >= 3 for ax in figure.axes)  # two inputs and the tolerance


def made_fidelity() -> pd.DataFrame:
    rows = [
        {"peer": peer, "expect": expect, "status": "run", "inputs": name}
        | {"correlation": correlation, "control": 0.3, "rms_ratio": 1.2}
        for peer, expect, correlation in (("one", "vector", 1.0), ("two", "noise", 0.2))
        for name in fidelity.INPUTS
    ]
    gone = rows[0] | dict.fromkeys(("correlation", "control", "rms_ratio"), np.nan)
    return pd.DataFrame([*rows, gone | {"peer": "absent", "status": "not run"}])


@pytest.mark.parametrize("ratio", [0.0, np.inf, np.nan])
def test_fidelity_draws_ratios_that_no_axis_holds(style, tmp_path, ratio):
    made_fidelity().assign(rms_ratio=ratio).to_parquet(tmp_path / "0a.parquet")
    manifest = {"study": "fidelity", "parts": [{"key": "0a"}]}
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    ((_, figure),) = fidelity.read_and_draw(tmp_path)
    figure.canvas.draw()


def test_fidelity_has_a_row_for_every_kernel_that_ran(style, tmp_path, capsys):
    made_fidelity().to_parquet(tmp_path / "0a.parquet")
    manifest = {"study": "fidelity", "parts": [{"key": "0a"}]}
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    ((name, figure),) = fidelity.read_and_draw(tmp_path)
    labels = [[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes]
    assert name == "fidelity" and labels == [["one"], ["two"]]
    texts = [*figure.texts, *(ax.xaxis.label for ax in figure.axes)]
    assert not overlaps(figure, texts)
    made_fidelity().assign(status="not run").to_parquet(tmp_path / "0a.parquet")
    assert list(fidelity.read_and_draw(tmp_path)) == []
    assert "no real kernel ran" in capsys.readouterr().out


def write(root: Path, rows: pd.DataFrame) -> None:
    """A directory as `sweeps` leaves it, by hand."""
    root.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(root / "0a.parquet")
    manifest = {"study": "hexagon", "recipes": dict.fromkeys(RECIPES)}
    manifest["parts"] = [{"key": "0a"}, {"key": "0b"}]
    manifest["inputs"] = {name: {"kind": "regime"} for name in REGIMES}
    (root / "_manifest.json").write_text(json.dumps(manifest))


def command(root: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "plots", str(root)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_png_and_svg_with_text_as_text(tmp_path):
    write(tmp_path, made_rows(REGIMES[:1], RECIPES[:2], seeds=1))
    result = command(tmp_path)
    assert result.returncode == 0, result.stderr
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert {path.parent for path in paths} == {tmp_path / "_figures"}
    assert {path.suffix for path in paths} == {".png", ".svg"} and len(paths) == 8
    before = {path.name: path.read_bytes() for path in paths}
    svg = (tmp_path / "_figures" / "error_by_block.svg").read_text()
    assert ">gaussian</text>" in svg and ">test tolerance<" in svg
    assert command(tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in paths} == before
    assert len(pd.read_parquet(tmp_path)) == len(read(tmp_path)[0])


@pytest.mark.parametrize("make", ["absent", "empty", "manifest", "parts", "columns"])
def test_directories_without_rows_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, make):
    root = tmp_path / "d"
    if make != "absent":
        root.mkdir()
    if make == "manifest":
        (root / "_manifest.json").write_text("{")
    if make == "parts":
        write(root, made_rows(REGIMES[:1], RECIPES[:1]))
        (root / "0a.parquet").write_bytes(b"PAR1")
    if make == "columns":
        write(root, made_rows(REGIMES[:1], RECIPES[:1]).drop(columns="nmse"))
    monkeypatch.setattr(sys, "argv", ["plots", str(root)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (root / "_figures").exists()


def test_what_run_wrote_not_is_said_in_plain_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "nope")])
    with pytest.raises(SystemExit):
        main()
    line = f"plots: {tmp_path / 'nope'}: no directory that `sweeps run` wrote\n"
    assert capsys.readouterr().err == line


def test_plots_import_nothing_of_the_project():
    for path in (ROOT / "plots").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"jax", "jaxattn", "sweeps"}, path
