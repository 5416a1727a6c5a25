"""Recipes of three kernels against walks of their sources, and the proof that the walks can tell.

ggml on CPUs (x86 and NEON), ggml's CUDA mma kernel, Pallas flash attention for TPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walk_ggml_cpu
import walk_ggml_cuda
import walk_pallas

from jaxattn import dot_product_attention, kernels, online_softmax, reference_attention
from jaxattn.attention import storage, traced
from jaxattn.fields import SITES
from jaxattn.formats import FLOAT32, FLOAT64
from jaxattn.lanes import weave
from jaxattn.scores import prepare


class Case(NamedTuple):
    """A recipe's walk, the size of its inputs, and how near it comes to exact attention."""

    walk: Callable[..., dict[str, np.ndarray]]
    keys: int
    head_dim: int
    limit: float


CASES = {
    "ggml-cpu-decode": Case(functools.partial(walk_ggml_cpu.walk, variant="f16c"), 200, 64, 1.5e-2),
    "ggml-cpu-decode-neon": Case(
        functools.partial(walk_ggml_cpu.walk, variant="neon"), 200, 64, 1.5e-2
    ),
    "ggml-cuda-mma-f16": Case(walk_ggml_cuda.walk, 264, 128, 4e-3),
    "pallas-tpu-flash-f32": Case(
        functools.partial(walk_pallas.walk, dtype="float32"), 512, 64, 2e-6
    ),
    "pallas-tpu-flash-bf16": Case(
        functools.partial(walk_pallas.walk, dtype="bfloat16"), 512, 64, 1.5e-2
    ),
}
SIXTEEN_BITS = [name for name in CASES if name != "pallas-tpu-flash-f32"]

# What the kernel does not do: other numbers, other steps, another end.
NUMBERS = {"ggml-cuda-mma-f16": {"max_offset": (0.0, math.log(8)), "rescale_flush": (-math.inf,)}}
STRUCTURE = [
    ("ggml-cpu-decode", {"kv_block": 2, "output_every": 2}),
    ("ggml-cpu-decode-neon", {"qk_tree": 1}),
    ("ggml-cpu-decode-neon", {"qk_partials": 16}),
    ("ggml-cuda-mma-f16", {"output_every": 8}),
    ("ggml-cuda-mma-f16", {"kv_block": 128}),
    ("ggml-cuda-mma-f16", {"scale_at": "scores"}),
]
NORMALISE = [
    ("pallas-tpu-flash-f32", "multiply"),
    ("ggml-cpu-decode", "divide"),
    ("ggml-cuda-mma-f16", "multiply"),
]


def draw(case, seed, value_dim=32):
    """query, key, value in float32, not on the grid of any narrower format, and the scale.

    The first row's scores are 0 but for the last key's, which exceeds them by 20 to 21: there a
    kernel that flushes a below exp(-20) forgets what it has seen.
    """
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((4, case.head_dim))
    key = rng.standard_normal((case.keys, case.head_dim))
    value = rng.standard_normal((case.keys, value_dim)) + 1.0
    scale = 1.02 / math.sqrt(case.head_dim)
    query[0], key[:, 0] = 0.0, 0.0
    query[0, 0], key[-1, 0] = 16.0, 20.5 / (16 * scale)
    return *(np.float32(x) for x in (query, key, value)), scale


def attend(recipe, query, key, value, scale):
    """Output [T, D] and log-sum-exp [T]."""
    query, key, value = (x[None, :, None] for x in (query, key, value))
    out, lse = dot_product_attention(
        query, key, value, recipe=recipe, scale=scale, return_residual=True
    )
    return np.asarray(out)[0, :, 0], np.asarray(lse)[0, :, 0]


def ideal(query, key, value, scale):
    query, key, value = (np.float64(x)[None, :, None] for x in (query, key, value))
    return reference_attention(query, key, value, scale=scale)[0, :, 0]


def exact(recipe):
    """The recipe with the sums that the kernel has in float32 in float64, as walks have them."""
    sums = [site for site in ("qk_accum", "pv_accum") if getattr(recipe, site) == FLOAT32]
    return recipe.replace(storage="float64", **dict.fromkeys(sums, "float64"))


def log_sum_exp(walked):
    return np.float32(walked["m"] + np.log(walked["l"]))


