"""The path of rows from block to block: maxima, what blocks add, and what maxima leave behind.

A row's maximum is drawn, block by block, as the extremal process that it is; all else is in closed
form. Blocks are taken singly at first, then in steps of 1/128 of those before.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxattn.recipe import Recipe
from jaxattn.theory.elements import block_max, exponent, unit_of
from jaxattn.theory.moments import EVERY, Moments, largest_score, weights
from jaxattn.theory.roundings import rounded

Float64 = NDArray[np.float64]

FINE = 128
EDGES = (0, 8, 16, 24, 32, 40, 48, 56, 60, 62, 63, 64)  # 64ths: quantiles of what a block adds
FINER = (*range(0, 60, 4), 58, 60, 61, 62, 63, 64)  # of one of FEW keys or less
FEW = 4
SMOOTH = 0.6  # sd of what blocks add, in ulps, above which rounding dithers it, if of many keys
SEED = 20261125


class Step(NamedTuple):
    """`blocks` blocks after a rescale factor a; each adds c, with the variance of c and the sum
    of p^2, and a score at the row's mean weighs `unit`; and relative errors: of a as l and as o
    reads it, of p for the maximum that it sees. All but their number are [rows]."""

    blocks: int
    a: Float64
    c: Float64
    square: Float64
    variance: Float64
    unit: Float64
    a_l: Float64
    a_o: Float64
    seen: Float64

    def some(self, rows: NDArray[np.bool_] | slice) -> "Step":
        """Of these rows alone."""
        return Step(self.blocks, *(x[rows] for x in self[1:]))


class Path(NamedTuple):
    """sums: [n, rows], means of what a block adds over each of `shares` of its distribution, in
    units of a score at the row's mean; smooth: the ulps that dither it
    whole: steps of whole blocks; at: context -> (how many of them, the partial block or None)"""

    rows: int
    sums: Float64
    shares: Float64
    smooth: float
    whole: list[Step]
    at: dict[int, tuple[int, Step | None]]

    def some(self, rows: int) -> "Path":
        """The first rows alone."""
        few = slice(rows)
        at = {n: (k, last and last.some(few)) for n, (k, last) in self.at.items()}
        whole = [step.some(few) for step in self.whole]
        return self._replace(rows=rows, sums=self.sums[:, few], whole=whole, at=at)


class History(NamedTuple):
    """What narrow rescale factors and maxima leave of earlier keys, float64 [contexts, rows]: the
    mean relative error of a sum, of weights or of values alike; and its variance over keys, each
    counted by its squared weight."""

    mean: Float64
    scatter: Float64


def path(recipe: Recipe, moments: Moments, block: int, contexts: list[int], rows: int) -> Path:
    """Rows of `moments` in turn, each with a maximum of its own."""
    rng = np.random.default_rng(SEED)
    pick = np.arange(rows) % len(moments.mean)
    own = moments._replace(
        mean=moments.mean[pick],
        sd=moments.sd[pick],
        peaks=moments.peaks[pick],
        lift=moments.lift[pick],
    )
    stops = [n // block for n in contexts]
    # Equal blocks are few kinds of rows, and what rounding does to each of them is certain.
    ends = sorted({*_grid(max(stops), FINE if own.sd.any() else max(stops)), *stops} - {0})
    nats = unit_of(recipe)

    def step(
        count: int, start: int, end: int, peak: Float64, m: Float64
    ) -> tuple[Step, Float64, Float64]:
        keys = end - start
        z = largest_score(own, keys, rng.random(rows))
        if (seen := -(-end // EVERY)) <= own.peaks.shape[1]:
            last = own.peaks[:, seen - 1]  # what was seen, as far as it goes
            z = last if end % EVERY == 0 else np.minimum(z, last)
        new = (z > peak) & (own.sd > 0)
        peak = np.maximum(z, peak)
        height = block_max(recipe, own.mean + own.sd * peak)
        moves = height > m + recipe.lazy_threshold * nats
        m_next = np.where(moves, height, m)
        a = np.where(np.isfinite(m), np.exp(np.minimum(m - m_next, 0)), 0.0)
        top = np.where(new, np.exp(own.mean + own.sd * peak - m_next), 0.0)
        one, two = (weights(own, m_next, peak, power) for power in (1, 2))
        c = ((keys - new) * one + top) / count
        square = ((keys - new) * two + top**2) / count
        variance = keys / count * np.maximum(two - one**2, 0)
        unit = np.exp(own.mean + own.lift - m_next)
        drop = rounded(np.where(a > 0, m - m_next, 0.0) / nats, recipe.difference)
        a_l = rounded(np.exp(nats * exponent(recipe, drop)), recipe.rescale)
        a_o = rounded(a_l, recipe.output_rescale)
        late, later = (np.where(a > 0, x / np.where(a > 0, a, 1.0) - 1, 0.0) for x in (a_l, a_o))
        off = m_next - nats * rounded(m_next / nats, recipe.seen_max)
        return Step(count, a, c, square, variance, unit, late, later, off), peak, m_next

    start = recipe.initial_max * nats
    peak, m = np.full(rows, -np.inf), np.full(rows, start if start > -1e4 else -np.inf)
    done = 0
    whole: list[Step] = []
    at: dict[int, tuple[int, Step | None]] = {}

    def stop_at() -> None:
        for n in contexts:
            if n // block == done:
                rest = n % block
                partial = step(1, n - rest, n, peak, m)[0] if rest else None
                at[n] = (len(whole), partial)

    stop_at()
    for end in ends:
        taken, peak, m = step(end - done, done * block, end * block, peak, m)
        whole.append(taken)
        done = end
        stop_at()
    edges, smooth = (FINER, math.inf) if block <= FEW else (EDGES, SMOOTH)
    shares = np.diff(edges) / 64
    return Path(rows, _sums(own.sd, block, edges), shares, smooth, whole, at)


def _grid(blocks: int, fine: int) -> list[int]:
    ends, end = [], 0
    while end < blocks:
        end = min(end + max(1, end // fine), blocks)
        ends.append(end)
    return ends


def _sums(sd: Float64, block: int, edges: tuple[int, ...]) -> Float64:
    """Means of a block's sum of exp(sd·z), z normal, between quantiles `edges`: [n, rows]."""
    rng = np.random.default_rng(SEED + 1)
    levels = np.linspace(sd.min(), sd.max(), 1 if np.ptp(sd) == 0 else 5)
    draws = 64 * min(64, max(1, 2**19 // block // 64))
    z = rng.standard_normal((draws, block))
    logs = []
    for level in levels:
        total = np.sort(np.sum(np.exp(level * z), axis=1))
        parts = np.split(total, [edge * draws // 64 for edge in edges[1:-1]])
        logs.append(np.log([part.mean() for part in parts]))
    return np.exp(np.stack([np.interp(sd, levels, x) for x in np.transpose(logs)]))


def history(path: Path, contexts: list[int], factor: str, chunks: int) -> History:
    """Of l's rescale factors, factor "a_l", or of o's, "a_o"; of so many chunks of equal weight, of
    which other rows' are as good as a row's own."""

    def advance(s: tuple[Float64, ...], step: Step) -> tuple[Float64, ...]:
        weight, error, square, mixed, errors = s
        late, own = getattr(step, factor), step.seen  # of the keys so far, and of the new ones
        c, gain = step.blocks * step.c, step.blocks * step.square
        a = step.a
        return (
            a * weight + c,
            a * (error + late * weight) + own * c,
            a**2 * square + gain,
            a**2 * (mixed + late * square) + own * gain,
            a**2 * (errors + 2 * late * mixed + late**2 * square) + own**2 * gain,
        )

    after: list[tuple[Float64, ...]] = [(np.zeros(path.rows),) * 5]
    for step in path.whole:
        after.append(advance(after[-1], step))
    means, scatters = [], []
    for n in contexts:
        count, partial = path.at[n]
        last = after[count] if partial is None else advance(after[count], partial)
        unit = chunks * last[0]
        shares = [x / y for x, y in zip(last[1:], (unit, unit**2, unit**2, unit**2), strict=True)]
        mean, square, mixed, errors = (
            np.sum([np.roll(share, i) for i in range(chunks)], axis=0) for share in shares
        )
        means.append(mean)
        scatters.append((errors - 2 * mean * mixed + mean**2 * square) / square)
    return History(np.stack(means), np.maximum(scatters, 0))
