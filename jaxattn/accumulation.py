"""What a KV block adds to l and o: the carry, its plain, compensated and flushed sums, its merge.

Letters as in online_softmax.py; every array of a quantity has its lanes on the leading axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import contraction
from jaxattn.lanes import Lanes, Traced, rounder


class Flushed(NamedTuple):
    """What l and o were flushed into, in storage precision: m (at the last flush), l and o as in
    Carry; blocks: int32, those since then."""

    m: jax.Array
    l: jax.Array
    o: jax.Array
    blocks: jax.Array


class Carry(NamedTuple):
    """m [lanes, R], l [lanes, R], o [lanes, R, D], and lost [lanes of l, R].

    lost is the weight that updates of l received and that changed nothing, in units of l then.
    surplus [lanes of l, R] is what l is too large by, where its sum is compensated; flushed is
    there where the recipe's `flush_every` is.
    """

    m: jax.Array
    l: jax.Array
    o: jax.Array
    lost: jax.Array
    surplus: jax.Array | None = None
    flushed: Flushed | None = None


def finite(m: jax.Array) -> jax.Array:
    """m, or 0 where no key has been seen yet: -inf - 0 gives p = 0 and a = 0, -inf + inf NaN."""
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)


def accumulate(
    lanes: Lanes,
    f: Traced,
    carry: Carry,
    m: jax.Array,
    a: jax.Array,
    b: jax.Array,
    r: jax.Array,
    parts: tuple[jax.Array, ...],
    live: jax.Array,
    random: jax.Array | None,
) -> Carry:
    """The carry after the tile's blocks: m, a, b, r [lanes, R, n] and `_parts`.

    A dead block leaves all of it alone.
    """
    take, every = lanes.take, lanes.structure.flush_every
    a, b, r = take("l", "a", a), take("o", "b", b), take("l", "r", r)
    keys = None if random is None else jax.random.split(random, parts[0].shape[:2])

    def block(state: Any, x: Any) -> tuple[Any, Any]:
        (l, o, surplus, flushed), (m, a, b, r, parts, live, keys) = state, x
        round = rounder(lanes, f, None if keys is None else keys[0])
        surplus_next: jax.Array | None = None
        if surplus is None:
            l_next = next_sum(round, l, a, r)
        else:
            l_next, surplus_next = compensated_sum(round, l, surplus, a, r)
        y = None
        if lanes.structure.normalise == "blocks":
            before, after = take("o", "l", l), take("o", "l", l_next)
            y = round("o", "inverse", 1 / jnp.where(after == 0, jnp.ones_like(after), after))
            b = b * before * y

        def add(o: jax.Array, x: Any) -> tuple[jax.Array, None]:
            parts, key = x
            round = rounder(lanes, f, key)
            own = [take("o", "w", part) for part in parts]
            pv = own[0] if len(own) == 1 else own[0][..., None] * own[1][:, None]
            if y is not None:
                pv = round("o", "rescaled_output", y[..., None] * pv)
            return round("o", "output", o + pv), None

        o_next = round("o", "rescaled_output", b[..., None] * o)
        if len(parts[0]) == 1:
            o_next = add(o_next, jax.tree.map(lambda x: x[0], (parts, keys)))[0]
        else:
            o_next = jax.lax.scan(add, o_next, (parts, keys))[0]
        before, state = l, (l, o, surplus, flushed)
        moved = (l_next, o_next, surplus_next, flushed)
        l, o, surplus, flushed = jax.tree.map(lambda x, y: jnp.where(live, x, y), moved, state)
        if flushed is None:
            return (l, o, surplus, None), (l,)
        whole = settled(lanes, f, Carry(m, l, o, l, surplus, flushed))
        since = flushed.blocks + live.astype(jnp.int32)
        wide = Flushed(m, whole.l, whole.o, jnp.zeros_like(since))
        fresh = (*jax.tree.map(jnp.zeros_like, (l, o, surplus)), wide)
        kept = (l, o, surplus, flushed._replace(blocks=since))
        state = jax.tree.map(lambda x, y: jnp.where(since == every, x, y), fresh, kept)
        return state, (l, before, whole.l)

    scalars = (None if every is None else m, a, b, r)
    blocks = (*jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), scalars), parts, live, keys)
    start = (carry.l, carry.o, carry.surplus, carry.flushed)
    after, sums = jax.lax.scan(block, start, blocks)
    l_last, o_last, surplus_last, flushed_last = after
    lost = carry.lost
    if carry.surplus is None:  # which keeps what l does not
        lost = lost + _lost(lanes, f, carry.l, a, r, sums, live, random)
    return Carry(m[..., -1], l_last, o_last, lost, surplus_last, flushed_last)


def next_sum(round: Any, l: jax.Array, a: jax.Array, r: jax.Array) -> jax.Array:
    """l after a block of row sum r and rescale factor a, all [lanes, R]."""
    return round("l", "running_sum", round("l", "rescaled_sum", a * l) + r)


def compensated_sum(
    round: Any, l: jax.Array, surplus: jax.Array, a: jax.Array, r: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """next_sum and what it is too large by, with Kahan's three further additions."""
    l = round("l", "rescaled_sum", a * l)
    surplus = round("l", "rescaled_sum", a * surplus)
    added = round("l", "running_sum", r - surplus)
    total = round("l", "running_sum", l + added)
    moved = round("l", "running_sum", total - l)
    return total, round("l", "running_sum", moved - added)


