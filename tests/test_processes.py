"""Many processes and devices: who computes what, and that the rows are those of one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import jaxattn
import sweeps.__main__ as cli
from jaxattn.recipe import Recipe
from sweeps import calls, plan, processes, store
from sweeps import run as running
from sweeps.processes import Place, check
from sweeps.store import StoreError, writing

ROOT = Path(__file__).resolve().parent.parent
SORTED = ["recipe", "inputs", "seed", "block", "context", "batch", "head", "query"]


def job(label: str, length: int, parts: int) -> plan.Job:
    inputs = plan.Inputs(label, "regime", 0, length, {}, (None, None, None))
    recipes = [Recipe(name=f"r{i}") for i in range(parts)]
    made = tuple(plan.Part("s", r.name, r, inputs, "rule", (length,), "") for r in recipes)
    return plan.Job(inputs, (length,), made)


# who computes what


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("jobs", [[], [(64, 1)], [(64, 5)], [(64, 3), (256, 9)], [(64, 2)] * 8])
def test_every_part_is_computed_by_one_process(jobs, count):
    some = [job(f"i{n}", *size) for n, size in enumerate(jobs)]
    shares = [calls.share_of(some, index, count) for index in range(count)]
    dealt = [part for share in shares for job in share for part in job.parts]
    assert sorted(p.key for p in dealt) == sorted(p.key for job in some for p in job.parts)
    busy = sum(bool(share) for share in shares)
    assert busy == min(count, max(len(some), min(count, len(dealt))))


def test_shares_are_about_equal_and_keep_the_order_of_seeds():
    some = [job(f"i{n}", length, 4) for n, length in enumerate((64, 512, 128, 64, 512, 256))]
    shares = [calls.share_of(some, index, 3) for index in range(3)]
    costs = [sum(job.cost for job in share) for share in shares]
    assert max(costs) == 4 * 512 and sum(costs) == sum(job.cost for job in some)
    assert [job.inputs.label for job in shares[2]] == ["i0", "i2", "i3", "i5"]


def test_one_process_gets_all_jobs_as_they_are():
    some = [job("a", 64, 2), job("b", 512, 3)]
    assert calls.share_of(some, 0, 1) == some


def jobs_of_structures(count: int, *labels: str) -> list[plan.Job]:
    """Two recipes of each structure, apart from each other."""
    recipes = [Recipe(name=f"{n}{k}", kv_block=16 * (n + 1)) for k in "ab" for n in range(count)]
    made = []
    for label in labels:
        inputs = plan.Inputs(label, "regime", 0, 64, {}, (None, None, None))
        parts = tuple(plan.Part("s", r.name, r, inputs, "rule", (64,), "") for r in recipes)
        made.append(plan.Job(inputs, (64,), parts))
    return made


@pytest.mark.parametrize(
    ("structures", "count", "most"), [(15, 1, 15), (16, 1, 16), (17, 2, 9), (69, 5, 14)]
)
def test_a_call_is_of_few_structures_and_of_all_their_recipes(structures, count, most):
    cut = calls.calls_of(jobs_of_structures(structures, "x", "y"))
    assert [job.inputs.label for job in cut] == ["x", "y"] * count
    some = [list(calls.by_structure(job.recipes)) for job in cut]
    assert max(map(len, some)) == most <= calls.MOST_STRUCTURES
    assert some[::2] == some[1::2] and sum(map(len, some[::2])) == structures
    assert all(len(job.parts) == 2 * len(found) for job, found in zip(cut, some, strict=True))


def test_calls_are_of_what_is_missing():
    jobs = jobs_of_structures(17, "x", "y")
    done = {part.key for part in jobs[0].parts} | {jobs[1].parts[0].key}
    cut = calls.calls_of(jobs, done)
    assert [job.inputs.label for job in cut] == ["y", "y"]
    assert {p.key for job in cut for p in job.parts} == {p.key for p in jobs[1].parts} - done
    assert calls.calls_of(jobs, {part.key for job in jobs for part in job.parts}) == []


# what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("two", None, None), "--processes must be a number from 1 or 'auto', got 'two'"),
        (("0", 0, "here:1"), "--processes must be a number"),
        (("2", None, "here:1"), "needs --process I and --coordinator HOST:PORT as well"),
        (("2", 2, "here:1"), "--process must be from 0 to 1, got 2"),
        (("2", 0, "here"), "--coordinator must be HOST:PORT"),
        (("2", 0, "here:x"), "--coordinator must be HOST:PORT"),
        (("2", 0, "here:٣"), "--coordinator must be HOST:PORT"),
        (("auto", 0, None), "--process goes with --processes N"),
        ((None, None, "here:1"), "--coordinator goes with --processes N"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        check(*options)


def test_a_place_is_a_number_or_what_the_cluster_says():
    check(None, None, None)
    check("auto", None, None)
    check("2", 1, "[::1]:8476")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hexagon", "--devices", "0"], "--devices must be from 1"),
        (["hexagon", "--devices", "1024"], "--devices 1024: this process has"),
        (["claims", "--devices", "2"], "--devices has no meaning with the study 'claims'"),
    ],
)
def test_bad_places_are_one_line_and_exit_2(monkeypatch, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sweeps", "run", *arguments, "--out", str(out)])
    jaxattn.round_to(np.float32(1), "float16")  # jax's backend runs: it gets no more devices
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert said in capsys.readouterr().err and not out.exists()


def test_a_coordinator_that_jax_would_not_survive_is_one_line(monkeypatch):
    """A port that is taken, a host that is not there, a process 0 that never comes."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--coordinator localhost:{port}: .*in use"):
            processes._reach(f"localhost:{port}", first=True)
        processes._reach(f"localhost:{port}", first=False)
    processes._reach(f"localhost:{port}", first=True)
    for first in (False, True):
        with pytest.raises(ValueError, match="--coordinator nohost.invalid:1: "):
            processes._reach("nohost.invalid:1", first)
    monkeypatch.setattr(processes, "PATIENCE", 0)
    with pytest.raises(ConnectionError, match="process 0 did not come"):
        processes._reach(f"localhost:{port}", first=False)


