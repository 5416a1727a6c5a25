"""error_curves: error against context length, every context from one pass over the keys.

Recipes of one structure run together as lanes. After a block the carry is the answer at that
length; a context inside a tile is finished from the carry before it by a tile that is cut there and
not kept. Keys arrive in pieces, so memory does not grow with the context.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxattn import metrics as measures
from jaxattn.errors import Errors
from jaxattn.recipe import Recipe
from jaxattn.walk import walk_of

METRICS = ("nmse", "rel_l2", "max_abs", "cosine", "bias_l", "bias_o")


class Curves(NamedTuple):
    """Errors of recipes against context length, one number per query row and head.

    recipes:   their names
    contexts:  int [C], ascending
    metrics:   name -> float32 [recipe, context, B, T, N]
    overflow:  bool, likewise: a non-finite result or log-sum-exp
    stagnated: bool, likewise: updates of l that changed nothing have cost over 1 % of its weight
    kv_block:  int [recipe, context]: the block size that the recipe's rule chose
    """

    recipes: tuple[str, ...]
    contexts: np.ndarray
    metrics: dict[str, np.ndarray]
    overflow: np.ndarray
    stagnated: np.ndarray
    kv_block: np.ndarray

    def __repr__(self) -> str:
        some = ", ".join(self.recipes[:3]) + (", ..." if len(self.recipes) > 3 else "")
        return (
            f"Curves of {len(self.recipes)} recipes ({some}) at {len(self.contexts)} contexts, "
            f"{self.contexts[0]:,} to {self.contexts[-1]:,} keys; metrics {', '.join(self.metrics)}"
            f" [recipe, context, B, T, N] = {list(self.overflow.shape)}"
        )


def error_curves(
    query: Any,
    key: Any,
    value: Any,
    recipes: Sequence[Recipe | str],
    *,
    contexts: Sequence[int] | None = None,
    scale: float | None = None,
    metrics: Sequence[str] = METRICS,
    progress: Callable[[int, int], None] | None = None,
    tile_keys: int | None = None,
    mesh: Mesh | None = None,
) -> Curves:
    """The error of each recipe against float64 attention when every query sees the first n keys.

    query:    [B, T, N, H], any float dtype
    key:      [B, S, K, H], or a Stream (inputs.py, captures.py) of keys and values; then B is 1
    value:    [B, S, K, D], or None where key is a Stream
    recipes:  Recipes or names; of any structure, grouped here
    contexts: positive ints, at most S; default four per octave from 256 to S
    scale:    of the scores, 1/sqrt(H) by default
    metrics:  names in jaxattn.metrics.METRICS; the difference is taken in float64
    progress: called with (keys done, keys in all) after each piece
    tile_keys: about how many keys a compiled step takes: speed, and float32 noise
    mesh:     devices of this process with the axes "recipes" and "heads": recipes go to its rows,
              and each row shares out the batch and KV heads, whose number its length divides.
              The numbers are those of one device, bit for bit

    The reference sees the inputs as given, so that rounding them is part of a recipe's error.
    A second call with the same shapes and structures compiles nothing.
    Raises ValueError or TypeError for arguments that do not fit.
    """
    metrics = measures.check_names(metrics)
    walk = walk_of(query, key, value, recipes, contexts, scale, tile_keys, mesh)
    result = Curves(
        tuple(recipe.name for recipe in walk.recipes),
        np.array(walk.contexts),
        {name: np.full(walk.shape, np.nan, np.float32) for name in metrics},
        np.zeros(walk.shape, bool),
        np.zeros(walk.shape, bool),
        walk.kv_block,
    )
    errors = Errors(walk.contexts, walk.exact, result.metrics, result.overflow, result.stagnated)
    walk.run(errors.report, progress)
    errors.close()
    return result
