"""round_to against other people's casts, exact fractions and the laws of rounding."""

import math
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxattn
from jaxattn.formats import (
    BFLOAT16,
    FLOAT16,
    FLOOR,
    FORCE_ODD,
    FORMATS,
    NEAREST_EVEN,
    SATURATE,
    TO_INFINITY,
    TO_NAN,
    TOWARD_ZERO,
    Format,
    format_of,
)
from jaxattn.rounding import round_to, round_to_half, unrounded

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
traced_round = jax.jit(round_to)
static_round = jax.jit(round_to, static_argnums=1)


def rounded(x, format, bits=None):
    """round_to of a static format, compiled once a shape; NumPy float64 as it is."""
    wide = x.dtype == np.float64 and not jax.config.jax_enable_x64
    return np.asarray((round_to if wide else static_round)(x, format, bits))


def cast(x, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(x.dtype)


def assert_same(got, expected, x):
    """Equal bit for bit, all NaNs being one."""
    word = {4: np.uint32, 8: np.uint64}[expected.dtype.itemsize]
    same = (got.view(word) == expected.view(word)) | (np.isnan(got) & np.isnan(expected))
    wrong = np.flatnonzero(~same)[:5]
    assert same.all(), f"{x[wrong]!r} gave {got[wrong]!r}, not {expected[wrong]!r}"


def values_of(name):
    """Every finite value of a dtype, sorted, in float64."""
    dtype = np.dtype(DTYPES[name])
    words = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{8 * dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = words.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@cache
def neighbourhoods(storage):
    """Around every value of every dtype here: it, the midpoints beside it, and 1 ulp to each side.

    The midpoint past the largest value is where overflow begins.
    """
    parts = []
    for name in DTYPES:
        values = values_of(name)
        beyond = 2 * values[-1] - values[-2]
        edges = np.concatenate([[-beyond], values, [beyond]])
        points = np.concatenate([edges, (edges[1:] + edges[:-1]) / 2])
        with np.errstate(over="ignore"):
            points = points.astype(storage)
        parts += [points, *(np.nextafter(points, storage(side)) for side in (-np.inf, np.inf))]
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan]
    info = np.finfo(storage)
    limits = [info.max, info.tiny, info.smallest_subnormal, info.tiny - info.smallest_subnormal]
    return np.concatenate([*parts, np.array(special + limits + [-x for x in limits], storage)])


@cache
def every_exponent():
    """Random significands and signs at every exponent field of float32, NaNs included."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 2**23, (256, 512), dtype=np.uint32)
    sign = rng.integers(0, 2, (256, 512), dtype=np.uint32)
    field = np.arange(256, dtype=np.uint32)[:, None]
    return (sign << 31 | field << 23 | low).view(np.float32).ravel()


def test_the_inputs_hold_all_half_values():
    inputs = neighbourhoods(np.float32)
    for name, count in (("float16", 63_488), ("bfloat16", 65_280)):
        values = values_of(name).astype(np.float32)
        assert len(values) == count - 1  # of ±0 one
        assert np.isin(values, inputs).all()
    assert np.isin(np.float32([65520.0, 464.0, 61440.0, 2.0**-25, 2.0**-10]), inputs).all()


@pytest.mark.parametrize("name", DTYPES)
def test_equals_casts_around_every_value(name):
    x = neighbourhoods(np.float32)
    assert_same(rounded(x, name), cast(x, DTYPES[name]), x)


@pytest.mark.parametrize("name", DTYPES)
def test_equals_casts_at_every_exponent(name):
    x = every_exponent()
    assert_same(rounded(x, name), cast(x, DTYPES[name]), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_equals_casts_of_all_float32_values(name):
    run = jax.jit(lambda x: round_to(x, name))
    for top in range(256):
        x = (np.arange(2**24, dtype=np.uint32) | np.uint32(top << 24)).view(np.float32)
        assert_same(np.asarray(run(x)), cast(x, DTYPES[name]), x)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_storage_itself_is_untouched(name):
    x = every_exponent()
    assert_same(rounded(x, name), x, x)


@pytest.mark.parametrize("name", [*DTYPES, "float32"])
def test_float64_storage_equals_casts_around_every_value(name):
    x = neighbourhoods(np.float64)
    # ml_dtypes goes from float64 by way of float32, which is exact only for what float32 holds.
    if name != "float32" and DTYPES[name] is not np.float16:
        x = x[(cast(x, np.float32) == x) | np.isnan(x)]
    with jax.enable_x64(True):
        got = rounded(x, name)
    assert got.dtype == np.float64
    assert_same(got, cast(x, np.float32 if name == "float32" else DTYPES[name]), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float64_storage_equals_casts_at_every_exponent(dtype):
    rng = np.random.default_rng(1)
    field = np.arange(2048, dtype=np.uint64)[:, None]
    word = rng.integers(0, 2**63, (2048, 256), dtype=np.uint64)
    x = (word & np.uint64(2**52 - 1) | (word >> np.uint64(62)) << np.uint64(63)) | (
        field << np.uint64(52)
    )
    # The midpoints of float32, and one ulp of float64 to each side of them.
    below = np.abs(every_exponent()[::7])
    below = below[np.isfinite(below)]
    middle = below.astype(np.float64) + np.spacing(below).astype(np.float64) / 2
    sides = [np.nextafter(middle, side) for side in (-np.inf, np.inf)]
    x = np.concatenate([x.view(np.float64).ravel(), below.astype(np.float64), middle, *sides])
    with jax.enable_x64(True):
        got = rounded(x, dtype)
    assert_same(got, cast(x, dtype), x)


MANY = ("float16", "bfloat16", "float8_e4m3fn", "fp22", "e5m9:floor", "float16:odd", "float16:ftz")
WIDE = ("tf32", "float32", "float32:sat", "float32:ftz", "float32:rz", "e4m3:sat", "e3m2")


@pytest.mark.parametrize("name", sorted({*MANY, *DTYPES, *WIDE}))
def test_traced_formats_equal_static_ones(name):
    x = neighbourhoods(np.float32)
    assert_same(np.asarray(traced_round(x, format_of(name))), rounded(x, name), x)


def test_lanes_of_formats_equal_single_ones():
    x = every_exponent()[::3]
    formats = Format(*(np.array(f) for f in zip(*map(format_of, MANY), strict=True)))
    lanes = np.stack([x] * len(MANY))
    together = np.asarray(traced_round(lanes, formats))
    shared = np.asarray(traced_round(x[None], formats))  # one lane of numbers, many formats
    mapped = np.asarray(jax.jit(jax.vmap(round_to, in_axes=(None, 0)))(x, formats))
    for i, name in enumerate(MANY):
        alone = rounded(x, name)
        for got in (together, shared, mapped):
            assert_same(got[i], alone, x)


def test_one_format_for_each_of_two_leading_axes():
    x = every_exponent()[:1200].reshape(2, 3, 200)
    names = [["float16", "bfloat16", "fp22"], ["tf32", "float8_e5m2", "e3m2"]]
    fields = np.array([[format_of(name) for name in row] for row in names])
    got = np.asarray(traced_round(x, Format(*np.moveaxis(fields, -1, 0))))
    for i, row in enumerate(names):
        for j, name in enumerate(row):
            assert_same(got[i, j], rounded(x[i, j], name), x[i, j])


# --- exact arithmetic as the judge ---------------------------------------------------------------


def exactly(x, format, bits=0):
    """x rounded by the definition, in fractions: a Fraction, or inf where the format overflows."""
    p, emin, emax, subnormals, reserved, overflow, mode = format
    size = abs(Fraction(x))
    exponent = math.frexp(x)[1] - 1
    quantum = Fraction(2) ** (max(exponent, emin) - p + 1)
    low = math.floor(size / quantum)
    rest = size / quantum - low
    up = {
        NEAREST_EVEN: rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1),
        TOWARD_ZERO: False,
        FLOOR: rest > 0 and x < 0,
        FORCE_ODD: low % 2 == 0,
    }[mode]
    value = (low + up) * quantum
    if not subnormals and value < Fraction(2) ** emin:
        value = Fraction(0)
    largest = (2**p - 1 - reserved) * Fraction(2) ** (emax - p + 1)
    if value > largest:
        keep = mode != NEAREST_EVEN or overflow == SATURATE
        value = largest if keep else {TO_INFINITY: math.inf, TO_NAN: math.nan}[overflow]
    return -value if x < 0 else value


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
formats = st.builds(
    lambda E, M, mode, subnormals, sat: Format(
        M + 1, 2 - 2 ** (E - 1), 2 ** (E - 1) - 1, subnormals, 0, SATURATE if sat else 0, mode
    ),
    st.integers(2, 8),
    st.integers(1, 23),
    st.sampled_from([NEAREST_EVEN, TOWARD_ZERO, FORCE_ODD, FLOOR]),
    st.integers(0, 1),
    st.booleans(),
)
nearest = formats.map(lambda f: f._replace(rounding=NEAREST_EVEN, overflow=TO_INFINITY))


@st.composite
def arrays(draw, format=None):
    """Sixteen float32 numbers, about half of them within the format's range, ties included."""
    x = draw(st.lists(finite, min_size=8, max_size=8))
    if format is None:
        return np.float32(x * 2)
    p, emin, emax = format[:3]
    near = st.builds(
        lambda n, eighths, e, sign: sign * (n + eighths / 8) * 2.0 ** (e - p + 1),
        st.integers(0, 2**p - 1),
        st.integers(0, 7),
        st.integers(emin - 1, emax),
        st.sampled_from([-1, 1]),
    )
    return np.float32(x + draw(st.lists(near, min_size=8, max_size=8)))


def both(format_strategy):
    return format_strategy.flatmap(lambda f: st.tuples(st.just(f), arrays(f)))


@given(both(formats))
def test_equals_the_definition(pair):
    format, x = pair
    tiny = Fraction(2) ** (format.emin - format.precision)
    for value, got in zip(x.tolist(), np.asarray(traced_round(x, format)).tolist(), strict=True):
        if format.rounding == FORCE_ODD and 0 < abs(Fraction(value)) < tiny:
            continue  # below half the smallest number nothing is left to be odd
        expected = exactly(value, format) if value else 0
        assert got == expected, (format, value)
        assert math.copysign(1, got) == math.copysign(1, value), (format, value)


@given(both(nearest))
def test_nearest(pair):
    """No number of the format is nearer, and of two as near the even one is taken."""
    format, x = pair
    p, emin, emax = format[:3]
    for value, got in zip(x.tolist(), np.asarray(traced_round(x, format)).tolist(), strict=True):
        if math.isinf(got) or not format.subnormals:
            continue
        exponent = max(math.frexp(got)[1] - 1, emin) if got else emin
        above = Fraction(2) ** (exponent - p + 1)
        # Below a power of two the numbers are twice as dense.
        below = above / 2 if got and math.frexp(abs(got))[0] == 0.5 and exponent > emin else above
        error, away = Fraction(got) - Fraction(value), abs(got) < abs(value)
        gap = above if away else below
        assert abs(error) <= gap / 2
        significand = abs(Fraction(got)) / above
        if abs(error) == gap / 2:
            assert significand % 2 == 0
        assert significand.denominator == 1 and significand < 2**p


@given(both(formats))
def test_idempotent(pair):
    format, x = pair
    once = traced_round(x, format)
    twice = traced_round(once, format)
    assert_same(np.asarray(twice), np.asarray(once), x)


@given(both(formats))
def test_monotone(pair):
    format, x = pair
    x = np.sort(x)
    got = np.asarray(traced_round(x, format))
    assert (got[1:] >= got[:-1]).all()


@given(both(formats.filter(lambda f: f.rounding != FLOOR)))
def test_odd(pair):
    format, x = pair
    got, mirrored = (np.asarray(traced_round(y, format)) for y in (x, -x))
    assert_same(mirrored, -got, -x)


@given(arrays(), st.integers(2, 22), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_commutes(x, precision, shift):
    format = Format(precision, -126, 127)
    x = np.where((np.abs(x) > 2.0**-100) & (np.abs(x) < 2.0**100), x, np.float32(1))
    scaled = np.asarray(traced_round(np.ldexp(x, shift), format))
    assert_same(scaled, np.ldexp(np.asarray(traced_round(x, format)), shift), x)


@given(st.integers(0, 2**32 - 1), formats)
def test_non_finite_values_and_zeros(word, format):
    nan = np.uint32(word | 0x7F800001).view(np.float32)
    x = np.array([nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    got = np.asarray(traced_round(x, format))
    largest = (2 - 2.0 ** (1 - format.precision)) * 2.0**format.emax
    infinity = largest if format.overflow == SATURATE else np.inf
    assert np.isnan(got[0])
    assert got[1:].tolist() == [infinity, -infinity, 0.0, 0.0]
    assert np.signbit(got[1:]).tolist() == [False, True, False, True]


# --- modes, flushing, saturation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("float16", 65519.996, 65504.0),
        ("float16", 65520.0, np.inf),
        ("float16:sat", 65520.0, 65504.0),
        ("float16:sat", -np.inf, -65504.0),
        ("float16:rz", 1e9, 65504.0),
        ("float16:rz", -np.inf, -np.inf),
        ("float16:floor", 1 + 2.0**-11, 1.0),
        ("float16:floor", -1 - 2.0**-20, -1 - 2.0**-10),
        ("float16:rz", -1 - 2.0**-11, -1.0),
        ("float16:odd", 1.0, 1 + 2.0**-10),
        ("float16:odd", 1 + 2.0**-10, 1 + 2.0**-10),
        ("float16:odd", -2.0 + 2.0**-12, -2 + 2.0**-10),
        ("float16:odd", 0.0, 0.0),
        ("float16", 2.0**-25, 0.0),
        ("float16", np.nextafter(np.float32(2.0**-25), np.float32(1)), 2.0**-24),
        ("float16", 3 * 2.0**-25, 2.0**-23),
        ("float16:ftz", 2.0**-14, 2.0**-14),
        ("float16:ftz", 2.0**-14 * (1 - 2.0**-10), 0.0),
        ("float16:ftz", 2.0**-14 * (1 - 2.0**-11), 2.0**-14),  # rounded before it is looked at
        ("float8_e4m3fn", 464.0, 448.0),
        ("float8_e4m3fn", 465.0, np.nan),
        ("float8_e4m3fn:sat", 1e9, 448.0),
        ("float8_e4m3fn:sat", np.inf, 448.0),
        ("float8_e4m3fn", np.inf, np.nan),
        ("float8_e4m3fn:rz", 1e9, 448.0),
        ("e4m3", 248.0, np.inf),
        ("fp22", 1 + 2.0**-13 + 2.0**-14, 1 + 2.0**-13),
        ("tf32", 1 + 2.0**-11, 1.0),
        ("tf32", 1 + 3 * 2.0**-11, 1 + 2.0**-9),
        ("e5m9:floor", 1 + 3 * 2.0**-10, 1 + 2.0**-9),  # a half with its last bit dropped
    ],
)
def test_by_hand(name, x, expected):
    got = rounded(np.float32(x), name)
    np.testing.assert_array_equal(got, np.float32(expected))
    assert np.isnan(expected) or np.signbit(got) == np.signbit(np.float32(x))


def test_floor_of_values_below_every_subnormal():
    x = np.float32([-(2.0**-24), -(2.0**-25), -(2.0**-26), -1.5 * 2.0**-27, -1e-30, -1e-44])
    np.testing.assert_array_equal(rounded(x, "float16:floor"), np.float32(-(2.0**-24)))
    np.testing.assert_array_equal(rounded(-x[1:], "float16:floor"), np.float32(0))


def test_odd_significands_are_odd():
    x = np.abs(every_exponent())
    x = x[(x >= 2.0**-14) & (x < 65504)]
    words = rounded(x, "float16:odd").astype(np.float16).view(np.uint16)
    assert (words & 1).all()
    assert np.abs(rounded(x, "float16:odd") / x - 1).max() <= 2.0**-10  # one unit, not half


def test_truncation_equals_clearing_bits():
    x = every_exponent()
    x = x[np.isfinite(x)]
    dropped = (x.view(np.uint32) & np.uint32(0xFFFFFC00)).view(np.float32)
    assert_same(rounded(x, "fp22"), dropped, x)


# --- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "x", "dropped"),
    [
        ("float16:sr", 1 + 1237 * 2.0**-23, 13),
        ("float16:sr", -3.75 + 5 * 2.0**-22, 13),
        ("float16:sr", 2.0**-14 * (1 - 2.0**-12), 14),
        ("float16:sr", 2.0**-20 * 1.6180339, 19),
        ("float16:sr", 2.0**-24 * 0.7, 24),
        ("bfloat16:sr", 0.1, 16),
        ("float8_e5m2:sr", 3e-5, 23),
        ("e8m19:sr", 1 + 11 * 2.0**-23, 4),
        ("float32:sr", 0.1, 0),
    ],
)
def test_moves_up_as_often_as_the_dropped_fraction_says(format, x, dropped):
    """Over all patterns of the dropped bits, so exactly."""
    x = np.float32(x)
    bits = np.arange(2**dropped, dtype=np.uint32)
    got = np.asarray(jax.jit(lambda x, b: round_to(x, format, b))(np.full(len(bits), x), bits))
    toward_zero = float(rounded(x, format_of(format)._replace(rounding=TOWARD_ZERO)))
    away = got[got != np.float32(toward_zero)]
    assert len(np.unique(got)) <= 2
    if len(away):
        gap = Fraction(float(away[0])) - Fraction(toward_zero)
        assert Fraction(len(away), len(bits)) == (Fraction(float(x)) - Fraction(toward_zero)) / gap
    else:
        assert toward_zero == x
    assert np.mean(got.astype(np.float64)) == pytest.approx(float(x), rel=1e-12)


def test_bits_above_the_dropped_ones_do_not_matter():
    x = every_exponent()
    x = x[(np.abs(x) >= 2.0**-14) & (np.abs(x) < 65504)]
    bits = np.random.default_rng(2).integers(0, 2**32, len(x), dtype=np.uint32)
    low = bits & np.uint32(2**13 - 1)
    assert_same(rounded(x, "float16:sr", bits), rounded(x, "float16:sr", low), x)


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_of_the_format_never_move(name):
    x = values_of(name).astype(np.float32)
    rng = np.random.default_rng(3)
    for bits in (rng.integers(0, 2**32, len(x), dtype=np.uint32), np.full(len(x), 2**32 - 1, "u4")):
        assert_same(rounded(x, f"{name}:sr", bits), x, x)


def test_stochastic_mean_is_unbiased():
    x = np.float32([1 / 3, -0.7, 1e-6, 3e-8, 1000.3])
    bits = jax.random.bits(jax.random.key(0), (2**16, 5))
    got = rounded(np.broadcast_to(x, (2**16, 5)), "float16:sr", bits).astype(np.float64)
    gap = np.ptp(got, axis=0)
    assert (gap > 0).all()
    # 5 standard deviations of a mean of 2^16 draws of two values
    assert (np.abs(got.mean(0) - x.astype(np.float64)) < 5 * gap / 2 / 2**8).all()


def test_stochastic_below_every_subnormal():
    """1.5·2^-26 is three eighths of the smallest subnormal; 1e-30 never shows in 2^16 draws."""
    bits = jax.random.bits(jax.random.key(1), (2**16,))
    got = rounded(np.full(2**16, 1.5 * 2.0**-26, np.float32), "float16:sr", bits)
    assert set(got.tolist()) == {0.0, 2.0**-24}
    assert np.mean(got > 0) == pytest.approx(0.375, abs=5 * 0.5 / 2**8)
    assert not rounded(np.full(2**16, 1e-30, np.float32), "float16:sr", bits).any()


def test_stochastic_overflow():
    x = np.float32([65519.0, 65519.0, 65504.0, 1e9, 1e9])
    bits = np.array([0, 2**13 - 1, 2**32 - 1, 0, 2**32 - 1], np.uint32)
    expected = np.float32([65504, np.inf, 65504, np.inf, np.inf])
    np.testing.assert_array_equal(rounded(x, "float16:sr", bits), expected)
    np.testing.assert_array_equal(rounded(x, "float16:sr:sat", bits), np.minimum(expected, 65504))


def test_stochastic_in_float64_storage():
    """Of 42 dropped bits the upper 32 are drawn: eighths move as often as they should."""
    with jax.enable_x64(True):
        for eighths in range(8):
            x = np.full(8, 1 + eighths / 8 * 2.0**-10)
            bits = np.arange(8, dtype=np.uint32) << np.uint32(29)
            assert np.sum(rounded(x, "float16:sr", bits) > 1) == eighths
        narrow = np.full(16, 1 + 5 * 2.0**-23)  # float32 to 20 bits: four bits dropped, as there
        bits = np.arange(16, dtype=np.uint32) << np.uint32(0)
        spread = rounded(narrow, "e8m19:sr", bits << np.uint32(28))
        assert np.sum(spread > 1) == 5
        exact = np.full(16, 1 + 2.0**-10)
        assert (rounded(exact, "float16:sr", np.full(16, 2**32 - 1, np.uint32)) == exact).all()


def test_stochastic_needs_bits():
    with pytest.raises(ValueError, match="needs bits: pass a uint32 array"):
        round_to(np.float32(1.1), "float16:sr")


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_bits_are_uint32(dtype):
    with pytest.raises(TypeError, match="bits"):
        round_to(np.ones(3, np.float32), "float16:sr", np.ones(3, dtype))


# --- what round_to takes and gives ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, *list(DTYPES.values())[1:], np.float32])
def test_keeps_shape_and_storage(dtype):
    for shape in [(), (0,), (3, 2), (2, 1, 0)]:
        got = round_to(np.ones(shape, dtype), "bfloat16")
        assert got.dtype == jnp.float32 and got.shape == shape
    assert round_to(jnp.ones(3, dtype), "float8_e5m2").dtype == jnp.float32


@pytest.mark.parametrize("name", DTYPES)
def test_narrow_inputs_are_widened_exactly(name):
    values = values_of(name)
    got = rounded(values.astype(np.float32).astype(DTYPES[name]), "float32")
    np.testing.assert_array_equal(got, values.astype(np.float32))
    twice = rounded(values.astype(np.float32).astype(DTYPES[name]), "e4m2")
    np.testing.assert_array_equal(twice, rounded(values.astype(np.float32), "e4m2"))


def test_python_numbers_and_lists():
    assert float(round_to(1.0003, "float16")) == 1.0
    assert round_to([1.0003, 2.0], "float16").tolist() == [1.0, 2.0]


def test_numpy_float64_is_rounded_once():
    """1 + 2^-11 + 2^-40 lies above a tie that float32 would round it onto."""
    x = np.array([1 + 2.0**-11 + 2.0**-40, 65519.99999999, 2.0**-25 + 2.0**-60, -1e300, 1e-300])
    assert not jax.config.jax_enable_x64
    got = round_to(x, "float16")
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.float32([1 + 2.0**-10, 65504, 2.0**-24, -np.inf, 0]))
    assert rounded(x[0].astype(np.float32), "float16") == 1.0
    assert float(round_to(x[0], "float16")) == 1 + 2.0**-10  # a NumPy scalar
    assert round_to(x[:1], "float32").tolist() == [float(np.float32(x[0]))]


