"""What a run takes, said before it starts: near the truth, and refused where it is not there."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import jaxattn
from sweeps import atlas, hexagon, plan
from sweeps import estimate as estimates
from sweeps import run as running
from sweeps.calls import by_structure, calls_of
from sweeps.estimate import Estimate, duration, estimate, refuse, size

ROOT = Path(__file__).resolve().parent.parent


def job(names: str, length: int = 1024, **sizes: int) -> plan.Job:
    sizes = {"heads": 1, "group": 4, "queries": 4, "head_dim": 64} | sizes
    query, stream = jaxattn.inputs.regime("gaussian", length=length, seed=0, **sizes)
    inputs = plan.Inputs("gaussian", "regime", 0, length, {}, (query, stream, None))
    recipes = {name: jaxattn.kernels.get(name) for name in names.split(",")}
    study = dataclasses.replace(hexagon.FULL, block_axis=())
    return plan.jobs_of(study, recipes, [inputs], "")[0]


@pytest.mark.parametrize(
    "larger",
    [
        job("metal", queries=64),
        job("metal", heads=64),
        job("metal", length=2**17),
        job("metal", head_dim=1024),
        job("metal,hexagon-hvx"),
    ],
    ids=["queries", "heads", "length", "head_dim", "recipes"],
)
def test_more_of_anything_takes_more(larger):
    small, large = estimate([job("metal")]), estimate([larger])
    assert large.memory > small.memory and large.seconds > small.seconds


def test_jobs_take_the_memory_of_the_largest_and_the_time_of_all():
    one, two = job("metal"), job("metal", length=2**17)
    both = estimate([one, two])
    assert both.memory == estimate([two]).memory
    assert estimate([two]).seconds < both.seconds < sum(estimate([j]).seconds for j in (one, two))
    assert estimate([]) == (0, 0.0)


def test_what_was_compiled_before_takes_less_time_but_not_in_other_company():
    one, two = job("hexagon-pr24389").recipes, job("hexagon-hmx-fp16").recipes
    both = [job("hexagon-pr24389,hexagon-hmx-fp16")]
    assert estimate(both, (*one, *two)).seconds < estimate(both).seconds
    assert estimate(both, one) == estimate(both)
    assert estimate(both, (*one, *two)).memory == estimate(both).memory


def study_jobs(study: plan.Study) -> list[plan.Job]:
    return plan.jobs_of(study, plan.recipes_of(study.names()), plan.inputs_of(study), "")


def test_the_atlas_is_cut_and_takes_a_third_of_the_memory():
    whole = study_jobs(atlas.FULL)
    cut = calls_of(whole)
    assert estimate(cut).memory < estimate(whole).memory / 3
    assert len(cut) == 10 and max(len(by_structure(job.recipes)) for job in cut) <= 16


def test_each_input_of_the_hexagon_study_stays_one_call():
    whole = study_jobs(hexagon.FULL)
    assert [job.parts for job in calls_of(whole)] == [job.parts for job in whole]


def test_a_capture_is_measured_by_its_arrays():
    key = np.zeros((2, 1024, 1, 64), np.float16)
    arrays = (np.zeros((2, 4, 4, 64), np.float16), key, key)
    (part,) = (drawn := job("metal", heads=2)).parts
    captured = plan.Inputs("mine", "capture", 0, 1024, {}, arrays)
    again = plan.Job(captured, drawn.contexts, (part,))
    assert estimate([again]) == estimate([drawn])


def test_what_does_not_fit_is_refused_in_one_line():
    refuse(Estimate(10**9, 1.0), 10**9)
    with pytest.raises(ValueError) as refusal:
        refuse(Estimate(31_000_000_000, 7300.0), 2**30)
    line = str(refusal.value)
    assert "needs about 2 hours and 31 GB of memory" in line and "1.1 GB are free" in line
    assert "fewer --recipes" in line and "\n" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes")]
    + [(7200, "2 hours"), (2 * 86400, "2 days"), (1e12, "31,688 years")],
)
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text


def test_sizes_are_two_digits():
    assert [size(x) for x in (2**20, 2**30, 123e9)] == ["0.001 GB", "1.1 GB", "120 GB"]


def test_free_memory_is_the_least_of_all_limits(monkeypatch, tmp_path):
    everything = estimates.free_memory()
    assert 0 < everything <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(estimates, "CONTAINER", tmp_path)
    assert estimates.free_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert estimates.free_memory() > 2000


LIMITED = """
import resource, runpy, sys
gigabytes, *sys.argv = int(sys.argv[1]), "sweeps", *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 10**9,) * 2)
runpy.run_module("sweeps", run_name="__main__")
"""


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path):
    """A capture of many rows, under a limit on the process as `ulimit -v` sets it."""
    key = np.zeros((1, 256, 32, 64), np.float16)
    np.savez(
        tmp_path / "big.npz", query=np.zeros((1, 2048, 32, 64), np.float16), key=key, value=key
    )
    arguments = ["run", "hexagon", "--inputs", tmp_path / "big.npz", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", LIMITED, "5", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "of memory, and" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_says_what_it_does_before_and_how_long_after_each_job():
    lines: list[str] = []

    class Stream:
        def isatty(self):
            return False

        def write(self, text):
            lines.append(text)

        def flush(self): ...

    times = iter([0.0, 500.0, 500.0, 590.0, 590.0, 780.0, 780.0, 800.0])
    with running.Progress(Stream(), lambda: next(times), "process 1: ") as progress:
        progress.plan([10, 10, 20, 5], [True, False, True, False])
        for label in ("one", "two", "three", "four"):
            progress.start(label)
            assert "".join(lines).endswith(f"{label} ...\n")
            progress.finish()
    # At the pace of the second 9 s for each of 25, and 410 s that the third compiles as the first.
    assert "".join(lines).splitlines()[1::2] == [
        "process 1: [1/4] one in 500.0 s",
        "process 1: [2/4] two in 90.0 s, about 11 minutes left",
        "process 1: [3/4] three in 190.0 s",
        "process 1: [4/4] four in 20.0 s",
    ]


MEASURED = """
import sys, threading, time
import pandas, psutil, pyarrow, jax
from tests.test_estimate import estimate, job, running
jax.numpy.zeros(3).block_until_ready()
names, *sizes = sys.argv[1:]
queries, heads, group, head_dim, length = map(int, sizes)
one = job(names, length, heads=heads, group=group, queries=queries, head_dim=head_dim)
needed, memory = estimate([one]), psutil.Process().memory_info
before = peak = memory().rss

def watch():
    global peak
    while True:
        peak = max(peak, memory().rss)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
import jaxattn
curves = jaxattn.error_curves(
    *one.inputs.arrays, [part.recipe for part in one.parts], contexts=list(one.contexts)
)
for index, part in enumerate(one.parts):
    running.rows_of(part, curves, index)
print(peak - before, needed.memory)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        ("metal,float32", 4, 1, 4, 128, 4096),
        ("metal,float32", 512, 8, 4, 64, 512),
        ("metal", 2048, 32, 1, 128, 256),
        ("metal,float32,hexagon-hvx,ggml-cpu-decode", 16, 8, 1, 128, 32768),
    ],
)
def test_memory_is_within_a_factor_of_two_of_what_it_takes(sizes):
    command = [sys.executable, "-c", MEASURED, *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, expected = map(int, done.stdout.split())
    assert expected / 2 < measured < 2 * expected, (size(measured), size(expected))
