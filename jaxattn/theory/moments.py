"""What the theory knows of inputs: a few moments of scores and values."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtri

from jaxattn.formats import Format, format_of

PAGE = 4096  # keys that `measured` reads
EVERY = 64

Float64 = NDArray[np.float64]


class Moments(NamedTuple):
    """Scores in nats, as normal as their moments say; values of independent keys.

    mean, sd: float64 [rows]: of each row's scores
    peaks:    float64 [rows, n]: the largest score of the first EVERY, 2 EVERY, ... keys, in sd
              above the mean; n is 0 where no keys were seen
    tail:     the largest score lies so much further out than that of as many normal ones
    lift:     float64 [rows]: and the mean of exp(score) is so many nats larger than theirs
    products: float64 [rows]: root mean square over keys of the scores' |product of entries|, summed
              in squares: what rounding of q or k moves
    pull:     float64 [rows]: likewise of the product of q and the mean key, weighted by attention:
              what rounding of q moves log l by
    value_mean, value_sd: of V, weighted by attention, in root mean square over its coordinates
    scale:    of the scores
    head_dim, value_dim
    inputs:   the formats that query, key and value arrive in
    """

    mean: Float64
    sd: Float64
    peaks: Float64
    tail: float
    lift: Float64
    products: Float64
    pull: Float64
    value_mean: float
    value_sd: float
    scale: float
    head_dim: int
    value_dim: int
    inputs: tuple[Format, Format, Format]


def gaussian(
    logit_sd: float = 1.0,
    *,
    logit_mean: float = 0.0,
    value_mean: float = 0.0,
    value_sd: float = 1.0,
    head_dim: int = 128,
    dtype: Any = "float16",
    rows: int = 256,
) -> Moments:
    """The moments of q, k and v of independent normal entries: a row's scores have the standard
    deviation logit_sd·|q| / sqrt(head_dim), which scatters by 1 / sqrt(2 head_dim).

    Raises ValueError for a negative standard deviation.
    """
    if not (0 <= logit_sd < math.inf and 0 <= value_sd < math.inf):
        raise ValueError(
            f"standard deviations must be finite and must not be negative, got {logit_sd=}, "
            f"{value_sd=}"
        )
    # The length of a normal vector is nearly normal itself: |q|^2 ~ chi^2.
    length = 1 + ndtri((np.arange(rows) + 0.5) / rows) / math.sqrt(2 * head_dim)
    sd = logit_sd * np.maximum(length, 0)
    format = format_of(dtype)
    inputs = (format, format, format)
    mean = np.full(rows, float(logit_mean))
    sizes = (1 / math.sqrt(head_dim), head_dim, head_dim)
    seen, lift = np.zeros((rows, 0)), np.zeros(rows)
    pull = sd**2 * math.sqrt(3 / head_dim)
    return Moments(mean, sd, seen, 1.0, lift, sd, pull, abs(value_mean), value_sd, *sizes, inputs)


def measured(query: Any, key: Any, value: Any = None, *, scale: float | None = None) -> Moments:
    """The moments of the first PAGE keys, as jaxattn.error_curves takes query, key and value.

    query [B, T, N, H]; key, value [B, S, K, H] and [B, S, K, D], or a Stream and None.
    A mean of V that so few keys cannot tell from none is none.
    Raises ValueError where shapes do not fit, or a score is not finite.
    """
    query = np.asarray(query)
    if hasattr(key, "blocks"):
        k, v = (x[None] for x in key.blocks(0, min(PAGE, key.length)))
    else:
        k, v = np.asarray(key)[:, :PAGE], np.asarray(value)[:, :PAGE]
    if query.ndim != 4 or k.ndim != 4 or v.ndim != 4 or query.shape[0] != k.shape[0]:
        raise ValueError(
            f"query, key and value must be [B, T, N, H], [B, S, K, H] and [B, S, K, D], got "
            f"{query.shape}, {k.shape} and {v.shape}"
        )
    heads = k.shape[2]
    if query.shape[3] != k.shape[3] or query.shape[2] % heads:
        raise ValueError(f"query {query.shape} and key {k.shape} do not fit each other")
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    inputs = (format_of(query.dtype), format_of(k.dtype), format_of(v.dtype))
    batch, _, count, _ = query.shape
    parts = [
        _head(
            query[b, :, n], k[b, :, n // (count // heads)], v[b, :, n // (count // heads)], factor
        )
        for b in range(batch)
        for n in range(count)
    ]
    mean, sd, peaks, products, pull, tails, lifts, squares, variances = map(
        np.concatenate, zip(*parts, strict=True)
    )
    if not np.isfinite(mean).all():
        raise ValueError("scores must be finite to have moments: q·k of some row is not")
    return Moments(
        mean=mean,
        sd=sd,
        peaks=peaks,
        tail=float(np.mean(tails)),
        lift=lifts,
        products=products,
        pull=pull,
        value_mean=math.sqrt(_mean_of_squares(squares, variances, v.shape[-1])),
        value_sd=math.sqrt(float(np.mean(variances))),
        scale=factor,
        head_dim=query.shape[3],
        value_dim=v.shape[-1],
        inputs=inputs,
    )


def _head(query: Any, key: Any, value: Any, scale: float) -> tuple[Float64, ...]:
    """Of each row [T]: mean, sd, peaks, products, pull, tail and lift; and of V the square of its
    mean beside the square that chance alone gives, [T, 2], and its variance."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    s = scale * q @ k.T
    mean, sd, top = s.mean(1), s.std(1), s.max(1)
    products = scale * np.sqrt(q**2 @ np.mean(k**2, axis=0))
    flat = sd <= 1e-9 * (1 + np.abs(mean))
    sd = np.where(flat, 0.0, sd)
    spread = np.where(flat, 1.0, sd)
    expected = -ndtri(-np.expm1(-np.exp(-np.euler_gamma) / s.shape[1]))  # mean of the largest
    tail = np.where(flat, 1.0, (top - mean) / (spread * expected))
    p = np.exp(s - top[:, None])
    model = _log_weight(mean, sd, top, (top - mean) / spread / np.mean(tail))
    rest = np.maximum(p.sum(1) - 1, 1e-300) / max(s.shape[1] - 1, 1)
    lift = np.where(flat | (s.shape[1] == 1), 0.0, np.log(rest) - model)
    w = p / p.sum(1, keepdims=True)
    o, share = w @ v, np.sum(w**2, axis=1)
    pull = scale * np.sqrt(np.sum((q * (w @ k)) ** 2, axis=1))
    variance = np.maximum(w @ v**2 - o**2, 0).mean(1) / np.maximum(1 - share, 1e-3)
    square = np.mean(o**2, axis=1)
    noise = share * variance
    whole = np.maximum.accumulate(s, axis=1)[:, EVERY - 1 :: EVERY]
    peaks = (whole - mean[:, None]) / spread[:, None]
    return mean, sd, peaks, products, pull, tail, lift, np.stack([square, noise], 1), variance


