"""The ablation study: what it stores, says and draws, on a kernel of five sites."""

import itertools
import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_plots import assert_tidy

import jaxattn
import sweeps.__main__ as cli
from jaxattn import kernels
from jaxattn.attribution import subsets
from jaxattn.formats import FLOAT16, FLOAT32
from jaxattn.inputs import regime
from plots import ablation as drawn
from plots.figures import STYLE, save
from sweeps.ablation import study, table
from sweeps.report import picture

KERNEL = "metal-bf16"
CONTEXTS = [256, 304, 368, 432, 512]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sweeps", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The directory of a small run, and what it printed."""
    root = tmp_path_factory.mktemp("ablation") / "out"
    small = ["--inputs", "gaussian,biased_v", "--seeds", "2", "--max-context", CONTEXTS[-1]]
    line = ["run", "ablation", "--kernel", KERNEL, "--no-figures", "--out", root, *small]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *line) == 0
    return root, line


@pytest.fixture
def style():
    with plt.style.context(STYLE):
        yield
    plt.close("all")


def test_rows_are_medians_over_seeds_heads_and_queries(ran):
    root, _ = ran
    rows, manifest = pd.read_parquet(root), json.loads((root / "_manifest.json").read_text())
    sites = manifest["sites"]
    assert len(sites) == 5 and manifest["beside"] == []
    assert len(rows) == 2 * len(CONTEXTS) * 32
    recipes, pooled = subsets(kernels.get(KERNEL), sites), []
    for seed in range(2):
        query, stream = regime("biased_v", length=512, seed=seed, **study.FULL.sizes)
        curves = jaxattn.error_curves(
            query, stream, None, recipes, contexts=CONTEXTS, metrics=study.METRICS
        )
        pooled.append({name: x.reshape(32, 5, -1) for name, x in curves.metrics.items()})
    nmse, bias = (
        np.concatenate([m[name] for m in pooled], -1).astype(float) for name in ("nmse", "bias_o")
    )
    here = rows[rows["inputs"] == "biased_v"].set_index(["subset", "context"])
    assert (here["rows"] == 2 * 128).all() and (here["head"] == -1).all()
    for subset in (0, 0b10010, 31):
        stored = here.loc[subset]
        np.testing.assert_array_equal(stored["nmse"], np.median(nmse[subset], -1))
        np.testing.assert_array_equal(stored["nmse_p90"], np.quantile(nmse[subset], 0.9, axis=-1))
        np.testing.assert_array_equal(stored["bias_o"], np.median(bias[subset], -1))
        wins, ties = nmse[subset] < nmse[0], nmse[subset] == nmse[0]
        np.testing.assert_allclose(stored["better"], wins.mean(-1) + ties.mean(-1) / 2)


def test_what_sites_owe_adds_up_in_the_rows(ran):
    rows = pd.read_parquet(ran[0])
    for _, part in rows.groupby(["inputs", "context"]):
        part = part.set_index("subset")
        owed = part["owed_nmse"].loc[[1, 2, 4, 8, 16]].sum()
        assert owed == pytest.approx(part["nmse"][0] - part["nmse"][31], rel=1e-12)
        assert (part["owed_overflow"].loc[1:] == 0).all()


