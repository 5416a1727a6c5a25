"""Pallas flash attention for TPU step by step in plain NumPy: a second reading, not jaxattn.

jax-ml/jax 0.10.2, jax/experimental/pallas/ops/tpu/flash_attention.py
(_flash_attention_kernel_single_batch): o is kept normalised, acc = acc·(α·l_prev / l) + (p·v) / l.
No bias, mask or segment ids; more keys than one block, which has a kernel of its own.

Not in the source: what the matrix unit does to float32 operands. Here they stay as they are.

Values are kept in float64 and rounded where the kernel computes or stores in less.
"""

import numpy as np

DTYPES = ("float32", "bfloat16")


def walk(query, key, value, *, scale, dtype, block_k=128, exact=False):
    """Attention of query [T, H] over key [S, H], value [S, D], one row and one block at a time.

    dtype: of q, k, v and the output
    exact: both matrix products, the row sum and the factors of o in float64; otherwise in float32
    Returns float64 arrays of the values as stored: m [T], l [T], o [T, D] in float32, output
    [T, D].
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {DTYPES}")
    if len(key) % block_k or len(key) == block_k:
        raise ValueError(f"{len(key)} keys are not several blocks of {block_k}")
    narrow = bfloat16 if dtype == "bfloat16" else single
    q, k, v = (narrow(array) for array in (query, key, value))
    rows = [row(one, k, v, single(scale), block_k, narrow, exact) for one in q]
    return {
        name: np.array([one[i] for one in rows]) for i, name in enumerate(("m", "l", "o", "output"))
    }


def row(q, k, v, scale, block_k, narrow, exact):
    wide = unrounded if exact else single
    m, l = -np.inf, 0.0
    o = np.zeros(v.shape[1])
    for start in range(0, len(k), block_k):
        keys, values = k[start : start + block_k], v[start : start + block_k]
        s = single(product(keys, q, exact) * scale)
        m_prev, m = m, max(m, s.max())
        p = exponential(single(s - m), exact)
        alpha = exponential(single(m_prev - m), exact)
        l_corr = wide(alpha * l)
        l = single(single(p.sum() if exact else p.astype(np.float32).sum()) + single(l_corr))
        inverse = single(1.0 / l)
        o = single(o * wide(l_corr * inverse))
        o = single(o + single(product(values.T, narrow(p), exact) * inverse))
    return m, l, o, narrow(o)


def product(a, b, exact):
    if exact:
        return a @ b
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)


def exponential(x, exact):
    return single(np.exp(x) if exact else np.exp(np.asarray(x, np.float32)))


def bfloat16(x):
    """To 8 bits of significand, ties to even. (No subnormals: nothing here is that small.)"""
    step = 2.0 ** (np.frexp(single(x))[1] - 8)
    return np.rint(single(x) / step) * step


def single(x):
    return np.asarray(x).astype(np.float32).astype(np.float64)


def unrounded(x):
    return x
