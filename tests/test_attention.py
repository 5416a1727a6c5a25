"""dot_product_attention against jax.nn's and float64, and what it promises beside numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import dot_product_attention, error_curves, half_tables, kernels, reference_attention
from jaxattn.recipe import Recipe

FLOAT32 = kernels.get("float32")
B, T, S, N, K, H = 2, 5, 150, 4, 2, 16  # 150 keys: two blocks of 64 and a partial one
SINKS = np.array([-1.0, 0.5, 3.0, 8.0], np.float32)

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "to_mlir" in event else None
)


def draw(seed, b=B, t=T, s=S, n=N, k=K, h=H, d=H):
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, d))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def wide(x):
    return np.asarray(x).astype(np.float64)


def check(recipe, arrays, atol=1e-6, **arguments):
    """The recipe's output and log-sum-exp lie within `atol` of the float64 reference."""
    got = dot_product_attention(*arrays, recipe=recipe, return_residual=True, **arguments)
    expected = reference_attention(*arrays, return_residual=True, **arguments)
    np.testing.assert_allclose(wide(got[0]), expected[0], rtol=0, atol=atol)
    # A row past query_seq_lengths has no log-sum-exp in the reference.
    seen = np.isfinite(expected[1])
    np.testing.assert_allclose(wide(got[1])[seen], expected[1][seen], rtol=0, atol=4 * atol)
    return got


@functools.partial(
    jax.jit, static_argnames=("is_causal", "local_window_size", "scale", "return_residual")
)
def jax_nn(query, key, value, **arguments):
    return jax.nn.dot_product_attention(query, key, value, **arguments)


def mask_of(seed, *shape, share=0.6):
    mask = np.random.default_rng(seed).random(shape) < share
    mask[..., 0] = True  # no row is empty
    return mask


