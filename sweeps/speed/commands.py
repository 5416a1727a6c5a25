"""From a command to what it prints, each in a process of its own; and what is compiled again."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sweeps.speed.measure import NotRun, Row

ROOT = Path(__file__).resolve().parents[2]
PICTURES, HELPS = 3, 7

# Counts what jax compiles while a program runs, and how much of that the cache on disk had.
COUNTING = """
import json, sys
from jax import monitoring
asked = {"compile_requests_use_cache": 0, "cache_hits": 0}
def count(event, **_):
    name = event.rpartition("/")[2]
    if name in asked:
        asked[name] += 1
monitoring.register_event_listener(count)
"""
# A second run of a command.
RUN = (
    COUNTING
    + """
import sweeps.__main__ as cli
sys.argv = ["sweeps", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(json.dumps(asked))
"""
)
# A second call of a function.
CALL = (
    COUNTING
    + """
import jaxattn
from jaxattn.command import use_compilation_cache
use_compilation_cache()
for seed in (0, 1):
    asked = dict.fromkeys(asked, 0)
    query, stream = jaxattn.inputs.regime("gaussian", length=4096, seed=seed, heads=1)
    jaxattn.error_curves(query, stream, None, ["hexagon-hmx-fp16", "metal"])
print(json.dumps(asked | {"cache_hits": 0}))
"""
)


def start() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["-m", "sweeps", "run", "hexagon", "--quick", "--out"]
        run(*sweep, f"{folder}/first")  # fills the cache of compiled programs
        firsts, wholes = [], []
        for i in range(PICTURES):
            began = time.time()
            wholes.append(run(*sweep, f"{folder}/{i}")[0])
            pictures = list(Path(folder, str(i), "_figures").glob("*.png"))
            if not pictures:
                raise NotRun("no picture was drawn")
            firsts.append(min(path.stat().st_mtime for path in pictures) - began)
        command = "sweeps run hexagon --quick"
        first, whole = statistics.median(firsts), statistics.median(wholes)
        what = f"{command}, to its first picture"
        yield Row(what=what, value=first, unit="s", most=8.0, seconds=first)
        yield Row(what=f"{command}, whole", value=whole, unit="s", seconds=whole)
        for what, code, arguments in (
            ("programs that a second run compiles", RUN, ["run", "hexagon", "--quick"]),
            ("programs that a second call of error_curves compiles", CALL, []),
        ):
            more = ["--no-figures", "--out", f"{folder}/counted"] if arguments else []
            _, text = run("-c", code, *arguments, *more)
            asked = json.loads(text.splitlines()[-1])
            compiled = asked["compile_requests_use_cache"] - asked["cache_hits"]
            why = f"{asked['cache_hits']} came from the cache on disk" if arguments else ""
            yield Row(what=what, value=compiled, unit="programs", most=0, why=why)
    for package in ("jaxattn", "sweeps"):
        seconds = [run("-m", package, "--help")[0] for _ in range(HELPS)]
        middle = statistics.median(seconds)
        loads = imports_jax(package)
        yield Row(
            what=f"{package} --help",
            value=float("inf") if loads else middle,
            unit="s",
            most=0.5,
            seconds=middle,
            why="it imports jax" if loads else "jax is not imported",
        )


def imports_jax(package: str) -> bool:
    command = [sys.executable, "-X", "importtime", "-m", package, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "jax" in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def run(*arguments: str) -> tuple[float, str]:
    """Seconds and output of this python with these arguments; NotRun where it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotRun(f"python {' '.join(arguments)[:60]}: {lines[-1]}")
    return seconds, done.stdout
