"""Attention without narrow formats: what is left is the storage's own rounding."""

from jaxattn.fields import SITES
from jaxattn.recipe import Recipe

SINGLE = Recipe(
    name="float32",
    citation="every site in IEEE single precision; no kernel in particular",
    kv_block=64,
)

DOUBLE = SINGLE.replace(
    name="float64",
    citation="every site in IEEE double precision; no kernel in particular, and not the reference",
    **dict.fromkeys(SITES, "float64"),
)

RECIPES = (SINGLE, DOUBLE)
