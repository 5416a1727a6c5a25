"""Medians over rows of errors that are part certain, part random."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Float64 = NDArray[np.float64]

DRAWS = 33
ONE_ROUNDING = -0.9  # excess: of a uniform distribution -1.2, of the sum of two -0.6


def safe(x: Float64) -> Float64:
    """x, or 1 where it is 0, to divide by."""
    return np.where(x > 0, x, 1.0)


def median(
    scalar: Float64,
    variance: Float64,
    across: Float64,
    *,
    kurtosis: Float64 | float = 0.0,
    finite: NDArray[np.bool_] | None = None,
) -> float:
    """The median over rows of sqrt((scalar + noise)^2 + across), of noise with this variance.

    kurtosis: the noise's excess; one rounding alone is uniform, and a few are nearly normal.
    """
    z = ndtri((np.arange(DRAWS) + 0.5) / DRAWS)
    uniform = (2 * np.arange(DRAWS) + 1 - DRAWS) / DRAWS * math.sqrt(3)
    excess = np.broadcast_to(kurtosis, scalar.shape)[:, None]
    draws = np.where(excess < ONE_ROUNDING, uniform, z + excess / 24 * (z**3 - 3 * z))
    error = scalar[:, None] + np.sqrt(np.maximum(variance, 0))[:, None] * draws
    square = error**2 + np.maximum(across, 0)[:, None]
    if finite is not None:
        square = np.where(finite[:, None], square, np.inf)
    return math.sqrt(float(np.median(square)))
