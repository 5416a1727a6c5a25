"""The exponentials and hyperbolic tangents that kernels call, by the names of fields.CHOICES."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxattn import half_tables

LOG2E = math.log2(math.e)
Function = Callable[[jax.Array], jax.Array]


def _smooth(function: Function, curve: Function, slope: Function) -> Function:
    """`function` with the derivatives of the curve that it approximates, slope(y) the first.

    Bit tricks and tables have no useful derivative of their own.
    """
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def derivative(primals, tangents):  # type: ignore[no-untyped-def]
        # As in rounding.py: the value carries its derivative, for whoever differentiates again.
        still = jax.lax.stop_gradient(primals[0])
        moved = curve(primals[0]) - curve(still)
        y = wrapped(still) + jnp.where(jnp.isfinite(moved), moved, jnp.zeros_like(moved))
        return y, slope(y) * tangents[0]

    return functools.wraps(function)(wrapped)


def power_of_two(k: jax.Array) -> jax.Array:
    """2^k for whole k in the normal range of k's dtype, by its bits."""
    integer, digits, bias = (
        (jnp.int32, 24, 127) if k.dtype == jnp.float32 else (jnp.int64, 53, 1023)
    )
    field = jnp.clip(k, 1 - bias, bias).astype(integer) + bias
    return jax.lax.bitcast_convert_type(field << (digits - 1), k.dtype)


def _exp2(x: jax.Array) -> jax.Array:
    finite = jnp.clip(x, -1200.0, 1200.0)
    k = jnp.round(finite)
    # 2^k in two factors, for results near the ends of the range.
    half = jnp.floor(k * 0.5)
    y = jnp.exp((finite - k) * math.log(2)) * power_of_two(half) * power_of_two(k - half)
    return jnp.where(jnp.isnan(x), x, y)


# Degree -> coefficients, from the constant term up: fpminimax fits of 2^x on [0, 1), as in
# Dao-AILab/flash-attention, flash_attn/cute/utils.py, POLY_EX2 at 0251105a.
_POLY_EX2 = {
    3: (1.0, 0.695146143436431884765625, 0.227564394474029541015625, 0.077119089663028717041015625),
    4: (
        1.0,
        0.693042695522308349609375,
        0.2412912547588348388671875,
        5.2225358784198760986328125e-2,
        1.3434938155114650726318359375e-2,
    ),
    5: (
        1.0,
        0.693151414394378662109375,
        0.24016360938549041748046875,
        5.5802188813686370849609375e-2,
        9.01452265679836273193359375e-3,
        1.86810153536498546600341796875e-3,
    ),
}


def _exp2_poly(x: jax.Array, degree: int) -> jax.Array:
    """FlashAttention-4's software exp2 (ex2_emulation in the file above): floor, Horner, exponent.

    Arguments below -127 are clamped there; a result whose exponent field would be 0 is 0 here.
    """
    x = jnp.maximum(x, -127.0)
    k = jnp.floor(x)
    fraction = x - k
    y = jnp.full_like(x, _POLY_EX2[degree][-1])
    for coefficient in reversed(_POLY_EX2[degree][:-1]):
        y = y * fraction + coefficient
    return jnp.where(k < -126, y * 0, y * power_of_two(k))


# Malossi et al., Fast Exponential Computation on SIMD Architectures, as in pytorch/pytorch,
# aten/src/ATen/cpu/vec/vec512/vec512_float.h, fexp_u20 (2.13.0), from the constant term up.
_CUBIC = (0.00010703434948458272, 0.30354260500649682, -0.22433836478672356, -0.079204240219773236)


def _exp_cubic(x: jax.Array) -> jax.Array:
    """e^x: x·log2(e), less a cubic in its fraction, becomes the integer that a float32's bits are.

    Good to 1e-4, in steps of 2^-17: the integer is rounded to float32 before it is one.
    """
    single = x.astype(jnp.float32)
    t = jnp.clip(single, -87.5, 88.8) * jnp.float32(LOG2E)
    fraction = t - jnp.floor(t)
    cubic = jnp.full_like(t, _CUBIC[-1])
    for coefficient in reversed(_CUBIC[:-1]):
        cubic = cubic * fraction + coefficient
    bits = ((t - cubic) * 2**23 + 127 * 2.0**23).astype(jnp.int32)
    y = jax.lax.bitcast_convert_type(bits, jnp.float32)
    y = jnp.where(single < -87.33654, jnp.zeros_like(y), y)
    y = jnp.where(single > 88.72283, jnp.full_like(y, jnp.inf), y).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, y)


def _table(x: jax.Array, name: str) -> jax.Array:
    # The argument is a half already where the site before it is float16, as in every kernel that
    # calls these; otherwise its register is one, so it is rounded here.
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
    table = jnp.asarray(half_tables.table(name))
    return table.at[word].get(mode="promise_in_bounds").astype(x.dtype)


def _base2(function: Function) -> tuple[Function, int]:
    return _smooth(function, jnp.exp2, lambda y: y * math.log(2)), 2


# name -> (function of an array, its base: "e" is 0)
EXPONENTIALS: dict[str, tuple[Function, int]] = {
    "exp": (jnp.exp, 0),
    "exp_cubic": (_smooth(_exp_cubic, jnp.exp, lambda y: y), 0),
    "exp2": _base2(_exp2),
    "exp2_half": _base2(functools.partial(_table, name="exp2")),
    "exp2_half_clamped": _base2(functools.partial(_table, name="exp2_clamped")),
    "exp2_poly3": _base2(functools.partial(_exp2_poly, degree=3)),
    "exp2_poly4": _base2(functools.partial(_exp2_poly, degree=4)),
    "exp2_poly5": _base2(functools.partial(_exp2_poly, degree=5)),
}

TANHS: dict[str, Function] = {
    "tanh": jnp.tanh,
    "tanh_half": _smooth(functools.partial(_table, name="tanh"), jnp.tanh, lambda y: 1 - y * y),
}
