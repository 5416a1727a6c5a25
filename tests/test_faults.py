"""What a machine does to a sweep: a full disk, no memory, death at any moment. Rows stay whole."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxattn
import sweeps.__main__ as cli
from sweeps import estimate, faults, store

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["run", "hexagon", "--recipes", "metal,float32", "--seeds", "1", "--max-context", "300"]


@pytest.fixture
def sweep(monkeypatch, tmp_path, capsys):
    """Runs a small study into tmp_path/out, and gives exit code, output and errors."""

    def sweep(*arguments):
        more = ["--inputs", "gaussian,flat", "--out", str(tmp_path / "out"), "--no-figures"]
        return call(monkeypatch, capsys, *SMALL, *more, *arguments)

    return sweep


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sweeps", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def rows_in(root: Path) -> pd.DataFrame:
    """Every row, in an order that does not depend on the files' names."""
    return pd.read_parquet(root).sort_values(
        ["recipe", "inputs", "seed", "block", "context", "batch", "head", "query"],
        ignore_index=True,
    )


def whole(root: Path) -> bool:
    """Whether nothing lies in `root` but parts that can be read, and the manifest."""
    names = {path.name for path in root.iterdir()} - {store.MANIFEST}
    return all(store.read_provenance(root / name) for name in names)


def exhausted():
    """The error that XLA itself raises where memory does not suffice."""
    jnp.zeros(2**50, jnp.int8).block_until_ready()


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


# while it computes


