"""The speed study: medians by a clock of its own, verdicts, the table, the figures. No test here
depends on real time."""

import json
import math
import sys
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_plots import assert_tidy

import jaxattn
from jaxattn.formats import FLOAT16
from jaxattn.lanes import weave
from plots import figures as fig
from plots import speed as drawing
from sweeps.items import NOT_RUN
from sweeps.speed import commands, gpu, measure, ours, peers, scaling, study
from sweeps.speed.measure import NotRun, Row, Times


class Clock:
    """A clock that only its own calls move forward."""

    def __init__(self) -> None:
        self.now, self.called = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def call(self, letter: str, *seconds: float):
        """A call that takes each of `seconds` in turn, and the last from then on."""
        left = list(seconds)

        def call() -> None:
            self.called += letter
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


# --- measuring -----------------------------------------------------------------------------------


def test_medians_of_an_odd_number_of_turns_without_the_warm_ups():
    clock = Clock()
    call, limit = clock.call("c", 99.0, 1.0, 3.0, 9.0, 2.0, 4.0, 3.5), clock.call("l", 50.0, 0.5)
    times = measure.take_turns(call, limit, clock, least=5)
    assert times == Times(3.5, 0.5) and times.ratio == 7.0
    assert clock.called == "lc" * measure.WARMUPS + "lcl" * 5


@pytest.mark.parametrize(("seconds", "turns"), [(100.0, 5), (0.25, 9), (1e-3, 25)])
def test_short_calls_are_measured_more_often_within_bounds(seconds, turns):
    clock = Clock()
    measure.take_turns(clock.call("c", seconds), clock.call("l", 1e-3), clock)
    assert clock.called.count("c") == turns + measure.WARMUPS and turns % 2


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_exponents_of_planted_powers(slope):
    sizes = [2**k for k in range(14, 21, 2)]
    assert measure.exponent(sizes, [3e-6 * n**slope for n in sizes]) == pytest.approx(slope)


def test_the_limit_is_the_pair_of_products_whole_and_in_pieces():
    drawn = measure.problem(3, 64)
    q, k, v = (x.astype(np.float64) for x in drawn)
    for piece in (None, 16):
        np.testing.assert_allclose(measure.limit(drawn, piece)(), q @ k.T @ v, rtol=1e-3, atol=1e-3)
    assert measure.flops(3, 64) == 2 * (q @ k.T).size * 128 * 2


def test_the_reference_alone_is_the_judge_of_error_curves():
    drawn = measure.problem(2, 70)
    output, _ = ours.reference(drawn)()
    exact = jaxattn.reference_attention(*drawn.layout("float16"))
    np.testing.assert_allclose(output[0], exact[0, :, 0])


def test_eight_recipes_have_eight_distinct_p_and_lattices_every_choice():
    recipes = ours.eight_recipes(64)
    lanes, _ = weave(recipes, *[FLOAT16] * 3)
    assert len(recipes) == 8 and lanes.count("p") == 8
    for formats, sites in ((ours.FORMATS, ours.SUMS), (("float16", "float32"), ours.EIGHT)):
        found = {str(r.identity()) for r in ours.lattice(ours.hmx(), dict.fromkeys(sites, formats))}
        assert len(found) == 256


def test_contexts_are_spaced_from_256_to_all():
    for count in (8, 64):
        spaced = scaling.spaced(131072, count)
        assert len(set(spaced)) == count and spaced[0] == 256 and spaced[-1] == 131072


def test_peak_memory_is_bytes_of_this_process():
    assert 2**24 < scaling.peak_memory() < 2**40


def test_a_page_repeats_to_any_length():
    key = np.arange(gpu.PAGE)[:, None, None] * np.ones((1, 2, 4))
    stream = gpu.Repeated(key, -key, 3 * gpu.PAGE)
    found, value = stream.blocks(gpu.PAGE - 1, gpu.PAGE + 2)
    assert found[:, 0, 0].tolist() == [gpu.PAGE - 1, 0, 1] and (value == -found).all()
    assert (stream.blocks(gpu.PAGE, 2 * gpu.PAGE)[0] == key).all()
    assert (stream.heads, stream.head_dim, stream.value_dim) == (2, 4, 4)


def test_what_a_gpu_would_measure_runs_here_too(monkeypatch):
    """At a small size, with an attention of no interest in cuDNN's place."""
    monkeypatch.setattr(measure, "WARMUPS", 1)
    monkeypatch.setattr(measure, "MOST", 1)
    monkeypatch.setattr("jax.nn.dot_product_attention", lambda q, k, v, implementation: q)
    monkeypatch.setattr(
        gpu, "take_turns", lambda *calls, least=5: measure.take_turns(*calls, least=1)
    )
    monkeypatch.setattr(gpu, "eight_recipes", lambda: ours.eight_recipes(64)[:2])
    rows = list(gpu.measured(heads=1, queries=1, keys=300, rate_size=8, implementation="cudnn"))
    assert [row.unit for row in rows] == ["GF/s", "", "times the kernel", "times the kernel"]
    assert [row.most for row in rows] == [None, None, 4.0, None]
    assert all(row.value > 0 for row in rows) and [row.recipes for row in rows] == [None, 2, 2, 1]


