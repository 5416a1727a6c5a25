"""predict: the error of a recipe against context length, term by term, without running it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxattn.block_rules import block_size
from jaxattn.fields import FOLLOWS, SITES
from jaxattn.formats import FLOAT32, TO_NAN, TOWARD_ZERO, holds
from jaxattn.recipe import Recipe
from jaxattn.theory.moments import Moments
from jaxattn.theory.roundings import bound_likely, bound_worst, known
from jaxattn.theory.rows import Rows

Float64 = NDArray[np.float64]

COARSE = 5  # bits of significand; after such a rounding p has few values, and another is no chance
TERMS = ("sum", "output", "probs", "scores", "rescale", "inverse", "result")


class Prediction(NamedTuple):
    """What the theory expects of a recipe, float64 [contexts] unless said otherwise.

    A "median" is over rows, as a measured one; relative L2 is that of the output.

    contexts, kv_block: int
    size:        median of l
    drift:       median of l's mean relative error over rounding, signed (F2, F4)
    spread:      median of its standard deviation (F3)
    output_drift: likewise of o, along itself (F5)
    terms:       name of TERMS -> median relative L2 if that alone were rounded
    rel_l2:      median relative L2 of all together; inf where half of the o overflow, 1 of the l
    bias_l:      median of |relative error of exp(log-sum-exp)|
    underflow:   median share of l whose p is rounded to zero (F9)
    stagnated, overflow: share of rows whose l has lost 1 % to updates that moved nothing; whose l
                 or o is infinite
    bound_worst, bound_likely: of l's relative error, for its number of roundings (F11)
    outside:     why the theory says nothing (all else is nan then); empty where it does
    """

    contexts: NDArray[np.int64]
    kv_block: NDArray[np.int64]
    size: Float64
    drift: Float64
    spread: Float64
    output_drift: Float64
    terms: dict[str, Float64]
    rel_l2: Float64
    bias_l: Float64
    underflow: Float64
    stagnated: Float64
    overflow: Float64
    bound_worst: Float64
    bound_likely: Float64
    outside: str = ""

    @property
    def nmse(self) -> Float64:
        """Median of the normalised mean squared error."""
        return self.rel_l2**2

    @property
    def events(self) -> dict[str, int | None]:
        """The first context at which half of the rows stagnate, or overflow; None if none does."""
        found: dict[str, int | None] = {}
        for name, share in (("stagnation", self.stagnated), ("overflow", self.overflow)):
            past = np.flatnonzero(share >= 0.5)
            found[name] = int(self.contexts[past[0]]) if past.size else None
        return found


def predict(recipe: Recipe, moments: Moments, contexts: Sequence[int]) -> Prediction:
    """The error of `recipe` on inputs of these moments at each of `contexts`, ascending.

    Measured against error_curves (`python -m sweeps run theory`) it is within a quarter almost
    everywhere, but too small for l where a few keys hold most of the weight (scores of sd 4 nats,
    long contexts: by up to 5 times once most blocks add less than half an ulp), and for an o of
    non-zero mean that is rounded at every key (ggml-cpu-decode: by 1.5 to 8 times).

    Raises ValueError for contexts that are not positive and ascending.
    """
    lengths = [int(n) for n in contexts]
    if not lengths or lengths[0] < 1 or sorted(set(lengths)) != lengths:
        raise ValueError(f"contexts must be positive, ascending and different, got {contexts!r}")
    sizes = (moments.head_dim, moments.value_dim)
    blocks = np.array([block_size(recipe.kv_block, n, *sizes) for n in lengths])
    why = outside(recipe)
    columns = {name: np.full(len(lengths), np.nan) for name in (*_COLUMNS, *TERMS)}
    for block in () if why else dict.fromkeys(blocks.tolist()):
        at = np.flatnonzero(blocks == block)
        rows = Rows(recipe, moments, block, [lengths[i] for i in at])
        for place, i in enumerate(at):
            for name, number in rows.at(place).items():
                columns[name][i] = number
    terms = {name: columns.pop(name) for name in TERMS}
    steps = np.ceil(np.array(lengths) / blocks)
    columns["bound_worst"] = bound_worst(steps, recipe.running_sum)
    columns["bound_likely"] = bound_likely(steps, recipe.running_sum)
    return Prediction(np.array(lengths), blocks, terms=terms, outside=why, **columns)


_COLUMNS = (
    "size",
    "drift",
    "spread",
    "output_drift",
    "rel_l2",
    "bias_l",
    "underflow",
    "stagnated",
    "overflow",
)


def outside(recipe: Recipe) -> str:
    """Why the theory does not cover a recipe; empty if it does.

    It knows rounding to nearest even, and toward zero; sums of l and o by the block, of which one
    may round toward zero; matrix products in float32; exponentials that are correctly rounded.
    """
    for site in SITES:
        if not known(getattr(recipe, site)):
            return f"{site} rounds neither to nearest even nor toward zero"
    for site in ("qk_accum", "pv_accum"):
        if not holds(getattr(recipe, site), FLOAT32):
            return f"{site} is narrow: sums inside a product are not predicted"
    if recipe.exp not in ("exp", "exp2"):
        return f"exp={recipe.exp!r} has an error of its own"
    if recipe.query_group or recipe.key_group or recipe.key_shift:
        return "inputs are scaled or shifted by groups"
    narrow = [x for x in ("output", "rescaled_output", "inverse") if getattr(recipe, x) != FLOAT32]
    if recipe.summation != "plain" or recipe.flush_every is not None:
        return "sums that are compensated or flushed are not predicted"
    down = [x for x in SITES if getattr(recipe, x).rounding == TOWARD_ZERO]
    if {"running_sum", "rescaled_sum"} & set(down) and {"output", "rescaled_output"} & set(down):
        return "l and o both round toward zero: how much of their drift cancels is not predicted"
    for site in ("difference", "exponent"):
        if getattr(recipe, site).overflow == TO_NAN:
            return f"{site} has no infinity, as m before the first key is"
    coarse = [
        x
        for x in ("scaled_query", "scale", "scores", "difference", "exponent", "probs", "summand")
        if getattr(recipe, x).precision <= COARSE
        and not (x in FOLLOWS and getattr(recipe, x) == getattr(recipe, FOLLOWS[x]))
    ]
    if len(coarse) > 1:
        return f"{coarse[0]} and {coarse[1]} have {COARSE} bits at most: their roundings depend"
    if recipe.normalise == "blocks" and narrow:
        return f"normalise='blocks' with {narrow[0]} rounded at every block"
    return ""