def test_the_same_command_computes_nothing_again_and_tables_the_same(ran, monkeypatch, capsys):
    root, line = ran
    monkeypatch.setattr(study, "_rows", None)
    assert call(monkeypatch, *line) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 parts are finished already" in err
    assert call(monkeypatch, "show", root) == 0
    assert capsys.readouterr().out == out
    for word in ("gaussian, its own KV block (64 at", "owes", "from, with lifted", "exceeds, with"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 130


def test_a_capture_has_a_panel_for_each_head(tmp_path, monkeypatch, capsys):
    rng, capture, out = np.random.default_rng(0), tmp_path / "c.npz", tmp_path / "out"
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
    np.savez(capture, query=draw(4, 32, 128), key=draw(1, 512, 128), value=draw(1, 512, 128))
    line = ["run", "ablation", "--kernel", KERNEL, "--inputs", capture, "--no-figures"]
    assert call(monkeypatch, *line, "--out", out) == 0
    rows = pd.read_parquet(out)
    assert sorted(rows["head"].unique()) == [0, 1, 2, 3] and (rows["rows"] == 32).all()
    assert "c, head 3, its own KV block (64" in capsys.readouterr().out


def test_the_figures_are_drawn_of_the_rows(ran, style):
    for name, figure in drawn.read_and_draw(ran[0]):
        assert name in ("owed_rule", "together_rule")
        assert_tidy(figure, name)


def test_the_report_takes_the_figures(ran, style, tmp_path):
    for name, figure in drawn.read_and_draw(ran[0]):
        save(figure, tmp_path, name)
        assert picture(tmp_path / f"{name}.svg", "a-").startswith("<svg")


def test_equal_rows_are_one_draw():
    """Where all queries are one, a mark would rest on as many draws as there are values."""
    nmse = np.arange(24.0).reshape(2, 1, 2, 6)  # [subset, panel, context, rows]
    nmse[:, :, 1, 3:] = nmse[:, :, 1, :3]
    assert study._distinct(nmse).tolist() == [[6, 3]]
    nmse[1, :, 1] = np.nan
    assert study._distinct(nmse).tolist() == [[6, 3]]
    sure = made_panel([1e-5, 1e-5], [1e-6, 1e-6], rows=400, better=1.0)
    assert table.matters(sure, 1) == "1,024+"
    assert table.matters(sure._replace(distinct=np.array([5, 5])), 1) == "?"
    once = made_panel([1e-5] * 4, [1e-6, 1e-5, 1e-5, 1e-5], rows=4, better=1.0)
    assert table.matters(once, 1) == "-"
    same = made_panel([1e-5, 1e-5], [1e-5, 1e-5], rows=4, better=0.5)
    assert table.matters(same, 1) == "-"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ablation", "--recipes", "metal"], "--recipes has no meaning with the study 'ablation'"),
        (["ablation", "--set", "probs=float16"], "use --kernel"),
        (["ablation", "--only", "a"], "use --kernel"),
        (["ablation", "--kernel", "hexagon-hmx-fp61"], "did you mean 'hexagon-hmx-fp16'"),
        (["ablation", "--kernel", "float32"], "--kernel float32 rounds nothing"),
        (["hexagon", "--kernel", "metal"], "--kernel has no meaning with the study 'hexagon'"),
        (["atlas", "--kernel", "metal"], "use --recipes"),
        (["claims", "--kernel", "metal"], "use --only"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, said):
    assert call(monkeypatch, "run", *arguments, "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# the plan


def test_the_lattice_has_every_subset_of_the_eight_and_the_two_ends_of_the_others():
    recipe = kernels.get("hexagon-hmx-fp16")
    work, notes = study.work_of(study.FULL, False, inputs="gaussian", seeds=1, max_context=256)
    sites, beside = work.manifest["sites"], work.manifest["beside"]
    names = (*sites, *beside)
    found = study.lattice(recipe, sites, beside)
    every = 2**11 - 1
    others = {1 << i for i in (8, 9, 10)} | {every ^ 1 << i for i in (8, 9, 10)} | {every}
    assert set(found) == set(range(256)) | others and not notes
    for subset, lifted in found.items():
        for i, name in enumerate(names):
            assert getattr(lifted, name) == (FLOAT32 if subset >> i & 1 else FLOAT16)
    assert [(p["inputs"], p["block"]) for p in work.parts] == [
        ("gaussian", b) for b in ("rule", "64")
    ]


def test_keys_tell_kernels_seeds_and_contexts_apart():
    changes = [{}, {"seeds": 2}, {"max_context": 256}, {"kernel": "hexagon-pr24389"}]
    base = {"inputs": "gaussian", "seeds": 1, "max_context": 512}
    keys = [
        part["key"]
        for change in changes
        for part in study.work_of(study.FULL, False, **(base | change))[0].parts
    ]
    assert len(set(keys)) == len(keys) == 8


# the table


def made_panel(before, after, rows=100, better=None):
    """A panel of one site: NMSE as it is and with the site lifted, at contexts 1024, 2048, ..."""
    contexts = [1024 * 2**i for i in range(len(before))]
    nmse = pd.DataFrame({0: before, 1: after}, index=contexts)
    surely = np.where(np.array(after) < before, 1.0, 0.0) if better is None else better
    wins = pd.DataFrame({0: 0.5, 1: surely}, index=contexts)
    none = nmse * 0
    return table.Panel("x", "64", nmse, none, wins, none, none, 64, rows, ("output",), 1)


@pytest.mark.parametrize(
    ("panel", "said"),
    [
        (made_panel([1e-7, 1e-5, 1e-5, 1e-5], [1e-9, 1e-6, 1e-6, 1e-6]), "2,048+"),
        (made_panel([1e-5, 1e-5, 1e-5, 1e-5], [1e-6, 1e-6, 2e-5, 2e-5]), "1,024+ 4,096-"),
        (made_panel([1e-5, 1e-5, 1e-5, 1e-5], [1e-6, 1e-5, 1e-5, 1e-5]), "-"),  # never an octave
        (made_panel([1e-5, 1e-5, 1e-5, 1e-5], [1e-6, 1e-5, 1e-5, 2e-5]), "-"),  # once
        (made_panel([1e-5, 1e-5, 1e-5, 1e-5], [1e-6, 1e-5, 2e-5, 2e-5]), "4,096-"),
        (made_panel([1e-5, 1e-5], [0.95e-5, 1.09e-5]), "-"),  # within 10 %
        (made_panel([1e-5, 1e-5], [1e-6, 1e-6], better=0.6), "-"),  # two sigma of 100 rows
        (made_panel([1e-5, 1e-5], [1e-6, 1e-6], rows=400, better=0.6), "1,024+"),
        (made_panel([1e-5], [1e-6]), "1,024+"),
        (made_panel([1e-7, 1e-7], [1e-9, 1e-9]), "-"),
    ],
)
def test_from_where_a_site_matters(panel, said):
    assert table.matters(panel, 1) == said


def test_what_exceeds_is_told_with_its_marks():
    panel = made_panel([1e-5, 1e-3, 1e-3], [1e-5, 1e-3, 1e-5])
    assert table.exceeds(panel, 0) == "2,048" and table.exceeds(panel, 1) == "2,048~"
    lost = panel._replace(overflow=panel.overflow + 0.1)
    assert table.exceeds(lost, 0) == "2,048!"


# the figure


def made_rows(errors, sites, contexts=(256, 1024, 4096, 16384, 65536)):
    """Rows of one input with the same errors [2^k] at every context."""
    from jaxattn.attribution import interaction_indices

    owed = interaction_indices(errors)
    columns = {"recipe": "a-kernel", "inputs": "gaussian", "head": -1, "block": "64"}
    lines = [
        {**columns, "context": n, "subset": i, "nmse": errors[i], "overflow": 0.0, "owed_nmse": x}
        for n, (i, x) in itertools.product(contexts, enumerate(owed))
    ]
    return pd.DataFrame(lines)


def test_a_site_that_hurts_when_lifted_hangs_below_zero(style):
    sites = ["running_sum", "output"]
    errors = np.array([1e-3, 4e-4, 3e-3, 1e-6])  # lifting o makes it worse, l better
    (panel,) = drawn.panels_of(made_rows(errors, sites))
    _, ax = plt.subplots()
    shares = drawn._shares(panel, sites)
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1 - 1e-3)
    assert (shares["output"] < 0).all() and (shares["running_sum"] > 1.5).all()
    drawn.stack(ax, shares, drawn._colours(sites), (-1.0, 2.0))
    spans = {}
    for area in ax.collections:
        y = np.concatenate([path.vertices[:, 1] for path in area.get_paths()] or [np.zeros(1)])
        spans.setdefault(tuple(np.round(area.get_facecolor()[0][:3], 3)), []).append(
            (y.min(), y.max())
        )
    low = min(y for some in spans.values() for y, _ in some)
    high = max(y for some in spans.values() for _, y in some)
    assert low == pytest.approx(shares["output"].iloc[0])
    assert high == pytest.approx(shares["running_sum"].iloc[0] + 1e-3)  # left over on top


def test_the_strongest_pair_is_named_with_its_sign(style):
    sites = ["running_sum", "output", "probs"]
    pair = np.array([1.0, 3.0, 3.0, 0.5])
    errors = np.concatenate([pair, pair]) * 1e-4 + np.repeat([1e-6, 0], 4)
    rows = made_rows(errors, sites)
    (panel,) = drawn.panels_of(rows)
    figure = drawn.together([panel], sites, "here")
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    # Lifting either adds 2e-4 and both remove 0.5e-4, of 1.01e-4.
    assert texts == [f"l × o\n+{450 / 1.01:.0f} %"] * 2
    assert_tidy(figure, "together")


def test_many_panels_go_into_several_figures(tmp_path, monkeypatch, style):
    rows = made_rows(np.array([1e-3, 4e-4, 3e-3, 1e-6]), ["running_sum", "output"])
    every = pd.concat([rows.assign(inputs=name) for name in "abc"])
    every.to_parquet(tmp_path / "0.parquet")
    manifest = {"study": "ablation", "parts": [{"key": "0"}], "sites": ["running_sum", "output"]}
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(drawn, "WIDE", 2)
    names = [name for name, _ in drawn.read_and_draw(tmp_path)]
    assert names == ["owed_64", "together_64", "owed_64_2", "together_64_2"]
