"""Lanes: recipes that agree on everything a quantity depends on compute it once.

`weave` gives each quantity of the online softmax one leading axis of its distinct lanes. One recipe
is lanes of length one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.exponentials import EXPONENTIALS, LOG2E
from jaxattn.fields import NUMBERS, SITES
from jaxattn.formats import FLOAT16, FLOAT32, FLOAT64, STOCHASTIC, Format, holds
from jaxattn.recipe import Recipe
from jaxattn.rounding import (
    common,
    round_to,
    round_to_common,
    round_to_half,
    round_to_half_or_not,
    unrounded,
)

Traced = dict[str, dict[str, Any]]
_SITE_NUMBER = {site: number for number, site in enumerate(SITES)}
_SITE_NUMBER["summand"] = _SITE_NUMBER["probs"]  # what is summed is what is multiplied: one draw

# What a sink at the end meets again of what m, l and o have met: no lane more.
_SINK = (
    *("running_max", "difference", "rescale", "output_rescale", "rescale_flush"),
    *("rescaled_sum", "running_sum", "rescaled_output"),
)

_BY_PRECISION = {"not": unrounded, "half": round_to_half, "half or not": round_to_half_or_not}

# quantity -> (what of the recipe it reads itself, the quantities it reads)
QUANTITIES: dict[str, tuple[tuple[str, ...], str]] = {
    "q": (("query",), ""),
    "k": (("key", "key_shift", "shift"), ""),
    "v": (("value",), ""),
    "d": (("qk_accum",), "qk"),
    "s": (
        (
            *("scale", "cap", "scores", "squashed", "softcap", "bias"),
            *("mask_value", "mask_below", "bias_factor", "key_shift", "shift"),
        ),
        "d",
    ),
    "m": (("running_max", "initial_max", "max_offset", "max_step", "lazy_threshold"), "s"),
    "e": (("seen_max", "difference", "log2e", "exponent"), "sm"),
    "p": (("probs",), "e"),
    "t": (("summand",), "e"),
    "r": (("row_sum",), "t"),
    "a": (("difference", "log2e", "exponent", "rescale", "rescale_flush"), "m"),
    "b": (("output_rescale",), "a"),
    "l": (("rescaled_sum", "running_sum"), "ra"),
    "w": (("pv_accum",), "pv"),
    "o": (("rescaled_output", "output"), "wb"),
    "y": ((*_SINK, "final_output", "inverse", "result", "empty_inverse"), "mlo"),
}


def quantities(structure: "Structure") -> dict[str, tuple[tuple[str, ...], str]]:
    """QUANTITIES of recipes of this structure, each after what it reads."""
    table = dict(QUANTITIES)
    if structure.scale_at == "query":
        table["q"] = (("query", "scale", "scaled_query", "log2e"), "")
    if structure.normalise == "blocks":
        table["o"] = ((*QUANTITIES["o"][0], "inverse"), "wbl")
    if structure.normalise == "before":
        del table["p"]
        order = list(table)
        order.insert(order.index("r") + 1, "p")
        table["p"] = (QUANTITIES["p"][0], "tr")
        table = {quantity: table[quantity] for quantity in order}
    return table


# Products that an addition follows always pass through rounding.py, so that no compiler contracts
# the two into one FMA in one company of recipes and not in another; "product" is such a product of
# l, o or y that no kernel rounds.
_PRODUCTS = {"shift", "scores", "exponent", "rescaled_sum", "rescaled_output"}


class Structure(NamedTuple):
    """What recipes must share to run together: what is neither format nor number, and whether
    the running max is lazy, keys are shifted and the accumulators inside the products narrow."""

    exp: str
    rescale_exp: str
    log2e_at: str
    scale_at: str
    cap_at: str
    tanh: str
    sinks: str
    summation: str
    normalise: str
    kv_order: str
    storage: str
    kv_block: int | str
    output_every: int | None
    flush_every: int | None
    qk_chunk: int | None
    qk_promote: int | None
    qk_partials: int
    qk_tree: int
    pv_chunk: int | None
    query_group: int | None
    key_group: int | None
    split_kv: int
    seed: int
    lazy: bool
    shifts: bool
    narrow_qk: bool
    narrow_pv: bool

    @property
    def log2e(self) -> bool:
        """Whether the exponential is one of base 2."""
        return EXPONENTIALS[self.exp][1] == 2

    @property
    def base_2(self) -> bool:
        """Whether scores carry log2(e), and so m too."""
        return self.log2e and self.log2e_at != "exponent"


def structure_of(recipe: Recipe) -> Structure:
    whole = FLOAT64 if recipe.storage == "float64" else FLOAT32
    fields = {name: getattr(recipe, name) for name in Structure._fields if hasattr(recipe, name)}
    return Structure(
        **fields,
        lazy=recipe.lazy_threshold != 0,
        shifts=recipe.key_shift != 0,
        narrow_qk=_rounds(recipe.qk_accum, whole),
        narrow_pv=_rounds(recipe.pv_accum, whole),
    )


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The static half of woven recipes, hashable; the traced half is a dict of formats and numbers.

    parents: (child, parent) -> the parent's lane that each lane of the child reads
    recipes: the lane of y that each recipe reads
    ways:    how values are rounded at each site where a lane rounds (see `_way`), and at those of
             products before a sum; the others are left out of the computation
    """

    structure: Structure
    parents: tuple[tuple[str, tuple[int, ...]], ...]
    recipes: tuple[int, ...]
    ways: tuple[tuple[str, str], ...]
    stochastic: frozenset[str]
    sums_probs: bool

    def take(
        self, child: str, parent: str, x: jax.Array, some: jax.Array | None = None
    ) -> jax.Array:
        """x [lanes of parent, ...] as the lanes of `child` read it (or still one lane for all).

        some: int [n], lanes of `child`; all of them by default
        """
        index = dict(self.parents)[child + parent]
        if x.shape[0] == 1 or (some is None and index == tuple(range(x.shape[0]))):
            return x
        return x[np.array(index) if some is None else jnp.array(index, jnp.int32)[some]]

    @functools.cached_property
    def way(self) -> dict[str, str]:
        return dict(self.ways)

    def count(self, quantity: str) -> int:
        return next(len(index) for pair, index in self.parents if pair[0] == quantity)

    @property
    def base_2(self) -> bool:
        return self.structure.base_2

    @property
    def log2e(self) -> bool:
        return self.structure.log2e