def test_memory_that_xla_lacks_is_one_line_and_exit_1(sweep, monkeypatch, tmp_path):
    undisturbed, calls = jaxattn.error_curves, []

    def second_fails(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            exhausted()
        return undisturbed(*arguments, **named)

    monkeypatch.setattr(jaxattn, "error_curves", second_fails)
    code, out, err = sweep()
    last = err.splitlines()[-1]
    assert code == 1 and not out and "Traceback" not in err
    assert last.startswith("sweeps: out of memory (RESOURCE_EXHAUSTED") and "--recipes" in last
    assert "2 of 4 parts are kept" in last and "same command" in last and whole(tmp_path / "out")
    code, _, err = sweep()
    assert code == 0 and "2 of 4 parts are finished already" in err and len(calls) == 3


def test_a_disk_that_fills_up_is_one_line_and_exit_1(sweep, monkeypatch, tmp_path):
    for failing in ("write", "flush"):
        with monkeypatch.context() as patch:
            if failing == "write":
                patch.setattr(store.pa.parquet, "write_table", full)
            else:
                patch.setattr(store.os, "fsync", full)
            code, out, err = sweep()
        assert code == 1 and not out and "Traceback" not in err
        assert "No space left on device" in err.splitlines()[-1] and "are kept" in err
        assert not (tmp_path / "out").exists() or whole(tmp_path / "out")
    assert sweep()[0] == 0 and len(rows_in(tmp_path / "out")) == 4 * 2 * 16


def test_what_is_finished_needs_no_memory(sweep, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "free_memory", lambda: 10**6)
        code, _, err = sweep()
        assert code == 2 and "of memory, and" in err and not (tmp_path / "out").exists()
    assert sweep()[0] == 0
    monkeypatch.setattr(estimate, "free_memory", lambda: 10**6)
    code, out, _ = sweep()
    assert code == 0 and "metal" in out


def test_a_directory_that_goes_away_is_one_line_and_exit_1(sweep, monkeypatch, tmp_path):
    replace = store.Store.write

    def write(self, *arguments):
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        replace(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", write)
        code, _, err = sweep()
    assert code == 1 and "No such file or directory" in err and "Traceback" not in err
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    assert sweep()[0] == 0


def test_a_bug_keeps_its_traceback(sweep, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(jaxattn, "error_curves", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        sweep()
    assert faults.reason(RuntimeError("INTERNAL: a bug")) is None


LIMITED = """
import resource, runpy, sys
limit, *sys.argv = int(sys.argv[1]), "sweeps", *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("sweeps", run_name="__main__")
"""


def test_files_that_may_not_grow_are_one_line_and_whole(tmp_path):
    """RLIMIT_FSIZE, as a quota would have it: the manifest fits, a part does not."""
    arguments = [*SMALL, "--max-context", "2048", "--inputs", "gaussian", "--no-figures"]

    def start(*command):
        command = [sys.executable, *command, *arguments, "--out", str(tmp_path / "out")]
        # jax never mends a program of its cache that was cut off: it must not be the user's.
        own = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own)

    small = start("-c", LIMITED, "7000")
    assert small.returncode == 1 and "Traceback" not in small.stderr
    last = small.stderr.splitlines()[-1]
    assert "File too large" in last and "0 of 2 parts are kept" in last
    assert {path.name for path in (tmp_path / "out").iterdir()} == {store.MANIFEST}
    again = start("-m", "sweeps")
    assert again.returncode == 0, again.stderr
    assert whole(tmp_path / "out") and np.isfinite(rows_in(tmp_path / "out")["nmse"]).all()


# what was edited by hand


@pytest.mark.parametrize("field", ["format", "study", "title", "recipes", "inputs", "parts"])
@pytest.mark.parametrize("value", ["absent", None, [], {}, 5, "x", [None], {"a": None}, [{}]])
def test_a_manifest_that_was_edited_is_a_clear_line(
    finished, monkeypatch, tmp_path, capsys, field, value
):
    manifest = json.loads((finished / store.MANIFEST).read_text())
    if value == "absent":
        del manifest[field]
    else:
        manifest[field] = value
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in finished.glob("*.parquet"):
        (copy / path.name).hardlink_to(path)
    (copy / store.MANIFEST).write_text(json.dumps(manifest))
    code, _, err = call(monkeypatch, capsys, "show", copy)
    assert code == (0 if field == "title" else 2)
    assert field == "title" or (str(copy) in err or "study" in err) and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "out"
    command = [sys.executable, "-m", "sweeps", *SMALL, "--inputs", "flat", "--no-figures"]
    subprocess.run([*command, "--out", str(root)], cwd=ROOT, check=True, capture_output=True)
    return root


# death at any moment


TINY = ["hexagon", "--recipes", "metal,float32,hexagon-hvx", "--max-context", "512", "--seeds", "8"]
TINY += ["--inputs", "gaussian,flat,sink", "--no-figures"]
PARTS = 3 * 8 * 3


def begun(process: subprocess.Popen[str], root: Path, before: float) -> float:
    """Seconds until the process has written its manifest, newer than one of time `before`."""
    start = time.monotonic()
    while process.poll() is None and written(root) <= before:
        time.sleep(0.005)
    return time.monotonic() - start


def written(root: Path) -> float:
    manifest = root / store.MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0


@pytest.mark.slow
def test_rows_survive_death_at_twenty_moments(tmp_path):
    """SIGKILL while a run starts (5) and computes (15): what was finished stays, nothing doubles.

    Every third run goes on in a directory where others were killed before it.
    """
    cache = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def start(root: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sweeps", "run", *TINY, "--out", str(root)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | cache, stdout=pipe, stderr=pipe, text=True
        )

    def finish(process: subprocess.Popen[str]) -> str:
        _, err = process.communicate()
        assert process.returncode == 0, err
        return err

    finish(start(tmp_path / "cold"))
    process, clock = start(tmp_path / "undisturbed"), time.monotonic()
    starting = begun(process, tmp_path / "undisturbed", 0.0)
    finish(process)
    computing = time.monotonic() - clock - starting
    undisturbed = rows_in(tmp_path / "undisturbed")
    rng, kept = np.random.default_rng(0), []
    for i in range(20):
        root = tmp_path / (f"fresh{i}" if i % 3 else "again")
        before, process = written(root), start(root)
        if i < 5:
            time.sleep((i + rng.random()) / 5 * starting)
        else:
            begun(process, root, before)
            time.sleep((i - 5 + rng.random()) / 15 * computing)
        process.kill()
        process.communicate()
        parts = list(root.glob("*.parquet"))
        assert all(store.read_provenance(path) for path in parts)
        kept.append(len(parts))
        if i % 3 or i == 18:
            err = finish(start(root))
            assert not parts or f"{len(parts)} of {PARTS} parts are finished already" in err
            pd.testing.assert_frame_equal(rows_in(root), undisturbed, check_exact=True)
            assert whole(root) and len(list(root.glob("*.parquet"))) == PARTS
    print(f"{starting:.1f} s to start, {computing:.1f} s to compute; kept of {PARTS}: {kept}")
    assert len({count for count in kept if 0 < count < PARTS}) > 3
