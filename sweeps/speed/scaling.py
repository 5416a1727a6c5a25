"""How the cost grows with the context and with the number of contexts, and how memory does not."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweeps.speed.measure import (
    HEAD_DIM,
    Call,
    NotRun,
    Problem,
    Row,
    exponent,
    limit,
    problem,
    take_turns,
)
from sweeps.speed.ours import (
    FORMATS,
    HMX,
    LONG,
    SUMS,
    at_block,
    curves,
    eight_recipes,
    hmx,
    lattice,
    reference,
    row,
)

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = tuple(2**k for k in (14, 16, 18, 20))
QUERIES = 64
STREAM, STREAM_QUERIES = "stream", 16
TOLERANCE = 0.05
FAR = 2**24
FAR_RECIPES = (HMX, "hexagon-hmx-fp32", "metal", "float32")
GIB = 2**30
CHILD_LIMIT_S = 1200


def contexts() -> Iterator[Row]:
    """64 contexts beside 8, of the same eight recipes."""
    drawn = problem(*LONG)
    few, many = (spaced(LONG[1], count) for count in (8, 64))
    recipes = eight_recipes(64)
    times = take_turns(curves(recipes, drawn, many), curves(recipes, drawn, few))
    yield row(
        "error_curves: 64 contexts instead of 8",
        times,
        drawn,
        recipes=len(recipes),
        contexts=64,
        unit="times 8 contexts",
        most=1.3,
    )


def spaced(keys: int, count: int) -> list[int]:
    """`count` contexts at equal ratios from 256 to `keys`."""
    return [round(256 * (keys / 256) ** (i / (count - 1))) for i in range(count)]


def lengths() -> Iterator[Row]:
    """Cost against context, of arrays in memory and of a stream that is drawn as it is read."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for keys in LENGTHS:
        drawn = problem(QUERIES, keys)
        pair = limit(drawn)
        for series, what, count, call in _cases(drawn, pair):
            times = take_turns(call, pair, least=3)
            found.setdefault((series, count), []).append(times.seconds)
            queries = STREAM_QUERIES if series == STREAM else QUERIES
            yield row(what, times, drawn, queries=queries, recipes=count, series=series)
    for (series, count), seconds in found.items():
        judged = series in ("ours", STREAM)
        yield Row(
            what=f"exponent of {series}{f', {count} recipes' if count else ''}, with the context",
            value=exponent(list(LENGTHS), seconds),
            unit="exponent",
            least=1 - TOLERANCE if judged else None,
            most=1 + TOLERANCE if judged else None,
            queries=STREAM_QUERIES if series == STREAM else QUERIES,
            recipes=count,
        )


def _cases(drawn: Problem, pair: Call) -> Iterator[tuple[str, str, int | None, Call]]:
    """Series, words, recipes and call, one after the other: each holds copies of the keys."""
    yield "limit", "q·kᵀ whole, p·v whole", None, pair
    yield "reference", "the float64 reference alone", None, reference(drawn)
    for recipes in ([hmx()], eight_recipes(), lattice(hmx(), dict.fromkeys(SUMS, FORMATS))):
        what = f"error_curves of {len(recipes)}: {HMX}, {at_block(None)}"
        yield "ours", what, len(recipes), curves(recipes, drawn)
    yield STREAM, f"error_curves: {HMX}, of a Stream", 1, streaming(len(drawn.key))


def streaming(keys: int) -> Any:
    """error_curves of one recipe, keys and values drawn while it runs."""
    import jaxattn

    query, stream = jaxattn.inputs.regime(
        "gaussian", length=keys, seed=0, heads=1, queries=STREAM_QUERIES, head_dim=HEAD_DIM
    )
    return lambda: jaxattn.error_curves(query, stream, None, [hmx()])


def memory() -> Iterator[Row]:
    """Peak memory of a process that streams 2^24 keys."""
    code = f"from sweeps.speed import scaling; scaling.far({FAR})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=CHILD_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"took longer than {CHILD_LIMIT_S} s") from None
    if done.returncode:
        raise NotRun(f"failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    yield Row(
        what=f"error_curves of a Stream, {len(FAR_RECIPES)} recipes: peak resident memory",
        value=found["peak"] / GIB,
        unit="GiB",
        most=1.0,
        queries=1,
        keys=FAR,
        recipes=len(FAR_RECIPES),
        seconds=found["seconds"],
        why=f"{found['start'] / GIB:.2f} GiB once jaxattn and jax are imported",
    )


def far(keys: int) -> None:
    """Runs in a process of its own; prints seconds, and peak bytes before and after."""
    import jax

    import jaxattn

    jax.devices()
    query, stream = jaxattn.inputs.regime("gaussian", length=keys, seed=0, heads=1, queries=1)
    before, started = peak_memory(), time.perf_counter()
    jaxattn.error_curves(query, stream, None, FAR_RECIPES)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "start": before, "peak": peak_memory()}))


def peak_memory() -> int:
    """Of this process, in bytes. getrusage would count what the parent held when it forked."""
    try:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