def test_numpy_float64_to_what_float32_cannot_hold():
    for x in (1 + 2.0**-40, 1e300):
        with pytest.raises(TypeError, match="float32 cannot hold the result"):
            round_to(np.array([x]), "float64")
    assert round_to(np.array([1.5]), "float64").tolist() == [1.5]


def test_numpy_float64_constants_under_transformations():
    constant = np.array([1 + 2.0**-11 + 2.0**-40])
    for wrap in (jax.jit, jax.vmap):
        got = wrap(lambda x: x + round_to(constant, "float16"))(jnp.zeros((1,), jnp.float32))
        assert got.ravel().tolist() == [1 + 2.0**-10]


@pytest.mark.parametrize("name", ["e9m10", "e11m3:sat", "e8m30", "float64:rz", "e9m22"])
def test_formats_that_float32_storage_cannot_hold(name):
    """An error, or at least never a number that is not the nearest; float64 storage has room."""
    x = every_exponent()
    x = x[np.isfinite(x)]
    try:
        got = rounded(x, name)
    except (TypeError, ValueError):
        pass
    else:
        with jax.enable_x64(True):
            wide = rounded(x.astype(np.float64), name)
        assert_same(got, wide.astype(np.float32), x)
    with jax.enable_x64(True):
        wide = rounded(x[::97].astype(np.float64), name)
    exact = [exactly(float(value), format_of(name)) for value in x[::97]]
    assert wide.tolist() == [float(value) for value in exact]