def weave(
    recipes: Sequence[Recipe],
    query: Format = FLOAT32,
    key: Format = FLOAT32,
    value: Format = FLOAT32,
) -> tuple[Lanes, dict[str, dict[str, Any]]]:
    """Recipes of one structure as lanes: (static Lanes, traced {quantity: {site or number: ...}}).

    query, key, value: the formats of the inputs' dtypes, which need no rounding to a wider one.
    """
    structure = structure_of(recipes[0])
    if any(structure_of(recipe) != structure for recipe in recipes):
        raise ValueError("recipes of different structure cannot share lanes; group them first")
    lane: dict[str, list[int]] = {}  # quantity -> the lane of each recipe
    parents: dict[str, tuple[int, ...]] = {}
    traced: dict[str, dict[str, Any]] = {}
    whole = FLOAT64 if structure.storage == "float64" else FLOAT32
    for quantity, (own, reads) in quantities(structure).items():
        ids = [
            (*(getattr(recipe, name) for name in own), *(lane[parent][i] for parent in reads))
            for i, recipe in enumerate(recipes)
        ]
        distinct = list(dict.fromkeys(ids))
        lane[quantity] = [distinct.index(id) for id in ids]
        for j, parent in enumerate(reads):
            parents[quantity + parent] = tuple(id[len(own) + j] for id in distinct)
        parents.setdefault(quantity, tuple(range(len(distinct))))
        traced[quantity] = {
            name: _stack(name, [id[j] for id in distinct]) for j, name in enumerate(own)
        }
        if quantity in "loy":
            traced[quantity]["product"] = _stack("product", [whole] * len(distinct))
    if structure.base_2:
        factors = traced["s"]["bias_factor"] * LOG2E
        traced["s"]["bias_factor"] = factors.astype(np.float32).astype(np.float64)
    # Inputs that a format holds need no rounding to it; a shifted key is no input any more.
    inputs = {"query": query, "key": key, "value": value}
    if structure.shifts:
        inputs["key"] = whole
    ways = {}
    for site in SITES:
        formats = {getattr(recipe, site) for recipe in recipes}
        if any(_rounds(format, inputs.get(site, whole)) for format in formats):
            ways[site] = _way(formats, structure.storage)
        elif site in _PRODUCTS:
            ways[site] = "not"
    ways["product"] = "not"
    return (
        Lanes(
            structure=structure,
            parents=tuple(parents.items()),
            recipes=tuple(lane["y"]),
            ways=tuple(ways.items()),
            stochastic=frozenset(
                site
                for site in SITES
                for recipe in recipes
                if getattr(recipe, site).rounding == STOCHASTIC
            ),
            sums_probs=all(recipe.summand == recipe.probs for recipe in recipes),
        ),
        traced,
    )


def _rounds(format: Format, stored: Format) -> bool:
    return not holds(format, stored)


def _way(formats: set[Format], storage: str) -> str:
    """The cheapest of `rounder`'s ways that rounds to all of these formats."""
    if storage == "float64":
        return "any"
    if formats == {FLOAT16}:
        return "half"
    if formats == {FLOAT16, FLOAT32}:
        return "half or not"
    return "common" if all(map(common, formats)) else "any"


def _stack(name: str, values: list[Any]) -> Any:
    if name in NUMBERS:
        return np.array(values, np.float64)
    return np.array(values, np.int32)  # [lanes, fields of a Format]: one array is dispatched fast


def random_keys(lanes: Lanes, tile: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """PRNG keys of this shape for the tile of that number, if a site rounds stochastically."""
    if not lanes.stochastic:
        return None
    key = jax.random.fold_in(jax.random.key(lanes.structure.seed), tile)
    return jax.random.split(key, shape)


def rounder(lanes: Lanes, f: Traced, key: jax.Array | None = None) -> Any:
    """round(quantity, site, x): x [lanes of quantity, ...] rounded at the site, if a lane does."""

    def round(quantity: str, site: str, x: jax.Array) -> jax.Array:
        way = lanes.way.get(site)
        if way is None:
            return x
        fields = f[quantity][site]  # [lanes, fields of a Format]
        if way in _BY_PRECISION:
            return _BY_PRECISION[way](x, fields[:, 0])
        format = Format(*fields.T)
        if way == "common":
            return round_to_common(x, format)
        bits = None
        if site in lanes.stochastic:
            assert key is not None  # whoever walks the keys passes one, see random_keys
            # One draw for all lanes: they are compared on common random numbers.
            bits = jax.random.bits(
                jax.random.fold_in(key, _SITE_NUMBER[site]), (1, *x.shape[1:]), jnp.uint32
            )
        return round_to(x, format, bits)

    return round


def number(f: Traced, quantity: str, name: str, like: jax.Array) -> jax.Array:
    values = jnp.asarray(f[quantity][name], like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
