"""Emulated formats against static dtypes: the same bits, where the host cannot fuse multiply-adds.

With FMA the static code's `a*l + r` has one rounding where it says two (XLA contracts it), so the
comparison holds only under --xla_cpu_max_isa=AVX: `make test-isa`.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import contraction, kernels, online_softmax
from jaxattn.attention import traced
from jaxattn.lanes import weave
from jaxattn.recipe import Recipe
from jaxattn.scores import prepare

pytestmark = [
    pytest.mark.isa,
    pytest.mark.skipif("max_isa" not in os.environ.get("XLA_FLAGS", ""), reason="FMA contracts"),
]
T, H, D, BLOCK, BLOCKS = 16, 64, 32, 64, 8
SCALE = np.float32(0.125)

NARROW = {
    "half": dict(row_sum="float16", rescale="float16", running_sum="float16", output="float16"),
    "bfloat": dict(row_sum="bfloat16", rescale="bfloat16", running_sum="bfloat16"),
    "output only": dict(output="float16", rescaled_output="float16"),
    "nothing": dict(),
    "mixed": dict(scores="float16", probs="float16", summand="float16", running_sum="bfloat16"),
}


def static(recipe: Recipe, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Online softmax with plain casts to the dtypes that the recipe's sites name."""

    def cast(site: str, x: jax.Array) -> jax.Array:
        format = getattr(recipe, site)
        dtype = {24: jnp.float32, 11: jnp.float16, 8: jnp.bfloat16}[format.precision]
        return x.astype(dtype).astype(jnp.float32)

    m, l, o = jnp.full((T,), -jnp.inf), jnp.zeros((T,)), jnp.zeros((T, D))
    s_all = cast("scores", contraction.scores(q, k) * SCALE)
    m_all = jnp.maximum(m[:, None], jax.lax.cummax(jnp.max(s_all, -1), axis=1))
    p_raw = jnp.exp(s_all - m_all[..., None])
    pv = contraction.values(cast("probs", p_raw), v)
    r_all = cast("row_sum", contraction.total(cast("summand", p_raw)))
    for j in range(BLOCKS):
        a = cast("rescale", jnp.exp(m - m_all[:, j]))
        l = cast("running_sum", cast("rescaled_sum", a * l) + r_all[:, j])
        o = cast("output", cast("rescaled_output", a[:, None] * o) + pv[j])
        m = m_all[:, j]
    return o * (1 / l)[:, None]


@pytest.mark.parametrize("name", NARROW)
def test_static_dtypes_equal_emulated_formats(name: str) -> None:
    recipe = kernels.get("float32").replace(**NARROW[name])
    rng = np.random.default_rng(7)
    q = jnp.asarray(rng.standard_normal((T, H)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((BLOCKS, BLOCK, H)), jnp.float32)
    v = jnp.asarray(rng.standard_normal((BLOCKS, BLOCK, D)), jnp.float32)
    lanes, f = weave([recipe])

    @jax.jit
    def emulated(f, q, k, v):  # type: ignore[no-untyped-def]
        queries = prepare(lanes, f, q, jnp.asarray(SCALE), None)
        carry = online_softmax.init(lanes, f, T, D, None)
        valid = jnp.ones((BLOCKS, BLOCK), bool)
        carry = online_softmax.step(lanes, f, queries, carry, k, v, valid)
        return online_softmax.finish(lanes, f, carry)[0][0]

    got = np.asarray(emulated(traced(f, "float32"), q, k, v))
    want = np.asarray(jax.jit(lambda q, k, v: static(recipe, q, k, v))(q, k, v))
    np.testing.assert_array_equal(got, want)