def bias_of(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# name -> (shape, arguments) that jax.nn takes as well
CASES = {
    "plain": ({}, {}),
    "decode": ({"t": 1, "s": 40}, {"scale": 0.7}),  # fewer keys than a block
    "causal, sixteen queries, one head of keys": (
        {"t": 16, "s": 131, "k": 1},
        {"is_causal": True, "bias": bias_of(4, 1, N, 1, 131)},
    ),
    "causal window": ({"t": 16, "s": 131}, {"local_window_size": 3, "is_causal": True}),
    "uneven window, three queries": (
        {"t": 3, "k": N, "h": 24, "d": 24},
        {"local_window_size": (1, 70), "mask": mask_of(3, 1, 1, 1, S)},
    ),
    "mask and bias": (
        {},
        {"mask": mask_of(1, B, N, T, S), "bias": bias_of(2, B, 1, T, S)},
    ),
    "lengths": (
        {},
        {
            "query_seq_lengths": np.array([2, 5], np.int32),
            "key_value_seq_lengths": np.array([150, 67], np.int32),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_float32_is_jax_nn(name):
    shape, arguments = CASES[name]
    arrays = draw(0, **shape)
    expected = jax_nn(*arrays, **arguments)
    got = dot_product_attention(*arrays, recipe="float32", **arguments)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_float64_is_jax_nn_within_float32():
    shape, arguments = CASES["mask and bias"]
    arrays = draw(0, **shape)
    expected = jax_nn(*arrays, **arguments)
    got = dot_product_attention(*arrays, recipe="float64", **arguments)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_float64_keeps_float64_whatever_the_configuration():
    arrays = [np.asarray(x, np.float64) + 1e-12 for x in draw(1)]
    got, lse = dot_product_attention(*arrays, recipe="float64", return_residual=True)
    assert got.dtype == np.float64 and lse.dtype == np.float32
    np.testing.assert_allclose(got, reference_attention(*arrays), rtol=0, atol=2e-15)
    assert not jax.config.jax_enable_x64


def test_without_a_batch_axis():
    query, key, value = draw(2)
    got, lse = dot_product_attention(
        query[0], key[0], value[0], recipe="float32", return_residual=True
    )
    expected, residual = jax_nn(query[0], key[0], value[0], return_residual=True)
    assert got.shape == (T, N, H) and lse.shape == (T, N) and lse.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse, residual, rtol=0, atol=2e-6)


def test_value_dim_may_differ_from_head_dim():
    out, _ = check(FLOAT32, draw(3, d=8))
    assert out.shape == (B, T, N, 8)


def test_masks_of_fewer_axes_broadcast_from_the_left():
    arrays = draw(0)
    mask = mask_of(5, T, S)
    full = dot_product_attention(*arrays, recipe="float32", mask=mask[None, None])
    assert jnp.array_equal(dot_product_attention(*arrays, recipe="float32", mask=mask), full)


def test_a_row_that_attends_to_nothing_is_zero_where_jax_nn_gives_a_mean():
    """The one documented difference in numbers from jax.nn."""
    arrays, arguments = draw(0), CASES["mask and bias"][1]
    mask = arguments["mask"].copy()
    mask[0, 1, 2] = False
    arguments = arguments | {"mask": mask}
    got, lse = dot_product_attention(*arrays, recipe="float32", return_residual=True, **arguments)
    expected = jax_nn(*arrays, **arguments)
    assert np.all(got[0, 2, 1] == 0) and lse[0, 2, 1] == -np.inf
    np.testing.assert_allclose(expected[0, 2, 1], arrays[2][0, :, 0].mean(0), atol=1e-6)
    others = np.ones((B, T, N), bool)
    others[0, 2, 1] = False
    np.testing.assert_allclose(wide(got)[others], wide(expected)[others], rtol=0, atol=2e-6)


def test_rows_past_query_lengths_are_zero_for_every_recipe():
    """Even where the recipe's own rows without keys are not."""
    arrays, lengths = draw(0), jnp.array([2, 0], jnp.int32)
    got = dot_product_attention(*arrays, recipe="hexagon-hmx-fp16", query_seq_lengths=lengths)
    assert np.all(got[0, 2:] == 0) and np.all(got[1] == 0) and np.all(got[0, :2] != 0)


def test_no_key_at_all():
    lengths = jnp.array([150, 0], jnp.int32)
    got, _ = check(FLOAT32, draw(0), key_value_seq_lengths=lengths)
    assert np.all(got[1] == 0)


@pytest.mark.parametrize("recipe", ["float32", "metal", "ggml-cpu-prefill"])
def test_softcap_and_sinks(recipe):
    query, key, value = draw(4)
    # Halves, which Metal reads exactly.
    arrays = [x.astype(jnp.float16).astype(jnp.float32) for x in (3 * query, key, value)]
    check(recipe, arrays, softcap=2.5, sinks=SINKS)


def test_sinks_may_weigh_nothing_or_be_alone():
    nothing = np.full(N, -np.inf, np.float32)
    check(FLOAT32, draw(4), sinks=nothing, softcap=2.5)
    lengths = np.array([0, 3], np.int32)
    got, lse = check(FLOAT32, draw(4), sinks=SINKS, key_value_seq_lengths=lengths)
    assert np.all(got[0] == 0) and np.allclose(lse[0], SINKS[None])
    got, lse = check(FLOAT32, draw(4), sinks=nothing, key_value_seq_lengths=lengths)
    assert np.all(got[0] == 0) and np.all(lse[0] == -np.inf)


BASE2 = {"exp": "exp2"}
VARIANTS = {
    "backward, divided": ({"kv_order": "backward", "normalise": "divide"}, {"is_causal": True}),
    "lazy, offset, scaled q": (
        {"lazy_threshold": 2.0, "max_offset": 3.0, "scale_at": "query"},
        {"scale": 0.7, "softcap": 3.0},
    ),
    "split, mostly masked": (
        {"split_kv": 4, "kv_block": 16},
        {"sinks": SINKS, "local_window_size": (2, 2)},
    ),
    "base 2": (BASE2, {"bias": bias_of(2, B, 1, T, S)}),
    "base 2, seeded sinks": (BASE2 | {"sinks": "seed"}, {"sinks": SINKS, "softcap": 3.0}),
    "base 2 after the difference": (BASE2 | {"log2e_at": "exponent"}, {"sinks": SINKS}),
    "contractions in parts": (
        {
            **{"pv_chunk": 16, "pv_accum": "e8m22", "qk_accum": "e8m22"},
            **{"qk_chunk": 2, "qk_partials": 4, "qk_tree": 2},
        },
        {},
    ),
    "blocks of 3": ({"kv_block": 3}, {}),
}
MORE = {
    "split": ({"split_kv": 4}, {"sinks": SINKS}),
    "base 2, split": (BASE2 | {"split_kv": 3}, {"sinks": SINKS, "softcap": 3.0}),
    "o every 8 keys": ({"output_every": 8}, {}),
}


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_other_walks_of_float32_give_the_same_attention(name):
    changes, arguments = (VARIANTS | MORE)[name]
    check(FLOAT32.replace(**changes), draw(5), atol=2e-6, **arguments)


def test_seeded_sinks_may_weigh_nothing():
    nothing = np.full(N, -np.inf, np.float32)
    check(FLOAT32.replace(**BASE2, sinks="seed"), draw(5), sinks=nothing, softcap=3.0)


def test_a_lazy_maximum_stays_behind():
    """tau = 2 nats: m moves when a block's peak passes it by more, so P may exceed 1."""
    scores = jnp.array([0.0, 1.5, 3.0, 4.5])  # m: 0, 0, 3, 3
    query, key = jnp.ones((1, 1, 1, 1)), scores.reshape(1, 4, 1, 1)
    value = jnp.ones((1, 4, 1, 1))
    recipe = Recipe(kv_block=1, lazy_threshold=2.0, running_sum="e8m1")
    # l = 1; 1 + e^1.5 = 5.5 -> 6; 6·e^-3 + 1 = 1.3 -> 1.5; 1.5 + e^1.5 = 5.98 -> 6
    _, lse = dot_product_attention(
        query, key, value, recipe=recipe, scale=1.0, return_residual=True
    )
    assert np.allclose(lse, 3.0 + np.log(6.0), atol=1e-6)


def test_backward_starts_with_the_partial_last_block():
    """64 keys of value 1 and 6 of value 7, scores 0, o in two bits: 64 + 42 = 106 is 96, but 42
    alone is 48 and 48 + 64 = 112 is 128."""
    query, key = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 70, 1, 2))
    value = jnp.ones((1, 70, 1, 1)).at[:, 64:].set(7.0)
    recipe = Recipe(kv_block=64, output="e8m1")
    for order, o in (("forward", 96.0), ("backward", 128.0)):
        out = dot_product_attention(query, key, value, recipe=recipe.replace(kv_order=order))
        assert np.allclose(out.item(), o / 70, rtol=1e-6)


class TestDtypes:
    def test_the_result_has_the_queries_dtype(self):
        query, key, value = draw(6)
        half = dot_product_attention(
            query.astype(jnp.float16), key, value.astype(jnp.bfloat16), recipe="float32"
        )
        assert half.dtype == jnp.float16
        expected = reference_attention(query.astype(jnp.float16), key, value.astype(jnp.bfloat16))
        np.testing.assert_allclose(wide(half), expected, rtol=2e-3, atol=2e-3)

    def test_a_float16_cache_is_widened_exactly(self):
        """ggml keeps Q in float32 and the KV cache in float16."""
        query, key, value = draw(6)
        key, value = key.astype(jnp.float16), value.astype(jnp.float16)
        out, _ = check("float32", (query, key, value))
        widened = (query, key.astype(jnp.float32), value.astype(jnp.float32))
        assert out.dtype == jnp.float32
        assert jnp.array_equal(out, dot_product_attention(*widened, recipe="float32"))

    def test_a_rounded_input_is_the_same_however_it_arrives(self):
        """metal rounds q, k, v to half itself."""
        query, key, value = draw(0)
        narrow = [x.astype(jnp.float16).astype(jnp.float32) for x in (query, key, value)]
        attend = functools.partial(dot_product_attention, recipe="metal")
        assert jnp.array_equal(attend(query, key, value), attend(*narrow))

    def test_bfloat16(self):
        arrays = [x.astype(jnp.bfloat16) for x in draw(6)]
        out = dot_product_attention(*arrays, recipe="float32")
        assert out.dtype == jnp.bfloat16
        expected = reference_attention(*arrays)
        np.testing.assert_allclose(wide(out), expected, rtol=2**-8, atol=1e-6)

    def test_numpy_arrays(self):
        arrays = draw(0)
        out = dot_product_attention(*map(np.asarray, arrays), recipe="float32")
        assert isinstance(out, jax.Array)
        assert jnp.array_equal(out, dot_product_attention(*arrays, recipe="float32"))

    def test_float64_arrays_in_float32_storage(self):
        out = dot_product_attention(*(np.float64(x) for x in draw(0)), recipe="float32")
        assert jnp.array_equal(out, dot_product_attention(*draw(0), recipe="float32"))


class TestTransformations:
    def test_jit_and_vmap(self):
        arrays = draw(0)
        attend = functools.partial(dot_product_attention, recipe="metal")
        plain = attend(*arrays)
        assert jnp.array_equal(jax.jit(attend)(*arrays), plain)
        np.testing.assert_allclose(jax.vmap(attend)(*arrays), plain, rtol=0, atol=1e-6)

    def test_scale_softcap_and_lengths_may_be_traced(self):
        query, key, value = draw(0)

        @jax.jit
        def attend(scale, softcap, length):
            return dot_product_attention(
                query,
                key,
                value,
                recipe="float32",
                scale=scale,
                softcap=softcap,
                key_value_seq_lengths=jnp.stack([length, length]),
            )

        for scale, length in ((0.3, 20), (0.1, 140)):
            expected = reference_attention(
                query, key[:, :length], value[:, :length], scale=scale, softcap=2.0
            )
            got = attend(scale, 2.0, jnp.int32(length))
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "recipe",
        ["float32", "float64", pytest.param("hexagon-hmx-fp32", marks=pytest.mark.slow)],
    )
    def test_jax_enable_x64_changes_nothing(self, recipe):
        arrays = draw(0)
        attend = jax.jit(functools.partial(dot_product_attention, recipe=recipe))
        plain = attend(*arrays)
        with jax.enable_x64(True):
            under = attend(*arrays)
            assert jax.config.jax_enable_x64
        assert not jax.config.jax_enable_x64
        assert plain.dtype == under.dtype == jnp.float32
        assert np.array_equal(plain, under)

    def test_a_second_call_compiles_nothing(self):
        arrays, others = draw(0), draw(7)
        attend = functools.partial(dot_product_attention, recipe="metal", sinks=jnp.asarray(SINKS))
        jax.block_until_ready(attend(*arrays, scale=0.25, softcap=3.0))
        compiled.clear()
        jax.block_until_ready(attend(*others, scale=0.5, softcap=4.0))
        assert compiled == []

    def test_formats_and_numbers_are_traced(self):
        """Another format at a site that rounds already is no other program (but float16 is one)."""
        arrays = draw(0)
        one = FLOAT32.replace(probs="tf32", running_sum="bfloat16", max_offset=1.0)
        dot_product_attention(*arrays, recipe=one)
        compiled.clear()
        two = one.replace(probs="bfloat16", running_sum="fp22", max_offset=2.0)
        dot_product_attention(*arrays, recipe=two)
        assert compiled == []

    def test_nothing_leaks_from_a_first_call_inside_jit(self):
        """Tables that are made once are made of constants, whoever asks first."""
        half_tables.table.cache_clear()
        attend = functools.partial(dot_product_attention, recipe="hexagon-hmx-fp32", softcap=5.0)
        inside = jax.jit(lambda *arrays: attend(*arrays))(*draw(0))
        np.testing.assert_array_equal(inside, attend(*draw(0)))

    @pytest.mark.slow
    def test_jax_finds_no_leak(self):
        attend = functools.partial(dot_product_attention, recipe="hexagon-hmx-fp32", softcap=5.0)
        with jax.checking_leaks():
            jax.jit(lambda *arrays: attend(*arrays))(*draw(0))


