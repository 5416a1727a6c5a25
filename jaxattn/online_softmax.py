"""The online softmax over KV blocks, of all lanes at once: init, step, finish.

Letters: R query rows that share a KV head, n blocks of w keys in a tile, H and D head and value
dim; every array of a quantity has its lanes (lanes.py) on the leading axis.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import contraction
from jaxattn.accumulation import Carry, Flushed, accumulate, finite, settled
from jaxattn.exponentials import EXPONENTIALS, LOG2E
from jaxattn.formats import Format
from jaxattn.lanes import Lanes, Traced, number, rounder
from jaxattn.scores import Queries, each_lane, scores


def init(lanes: Lanes, f: Traced, rows: int, value_dim: int, sinks: jax.Array | None) -> Carry:
    """The carry before the first key; sinks [R] start it where the kernel seeds m with them."""
    dtype = jnp.dtype(lanes.structure.storage)
    shape = (lanes.count("m"), rows)
    m = jnp.broadcast_to(jnp.asarray(f["m"]["initial_max"], dtype)[:, None], shape)
    l = jnp.zeros((lanes.count("l"), rows), dtype)
    if sinks is not None and lanes.structure.sinks == "seed":
        seed = sinks.astype(dtype)[None]
        # 1, with the derivative of exp(sink - m): m itself is held constant in every derivative.
        seed_only = jnp.where(jnp.isfinite(seed), seed, jnp.zeros_like(seed))
        l = l + (1 + (seed_only - jax.lax.stop_gradient(seed_only)))
        seed = seed * (jnp.asarray(LOG2E, dtype) if lanes.base_2 else 1)
        m = rounder(lanes, f)("m", "running_max", jnp.broadcast_to(seed, shape))
    o = jnp.zeros((lanes.count("o"), rows, value_dim), dtype)
    lost = jnp.zeros_like(l)
    surplus = jnp.zeros_like(l) if lanes.structure.summation == "kahan" else None
    if lanes.structure.flush_every is None:
        return Carry(m, l, o, lost, surplus)
    flushed = Flushed(m, jnp.zeros_like(l), jnp.zeros_like(o), jnp.zeros((), jnp.int32))
    return Carry(m, l, o, lost, surplus, flushed)


def step(
    lanes: Lanes,
    f: Traced,
    queries: Queries,
    carry: Carry,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    random: jax.Array | None = None,
) -> Carry:
    """The carry after one tile of whole KV blocks of one KV head.

    key [n, w, H], value [n, w, D] in storage dtype; valid [n, w]: False pads a block and is no
    key at all; bias [R, n, w] float and mask [R, n, w] bool (False: masked as the recipe does);
    random: a PRNG key, where a site rounds stochastically.
    """
    round, take = rounder(lanes, f, random), lanes.take
    s = scores(lanes, f, round, queries, key, valid, bias, mask)

    peak = jnp.max(s, axis=-1, where=valid, initial=-jnp.inf)
    peak = take("m", "s", peak) + number(f, "m", "max_offset", peak)
    peak = _stepped(peak, number(f, "m", "max_step", peak))
    m = _running_max(lanes, carry.m, round("m", "running_max", peak), f)
    m_prev = jnp.concatenate([jnp.broadcast_to(carry.m, m.shape[:2])[..., None], m[..., :-1]], -1)
    m, m_prev = jax.lax.stop_gradient((m, m_prev))  # the softmax does not depend on m

    seen = round("e", "seen_max", finite(take("e", "m", m)))[..., None]
    e = _exp(lanes, f, round, "e", take("e", "s", s) - seen)
    e = jnp.where(valid, e, jnp.zeros_like(e))
    p, r = _probs(lanes, round, e)

    drop = take("a", "m", m_prev) - finite(take("a", "m", m))
    a = _exp(lanes, f, round, "a", drop)
    a = jnp.where(drop < number(f, "a", "rescale_flush", drop), jnp.zeros_like(a), a)
    a = round("a", "rescale", a)
    b = round("b", "output_rescale", take("b", "a", a))

    parts = _parts(lanes, f, p, round("v", "value", value[None]))
    live = jnp.any(valid, axis=-1)
    return accumulate(lanes, f, carry, m, a, b, r, parts, live, random)


def _probs(lanes: Lanes, round: Any, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """p and the row sum r of each block, of e = exp(s - m) [lanes, R, n, w]."""
    take = lanes.take
    if lanes.structure.normalise == "before":
        t = round("t", "summand", take("t", "e", e))
        r = round("r", "row_sum", take("r", "t", contraction.total(t)))
        safe = jnp.where(r == 0, jnp.ones_like(r), r)[..., None]
        return round("p", "probs", take("p", "t", t) / take("p", "r", safe)), r
    p = round("p", "probs", take("p", "e", e))
    t = p if lanes.sums_probs else round("t", "summand", take("t", "e", e))
    return p, round("r", "row_sum", take("r", "t", contraction.total(t)))


def _stepped(peak: jax.Array, step: jax.Array) -> jax.Array:
    """peak rounded up to a multiple of the step where there is one; -inf stays."""
    some = jnp.where(step > 0, step, jnp.ones_like(step))
    return jnp.where(step > 0, jnp.ceil(peak / some) * some, peak)


def _running_max(lanes: Lanes, m: jax.Array, peak: jax.Array, f: Traced) -> jax.Array:
    """m after each block: m [lanes, R], peak [lanes, R, n] -> [lanes, R, n]."""
    if not lanes.structure.lazy:
        return jnp.maximum(m[..., None], jax.lax.cummax(peak, axis=peak.ndim - 1))

    def stay(m: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
        m = jnp.where(peak > m + number(f, "m", "lazy_threshold", m), peak, m)
        return m, m

    return jnp.moveaxis(jax.lax.scan(stay, m, jnp.moveaxis(peak, -1, 0))[1], 0, -1)


def _exp(lanes: Lanes, f: Traced, round: Any, quantity: str, difference: jax.Array) -> jax.Array:
    x = round(quantity, "difference", difference)
    if lanes.log2e and not lanes.base_2:
        count = len(f[quantity]["log2e"])
        log2e = round(quantity, "log2e", jnp.full((count,), LOG2E, x.dtype))
        x = round(quantity, "exponent", x * log2e.reshape(-1, *(1,) * (x.ndim - 1)))
    name = lanes.structure.exp
    if quantity == "a" and lanes.structure.rescale_exp == "exact":
        name = "exp2" if lanes.log2e else "exp"
    return EXPONENTIALS[name][0](x)


def _parts(lanes: Lanes, f: Traced, p: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """What o gains, by block and step: p [lanes, R, n, w], v [lanes, n, w, D] ->
    p·v [n, steps, lanes, R, D], or p [n, steps, lanes, R] and v [n, steps, lanes, D].

    Where a step is a key there is no contraction to make: p·v belongs to the addition, as one FMA
    where the host has it, as in the kernels that round at every key.
    """
    p, v = lanes.take("w", "p", p), lanes.take("w", "v", v)
    blocks, width = p.shape[2:]
    every = lanes.structure.output_every or width
    if every == 1 and not lanes.structure.narrow_pv:
        return jnp.moveaxis(p, (2, 3), (0, 1)), jnp.moveaxis(v, (1, 2), (0, 1))
    p = p.reshape(*p.shape[:2], -1, every)
    v = v.reshape(v.shape[0], -1, every, v.shape[-1])
    pv = jnp.moveaxis(_products(lanes, f, p, v), 1, 0)
    return (pv.reshape(blocks, -1, *pv.shape[1:]),)


def _products(lanes: Lanes, f: Traced, p: jax.Array, v: jax.Array) -> jax.Array:
    """p·v of every block (or step of a block): [lanes, n, R, D]."""
    if not lanes.structure.narrow_pv:
        return each_lane(contraction.values, (p, v))
    chunk = lanes.structure.pv_chunk or p.shape[-1]
    return each_lane(
        lambda p, v, accum: contraction.narrow_values(p, v, Format(*accum), chunk),
        (p, v, f["w"]["pv_accum"]),
        spread=True,
    )


def _meet_sink(
    lanes: Lanes, f: Traced, round: Any, sinks: jax.Array, m: jax.Array, l: jax.Array, o: jax.Array
) -> tuple[jax.Array, ...]:
    """m, l, o [lanes of y, ...] after one more key for each row, of score sinks [R] and value 0."""
    exp = jnp.exp2 if lanes.base_2 else jnp.exp
    sink = sinks.astype(m.dtype)[None] * jnp.asarray(LOG2E if lanes.base_2 else 1, m.dtype)
    sink = round("y", "running_max", jnp.broadcast_to(sink, m.shape))
    top = jax.lax.stop_gradient(jnp.maximum(m, sink))
    drop = m - finite(top)
    a = exp(round("y", "difference", drop))
    a = jnp.where(drop < number(f, "y", "rescale_flush", drop), jnp.zeros_like(a), a)
    a = round("y", "rescale", a)
    e = round("y", "rescale", exp(round("y", "difference", sink - finite(top))))
    l = round("y", "running_sum", round("y", "rescaled_sum", a * l) + e)
    b = round("y", "output_rescale", a)[..., None]
    return top, l, round("y", "rescaled_output", b * o)


def finish(
    lanes: Lanes,
    f: Traced,
    carry: Carry,
    sinks: jax.Array | None = None,
    random: jax.Array | None = None,
    some: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """result [lanes of y, R, D], log-sum-exp [lanes of y, R] in nats, the carry's lost likewise.

    sinks [R] or None; random: a PRNG key, where sinks meet a site that rounds stochastically;
    some: int [n], the lanes of y to finish, all of them by default.
    """
    flushed, carry = carry.flushed, settled(lanes, f, carry)
    if some is not None:
        f = {**f, "y": jax.tree.map(lambda x: x[some], f["y"])}
    round, take = rounder(lanes, f, random), functools.partial(lanes.take, "y", some=some)
    m, l, o = take("m", carry.m), take("l", carry.l), take("o", carry.o)
    lost = take("l", carry.lost)
    normalise, kind = lanes.structure.normalise, None if sinks is None else lanes.structure.sinks
    if kind in ("end", "after") and normalise in ("blocks", "before"):
        o, normalise = o * l[..., None], "divide"
    unrounded = lambda quantity, site, x: x  # noqa: E731
    if sinks is not None and kind == "end":  # of flushed sums, into the wide ones
        meet = round if flushed is None else unrounded
        m, l, o = _meet_sink(lanes, f, meet, sinks, m, l, o)
    o = round("y", "final_output", o)
    if sinks is not None and kind == "after":
        m, l, o = _meet_sink(lanes, f, unrounded, sinks, m, l, o)
    empty = l == 0
    safe = jnp.where(empty, jnp.ones_like(l), l)
    inverse = jnp.where(empty, number(f, "y", "empty_inverse", l), 1 / safe)
    y = round("y", "inverse", inverse)[..., None]
    if normalise == "multiply":
        scaled = o * y
    elif normalise == "divide":
        scaled = jnp.where(empty[..., None], o * y, o / safe[..., None])
    else:
        scaled = o
    result = round("y", "result", scaled)
    m = jax.lax.stop_gradient(m)
    nats = rounder(lanes, f)("y", "product", m * (1 / LOG2E)) if lanes.base_2 else m
    lse = jnp.where(empty, -jnp.inf, nats + jnp.log(safe))
    # Where all lanes of y read one lane, it stands for them until here.
    count = lanes.count("y") if some is None else len(some)
    return tuple(jnp.broadcast_to(x, (count, *x.shape[1:])) for x in (result, lse, lost))
