"""Functions that ggml's Hexagon backend computes in half precision, as tables over all 2^16 halves.

A table costs a lookup where the steps would cost a dozen roundings. The qfloat16 steps of the
source stand as IEEE half steps to nearest even here; on v79 they are un-normalised and up to seven
times less accurate far from 0, by QEMU's model (quic/qemu, target/hexagon/mmvec/mmvec_qfloat.c).
"""

import functools

import jax
import numpy as np

from jaxattn.formats import FLOAT16
from jaxattn.rounding import round_to_half

LOWEST = -65504.0


def _half(x: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(round_to_half(x.astype(np.float32), FLOAT16.precision))


def _words(*words: int) -> np.ndarray:
    return np.array(words, np.uint16).view(np.float16).astype(np.float32)


# Horner coefficients of 2^x on [-1/2, 1/2] from x^6 down: the first a qfloat16 word, the others the
# halves that the source splats. hvx_exp2_hf in ggml-org/ggml at 9d47b21b,
# src/ggml-hexagon/htp/hmx-flash-attn-ops.c; hvx_vec_exp2_f16 at d99724f2, htp/hvx-exp.h.
_EXP2_FIRST = np.float32((2 * 644 + 1) * 2.0 ** (2 - 15 - 10))
_EXP2_REST = _words(0x157D, 0x20ED, 0x2B1B, 0x33B0, 0x398C, 0x3C00)


def _exp2(x: np.ndarray) -> np.ndarray:
    # The conversion to an integer truncates, so k is the nearest one.
    k = np.trunc(_half(x - np.float32(0.5)))
    fraction = _half(x - k)
    y = _half(_EXP2_FIRST * fraction)
    for coefficient in _EXP2_REST[:-1]:
        y = _half(_half(y + coefficient) * fraction)
    y = _half(y + _EXP2_REST[-1])
    # k is added to the exponent field as an integer: no subnormals, a field of 0 loses the hidden
    # bit, and a negative one gives 0 (as does one past the top, which a softmax cannot reach).
    significand = y.astype(np.float16).view(np.int16).astype(np.int32)
    field = (significand >> 10) + k.astype(np.int32)
    word = significand + (k.astype(np.int32) << 10)
    return _words(*np.where((field < 0) | (field > 30), 0, word).astype(np.uint16))


def _exp2_clamped(x: np.ndarray) -> np.ndarray:
    return _exp2(np.maximum(x, np.float32(-24.0)))


# A line and three Newton-like steps in 16-bit integers for 1/x on [1, 2): one row per quarter.
# hvx_vec_inverse_f16, htp/hvx-inverse.h at d99724f2.
_INVERSE_START = np.array([-10589, -4493, -2348, -1306])
_INVERSE_STEPS = (
    (1, np.array([31252, 22793, 16481, 11849])),
    (-1, np.array([32706, 30635, 27505, 24054])),
    (1, np.array([32769, 32590, 32066, 31205])),
)


def _inverse(x: np.ndarray) -> np.ndarray:
    """1/x for normal halves x >= 1, its last bit truncated."""
    word = x.astype(np.float32).view(np.int32)
    fraction = ((word >> 13) & 0x3FF) << 6
    quarter = fraction >> 14
    p = _INVERSE_START[quarter]
    for sign, row in _INVERSE_STEPS:
        p = np.clip((p * fraction + sign * (row[quarter] << 15)) >> 16, -(2**15), 2**15 - 1)
    zeros = 16 - np.frexp(p.astype(np.float64))[1]
    mantissa = ((p << zeros) >> 5) & 0x3FF
    field = 254 - (word >> 23) - (zeros - 1) - 127 + 15
    return _words(*((field << 10) | mantissa).astype(np.uint16))


def _tanh(x: np.ndarray) -> np.ndarray:
    """2·sigmoid(2x) - 1: hvx_vec_tanh_f16 and hvx_vec_fast_sigmoid_f16, htp/hvx-sigmoid.h."""
    twice = _half(2 * x)
    log2e = _half(np.array(-1.44269504))
    e = _exp2_clamped(_half(np.abs(twice) * log2e))
    s = _inverse(_half(1 + e))
    s = np.where(twice < 0, _half(1 - s), s)
    return _half(_half(2 * s) - 1)


_FUNCTIONS = {"exp2": _exp2, "exp2_clamped": _exp2_clamped, "tanh": _tanh}


@functools.cache
def table(name: str) -> np.ndarray:
    """float32 [65536], indexed by the bits of a half; infinities count as largest halves."""
    argument = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.clip(np.nan_to_num(argument), LOWEST, -LOWEST).astype(np.float32)
    return np.where(np.isnan(argument), argument, _FUNCTIONS[name](finite))
