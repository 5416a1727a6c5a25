"""What jaxattn's own calls cost: one recipe, eight, hundreds, and a kernel that rounds each key."""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sweeps.speed.measure import (
    HEAD_DIM,
    PIECE,
    Call,
    Problem,
    Row,
    Times,
    call_of,
    flops,
    limit,
    problem,
    take_turns,
)

SHORT, LONG = (512, 4096), (64, 131072)  # queries, keys
FORMATS = ("float16", "bfloat16", "fp22", "float32")
SUMS = ("row_sum", "rescale", "running_sum", "output")
EIGHT = ("scores", "difference", "probs", "row_sum", "rescale", "running_sum", "output", "inverse")
HMX = "hexagon-hmx-fp16"


def lattice(recipe: Any, sites: dict[str, tuple[str, ...]]) -> list[Any]:
    """The recipe with every choice of formats at the sites."""
    changes = (dict(zip(sites, formats, strict=True)) for formats in _product(sites))
    return [recipe.replace(name=f"{recipe.name}-{i}", **x) for i, x in enumerate(changes)]


def _product(sites: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    return itertools.product(*sites.values())


def hmx(kv_block: int | None = None) -> Any:
    """The recipe that lattices start from; None: at the block that its rule chooses."""
    from jaxattn import kernels

    recipe = kernels.get(HMX)
    return recipe if kv_block is None else recipe.replace(kv_block=kv_block)


def at_block(kv_block: int | None) -> str:
    return "its block rule" if kv_block is None else f"kv_block {kv_block}"


def attention(recipe: Any, problem: Problem) -> Call:
    """dot_product_attention, jitted, of float32 arrays on the device."""
    import jax

    import jaxattn

    function = functools.partial(jaxattn.dot_product_attention, recipe=recipe)
    return call_of(jax.jit(function), *(x[:, None] for x in problem.arrays()))


def curves(recipes: list[Any], problem: Problem, contexts: list[int] | None = None) -> Call:
    """error_curves with all it needs, the float64 reference too, of float16 arrays of the host."""
    import jaxattn

    arrays = problem.layout("float16")
    return lambda: jaxattn.error_curves(*arrays, recipes, contexts=contexts)


def reference(problem: Problem) -> Call:
    """The float64 reference alone, with the threads and the pages that error_curves gives it."""
    from jaxattn import reference as whole
    from jaxattn.exact import ONE_THREAD
    from jaxattn.pages import PAGE_KEYS

    query, key, value = problem.layout("float16")
    rows = query[0].swapaxes(0, 1).astype("float64") * HEAD_DIM**-0.5

    def call() -> Any:
        state = None
        with ONE_THREAD as threads, ThreadPoolExecutor(threads) as pool:
            for start in range(0, key.shape[1], PAGE_KEYS):
                page = slice(start, start + PAGE_KEYS)
                state = whole.extend(state, rows, key[0, page], value[0, page], pool.map)
        assert state is not None
        return whole.finish(state)

    return call


def products(count: int, problem: Problem) -> Call:
    """`count` bare p·v, of p that are there already."""
    import jax
    import jax.numpy as jnp

    q, k, v = problem.arrays()
    p = jnp.stack([(q @ k.T) * (i + 1) for i in range(count)])
    one = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return call_of(jax.jit(lambda p, v: jax.lax.map(lambda each: one(each, v), p)), p, v)


def row(what: str, times: Times, problem: Problem, **more: Any) -> Row:
    """A row of the call's ratio to the limit that it took turns with."""
    return Row(
        what=what,
        value=times.ratio,
        seconds=times.seconds,
        limit_seconds=times.limit,
        **{**problem.size, **more},
    )


def limits() -> Iterator[Row]:
    for shape in (SHORT, LONG):
        drawn = problem(*shape)
        pair = limit(drawn)
        times = take_turns(limit(drawn, PIECE), pair)
        yield Row(
            what="q·kᵀ whole, p·v whole",
            series="limit",
            value=flops(*shape) / times.limit / 1e9,
            unit="GF/s",
            seconds=times.limit,
            **drawn.size,
        )
        why = "the scores stay in cache" if times.ratio < 1 else ""
        yield row(f"the same in pieces of {PIECE:,} keys", times, drawn, why=why)


def one() -> Iterator[Row]:
    from jaxattn import kernels

    plain = kernels.get("float32").replace(kv_block=512)
    cases = [("float32, kv_block 512", plain)]
    cases += [(f"{HMX}, {at_block(block)}", hmx(block)) for block in (64, None)]
    for shape, most in ((SHORT, 1.2), (LONG, 1.0)):
        drawn = problem(*shape)
        pair = limit(drawn)
        for what, recipe in cases:
            times = take_turns(attention(recipe, drawn), pair)
            what = f"dot_product_attention: {what}"
            yield row(what, times, drawn, recipes=1, most=most, series="attention")


def eight() -> Iterator[Row]:
    drawn = problem(*LONG)
    pair = limit(drawn)
    yield row("the float64 reference alone", take_turns(reference(drawn), pair), drawn)
    yield row("8 bare p·v, of p in memory", take_turns(products(8, drawn), pair), drawn)
    for block in (None, 64, 512):
        recipes = eight_recipes(block)
        times = take_turns(curves(recipes, drawn), pair)
        what = f"error_curves: {HMX}, scores x probs, {at_block(block)}"
        goal = {} if block == 64 else {"most": 7.0}
        yield row(what, times, drawn, recipes=len(recipes), why=passes(hmx(block), drawn), **goal)


def eight_recipes(kv_block: int | None = None) -> list[Any]:
    """Eight recipes with eight distinct p."""
    return lattice(hmx(kv_block), {"scores": ("float16", "float32"), "probs": FORMATS})


def many() -> Iterator[Row]:
    drawn = problem(*LONG)
    pair = limit(drawn)
    for block in (None, 64, 512):
        recipes = lattice(hmx(block), dict.fromkeys(SUMS, FORMATS))
        times = take_turns(curves(recipes, drawn), pair)
        what = f"error_curves: {HMX}, 4 formats at {', '.join(SUMS)}, {at_block(block)}"
        goal = {"most": 5.0} if block is None else {}
        yield row(what, times, drawn, recipes=len(recipes), why=passes(hmx(block), drawn), **goal)


def passes(recipe: Any, problem: Problem) -> str:
    """How many keys error_curves walks at its default contexts, where it is not each key once."""
    from jaxattn import tiles
    from jaxattn.walk import default_contexts

    keys = len(problem.key)
    layouts = {
        tiles.tile_of(recipe.kv_block, n, HEAD_DIM, HEAD_DIM): n for n in default_contexts(keys)
    }
    walked = sum(layouts.values()) / keys
    return f"{len(layouts)} sizes of block, {walked:.2f} times the keys" if walked > 1 else ""


def binary() -> Iterator[Row]:
    drawn = problem(*LONG)
    recipes = lattice(hmx(), dict.fromkeys(EIGHT, ("float16", "float32")))
    times = take_turns(curves(recipes, drawn), limit(drawn))
    what = f"error_curves: {HMX}, float16 or float32 at {', '.join(EIGHT)}, {at_block(None)}"
    yield row(what, times, drawn, recipes=len(recipes), most=12.0)


def oracle() -> Iterator[Row]:
    drawn = problem(*LONG)
    pair = limit(drawn)
    name = "ggml-cpu-decode"
    times = take_turns(attention(name, drawn), pair)
    yield row(f"dot_product_attention: {name}", times, drawn, recipes=1, most=3.0)
    whole, alone = (take_turns(x, pair) for x in (curves([name], drawn), reference(drawn)))
    left = Times(whole.seconds - alone.seconds * whole.limit / alone.limit, whole.limit)
    why = f"{whole.ratio:.2f} limits less {alone.ratio:.2f} of the reference"
    what = f"error_curves: {name}, less its reference"
    yield row(what, left, drawn, recipes=1, most=3.0, why=why)


def recipes() -> Iterator[Row]:
    """Cost against the number of recipes: 1, 4, 16, 64, 256."""
    drawn = problem(*LONG)
    pair = limit(drawn)
    for count in range(len(SUMS) + 1):
        some = lattice(hmx(), dict.fromkeys(SUMS[:count], FORMATS))
        times = take_turns(curves(some, drawn), pair)
        what = f"error_curves: 4 formats at {count} sites of {HMX}, {at_block(None)}"
        yield row(what, times, drawn, recipes=len(some), series="ours")