def test_streams_and_arrays_are_measured_at_every_length(monkeypatch):
    monkeypatch.setattr(scaling, "LENGTHS", (64, 128))
    monkeypatch.setattr(scaling, "QUERIES", 2)
    monkeypatch.setattr(scaling, "STREAM_QUERIES", 1)

    def once(call, limit, least):
        assert call() is not None
        return Times(1.0, 1.0)

    monkeypatch.setattr(scaling, "take_turns", once)
    monkeypatch.setattr(scaling, "lattice", lambda recipe, sites: [recipe] * 256)
    monkeypatch.setattr(scaling, "hmx", lambda: ours.hmx(64))
    monkeypatch.setattr(scaling, "eight_recipes", lambda: [ours.hmx(64)] * 8)
    rows = list(scaling.lengths())
    assert len(rows) == 2 * 6 + 6
    exponents = [row for row in rows if row.unit == "exponent"]
    assert [row.most for row in exponents] == [None, None, 1.05, 1.05, 1.05, 1.05]


# --- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "jax by hand", "jax.nn"])
def test_a_peer_computes_what_it_says(name):
    drawn = measure.problem(4, 2 * peers.BLOCK)
    result = peers.PEERS[name].make(drawn)()
    distance = peers.apart(result, drawn)
    # Sums in another order round a few results the other way; plain float32 rounds none.
    assert distance < 1e-4 if peers.PEERS[name].rounds else 1e-4 < distance < 1e-2


def test_a_package_that_is_missing_is_a_row_and_imports_nothing(monkeypatch):
    def make(drawn):
        raise AssertionError("must not be made")

    monkeypatch.setitem(peers.PEERS, "numpy", peers.Peer(("no-such-package",), make))
    (row,) = study._rows("numpy", study.SUBJECTS["numpy"])
    assert row["status"] == NOT_RUN and row["why"] == "no-such-package is not installed"


# --- what cannot be run --------------------------------------------------------------------------


def test_without_a_gpu_its_item_is_not_run(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    (row,) = study._rows("gpu", study.SUBJECTS["gpu"])
    assert row["status"] == NOT_RUN and row["why"] == "jax finds no GPU"


def test_what_fails_keeps_what_was_measured_before():
    def rows() -> Iterator[Row]:
        yield Row(what="first", value=1.0)
        raise OSError("no more")

    first, second = study._rows("x", study.Subject("a title", rows))
    assert (first["what"], first["status"]) == ("first", "measured")
    assert (second["status"], second["why"]) == (NOT_RUN, "OSError: no more")
    assert "not run: OSError: no more" in study.table(frame([first, second]))


def test_a_command_that_fails_says_why():
    with pytest.raises(NotRun, match="no such thing"):
        commands.run("-c", "raise SystemExit('no such thing')")
    assert commands.run("-c", "print(1)")[1] == "1\n"


def test_help_is_seen_to_import_no_jax(monkeypatch):
    assert not commands.imports_jax("plots")
    with pytest.raises(NotRun):
        commands.run("-m", "no_such_module")


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least", "most", "status"),
    [
        (1.2, None, 1.2, "met"),
        (1.21, None, 1.2, "not met"),
        (0.94, 0.95, 1.05, "not met"),
        (1.0, 0.95, 1.05, "met"),
        (7.0, None, None, "measured"),
        (math.nan, None, 1.0, "not met"),
    ],
)
def test_verdicts(value, least, most, status):
    assert study.judge(Row(what="w", value=value, least=least, most=most)) == status


