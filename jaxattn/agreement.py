"""Agreement of two error vectors: a real kernel's and a recipe's, both against float64."""

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """How much of the real kernel's error the recipe explains.

    correlation: of the two error vectors; nan where one is constant or not finite
    unexplained: ||e_real - e_recipe|| / ||e_real||
    nmse_real, nmse_recipe: squared error over squared reference
    rms_ratio:   RMS of the real error over the recipe's
    equal:       share of elements that are the same to the bit
    """

    correlation: float
    unexplained: float
    nmse_real: float
    nmse_recipe: float
    rms_ratio: float
    equal: float


def agreement(truth: np.ndarray, emulated: np.ndarray, reference: np.ndarray) -> Agreement:
    """Of outputs of one shape, float64; a reference that is 0 throughout makes the NMSE inf."""
    e, r, norm = truth - reference, emulated - reference, np.linalg.norm
    size = float(np.sum(reference**2))
    return Agreement(
        correlation(e, r),
        float(norm(e - r) / norm(e)) if norm(e) else float(norm(r) > 0),
        float(np.sum(e**2)) / size if size else float("inf"),
        float(np.sum(r**2)) / size if size else float("inf"),
        float(norm(e) / norm(r)) if norm(r) else float("inf"),
        float(np.mean(truth == emulated)),
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, of all elements; nan where it is not defined."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else float("nan")