def test_auto_without_a_cluster_is_one_line_and_exit_2(tmp_path):
    out = tmp_path / "out"
    process = start(out, environment(), "--processes", "auto", study=["hexagon", "--quick"])
    _, err = process.communicate()
    assert process.returncode == 2 and not out.exists()
    assert "jax finds no cluster here" in err.splitlines()[-1] and "Traceback" not in err


def test_a_process_that_does_not_see_the_run_says_so(tmp_path):
    with writing(tmp_path, "s", pytest.fail) as rows:
        manifest = {"study": "s", "parts": [{"key": "0"}, {"key": "1"}]}
        rows.begin(manifest, ["0", "1"])
        assert store.Store(tmp_path).join(["0", "1"]) == {}
        for root, keys in ((tmp_path, ["0"]), (tmp_path / "elsewhere", ["0", "1"])):
            with pytest.raises(StoreError, match="a file system that all of them see"):
                store.Store(root).join(keys, patience=0.0)


# devices


class Stopped(Exception):
    """In place of curves."""


@pytest.mark.parametrize(("heads", "shape"), [(1, (4, 1)), (2, (2, 2)), (3, (4, 1)), (8, (1, 4))])
def test_devices_arrive_as_a_mesh_of_recipes_and_heads(monkeypatch, heads, shape):
    seen = {}

    def error_curves(*arguments, **named):
        seen.update(named)
        raise Stopped

    monkeypatch.setattr(jaxattn, "error_curves", error_curves)
    devices = tuple(np.array([object() for _ in range(4)]))
    monkeypatch.setattr("jax.sharding.Mesh", lambda grid, axes: (grid, axes))
    some = job("gaussian", 64, 2)
    query = np.zeros((1, 1, heads, 8), np.float16)
    _, stream = jaxattn.inputs.regime("gaussian", length=64, seed=0, heads=heads, head_dim=8)
    inputs = plan.Inputs("gaussian", "regime", 0, 64, {}, (query, stream, None))
    jobs = [plan.Job(inputs, some.contexts, some.parts)]
    with pytest.raises(Stopped):
        running.run_jobs(jobs, None, [], {}, running.Progress(), Place(devices=devices))
    grid, axes = seen["mesh"]
    assert grid.shape == shape and axes == ("recipes", "heads")
    assert list(grid.ravel()) == list(devices)
    seen.clear()
    with pytest.raises(Stopped):
        running.run_jobs(jobs, None, [], {}, running.Progress(), Place())
    assert "mesh" not in seen


MADE = """
import sys
import jaxattn, sweeps.__main__ as cli
def error_curves(*arguments, **named):
    print(dict(named["mesh"].shape), [d.id for d in named["mesh"].devices.ravel()])
    sys.exit(0)
jaxattn.error_curves = error_curves
sys.argv = ["sweeps", "run", "atlas", "--quick", "--devices", "4", "--out", sys.argv[1]]
cli.main()
"""


