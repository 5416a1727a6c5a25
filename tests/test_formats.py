"""Formats by name: what a name means, what it refuses, and the way back from Format to name."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxattn
from jaxattn.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FLOOR,
    FORCE_ODD,
    FORMATS,
    NEAREST_EVEN,
    SATURATE,
    STOCHASTIC,
    TO_INFINITY,
    TO_NAN,
    TOWARD_ZERO,
    Format,
    check,
    format_of,
    holds,
    name_of,
)

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
ROUNDINGS = {
    "rn": NEAREST_EVEN,
    "rz": TOWARD_ZERO,
    "odd": FORCE_ODD,
    "floor": FLOOR,
    "sr": STOCHASTIC,
}


def largest(format):
    """The largest finite number of a format, exactly."""
    significand = 2**format.precision - 1 - format.reserved
    return significand * Fraction(2) ** (format.emax - format.precision + 1)


def smallest(format):
    """The smallest positive number of a format that keeps subnormals, exactly."""
    return Fraction(2) ** (format.emin - format.precision + 1)


@pytest.mark.parametrize("name", DTYPES)
def test_named_formats_are_their_dtypes(name):
    info, format = ml_dtypes.finfo(DTYPES[name]), format_of(name)
    assert format is FORMATS[name] or format == FORMATS[name]
    assert format.precision == info.nmant + 1
    assert largest(format) == Fraction(float(info.max))
    assert Fraction(2) ** format.emin == Fraction(float(info.smallest_normal))
    assert smallest(format) == Fraction(float(info.smallest_subnormal))
    assert format.rounding == NEAREST_EVEN and format.subnormals == 1


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("tf32", Format(11, -126, 127)),
        ("fp22", Format(14, -126, 127, rounding=TOWARD_ZERO)),
        ("e8m13:rz", format_of("fp22")),
        ("e8m13", format_of("fp22:rn")),
        ("e8m10", format_of("tf32")),
        ("e5m10", FLOAT16),
        ("e8m7", BFLOAT16),
        ("e8m23", FLOAT32),
        ("e11m52", FLOAT64),
        ("e5m2", FORMATS["float8_e5m2"]),
        # The generic name keeps infinity, as IEEE 754 would; the dtype's keeps one NaN only.
        ("e4m3", Format(4, -6, 7)),
        ("e4m3fn", Format(4, -6, 8, reserved=1, overflow=TO_NAN)),
        ("e2m1", Format(2, 0, 1)),
        ("e5m2:rz", Format(3, -14, 15, rounding=TOWARD_ZERO)),
        ("float16:odd", Format(11, -14, 15, rounding=FORCE_ODD)),
        ("e5m9:floor", Format(10, -14, 15, rounding=FLOOR)),
        ("half:ftz:sat", Format(11, -14, 15, subnormals=0, overflow=SATURATE)),
        ("bf16:sr:ftz", Format(8, -126, 127, subnormals=0, rounding=STOCHASTIC)),
        ("float8_e4m3fn:sat", Format(4, -6, 8, reserved=1, overflow=SATURATE)),
    ],
)
def test_what_names_mean(name, format):
    assert format_of(name) == format


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("half", "float16"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("fp32", "float32"),
        ("e4m3fn", "float8_e4m3fn"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
    ],
)
def test_aliases(alias, name):
    assert format_of(alias) == format_of(name)
    assert format_of(f"{alias}:rz") == format_of(f"{name}:rz")
    assert name_of(format_of(alias)) == name


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_scalar_types_and_formats_are_names_too(name):
    scalar_type = DTYPES[name]
    expected = format_of(name)
    assert format_of(scalar_type) == format_of(np.dtype(scalar_type)) == expected
    assert format_of(expected) == expected


def test_fields_come_back_as_python_ints():
    fields = format_of(Format(*(np.int32(field) for field in FLOAT16)))
    assert fields == FLOAT16 and all(type(field) is int for field in fields)
    hash(fields)


@pytest.mark.parametrize("suffix", ROUNDINGS)
def test_every_rounding_has_a_suffix(suffix):
    assert format_of(f"float16:{suffix}") == FLOAT16._replace(rounding=ROUNDINGS[suffix])
    assert format_of(f"fp22:{suffix}").rounding == ROUNDINGS[suffix]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("flaot16", "float16"),
        ("float15", "float16"),
        ("bfloat", "bfloat16"),
        ("float8_e4m3", "float8_e4m3fn"),
        ("fp8", "fp22"),
        ("float16 ", "float16"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"unknown format '{name}'; did you mean .*'{nearest}'"):
        format_of(name)


def test_a_name_with_nothing_near_lists_what_there_is():
    with pytest.raises(ValueError, match=r"known: .*bfloat16.*e<E>m<M>.*tf32"):
        format_of("posit")
    with pytest.raises(ValueError, match="unknown format suffix 'rzz'; did you mean 'rz'"):
        format_of("float16:rzz")


@pytest.mark.parametrize("name", ["e1m3", "e12m3", "e5m0", "e5m53", "e99m99", "e0m0"])
def test_generic_names_have_limits(name):
    with pytest.raises(ValueError, match="2 <= E <= 11 and 1 <= M <= 52"):
        format_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ":",
        ":rz",
        "float16:",
        "float16::rz",
        "float16\n",
        "FLOAT16",
        "e5",
        "e5m2m1",
        "e-5m2",
        "e5m+2",
        "e5.0m2",
        "e٥m٢",  # Arabic-Indic digits
        "e123m4",
        "float16\0",
        "float16:rz:",
        "../float16",
        "x" * 10_000,
        "int",
        "intx",
        "complex64",
    ],
)
def test_hostile_names(name):
    with pytest.raises(ValueError, match="unknown format"):
        format_of(name)


@pytest.mark.parametrize("name", ["float16:rz:sr", "float16:rn:rz", "e5m2:ftz:ftz", "half:sat:sat"])
def test_a_suffix_of_each_kind_at_most_once(name):
    with pytest.raises(ValueError, match="names two roundings or one suffix twice"):
        format_of(name)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, "datetime64[s]"])
def test_dtypes_that_are_no_floats(dtype):
    with pytest.raises(ValueError, match="unknown format"):
        format_of(np.dtype(dtype))


@pytest.mark.parametrize(
    "name", [5, 3.5, None, object(), ["float16", "bfloat16"], [], {}, (11, -14, 15)]
)
def test_what_is_neither_name_nor_dtype(name):
    with pytest.raises(TypeError, match="must be a name, a dtype or a Format"):
        format_of(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": 0},
        {"precision": 54},
        {"emin": 16},
        {"emin": -1023},
        {"emax": 1024},
        {"subnormals": 2},
        {"reserved": -1},
        {"reserved": 1024},
        {"overflow": 3},
        {"rounding": 5},
        {"rounding": -1},
    ],
)
def test_contradicting_fields(fields):
    (field,) = fields
    with pytest.raises(ValueError, match=rf"breaks the rule .*{field}"):
        format_of(FLOAT16._replace(**fields))


@pytest.mark.parametrize("field", ["eleven", None, [11, 8], float("nan")])
def test_fields_that_are_no_integers(field):
    with pytest.raises(TypeError, match="must be integers"):
        check(FLOAT16._replace(precision=field))


generic = st.builds("e{}m{}".format, st.integers(2, 11), st.integers(1, 52))
bases = st.sampled_from(sorted(FORMATS)) | generic
suffixes = st.tuples(
    st.sampled_from(["", ":ftz"]),
    st.sampled_from(["", *(f":{name}" for name in ROUNDINGS)]),
    st.sampled_from(["", ":sat"]),
).map("".join)
names = st.builds("{}{}".format, bases, suffixes)


@given(names)
def test_name_of_reads_back(name):
    format = format_of(name)
    assert format_of(name_of(format)) == format


@given(names)
def test_suffixes_change_what_they_say_and_commute(name):
    base, *rest = name.split(":")
    assert format_of(":".join([base, *reversed(rest)])) == format_of(name)
    plain, format = format_of(base), format_of(name)
    for field in Format._fields:
        changes = {"subnormals": "ftz" in rest, "overflow": "sat" in rest}.get(field, bool(rest))
        assert changes or getattr(plain, field) == getattr(format, field)


@given(bases)
def test_ieee_shape(name):
    """A generic format has emax = 1 - emin, infinity, and numbers that Fractions agree on."""
    if re.fullmatch(r"e\d+m\d+", name):
        format = format_of(name)
        assert format.emax == 1 - format.emin and format.overflow == TO_INFINITY
        assert 1 + int(np.log2(format.emax + 1)) == int(name[1:].split("m")[0])
        assert smallest(format) < Fraction(2) ** format.emin < largest(format)


@pytest.mark.parametrize(
    "format",
    [
        Format(11, -13, 15),
        Format(5, -14, 15, reserved=1),
        Format(11, -14, 15, overflow=TO_NAN),
        Format(1, -14, 15),
    ],
)
def test_formats_without_a_name(format):
    with pytest.raises(ValueError, match="has no name"):
        name_of(format)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("float32", "float16", True),
        ("float32", "bfloat16", True),
        ("float64", "float32", True),
        ("bfloat16", "float16", False),
        ("float16", "bfloat16", False),
        ("tf32", "float16", True),
        ("float16", "float8_e5m2", True),
        ("float16", "float8_e4m3fn", True),
        ("float16:ftz", "float16", False),
        ("float16:rz", "float16", True),
        ("float16:odd", "float16", False),
        ("float8_e4m3fn", "float8_e4m3fn", True),
        ("float8_e4m3fn", "e3m3", False),
        ("float32", "float64", False),
        ("e9m10", "float32", False),
    ],
)
def test_holds(wide, narrow, expected):
    assert holds(format_of(wide), format_of(narrow)) is expected


def test_the_package_exports_them():
    assert jaxattn.format_of is format_of and jaxattn.Format is Format


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 24])
def test_integers(bits):
    """int<N>: the integers of N bits without the lowest, ties to even, saturating, no fractions."""
    top = 2 ** (bits - 1) - 1
    format = format_of(f"int{bits}")
    assert name_of(format) == f"int{bits}" and jaxattn.formats.largest(format) == top
    x = np.float32([0.0, 0.4, 0.5, 0.6, 1.5, 2.5, top - 0.25, top + 0.75, 1e9, np.inf])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(jaxattn.round_to(x, format), np.clip(np.round(x), -top, top))
    assert np.isnan(jaxattn.round_to(np.float32(np.nan), format))


@pytest.mark.parametrize("name", ["int1", "int25", "int99"])
def test_integers_of_other_sizes_are_refused(name):
    with pytest.raises(ValueError, match="needs 2 <= N <= 24"):
        format_of(name)
