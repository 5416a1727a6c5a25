"""What one rounding does, and what n of them do to a sum: the closed forms.

u = 2^-t is a format's unit roundoff, t its precision; c is what one KV block adds to a sum; the ulp
of a binade is the step between neighbouring numbers in it. NumPy in float64.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from jaxattn.formats import NEAREST_EVEN, SATURATE, TOWARD_ZERO, Format, largest

Float64 = NDArray[np.float64]

# (relative error of a rounding to nearest)^2 in units of u^2, and what one toward zero takes in
# units of u, over significands that Benford's law spreads
BENFORD = 1 / (8 * math.log(2))
TAKEN = 1 / (2 * math.log(2))
SMOOTH, SHARP, HARMONICS = 0.8, 0.15, 5  # sd / ulp: no drift above, a single step below


def known(format: Format) -> bool:
    """Whether the theory knows the format's rounding: to nearest even, or toward zero."""
    return format.rounding in (NEAREST_EVEN, TOWARD_ZERO)


def ulp(x: ArrayLike, format: Format) -> Float64:
    """The step between numbers of `format` around x, below the normal range that of subnormals."""
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.where(np.equal(x, 0), format.emin, np.maximum(exponent, format.emin))
    return np.ldexp(1.0, exponent - format.precision + 1)


def overflow(format: Format) -> float:
    """F1: the least magnitude that rounds to infinity; inf where none does."""
    if format.rounding != NEAREST_EVEN or format.overflow == SATURATE:
        return math.inf
    top = largest(format)
    return top + float(ulp(top, format)) / 2


def rounded(x: ArrayLike, format: Format) -> Float64:
    """x rounded to a format that is `known`, in float64."""
    x = np.asarray(x, np.float64)
    step = ulp(x, format)
    y = step * (np.rint(x / step) if format.rounding == NEAREST_EVEN else np.trunc(x / step))
    if not format.subnormals:
        y = np.where(np.abs(y) < 2.0**format.emin, 0.0, y)
    top = largest(format)
    past = np.inf if format.rounding == NEAREST_EVEN and format.overflow != SATURATE else top
    return np.where(np.abs(y) > top, np.copysign(past, x), y)


def error_moments(
    mean: ArrayLike, sd: ArrayLike, step: ArrayLike, format: Format
) -> tuple[Float64, Float64]:
    """Mean and variance of round(x) - x for x ~ N(mean, sd^2), x >= 0, on the grid of `step`.

    A sum that is a multiple of the step errs so when x is added to it. Where sd is small against
    the step, every x goes the same way and the mean is the drift of equal blocks; where it is not,
    the mean vanishes like exp(-2 (pi sd / step)^2), as in dithering, and the variance is step^2/12.
    """
    mean, sd, step = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (mean, sd, step)))
    down = format.rounding == TOWARD_ZERO
    x, t = np.asarray(mean / step - 0.5 * down), np.asarray(sd / step)
    bias, square = np.zeros_like(x), np.full_like(x, 1 / 12)
    waves = (t >= SHARP) & (t < SMOOTH)
    for j in range(1, HARMONICS + 1) if waves.any() else ():
        share = (-1) ** j / (np.pi * j) * np.exp(-2 * (np.pi * j * t[waves]) ** 2)
        bias[waves] += share * np.sin(2 * np.pi * j * x[waves])
        square[waves] += share / (np.pi * j) * np.cos(2 * np.pi * j * x[waves])
    variance = np.asarray(square - bias**2)
    sharp = t < SHARP
    if sharp.any():
        bias[sharp], variance[sharp] = _one_step(x[sharp], t[sharp], down)
    return step * (bias - 0.5 * down), step**2 * np.maximum(variance, 0)


def _one_step(x: Float64, t: Float64, down: bool) -> tuple[Float64, Float64]:
    """Mean and variance of rint(x) - x, x ~ N(x, t^2), where one boundary at most is near."""
    low = np.floor(x)
    over = x - low - 0.5  # past the boundary between low and low + 1
    tie = np.ones_like(low) if down else low % 2  # toward zero, x is an integer there
    sure = np.where(over == 0, tie, over > 0)
    z = np.divide(over, t, out=np.zeros_like(over), where=t > 0)
    up = np.where(t > 0, ndtr(z), sure)
    density = np.where(t > 0, np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), 0)
    return low + up - x, up * (1 - up) + t**2 - 2 * t * density


