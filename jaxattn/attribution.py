"""Who owes the error: each rounding site's share in it, and what sites do only together.

A game in the sense of Shapley (1953): lift a subset of the sites to float32 and see what error is
left. Sites do not act alone. Errors of l and o cancel in o/l where V has a mean, so that lifting
one of them can make the output worse; no ranking by one site at a time shows that.

What is attributed is NMSE and not its logarithm: squared errors of sites that have nothing to do
with each other add up, so that each owes the same whether it is lifted first or last, and an
interaction that is not zero says something. The shares of all sites add up to nmse(kernel) -
nmse(everything lifted).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxattn.fields import FOLLOWS, SITES
from jaxattn.formats import FLOAT16, FLOAT32, Format, format_of, holds, unknown
from jaxattn.recipe import Recipe

# What the online softmax rounds with every block, and 1/l. m is none of them: the largest of
# float16 scores is a float16 number.
SOFTMAX = (
    *("scores", "difference", "probs", "row_sum"),
    *("rescale", "running_sum", "output", "inverse"),
)
MOST_SITES = 8  # 2^8 recipes run as lanes of one call
LOST = 1.0  # the NMSE of an output that is all zeros: no output counts as more wrong

Array = NDArray[np.float64]


def rounded_sites(recipe: Recipe, lifted: Format | str = FLOAT32) -> tuple[str, ...]:
    """The sites that the recipe rounds to less than `lifted`, those of FOLLOWS with their leader's.

    An intermediate that has the format of the value that it goes into is one site with it.
    """
    lifted = format_of(lifted)
    narrow = [site for site in SITES if not holds(getattr(recipe, site), lifted)]
    return tuple(site for site in narrow if not _follows(recipe, site))


def chosen_sites(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites to attribute a recipe's error to, at most MOST_SITES, and those left beside them.

    Those of SOFTMAX come first, then the others in the order of SITES. Left out is what rounds
    nothing of plain float16 inputs: soft caps, biases, and inputs in formats that hold float16.
    """
    idle = {"cap", "squashed", "softcap", "bias"}
    idle |= {site for site in ("query", "key", "value") if holds(getattr(recipe, site), FLOAT16)}
    found = [site for site in rounded_sites(recipe) if site not in idle]
    ordered = [site for site in SOFTMAX if site in found]
    ordered += [site for site in found if site not in SOFTMAX]
    return tuple(ordered[:MOST_SITES]), tuple(ordered[MOST_SITES:])


def lift(recipe: Recipe, sites: Sequence[str], lifted: Format | str = FLOAT32) -> Recipe:
    """The recipe with these sites in the format `lifted`, as Recipe.replace changes them.

    A site that holds as much already stays as it is.
    """
    format = format_of(lifted)
    changes = {site: format for site in sites if not holds(getattr(recipe, site), format)}
    if not changes:
        return recipe
    return recipe.replace(**changes, name="+".join((recipe.name, *sites)))


def subsets(
    recipe: Recipe, sites: Sequence[str] = SOFTMAX, lifted: Format | str = FLOAT32
) -> list[Recipe]:
    """The recipe with every subset of k sites lifted: 2^k recipes, bit i of their index is site i.

    The first is the kernel, the last has all of them lifted. A site that has nothing to lift (see
    `lift`) makes equal pairs and owes exactly nothing.
    Raises ValueError for an unknown or repeated site, none or more than MOST_SITES, and for a site
    that FOLLOWS another one's format: lifting that one lifts it too, so that the two are one site.
    """
    sites = tuple(sites)
    for site in sites:
        if site not in SITES:
            raise unknown("site", site, SITES)
        if _follows(recipe, site) and FOLLOWS[site] in sites:
            raise ValueError(
                f"sites {site!r} and {FOLLOWS[site]!r} are one in {recipe.name}, which rounds both "
                f"to the same format: leave {site!r} out"
            )
    if not 1 <= len(sites) <= MOST_SITES or len(set(sites)) < len(sites):
        raise ValueError(f"sites must be 1 to {MOST_SITES} different ones, got {sites}")
    return [
        lift(recipe, [site for i, site in enumerate(sites) if subset >> i & 1], lifted)
        for subset in range(2 ** len(sites))
    ]


def _follows(recipe: Recipe, site: str) -> bool:
    leader = FOLLOWS.get(site)
    return leader is not None and getattr(recipe, site) == getattr(recipe, leader) != FLOAT32


