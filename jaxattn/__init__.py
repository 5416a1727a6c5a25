"""jaxattn: a JAX laboratory for the numerics of flash attention.

Error-versus-context-length curves for any assignment of number formats to the places where a
kernel rounds, for named real kernels, on synthetic inputs or on your own Q, K and V.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxattn import attribution as attribution
    from jaxattn import captures as captures
    from jaxattn import inputs as inputs
    from jaxattn import kernels as kernels
    from jaxattn import theory as theory
    from jaxattn.attention import dot_product_attention as dot_product_attention
    from jaxattn.curves import Curves as Curves
    from jaxattn.curves import error_curves as error_curves
    from jaxattn.formats import Format as Format
    from jaxattn.formats import format_of as format_of
    from jaxattn.recipe import Recipe as Recipe
    from jaxattn.reference import reference_attention as reference_attention
    from jaxattn.rounding import round_to as round_to

__version__ = "0.1.0"

# name -> the module it lives in; a module's own name stands for itself. Loaded when first asked
# for, so that a command line's --help does not wait for jax.
_HOMES = {
    "attribution": "attribution",
    "captures": "captures",
    "inputs": "inputs",
    "kernels": "kernels",
    "theory": "theory",
    "dot_product_attention": "attention",
    "Curves": "curves",
    "error_curves": "curves",
    "Format": "formats",
    "format_of": "formats",
    "Recipe": "recipe",
    "reference_attention": "reference",
    "round_to": "rounding",
}
__all__ = list(_HOMES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")
    module = importlib.import_module(f"jaxattn.{_HOMES[name]}")
    return module if name == _HOMES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