def dithered(x: ArrayLike, format: Format) -> tuple[Float64, Float64]:
    """Mean and variance of round(y) - y for any y near x, where it may lie between two numbers."""
    step = ulp(x, format)
    down = format.rounding == TOWARD_ZERO
    return -0.5 * step * np.sign(x) * down, step**2 / 12


def relative(format: Format) -> tuple[float, float]:
    """Mean and variance of round(x) / x - 1, over significands that Benford's law spreads."""
    u = 2.0**-format.precision
    if format.rounding == NEAREST_EVEN:
        return 0.0, BENFORD * u**2
    return -TAKEN * u, (4 * BENFORD - TAKEN**2) * u**2


def stagnation(c: ArrayLike, format: Format) -> Float64:
    """F4: where a sum of equal blocks c stops; inf where it overflows first.

    To nearest 2^(t + K), K = log2 c for a power of two (a tie, to even), else its floor plus 1;
    toward zero half of it, for the next power of two: as soon as c is below the ulp.
    """
    if not known(format):
        raise ValueError(f"stagnation is known to nearest even and toward zero, got {format}")
    fraction, exponent = np.frexp(np.asarray(c, np.float64))
    if format.rounding == NEAREST_EVEN:
        power = format.precision + exponent - (fraction == 0.5)
    else:
        power = format.precision + exponent - 1
    end = np.ldexp(1.0, power)
    return np.where(end >= overflow(format), np.inf, end)


def drift(c: float, blocks: int, format: Format) -> float:
    """F2: relative error of a sum of `blocks` equal blocks c.

    In a binade of ulp q each adds c rounded to q, and the sum spends as many blocks there as the
    computed sum takes.
    """
    if not known(format):
        raise ValueError(f"drift is known to nearest even and toward zero, got {format}")
    whole = round if format.rounding == NEAREST_EVEN else math.floor  # halves to even
    exact = Fraction(float(c))
    exponent = math.frexp(float(c))[1] - 1
    total, left = Fraction(0), blocks
    while left:
        step = Fraction(2) ** (exponent - format.precision + 1)
        gain = whole(exact / step) * step
        if gain == 0:
            break
        stay = min(left, max(0, math.ceil((Fraction(2) ** (exponent + 1) - total) / gain)))
        total, left, exponent = total + stay * gain, left - stay, exponent + 1
    return float(total / (exact * blocks) - 1)


def spread(l: ArrayLike, blocks: ArrayLike, format: Format) -> Float64:
    """F3: sd of the relative error of a sum l of `blocks` random blocks, rounded to nearest.

    The sum over blocks of ulp^2 / 12: u sqrt(n) sqrt((4 (x - 1) + 4/7) / (12 x^3)), l = x 2^e.
    """
    x = 2 * np.frexp(l)[0]
    square = np.asarray(blocks) * (4 * (x - 1) + 4 / 7) / (12 * x**3)
    return 2.0**-format.precision * np.sqrt(square)


def bound_worst(n: ArrayLike, format: Format) -> Float64:
    """gamma_n = n u / (1 - n u): no sum of n positive numbers errs more; inf where n u >= 1."""
    product = np.asarray(n, np.float64) * unit(format)
    return np.where(product < 1, product / np.where(product < 1, 1 - product, 1), np.inf)


def bound_likely(n: ArrayLike, format: Format, confidence: float = 3.0) -> Float64:
    """F11: exp(confidence sqrt(n) u + n u^2 / (1 - u)) - 1, of independent mean-zero errors
    (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Equal blocks break its assumption: `drift`."""
    u, n = unit(format), np.asarray(n, np.float64)
    return np.expm1(confidence * np.sqrt(n) * u + n * u**2 / (1 - u))


def unit(format: Format) -> float:
    """The largest relative error of one rounding: u to nearest, 2u in any other mode."""
    return 2.0 ** -(format.precision - (format.rounding != NEAREST_EVEN))
