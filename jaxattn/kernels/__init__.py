"""Recipes of real kernels, by name. A module is a family: tables and citations, no arithmetic."""

from types import ModuleType

from jaxattn.formats import unknown
from jaxattn.kernels import (
    flash_attention,
    flashinfer,
    ggml_cpu,
    ggml_cuda,
    ggml_opencl,
    ggml_vulkan,
    hexagon,
    ideal,
    metal,
    openxla,
    papers,
    pytorch,
    runtimes,
    sage,
    tokamax,
    triton_tutorial,
)
from jaxattn.recipe import Recipe

_FAMILIES = (
    *(ideal, hexagon, metal, ggml_cpu, ggml_cuda, ggml_vulkan, ggml_opencl),
    *(flash_attention, flashinfer, sage, triton_tutorial, papers),
    *(openxla, tokamax, pytorch, runtimes),
)


def by_name(families: tuple[ModuleType, ...]) -> dict[str, Recipe]:
    """The recipes of all families. Raises ValueError for a name that two have, and TypeError for
    RECIPES that are no tuple of recipes."""
    found: dict[str, Recipe] = {}
    for family in families:
        recipes = family.RECIPES
        if not isinstance(recipes, tuple) or not all(isinstance(x, Recipe) for x in recipes):
            raise TypeError(
                f"{family.__name__}: RECIPES must be a tuple of recipes, such as (ONE,) with a "
                f"comma, got {type(recipes).__name__}"
            )
        for recipe in recipes:
            if recipe.name in found:
                raise ValueError(
                    f"{family.__name__}: the name {recipe.name!r} is another recipe's; "
                    "`jaxattn kernels` lists those that are taken"
                )
            found[recipe.name] = recipe
    return found


_RECIPES = by_name(_FAMILIES)


def names() -> list[str]:
    """The names of all recipes, family by family."""
    return list(_RECIPES)


def families() -> dict[str, tuple[Recipe, ...]]:
    """The recipes of each family, by the first sentence of what its module says of itself."""
    return {(family.__doc__ or "").split("\n\n")[0].strip(): family.RECIPES for family in _FAMILIES}


def get(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest names, or where to find them."""
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES, "jaxattn kernels")
    return _RECIPES[name]
