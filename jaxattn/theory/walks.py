"""The walk of l, and of o, from block to block: mean and variance of its error.

In closed form along a `Path`: what a block adds is normal, and `error_moments` says what rounding
makes of it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from jaxattn.formats import FLOAT32, NEAREST_EVEN, Format, holds
from jaxattn.theory.paths import Path, Step
from jaxattn.theory.roundings import dithered, error_moments, overflow, rounded, ulp

Float64 = NDArray[np.float64]

NORMAL = 0.12  # sd of what blocks add, in units of its mean, below which it is normal
STILL = 1e-3  # share of what blocks add that still moves a sum that is said to stand


class Walk(NamedTuple):
    """At each context, float64 [contexts, rows, nodes]: the true sum; its error's mean, variance
    and fourth cumulant, in its units; the weight lost to updates that moved nothing, in units of
    l; and whether it is finite."""

    true: Float64
    mean: Float64
    variance: Float64
    fourth: Float64
    lost: Float64
    finite: NDArray[np.bool_]


class _State(NamedTuple):
    weight: Float64  # of the keys so far, in units of the running maximum
    noise: Float64  # variance of the true sum around mean·weight
    mean: Float64
    variance: Float64
    fourth: Float64
    lost: Float64
    finite: NDArray[np.bool_]


def walk(
    path: Path,
    contexts: list[int],
    format: Format,
    carried: Format,
    *,
    summand: Format = FLOAT32,
    mean: float = 1.0,
    sd: float = 0.0,
    nodes: Float64 | None = None,
    reach: float = 0.0,
) -> Walk:
    """The sum over blocks of weights times values of the given mean and sd, kept in `format`.

    carried: of the rescaled sum; summand: of what a block adds; nodes: how many of its own sd the
    true sum lies off its mean; reach: as far off lies the largest of all sums, which overflows.

    The coarser of `format` and `carried` is that of the walk: where it is `carried`, the block
    before the next one rounds what this one adds, and no block the last.
    """
    z = np.zeros(1) if nodes is None else nodes
    fine = holds(summand, FLOAT32)
    wide = fine and holds(format, FLOAT32) and holds(carried, FLOAT32)
    later = not holds(carried, format)
    limit = min(overflow(format), overflow(carried))
    format, finer = (carried, format) if later else (format, carried)
    shape = (path.rows, len(z))
    zero = np.zeros(shape)

    def true(state: _State) -> Float64:
        return mean * state.weight + z * np.sqrt(state.noise)

    def lost(l: Float64, x: Float64, sd: Float64, q: Float64) -> Float64:
        """The weight that l loses, in units of l, to blocks that do not move it by q: these are
        log-normal, of mean x."""
        nearest = format.rounding == NEAREST_EVEN
        edge = q / 2 if nearest else q
        x = np.maximum(x, 1e-300)
        tilt = np.log1p((sd / x) ** 2)
        below = np.log(edge / x) - tilt / 2
        z = np.divide(below, np.sqrt(tilt), out=np.zeros_like(below), where=tilt > 0)
        part = np.where(tilt > 0, ndtr(z), x <= edge if nearest else x < edge)
        return part * x / np.maximum(l, x)

    def advance(s: _State, step: Step, last: bool = False) -> _State:
        a, c = step.a[:, None], step.c[:, None]
        rounds = step.blocks - (last and later)
        weight, noise = a * s.weight, a**2 * s.noise
        gain = sd**2 * step.square[:, None]
        if wide:
            return s._replace(weight=weight + step.blocks * c, noise=noise + step.blocks * gain)
        before = mean * weight + z * np.sqrt(noise)
        often = (step.blocks if later else (a < 1)) * (before != 0)
        extra = dithered(before, finer)
        error, variance = a * s.mean + often * extra[0], a**2 * s.variance + often * extra[1]
        x, width = mean * c, np.sqrt(mean**2 * step.variance[:, None] + gain)
        grid = ulp(x, summand)
        own = (0.0, 0.0) if fine else error_moments(np.abs(x), width, grid, summand)
        x = x + np.copysign(own[0], x)
        pull = z * (np.sqrt(noise + step.blocks * gain) - np.sqrt(noise)) / step.blocks
        if mean:  # otherwise what blocks add scatters far more than it leads to z
            x = x + pull

        def errors(
            q: Float64, sign: Float64, rows: NDArray[np.bool_] | slice
        ) -> tuple[Float64, Float64, NDArray[np.bool_]]:
            """error_moments of one block of these rows, of a sum whose ulp is q; and whether it
            stands still, so that what blocks add is all that it lacks."""
            some = step.some(rows)
            bias, square = _blocks(
                path, rows, some, sign * mean, sign * x[rows], gain[rows], q, format
            )
            # A summand of few bits meets ties, to even; toward zero it has less to lose.
            grain = np.where(width[rows] >= 0.5 * grid[rows], grid[rows], 0.0)
            nearest = format.rounding == NEAREST_EVEN
            square = np.where(q > grid[rows], square + (2 if nearest else -1) * grain**2 / 12, 0.0)
            bias = np.where(q > grid[rows], bias if nearest else bias + grain / 2, 0.0)
            still = (q > grid[rows]) & (bias <= -(1 - STILL) * sign * x[rows])
            return bias, np.where(still & bool(mean), 0.0, square), still

        start = before + error
        first = start + (x if mean else pull)
        # A power of two is reached in the binade below it.
        q = ulp(np.nextafter(first, 0) if step.blocks == 1 else start, format)
        sign = np.where(first < 0, -1.0, 1.0)
        bias, square, _ = errors(q, sign, slice(None))
        if step.blocks == 1:
            sure = rounded(start + x, format) - (start + x)
            bias = np.where(width > 0, bias, np.where(np.isfinite(sure), sign * sure, 0.0))
        else:
            # What is left of the step after the next power of two has the ulp of the next binade,
            # and where that moves nothing, every row stands on that power.
            way = step.blocks * (sign * (x if mean else pull) + bias)
            room = np.maximum(np.ldexp(q, format.precision) - sign * start, 0)
            rows = (way > room).any(axis=1)
            if rows.any():
                past = np.where(way > room, 1 - room / np.where(way > room, way, 1.0), 0.0)[rows]
                late, other, still = errors(2 * q[rows], sign[rows], rows)
                bias[rows] += past * (late - bias[rows])
                square[rows] += past * (other - square[rows])
                variance[rows] = np.where((past > 0) & still, 0.0, variance[rows])
                square[rows] = np.where((past > 0) & still, 0.0, square[rows])
        moves = bool(sd) or later  # what is lost later was not seen to move nothing
        after = _State(
            weight + step.blocks * c,
            noise + step.blocks * gain,
            error + rounds * sign * bias + step.blocks * np.copysign(own[0], x),
            variance + rounds * square + step.blocks * own[1],
            a**4 * s.fourth - rounds * 1.2 * square**2,  # of even distributions
            s.lost + (0.0 if moves else step.blocks * s.finite * lost(before + error, x, width, q)),
            s.finite,
        )
        furthest = np.abs(mean * after.weight + after.mean) + reach * np.sqrt(after.noise)
        return after._replace(finite=s.finite & (furthest < limit))

    state = _State(zero, zero, zero, zero, zero, zero, np.ones(shape, bool))
    after = [state]
    for step in path.whole:
        after.append(advance(after[-1], step))
    found = []
    for n in contexts:
        count, partial = path.at[n]
        ends = (after[count], partial) if partial else (after[count - 1], path.whole[count - 1])
        found.append(advance(*ends, last=True))
    columns = (
        np.stack([true(s) for s in found]),
        *(np.stack(x) for x in zip(*(s[2:] for s in found), strict=True)),
    )
    return Walk(*columns)


def _blocks(
    path: Path,
    rows: NDArray[np.bool_] | slice,
    step: Step,
    mean: Float64,
    x: Float64,
    gain: Float64,
    q: Float64,
    format: Format,
) -> tuple[Float64, Float64]:
    """error_moments of what blocks of these rows add: x each, of the mean value `mean`, its
    variance at given weights `gain`.

    A few large weights among many small ones skew a block's sum: most blocks add less than the
    mean. Quantiles of it stand for them then, the last taking what is left of the mean. However
    wide the weights of single keys scatter, the smallest of them are lost.
    """
    c, sd = step.c[:, None], np.sqrt(step.variance)[:, None]
    width = np.sqrt((mean * sd) ** 2 + gain)
    bias, square = error_moments(x, width, q, format)
    r = step.unit * path.sums[:, rows]
    low, middle, high = np.searchsorted(np.cumsum(path.shares), (0.3, 0.6, 0.8))
    core = (r[high] - r[low])[:, None] / 1.35  # the sd, if it were normal
    rough = ((sd >= NORMAL * c) & (np.abs(mean) * core < path.smooth * q)).any(axis=1)
    if not rough.any():
        return bias, square
    share = path.shares[:, None, None]
    r, c, core, q, gain = r[:, rough, None], c[rough], core[rough], q[rough], gain[rough]
    rest = (c - np.sum((share * r)[:-1], axis=0)) / path.shares[-1]
    r[-1] = np.maximum(rest, r[-2])
    near = 0.6 * np.gradient(r, axis=0)
    gains = gain * r**2 / np.sum(share * r**2, axis=0)
    width = np.sqrt((mean[rough] * near) ** 2 + gains)
    own, other = error_moments(x[rough] + mean[rough] * (r - c), width, q, format)
    whole = np.sum(share * own, axis=0)
    scattered = np.sum(share * (other + own**2), axis=0) - whole**2
    smooth = np.sqrt((mean[rough] * core) ** 2 + gains[middle]) > path.smooth * q
    bias[rough] = np.where(smooth, bias[rough], whole)
    square[rough] = np.where(smooth, square[rough], scattered)
    return bias, square