@pytest.mark.parametrize("x", [1, True, 1j, np.arange(3), np.array(["1.0"])])
def test_what_is_not_floating_point(x):
    with pytest.raises(TypeError):
        round_to(x, "float16")


def test_unknown_format_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        round_to(1.0, "flaot16")


def test_no_config_changes():
    before = dict(jax.config.values)
    round_to(np.array([1.1]), "float16")
    assert dict(jax.config.values) == before
    assert jnp.asarray(np.array([1.1])).dtype == jnp.float32


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "fp22", "float16:odd", "float8_e4m3fn:ftz:sat"])
def test_gradients_pass_straight_through(name):
    def loss(x):
        return jnp.sum(jnp.sin(round_to(x, name)))

    x = jnp.float32([0.1, -0.3, 1e-9, 2.0])
    expected = np.cos(rounded(x, name))
    for transform in (jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))):
        np.testing.assert_allclose(transform(x), expected, rtol=1e-6)
    each = jax.jit(jax.vmap(jax.grad(loss)))(x[:, None])[:, 0]
    np.testing.assert_allclose(each, expected, rtol=1e-6)


def test_forward_and_second_derivatives():
    x = jnp.float32([0.1, -0.3])
    _, tangent = jax.jvp(lambda x: round_to(x, "float16"), (x,), (jnp.full_like(x, 3.0),))
    assert tangent.tolist() == [3.0] * 2
    second = jax.hessian(lambda x: jnp.sum(round_to(x, "float16") ** 2))(x)
    np.testing.assert_array_equal(second, 2 * np.eye(2))


