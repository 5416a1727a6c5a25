"""On a GPU: eight recipes at long context, beside the float32 product rate and cuDNN."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sweeps.speed.measure import HEAD_DIM, Call, NotRun, Row, call_of, flops, take_turns
from sweeps.speed.ours import HMX, at_block, eight_recipes

HEADS, QUERIES, KEYS = 32, 128, 2**20
RATE_SIZE = 8192  # of the square matrices that the product rate is measured with
PAGE = 2**14


class Repeated(NamedTuple):
    """A stream that reads the same page of keys again and again: nothing is drawn while it runs."""

    key: np.ndarray
    value: np.ndarray
    length: int

    @property
    def heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key.shape[2]

    @property
    def value_dim(self) -> int:
        return self.value.shape[2]

    def blocks(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        places = slice(None) if stop - start == PAGE else np.arange(start, stop) % PAGE
        return self.key[places], self.value[places]


def rows() -> Iterator[Row]:
    import jax

    if jax.default_backend() != "gpu":
        raise NotRun("jax finds no GPU")
    yield from measured(HEADS, QUERIES, KEYS, RATE_SIZE, "cudnn")


def measured(
    heads: int, queries: int, keys: int, rate_size: int, implementation: str
) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    import jaxattn

    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, queries, heads, HEAD_DIM), np.float32).astype(np.float16)
    key, value = (
        rng.standard_normal((PAGE, heads, HEAD_DIM), np.float32).astype(np.float16)
        for _ in range(2)
    )
    stream = Repeated(key, value, keys)
    whole = [jnp.resize(jnp.asarray(x), (1, keys, heads, HEAD_DIM)) for x in (key, value)]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    theirs: Call = call_of(jax.jit(attend), jnp.asarray(query), *whole)
    size: dict[str, Any] = {"queries": queries, "keys": keys}

    square = jnp.ones((rate_size, rate_size), jnp.float32)
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    product = call_of(jax.jit(multiply), square, square)
    times = take_turns(product, product)
    rate = 2 * rate_size**3 / times.seconds
    yield Row(what="float32 matrix product", value=rate / 1e9, unit="GF/s", seconds=times.seconds)

    recipes = eight_recipes()

    def curves() -> Any:
        return jaxattn.error_curves(query, stream, None, recipes)

    times = take_turns(curves, theirs, least=3)
    needed = heads * flops(queries, keys) * (len(recipes) + 1) / 2  # a q·kᵀ, and a p·v for each
    peer = f"jax.nn.dot_product_attention('{implementation}')"
    what = f"error_curves: {HMX}, scores x probs, {at_block(None)}"
    shared: dict[str, Any] = {**size, "recipes": len(recipes), "seconds": times.seconds}
    yield Row(
        what=f"{what}: share of the float32 product rate",
        value=needed / times.seconds / rate,
        unit="",
        **shared,
    )
    yield Row(
        what=f"{what}: a recipe, beside {peer}",
        value=times.ratio / len(recipes),
        unit="times the kernel",
        most=4.0,
        limit_seconds=times.limit,
        **shared,
    )
    one = functools.partial(jaxattn.dot_product_attention, recipe=recipes[0])
    times = take_turns(call_of(jax.jit(one), jnp.asarray(query), *whole), theirs, least=3)
    yield Row(
        what=f"dot_product_attention: {recipes[0].name}, beside {peer}",
        value=times.ratio,
        unit="times the kernel",
        recipes=1,
        seconds=times.seconds,
        limit_seconds=times.limit,
        **size,
    )
