"""The Hexagon HMX kernel step by step in plain NumPy: a second reading of the source, not jaxattn.

ggml-org/ggml, src/ggml-hexagon/htp: hmx-flash-attn-ops.c at 9d47b21b and 7047417e for the FP16
kernel (fa_softmax_thread, fa_ml_update_and_build_d, hmx_fa_o_update_worker, fa_build_d_diag_inv_l,
hmx_fa_o_norm_worker); flash-attn-ops.c (fa_softmax_impl, fa_build_d_diag_inv_l) and hvx-exp.h at
d99724f2 for the kernel as merged by llama.cpp #25085. No mask, no sinks, no softcap.

variant            l                                    m, r      exponential
"fp16"             half: two roundings a block          half      e^x, then half
"fp16-qf16"        odd significands, both times         half      e^x
"fp16-qf16-spill"  a·l half, the sum floored to even    half      e^x
"exp2hf"           as "fp16"                            half      exp2_half, no clamp
"pr24389"          float32                              float32   e^x
"fp32"             float32                              m float32 (its values are halves), r half,
                                                        exp2_half clamped at -24
"""

import numpy as np

VARIANTS = ("fp16", "fp16-qf16", "fp16-qf16-spill", "exp2hf", "pr24389", "fp32")
LOWEST = -65504.0  # also what stands for minus infinity
LANES = 32  # float32 lanes of a 128-byte vector
LOG2E = np.float32(1.44269504)

# Horner coefficients of exp2_half after its first, as half words, and the first: a qf16 word
# 0x5082 read with its implied last bit.
FIRST = np.float16(1289 * 2.0**-23)
WORDS = (0x157D, 0x20ED, 0x2B1B, 0x33B0, 0x398C, 0x3C00)


def walk(query, key, value, *, scale, kv_block, variant, exact=False):
    """Attention of query [T, H] over key [S, H], value [S, D], one row and one block at a time.

    scale: multiplies the scores; kv_block: keys per block, the last may be shorter
    exact: contractions, sums and exponentials in float64, and only the kernel's named roundings;
           otherwise they run in float32
    Returns float64 arrays of the values as stored: s [T, S] and p [T, S] (half), m [T], l [T],
    o [T, D] after the last block, output [T, D]. s and m are in base 2 where the variant's
    exponential is. p is relative to the m of its own block.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {VARIANTS}")
    wide = np.float64 if exact else np.float32
    q, k, v = (half(array).astype(wide) for array in (query, key, value))
    factor = np.float32(scale) * LOG2E if variant in ("exp2hf", "fp32") else np.float32(scale)
    rows = [row(one, k, v, float(half(factor)), kv_block, variant, wide) for one in q]
    names = ("s", "p", "m", "l", "o", "output")
    return {
        name: np.asarray([result[i] for result in rows], np.float64) for i, name in enumerate(names)
    }


def row(q, k, v, factor, kv_block, variant, wide):
    m = -10000.0 if variant == "fp32" else LOWEST
    l = 0.0
    o = np.zeros(v.shape[1])
    scores, probs = [], []
    for start in range(0, len(k), kv_block):
        keys, values = k[start : start + kv_block], v[start : start + kv_block]
        s = half((keys @ q).astype(np.float64) * factor)  # one rounding, at the tile's store
        m_next = max(m, float(s.max()))
        p = exponential(half_difference(s, m_next), variant, wide)
        e = exponential(half_difference(np.float16(m), m_next), variant, wide)
        l = next_sum(l, float(e), row_sum(p, variant, wide), variant)
        carried = wide(o) * wide(e)  # the diagonal matrix D times O, in the same accumulator
        o = half(carried + p.astype(wide) @ values).astype(np.float64)
        m = m_next
        scores.append(s)
        probs.append(p)
    l_seen = float(half(l)) if variant.startswith("fp16") or variant == "exp2hf" else l
    inverse = half(wide(1.0) / wide(l_seen))
    output = half(wide(o) * wide(inverse))
    return np.concatenate(scores), np.concatenate(probs), m, l, o, output


def half(x):
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16)


def half_difference(a, b):
    """Half of a - b: both are halves, so the float64 difference is exact."""
    return half(a.astype(np.float64) - b)


def exponential(x, variant, wide):
    if variant in ("exp2hf", "fp32"):
        return exp2_half(x, clamp=variant == "fp32")
    # hvx_vec_exp_f32 is good to about 1e-7; arguments are cut at -88, which is 0 in half precision.
    return half(np.exp(np.maximum(x.astype(wide), wide(-88.0))))


def exp2_half(x, clamp=True):
    """2^x for halves x <= 0, by half-precision steps: hvx_vec_exp2_f16, or hvx_exp2_hf (no clamp).

    k is the nearest integer (the conversion truncates x - 1/2) and the polynomial runs on x - k.
    k is then added to the exponent field as an integer: a negative field gives 0, and a field of 0
    has no hidden bit, so that results in [2^-15, 2^-14) come out as 2·2^x - 2^-14 and smaller ones
    as 0. The qf16 steps of the source stand as half steps, rounded to nearest even.
    """
    x = half(x)
    if clamp:
        x = np.maximum(x, np.float16(-24.0))
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.clip(np.trunc(x - np.float16(0.5)), -32768, 32767).astype(np.int16)
        fraction = x - whole.astype(np.float16)
        y = FIRST * fraction
        for word in WORDS[:-1]:
            y = (y + half_word(word)) * fraction
        y = y + half_word(WORDS[-1])
    bits = np.atleast_1d(y).view(np.int16).reshape(np.shape(y)).astype(np.int32)
    field = ((bits >> 10) & 31) + whole
    word = np.where(field < 0, 0, bits + (whole.astype(np.int32) << 10)) & 0xFFFF
    return np.atleast_1d(word.astype(np.uint16)).view(np.float16).reshape(np.shape(y))


def half_word(word):
    return np.array(word, np.uint16).view(np.float16)


def row_sum(p, variant, wide):
    """The block's sum of the rounded P: even and odd elements, 32 running lanes, then a tree."""
    if wide is np.float64:
        total = p.astype(np.float64).sum()
    else:
        padded = np.zeros(-(-len(p) // (2 * LANES)) * 2 * LANES, np.float32)
        padded[: len(p)] = p
        lanes = np.zeros(LANES, np.float32)
        for vector in padded.reshape(-1, LANES, 2):
            lanes = lanes + (vector[:, 0] + vector[:, 1])
        for distance in (1, 2, 4, 8, 16):
            lanes = lanes + np.roll(lanes, -distance)
        total = lanes[0]
    return float(np.float32(total)) if variant == "pr24389" else float(half(total))


def next_sum(l, e, r, variant):
    if variant in ("pr24389", "fp32"):
        return float(np.float32(np.float32(l * e) + np.float32(r)))
    if variant == "fp16-qf16":
        return odd(odd(l * e) + r)
    scaled = float(half(l * e))
    return even_below(scaled + r) if variant == "fp16-qf16-spill" else float(half(scaled + r))


def odd(x):
    """x >= 0 cut to 11 bits of significand, the last of which is then set."""
    return (np.floor(x / step(x)) // 2 * 2 + 1) * step(x) if x > 0 else 0.0


def even_below(x):
    """The largest number <= x with an even significand of 11 bits."""
    return np.floor(x / step(x)) // 2 * 2 * step(x) if x > 0 else 0.0


def step(x):
    """The distance of halves around x, no smaller than that of the subnormals."""
    return 2.0 ** max(np.frexp(x)[1] - 11, -24)
