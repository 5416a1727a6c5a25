"""Recipes of real kernels, by name. A module is a family: tables and citations, no arithmetic."""

from jaxattn.formats import unknown
from jaxattn.kernels import ggml_cpu, hexagon, ideal, metal
from jaxattn.recipe import Recipe

_FAMILIES = (ideal, hexagon, metal, ggml_cpu)
_RECIPES = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}


def names() -> list[str]:
    """The names of all recipes, family by family."""
    return list(_RECIPES)


def get(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest names if there is none."""
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    return _RECIPES[name]