def errors_correlate(recipe, case, seed=1):
    *arrays, scale = draw(case, seed)
    walked = case.walk(*arrays, scale=scale)["output"]
    truth = ideal(*arrays, scale)
    ours = attend(recipe, *arrays, scale)[0]
    return np.corrcoef((ours - truth).ravel(), (walked - truth).ravel())[0, 1]


@pytest.mark.parametrize("name", CASES)
def test_recipe_is_the_walk_bit_for_bit(name):
    """On ordinary inputs, with contractions and exponentials in float64."""
    case = CASES[name]
    *arrays, scale = draw(case, 0)
    walked = case.walk(*arrays, scale=scale, exact=True)
    out, lse = attend(exact(kernels.get(name)), *arrays, scale)
    np.testing.assert_array_equal(out, walked["output"])
    np.testing.assert_array_equal(lse, log_sum_exp(walked))


@pytest.mark.parametrize("name", CASES)
def test_equal_scores_need_no_exact_sums(name):
    """All p are 1 (CUDA: one number) and v multiples of 2^-4: every float32 sum is exact."""
    case = CASES[name]
    query, key, value, scale = draw(case, 2)
    arrays = np.zeros_like(query), key, np.clip(np.rint(value * 16), -32, 32) / 16
    walked = case.walk(*arrays, scale=scale)
    out, lse = attend(kernels.get(name), *arrays, scale)
    # The CUDA kernel's p are not exact: each thread counts its own, in an order of its own.
    ulps = 8 if "cuda" in name else 0
    np.testing.assert_array_max_ulp(out, np.float32(walked["output"]), maxulp=ulps)
    np.testing.assert_allclose(lse, log_sum_exp(walked), rtol=1e-6)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_errors_on_ordinary_inputs_are_the_walks(name):
    """In float32, with sums in another order: the same error in every output, not just its size."""
    assert errors_correlate(kernels.get(name), CASES[name]) >= 0.999


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_walks_are_attention(name, wide):
    case = CASES[name]
    *arrays, scale = draw(case, 4)
    walked = case.walk(*arrays, scale=scale, exact=wide)
    truth = ideal(*arrays, scale)
    np.testing.assert_allclose(walked["output"], truth, rtol=case.limit, atol=case.limit)
    assert np.abs(walked["output"] - truth).max() > case.limit / 100
    assert all(array.dtype == np.float64 for array in walked.values())


