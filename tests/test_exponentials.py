"""Exponentials and hyperbolic tangents against other readings, mpmath and published numbers."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
import walk_hexagon

from jaxattn.exponentials import EXPONENTIALS, TANHS
from jaxattn.fields import CHOICES

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
LOG_2 = math.log(2)


def evaluate(name, x):
    return np.asarray(jax.jit(EXPONENTIALS[name][0])(x))


def in_base(base, x):
    """base^x to 60 digits, rounded once to float64."""
    with mpmath.workdps(60):
        root = mpmath.e if base == 0 else mpmath.mpf(base)
        return np.array([float(mpmath.power(root, mpmath.mpf(float(value)))) for value in x])


def test_every_name_that_a_recipe_may_choose_is_here():
    assert set(EXPONENTIALS) == set(CHOICES["exp"])
    assert set(TANHS) == set(CHOICES["tanh"])
    assert {name for name, (_, base) in EXPONENTIALS.items() if base == 0} == {"exp", "exp_cubic"}
    assert all(base in (0, 2) for _, base in EXPONENTIALS.values())


# --- accurate to the host ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_float32_is_good_to_two_ulps(name):
    base = EXPONENTIALS[name][1]
    x = np.random.default_rng(0).uniform(-87 if base == 0 else -126, 0, 8000).astype(np.float32)
    exact = in_base(base, x)
    ulps = np.abs(evaluate(name, x) - exact) / np.spacing(exact.astype(np.float32))
    assert ulps.max() <= 2 and ulps.mean() < 0.5


def test_float64_is_good_to_two_ulps():
    x = np.random.default_rng(1).uniform(-1022, 1023, 4000)
    with jax.enable_x64(True):
        y = evaluate("exp2", x)
    exact = in_base(2, x)
    assert y.dtype == np.float64
    ulps = np.abs(y - exact) / np.spacing(exact)
    assert ulps.max() <= 2 and ulps.mean() < 0.5


def test_exp2_of_whole_numbers_is_exact():
    k = np.arange(-126, 128)
    np.testing.assert_array_equal(evaluate("exp2", np.float32(k)), np.ldexp(np.float32(1), k))
    with jax.enable_x64(True):
        k = np.arange(-1022, 1024)
        np.testing.assert_array_equal(evaluate("exp2", np.float64(k)), np.ldexp(1.0, k))


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_ends_of_the_range(name):
    x = np.float32([-np.inf, -1e30, -160, 0.0, -0.0, 160, 1e30, np.inf, np.nan])
    np.testing.assert_array_equal(
        evaluate(name, x), np.float32([0, 0, 0, 1, 1, np.inf, np.inf, np.inf, np.nan])
    )


def test_the_cubic_is_good_to_1e_4_in_steps_of_2_to_the_minus_17():
    """A minimax cubic's error is its constant term; a step comes from the integer in float32."""
    x = np.random.default_rng(3).uniform(-40, 0, 200_000).astype(np.float32)
    y = evaluate("exp_cubic", x)
    error = y / np.exp(x.astype(np.float64)) - 1
    assert 1e-4 < np.abs(error).max() < 1.0704e-4 + 2.0**-17 and abs(error.mean()) < 1e-5
    assert not np.any(y.view(np.int32) % 64) and np.any(y.view(np.int32) % 128)
    ends = np.float32([-np.inf, -87.4, -87.3, 88.7, 88.8, np.inf, np.nan])
    low, high = evaluate("exp_cubic", ends)[2:4] / np.exp(ends[2:4].astype(np.float64)) - 1
    assert abs(low) < 2e-4 and abs(high) < 2e-4
    np.testing.assert_array_equal(
        evaluate("exp_cubic", ends)[[0, 1, 4, 5, 6]], np.float32([0, 0, np.inf, np.inf, np.nan])
    )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(evaluate("exp_cubic", x[:1000].astype(np.float64)), y[:1000])


# --- FlashAttention-4's polynomials --------------------------------------------------------------

# Table 2 of the FlashAttention-4 paper: degree -> (max, mean) relative error in float32 and after
# rounding to bfloat16, on [0, 1), to the digits that are printed.
TABLE_2 = {
    3: ("8.77e-05", "5.43e-05", "3.90e-03", "1.41e-03"),
    4: ("3.05e-06", "1.84e-06", "3.89e-03", "1.41e-03"),
    5: ("1.44e-07", "5.48e-08", "3.89e-03", "1.41e-03"),
}


def fused():
    """Whether the host contracts x·y + z into one operation, as the GPU does."""
    x = np.float32(1 + 2.0**-12)
    return float(jax.jit(lambda x, z: x * x + z)(x, np.float32(-1 - 2.0**-11))) != 0


@pytest.mark.parametrize("degree", TABLE_2)
def test_table_2_of_flash_attention_4(degree):
    """The paper draws 4M uniform inputs; these are all 8M multiples of 2^-23."""
    x = (np.arange(2**23) / 2**23).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    y = evaluate(f"exp2_poly{degree}", x)
    narrow = y.astype(ml_dtypes.bfloat16)
    numbers = []
    for got in (y, narrow):
        error = np.abs(got.astype(np.float64) / exact - 1)
        numbers += [f"{error.max():.2e}", f"{error.mean():.2e}"]
    if degree == 5 and not fused():
        assert float(numbers[0]) < 1.6e-7 and float(numbers[1]) < 5.6e-8
        numbers[:2] = TABLE_2[5][:2]
    assert tuple(numbers) == TABLE_2[degree]

    nearest = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    steps = np.abs(narrow.view(np.int16).astype(int) - nearest.view(np.int16))
    assert steps.max() == 1
    assert f"{100 * np.mean(steps == 0):.2f}" == {3: "99.00", 4: "99.97", 5: "100.00"}[degree]


