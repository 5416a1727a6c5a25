"""Passes over the keys: what error_curves runs, piece by piece, on a stream of any length.

A pass is one structure of recipes in one layout of blocks. Its compiled functions take traced
bounds, so that neither the contexts that are reported nor the block size that a rule chose ask for
a compilation of their own.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxattn import accumulation, online_softmax, scores, tiles
from jaxattn.attention import storage, traced
from jaxattn.exact import Exact
from jaxattn.formats import Format
from jaxattn.lanes import Lanes, random_keys, weave
from jaxattn.pages import PAGE_KEYS, Pages
from jaxattn.recipe import Recipe

AHEAD = 2  # pieces of a walk that the device may still have before it


class Job(NamedTuple):
    """What a pass computes: `members` index the caller's recipes; contexts share a block layout;
    devices: a mesh of the one axis "heads", if not the default device."""

    members: list[int]
    recipes: list[Recipe]
    tile: tiles.Tile
    contexts: list[int]
    devices: Mesh | None = None


def over_heads(x: Any, devices: Mesh | None, axis: int = 0) -> Any:
    """Arrays on the devices, their axis of heads shared out; jitted functions follow them there."""
    if devices is None:
        return jax.device_put(x)
    return jax.device_put(x, NamedSharding(devices, PartitionSpec(*(None,) * axis, "heads")))


class Outcome(NamedTuple):
    """What a pass holds at a context: a carry [K, lanes, ...] on the device, and how to finish it.

    group: the heads that a KV head's rows belong to, each in turn
    """

    lanes: Lanes
    f: Any
    carry: accumulation.Carry
    group: int


def run(
    job: Job,
    pages: Pages,
    rows: np.ndarray,
    group: int,
    value_dim: int,
    scale: float,
    formats: list[Format],
) -> Iterator[tuple[int, int | None, Outcome | None]]:
    """Walks the keys, yielding (key that is needed next, None, None), or (.., context, outcome).

    rows: [K, R, H], R = T·G, of `group` heads each in turn.
    """
    structure = job.recipes[0]
    lanes, f = _woven(tuple(job.recipes), tuple(formats))
    with storage(structure.storage):
        query = over_heads(np.asarray(rows, structure.storage), job.devices)
        factor = np.asarray(scale, structure.storage)
        queries, fresh = _begin(lanes, f, query, factor, group, value_dim)
        queries, fresh = over_heads((queries, fresh), job.devices)
    segment = functools.partial(_segment, lanes, f, queries, job, pages, fresh)

    def conclude(parts: list[Any]) -> Outcome:
        with storage(structure.storage):
            carry = functools.reduce(functools.partial(_merge, lanes, f), parts)
        return Outcome(lanes, f, carry, group)

    if structure.one_walk:
        for at, context, carry in segment(0, job.contexts):
            yield at, context, None if context is None else conclude([carry])
        return
    for n in job.contexts:
        parts = []
        points = tiles.split_points(n, structure.split_kv)
        each = tiles.tile_count(*points[0], job.tile)
        for i, (start, stop) in enumerate(points):
            for at, context, carry in segment(start, [stop], i * each):
                if context is not None:
                    parts.append(carry)
                yield at, None, None
        yield n, n, conclude(parts)


@functools.lru_cache(maxsize=64)  # the layouts of a rule share their lanes
def _woven(recipes: tuple[Recipe, ...], formats: tuple[Format, ...]) -> tuple[Lanes, Any]:
    lanes, f = weave(recipes, *formats)
    with storage(recipes[0].storage):
        return lanes, traced(f, recipes[0].storage)


def _segment(
    lanes: Lanes,
    f: Any,
    queries: Any,
    job: Job,
    pages: Pages,
    carry: Any,
    start: int,
    contexts: list[int],
    number: int = 0,
) -> Iterator[tuple[int, int | None, Any]]:
    """The carry of keys [start, n) for each n of contexts; of the last alone if walked backward.

    number: of its first tile, for random bits.
    """
    tile, order, stop = job.tile, lanes.structure.kv_order, contexts[-1]
    total = tiles.tile_count(start, stop, tile)
    count = max(1, PAGE_KEYS // (tile.width * tile.blocks))
    running: list[Any] = []
    for first in range(0, total, count):
        if len(running) == AHEAD:  # or pieces would pile up on the device
            jax.block_until_ready(running.pop(0))
        some = tiles.block_starts(start, stop, tile, order, range(first, first + count))
        low, high = int(some.min()), min(int(some[some < stop].max()) + tile.kv_block, stop)
        yield low, None, None
        with storage(lanes.structure.storage):
            laid = _lay(pages.read(low, high), some, low, tile)
            tape = (*over_heads(tuple(laid), job.devices, axis=3), some)
            tape += np.int32(tile.kv_block), np.int32(number + first)

        def advance(carry: Any, begin: int, end: int, limit: int, tape: Any = tape) -> Any:
            bounds = (np.int32(begin), np.int32(end), np.int32(limit))
            with storage(lanes.structure.storage):
                after = _advance(lanes, f, queries, carry, *tape, *bounds)
                return after if job.devices is None else over_heads(after, job.devices)

        done = 0
        for n in contexts if order == "forward" else ():
            if low < n <= low + count * tile.keys:
                whole, rest = divmod(n - low, tile.keys)
                carry = advance(carry, done, whole, stop) if whole > done else carry
                done = whole
                yield low, n, advance(carry, whole, whole + 1, n) if rest else carry
        if order == "backward" or low + count * tile.keys < stop:
            carry = advance(carry, done, min(count, total - first), stop)
        running.append(carry.l)
    if order == "backward":
        yield start, stop, carry


def _lay(
    piece: tuple[np.ndarray, np.ndarray], starts: np.ndarray, low: int, tile: tiles.Tile
) -> Iterator[np.ndarray]:
    """Keys [S, K, .] from key `low` on, as blocks [tiles, n, w, K, .]; empty slots hold zeros."""
    first = (starts - low).ravel()
    first = first[first < len(piece[0])]
    straight = tile.width == tile.kv_block and bool((np.diff(first) == tile.width).all())
    for x in piece:
        if straight and len(x) == starts.size * tile.width:
            yield x.reshape(*starts.shape, tile.width, *x.shape[1:])
            continue
        laid = np.zeros((*starts.shape, tile.width, *x.shape[1:]), x.dtype)
        slots = laid.reshape(-1, *x.shape[1:])
        if straight:
            slots[: len(x)] = x
        else:
            for i, start in enumerate(first):
                some = x[start : start + tile.kv_block]
                slots[i * tile.width :][: len(some)] = some
        yield laid


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _begin(
    lanes: Lanes, f: Any, query: jax.Array, scale: jax.Array, group: int, value_dim: int
) -> tuple[Any, Any]:
    queries = jax.vmap(lambda q: scores.prepare(lanes, f, q, scale, None, group))(query)
    start = lambda q: online_softmax.init(lanes, f, q.shape[0], value_dim, None)  # noqa: E731
    return queries, jax.vmap(start)(query)


@functools.partial(jax.jit, static_argnums=0)
def _advance(
    lanes: Lanes,
    f: Any,
    queries: Any,
    carry: Any,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    kv_block: jax.Array,
    number: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    limit: jax.Array,
) -> Any:
    """The carry after tiles begin..end of key, value [tiles, n, w, K, .], cut at key `limit`."""
    dtype = jnp.dtype(lanes.structure.storage)
    step = functools.partial(online_softmax.step, lanes, f)

    def body(t: jax.Array, carry: Any) -> Any:
        slot = tiles.slots(starts[t], key.shape[2])
        valid = (slot < starts[t][:, None] + kv_block) & (slot < limit)
        k, v = (jnp.moveaxis(x[t], 2, 0).astype(dtype) for x in (key, value))
        v = jnp.where(valid[..., None], v, jnp.zeros_like(v))
        random = random_keys(lanes, number + t, (key.shape[3],))
        axes = (0, 0, 0, 0, None, None, None, None if random is None else 0)
        return jax.vmap(step, in_axes=axes)(queries, carry, k, v, valid, None, None, random)

    return jax.lax.fori_loop(begin, end, body, carry)


@functools.partial(jax.jit, static_argnums=0)
def _merge(lanes: Lanes, f: Any, one: Any, other: Any) -> Any:
    return jax.vmap(functools.partial(accumulation.merge, lanes, f))(one, other)


Report = Callable[[list[int], int, Outcome], None]


def run_all(
    jobs: list[Job],
    pages: Pages,
    exact: Exact,
    report: Report,
    progress: Callable[[int, int], None] | None,
    **shared: Any,
) -> None:
    """Runs all jobs, always the one that is furthest behind, so that they share each page."""
    backward = [job for job in jobs if job.recipes[0].kv_order == "backward"]
    together = [job for job in jobs if job not in backward]
    total = sum(_work(job) for job in jobs)
    done = 0
    for group in (together, *([job] for job in backward)):
        walks = {i: run(job, pages, **shared) for i, job in enumerate(group)}
        at = dict.fromkeys(walks, 0)
        once = all(job.recipes[0].one_walk for job in group)
        while walks:
            exact.advance(min(at.values()) + PAGE_KEYS)  # beside the walk over the same keys
            i = min(walks, key=lambda i: at[i])
            for position, context, outcome in walks[i]:
                if outcome is not None and context is not None:
                    report(group[i].members, context, outcome)
                    continue
                done += max(0, position - at[i])
                at[i] = position
                break
            else:
                done += max(0, group[i].contexts[-1] - at[i])
                del walks[i], at[i]
            if once:
                pages.forget(min([*at.values(), exact.at], default=0))
            if progress is not None:
                progress(min(done, total), total)
    if progress is not None:
        progress(total, total)


def _work(job: Job) -> int:
    return job.contexts[-1] if job.recipes[0].one_walk else sum(job.contexts)
