"""The Hexagon HMX recipes against a walk of the kernel's own steps, and what sets kernels apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walk_hexagon import VARIANTS, walk

from jaxattn import dot_product_attention, kernels, online_softmax, reference_attention
from jaxattn.attention import storage, traced
from jaxattn.fields import SITES
from jaxattn.formats import BFLOAT16, FLOAT16, FLOAT32, Format
from jaxattn.lanes import rounder, weave
from jaxattn.scores import prepare, scores

RECIPES = {
    "fp16": "hexagon-hmx-fp16",
    "fp16-qf16": "hexagon-hmx-fp16-qf16",
    "fp16-qf16-spill": "hexagon-hmx-fp16-qf16-spill",
    "exp2hf": "hexagon-hmx-exp2hf",
    "pr24389": "hexagon-pr24389",
    "fp32": "hexagon-hmx-fp32",
}
SCALE = 0.125
BLOCK = 64
# Numbers below 2^2, subnormals flushed: every rescale factor, being at most 1, becomes 0.
NOTHING = Format(11, 2, 15, subnormals=0)


def recipe_of(variant, exact):
    """The recipe in blocks of 64, and with exact contractions where the walk has them."""
    recipe = kernels.get(RECIPES[variant]).replace(kv_block=BLOCK)
    if exact:
        recipe = recipe.replace(storage="float64", qk_accum="float64", pv_accum="float64")
    return recipe


@functools.partial(jax.jit, static_argnums=0)
def walk_blocks(lanes, f, query, key, value, valid):
    """Every block's s and o, the carry after the last block, and the output."""
    queries = prepare(lanes, f, query, jnp.asarray(SCALE, query.dtype), None)

    def body(carry, block):
        k, v, live = block
        s = scores(lanes, f, rounder(lanes, f), queries, k, live, None, None)
        carry = online_softmax.step(lanes, f, queries, carry, k, v, live)
        return carry, (s[0, :, 0], carry.o[0])

    start = online_softmax.init(lanes, f, len(query), value.shape[-1], None)
    carry, (s, o) = jax.lax.scan(body, start, (key, value, valid))
    return s, o, carry, online_softmax.finish(lanes, f, carry)[0]


def steps(recipe, query, key, value):
    """s, p, m, l, o of one head as the walk gives them, and the output.

    P is what an identity for V leaves in the o of a recipe that forgets the blocks before.
    """
    keys, blocks = len(key), -(-len(key) // BLOCK)
    key, value = (np.pad(x, ((0, blocks * BLOCK - keys), (0, 0))) for x in (key, value))
    key, value = (x.reshape(blocks, 1, BLOCK, -1) for x in (key, value))
    valid = np.arange(blocks * BLOCK).reshape(blocks, 1, BLOCK) < keys
    identity = np.broadcast_to(np.eye(BLOCK), (blocks, 1, BLOCK, BLOCK))
    bare = recipe.replace(output=recipe.pv_accum, output_rescale=NOTHING)
    with storage(recipe.storage):
        query, key, value, identity = (
            jnp.asarray(x, recipe.storage) for x in (query, key, value, identity)
        )
        found = []
        for one, v in ((recipe, value), (bare, identity)):
            lanes, f = weave([one])
            found.append(walk_blocks(lanes, traced(f, one.storage), query, key, v, valid))
        (s, _, carry, out), (_, p, *_) = found
        joined = {"s": s, "p": p}
        arrays = {name: np.concatenate(x, axis=1)[:, :keys] for name, x in joined.items()}
        arrays |= {name: getattr(carry, name)[0] for name in "mlo"} | {"output": out[0]}
        return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def dyadic(seed, *shape):
    """Multiples of 2^-4 of at most 2: every product and sum of a few thousand is exact."""
    return np.random.default_rng(seed).integers(-32, 33, shape) / 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_is_the_walks_on_a_dyadic_grid(variant):
    """Bit for bit, with float64 contractions and exponentials; the last of 16 blocks is partial."""
    query, key, value = dyadic(0, 5, 64), dyadic(1, 1000, 64), abs(dyadic(2, 1000, 16))
    expected = walk(query, key, value, scale=SCALE, kv_block=BLOCK, variant=variant, exact=True)
    recipe = recipe_of(variant, exact=True)
    got = steps(recipe, query, key, value)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    arrays = (np.float32(x)[None, :, None] for x in (query, key, value))
    out = dot_product_attention(*arrays, recipe=recipe, scale=SCALE)
    np.testing.assert_array_equal(out[0, :, 0], expected["output"])


@pytest.mark.parametrize(
    "variant",
    [
        *("fp16", "fp32"),
        pytest.param("pr24389", marks=pytest.mark.slow),
        pytest.param("fp16-qf16", marks=pytest.mark.slow),
        pytest.param("fp16-qf16-spill", marks=pytest.mark.slow),
        pytest.param("exp2hf", marks=pytest.mark.slow),
    ],
)
def test_steps_on_ordinary_inputs(variant):
    """S and P differ by one step of a half in a few elements, where float32 sums fall apart."""
    rng = np.random.default_rng(3)
    query, key = rng.standard_normal((8, 64)), rng.standard_normal((4096, 64))
    value = rng.standard_normal((4096, 32)) + 1.0
    query, key, value = (np.float16(x).astype(np.float32) for x in (query, key, value))
    expected = walk(query, key, value, scale=SCALE, kv_block=BLOCK, variant=variant)
    got = steps(recipe_of(variant, exact=False), query, key, value)
    same = got["s"] == expected["s"]
    for name, where in (("s", np.ones_like(same)), ("p", same)):
        off = (got[name] != expected[name]) & where
        assert off.mean() <= 0.005, name
        step = np.spacing(np.abs(np.float16(expected[name]))).astype(np.float64)
        # A sum of 64 products that cancels is off by more than a step of the smallest halves.
        assert np.all(np.abs(got[name] - expected[name])[off] <= np.maximum(step, 1e-6)[off]), name

    ideal = reference_attention(*(x[None, :, None] for x in (query, key, value)), scale=SCALE)
    ours, theirs = (x["output"] - ideal[0, :, 0] for x in (got, expected))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] >= 0.999
    assert np.linalg.norm(theirs) > 0


