"""The sums of attention: the row sum, and the two matrix products in a kernel's accumulators."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxattn.formats import Format
from jaxattn.rounding import round_to

HIGHEST = jax.lax.Precision.HIGHEST


def by_halves(combine: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """The last axis folded onto itself until one is left, [..., w] -> [...]; 0 has no effect.

    Only elementwise operations: a reduction's order may change with the shape and company of x.
    """
    # slices of lax: those of jnp take longer to trace than all else here
    while (width := x.shape[-1]) > 1:
        half = -(-width // 2)
        rest = jax.lax.slice_in_dim(x, half, width, axis=-1)
        if width % 2:
            rest = jax.lax.pad(
                rest, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(0, 1, 0)]
            )
        x = combine(jax.lax.slice_in_dim(x, 0, half, axis=-1), rest)
    return jax.lax.squeeze(x, (x.ndim - 1,))


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, by halves."""
    return by_halves(jax.lax.add, x)


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q·k in the storage dtype: q [R, H], k [n, w, H] -> [R, n, w]."""
    return jnp.einsum("rh,nwh->rnw", q, k, precision=HIGHEST, preferred_element_type=q.dtype)


def narrow_scores(
    q: jax.Array,
    k: jax.Array,
    accum: Format,
    chunk: int | None,
    promote: int | None,
    partials: int,
    tree: int,
) -> jax.Array:
    """q·k in accumulators of format `accum`: q [R, H], k [n, w, H] -> [R, n, w].

    `partials` interleaved accumulators each add `chunk` exact products before they round (None:
    all of theirs); a tree in `accum` then halves their number until `tree` are left, and those
    are added in the storage dtype. `promote`: as many accumulators as there are runs of that many
    products, and no tree. What H leaves over is added in the storage dtype too.
    """
    head_dim = q.shape[-1]
    if promote:
        partials = tree = max(head_dim // promote, 1)
    chunk = chunk or max(head_dim // partials, 1)
    whole = head_dim - head_dim % (partials * chunk)
    if not whole:
        return scores(q, k)

    def part(start: int) -> jax.Array:
        shape = (chunk, partials)
        a = q[:, start : start + chunk * partials].reshape(q.shape[0], 1, 1, *shape)
        b = k[..., start : start + chunk * partials].reshape(1, *k.shape[:2], *shape)
        return total(jnp.moveaxis(a * b, -2, -1))

    sums = jnp.zeros((q.shape[0], *k.shape[:2], partials), q.dtype)
    for start in range(0, whole, partials * chunk):
        sums = round_to(sums + part(start), accum)
    while sums.shape[-1] > tree:
        half = sums.shape[-1] // 2
        sums = round_to(sums[..., :half] + sums[..., half:], accum)
    rest = scores(q[:, whole:], k[..., whole:]) if whole < head_dim else 0.0
    return total(sums) + rest


def values(p: jax.Array, v: jax.Array) -> jax.Array:
    """Each block's p·v in the storage dtype: p [R, n, w], v [n, w, D] -> [n, R, D]."""
    return jnp.einsum("rnw,nwd->nrd", p, v, precision=HIGHEST, preferred_element_type=p.dtype)


def narrow_values(p: jax.Array, v: jax.Array, accum: Format, chunk: int) -> jax.Array:
    """Each block's p·v in an accumulator that rounds to `accum` after every `chunk` keys.

    p [R, n, w], v [n, w, D] -> [n, R, D]; the accumulator starts at zero with each block, or with
    what the caller calls one.
    """
    rows, blocks, width = p.shape
    parts = values(
        p.reshape(rows, blocks * (width // chunk), chunk),
        v.reshape(blocks * (width // chunk), chunk, v.shape[-1]),
    ).reshape(blocks, width // chunk, rows, v.shape[-1])

    def add(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
        return round_to(total + part, accum), None

    return jax.lax.scan(add, jnp.zeros_like(parts[:, 0]), jnp.moveaxis(parts, 1, 0))[0]