def frame(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([{**dict.fromkeys(study.SCHEMA), **row} for row in rows])


def made(item: str, *rows: Row, process: str = "p") -> list[dict]:
    return [
        {"item": item, "title": f"the {item}", "process": process, **vars(row)}
        | {"status": study.judge(row)}
        for row in rows
    ]


def test_the_table_puts_the_ratio_beside_its_goal_and_says_not_met():
    size = {"queries": 512, "keys": 4096, "seconds": 0.0151, "limit_seconds": 0.01}
    rows = made(
        "one",
        Row(what="a call", value=1.51, most=1.2, **size),
        Row(what="a call " * 12, value=0.5, most=1.2, why="a reason", **size),
    )
    rows += made("start", Row(what="help", value=0.3, unit="s", most=0.5, seconds=0.3), process="q")
    rows += [{"item": "gpu", "title": "t", "status": NOT_RUN, "why": "none here", "what": "t"}]
    text = study.table(frame(rows))
    line = next(x for x in text.splitlines() if "a call  " in x)
    assert line.split() == "a call 512 x 4,096 15.1 ms 10 ms 1.510 at most 1.2 NOT MET".split()
    assert "(a reason)" in text and "not run: none here" in text and "in 2 processes" in text
    assert text.splitlines()[-1] == "speed: 2 met, 1 not met, 1 not run"
    assert max(map(len, text.splitlines())) <= 120
    assert "All measured in one process." in study.table(frame(rows[:2]))


def test_items_are_what_only_takes_and_quick_leaves_out_the_slow():
    full, quick = ({item.name for item in study.items(q)} for q in (False, True))
    assert quick < full and {"memory", "many", "lengths"} <= full - quick
    assert all(name == name.lower() and not set(name) & set(" ,+") for name in full)


def test_importing_the_study_imports_no_peer_and_no_jax():
    seen = "{'jax', 'torch'} & set(sys.modules)"
    commands.run("-c", f"import sys, sweeps.speed.study as s; s.items(True); assert not {seen}")


# --- figures -------------------------------------------------------------------------------------


def made_rows() -> pd.DataFrame:
    rows = []
    for keys in (2**14, 2**16, 2**18, 2**20):
        each = keys / 2**17
        for series, count, cost in (
            ("limit", None, 1.0),
            ("reference", None, 1.5),
            ("ours", 1, 2.0),
            ("ours", 8, 5.0),
            ("ours", 256, 5.2),
        ):
            row = Row(what="w", series=series, value=cost, seconds=0.1 * cost * each)
            rows += made("lengths", measure_size(row, 64, keys, count))
    for count in (1, 4, 16, 64, 256):
        row = Row(what="w", series="ours", value=2 + count / 80)
        rows += made("recipes", measure_size(row, 64, 2**17, count))
    for keys, queries in ((4096, 512), (2**17, 64)):
        for i, (name, peer) in enumerate(peers.PEERS.items()):
            row = Row(what=name, series="peer" if peer.rounds else "plain", value=0.8 * 1.7**i)
            rows += made("numpy", measure_size(row, queries, keys, 1))
        for name, value in (("jaxattn", 0.9), ("jaxattn, each of 256", 0.03)):
            row = Row(what=name, series="ours", value=value)
            rows += made("jaxattn", measure_size(row, queries, keys, 1))
    return frame(rows)


def measure_size(row: Row, queries: int, keys: int, recipes: int | None) -> Row:
    return Row(**{**vars(row), "queries": queries, "keys": keys, "recipes": recipes})


@pytest.fixture
def style() -> Iterator[None]:
    with plt.style.context(fig.STYLE):
        yield
    plt.close("all")


def drawn(root, rows: pd.DataFrame) -> dict:
    rows.to_parquet(root / "0a.parquet")
    (root / "_manifest.json").write_text(json.dumps({"study": "speed", "parts": [{"key": "0a"}]}))
    return dict(drawing.read_and_draw(root))


def test_figures_overlap_nowhere_and_fit_the_page(style, tmp_path):
    figures = drawn(tmp_path, made_rows())
    assert list(figures) == ["speed"]
    for name, figure in figures.items():
        assert_tidy(figure, name)


def test_a_quick_run_draws_its_peers_alone_and_nothing_draws_nothing(style, tmp_path, capsys):
    rows = made_rows()
    quick = rows[~rows["item"].isin(["lengths", "recipes"])]
    (figure,) = drawn(tmp_path, quick).values()
    assert len(figure.axes) == 2
    assert drawn(tmp_path, rows.assign(status=NOT_RUN)) == {}
    assert "nothing that a figure shows" in capsys.readouterr().out


def test_bars_end_where_the_rows_say(style, tmp_path):
    figure = drawn(tmp_path, made_rows())["speed"]
    for ax in figure.axes[2:]:
        ends = sorted((bar.get_y(), round(bar.get_x() + bar.get_width(), 6)) for bar in ax.patches)
        shown = [float(text.get_text()) for text in sorted(ax.texts, key=lambda t: t.xy[1])]
        assert [float(f"{x:.2f}" if x < 10 else f"{x:.0f}") for _, x in ends] == shown


def test_a_study_that_is_drawn_by_the_command(tmp_path, monkeypatch):
    from plots.__main__ import main

    made_rows().to_parquet(tmp_path / "0a.parquet")
    manifest = {"study": "speed", "parts": [{"key": "0a"}]}
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    main()
    assert {p.name for p in (tmp_path / "_figures").iterdir()} >= {"speed.png", "speed.svg"}