def test_gradients_with_traced_formats_and_bits():
    x = jnp.ones((2, 3), jnp.float32) / 3
    lanes = Format(*(jnp.array(f) for f in zip(FLOAT16, BFLOAT16, strict=True)))
    gradient = jax.jit(jax.grad(lambda x, f: 2 * round_to(x, f).sum()))(x, lanes)
    assert (gradient == 2).all()
    mapped = jax.jit(jax.vmap(jax.grad(lambda x, f: round_to(x, f).sum())))(x, lanes)
    assert (mapped == 1).all()
    bits = jax.random.bits(jax.random.key(0), x.shape)
    drawn = jax.jit(jax.grad(lambda x: round_to(x, "float16:sr", bits).sum()))(x)
    assert (drawn == 1).all()
    with jax.enable_x64(True):
        wide = jax.jit(jax.grad(lambda x: round_to(x, "float16").sum()))(jnp.ones(3, "float64"))
        assert wide.dtype == np.float64 and wide.tolist() == [1.0] * 3


# --- what compilers and storage do to it ---------------------------------------------------------


def test_reduce_precision_flushes_subnormals_and_round_to_does_not():
    halves = np.arange(1, 2**10, dtype=np.uint16).view(np.float16).astype(np.float32)
    flushed = np.asarray(jax.lax.reduce_precision(halves, exponent_bits=5, mantissa_bits=10))
    assert not flushed.any()  # when this fails, reduce_precision has been mended
    np.testing.assert_array_equal(rounded(halves, "float16"), halves)


