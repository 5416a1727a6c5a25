"""ggml's CPU attention of one query row, step by step in plain NumPy: a second reading of the
source, not jaxattn.

ggml-org/ggml at d99724f2, src/ggml-cpu: ops.cpp (ggml_compute_forward_flash_attn_ext_f16_one_chunk,
K and V in float16), vec.cpp (ggml_vec_dot_f16), vec.h (ggml_vec_scale_f16, ggml_vec_mad_f16,
ggml_vec_scale_f32) and simd-mappings.h (GGML_F16_VEC_FMA and _REDUCE). No mask, sinks, softcap.

variant   a register holds   lanes of q·k, and o on its way   V's weight, and the factor of o
"f16c"    8 float32          float32                          float32
"neon"    8 half             half                             half

Values are kept in float64 and rounded where the kernel computes or stores in less.
"""

import numpy as np

VARIANTS = ("f16c", "neon")
REGISTERS, LANES = 4, 8  # of a step: GGML_F16_ARR and GGML_F16_EPR
STEP = REGISTERS * LANES


def walk(query, key, value, *, scale, variant, exact=False):
    """Attention of query [T, H] over key [S, H], value [S, D], one row and one key at a time.

    exact: sums inside q·k and p·v in float64 where the kernel has them in float32, and each
           exponential rounded correctly; otherwise in float32 as the kernel
    Returns float64 arrays of the values as stored: s [T, S], m [T], l [T], o [T, D] (half) after
    the last key, output [T, D].
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {VARIANTS}")
    wide = unrounded if exact else single
    q, k, v = (half(array) for array in (query, key, value))
    rows = [row(one, k, v, single(scale), variant, wide) for one in q]
    return {name: np.array([one[i] for one in rows]) for i, name in enumerate("smlo")} | {
        "output": np.array([one[4] for one in rows])
    }


def row(q, k, v, scale, variant, wide):
    m, l = -np.inf, 0.0
    o = np.zeros(v.shape[1])
    scores = []
    for one_key, one_value in zip(k, v, strict=True):
        s = single(dot(one_key, q, variant, wide) * scale)
        m_prev, factor, p = m, 1.0, 1.0
        if s > m:
            m = s
            factor = exponential(single(m_prev - m), wide)
            o = half(wide(o * lanes_of(factor, len(o), variant)))
        else:
            p = exponential(single(s - m), wide)
        o = multiply_add(o, one_value, p, variant, wide)
        l = single(single(l * factor) + p)
        scores.append(s)
    inverse = single(1.0 / l)
    return scores, m, l, o, single(o * inverse)


def dot(x, y, variant, wide):
    """ggml_vec_dot_f16: 32 running lanes, their tree, and what is left over in double.

    NEON has halves in its lanes and in the tree down to one register; the two halves of that are
    widened and go on in float32, as all of the tree does where registers are float32.
    """
    lane = half if variant == "neon" else wide
    whole = len(x) - len(x) % STEP
    sums = np.zeros((REGISTERS, LANES))
    for products in (x * y)[:whole].reshape(-1, REGISTERS, LANES):
        sums = lane(sums + products)  # fused: the product itself is not rounded
    while len(sums) > 1:
        middle = len(sums) // 2
        sums = lane(sums[:middle] + sums[middle:])
    four = wide(sums[0, :4] + sums[0, 4:])
    total = wide(wide(four[0] + four[1]) + wide(four[2] + four[3]))
    return wide(total + (x * y)[whole:].sum())


def multiply_add(o, value, p, variant, wide):
    """o + value·p, one fused step (ggml_vec_mad_f16). NEON's has no float32 on its way to half."""
    weight = lanes_of(p, len(o), variant)
    total = o + value * weight
    vectors = np.arange(len(o)) < len(o) - len(o) % STEP
    return half(np.where(vectors & (variant == "neon"), total, wide(total)))


def lanes_of(x, width, variant):
    """A float32 factor as the lanes of a vector take it; elements beyond the last whole step are
    left to scalar code, which keeps the float32."""
    vectors = np.arange(width) < width - width % STEP
    return np.where(vectors & (variant == "neon"), half(x), x)


def exponential(x, wide):
    """expf of a float32 x."""
    return single(np.exp(x)) if wide is unrounded else float(np.exp(np.float32(x)))


def half(x):
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float64)


def single(x):
    return np.asarray(x).astype(np.float32).astype(np.float64)


def unrounded(x):
    return x
