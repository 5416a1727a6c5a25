"""Studies and their command line, against a stand-in for the numeric core that counts its calls."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sweeps.__main__ as cli
from jaxattn.block_rules import RULES
from jaxattn.recipe import Recipe
from sweeps import calls, hexagon, plan, table
from sweeps import run as running

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxattn"


def fake_recipe(name: str) -> Recipe:
    if name not in (*hexagon.FULL.recipes, "ideal"):
        raise ValueError(f"unknown recipe {name!r}; did you mean 'metal'?")
    kv_block = next(iter(RULES)) if name in hexagon.HMX else 64
    return Recipe(name=name, kv_block=kv_block, max_offset=sum(name.encode()))


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


class Ignores:
    """Meets an interrupt where Python ignores it, as in jax's garbage-collection callback."""

    def __del__(self) -> None:
        interrupt()


class FakeCore:
    """Stands for jaxattn: curves whose values say recipe, context and seed."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.interrupt_at: int | None = None
        self.swallows = False

    def regime(self, name: str, *, length: int, seed: int, **sizes: Any) -> tuple[Any, Any]:
        identity = {"regime": name, "seed": seed, **sizes}
        stream = types.SimpleNamespace(
            length=length, label=name, identity=identity, heads=3, value_dim=4
        )
        return np.full((1, 2, 3, 4), seed), stream

    def error_curves(
        self, query: Any, key: Any, value: Any, recipes: Any, **named: Any
    ) -> types.SimpleNamespace:
        if self.interrupt_at == len(self.calls):
            if not self.swallows:
                interrupt()
            Ignores()
            for _ in range(100):
                time.sleep(0.01)
        self.calls.append([f"{recipe.name}@{recipe.kv_block}" for recipe in recipes])
        named["progress"](1, 2)
        named["progress"](2, 2)
        contexts = np.asarray(named["contexts"])
        shape = (len(recipes), len(contexts), 1, 2, 3)
        place = np.arange(np.prod(shape[1:]), dtype=np.float32).reshape(shape[1:])
        metrics = {
            name: np.stack([place + recipe.max_offset for recipe in recipes])
            for name in named["metrics"]
        }
        return types.SimpleNamespace(
            contexts=contexts,
            recipes=tuple(recipe.name for recipe in recipes),
            metrics=metrics,
            overflow=np.zeros(shape, bool),
            stagnated=np.broadcast_to(contexts[:, None, None, None] > 300, shape),
            kv_block=np.stack([np.minimum(contexts, 64) for _ in recipes]),
        )


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()
    package: Any = types.ModuleType("jaxattn")
    package.__path__, package.__file__ = [str(PACKAGE)], str(PACKAGE / "__init__.py")
    package.error_curves = fake.error_curves
    for name, attributes in {
        "kernels": {"get": fake_recipe, "names": lambda: hexagon.FULL.recipes},
        "inputs": {"regime": fake.regime, "REGIMES": dict.fromkeys(hexagon.REGIMES)},
        "captures": {"load": fake_capture},
        "walk": {"default_contexts": lambda longest: [*range(256, longest, 48), longest]},
    }.items():
        module = types.ModuleType(f"jaxattn.{name}")
        vars(module).update(attributes)
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"jaxattn.{name}", module)
    monkeypatch.setitem(sys.modules, "jaxattn", package)
    return fake


def fake_capture(path: Path) -> Any:
    if path.suffix != ".npz":
        raise ValueError(f"{path}: neither .npz nor .safetensors")
    return types.SimpleNamespace(
        query=np.zeros((1, 2, 3, 4)),
        key=np.zeros((1, 300, 3, 4)),
        value=np.zeros((1, 300, 3, 4)),
        output=None,
        length=300,
        label=path.stem,
        identity={"sha256": "0f"},
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sweeps", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def sweep(core, monkeypatch, tmp_path):
    """A run of a small grid into one directory; further arguments as on the command line."""

    def run(*arguments: object, out: Path = tmp_path / "out") -> int:
        small = ["--recipes", "hexagon-hmx-fp16,metal", "--max-context", "400", "--seeds", "2"]
        start = ["run", "hexagon", "--out", out, "--inputs", "gaussian", "--no-figures"]
        return call(monkeypatch, *start, *small, *arguments)

    return run


# plan


def test_the_study_runs_every_hmx_recipe_at_its_rule_and_at_three_blocks(core):
    recipes = plan.recipes_of(hexagon.FULL.recipes)
    jobs = plan.jobs_of(hexagon.FULL, recipes, plan.inputs_of(hexagon.FULL), "")
    order = [(job.inputs.seed, job.inputs.label) for job in jobs]
    assert order == [(seed, name) for seed in range(3) for name in hexagon.REGIMES]
    assert {job.contexts[-1] for job in jobs} == {2**17}
    blocks = {(part.name, part.block) for part in jobs[0].parts}
    assert blocks == {(n, b) for n in hexagon.HMX for b in ("rule", "64", "128", "512")} | {
        (name, "rule") for name in hexagon.BESIDE
    }
    keys = [part.key for job in jobs for part in job.parts]
    assert len(set(keys)) == len(keys) == 28 * 24


def drawn(label: str = "gaussian", seed: int = 0, **identity: Any) -> plan.Inputs:
    return plan.Inputs(label, "regime", seed, 304, identity, (None, None, None))


def part(**changes: Any) -> plan.Part:
    fields: dict[str, Any] = {
        "study": "s",
        "name": "a",
        "recipe": Recipe(name="a", citation="here"),
        "inputs": drawn(sd=1.0),
        "block": "rule",
        "contexts": (256, 512),
        "sources": "0",
    }
    return plan.Part(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": Recipe(name="a", running_sum="float16")},
        {"recipe": Recipe(name="a", kv_block=128)},
        {"recipe": Recipe(name="a", storage="float64")},
        {"inputs": drawn(sd=2.0)},
        {"inputs": drawn(sd=1.0, seed=1)},
        {"inputs": drawn("flat", sd=1.0)},
        {"contexts": (256,)},
        {"sources": "1"},
        {"name": "b"},
    ],
)
def test_key_changes_with_all_that_the_numbers_or_labels_depend_on(changes):
    assert part().key != part(**changes).key


def test_key_does_not_change_with_a_citation():
    assert part().key == part(recipe=Recipe(name="a", citation="there")).key


def test_set_puts_a_changed_recipe_beside_each(core):
    recipes = plan.recipes_of(["metal", "ideal"], ["running_sum=fp22", "kv_block=32"])
    assert list(recipes) == [
        "metal",
        "metal+running_sum=fp22+kv_block=32",
        "ideal",
        "ideal+running_sum=fp22+kv_block=32",
    ]
    changed = recipes["metal+running_sum=fp22+kv_block=32"]
    assert changed.running_sum.precision == 14 and changed.kv_block == 32
    assert recipes["metal"].running_sum.precision == 24


def test_set_that_changes_nothing_is_an_error(core):
    with pytest.raises(ValueError, match="changes none of the recipes"):
        plan.recipes_of(["metal"], ["running_sum=float32"])


def test_a_changed_hmx_recipe_keeps_the_block_axis(core):
    recipes = plan.recipes_of(["hexagon-hmx-fp16"], ["running_sum=fp22"])
    (job,) = plan.jobs_of(hexagon.FULL, recipes, [drawn()], "")
    assert len(job.parts) == 8


# run


def test_rows_hold_each_value_at_its_place(core):
    recipes = {name: fake_recipe(name) for name in ("metal", "float32")}
    (job,) = plan.jobs_of(hexagon.FULL, recipes, [drawn()], "")
    curves = core.error_curves(
        *job.inputs.arrays,
        [part.recipe for part in job.parts],
        contexts=job.contexts,
        metrics=running.METRICS,
        progress=lambda done, total: None,
    )
    rows = running.rows_of(job.parts[1], curves, 1)
    frame = rows.to_pandas()
    assert list(frame.columns) == [
        *("study", "recipe", "inputs", "seed", "block", "kv_block", "context", "batch", "head"),
        *("query", *running.METRICS, *running.FLAGS),
    ]
    assert {str(rows.schema.field(name).type) for name in running.METRICS} == {"float"}
    assert {str(rows.schema.field(name).type) for name in running.FLAGS} == {"bool"}
    one = frame.query("context == 304 and query == 1 and head == 2")
    assert len(frame) == 12 and len(one) == 1
    assert one["nmse"].item() == curves.metrics["nmse"][1, 1, 0, 1, 2]
    assert one["stagnated"].item() and one["kv_block"].item() == 64
    assert set(frame["recipe"]) == {"float32"}


def test_a_run_stores_every_part_and_shares_calls(core, sweep, tmp_path, capsys):
    assert sweep() == 0
    curves = [f"hexagon-hmx-fp16@{block}" for block in (next(iter(RULES)), 64, 128, 512)] + [
        "metal@64"
    ]
    assert core.calls == [curves, curves]
    rows = pd.read_parquet(tmp_path / "out")
    assert len(rows) == 2 * 5 * 4 * 6
    output = capsys.readouterr()
    assert "[2/2] gaussian, seed 1: 5 curves in" in output.err
    assert "hexagon-hmx-fp16" in output.out and "own 64" in output.out
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["recipes"]["metal"]["citation"] == ""
    assert manifest["inputs"]["gaussian"]["head_dim"] == hexagon.HEAD_DIM
    assert manifest["block_rules"][next(iter(RULES))]["vtcm_bytes"] == 8 * 2**20
    assert manifest["seeds"] == [0, 1] and len(manifest["parts"]) == 10
    assert manifest["command"].startswith("python -m sweeps run hexagon --out")
    assert {"jax", "python", "numpy"} <= manifest["versions"].keys()
    assert manifest["device"].startswith("cpu")


def test_the_same_run_again_computes_nothing(core, sweep, capsys):
    sweep()
    before = capsys.readouterr().out
    assert sweep() == 0
    after = capsys.readouterr()
    assert len(core.calls) == 2
    assert after.out == before and "10 of 10 parts are finished already" in after.err


def test_more_seeds_or_recipes_compute_only_what_is_missing(core, sweep):
    sweep()
    assert sweep("--seeds", "3") == 0
    assert len(core.calls) == 3
    assert sweep("--recipes", "metal,float32") == 0
    assert core.calls[3:] == [["float32@64"], ["float32@64"]]


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_keeps_finished_parts_and_resumes(core, sweep, tmp_path, capsys, swallows):
    core.interrupt_at, core.swallows = 1, swallows
    assert sweep() == 130
    lines = capsys.readouterr().err.splitlines()
    assert "5 of 10 parts are kept" in lines[-1] and "same command" in lines[-1]
    assert len(pd.read_parquet(tmp_path / "out")) == 5 * 4 * 6
    core.interrupt_at = None
    before = len(core.calls)
    assert sweep() == 0
    assert len(core.calls) == before + 1


def test_a_job_of_many_structures_is_stored_call_by_call(
    core, sweep, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(calls, "MOST_STRUCTURES", 2)
    core.interrupt_at = 2
    assert sweep() == 130
    rule = next(iter(RULES))
    first = [f"hexagon-hmx-fp16@{rule}", "hexagon-hmx-fp16@64", "metal@64"]
    assert core.calls == [first, first]  # seed after seed, so that each is compiled once
    said = capsys.readouterr().err
    assert "[1/4] gaussian, seed 0: 3 curves ...\n" in said and "6 of 10 parts are kept" in said
    core.interrupt_at = None
    assert sweep() == 0
    assert core.calls[2:] == [["hexagon-hmx-fp16@128", "hexagon-hmx-fp16@512"]] * 2
    assert len(pd.read_parquet(tmp_path / "out")) == 2 * 5 * 4 * 6


def test_programs_of_calls_that_are_over_are_let_go(core, sweep, monkeypatch):
    let_go: list[int] = []
    monkeypatch.setattr("jax.clear_caches", lambda: let_go.append(len(core.calls)))
    assert sweep() == 0 and let_go == []
    monkeypatch.setattr(calls, "MOST_STRUCTURES", 2)
    assert sweep("--max-context", "350") == 0 and let_go == [2 + 2]


def test_a_run_that_goes_on_says_what_is_left(core, sweep, monkeypatch, capsys):
    def announced(*arguments: str) -> tuple[str, float]:
        assert sweep(*arguments) == 0
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if "to the order of magnitude" in line]
        what, seconds = line.split(" about ")
        return what, float(seconds.split()[0])

    monkeypatch.setattr(running, "LONG", 0.0)
    assert announced() == ("this takes", 4 * 5)
    assert announced("--seeds", "3") == ("what is left takes", 4 * 1)  # compiled before
    assert announced("--seeds", "4", "--recipes", "metal") == ("what is left takes", 1)


def test_parts_of_other_settings_are_moved_in_one_line(core, sweep, tmp_path, capsys):
    sweep("--seeds", "1")
    capsys.readouterr()
    assert sweep("--seeds", "1", "--recipes", "metal") == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "_aside" in x]
    where = tmp_path / "out" / "_aside"
    assert line.startswith(f"parts of other settings, moved to {where}: 4; `python -m sweeps run")
    assert "--seeds 1` brings them back" in line
    assert sweep("--seeds", "1") == 0
    assert "_aside" not in capsys.readouterr().err and len(core.calls) == 1


def test_figures_of_other_rows_go(core, sweep, tmp_path):
    folder = tmp_path / "out" / "_figures"
    names = ("error_by_block.svg", "error_by_recipe_64.png", "mine.svg", "passing.txt")

    def kept_by(*arguments: str) -> set[str]:
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("")
        assert sweep(*arguments) == 0
        return {path.name for path in folder.iterdir()}

    sweep("--seeds", "1")
    assert kept_by("--seeds", "1") == set(names)
    for arguments in (["--seeds", "2"], ["--recipes", "metal"], []):
        assert kept_by(*arguments) == {"mine.svg", "passing.txt"}, arguments


def test_other_jax_versions_are_warned_about(sweep, monkeypatch, capsys):
    sweep()
    origin = {"jax": "9.9", "device": "tpu: x", "xla_flags": ""}
    monkeypatch.setattr(running, "provenance", lambda environment: origin)
    assert sweep() == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert "10 finished parts were computed with jax" in line and "device 'cpu" in line


def test_show_prints_the_same_table(sweep, monkeypatch, tmp_path, capsys):
    sweep()
    before = capsys.readouterr().out
    assert call(monkeypatch, "show", tmp_path / "out") == 0
    assert capsys.readouterr().out == before


def test_a_capture_has_no_seeds_and_ends_where_it_ends(core, monkeypatch, tmp_path):
    capture = tmp_path / "mine.npz"
    capture.write_bytes(b"")
    arguments = ["run", "hexagon", "--inputs", capture, "--no-figures", "--recipes", "metal"]
    assert call(monkeypatch, *arguments, "--out", tmp_path / "out") == 0
    rows = pd.read_parquet(tmp_path / "out")
    assert set(rows["context"]) == {256, 300} and set(rows["inputs"]) == {"mine"}
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["inputs"] == {"mine": {"kind": "capture", "sha256": "0f"}}


def test_progress_bar_reaches_its_end(monkeypatch):
    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None: ...

    monkeypatch.setenv("TERM", "xterm")
    with running.Progress(Terminal()) as progress:
        progress.plan([30, 10])
        progress.start("one")
        progress.keys(1, 2)
        assert progress.bar.tasks[0].completed == 15
        progress.finish()
        progress.start("two")
        progress.finish()
        assert progress.bar.tasks[0].finished


# table


def frame(nmse: list[float], contexts: tuple[int, ...] = (4096, 32768, 131072)) -> pd.DataFrame:
    rows = [
        {"recipe": "a", "inputs": "i", "block": "64", "kv_block": 64, "context": n, "seed": s}
        | {"nmse": value * factor, "bias_l": 0.25, "bias_o": -0.5, "overflow": False}
        for n, value in zip(contexts, nmse, strict=True)
        for s, factor in enumerate((0.5, 1.0, 3.0))
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "nmse, text",
    [
        ([1e-6, 1e-5, 4e-4], "-"),
        ([1e-6, 6e-4, 1e-3], "32,768"),
        ([1e-6, 6e-4, 1e-4], "32,768~"),
        ([1e-3, 1e-3, np.nan], "4,096"),
        ([1e-6, 1e-6, np.nan], "131,072"),
        ([1e-6, 1e-6, np.inf], "131,072"),
        ([5e-4, 5e-4, 5e-4], "-"),
    ],
)
def test_crossing_is_the_first_context_above_the_tolerance(nmse, text):
    curve = table.medians(frame(nmse), ["inputs", "recipe", "block"]).loc[("i", "a", "64")]
    assert table.crossing(curve.index.to_numpy(), curve["nmse"].to_numpy()) == text


def test_table_prints_medians_at_the_reported_contexts():
    lines = table.table(frame([1e-6, 6e-4, np.nan]), ["a"], ["i"]).splitlines()
    assert lines[1].split() == ["recipe", "KV", "block", *["4,096", "32,768", "131,072"] * 3] + [
        "exceeds"
    ]
    assert lines[2].split() == ["a", "64", "1.0e-06", "6.0e-04", "inf"] + ["+2.5e-01"] * 3 + [
        "-5.0e-01"
    ] * 3 + ["32,768"]


def test_an_overflow_that_the_median_hides_is_marked():
    rows = frame([1e-6] * 3).assign(overflow=8 * [False] + [True])
    median, worst = table.crossings(rows, ["a"], ["i"]).split("\n\n")
    assert median.splitlines()[-1].split() == ["a", "64", "-!"]
    assert worst.splitlines()[-1].split() == ["a", "64", "-"]
    assert table.table(rows, ["a"], ["i"]).splitlines()[2].split()[-1] == "-!"


def test_the_worst_row_has_a_table_of_its_own_where_there_are_several():
    rows = frame([1e-6, 4e-4, 1e-4])  # three seeds: half, all and three times of it
    median, worst = table.crossings(rows, ["a"], ["i"]).split("\n\n")
    assert median.splitlines()[-1].split() == ["a", "64", "-"]
    assert "any of 3 rows exceeds 5e-4" in worst
    assert worst.splitlines()[-1].split() == ["a", "64", "32,768~"]
    lost = rows.assign(nmse=rows["nmse"].where(rows["context"] < 131072, np.nan))
    assert table.crossings(lost, ["a"], ["i"]).splitlines()[-1].split()[-1] == "32,768"
    one = rows[rows["seed"] == 2]
    assert len(table.crossings(one, ["a"], ["i"]).splitlines()) == 4


def test_headings_stay_apart_over_a_single_context():
    heading = table.table(frame([1e-6], (4096,)), ["a"], ["i"]).splitlines()[0]
    assert heading.split("  ")[-1].strip() == "error of o at" and "aterror" not in heading


def test_table_of_a_short_run_reports_its_longest_context():
    assert table.reported([256, 4096, 8192]) == [4096, 8192]
    assert table.reported([100]) == [100]
    assert table.reported([4096, 32768, 131072, 2**20]) == [4096, 32768, 131072, 2**20]


def test_recipes_keep_their_order_and_blocks_are_sorted():
    rows = frame([1e-6] * 3)
    rows = pd.concat([rows.assign(block=b, recipe=r) for r in "ba" for b in ("rule", "512", "64")])
    rows = table.own_blocks(rows, {"a": {"kv_block": "hexagon-hmx-2026-06"}, "b": {"kv_block": 64}})
    median, worst = table.crossings(rows, ["b", "a"], ["i"]).split("\n\n")
    for lines in (median.splitlines()[3:], worst.splitlines()[2:]):
        assert [line.split()[:2] for line in lines] == [
            [r, b] for r, last in (("b", "own"), ("a", "rule")) for b in ("64", "512", last)
        ]


# the command line


def test_help_imports_no_numerics():
    code = (
        "import sys; sys.argv = ['sweeps', '--help']; import runpy\n"
        "try: runpy.run_module('sweeps', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "show" in result.stdout


def test_list_names_studies_recipes_and_regimes(monkeypatch, capsys):
    assert call(monkeypatch, "list") == 0
    output = capsys.readouterr().out
    assert "672 curves" in output and "ggml-cpu-decode" in output and "rising_max" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "hexagone"], "did you mean 'hexagon'"),
        (["run", "hexagon", "--recipes", "metall"], "did you mean 'metal'"),
        (["run", "hexagon", "--recipes", ""], "unknown recipe"),
        (["run", "hexagon", "--inputs", "gausian"], "did you mean 'gaussian'"),
        (["run", "hexagon", "--inputs", "missing.npz"], "neither a file nor a regime"),
        (["run", "hexagon", "--inputs", ""], "neither .npz"),
        (["run", "hexagon", "--set", "runing_sum=fp22"], "did you mean 'running_sum'"),
        (["run", "hexagon", "--set", "running_sum=fp23"], "unknown format 'fp23'"),
        (["run", "hexagon", "--set", "running_sum"], "field=value"),
        (["run", "hexagon", "--max-context", "0"], "--max-context must be at least 1"),
        (["run", "hexagon", "--seeds", "-1"], "--seeds must be at least 1"),
        (["run", "hexagon", "--seeds", "few"], "--seeds"),
        (["run", "hexagon", "--sedes", "1"], "--sedes"),
        (["run"], "STUDY"),
        (["runn"], "runn"),
        (["show", "absent"], "no such directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_before_any_work(
    core, monkeypatch, tmp_path, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert words in output.err and len(output.err.splitlines()) == 1
    assert not core.calls and not list(tmp_path.iterdir())


def test_bad_captures_are_exit_2(core, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(b"")
    (tmp_path / "mine.txt").write_bytes(b"")
    for arguments, words in [
        (["mine.txt"], "neither .npz"),
        (["mine.npz", "--max-context", "301"], "has 300 keys"),
        (["mine.npz", "--seeds", "2"], "--seeds has no meaning"),
        ([str(tmp_path)], "neither .npz"),
    ]:
        monkeypatch.chdir(tmp_path)
        assert call(monkeypatch, "run", "hexagon", "--inputs", *arguments) == 2
        assert words in capsys.readouterr().err
    assert not core.calls and len(list(tmp_path.iterdir())) == 2


def test_foreign_directories_are_exit_2_before_any_work(core, sweep, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert sweep() == 2
    assert "thesis.tex" in capsys.readouterr().err and not core.calls
    assert sweep(out=tmp_path / "out" / "thesis.tex") == 2
    assert "not a directory" in capsys.readouterr().err and not core.calls


def test_compilation_cache_is_under_the_users_cache_directory(tmp_path):
    code = (
        "import jax; from jaxattn.command import use_compilation_cache as use; use();"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith(str(tmp_path / "jaxattn" / "xla-")), result.stderr
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "mine")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path / "mine")


def test_a_real_run_from_command_to_figures(tmp_path):
    """The same through a shell, with the real core: rows, table, figures, and nothing twice."""

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sweeps", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    out = tmp_path / "out"
    arguments = ["run", "hexagon", "--out", str(out), "--recipes", "hexagon-pr24389,metal"]
    arguments += ["--inputs", "flat", "--max-context", "256", "--seeds", "1"]
    first = shell(*arguments)
    assert first.returncode == 0, first.stderr
    rows = pd.read_parquet(out)
    assert set(rows["block"]) == {"rule", "64", "128", "512"}
    assert set(rows["context"]) == {256} and set(rows["kv_block"]) >= {64, 128, 512}
    assert np.isfinite(rows["nmse"]).all() and rows.query("recipe == 'metal'")["nmse"].max() < 1e-9
    figures = {path.name for path in (out / "_figures").iterdir()}
    assert {"error_by_block.png", "error_by_block.svg"} <= figures
    assert len(pd.read_parquet(out)) == len(rows)
    second = shell(*arguments, "--no-figures")
    assert (second.returncode, second.stdout) == (0, first.stdout.split(str(out))[0])
    assert "5 of 5 parts are finished already" in second.stderr and "[1/" not in second.stderr