@functools.partial(jax.jit, static_argnames="recipe")
def gradients(arrays, recipe: Any, **arguments):
    """Of a loss that weighs every output differently, with respect to q, k and v; jax.nn's too."""
    attend = jax.nn.dot_product_attention
    if recipe != "jax.nn":
        attend = functools.partial(dot_product_attention, recipe=recipe)
    weight = jnp.asarray(np.random.default_rng(9).standard_normal(arrays[0].shape), jnp.float32)
    loss = lambda arrays: jnp.sum(weight * attend(*arrays, **arguments))  # noqa: E731
    return jax.grad(loss)(arrays)


class TestGradients:
    @pytest.mark.parametrize("name", ["plain", "mask and bias"])
    def test_float32_has_the_gradient_of_jax_nn(self, name):
        arrays, arguments = draw(0), CASES[name][1]
        ours = gradients(arrays, "float32", **arguments)
        theirs = gradients(arrays, "jax.nn", **arguments)
        for a, b in zip(ours, theirs, strict=True):
            assert jnp.linalg.norm(a - b) <= 1e-4 * jnp.linalg.norm(b)

    @pytest.mark.parametrize(
        "recipe",
        [
            "hexagon-hmx-fp32",
            pytest.param("ggml-cpu-decode", marks=pytest.mark.slow),
            pytest.param("hexagon-hmx-fp16", marks=pytest.mark.slow),
            pytest.param("hexagon-hmx-exp2hf", marks=pytest.mark.slow),
            pytest.param("hexagon-hvx", marks=pytest.mark.slow),
            pytest.param("metal-bf16", marks=pytest.mark.slow),
            pytest.param("ggml-cpu-decode-neon", marks=pytest.mark.slow),
            pytest.param("ggml-cpu-splitkv", marks=pytest.mark.slow),
        ],
    )
    def test_narrow_recipes_have_nearly_that_gradient(self, recipe):
        """Straight through every rounding and table: never zero, never far off."""
        arrays = draw(0)
        ours, theirs = gradients(arrays, recipe), gradients(arrays, "jax.nn")
        for a, b in zip(ours, theirs, strict=True):
            assert np.isfinite(a).all()
            assert np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] > 0.99
            assert 0.98 < jnp.linalg.norm(a) / jnp.linalg.norm(b) < 1.02

    def test_float64_recipe(self):
        """Its transpose needs float64 as well, whatever the configuration."""
        arrays = draw(0)
        ours, theirs = gradients(arrays, "float64"), gradients(arrays, "jax.nn")
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == jnp.float32
            assert jnp.linalg.norm(a - b) <= 1e-5 * jnp.linalg.norm(b)

    def test_rows_without_keys_have_finite_gradients(self):
        arguments = CASES["mask and bias"][1]
        mask = arguments["mask"].copy()
        mask[0, 1, 2] = False
        query, key, value = gradients(draw(0), "float32", **arguments | {"mask": mask})
        assert np.isfinite(query).all() and np.isfinite(key).all() and np.isfinite(value).all()
        assert np.all(query[0, 2, 1] == 0) and np.any(query[0, 2, 0] != 0)

    @pytest.mark.parametrize("sinks", ["end", "seed"])
    def test_sinks_and_log_sum_exp(self, sinks):
        query, key, value = draw(0)
        recipe = FLOAT32.replace(sinks=sinks)

        def ours(query, sinks):
            out, lse = dot_product_attention(
                query, key, value, recipe=recipe, sinks=sinks, return_residual=True
            )
            return jnp.sum(out**2) + jnp.sum(lse)

        def plain(query, sinks):
            rows = query.reshape(B, T, K, N // K, H)
            s = jnp.einsum("btkgh,bskh->btkgs", rows, key).reshape(B, T, N, S) / H**0.5
            sinks = jnp.broadcast_to(sinks[None, None, :, None], (B, T, N, 1))
            lse = jax.nn.logsumexp(jnp.concatenate([s, sinks], -1), axis=-1)
            p = jnp.exp(s - lse[..., None]).reshape(B, T, K, N // K, S)
            return jnp.sum(jnp.einsum("btkgs,bskh->btkgh", p, value) ** 2) + jnp.sum(lse)

        for a, b in zip(
            jax.jit(jax.grad(ours, (0, 1)))(query, jnp.asarray(SINKS)),
            jax.jit(jax.grad(plain, (0, 1)))(query, jnp.asarray(SINKS)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_flax_attention():
    linen = pytest.importorskip("flax.linen")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 32)), jnp.float32)
    mask = linen.make_causal_mask(jnp.ones((2, 6)), dtype=jnp.bool_)
    plain = linen.MultiHeadAttention(num_heads=4)
    attend = functools.partial(dot_product_attention, recipe="float32")
    ours = linen.MultiHeadAttention(num_heads=4, attention_fn=attend)
    parameters = jax.jit(plain.init)(jax.random.key(0), x)

    def loss(module, parameters):
        return jnp.sum(module.apply(parameters, x, mask=mask) ** 2)

    a, b = (
        jax.jit(jax.value_and_grad(functools.partial(loss, module)))(parameters)
        for module in (ours, plain)
    )
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


QUICK_MASKED = (
    "float32 hexagon-hmx-fp16 hexagon-hmx-fp32 hexagon-hvx jax-nn-bf16 splash-f32".split()
)


class TestFullyMasked:
    """What each kernel makes of a row whose every key is masked, and of a block."""

    # recipe -> (the row, NMSE of the other rows at most)
    ROWS = {
        "float32": (0.0, 1e-12),
        "float64": (0.0, 1e-12),
        "hexagon-hmx-fp16": ("mean", 1e-5),
        "hexagon-hmx-fp16-qf16": ("mean", 1e-4),
        "hexagon-hmx-fp16-qf16-spill": ("mean", 1e-4),
        "hexagon-hmx-exp2hf": ("mean", 1e-5),
        "hexagon-pr24389": ("mean", 1e-5),
        "hexagon-hmx-fp32": (np.nan, 1e-5),
        "hexagon-hvx": (0.0, 1e-5),
        "metal": (0.0, 1e-6),
        "metal-bf16": (0.0, 1e-4),
        "ggml-cpu-decode": (0.0, 1e-4),
        **dict.fromkeys((n for n in kernels.names() if "-cuda-" in n), (np.nan, 1e-4)),
        "ggml-cpu-decode-f32": (0.0, 1e-12),
        "ggml-cpu-prefill": (0.0, 1e-12),
    }
    # Kernels that replace the scores of masked keys by a number attend to all of them alike.
    MEAN = ("jax-nn", "pallas", "splash", "tokamax", "maxtext", "flax", "mlx-cpu", "mlx-steel")
    MEAN += ("sage", "triton")
    COARSE = ("-fp8", "sage", "-bf16", "deepseek", "jax-nn-f32-tpu", "pasa", "amla")

    def outcome(self, name):
        if name in self.ROWS:
            return self.ROWS[name]
        coarse = any(word in name for word in self.COARSE)
        return "mean" if name.startswith(self.MEAN) else 0.0, 3e-2 if coarse else 1e-4

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in QUICK_MASKED else pytest.mark.slow)
            for name in kernels.names()
        ],
    )
    def test_row_and_block(self, name):
        recipe = kernels.get(name)
        recipe = recipe.replace(kv_block=64) if name.startswith("hexagon-hmx") else recipe
        row, limit = self.outcome(name)
        query, key, value = draw(8, t=3)
        value = value + 0.5
        mask = mask_of(1, 1, N, 3, S)
        mask[0, 1, 0] = False  # one row of three has no key,
        mask[0, :, 1, :70] = False  # and one none in its first block
        got = wide(dot_product_attention(query, key, value, mask=mask, recipe=recipe))
        expected = reference_attention(query, key, value, mask=mask)
        empty = np.zeros(got.shape[:-1], bool)
        empty[:, 0, 1] = True
        error = (got - expected)[~empty]
        assert np.sum(error**2) <= limit * np.sum(expected[~empty] ** 2)
        mean = np.asarray(value, np.float64)[:, :, 0].mean(1)  # of all keys, masked or not
        given = mean if isinstance(row, str) else np.full_like(mean, row)
        rtol = 0.13 if name == "triton-tutorial-fp8" else 3e-2  # three bits in its result
        np.testing.assert_allclose(got[:, 0, 1], given, rtol=rtol, atol=3e-3)

    @pytest.mark.parametrize(
        "name",
        [
            "hexagon-hmx-fp32",
            pytest.param("hexagon-hmx-fp16", marks=pytest.mark.slow),
            pytest.param("ggml-cpu-decode", marks=pytest.mark.slow),
        ],
    )
    def test_a_low_bias_masks(self, name):
        """ggml's masks are additive: Hexagon's HMX kernels take -16 and less as masked."""
        recipe = kernels.get(name)
        recipe = recipe.replace(kv_block=64) if isinstance(recipe.kv_block, str) else recipe
        arrays, mask = draw(8, t=3), mask_of(1, 1, N, 3, S)
        low = -np.inf if name.startswith("ggml") else -16.0
        bias = np.where(mask, np.float32(0), np.float32(low))
        a = dot_product_attention(*arrays, recipe=recipe, bias=bias)
        b = dot_product_attention(*arrays, recipe=recipe, mask=mask)
        assert np.array_equal(a, b)


