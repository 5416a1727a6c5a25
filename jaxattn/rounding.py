"""round_to: the only place in jaxattn where a value loses bits.

It works on the bits of float32 or float64 storage with integer operations alone, because
`lax.reduce_precision` flushes the target's subnormals and compilers may drop a cast to a narrow
type and back (openxla/xla#41605, jax-ml/jax#6283).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.formats import (
    FLOAT32,
    FLOAT64,
    FLOOR,
    FORCE_ODD,
    NEAREST_EVEN,
    SATURATE,
    STOCHASTIC,
    TO_INFINITY,
    TOWARD_ZERO,
    Format,
    format_of,
    holds,
)
from jaxattn.formats import name_of as format_name

# storage dtype -> (integer dtype, bits of its significand with the hidden one, exponent bias)
_STORAGE = {"float32": (jnp.int32, 24, 127), "float64": (jnp.int64, 53, 1023)}


def round_to(x: Any, format: Any, bits: Any = None) -> jax.Array:
    """x rounded once to `format`, kept in the dtype it is stored in.

    x:      float array of any shape; float16, bfloat16 and float8 are widened to float32 first
    format: whatever format_of takes; or a Format of int arrays [L] (or [L, ...]), which then apply
            to the leading axes of x
    bits:   uint32 array that broadcasts to x's shape, for stochastic rounding only: x moves up in
            magnitude with a probability equal to the dropped fraction when `bits` are uniform, to
            within 2^-30

    NaN stays NaN, -0 stays -0 (it is 0 where a derivative is taken). Gradients pass straight
    through. A NumPy float64 array is rounded in float64 whatever jax_enable_x64 says and comes back
    as float32, which holds the result exactly; formats that float32 cannot hold need
    jax_enable_x64. float32 storage below 2^-126 is treated exactly here, though XLA's own
    arithmetic on CPU flushes it.
    Traced formats are not checked: they must be within the storage's precision and range.
    Raises TypeError for x that is not floating point, for bits that are not uint32 and for formats
    that the storage cannot hold; ValueError for unknown formats.
    """
    static = not (isinstance(format, Format) and any(np.ndim(f) or _traced(f) for f in format))
    if static:
        format = format_of(format)
        if format.rounding == STOCHASTIC and bits is None:
            raise ValueError("stochastic rounding needs bits: pass a uint32 array of x's shape")
    if getattr(x, "dtype", None) == np.float64 and not jax.config.read("jax_enable_x64"):
        return _round_wide(x, format, bits)
    # NumPy arrays have no gradient, and custom_jvp would join them to whatever trace is under way.
    rounded = _round_bits if isinstance(x, (np.ndarray, np.generic)) else _round
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it first")
    if x.dtype.name not in _STORAGE:
        x = x.astype(jnp.float32)
    if static:
        stored = FLOAT32 if x.dtype == jnp.float32 else FLOAT64
        if holds(format, stored):
            return x
        if not holds(stored, format):
            raise TypeError(
                f"float32 cannot hold the format {format_name(format)!r}: set jax_enable_x64 and "
                "pass float64"
            )
    if bits is not None and jnp.asarray(bits).dtype != jnp.uint32:
        raise TypeError(f"bits must be uint32, got {jnp.asarray(bits).dtype}")
    return rounded(x, Format(*(_aligned(field, x.ndim) for field in format)), bits)


def round_to_common(x: jax.Array, format: Format) -> jax.Array:
    """round_to for float32 x and formats that are all `common`, at less than half the work.

    format: of int arrays [L], as in round_to
    """
    return _common(x, Format(*(_aligned(field, x.ndim) for field in format)))


def common(format: Format) -> bool:
    """Whether round_to_common holds for a format: it keeps subnormals, and either has float32's own
    exponents, or goes to nearest even by steps half of which are normal float32 numbers."""
    as_float32 = format.emin == FLOAT32.emin and format.emax == FLOAT32.emax
    nearest = format.rounding == NEAREST_EVEN
    toward_zero = format.rounding == TOWARD_ZERO and not format.reserved
    steps = format.emin - format.precision >= FLOAT32.emin
    fits = as_float32 and (nearest or toward_zero) or nearest and steps
    return bool(format.subnormals and fits and holds(FLOAT32, format))


def round_to_half(x: jax.Array | np.ndarray, precision: Any) -> jax.Array:
    """round_to(x, "float16") for float32 x by the host's own conversion, many times faster.

    precision: float16's 11, traced, aligned with the leading axes of x.
    """
    rounded = _half_bits if isinstance(x, np.ndarray) else _through_half  # as in round_to
    return rounded(x, _aligned(precision, x.ndim))


def round_to_half_or_not(x: jax.Array, precision: Any) -> jax.Array:
    """round_to_half where precision is 11, `unrounded` where it is 24: float16 beside float32."""
    return _half_or_not(x, _aligned(precision, x.ndim))


def unrounded(x: jax.Array, precision: Any) -> jax.Array:
    """x itself, but no compiler can fuse what stands on its two sides into one multiply-add.

    precision: the storage's own, 24 or 53, traced: a constant is no protection.
    """
    return _opaque(x, _aligned(precision, x.ndim))


def _traced(field: Any) -> bool:
    return isinstance(field, jax.core.Tracer)


def _aligned(field: Any, ndim: int) -> jax.Array:
    field = jnp.asarray(field, jnp.int32)
    return field.reshape(field.shape + (1,) * (ndim - field.ndim) if field.ndim else ())


def _round_wide(x: Any, format: Format, bits: Any) -> jax.Array:
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        wide = np.asarray(round_to(np.asarray(x), format, bits))
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.array_equal(narrow, wide, equal_nan=True):
        raise TypeError(
            "float32 cannot hold the result: set jax_enable_x64, or round to a format within "
            "float32's range and precision"
        )
    return jnp.asarray(narrow)


@functools.partial(jax.jit, inline=True)  # traced once per shape, not once per site
def _round_bits(x: jax.Array, format: Format, bits: Any) -> jax.Array:
    dtype, digits, exponent_bias = _STORAGE[x.dtype.name]
    one = dtype(1)
    p, emin, emax, subnormals, reserved, overflow, rounding = (f.astype(dtype) for f in format)
    infinity = dtype((2 * exponent_bias + 1) << (digits - 1))
    hidden = dtype(1 << (digits - 1))
    largest = ((emax + exponent_bias + 1) << (digits - 1)) - ((reserved + 1) << (digits - p))

    word = jax.lax.bitcast_convert_type(x, dtype)
    magnitude = word & np.iinfo(dtype).max
    field = magnitude >> (digits - 1)
    exponent = jnp.maximum(field, one)
    significand = (magnitude & (hidden - 1)) | jnp.where(field > 0, hidden, dtype(0))

    # Below emin the quantum stops shrinking, so more bits drop. Once all of the significand does,
    # what remains is nothing or one quantum.
    drop = (digits - p) + jnp.maximum(emin + exponent_bias - exponent, dtype(0))
    deepest = dtype(np.iinfo(dtype).bits - 2)
    beneath = jnp.clip(drop - deepest, 0, deepest)
    sticky = (significand > 0) & (beneath > 0)  # a directed rounding still sees it
    low = (significand >> beneath) | sticky.astype(dtype)
    drop = jnp.minimum(drop, deepest)
    mask = (one << drop) - 1
    add = ((mask >> 1) + ((low >> drop) & one)) & -(rounding == NEAREST_EVEN).astype(dtype)
    add |= (word >> (np.iinfo(dtype).bits - 1)) & -(rounding == FLOOR).astype(dtype)
    if bits is not None:
        add |= _random(bits, drop, dtype) & -(rounding == STOCHASTIC).astype(dtype)
    force = (rounding == FORCE_ODD) & (magnitude > 0)
    kept = ((low + (add & mask)) >> drop) | force.astype(dtype)

    lowest = emin - p + 1 + exponent_bias
    quantum = jnp.where(
        lowest > 0,
        jnp.maximum(lowest, one) << (digits - 1),
        one << jnp.clip(lowest + (digits - 2), 0, digits),
    )
    near = (magnitude - significand) + (kept << jnp.minimum(drop, dtype(digits)))
    rounded = jnp.where(drop > digits, quantum, near)
    rounded = jnp.where((kept == 0) | (magnitude == 0), dtype(0), rounded)
    tiny = (subnormals == 0) & (rounded < ((emin + exponent_bias) << (digits - 1)))
    rounded = jnp.where(tiny, dtype(0), rounded)
    directed = (rounding != NEAREST_EVEN) & (rounding != STOCHASTIC)
    beyond = jnp.where(overflow == TO_INFINITY, infinity, infinity + (hidden >> 1))
    beyond = jnp.where(overflow == SATURATE, largest, beyond)
    finite_beyond = jnp.where(directed, largest, beyond)
    beyond = jnp.where(magnitude == infinity, beyond, finite_beyond)
    rounded = jnp.where(rounded > largest, beyond, rounded)
    rounded = jnp.where(magnitude > infinity, magnitude, rounded)
    return jax.lax.bitcast_convert_type(rounded | (word ^ magnitude), x.dtype)


_round = jax.custom_jvp(_round_bits)


@functools.partial(jax.jit, inline=True)
def _common_bits(x: jax.Array, format: Format) -> jax.Array:
    p, emin, emax, _, reserved, overflow, rounding = format
    drop = 24 - p
    infinity = jnp.int32(0x7F800000)
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = word & np.iinfo(np.int32).max
    mask = (1 << drop) - 1
    add = (mask >> 1) + ((magnitude >> drop) & 1)
    rounded = (magnitude + (add & jnp.where(rounding == NEAREST_EVEN, mask, 0))) & ~mask

    # Below 2^emin the steps are those of 2^(emin - p + 24), to which an addition rounds.
    anchor = jax.lax.bitcast_convert_type((emin - p + 24 + 127) << 23, jnp.float32)
    small = (jax.lax.bitcast_convert_type(magnitude, jnp.float32) + anchor) - anchor
    subnormal = magnitude < jnp.where(emin == FLOAT32.emin, 0, (emin + 127) << 23)
    rounded = jnp.where(subnormal, jax.lax.bitcast_convert_type(small, jnp.int32), rounded)

    largest = ((emax + 128) << 23) - ((reserved + 1) << drop)
    beyond = jnp.where(overflow == TO_INFINITY, infinity, infinity | 1 << 22)
    beyond = jnp.where(overflow == SATURATE, largest, beyond)
    rounded = jnp.where(rounded > largest, beyond, rounded)
    rounded = jnp.where(magnitude > infinity, magnitude, rounded)
    return jax.lax.bitcast_convert_type(rounded | (word ^ magnitude), jnp.float32)


@functools.partial(jax.jit, inline=True)
def _half_bits(x: jax.Array, precision: jax.Array) -> jax.Array:
    # No compiler may drop the two conversions, or fuse what stands on their two sides into one
    # multiply-add. On CPU a barrier is enough, and half as dear as bits that depend on `precision`.
    x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, precision.shape))
    if jax.default_backend() == "cpu":  # then there is no other
        return _barred_half(x, precision)
    return jax.lax.platform_dependent(x, precision, cpu=_barred_half, default=_guarded_half)


def _barred_half(x: jax.Array, precision: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)


def _guarded_half(x: jax.Array, precision: jax.Array) -> jax.Array:
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
    word |= (precision - 11).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(word, jnp.float16).astype(jnp.float32)


@functools.partial(jax.jit, inline=True)
def _same_bits(x: jax.Array, precision: jax.Array) -> jax.Array:
    dtype, digits, _ = _STORAGE[x.dtype.name]
    word = jax.lax.bitcast_convert_type(x, dtype) | (precision - digits).astype(dtype)
    return jax.lax.bitcast_convert_type(word, x.dtype)


@functools.partial(jax.jit, inline=True)
def _half_or_same_bits(x: jax.Array, precision: jax.Array) -> jax.Array:
    return jnp.where(precision == 11, _half_bits(x, precision), _same_bits(x, precision))


_common = jax.custom_jvp(_common_bits)
_through_half = jax.custom_jvp(_half_bits)
_half_or_not = jax.custom_jvp(_half_or_same_bits)
_opaque = jax.custom_jvp(_same_bits)


def _random(bits: jax.Array, drop: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.int32:
        return jax.lax.bitcast_convert_type(bits, jnp.int32)
    # 32 random bits fill the top of the dropped ones.
    return (bits.astype(jnp.int64) >> jnp.maximum(32 - drop, 0)) << jnp.maximum(drop - 32, 0)


def _straight_through(function: Any) -> None:
    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        # The value with x's derivative written out: lax.scan drops custom rules from what it saves
        # for the backward pass, and second derivatives would silently be zero.
        x, *rest = primals
        still = jax.lax.stop_gradient(x)
        moved = jnp.where(jnp.isfinite(x), x - still, jnp.zeros_like(x))
        return function(still, *rest) + moved, tangents[0]

    function.defjvp(derivative)


for _function in (_round, _common, _through_half, _half_or_not, _opaque):
    _straight_through(_function)
