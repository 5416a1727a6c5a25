"""The scores that a recipe sees: queries and constants as it stores them, q·k, cap, bias, mask.

Letters as in online_softmax.py; every array of a quantity has its lanes on the leading axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import contraction
from jaxattn.exponentials import LOG2E, TANHS, power_of_two
from jaxattn.formats import Format
from jaxattn.lanes import Lanes, Traced, number, rounder


class Queries(NamedTuple):
    """What a call computes once: q [lanes, R, H], the scale [lanes of s] and cap (or None)."""

    q: jax.Array
    scale: jax.Array
    cap: jax.Array | None


def prepare(
    lanes: Lanes,
    f: Traced,
    query: jax.Array,
    scale: jax.Array,
    softcap: jax.Array | None,
    heads: int = 1,
) -> Queries:
    """The queries [R, H] in storage dtype and the constants, rounded as the recipes store them.

    heads: that the rows belong to, each row in another head than the one before.
    """
    round, structure = rounder(lanes, f), lanes.structure
    dtype = query.dtype
    in_base = jnp.asarray(LOG2E, dtype) if lanes.base_2 else jnp.asarray(1.0, dtype)
    by_head = jnp.swapaxes(query.reshape(-1, heads, query.shape[-1]), 0, 1)[None]
    q = _grouped(lanes, f, round, "q", "query", by_head, structure.query_group)
    q = jnp.swapaxes(q, 1, 2).reshape(len(q), *query.shape)
    folded = softcap is not None and structure.cap_at == "scale"  # log2(e) comes in with the cap
    apart = lanes.base_2 and structure.log2e_at == "query" and not folded
    constant = scale if apart else scale * in_base
    if softcap is not None and folded:
        constant = scale / softcap
    if structure.scale_at == "query":
        factor = round("q", "scale", jnp.full((len(f["q"]["query"]),), constant))
        q = round("q", "scaled_query", q * factor[:, None, None])
        if apart:
            log2e = round("q", "log2e", jnp.full(factor.shape, LOG2E, dtype))
            q = round("q", "scaled_query", q * log2e[:, None, None])
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
    valid: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Scaled, capped, biased and masked scores [lanes, R, n, w]."""
    take, structure = lanes.take, lanes.structure
    q, k = take("d", "q", queries.q), take("d", "k", _keys(lanes, f, round, key, valid))
    if structure.narrow_qk:
        d = each_lane(
            lambda q, k, accum: contraction.narrow_scores(
                q,
                k,
                Format(*accum),
                structure.qk_chunk,
                structure.qk_promote,
                structure.qk_partials,
                structure.qk_tree,
            ),
            (q, k, f["d"]["qk_accum"]),
            spread=True,
        )
    else:
        d = each_lane(contraction.scores, (q, k))
    s = round("s", "scores", take("s", "d", d) * queries.scale.reshape(-1, 1, 1, 1))
    if structure.shifts:
        taken = number(f, "s", "key_shift", s)
        s = s + round("s", "shift", taken / (1 - taken) * _mean(s, valid, axis=3))
    if queries.cap is not None:
        cap = queries.cap.reshape(-1, 1, 1, 1)
        s = round("s", "scores", s / cap) if structure.cap_at == "scores" else s
        s = round("s", "softcap", round("s", "squashed", TANHS[structure.tanh](s)) * cap)
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


def _keys(lanes: Lanes, f: Traced, round: Any, key: jax.Array, valid: jax.Array) -> jax.Array:
    """The keys as the products read them: key [n, w, H] -> [lanes, n, w, H]."""
    k, structure = key[None], lanes.structure
    if structure.shifts:
        taken = number(f, "k", "key_shift", k)
        k = k - round("k", "shift", taken * _mean(k, valid[..., None], axis=2))
    if structure.key_group:
        k = jnp.where(valid[..., None], k, jnp.zeros_like(k))  # what is no key sets no scale
    return _grouped(lanes, f, round, "k", "key", k, structure.key_group)


def _mean(x: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
    """The mean over the valid slots of an axis, which stays."""
    valid = valid.reshape((1,) * (x.ndim - valid.ndim) + valid.shape)
    count = jnp.maximum(jnp.sum(valid, axis=axis, dtype=jnp.int32), 1).astype(x.dtype)
    x = jnp.moveaxis(jnp.where(valid, x, jnp.zeros_like(x)), axis, -1)
    return jnp.expand_dims(contraction.total(x) / count, axis)


def _grouped(
    lanes: Lanes,
    f: Traced,
    round: Any,
    quantity: str,
    site: str,
    x: jax.Array,
    group: int | None,
) -> jax.Array:
    """x [lanes, ..., tokens, H] rounded in units of amax / the format's largest number, a unit for
    each `group` of tokens; as it is where there are no groups."""
    if group is None or site not in lanes.way:
        return round(quantity, site, x)
    digits, _, emax, _, reserved, _, _ = f[quantity][site].T
    step = power_of_two((1 - digits).astype(x.dtype))
    largest = (2 - (1 + reserved).astype(x.dtype) * step) * power_of_two(emax.astype(x.dtype))
    tokens = x.shape[-2]
    size = jnp.max(jnp.abs(x), axis=-1)
    size = jnp.pad(size, [(0, 0)] * (size.ndim - 1) + [(0, -tokens % group)])
    size = jnp.max(size.reshape(*size.shape[:-1], -1, group), axis=-1)
    size = jnp.repeat(size, group, axis=-1)[..., :tokens, None]
    unit = size / largest.reshape(-1, *(1,) * (x.ndim - 1))
    # A lane that keeps every bit, beside others that do not, keeps its unit too.
    narrow = (digits < jnp.finfo(x.dtype).nmant + 1).reshape(-1, *(1,) * (x.ndim - 1))
    unit = jax.lax.stop_gradient(jnp.where(narrow & (unit > 0), unit, jnp.ones_like(unit)))
    return round(quantity, site, x / unit) * unit


def each_lane(function: Any, arguments: Any, spread: bool = False) -> jax.Array:
    """function over the leading axis, one lane at a time: a product's order of summation changes
    with its number of rows, and must not change with the company that a recipe keeps.

    spread: what lanes share is copied for each, so that no compiler takes work on it out of the
    loop and does it in another way.
    """
    leaves, tree = jax.tree.flatten(arguments)
    count = max(map(len, leaves))
    if spread:
        leaves = [jnp.broadcast_to(x, (count, *x.shape[1:])) for x in leaves]
    many = [x for x in leaves if len(x) > 1]

    def one(lane: list[jax.Array]) -> jax.Array:
        own = iter(lane)
        mine = [next(own) if len(x) > 1 else x[0] for x in leaves]
        return function(*jax.tree.unflatten(tree, mine))

    return jax.lax.map(one, many) if many else one([])[None]