@pytest.mark.isa
def test_the_hosts_own_conversion_equals_round_to():
    """round_to_half keeps subnormals, signs, infinities and NaN, as round_to does."""
    run = jax.jit(round_to_half)
    for x in (neighbourhoods(np.float32), every_exponent()):
        expected = rounded(x, "float16")
        assert_same(np.asarray(run(x, np.int32(11))), expected, x)
        lanes = np.asarray(run(np.stack([x, x]), np.array([11, 11], np.int32)))
        assert_same(lanes[1], expected, x)
    gradient = jax.jit(jax.grad(lambda x, p: 3 * round_to_half(x, p).sum()))
    assert gradient(jnp.ones(4, jnp.float32), jnp.int32(11)).tolist() == [3.0] * 4


@pytest.mark.isa
def test_what_stands_around_unrounded_is_never_fused():
    """Product and sum each round to float32, on hosts with a fused multiply-add too."""
    x, y, z = np.random.default_rng(7).uniform(-2, 2, (3, 100_000)).astype(np.float32)
    run = jax.jit(lambda x, y, z, p: unrounded(x * y, p) + z)
    assert_same(np.asarray(run(x, y, z, np.int32(24))), x * y + z, x)
    exact = x.astype(np.float64) * y + z
    assert np.mean(exact.astype(np.float32) != x * y + z) > 0.1  # what a fused one would give
    special = np.concatenate([every_exponent(), neighbourhoods(np.float32)])
    assert_same(np.asarray(jax.jit(unrounded)(special, np.int32(24))), special, special)
    with jax.enable_x64(True):
        wide = neighbourhoods(np.float64)
        assert_same(np.asarray(jax.jit(unrounded)(wide, np.int32(53))), wide, wide)
    gradient = jax.jit(jax.grad(lambda x, p: 3 * unrounded(x, p).sum()))
    assert gradient(jnp.ones(4, jnp.float32), jnp.int32(24)).tolist() == [3.0] * 4