def test_a_cpu_is_made_into_as_many_devices_as_asked(tmp_path):
    command = [sys.executable, "-c", MADE, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "{'recipes': 2, 'heads': 2} [0, 1, 2, 3]\n", done.stderr


# two real processes


STUDY = ["hexagon", "--recipes", "metal,float32,hexagon-hvx", "--max-context", "512"]
STUDY += ["--inputs", "gaussian,flat,sink", "--seeds", "2", "--no-figures"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | more


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes of this module."""
    return environment(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("cache")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
    )


def start(root: Path, env: dict[str, str], *more: object, study: list[str] = STUDY):
    command = [sys.executable, "-m", "sweeps", "run", *study, "--out", root, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [str(x) for x in command], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
    )


def start_two(root: Path, env: dict[str, str], study: list[str] = STUDY):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = ("--processes", 2, "--coordinator", f"localhost:{free.getsockname()[1]}")
    return [start(root, env, *place, "--process", i, study=study) for i in range(2)]


def rows_in(root: Path) -> pd.DataFrame:
    return pd.read_parquet(root).sort_values(SORTED, ignore_index=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The rows of one process, undisturbed."""
    root = tmp_path_factory.mktemp("alone") / "out"
    process = start(root, cache)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return rows_in(root)


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(tmp_path, cache, alone):
    both = start_two(tmp_path / "out", cache)
    (out, err), (silent, other) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], err + other
    assert "process 0: [3/3]" in err and "process 1: [3/3]" in other
    assert "hexagon-hvx" in out and not silent
    pd.testing.assert_frame_equal(rows_in(tmp_path / "out"), alone, check_exact=True)
    again = start_two(tmp_path / "out", cache)
    (out_again, err), (_, other) = (process.communicate() for process in again)
    assert out_again == out and "18 of 18 parts are finished already" in err and "[1/" not in other


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_loses_what_it_computed_and_no_more(
    tmp_path, cache, alone, victim
):
    root = tmp_path / "out"
    both = start_two(root, cache)
    lines = both[victim].stderr
    assert lines is not None and any(
        f"process {victim}: [1/3]" in line and " in " in line for line in lines
    )
    time.sleep(0.05)
    both[victim].kill()
    begun = time.monotonic()
    _, err = both[1 - victim].communicate()
    assert time.monotonic() - begun < 60
    both[victim].communicate()
    assert both[victim].returncode == -signal.SIGKILL
    if victim == 1:
        assert both[0].returncode == 1 and "process 0: [3/3]" in err
        last = err.splitlines()[-1]
        assert "sweeps: process 1 ended early" in last and "same command" in last
    else:  # jax ends a process that has lost the first
        assert both[1].returncode not in (0, None) and "distributed service" in err
    kept = {path.name for path in root.glob("*.parquet")}
    assert len(kept) >= 3 and all(store.read_provenance(root / name) for name in kept)
    last = start(root, cache)
    _, err = last.communicate()
    assert last.returncode == 0, err
    assert f"{len(kept)} of 18 parts are finished already" in err
    pd.testing.assert_frame_equal(rows_in(root), alone, check_exact=True)


@pytest.mark.slow
def test_ctrl_c_is_heard_while_a_process_waits_for_another(tmp_path, cache):
    study = ["hexagon", "--recipes", "metal", "--inputs", "gaussian,flat,sink"]
    study += ["--seeds", "1", "--max-context", "256", "--no-figures"]
    first, other = start_two(tmp_path / "out", cache, study)
    assert first.stderr is not None and other.stderr is not None
    assert any(line.startswith("process 0: [1/2]") and " in " in line for line in first.stderr)
    first.send_signal(signal.SIGSTOP)
    assert any(line.startswith("process 1: [1/1]") and " in " in line for line in other.stderr)
    time.sleep(1)
    other.send_signal(signal.SIGINT)
    time.sleep(0.2)
    first.send_signal(signal.SIGCONT)
    _, err = other.communicate(timeout=30)
    assert other.returncode == 130 and "interrupted" in err.splitlines()[-1]
    _, err = first.communicate(timeout=30)
    assert first.returncode == 1 and "process 1 ended early" in err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_share_a_list_of_claims(tmp_path, cache):
    few = ["claims", "--only", "higham-harmonic-float16,candle-2048"]
    both = start_two(tmp_path / "out", cache, few)
    (out, err), (_, other) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], err + other
    assert "process 0: [1/1]" in err and "process 1: [1/1]" in other and "2" in out
