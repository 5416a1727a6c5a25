"""The scores that a recipe sees: queries and constants as it stores them, q·k, cap, bias, mask.

Letters as in online_softmax.py; every array of a quantity has its lanes on the leading axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import contraction
from jaxattn.exponentials import LOG2E, TANHS
from jaxattn.formats import Format
from jaxattn.lanes import Lanes, Traced, number, rounder


class Queries(NamedTuple):
    """What a call computes once: q [lanes, R, H], the scale [lanes of s] and cap (or None)."""

    q: jax.Array
    scale: jax.Array
    cap: jax.Array | None


def prepare(
    lanes: Lanes, f: Traced, query: jax.Array, scale: jax.Array, softcap: jax.Array | None
) -> Queries:
    """The queries [R, H] in storage dtype and the constants, rounded as the recipes store them."""
    round, structure = rounder(lanes, f), lanes.structure
    dtype = query.dtype
    in_base = jnp.asarray(LOG2E, dtype) if lanes.base_2 else jnp.asarray(1.0, dtype)
    q = round("q", "query", query[None])
    constant = scale if softcap is None else scale / softcap
    constant = constant if softcap is not None else constant * in_base
    if structure.scale_at == "query":
        factor = round("q", "scale", jnp.full((len(f["q"]["query"]),), constant))
        q = round("q", "query", q * factor[:, None, None])
        constant = jnp.ones((), dtype)
    stored = round("s", "scale", jnp.full((lanes.count("s"),), constant))
    if softcap is None:
        return Queries(q, stored, None)
    cap = round("s", "cap", jnp.full((lanes.count("s"),), softcap * in_base))
    return Queries(q, stored, cap)


def scores(
    lanes: Lanes,
    f: Traced,
    round: Any,
    queries: Queries,
    key: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Scaled, capped, biased and masked scores [lanes, R, n, w]."""
    take, structure = lanes.take, lanes.structure
    q, k = take("d", "q", queries.q), take("d", "k", round("k", "key", key[None]))
    if structure.narrow_qk:
        d = each_lane(
            lambda q, k, accum: contraction.narrow_scores(
                q, k, Format(*accum), structure.qk_chunk, structure.qk_partials, structure.qk_tree
            ),
            (q, k, f["d"]["qk_accum"]),
        )
    else:
        d = each_lane(contraction.scores, (q, k))
    s = round("s", "scores", take("s", "d", d) * queries.scale.reshape(-1, 1, 1, 1))
    if queries.cap is not None:
        s = round("s", "softcap", TANHS[structure.tanh](s) * queries.cap.reshape(-1, 1, 1, 1))
    keep = None if mask is None else mask[None]
    if bias is not None:
        bias = bias[None].astype(s.dtype)
        low = bias <= number(f, "s", "mask_below", s)
        keep = ~low if keep is None else keep & ~low
        scaled = round("s", "bias", bias * number(f, "s", "bias_factor", s))
        s = round("s", "bias", s + scaled)
    if keep is not None:
        s = jnp.where(keep, s, number(f, "s", "mask_value", s))
    return s


def each_lane(function: Any, arguments: Any) -> jax.Array:
    """function over the leading axis, one lane at a time: a product's order of summation changes
    with its number of rows, and must not change with the company that a recipe keeps."""
    count = max(len(x) for x in jax.tree.leaves(arguments))
    if count == 1:
        return function(*jax.tree.map(lambda x: x[0], arguments))[None]
    spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), arguments)
    return jax.lax.map(lambda lane: function(*lane), spread)
