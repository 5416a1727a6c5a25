"""Attention without narrow formats: what is left is the storage's own rounding."""

from jaxattn.recipe import SITES, Recipe

FLOAT32 = Recipe(
    name="float32",
    citation="every site in IEEE single precision; no kernel in particular",
    kv_block=64,
)

FLOAT64 = Recipe(
    name="float64",
    citation="every site in IEEE double precision; no kernel in particular, and not the reference",
    kv_block=64,
    **dict.fromkeys(SITES, "float64"),
)

RECIPES = (FLOAT32, FLOAT64)