def outputs(recipes, query, key, value, scale):
    """The output of each of several recipes of one structure, in one program."""
    width = recipes[0].kv_block
    blocks = -(-len(key) // width)
    valid = (np.arange(blocks * width) < len(key)).reshape(blocks, 1, width)
    with storage(recipes[0].storage):
        arrays = [jnp.asarray(query, recipes[0].storage)]
        for x in (key, value):
            x = np.pad(x, ((0, blocks * width - len(x)), (0, 0))).reshape(blocks, 1, width, -1)
            arrays.append(jnp.asarray(x, recipes[0].storage))
        lanes, f = weave(recipes)
        f = traced(f, recipes[0].storage)
        found = run(lanes, f, jnp.asarray(scale, recipes[0].storage), *arrays, valid)
        return np.float32(found)[np.array(lanes.recipes)]


@functools.partial(jax.jit, static_argnums=0)
def run(lanes, f, scale, query, key, value, valid):
    queries = prepare(lanes, f, query, scale, None)

    def body(carry: Any, block: Any) -> Any:
        return online_softmax.step(lanes, f, queries, carry, *block), None

    carry = online_softmax.init(lanes, f, len(query), value.shape[-1], None)
    carry, _ = jax.lax.scan(body, carry, (key, value, valid))
    return online_softmax.finish(lanes, f, carry)[0]


@pytest.mark.parametrize("name", CASES)
def test_no_rounding_may_be_left_out(name):
    """Each site that rounds below float32 made float32, and each number changed: bits differ."""
    case = CASES[name]
    base = exact(kernels.get(name))
    bare = base.replace(result=FLOAT32)  # a result in 16 bits would hide much of the rest
    kept = {site: getattr(bare, site) for site in SITES}
    changes = [{**kept, site: FLOAT32} for site in SITES if kept[site] not in (FLOAT32, FLOAT64)]
    changes += [{field: x} for field, some in NUMBERS.get(name, {}).items() for x in some]
    *arrays, scale = draw(case, 0)
    recipes = [base, bare, *(bare.replace(**change) for change in changes)]
    first, wide, *others = outputs(recipes, *arrays, scale)
    np.testing.assert_array_equal(first, case.walk(*arrays, scale=scale, exact=True)["output"])
    assert np.array_equal(first, wide) == (base.result == FLOAT32)
    for change, other in zip(changes, others, strict=True):
        assert np.mean(other != wide) > 0.05, change


@pytest.mark.parametrize(("name", "change"), STRUCTURE)
def test_no_step_may_be_another(name, change):
    assert errors_correlate(kernels.get(name).replace(**change), CASES[name]) < 0.99


@pytest.mark.parametrize(("name", "normalise"), NORMALISE)
def test_no_end_may_be_another(name, normalise):
    """Products, quotients and their order, told by the last bit of float32."""
    case = CASES[name]
    *arrays, scale = draw(case, 0)
    expected = case.walk(*arrays, scale=scale, exact=True)["output"]
    [other] = outputs([exact(kernels.get(name)).replace(normalise=normalise)], *arrays, scale)
    assert np.mean(other != expected) > 0.05


@pytest.mark.parametrize(("tree", "total"), [(32, 2057), (16, 2056), (8, 2055), (4, 2054)])
def test_neon_leaves_half_precision_with_eight_lanes(tree, total):
    """2,048 beside ones: a half sum loses a one, float32 keeps it, so that s tells the levels."""
    key = np.zeros((1, 64), np.float32)
    key[0, [0, 8, 16]] = 2048.0, 1.0, 1.0  # one lane of registers 0, 1 and 2
    key[0, 1:8] = 1.0  # the other lanes of register 0
    query, value = np.ones((1, 64), np.float32), np.ones((1, 32), np.float32)
    recipe = kernels.get("ggml-cpu-decode-neon")
    assert recipe.qk_tree == 8
    assert walk_ggml_cpu.walk(query, key, value, scale=1.0, variant="neon")["s"] == 2055
    assert walk_ggml_cpu.walk(query, key, value, scale=1.0, variant="f16c")["s"] == 2057
    assert attend(recipe.replace(qk_tree=tree), query, key, value, 1.0)[1] == total


@pytest.mark.parametrize("columns", [32, 16, 8])
def test_fewer_columns_are_another_kernel(columns):
    """Warps that share a column's keys keep an o each: as near, with errors of their own."""
    case = CASES["ggml-cuda-mma-f16"]
    *arrays, scale = draw(case, 5)
    truth = ideal(*arrays, scale)
    got, recipes = (
        case.walk(*arrays, scale=scale, columns=n)["output"] - truth for n in (columns, 64)
    )
    assert np.abs(got).max() < case.limit
    assert np.corrcoef(got.ravel(), recipes.ravel())[0, 1] < 0.5


def test_neon_leaves_odd_dims_to_scalar_code():
    """Beyond whole steps of 32: products of q·k are summed in double, which the recipe has too;
    o takes p and its factor in float32, which it has not."""
    case = CASES["ggml-cpu-decode-neon"]._replace(head_dim=80)
    *arrays, scale = draw(case, 6, value_dim=40)
    walked = case.walk(*arrays, scale=scale, exact=True)["output"]
    [out] = outputs([exact(kernels.get("ggml-cpu-decode-neon"))], *arrays, scale)
    np.testing.assert_array_equal(out[:, :32], walked[:, :32])
    assert np.mean(out[:, 32:] != walked[:, 32:]) > 0.05


def test_what_walks_refuse():
    *arrays, scale = draw(CASES["pallas-tpu-flash-f32"], 7)
    with pytest.raises(ValueError, match="unknown variant 'sve'"):
        walk_ggml_cpu.walk(*arrays, scale=scale, variant="sve")
    with pytest.raises(ValueError, match="unknown dtype 'float16'"):
        walk_pallas.walk(*arrays, scale=scale, dtype="float16")
    with pytest.raises(ValueError, match="512 keys are not several blocks of 512"):
        walk_pallas.walk(*arrays, scale=scale, dtype="float32", block_k=512)