def test_pr24389_is_the_fp16_kernel_with_three_float32_sites():
    """m, the row sum and l, and a·l, which is rounded on its way into l."""
    recipe = kernels.get("hexagon-pr24389")
    wide = dict.fromkeys(("running_max", "row_sum", "running_sum"), "float32")
    before = kernels.get("hexagon-hmx-fp16")
    assert before.replace(**wide).identity() == recipe.identity()
    changed = {site for site in SITES if getattr(recipe, site) != getattr(before, site)}
    assert changed == {*wide, "rescaled_sum"}
    assert all(getattr(recipe, site) == FLOAT32 for site in changed)


def test_what_was_merged_widens_m_and_l_alone():
    """llama.cpp #25085 left the row sum, the rescale factor, O and 1/l in half precision."""
    recipe = kernels.get("hexagon-hmx-fp32")
    assert recipe.running_max == recipe.running_sum == FLOAT32
    for site in ("row_sum", "rescale", "output", "inverse", "result", "probs", "scores"):
        assert getattr(recipe, site) == FLOAT16, site


def test_variants_of_l_change_l_alone():
    before = kernels.get("hexagon-hmx-fp16")
    for name in ("hexagon-hmx-fp16-qf16", "hexagon-hmx-fp16-qf16-spill"):
        recipe = kernels.get(name)
        changed = {site for site in SITES if getattr(recipe, site) != getattr(before, site)}
        assert changed <= {"running_sum", "rescaled_sum"} and "running_sum" in changed


def test_rules_and_blocks():
    rules = {name: kernels.get(name).kv_block for name in kernels.names()}
    assert rules["hexagon-hmx-fp16"] == rules["hexagon-pr24389"] == "hexagon-hmx-2026-06"
    assert rules["hexagon-hmx-fp32"] == "hexagon-hmx-2026-08"
    assert rules["metal"] == rules["metal-bf16"] == rules["ggml-cpu-prefill"] == 64
    assert rules["ggml-cpu-decode"] == rules["ggml-cpu-splitkv"] == 1
    assert kernels.get("ggml-cpu-decode").output == FLOAT16
    assert kernels.get("metal-bf16").query == BFLOAT16


def firsts():
    """The first kernel of each way to make scores; `make test-all` takes all kernels."""
    found = {}
    for name in kernels.names():
        r = kernels.get(name)
        way = (r.exp, r.log2e_at, r.scale_at, r.cap_at, r.tanh, r.sinks, r.bias_factor)
        found.setdefault(way, name)
    return set(found.values())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in firsts() else pytest.mark.slow) for n in kernels.names()],
)
def test_bias_softcap_and_sinks_are_those_of_attention(name):
    """Whatever its base and formats it is attention; two sources add their bias in base 2."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 2, 32)).astype(np.float32) for n in (4, 200, 200))
    bias = (2 * rng.standard_normal((1, 4, 200))).astype(np.float32)
    recipe = kernels.get(name)
    more = {} if recipe.sinks == "none" else {"sinks": np.array([1.0, 3.0], np.float32)}
    want = reference_attention(q, k, v, bias, softcap=10.0, **more)
    got = dot_product_attention(q, k, v, bias, recipe=recipe, softcap=10.0, **more)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    if name in ("sage-1", "hexagon-hmx-exp2hf"):
        assert error > 0.2
    else:
        assert error < 0.15
