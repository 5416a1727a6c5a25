"""Number formats as records of integers, so that a format can be a traced value like any other.

A format with `precision` p (hidden bit included), exponents `emin`..`emax` and radix 2 holds the
numbers ±k·2^(e-p+1) with 2^(p-1) ≤ k < 2^p (and k < 2^(p-1) at e = emin, if it keeps subnormals).
Its unit roundoff is u = 2^-p.
"""

import difflib
import re
from typing import Any, NamedTuple

import numpy as np

NEAREST_EVEN, TOWARD_ZERO, FORCE_ODD, FLOOR, STOCHASTIC = range(5)
TO_INFINITY, SATURATE, TO_NAN = range(3)

_SUFFIXES = {
    "rn": {"rounding": NEAREST_EVEN},
    "rz": {"rounding": TOWARD_ZERO},
    "odd": {"rounding": FORCE_ODD},
    "floor": {"rounding": FLOOR},
    "sr": {"rounding": STOCHASTIC},
    "ftz": {"subnormals": 0},
    "sat": {"overflow": SATURATE},
}


class Format(NamedTuple):
    """A binary floating-point format and its rounding; every field an integer, static or traced.

    precision:  bits of significand, the hidden one included (float32: 24)
    emin, emax: exponents of the smallest normal and of the largest number
    subnormals: 1 keeps them, 0 flushes results below 2^emin to zero
    reserved:   significands taken from the top of the last binade (float8_e4m3fn: 1, its NaN)
    overflow:   TO_INFINITY, SATURATE or TO_NAN; TOWARD_ZERO, FORCE_ODD and FLOOR keep finite values
                finite whatever it says, as IEEE 754 has it for directed rounding toward zero
    rounding:   NEAREST_EVEN, TOWARD_ZERO, FORCE_ODD (last bit of the significand set to one),
                FLOOR (toward -inf), STOCHASTIC (random bits are passed to round_to)
    """

    precision: Any
    emin: Any
    emax: Any
    subnormals: Any = 1
    reserved: Any = 0
    overflow: Any = TO_INFINITY
    rounding: Any = NEAREST_EVEN


FLOAT64 = Format(53, -1022, 1023)
FLOAT32 = Format(24, -126, 127)
FLOAT16 = Format(11, -14, 15)
BFLOAT16 = Format(8, -126, 127)

FORMATS: dict[str, Format] = {
    "float64": FLOAT64,
    "float32": FLOAT32,
    "tf32": Format(11, -126, 127),
    "bfloat16": BFLOAT16,
    "float16": FLOAT16,
    # The accumulator of FP8 matrix instructions on Hopper and Ada: 1 + 8 + 13 bits, low bits
    # dropped (SageAttention2, arXiv 2411.10958, section 3.4).
    "fp22": Format(14, -126, 127, rounding=TOWARD_ZERO),
    "float8_e4m3fn": Format(4, -6, 8, reserved=1, overflow=TO_NAN),
    "float8_e5m2": Format(3, -14, 15),
}
_ALIASES = {"float8_e4m3fn": ("e4m3fn", "fp8_e4m3"), "float8_e5m2": ("fp8_e5m2",)}
_ALIASES |= {"float16": ("half", "fp16"), "bfloat16": ("bf16",), "float32": ("fp32",)}
_BY_NAME = FORMATS | {alias: FORMATS[name] for name, many in _ALIASES.items() for alias in many}