class TestStochastic:
    RECIPE = Recipe(kv_block=1, running_sum="float16:sr")

    @staticmethod
    def sums(recipe, keys=4096):
        """l after `keys` equal scores, from the log-sum-exp: [64 rows]."""
        query = jnp.zeros((1, 16, 4, 1))
        key, value = jnp.zeros((1, keys, 4, 1)), jnp.ones((1, keys, 4, 1))
        lse = dot_product_attention(query, key, value, recipe=recipe, return_residual=True)[1]
        return np.exp(wide(lse)).ravel()

    def test_the_seed_decides(self):
        one = self.sums(self.RECIPE)
        assert np.array_equal(one, self.sums(self.RECIPE))
        assert not np.array_equal(one, self.sums(self.RECIPE.replace(seed=1)))

    def test_rows_and_heads_draw_apart(self):
        assert len(np.unique(self.sums(self.RECIPE).round())) > 32

    def test_it_is_unbiased_where_rounding_to_nearest_stagnates(self):
        nearest = self.sums(self.RECIPE.replace(running_sum="float16"))
        np.testing.assert_allclose(nearest, 2048.0, rtol=1e-6)
        sums = self.sums(self.RECIPE)
        error = sums.std() / np.sqrt(len(sums))
        assert 0 < error < 10
        assert abs(sums.mean() - 4096) < 4 * error

    def test_chunks_draw_apart(self):
        """Two chunks of the same keys: with the same bits each would give half of the sum."""
        once = self.sums(self.RECIPE, 2500)
        twice = self.sums(self.RECIPE.replace(split_kv=2), 5000)
        assert np.mean(twice == 2 * once) < 0.1
        zeros, ones = np.zeros((1, 5000, 1, 1), np.float32), np.ones((1, 5000, 1, 1), np.float32)
        curves = [
            error_curves(
                zeros[:, :16], zeros, ones, [recipe], contexts=[n], metrics=("bias_l",)
            ).metrics["bias_l"]
            for recipe, n in ((self.RECIPE, 2500), (self.RECIPE.replace(split_kv=2), 5000))
        ]
        assert np.mean(curves[0] == curves[1]) < 0.1

    @pytest.mark.parametrize(
        "sites",
        [
            ("scores",),
            pytest.param(("probs", "row_sum", "output", "rescale"), marks=pytest.mark.slow),
            pytest.param(("running_max", "difference", "summand"), marks=pytest.mark.slow),
        ],
    )
    def test_other_sites(self, sites):
        recipe = Recipe(kv_block=16, **dict.fromkeys(sites, "bfloat16:sr"))
        out, _ = check(recipe, draw(0), atol=0.1)
        assert np.any(np.abs(wide(out) - reference_attention(*draw(0))) > 1e-4)


