"""The exponentials and hyperbolic tangents that kernels call, by the names of recipe.CHOICES."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.formats import FLOAT16
from jaxattn.rounding import round_to

Function = Callable[[jax.Array], jax.Array]


def _smooth(function: Function, slope: Callable[[jax.Array], jax.Array]) -> Function:
    """`function` with the derivative slope(y) of the curve that it approximates.

    Bit tricks and tables have no useful derivative of their own.
    """
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def derivative(primals, tangents):  # type: ignore[no-untyped-def]
        y = wrapped(*primals)
        return y, slope(y) * tangents[0]

    return functools.wraps(function)(wrapped)


def _power_of_two(k: jax.Array) -> jax.Array:
    """2^k for whole k in the normal range of k's dtype, by its bits."""
    integer, digits, bias = (
        (jnp.int32, 24, 127) if k.dtype == jnp.float32 else (jnp.int64, 53, 1023)
    )
    field = jnp.clip(k, 1 - bias, bias).astype(integer) + bias
    return jax.lax.bitcast_convert_type(field << (digits - 1), k.dtype)


def _reduced(x: jax.Array, k: jax.Array, fraction: jax.Array) -> jax.Array:
    """fraction·2^k in two factors, 0 where x is below the smallest normal's exponent."""
    half = jnp.floor(k * 0.5)
    return jnp.where(x < -1100.0, x * 0, fraction * _power_of_two(half) * _power_of_two(k - half))


def _exp2(x: jax.Array) -> jax.Array:
    finite = jnp.clip(x, -1200.0, 1200.0)
    k = jnp.round(finite)
    return _reduced(finite, k, jnp.exp((finite - k) * math.log(2))) + (x - x) * (x != -math.inf)


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
    return jnp.where(k < -126, y * 0, y * _power_of_two(k))


# hvx_exp2_hf (ggml 9d47b21b, src/ggml-hexagon/htp/hmx-flash-attn-ops.c) and hvx_vec_exp2_f16
# (ggml d99724f2, htp/hvx-exp.h): Horner coefficients from x^6 down, as the bits the source splats.
# The first is a qf16 word, (2·644 + 1)·2^(2 - 15 - 10). The qfloat16 steps stand as IEEE half
# steps to nearest even here, which is what they convert to on v79 and later.
_EXP2_HALF_FIRST = 1289 * 2.0**-23
_EXP2_HALF_BITS = (0x157D, 0x20ED, 0x2B1B, 0x33B0, 0x398C, 0x3C00)


def _half(x: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(round_to(x.astype(np.float32), FLOAT16))


@functools.cache
def _exp2_half_table(clamped: bool) -> np.ndarray:
    """The half-precision exp2 of all 2^16 half values, float32 [65536], indexed by their bits."""
    words = np.arange(2**16, dtype=np.uint16)
    argument = words.view(np.float16).astype(np.float32)
    x = np.clip(np.nan_to_num(argument), -24.0 if clamped else -65504.0, 65504.0)
    # The conversion to an integer truncates, so k is the nearest one and |x - k| <= 1/2.
    k = np.trunc(_half(x - np.float32(0.5)))
    fraction = _half(x - k)
    y = _half(np.float32(_EXP2_HALF_FIRST) * fraction)
    for word in _EXP2_HALF_BITS[:-1]:
        y = _half(_half(y + np.uint16(word).view(np.float16)) * fraction)
    y = _half(y + np.uint16(_EXP2_HALF_BITS[-1]).view(np.float16))
    significand = y.astype(np.float16).view(np.int16).astype(np.int32)
    exponent = k.astype(np.int32)
    # k is added to the exponent field as an integer: no subnormals, a field of 0 loses the hidden
    # bit, a negative one gives 0 (and so does an overflow, which a softmax cannot reach).
    field = (significand >> 10) + exponent
    word = np.where((field < 0) | (field > 30), 0, significand + (exponent << 10))
    table = word.astype(np.uint16).view(np.float16).astype(np.float32)
    return np.where(np.isnan(argument), argument, table)


def _exp2_half(x: jax.Array, clamped: bool) -> jax.Array:
    # The argument is a half already where `difference` (or `exponent`) is float16, as in every
    # kernel that calls this; otherwise its register is, so it is rounded here.
    word = jax.lax.bitcast_convert_type(round_to(x, FLOAT16).astype(jnp.float16), jnp.uint16)
    return jnp.asarray(_exp2_half_table(clamped))[word.astype(jnp.int32)].astype(x.dtype)


def _base2(function: Function) -> tuple[Function, int]:
    return _smooth(function, lambda y: y * math.log(2)), 2


# name -> (function of an array, its base: "e" is 0)
EXPONENTIALS: dict[str, tuple[Function, int]] = {
    "exp": (jnp.exp, 0),
    "exp2": _base2(_exp2),
    "exp2_half": _base2(functools.partial(_exp2_half, clamped=False)),
    "exp2_half_clamped": _base2(functools.partial(_exp2_half, clamped=True)),
    "exp2_poly3": _base2(functools.partial(_exp2_poly, degree=3)),
    "exp2_poly4": _base2(functools.partial(_exp2_poly, degree=4)),
    "exp2_poly5": _base2(functools.partial(_exp2_poly, degree=5)),
}

TANHS: dict[str, Function] = {"tanh": jnp.tanh}