def unknown(kind: str, name: object, known: Any, listed: str | None = None) -> ValueError:
    """The error for a name that is not known, with the nearest that are.

    listed: the command that lists those that are, where they are too many for a line
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    all_of_them = f"`{listed}` lists them" if listed else f"known: {', '.join(known)}"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else all_of_them
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def _generic(name: str) -> Format | None:
    if match := re.fullmatch(r"int([0-9]{1,2})", name):
        bits = int(match[1])
        if not 2 <= bits <= 24:
            raise ValueError(f"format {name!r}: int<N> needs 2 <= N <= 24")
        # All of one binade and what lies below it: equal steps of 1, as far on either side.
        return Format(bits - 1, bits - 2, bits - 2, overflow=SATURATE)
    match = re.fullmatch(r"e([0-9]{1,2})m([0-9]{1,2})", name)
    if match is None:
        return None
    exponent, mantissa = int(match[1]), int(match[2])
    if not (2 <= exponent <= 11 and 1 <= mantissa <= 52):
        raise ValueError(f"format {name!r}: e<E>m<M> needs 2 <= E <= 11 and 1 <= M <= 52")
    emax = 2 ** (exponent - 1) - 1
    return Format(mantissa + 1, 1 - emax, emax)


def check(format: Format) -> Format:
    """The same static format, its fields as Python ints; ValueError where they contradict."""
    try:
        fields = Format(*(int(field) for field in format))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a Format's fields must be integers, got {format}") from error
    p, emin, emax, subnormals, reserved, overflow, rounding = fields
    rules = (
        (1 <= p <= 53, "1 <= precision <= 53"),
        (-1022 <= emin <= emax <= 1023, "-1022 <= emin <= emax <= 1023"),
        (subnormals in (0, 1), "subnormals is 0 or 1"),
        (0 <= reserved < 2 ** (p - 1), "0 <= reserved < 2^(precision - 1)"),
        (overflow in range(3), "overflow is TO_INFINITY, SATURATE or TO_NAN"),
        (rounding in range(5), "rounding is one of the five modes"),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"format {tuple(fields)} breaks the rule {rule}")
    return fields


def _dtype_name(dtype: Any) -> str:
    try:
        if isinstance(dtype, (type, np.dtype)) or hasattr(dtype, "dtype"):
            return np.dtype(dtype).name
    except TypeError:
        pass
    raise TypeError(f"format must be a name, a dtype or a Format, got {dtype!r}")


def format_of(name: Any) -> Format:
    """The Format that `name` stands for.

    name: a Format; a name of FORMATS; `e<E>m<M>` (E exponent bits, M stored significand bits, to
    nearest even, with subnormals and infinity); `int<N>` (N-bit integers without the lowest, which
    saturate); any of them with suffixes after colons: `:rn`,
    `:rz`, `:odd`, `:floor`, `:sr` (rounding), `:ftz` (flush subnormals), `:sat` (saturate); or a
    floating-point dtype. Raises ValueError for an unknown name, TypeError for another kind.
    """
    if isinstance(name, Format):
        return check(name)
    if not isinstance(name, str):
        name = _dtype_name(name)
        if name not in FORMATS:  # int8, a name of ours, is a dtype of integers too
            raise unknown("format", name, FORMATS)
    base, *suffixes = name.split(":")
    format = _BY_NAME.get(base) or _generic(base)
    if format is None:
        raise unknown("format", base, [*_BY_NAME, "e<E>m<M>", "int<N>"])
    changed: set[str] = set()
    for suffix in suffixes:
        if suffix not in _SUFFIXES:
            raise unknown("format suffix", suffix, _SUFFIXES)
        if changed & set(_SUFFIXES[suffix]):
            raise ValueError(f"format {name!r} names two roundings or one suffix twice")
        changed |= set(_SUFFIXES[suffix])
        format = format._replace(**_SUFFIXES[suffix])
    return check(format)


def name_of(format: Format) -> str:
    """The shortest name that format_of reads back as `format`; ValueError if there is none."""
    format = check(format)
    for name, known in FORMATS.items():
        if known == format:
            return name
    exponent = (format.emax + 1).bit_length()
    bases = (*FORMATS, f"e{exponent}m{format.precision - 1}", f"int{format.precision + 1}")
    codes = [""] + [f":{suffix}" for suffix in ("rn", "rz", "odd", "floor", "sr")]
    for base in bases:
        for rounding in codes:
            for flush in ("", ":ftz"):
                for saturate in ("", ":sat"):
                    name = base + rounding + flush + saturate
                    try:
                        if format_of(name) == format:
                            return name
                    except ValueError:
                        break
    raise ValueError(f"{format} has no name; build formats with format_of")


def largest(format: Format) -> float:
    """The largest finite number of a static format."""
    return (2.0 - (1 + format.reserved) * 2.0 ** (1 - format.precision)) * 2.0**format.emax


def holds(wide: Format, narrow: Format) -> bool:
    """Whether rounding a number of `narrow` to `wide` returns it."""
    return (
        wide.subnormals >= narrow.subnormals
        and wide.rounding != FORCE_ODD
        and (wide == narrow or (wide.reserved == 0 and wide.overflow == TO_INFINITY))
        and wide.precision >= narrow.precision
        and wide.emax >= narrow.emax
        and wide.emin - wide.precision <= narrow.emin - narrow.precision
    )