def bad(error, said, change=None, **arguments):
    return pytest.param(error, said, change or {}, arguments, id=said[:40])


@pytest.mark.parametrize(
    ("error", "said", "change", "arguments"),
    [
        bad(ValueError, "unknown recipe 'metall'; did you mean .*'metal'", recipe="metall"),
        bad(TypeError, "recipe must be a Recipe or a kernel's name, got dict", recipe={}),
        bad(TypeError, "query must be floating point, got int32", {"query": np.int32}),
        bad(TypeError, "key must be floating point, got complex64", {"key": np.complex64}),
        bad(TypeError, "value must be floating point, got bool", {"value": np.bool_}),
        bad(ValueError, "query, key and value must all be", {"query": (5, 4, 16)}),
        bad(ValueError, "query, key and value must all be", {"key": (150, 16)}),
        bad(ValueError, "no axis may be empty", {"key": (2, 0, 2, 16), "value": (2, 0, 2, 16)}),
        bad(ValueError, r"agree in \[B, S, K\]", {"value": (2, 149, 2, 16)}),
        bad(ValueError, r"agree in \[B, S, K\]", {"value": (2, 150, 1, 16)}),
        bad(ValueError, "agree in batch size and head dim", {"query": (2, 5, 4, 15)}),
        bad(ValueError, "agree in batch size and head dim", {"query": (1, 5, 4, 16)}),
        bad(ValueError, "multiple of key/value heads, got 3 and 2", {"query": (2, 5, 3, 16)}),
        bad(TypeError, "bias must be floating point", bias=np.zeros((1, 1, 5, 150), np.int32)),
        bad(ValueError, "bias must broadcast", bias=np.zeros((1, 3, 5, 150), np.float32)),
        bad(ValueError, "bias must broadcast", bias=np.zeros((1, 1, 1, 5, 150), np.float32)),
        bad(TypeError, "mask must be bool", mask=np.ones((1, 1, 5, 150), np.float32)),
        bad(ValueError, "mask must broadcast", mask=np.ones((5, 149), np.bool_)),
        bad(ValueError, "query_seq_lengths must be integers", query_seq_lengths=np.array([1])),
        bad(
            ValueError,
            "key_value_seq_lengths must be integers",
            key_value_seq_lengths=np.array([1.0, 2.0], np.float32),
        ),
        bad(ValueError, "local_window_size must be .* at least 0", local_window_size=-1),
        bad(ValueError, "local_window_size must be .* at least 0", local_window_size=(1, -1)),
        bad((TypeError, ValueError), "local_window_size must be", local_window_size=1.5),
        bad((TypeError, ValueError), "local_window_size must be", local_window_size=(1, 2, 3)),
        bad(ValueError, "scale must be finite, got nan", scale=float("nan")),
        bad(ValueError, "scale must be finite, got inf", scale=float("inf")),
        bad(ValueError, "softcap must be finite and positive, got 0", softcap=0.0),
        bad(ValueError, "softcap must be finite and positive, got -1", softcap=-1.0),
        bad(ValueError, r"sinks must have shape \[N\] = \(4,\)", sinks=np.zeros(2, np.float32)),
        bad(TypeError, "sinks must be floating point", sinks=np.zeros(4, np.int32)),
        bad(
            ValueError,
            "the kernel of recipe 'hexagon-hmx-fp16' knows no sinks",
            recipe="hexagon-hmx-fp16",
            sinks=SINKS,
        ),
    ],
)
def test_bad_input(error, said, change, arguments):
    arrays = dict(zip(("query", "key", "value"), map(np.asarray, draw(0)), strict=True))
    for name, what in change.items():
        shaped = isinstance(what, tuple)
        arrays[name] = np.ones(what, np.float32) if shaped else arrays[name].astype(what)
    with pytest.raises(error, match=said):
        dot_product_attention(*arrays.values(), **({"recipe": "float32"} | arguments))