@pytest.mark.isa
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("float16", "bfloat16") for how in ("static", "traced")]
    + [("float16", "host")],
)
def test_no_rounding_of_a_jitted_chain_is_dropped(name, how):
    """Each step of a compiled chain equals the narrow dtype's own arithmetic, bit for bit."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(4)
    a, b, c, d = rng.uniform(0.5, 2.0, (4, 20_000)).astype(dtype)
    expected = a
    for _ in range(4):
        expected = np.sqrt(expected * b + c) / d + a
        assert expected.dtype == dtype

    def chain(a, b, c, d, format):
        def r(x):
            if how == "host":
                return round_to_half(x, format.precision)
            return round_to(x, format if how == "traced" else name)

        x = a
        for _ in range(4):
            x = r(r(r(jnp.sqrt(r(r(x * b) + c))) / d) + a)
        return x

    expected = expected.astype(np.float32)
    wide = [x.astype(np.float32) for x in (a, b, c, d)]
    got = np.asarray(jax.jit(chain)(*wide, format_of(name)))
    assert_same(got, expected, wide[0])


def test_a_compiled_sum_of_small_terms_stands_still():
    """1 + 2^-12 is 1 in half precision, however often; without its roundings it would be 1.25."""

    def unrolled(x):
        for _ in range(64):
            x = round_to(x + 2.0**-12, "float16")
        return x

    def looped(x):
        return jax.lax.fori_loop(0, 1024, lambda _, x: round_to(x + 2.0**-12, "float16"), x)

    one = jnp.ones(3, jnp.float32)
    assert jax.jit(unrolled)(one).tolist() == jax.jit(looped)(one).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("precision", "fraction"), [(14, 5e-4), (16, 2e-3), (19, 2e-2), (8, 0), (11, 0)]
)
def test_double_rounding_of_products_in_float32_storage(precision, fraction):
    """A product of two `precision`-bit numbers, rounded to float32 and then to precision, against
    its one rounding from float64, which holds it exactly."""
    format = Format(precision, -126, 127)
    significands = np.arange(2 ** (precision - 1), 2**precision) / 2 ** (precision - 1)
    if precision <= 11:
        a, b = (x.ravel() for x in np.meshgrid(significands, significands))
    else:
        a, b = np.random.default_rng(5).choice(significands, (2, 2**20))
    narrow = [np.float32(x) for x in (a, b)]
    got = np.asarray(jax.jit(lambda a, b: round_to(a * b, format))(*narrow)).astype(np.float64)
    expected = rounded(a * b, format).astype(np.float64)
    differ = got != expected
    if fraction == 0:
        assert not differ.any()
    else:
        assert fraction / 2 < differ.mean() < fraction * 2
        ulp = np.where(expected >= 2, 2.0, 1.0) * 2.0 ** (1 - precision)
        assert (np.abs(got - expected) <= ulp).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn"])
def test_sums_quotients_and_roots_in_float32_storage_are_exact(name):
    """Up to 11 bits, one operation in float32 and a rounding are one rounding."""
    values = values_of(name)
    values = values[(values > 2.0**-5) & (values < 2.0**8)]
    rng = np.random.default_rng(6)
    a, b = rng.choice(values, (2, 2**19))
    wide = [np.float32(x) for x in (a, b)]

    @jax.jit
    def operate(a, b):
        return [round_to(x, name) for x in (a + b, a - b, a / b, jnp.sqrt(a))]

    for got, exact in zip(operate(*wide), (a + b, a - b, a / b, np.sqrt(a)), strict=True):
        assert_same(np.asarray(got), rounded(exact, name), exact)


def test_the_package_exports_it():
    assert jaxattn.round_to is round_to
    assert set(DTYPES) <= set(FORMATS)
