"""What dot_product_attention accepts: the checks of its arguments, and their common form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.recipe import Recipe


def four(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x if x.ndim == 4 else x[None]


def check(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, sinks: Any, recipe: Recipe
) -> tuple[int, int, int, int, int]:
    """(B, N, T, S, H) of arrays that fit together."""
    for name, x in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("bias", bias),
        ("sinks", sinks),
    ):
        if x is not None and not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating point, got {jnp.asarray(x).dtype}; convert it first"
            )
    if {np.ndim(query), np.ndim(key), np.ndim(value)} not in ({3}, {4}):
        ndims = tuple(np.ndim(x) for x in (query, key, value))
        raise ValueError(
            "query, key and value must all be [B, length, heads, dim] or all without B, got "
            f"{ndims=}"
        )
    q, k, v = ((1, *np.shape(x))[-4:] for x in (query, key, value))
    if 0 in q + k + v:
        raise ValueError(f"no axis may be empty, got query {q}, key {k}, value {v}")
    if k[:3] != v[:3]:
        raise ValueError(f"key and value must agree in [B, S, K], got {k[:3]} and {v[:3]}")
    if q[0] != k[0] or q[3] != k[3]:
        raise ValueError(f"query {q} and key {k} must agree in batch size and head dim")
    if q[2] % k[2]:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {q[2]} and {k[2]}"
        )
    if sinks is not None:
        if recipe.sinks == "none":
            raise ValueError(f"the kernel of recipe {recipe.name!r} knows no sinks")
        if np.shape(sinks) != (q[2],):
            raise ValueError(f"sinks must have shape [N] = ({q[2]},), got {np.shape(sinks)}")
    return q[0], q[2], q[1], k[1], q[3]


def broadcastable(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    full = (shape[0], shape[1], shape[2], shape[3])
    x = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise ValueError(f"{name} must broadcast to [B, N, T, S] = {full}, got {x.shape}")
    return jnp.broadcast_to(x, (*x.shape[:3], shape[3]))


def fit_bias(bias: Any, shape: tuple[int, ...]) -> jax.Array | None:
    return None if bias is None else broadcastable("bias", jnp.asarray(bias), shape)


def fit_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be bool with True = attend, got {mask.dtype}; an additive mask goes to bias"
        )
    return broadcastable("mask", mask, shape)


def window(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 0 for side in sides):
        raise ValueError(
            "local_window_size must be a whole number of keys, at least 0, or two of them "
            f"(left, right), got {size}"
        )
    return sides


def lengths(name: str, lengths: Any, batch: int) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [B] = ({batch},), got {lengths.shape}")
    return lengths.astype(jnp.int32)


def check_number(name: str, number: Any) -> None:
    """That a number whose value is known, not traced, is finite (and softcap positive)."""
    try:
        if not math.isfinite(number) or (name == "softcap" and number <= 0):
            raise ValueError(
                f"{name} must be finite{' and positive' * (name == 'softcap')}, got {number}"
            )
    except jax.errors.ConcretizationTypeError:
        pass
