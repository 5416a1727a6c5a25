"""Errors of single keys and of the end: what rounding s, p, 1/l and the result does to a row.

A row's largest scores are drawn, each as a key of its own; all others are a normal law cut below
them, on a grid of `NODES` scores at which the recipe's own roundings are carried out.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from jaxattn.formats import FLOAT32, Format, holds
from jaxattn.recipe import Recipe
from jaxattn.theory.moments import Moments
from jaxattn.theory.roundings import BENFORD, error_moments, rounded, ulp

Float64 = NDArray[np.float64]

NODES, TOP, LOWEST = 512, 16, -7.5
LN2 = float(np.log(2))
SEED = 20261126


class Elements(NamedTuple):
    """Of each row at one context, float64 [rows].

    l: the running sum, in units of its maximum; share: the sum of squared weights
    scores, probs, value: variance of o's error, in units of V's variance
    along: variance of the error that p's roundings put on o's mean, in units of its square
    bias: mean relative error of o; weight, shift: of l, from p and from s
    underflow: share of l that p loses to zero
    """

    l: Float64
    share: Float64
    scores: Float64
    probs: Float64
    value: Float64
    along: Float64
    bias: Float64
    weight: Float64
    shift: Float64
    jitter: Float64
    underflow: Float64


def elements(recipe: Recipe, moments: Moments, context: int, rows: int) -> Elements:
    """The errors of `rows` rows, those of `moments` in turn, after `context` keys."""
    pick = np.arange(rows) % len(moments.mean)
    mean, sd, lift = (x[pick, None] for x in (moments.mean, moments.sd, moments.lift))
    z, log_count, gap = _scores(moments, context, rows)
    s = mean + sd * z
    m = block_max(recipe, s[:, :1])
    p = np.exp(s - m)
    n = np.exp(log_count + np.where(gap > 0, lift, 0.0))
    l = np.sum(n * p, axis=1, keepdims=True)
    w = p / l
    share = np.sum(n * w**2, axis=1, keepdims=True)
    apart = np.maximum(1 - 2 * w + share, 0)  # of (v - o)^2, in units of V's variance

    noise = _score_noise(recipe, moments)[pick, None]
    e = _score_errors(recipe, moments, s, m)
    shift = np.sum(n * w * e, axis=1, keepdims=True)
    scores = n * w**2 * ((e - shift) ** 2 + noise * apart)

    whole = l if recipe.normalise == "before" else 1.0
    width = p * gap * sd / math.sqrt(12)
    d, square = _rounding(p / whole, width / whole, recipe.probs)
    d, square = d * whole / l, square * (whole / l) ** 2
    if recipe.normalise != "before":
        d = np.where(_records(z.shape[1], rows), 0.0, d)
    bias = np.sum(n * d, axis=1, keepdims=True)
    sums_probs = recipe.summand == recipe.probs
    loose = n * ((d - bias * w) ** 2 + square * (apart if sums_probs else 1.0))
    added = d if sums_probs else _rounding(p, width, recipe.summand)[0] / l
    v = 1 + (moments.value_mean / moments.value_sd) ** 2 if moments.value_sd else 1.0
    value = v * _unheld(recipe.value, moments.inputs[2])
    jitter = n * w**2 * ((e - shift) ** 2 + noise) + (loose if sums_probs else 0.0)
    zero = np.sum(n * w * (rounded(p / whole, recipe.probs) == 0), axis=1)
    return Elements(
        l[:, 0],
        share[:, 0],
        scores.sum(1),
        loose.sum(1),
        share[:, 0] * value,
        0 * l[:, 0] if sums_probs else loose.sum(1),
        0 * l[:, 0] if sums_probs else bias[:, 0],
        np.sum(n * added, axis=1),
        np.full(rows, np.mean(shift)),  # the scatter of the nodes is not that of keys
        np.sum(jitter, axis=1),
        zero,
    )


def _scores(moments: Moments, context: int, rows: int) -> tuple[Float64, Float64, Float64]:
    """Scores in sd above the mean, largest first, the log of how many keys each stands for, and
    how far their neighbours are: [rows, TOP + NODES]."""
    rng = np.random.default_rng(SEED)
    top = min(TOP, context)
    # The j-th largest of n lies where n·(upper tail) is the j-th point of a Poisson process.
    tail = 1 - np.exp(-np.cumsum(rng.exponential(size=(rows, TOP)), axis=1)[:, :top] / context)
    peaks = -ndtri(np.clip(tail, 1e-300, 1 - 1e-12))
    cut = peaks[:, -1:]
    middle = (np.arange(NODES) + rng.random((rows, NODES))) / NODES
    length = np.maximum(cut - LOWEST, 1e-3)
    z = LOWEST + length * middle
    log = -(z**2) / 2
    log = log - np.logaddexp.reduce(log, axis=1, keepdims=True)
    log = log + np.log(max(context - top, 1e-300))
    gap = np.concatenate([0 * peaks, 0 * z + length / NODES], 1)
    return np.concatenate([peaks * moments.tail, z], 1), np.concatenate([0 * peaks, log], 1), gap


def _records(count: int, rows: int) -> NDArray[np.bool_]:
    """Whether a key was its row's largest so far, so that its p was 1 and needed no rounding: the
    j-th largest is so once in j rows."""
    rng = np.random.default_rng(SEED + 1)
    record = np.zeros((rows, count), bool)
    top = min(TOP, count - NODES)
    record[:, :top] = rng.random((rows, top)) < 1 / np.arange(1, top + 1)
    return record


def _rounding(x: Float64, width: Float64, format: Format) -> tuple[Float64, Float64]:
    """Mean and variance of the rounding error of what lies within sd `width` of x >= 0."""
    if holds(format, FLOAT32):
        return np.zeros_like(x), np.zeros_like(x)
    bias, variance = error_moments(x, width, ulp(x, format), format)
    flushed = (x < 2.0**format.emin) & (not format.subnormals)
    return np.where(flushed, -x, bias), np.where(flushed, 0.0, variance)


def _score_errors(recipe: Recipe, moments: Moments, s: Float64, m: Float64) -> Float64:
    """Errors of log p + m, in nats, of scores s and their largest m."""
    unit = unit_of(recipe)
    constant = moments.scale / unit
    x = rounded(s / unit * (rounded(constant, recipe.scale) / constant), recipe.scores)
    top = rounded(m / unit, recipe.running_max)
    d = rounded(x - rounded(top, recipe.seen_max), recipe.difference)
    if recipe.exp == "exp2" and recipe.log2e_at == "exponent":
        log2e = rounded(1 / LN2, recipe.log2e)
        return LN2 * rounded(log2e * d, recipe.exponent) + top - s
    return unit * (d + top) - s


def _score_noise(recipe: Recipe, moments: Moments) -> Float64:
    """Variance of a score for what is rounded before the product, [rows of moments]."""
    scaled = recipe.scaled_query if recipe.scale_at == "query" else FLOAT32
    query, key, _ = moments.inputs
    pairs = ((recipe.query, query), (recipe.key, key), (scaled, FLOAT32))
    return moments.products**2 * sum(_unheld(*pair) for pair in pairs)


def _unheld(format: Format, arriving: Format) -> float:
    """Mean square of the relative error that rounding to `format` makes."""
    return 0.0 if holds(format, arriving) else BENFORD * 4.0**-format.precision


def block_max(recipe: Recipe, peak: Float64) -> Float64:
    """What the recipe makes of a block's largest score, both in nats."""
    unit = unit_of(recipe)
    height = peak + recipe.max_offset * unit
    step = recipe.max_step * unit
    return np.ceil(height / step) * step if step else height


def unit_of(recipe: Recipe) -> float:
    """What the recipe's scores are counted in, in nats."""
    return LN2 if recipe.exp == "exp2" and recipe.log2e_at != "exponent" else 1.0