def _lost(
    lanes: Lanes,
    f: Traced,
    l: jax.Array,
    a: jax.Array,
    r: jax.Array,
    sums: tuple[jax.Array, ...],
    live: jax.Array,
    random: jax.Array | None,
) -> jax.Array:
    """The weight that a tile's blocks lose for moving nothing: l before them, sums [n, lanes, R] of
    l after each; and, where l is flushed, of l before each, and with what was flushed."""
    after, *others = jax.lax.stop_gradient([jnp.moveaxis(x, 0, -1) for x in sums])
    before, whole = others or (jnp.concatenate([l[..., None], after[..., :-1]], axis=-1), after)
    unmoved = (after == rounder(lanes, f, random)("l", "rescaled_sum", a * before)) & (r > 0)
    share = jnp.where(unmoved & live[None, None], r / jnp.maximum(whole, r), jnp.zeros_like(r))
    return jax.lax.stop_gradient(contraction.total(share))


def merge(lanes: Lanes, f: Traced, one: Carry, other: Carry) -> Carry:
    """Two carries over different keys as one, in storage precision (split-KV)."""
    one, other = settled(lanes, f, one), settled(lanes, f, other)
    m = jnp.maximum(one.m, other.m)
    exp = jnp.exp2 if lanes.base_2 else jnp.exp
    a, b = exp(one.m - finite(m)), exp(other.m - finite(m))

    def factors(quantity: str) -> tuple[jax.Array, jax.Array]:
        # The path from m to l and o, through the rescale factors that they read.
        def lead(x: jax.Array) -> jax.Array:
            x = lanes.take("a", "m", x)
            if quantity == "l":
                return lanes.take("l", "a", x)
            return lanes.take("o", "b", lanes.take("b", "a", x))

        return lead(a), lead(b)

    round = rounder(lanes, f)

    def both(quantity: str, one: jax.Array, other: jax.Array) -> jax.Array:
        return round(quantity, "product", one) + round(quantity, "product", other)

    (la, lb), (oa, ob) = factors("l"), factors("o")
    o = both("o", one.o * oa[..., None], other.o * ob[..., None])
    l = both("l", one.l * la, other.l * lb)
    return Carry(m, l, o, jnp.maximum(one.lost, other.lost))


def settled(lanes: Lanes, f: Traced, carry: Carry) -> Carry:
    """The carry with its surplus taken from l, and with what was flushed in l and o."""
    l = carry.l if carry.surplus is None else carry.l - carry.surplus
    inner = Carry(carry.m, l, carry.o, carry.lost)
    if carry.flushed is None:
        return inner
    return merge(lanes, f, Carry(*carry.flushed[:3], carry.lost), inner)
