"""The errors of what passes yield: outcomes finished and measured, a few recipes at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import accumulation, online_softmax
from jaxattn.lanes import Lanes
from jaxattn.metrics import measure_rows
from jaxattn.passes import Outcome

# l is called stagnated once updates that changed nothing have cost it this share of its weight.
STAGNATED = 0.01
WAITING = 4  # contexts whose errors may still be on the device
IN_CACHE = 2**18  # elements of the outputs that are there at once


class Errors:
    """Fills arrays [recipe, context, B, T, N]: `metrics` by name, `overflow` and `stagnated`.

    exact: context -> the reference's (output [K, R, D], log-sum-exp [K, R])
    """

    def __init__(
        self,
        contexts: Sequence[int],
        exact: Callable[[int], tuple[np.ndarray, np.ndarray]],
        metrics: dict[str, np.ndarray],
        overflow: np.ndarray,
        stagnated: np.ndarray,
    ) -> None:
        self.at = {context: i for i, context in enumerate(contexts)}
        self.exact = exact
        self.metrics, self.overflow, self.stagnated = metrics, overflow, stagnated
        self.waiting: list[tuple[Any, tuple[int, ...], jax.Array]] = []

    def report(self, members: list[int], context: int, outcome: Outcome) -> None:
        """Of the recipes `members`. What the device still computes is not waited for."""
        found = errors(tuple(self.metrics), outcome, *self.exact(context))
        self.waiting.append(((members, self.at[context]), outcome.lanes.recipes, found))
        if len(self.waiting) > WAITING:
            self._store(*self.waiting.pop(0))

    def close(self) -> None:
        while self.waiting:
            self._store(*self.waiting.pop(0))

    def _store(self, at: Any, lanes: tuple[int, ...], found: jax.Array) -> None:
        rows = _spread(np.asarray(found)[:, :, lanes], self.overflow.shape[2:])
        *metrics, overflow, lost = rows
        for x, each in zip(self.metrics.values(), metrics, strict=True):
            x[at] = each
        self.overflow[at], self.stagnated[at] = overflow > 0, lost > STAGNATED


def errors(
    names: tuple[str, ...], outcome: Outcome, output: np.ndarray, lse: np.ndarray
) -> jax.Array:
    """Each metric, then whether a result or log-sum-exp is not finite, and the outcome's lost, as
    one array that the host reads at once: float32 [number, K, lanes, T, G] on the device.

    names: of metrics.METRICS; output, lse: the reference's, float64 [K, R, D] and [K, R]
    """
    with jax.enable_x64(True):
        return _errors(names, outcome.lanes, outcome.group, outcome.f, outcome.carry, (output, lse))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(
    names: tuple[str, ...], lanes: Lanes, group: int, f: Any, carry: Any, ideal: Any
) -> jax.Array:
    count, (K, R, D) = lanes.count("y"), ideal[0].shape
    steps = -(-count // max(1, IN_CACHE // (K * R * D)))
    size = -(-count // steps)
    some = jnp.minimum(jnp.arange(steps * size), count - 1).reshape(steps, size)

    def finish(some: jax.Array, carry: accumulation.Carry) -> tuple[jax.Array, ...]:
        done = online_softmax.finish(lanes, f, carry, some=some if steps > 1 else None)
        return tuple(x.reshape(size, R // group, group, *x.shape[2:]) for x in done)

    exact = [x.reshape(K, 1, R // group, group, *x.shape[2:]) for x in ideal]

    def measure(some: jax.Array) -> jax.Array:
        result, lse, lost = jax.vmap(functools.partial(finish, some))(carry)
        found = measure_rows((*names, "nonfinite"), result, lse, *exact)
        overflow = (found["nonfinite"] > 0) | ~(lse < jnp.inf)
        numbers = (*(found[name] for name in names), overflow, lost)
        return jnp.stack([x.astype(jnp.float32) for x in numbers])

    found = jnp.moveaxis(jax.lax.map(measure, some), 0, 2)  # [number, K, steps, size, T, G]
    return found.reshape(*found.shape[:2], -1, *found.shape[4:])[:, :, :count]


def _spread(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[number, B·K, recipe, T, G] -> [number, recipe, B, T, N]."""
    B, T, N = shape
    split = x.reshape(len(x), B, -1, *x.shape[2:])  # [number, B, K, recipe, T, G]
    return split.transpose(0, 3, 1, 4, 2, 5).reshape(len(x), -1, B, T, N)
