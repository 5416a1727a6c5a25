"""Recipes of real kernels, by name. A module is a family: tables and citations, no arithmetic."""

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
_RECIPES = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}


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
