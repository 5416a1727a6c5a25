"""Errors of single keys: what rounding q, k, v, s and p does to a row.

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
from jaxattn.theory.roundings import error_moments, relative, rounded, ulp

Float64 = NDArray[np.float64]

NODES, TOP, LOWEST = 512, 16, -7.5
LN2 = float(np.log(2))
SEED = 20261126


class Elements(NamedTuple):
    """Of each row at one context, float64 [rows].

    l: the running sum, in units of its maximum; share: the sum of squared weights
    scores, probs, value: variance of o's error, in units of V's variance
    bias, along: mean and variance of the relative error of o's mean
    weight, apart: of l, from p alone; shift: mean of that from s
    jitter: variance of l's relative error from what o shares, so that o / l does not have it
    underflow: share of l that p loses to zero
    """

    l: Float64
    share: Float64
    scores: Float64
    probs: Float64
    value: Float64
    bias: Float64
    along: Float64
    weight: Float64
    apart: Float64
    shift: Float64
    jitter: Float64
    underflow: Float64


def elements(recipe: Recipe, moments: Moments, context: int, rows: int) -> Elements:
    """The errors of `rows` rows, those of `moments` in turn, after `context` keys."""
    pick = np.arange(rows) % len(moments.mean)
    mean, sd, lift, pull = (
        x[pick, None] for x in (moments.mean, moments.sd, moments.lift, moments.pull)
    )
    z, log_count, gap = _scores(moments, context, rows)
    s = mean + sd * z
    m = block_max(recipe, s[:, :1])
    p = np.exp(s - m)
    n = np.exp(log_count + np.where(gap > 0, lift, 0.0))
    l = np.sum(n * p, axis=1, keepdims=True)
    w = p / l
    share = np.sum(n * w**2, axis=1, keepdims=True)
    spread = np.maximum(1 - 2 * w + share, 0)  # of (v - o)^2, in units of V's variance

    taken, by_query, by_key = _product_errors(recipe, moments)
    noise = (by_query + by_key) * moments.products[pick, None] ** 2
    e = _score_errors(recipe, moments, s, m, taken)
    shift = np.sum(n * w * e, axis=1, keepdims=True)
    scores = n * w**2 * ((e - shift) ** 2 + noise * spread)

    whole = l if recipe.normalise == "before" else 1.0
    width = p * gap * sd / math.sqrt(12)
    exact = _records(z.shape[1], rows)

    def rounding(format: Format, whole: Float64 | float = 1.0) -> tuple[Float64, Float64]:
        bias, variance = _rounding(p / whole, width / whole, format)
        bias = np.where(exact & (recipe.normalise != "before"), 0.0, bias)
        return bias * whole / l, variance * (whole / l) ** 2

    # What p·v and the row sum read alike, what p·v alone, and what the row sum alone.
    probs, summand = rounding(recipe.probs, whole), rounding(recipe.summand)
    none = (0 * p, 0 * p)
    if recipe.normalise == "before":
        both, own, added = summand, probs, none
    elif recipe.summand == recipe.probs:
        both, own, added = probs, none, none
    else:
        both, own, added = none, probs, summand
    around = [_around(w, n, *errors) for errors in (both, own, added)]
    (common, jointly), (bias, along), (weight, apart) = around
    loose = jointly + n * both[1] * (spread - 1) + along
    v = 1 + (moments.value_mean / moments.value_sd) ** 2 if moments.value_sd else 1.0
    value = v * inexact(recipe.value, moments.inputs[2])[1]
    jitter = n * w**2 * ((e - shift) ** 2 + by_key * moments.products[pick, None] ** 2) + jointly
    zero = np.sum(n * w * (rounded(p / whole, recipe.probs) == 0), axis=1)
    return Elements(
        l[:, 0],
        share[:, 0],
        scores.sum(1),
        loose.sum(1),
        share[:, 0] * value,
        (common + bias)[:, 0],
        along.sum(1),
        (common + weight)[:, 0],
        apart.sum(1),
        # The scatter of the nodes is not that of keys.
        np.full(rows, np.mean(shift)) + noise[:, 0] / 2,
        np.sum(jitter, axis=1) + by_query * pull[:, 0] ** 2,
        zero,
    )


def _around(w: Float64, n: Float64, bias: Float64, variance: Float64) -> tuple[Float64, Float64]:
    """Mean and, by key, variance of a sum's relative error, of the errors of its keys."""
    mean = np.sum(n * bias, axis=1, keepdims=True)
    return mean, n * ((bias - mean * w) ** 2 + variance)


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


def _score_errors(
    recipe: Recipe, moments: Moments, s: Float64, m: Float64, taken: float
) -> Float64:
    """Errors of log p + m, in nats, of scores s and their largest m, as p's block saw it."""
    unit = unit_of(recipe)
    constant = moments.scale / unit
    factor = rounded(constant, recipe.scale) / constant
    if recipe.log2e_at == "query":
        factor = rounded(moments.scale, recipe.scale) / moments.scale
        factor = factor * rounded(1 / LN2, recipe.log2e) * LN2
    x = rounded(s / unit * factor * (1 + taken), recipe.scores)
    top = rounded(m / unit, recipe.seen_max)
    d = rounded(x - top, recipe.difference)
    return unit * (exponent(recipe, d) + top) - s


def exponent(recipe: Recipe, difference: Float64) -> Float64:
    """What exp2 makes of a difference, back in the difference's own unit."""
    if recipe.exp == "exp2" and recipe.log2e_at == "exponent":
        return LN2 * rounded(rounded(1 / LN2, recipe.log2e) * difference, recipe.exponent)
    return difference


def _product_errors(recipe: Recipe, moments: Moments) -> tuple[float, float, float]:
    """Of q·k, for what is rounded before it: mean relative error; and variance, in units of the
    product's entries, of what all keys of a row share, and of what each has for its own."""
    query, key, _ = moments.inputs
    roundings = [inexact(recipe.query, query)]
    if recipe.scale_at == "query":
        in_base = LN2 if recipe.exp == "exp2" and recipe.log2e_at == "scale" else 1.0
        held = recipe.query if holds(query, recipe.query) else query
        exact = np.frexp(rounded(moments.scale / in_base, recipe.scale))[0] == 0.5
        roundings.append(inexact(recipe.scaled_query, held if exact else FLOAT32))
        if recipe.log2e_at == "query":
            roundings.append(inexact(recipe.scaled_query, FLOAT32))
    means, variances = zip(*roundings, strict=True)
    own = inexact(recipe.key, key)
    return sum(means) + own[0], sum(variances), own[1]


def inexact(format: Format, arriving: Format) -> tuple[float, float]:
    """Mean and variance of the relative error that rounding to `format` makes."""
    return (0.0, 0.0) if holds(format, arriving) else relative(format)


def block_max(recipe: Recipe, peak: Float64) -> Float64:
    """What the recipe makes of a block's largest score, both in nats."""
    unit = unit_of(recipe)
    height = peak / unit + recipe.max_offset
    if recipe.max_step:
        height = np.ceil(height / recipe.max_step) * recipe.max_step
    return unit * rounded(height, recipe.running_max)


def unit_of(recipe: Recipe) -> float:
    """What the recipe's scores are counted in, in nats."""
    return LN2 if recipe.exp == "exp2" and recipe.log2e_at != "exponent" else 1.0
