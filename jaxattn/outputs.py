"""outputs: what recipes compute at every context, for those who ask more than a metric tells."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn import online_softmax
from jaxattn.attention import storage
from jaxattn.lanes import Lanes
from jaxattn.passes import Outcome
from jaxattn.recipe import Recipe
from jaxattn.walk import walk_of


class Outputs(NamedTuple):
    """Outputs of recipes when every query sees the first n keys, widened to float64.

    recipes:   their names
    contexts:  int [C], ascending
    output:    [recipe, C, B, T, N, D]
    reference: [C, B, T, N, D], float64 attention of the inputs as given
    """

    recipes: tuple[str, ...]
    contexts: np.ndarray
    output: np.ndarray
    reference: np.ndarray


def outputs(
    query: Any,
    key: Any,
    value: Any,
    recipes: Sequence[Recipe | str],
    *,
    contexts: Sequence[int] | None = None,
    scale: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """The outputs whose errors jaxattn.error_curves gives; arguments and what it raises are its.

    All are held at once: 8 B for each recipe, context, row and value dimension.
    """
    walk = walk_of(query, key, value, recipes, contexts, scale)
    at = {context: i for i, context in enumerate(walk.contexts)}
    found: list[tuple[list[int], int, np.ndarray]] = []
    ideal: dict[int, np.ndarray] = {}
    B, _, N = walk.shape[2:]

    def report(members: list[int], context: int, outcome: Outcome) -> None:
        with storage(outcome.lanes.structure.storage):
            result = np.asarray(_finish(outcome.lanes, outcome.f, outcome.carry))
        spread = _spread(result[:, outcome.lanes.recipes], B, N)
        found.append((members, at[context], spread))
        if context not in ideal:
            ideal[context] = _spread(walk.exact(context)[0][:, None], B, N)[0]

    walk.run(report, progress)
    output = np.empty((*walk.shape, found[0][2].shape[-1]))
    for members, i, result in found:
        output[members, i] = result
    return Outputs(
        tuple(recipe.name for recipe in walk.recipes),
        np.array(walk.contexts),
        output,
        np.stack([ideal[context] for context in walk.contexts]),
    )


@functools.partial(jax.jit, static_argnums=0)
def _finish(lanes: Lanes, f: Any, carry: Any) -> jax.Array:
    """[B·K, lanes of y, R, D]."""
    return jax.vmap(lambda one: online_softmax.finish(lanes, f, one)[0])(carry)


def _spread(x: np.ndarray, B: int, N: int) -> np.ndarray:
    """[B·K, recipe, T·G, D] -> [recipe, B, T, N, D]."""
    K, count, D = x.shape[0] // B, x.shape[1], x.shape[3]
    split = x.reshape(B, K, count, -1, N // K, D)  # [B, K, recipe, T, G, D]
    return split.transpose(2, 0, 3, 1, 4, 5).reshape(count, B, -1, N, D)