class Errors(NamedTuple):
    """The two games of a set of rows: float64 [2^k, ...]; both finite, whatever overflows.

    nmse:     the median over rows, each at most LOST. A median is taken before anything is
              attributed, so that shares add up to what a table of medians shows
    overflow: the share of rows that overflow, which a median hides below one half
    """

    nmse: Array
    overflow: Array


def errors_of(nmse: ArrayLike, overflow: ArrayLike) -> Errors:
    """What is attributed, of nmse and overflow [2^k, ..., rows] (both as in Curves).

    A row that is inf or nan, or more wrong than an output of zeros, counts as LOST.
    """
    lost = np.asarray(overflow, np.float64)
    return Errors(np.median(capped(nmse), axis=-1), lost.mean(axis=-1))


def capped(nmse: ArrayLike) -> Array:
    """NMSE in float64, at most LOST; nan is LOST as well."""
    return np.fmin(np.asarray(nmse, np.float64), LOST)


def interaction_indices(errors: ArrayLike) -> Array:
    """The Shapley interaction index of every subset of k sites in the error that lifting removes.

    errors: [2^k, ...], the error that is left with each subset lifted, as `subsets` counts them.
    Returns float64 [2^k, ...]. Of one site it is its Shapley value: how much error lifting it
    removes, on average over all orders in which the sites may be lifted. Of a pair it is what
    lifting both removes beyond the sum of each: above 0 they are better lifted together, below 0
    one makes up for the other. Of none, the mean that a random number of sites leaves.
    (Grabisch and Roubens, International Journal of Game Theory 28, 1999, 547-565.)
    Raises ValueError where an error is not finite (see `errors_of`) or their number is no 2^k.
    """
    errors = np.asarray(errors, np.float64)
    k = _sites(errors)
    sign = np.where(np.arange(2**k) == 0, 1.0, -1.0).reshape(-1, *(1,) * (errors.ndim - 1))
    return sign * np.tensordot(_weights(k), errors, 1)


def shapley(errors: ArrayLike) -> Array:
    """The error that each site owes, [k, ...]: they sum to errors[0] - errors[-1]. May be < 0."""
    found = interaction_indices(errors)
    return found[_single(_sites(found))]


def interactions(errors: ArrayLike) -> Array:
    """Shapley interaction indices of pairs of sites, [k, k, ...], 0 on the diagonal."""
    found = interaction_indices(errors)
    single = _single(_sites(found))
    pairs = found[single[:, None] | single]
    pairs[np.arange(len(single)), np.arange(len(single))] = 0.0
    return pairs


def lifted_alone(errors: ArrayLike) -> Array:
    """The error that lifting each site alone removes from the kernel's, [k, ...]."""
    errors = np.asarray(errors, np.float64)
    return errors[0] - errors[_single(_sites(errors))]


def lowered_alone(errors: ArrayLike) -> Array:
    """The error that each site adds where all the others are lifted, [k, ...]."""
    errors = np.asarray(errors, np.float64)
    k = _sites(errors)
    return errors[(2**k - 1) ^ _single(k)] - errors[-1]


def _single(k: int) -> NDArray[np.int64]:
    return 1 << np.arange(k)


def _sites(errors: Array) -> int:
    count = errors.shape[0] if errors.ndim else 0
    k = count.bit_length() - 1
    if count < 2 or count != 2**k or k > MOST_SITES:
        raise ValueError(
            f"errors must be [2^k, ...] for 1 to {MOST_SITES} sites, got shape {errors.shape}"
        )
    if not np.isfinite(errors).all():
        raise ValueError(
            "errors must be finite: attribute rows that overflow by their share (errors_of)"
        )
    return k


@functools.cache
def _weights(k: int) -> Array:
    """[2^k, 2^k]: what each subset's value counts in the index of each set of sites.

    I(S) = sum over T of the others of t! (k - s - t)! / (k - s + 1)! times the alternating sum of
    v(T + L) over L in S, whose sign is that of |S - L|.
    """
    weights = np.empty((2**k, 2**k))
    for chosen in range(2**k):
        s = chosen.bit_count()
        for subset in range(2**k):
            t = (subset & ~chosen).bit_count()
            sign = -1 if (chosen & ~subset).bit_count() % 2 else 1
            # integers divide to the nearest float
            over = math.factorial(t) * math.factorial(k - s - t)
            weights[chosen, subset] = sign * over / math.factorial(k - s + 1)
    return weights