def _mean_of_squares(squares: Float64, variances: Float64, dim: int) -> float:
    square, noise = squares.mean(0)
    excess = float(square - noise)
    return excess if excess > 4 * math.sqrt(2 / dim) * noise else 0.0


def _log_weight(mean: Float64, sd: Float64, m: Float64, z: Float64, power: int = 1) -> Float64:
    """log E exp(power·(s - m)) of a normal score s that does not exceed m, z sd above the mean."""
    tilt = power * sd
    cut = log_ndtr(z - tilt) - log_ndtr(z)
    return power * (mean - m) + tilt**2 / 2 + np.where(sd > 0, cut, 0.0)


def weights(moments: Moments, m: Float64, z: Float64, power: int = 1) -> Float64:
    """F0: E exp(power·(s - m)) over keys that score less than the row's maximum.

    m, z: [..., rows]: the reference, and how many sd the row's maximum lies above its mean.
    """
    log = _log_weight(moments.mean, moments.sd, m, z / moments.tail, power)
    return np.exp(log + power * moments.lift)


def largest_score(moments: Moments, count: float, uniform: Float64) -> Float64:
    """How many sd above the mean the largest of `count` scores lies, at a quantile `uniform`."""
    return -moments.tail * ndtri(-np.expm1(np.log(uniform) / count))