@pytest.mark.parametrize("degree", TABLE_2)
def test_polynomials_beyond_one_octave(degree):
    limit = float(TABLE_2[degree][0]) * 1.2
    x = np.random.default_rng(2).uniform(-126, 0, 200_000).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(evaluate(f"exp2_poly{degree}", x) / exact - 1).max() < limit
    whole = -np.arange(127)
    powers = np.ldexp(np.float32(1), whole)
    np.testing.assert_array_equal(evaluate(f"exp2_poly{degree}", np.float32(whole)), powers)
    low = np.float32([-126.5, -127, -128, -1e9, -np.inf])
    np.testing.assert_array_equal(evaluate(f"exp2_poly{degree}", low), np.zeros(5))
    with jax.enable_x64(True):
        wide = evaluate(f"exp2_poly{degree}", x[:1000].astype(np.float64))
    assert wide.dtype == np.float64 and np.abs(wide / exact[:1000] - 1).max() < limit


# --- Hexagon's half-precision functions ----------------------------------------------------------


@pytest.mark.parametrize(("name", "clamp"), [("exp2_half", False), ("exp2_half_clamped", True)])
def test_exp2_half_equals_a_walk_in_half_arithmetic(name, clamp):
    x = HALVES[np.isfinite(HALVES) & (HALVES <= 15)]
    expected = walk_hexagon.exp2_half(x, clamp=clamp).astype(np.float32)
    np.testing.assert_array_equal(evaluate(name, x.astype(np.float32)), expected)


@pytest.mark.parametrize("name", ["exp2_half", "exp2_half_clamped"])
def test_exp2_half_by_range(name):
    """Good to 8e-4; from 2^-15 to 2^-14 the hidden bit is lost, and below there is nothing."""
    x = HALVES[np.isfinite(HALVES) & (HALVES <= 0)].astype(np.float32)
    exact, y = np.exp2(x.astype(np.float64)), evaluate(name, x)
    normal, subnormal, tiny = x >= -14, (x < -14) & (x >= -15), x < -15
    error = np.abs(y[normal] / exact[normal] - 1)
    assert 7e-4 < error.max() < 8.5e-4
    np.testing.assert_allclose(y[subnormal], 2 * exact[subnormal] - 2.0**-14, atol=2.0**-23)
    assert (y[x == -15] == 0).all() and subnormal.sum() > 100
    assert not y[tiny].any() and tiny.sum() > 10_000
    np.testing.assert_array_equal(y[x == -14], np.float32(2.0**-14))


@pytest.mark.parametrize("name", ["exp2_half", "exp2_half_clamped"])
def test_exp2_half_reads_halves(name):
    """Whatever comes in is a half first, and what comes out is one."""
    x = np.random.default_rng(3).uniform(-15, 0, 10_000).astype(np.float32)
    y = evaluate(name, x)
    np.testing.assert_array_equal(y, evaluate(name, x.astype(np.float16).astype(np.float32)))
    np.testing.assert_array_equal(y, y.astype(np.float16).astype(np.float32))
    special = evaluate(name, np.float32([-np.inf, -1e30, -65504, 0, np.nan]))
    np.testing.assert_array_equal(special, np.float32([0, 0, 0, 1, np.nan]))
    with jax.enable_x64(True):
        wide = evaluate(name, x.astype(np.float64))
    assert wide.dtype == np.float64
    np.testing.assert_array_equal(wide, evaluate(name, x.astype(np.float16).astype(np.float32)))


def test_tanh_half_is_far_from_one_rounding():
    """With a cap of 50 and scores of sd 5 the capped logits are off by more than 0.018 nats."""
    scores = 5 * np.random.default_rng(4).standard_normal(100_000)
    x = (scores / 50).astype(np.float16).astype(np.float32)
    y = np.asarray(jax.jit(TANHS["tanh_half"])(x))
    exact = np.tanh(x.astype(np.float64))
    error = 50 * (y - exact)
    assert 0.018 < np.sqrt(np.mean(error**2)) < 0.04
    rounded = 50 * (exact.astype(np.float16) - exact)
    assert np.sqrt(np.mean(rounded**2)) < 0.003
    everywhere = HALVES[np.isfinite(HALVES)].astype(np.float32)
    y = np.asarray(jax.jit(TANHS["tanh_half"])(everywhere))
    assert np.abs(y - np.tanh(everywhere)).max() < 3e-3 and np.abs(y).max() <= 1


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_derivatives_are_those_of_the_curve(name):
    function, base = EXPONENTIALS[name]
    x = jnp.float32([-12.0, -3.25, -0.5, 0.0])
    y = evaluate(name, x)
    expected = y * (LOG_2 if base == 2 else 1.0)
    assert (expected > 0).all()
    gradient = jax.jit(jax.vmap(jax.grad(function)))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    value, tangent = jax.jvp(jax.jit(function), (x,), (jnp.full_like(x, 2.0),))
    np.testing.assert_array_equal(value, y)
    np.testing.assert_allclose(tangent, 2 * expected, rtol=1e-6)


@pytest.mark.parametrize("name", TANHS)
def test_derivatives_of_tanh(name):
    x = jnp.float32([-3.0, -0.5, 0.25, 1.0])
    y = np.asarray(jax.jit(TANHS[name])(x))
    gradient = jax.jit(jax.vmap(jax.grad(TANHS[name])))(x)
    np.testing.assert_allclose(gradient, 1 - y * y, rtol=1e-5)


def test_masked_scores_have_no_gradient():
    for name, (function, _) in EXPONENTIALS.items():
        assert float(jax.jit(jax.grad(function))(jnp.float32(-jnp.inf))) == 0, name