@pytest.mark.parametrize("recipe", ["float32", "hexagon-hmx-fp32"])
def test_second_derivatives_are_not_silently_zero(recipe):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, n, 2, 16)).astype(np.float32) for n in (3, 20, 20))

    def curvature(attend):
        def slope(q):
            return jax.grad(lambda q: jnp.sum(attend(q) ** 2))(q)

        return jax.grad(lambda q: jnp.sum(slope(q) ** 2))(q)

    got = curvature(lambda q: dot_product_attention(q, k, v, recipe=recipe))
    want = curvature(lambda q: jax.nn.dot_product_attention(q, k, v))
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


def test_scale_and_softcap_have_gradients_in_float64_storage():
    x = np.random.default_rng(4).standard_normal((1, 5, 2, 16)).astype(np.float32)

    def loss(scale, softcap, recipe):
        out = dot_product_attention(x, x, x, recipe=recipe, scale=scale, softcap=softcap)
        return jnp.sum(out**2)

    wide = jax.grad(loss, (0, 1))(0.25, 3.0, "float64")
    np.testing.assert_allclose(wide, jax.grad(loss, (0, 1))(0.25, 3.0, "float32"), rtol=1e-3)


def test_stochastic_rounding_in_float64_storage():
    recipe = Recipe(running_sum="float16:sr", probs="float16:sr", storage="float64")
    x = np.random.default_rng(5).standard_normal((1, 5, 2, 16)).astype(np.float32)
    assert np.isfinite(dot_product_attention(x, x, x, recipe=recipe)).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_accum": "float16", "qk_partials": 4},
        {"qk_accum": "fp22", "qk_chunk": 2, "qk_promote": 4},
        {"key": "int8", "key_group": 16},
        {"normalise": "blocks"},
    ],
)
def test_vmap_of_structures_that_few_kernels_need(fields):
    """XLA's CPU backend has crashed on a reduction over the middle one of so many axes."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (3, 100, 100))

    def attend(q, k, v):
        return dot_product_attention(q, k, v, recipe=Recipe(**fields))

    got = jax.vmap(attend)(q, k, v)
    want = np.stack([attend(*(x[i] for x in (q, k, v))) for i in range(2)])
    np.testing.assert_allclose(got, want, atol=1e-5)
