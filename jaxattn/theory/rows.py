"""What becomes of the rows of one block size: all errors together, as medians over rows."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from jaxattn.formats import holds
from jaxattn.recipe import Recipe
from jaxattn.theory.elements import Elements, elements, inexact
from jaxattn.theory.medians import median, safe
from jaxattn.theory.moments import Moments
from jaxattn.theory.paths import Path, history, path
from jaxattn.theory.roundings import error_moments, overflow, rounded, ulp
from jaxattn.theory.walks import Walk, walk

Float64 = NDArray[np.float64]

ROWS, FEW = 256, 64
COORDINATES = 64
STAGNATED = 0.01  # share of l's weight lost, as errors.py counts it


class Rows:
    """Rows of one block size: walks of l and o over all contexts, and what becomes of each."""

    def __init__(self, recipe: Recipe, moments: Moments, block: int, contexts: list[int]) -> None:
        self.recipe, self.moments, self.contexts, self.block = recipe, moments, contexts, block
        self.rows = ROWS if moments.sd.any() else 1
        splits = recipe.split_kv
        each = [max(1, -(-n // splits)) for n in contexts]
        way = path(recipe, moments, block, each, self.rows)
        self.l = _sum_of_weights(recipe, way, each)
        self.past = [history(way, each, factor, splits) for factor in ("a_l", "a_o")]
        step = recipe.output_every
        # Where it is the rescaled o that is narrow, it is so once a block.
        if step and step != block and holds(recipe.rescaled_output, recipe.output):
            way = path(recipe, moments, step, each, self.rows)
        if not moments.value_mean:  # then o's error goes its own way, alike in all rows
            way = way.some(min(FEW, self.rows))
        self.pick = np.arange(self.rows) % way.rows
        self.o = _output(recipe, moments, way, each)
        self.value = inexact(recipe.value, moments.inputs[2])[0]

    def at(self, place: int) -> dict[str, float]:
        """Every column of a Prediction at one context."""
        recipe, moments = self.recipe, self.moments
        few = elements(recipe, moments, self.contexts[place], min(FEW, self.rows))
        e = Elements(*(np.resize(x, self.rows) for x in few))
        true = self.l.true[place, :, 0]
        drift = self.l.mean[place, :, 0] / true
        spread = self.l.variance[place, :, 0] / true**2 / recipe.split_kv
        cumulant = self.l.fourth[place, :, 0] / true**4 / recipe.split_kv**3
        size2 = moments.value_mean**2 + moments.value_sd**2 * e.share  # |o|^2 / D
        loose = moments.value_sd**2 / safe(size2)
        fixed = moments.value_mean**2 / safe(size2)

        along, square = self._output_error(place)
        past, of_o = (x.mean[place] for x in self.past)
        kept = (1 + drift) * (1 + e.weight) * (1 + past)  # of l: what is left of it divides o
        y = 1 / safe(true * kept)
        y = rounded(y, recipe.inverse) if recipe.normalise == "multiply" else y
        inverse = true * kept * y - 1
        taken, out = self._result_error(e, size2)
        if holds(recipe.result, recipe.output) and recipe.normalise == "multiply":
            exact = np.frexp(y)[0] == 0.5  # o times a power of two
            taken, out = np.where(exact, 0.0, taken), np.where(exact, 0.0, out)
        probs = e.probs * loose
        scores = (e.scores + e.value) * loose
        late = self.past[1].scatter[place] * e.share * loose
        loose_o = square - along**2
        certain = (1 + e.bias) / (1 + e.weight) - 1
        moved = (1 + of_o) / (1 + past) - 1
        value = self.value
        scalar = (1 + along) * (1 + inverse) * (1 + certain) * (1 + moved) * (1 + value)
        scalar = scalar * (1 + taken) / (1 + drift) - 1
        of_probs = e.along * fixed + e.apart
        noise = spread / (1 + drift) ** 2 + of_probs
        across = loose_o / (1 + drift) ** 2 + probs + scores + late + out
        l_finite = self.l.finite[place, :, 0]
        o_finite = self.o.finite[place, self.pick].all(axis=1)
        if recipe.normalise not in ("blocks", "before"):
            furthest = moments.value_mean + _reach(moments) * moments.value_sd * np.sqrt(e.share)
            o_finite = o_finite & (furthest * e.l < overflow(recipe.final_output))
        l_noise = spread + e.apart + e.jitter
        zero = np.zeros(self.rows)
        terms = {
            "sum": median(
                1 / (1 + drift) - 1,
                spread / (1 + drift) ** 2,
                zero,
                kurtosis=cumulant / safe(spread**2),
            ),
            "output": median(along, zero, loose_o),
            "probs": median(certain, of_probs, probs),
            "scores": median(zero + value, zero, scores),
            "rescale": median(moved, zero, late),
            "inverse": median(inverse, zero, zero),
            "result": median(taken, zero, out),
        }
        # o over an infinite l is 0, an error of all of it.
        total = median(
            np.where(l_finite, scalar, -1.0),
            np.where(l_finite, noise, 0.0),
            np.where(l_finite, across, 0.0),
            kurtosis=cumulant / safe(noise**2),
            finite=o_finite,
        )
        bias_l = median(
            kept * (1 + e.shift) - 1,
            l_noise,
            zero,
            kurtosis=cumulant / safe(l_noise**2),
            finite=l_finite,
        )
        return terms | {
            "size": float(np.median(true)),
            "drift": float(np.median(drift)),
            "spread": float(np.median(np.sqrt(spread))),
            "output_drift": float(np.median(along)),
            "rel_l2": total,
            "bias_l": bias_l,
            "underflow": float(np.median(e.underflow)),
            "stagnated": float(np.mean(self.l.lost[place] > STAGNATED)),
            "overflow": float(np.mean(~(l_finite & o_finite))),
        }

    def _output_error(self, place: int) -> tuple[Float64, Float64]:
        """Of o's rounding, relative to o: mean along it, and mean square, [rows]."""
        share = _nodes(self.moments)[1]
        true, error, variance = (x[place] for x in self.o[:3])
        splits = self.recipe.split_kv

        def whole(x: Float64, y: Float64) -> Float64:
            """x·y of the mean over chunks: what all coordinates of a chunk have is so in every
            chunk, and what scatters from one to another does so from chunk to chunk."""
            means = (x @ share) * (y @ share)
            return means + ((x * y) @ share - means) / splits

        norm = safe(whole(true, true))
        square = whole(error, error) + variance @ share / splits
        return (whole(error, true) / norm)[self.pick], (square / norm)[self.pick]

    def _result_error(self, e: Elements, size2: Float64) -> tuple[Float64, Float64]:
        """Of the result's own rounding and of that of the o that is handed over: mean relative
        error along o, and mean square of the rest."""
        z = ndtri((np.arange(COORDINATES) + 0.5) / COORDINATES)
        apart = math.sqrt(2 * math.pi / 12) * np.exp(z**2 / 2) / COORDINATES  # sd about a z
        sd = self.moments.value_sd * np.sqrt(e.share)[:, None]
        o = self.moments.value_mean + sd * z
        kept = self.recipe.normalise in ("blocks", "before")  # as o / l
        l = 1.0 if kept else e.l[:, None]
        error, variance = np.zeros_like(o), np.zeros_like(o)
        for unit, format in ((1.0, self.recipe.result), (l, self.recipe.final_output)):
            size, step = np.abs(o) * unit, ulp(o * unit, format)
            bias, square = error_moments(size, sd * apart * unit, step, format)
            error, variance = error + np.sign(o) * bias / unit, variance + square / unit**2
        along = np.mean(error * o, axis=1) / safe(size2)
        square = np.mean(error**2 + variance, axis=1) / safe(size2)
        return along, square - along**2


def _sum_of_weights(recipe: Recipe, way: Path, contexts: list[int]) -> Walk:
    return walk(way, contexts, recipe.running_sum, recipe.rescaled_sum, summand=recipe.row_sum)


def _output(recipe: Recipe, moments: Moments, way: Path, contexts: list[int]) -> Walk:
    return walk(
        way,
        contexts,
        recipe.output,
        recipe.rescaled_output,
        mean=moments.value_mean,
        sd=moments.value_sd,
        nodes=_nodes(moments)[0],
        reach=_reach(moments),
    )


def _reach(moments: Moments) -> float:
    """How many sd above the mean the largest of o's coordinates lies."""
    return float(ndtri(1 - 0.5 / moments.value_dim)) if moments.value_dim > 1 else 0.0


def _nodes(moments: Moments) -> tuple[Float64, Float64]:
    """Where coordinates of o lie, in their sd about the mean, and how many of them."""
    z, share = np.polynomial.hermite_e.hermegauss(4 if moments.value_mean else 8)
    return z, share / share.sum()
