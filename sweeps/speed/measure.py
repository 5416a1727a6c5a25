"""Medians of calls that take turns with a bare pair of matrix products, and the rows they make."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

HEAD_DIM = 128
PIECE = 2048  # keys; scores of 64 queries and so many keys stay in cache
LIMITS = "limits"
BUDGET = 2.0  # seconds that the repeats of one call may take, beyond the least of them
LEAST, MOST, WARMUPS = 5, 25, 2

Call = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: `value`, in `unit`, should lie within least..most.

    what:    the call that is measured, in short
    series:  the figure's line or bar: limit, reference, ours, peer, draws; none: in the table alone
    queries, keys, recipes, contexts: its size, of one head
    seconds: the median of the call; limit_seconds: of what it took turns with
    least, most: the goal; none: measured, not judged
    """

    what: str
    value: float
    unit: str = LIMITS
    least: float | None = None
    most: float | None = None
    series: str = ""
    queries: int | None = None
    keys: int | None = None
    recipes: int | None = None
    contexts: int | None = None
    seconds: float | None = None
    limit_seconds: float | None = None
    why: str = ""


class Times(NamedTuple):
    """Median seconds of a call, and of the limit beside it."""

    seconds: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.limit


class NotRun(Exception):
    """What was asked for could not be measured here; the message says why."""


def take_turns(
    call: Call, limit: Call, clock: Clock = time.perf_counter, least: int = LEAST
) -> Times:
    """Both in turn, an odd number of times, so that what else the machine does meets both alike.

    The first calls, which compile, are not counted.
    """
    for _ in range(WARMUPS):
        limit()
        seconds = _time(call, clock)
    repeats = max(least, min(MOST, math.ceil(BUDGET / max(seconds, 1e-9)))) | 1
    limits, calls = [], []
    for _ in range(repeats):
        limits.append(_time(limit, clock))
        calls.append(_time(call, clock))
        limits.append(_time(limit, clock))
    return Times(statistics.median(calls), statistics.median_low(limits))


def _time(call: Call, clock: Clock) -> float:
    started = clock()
    call()
    return clock() - started


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


class Problem(NamedTuple):
    """Queries [T, H], keys and values [S, H] of one head: float32 values that halves hold."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray

    @property
    def size(self) -> dict[str, Any]:
        return {"queries": len(self.query), "keys": len(self.key)}

    def arrays(self) -> tuple[Any, Any, Any]:
        """On jax's device, without a head axis."""
        import jax.numpy as jnp

        return jnp.asarray(self.query), jnp.asarray(self.key), jnp.asarray(self.value)

    def layout(self, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[1, length, 1, H], as error_curves takes them."""
        query, key, value = (x[None, :, None].astype(dtype) for x in self)
        return query, key, value


@functools.lru_cache(maxsize=1)
def problem(queries: int, keys: int) -> Problem:
    rng = np.random.default_rng(0)
    shapes = ((queries, HEAD_DIM), (keys, HEAD_DIM), (keys, HEAD_DIM))
    drawn = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return Problem(*(x.astype(np.float16).astype(np.float32) for x in drawn))


def limit(problem: Problem, piece: int | None = None) -> Call:
    """q·kᵀ whole, then p·v whole, jitted in float32, nothing between; or in pieces of keys."""
    import jax
    import jax.numpy as jnp

    def multiply(x: Any, y: Any) -> Any:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    def whole(q: Any, k: Any, v: Any) -> Any:
        return multiply(multiply(q, k.T), v)

    def pieces(q: Any, k: Any, v: Any) -> Any:
        def body(o: Any, kv: Any) -> tuple[Any, None]:
            return o + whole(q, *kv), None

        cut = (x.reshape(-1, piece, HEAD_DIM) for x in (k, v))
        return jax.lax.scan(body, jnp.zeros_like(q), tuple(cut))[0]

    return call_of(jax.jit(whole if piece is None else pieces), *problem.arrays())


def call_of(function: Callable[..., Any], *arguments: Any) -> Call:
    """The call as one without arguments, which waits for its result."""
    import jax

    return lambda: jax.block_until_ready(function(*arguments))


def flops(queries: int, keys: int) -> int:
    """Of the pair of products."""
    return 4 * queries * keys * HEAD_DIM
