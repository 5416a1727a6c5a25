"""dot_product_attention: a drop-in for jax.nn's, in the arithmetic of a recipe."""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import accumulation, arguments, kernels, online_softmax, scores, tiles
from jaxattn.formats import format_of
from jaxattn.lanes import Lanes, random_keys, weave
from jaxattn.recipe import Recipe


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    recipe: Recipe | str,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    return_residual: bool = False,
) -> Any:
    """Attention as the kernel that `recipe` describes computes it.

    Layout and semantics of jax.nn.dot_product_attention; B batch, T queries, S keys, N query
    heads, K key/value heads (N a multiple of K), H head dim, D value dim.

    query:  [B, T, N, H] or [T, N, H], any float dtype
    key:    [B, S, K, H] or [S, K, H]; value: [B, S, K, D] or [S, K, D], any float dtypes, each
            widened exactly to the recipe's storage and rounded at its sites (float64 inputs are
            rounded to float32 first where storage is float32)
    bias:   float [B|1, N|1, T|1, S|1], added to the scaled scores
    mask:   bool, same shape, True = attend. What a kernel does with a masked key, and with a row
            that has no other, is the recipe's: `mask_value`, `initial_max`, `empty_inverse`
    recipe: a Recipe or a name in jaxattn.kernels; never switched by shape
    scale:  of the scores, 1/sqrt(H) by default
    is_causal, local_window_size, query_seq_lengths, key_value_seq_lengths: as in jax.nn
    softcap: scores become softcap·tanh(scores / softcap)
    sinks:  float [N], one more score per head that adds to the sum and to nothing else
    return_residual: also the log-sum-exp of the scores, float32 [B, T, N]

    Returns [B, T, N, D] in query's dtype. Runs under jit, vmap and grad; gradients pass straight
    through every rounding and treat exponentials as the smooth curves they approximate (recipes of
    float64 storage: first derivatives in reverse mode only).
    Raises ValueError or TypeError for arguments that do not fit.
    """
    recipe = kernels.get(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe or a kernel's name, got {type(recipe).__name__}")
    batched = np.ndim(query) == 4
    shape = arguments.check(query, key, value, bias, mask, sinks, recipe)
    masks = Masks(
        arguments.fit_mask(mask, shape),
        arguments.lengths("query_seq_lengths", query_seq_lengths, shape[0]),
        arguments.lengths("key_value_seq_lengths", key_value_seq_lengths, shape[0]),
    )
    window = arguments.window(local_window_size)
    if scale is None:
        scale = 1 / math.sqrt(shape[4])
    arguments.check_number("scale", scale)
    if softcap is not None:
        arguments.check_number("softcap", softcap)

    def attend(
        query: Any, key: Any, value: Any, bias: Any, sinks: Any, masks: Masks, *numbers: Any
    ) -> Any:
        scale, softcap = numbers
        arrays = [arguments.four(x) for x in (query, key, value)]
        lanes, f = weave([recipe], *(format_of(x.dtype) for x in arrays))
        # Formats as constants could be folded away, and a rounding with them (see lanes._PRODUCTS).
        f = jax.lax.optimization_barrier(traced(f, recipe.storage))
        out, lse = _attend(
            lanes,
            f,
            *arrays,
            arguments.fit_bias(bias, shape),
            masks,
            None if sinks is None else jnp.asarray(sinks),
            jnp.asarray(scale, recipe.storage),
            None if softcap is None else jnp.asarray(softcap, recipe.storage),
            causal=bool(is_causal),
            window=window,
        )
        return out.astype(arrays[0].dtype), lse.astype(jnp.float32)

    out, lse = _stored(attend, recipe.storage)(
        query, key, value, bias, sinks, masks, scale, softcap
    )
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


class Masks(NamedTuple):
    """What restricts the keys of a query, beside causality and the window: arrays or None."""

    array: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None


def storage(name: str) -> contextlib.AbstractContextManager[Any]:
    """The scope in which values of this storage exist; no global setting changes."""
    return jax.enable_x64(True) if name == "float64" else contextlib.nullcontext()


def _stored(function: Any, name: str) -> Any:
    """function of arrays in the scope of this storage, its transpose too."""
    if name == "float32":
        return function

    @jax.custom_vjp
    def wrapped(*arguments: Any) -> Any:
        with storage(name):
            return function(*arguments)

    def forward(*arguments: Any) -> Any:
        with storage(name):
            return jax.vjp(function, *arguments)

    def backward(pull: Any, cotangent: Any) -> Any:
        with storage(name):
            return pull(cotangent)

    wrapped.defvjp(forward, backward)

    def scoped(*arguments: Any) -> Any:
        with storage(name):
            return wrapped(*arguments)

    return scoped


def traced(f: Any, name: str) -> Any:
    """weave's NumPy arrays as arrays of the storage: formats int32, numbers in its float dtype."""
    kinds = {np.dtype(np.int32): jnp.int32, np.dtype(np.float64): jnp.dtype(name)}
    return jax.tree.map(lambda x: jnp.asarray(x, kinds[x.dtype]), f)


@functools.partial(jax.jit, static_argnames=("lanes", "causal", "window"))
def _attend(
    lanes: Lanes,
    f: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masks: Masks,
    sinks: jax.Array | None,
    scale: jax.Array,
    softcap: jax.Array | None,
    *,
    causal: bool,
    window: tuple[int, int] | None,
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, N, D], log-sum-exp [B, T, N]) in storage dtype."""
    structure = lanes.structure
    dtype = jnp.dtype(structure.storage)
    B, T, N, H = query.shape
    S, K, D = key.shape[1], key.shape[2], value.shape[-1]
    G = N // K
    tile = tiles.tile_of(structure.kv_block, S, H, D)
    q = _rows(query.astype(dtype), K)
    k, v = (jnp.moveaxis(x, 2, 1) for x in (key, value))  # [B, K, S, .]
    seeds = _sink_rows(sinks, B, K, T)
    prepare = functools.partial(scores.prepare, lanes, f)
    queries = jax.vmap(jax.vmap(lambda q: prepare(q, scale, softcap, heads=G)))(q)
    start = jax.vmap(jax.vmap(lambda _, s: online_softmax.init(lanes, f, T * G, D, s)))

    def attend(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> accumulation.Carry:
        numbers, starts, stop = chunk

        def body(carry: Any, numbered: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            number, first = numbered
            slot = tiles.slots(first, tile.width)
            valid = (slot < first[:, None] + tile.kv_block) & (slot < stop)
            at = jnp.minimum(slot, S - 1)
            # An empty slot repeats some key, and must not bring its infinities to 0·v.
            v_tile = jnp.where(valid[..., None], v[:, :, at], jnp.zeros((), v.dtype)).astype(dtype)
            keep = _keep(masks, causal, window, at, B, K, T, G)
            extra = None if bias is None else _tile_rows(bias, at, B, K, T, G)
            random = random_keys(lanes, number, (B, K))
            step = functools.partial(online_softmax.step, lanes, f)
            axes = (0, 0, 0, 0, None, *(None if x is None else 0 for x in (extra, keep, random)))
            run = jax.vmap(jax.vmap(step, in_axes=axes), in_axes=axes)
            k_tile = k[:, :, at].astype(dtype)
            return run(queries, carry, k_tile, v_tile, valid, extra, keep, random), None

        return jax.lax.scan(body, start(q, seeds), (numbers, starts))[0]

    points = tiles.split_points(S, structure.split_kv)
    longest = max(tiles.tile_count(*ends, tile) for ends in points)
    starts = [
        tiles.block_starts(*ends, tile, structure.kv_order, range(longest)) for ends in points
    ]
    stops = jnp.asarray([stop for _, stop in points], jnp.int32)
    numbers = jnp.arange(len(points) * longest, dtype=jnp.int32).reshape(len(points), longest)
    chunks = jax.lax.map(attend, (numbers, jnp.asarray(np.stack(starts)), stops))
    merge = jax.vmap(jax.vmap(functools.partial(accumulation.merge, lanes, f)))
    parts = [jax.tree.map(lambda x, i=i: x[i], chunks) for i in range(len(points))]
    carry = functools.reduce(merge, parts)
    finish = functools.partial(online_softmax.finish, lanes, f)
    random = random_keys(lanes, jnp.int32(numbers.size), (B, K))
    out, lse, _ = jax.vmap(jax.vmap(finish))(carry, seeds, random)
    out, lse = out[:, :, 0], lse[:, :, 0]  # the only recipe's lane
    out = jnp.moveaxis(out.reshape(B, K, T, G, D), 2, 1).reshape(B, T, N, D)
    lse = jnp.moveaxis(lse.reshape(B, K, T, G), 2, 1).reshape(B, T, N)
    if masks.query_lengths is not None:
        real = jnp.arange(T)[None] < masks.query_lengths[:, None]
        out = jnp.where(real[..., None, None], out, jnp.zeros_like(out))
    return out, lse


def _rows(query: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, T·G, H]: the rows that share a key/value head."""
    B, T, N, H = query.shape
    return jnp.moveaxis(query.reshape(B, T, kv_heads, N // kv_heads, H), 2, 1).reshape(
        B, kv_heads, -1, H
    )


def _sink_rows(sinks: jax.Array | None, B: int, K: int, T: int) -> jax.Array | None:
    if sinks is None:
        return None
    G = sinks.shape[0] // K
    return jnp.broadcast_to(sinks.reshape(1, K, 1, G), (B, K, T, G)).reshape(B, K, T * G)


def _tile_rows(x: jax.Array, at: jax.Array, B: int, K: int, T: int, G: int) -> jax.Array:
    """[B|1, N|1, T|1, S] at the keys `at` [n, w] -> [B, K, T·G, n, w]."""
    x = x[..., at]
    heads = (K, G) if x.shape[1] == K * G else (1, 1)
    x = x.reshape(x.shape[0], *heads, x.shape[2], *at.shape)
    x = jnp.moveaxis(x, 2, 3)
    return jnp.broadcast_to(x, (B, K, T, G, *at.shape)).reshape(B, K, T * G, *at.shape)


def _keep(
    masks: Masks,
    causal: bool,
    window: tuple[int, int] | None,
    at: jax.Array,
    B: int,
    K: int,
    T: int,
    G: int,
) -> jax.Array | None:
    """Which keys `at` [n, w] each row attends to: bool [B, K, T·G, n, w], None for all."""
    key_at = at[None, None, None]
    query_at = jnp.repeat(jnp.arange(T, dtype=jnp.int32), G).reshape(1, 1, -1, 1, 1)
    rules = [] if masks.array is None else [_tile_rows(masks.array, at, B, K, T, G)]
    if causal:
        rules.append(key_at <= query_at)
    if window is not None:
        left, right = window
        rules += [query_at <= key_at + left, query_at >= key_at - right]
    for lengths, position in ((masks.query_lengths, query_at), (masks.key_lengths, key_at)):
        if lengths is not None:
            rules.append(position < lengths.reshape(-1, 1, 1, 1, 1))
    if not rules:
        return None
    keep = functools.reduce(jnp.logical_and, rules)
    return jnp.broadcast_to(keep, (B, K, T * G, *at.shape))
