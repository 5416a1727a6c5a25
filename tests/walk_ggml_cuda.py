"""ggml's CUDA mma kernel step by step in plain NumPy: a second reading of the source, not jaxattn.

ggml-org/ggml at d99724f2, src/ggml-cuda: fattn-mma-f16.cuh (flash_attn_ext_f16_process_tile and
_iter), fattn-common.cuh (FATTN_KQ_MAX_OFFSET, SOFTMAX_FTZ_THRESHOLD), mma.cuh (tile, mma,
get_half2), fattn.cu (which number of columns), CMakeLists.txt (-use_fast_math), as compiled for
Ampere and later and head dim 128. No mask, sinks, softcap, and no keys split over CUDA blocks.

Not in the source: the tensor core adds 16 products and the accumulator as if exactly and rounds
once, to nearest; ex2.approx is a correctly rounded exp2.

Values are kept in float64 and rounded where the kernel computes or stores in less.
"""

import numpy as np

# Query columns of a tile -> keys per block, the warps that share a block's keys, and the threads
# of a warp that share a column. A prompt fills 64 columns; one token of a model with few query
# heads per KV head is 8.
TILES = {64: (64, 1, 4), 32: (64, 2, 4), 16: (64, 4, 4), 8: (128, 4, 8)}
MMA_KEYS = 16  # of one tensor core instruction (8 on Turing)
LOWEST = -np.finfo(np.float32).max / 2
LOG2E = float(np.float32(1.4426950408889634))


def walk(query, key, value, *, scale, columns=64, exact=False):
    """Attention of query [T, H] over key [S, H], value [S, D], one row and one block at a time.

    exact: sums of q·k and of a block's P in float64, rounded once to float32, and each
           exponential rounded correctly; otherwise q·k in float32, the row sum by each thread on
           its own, and expf as -use_fast_math has it
    Returns float64 arrays of the values as stored: m [T], l [T], o [T, D] before it is divided,
    output [T, D].
    """
    q, k, v = (half(array) for array in (query, key, value))
    scaled = half(q * half(scale))
    rows = [row(one, k, v, columns, exact) for one in scaled]
    return {
        name: np.array([one[i] for one in rows]) for i, name in enumerate(("m", "l", "o", "output"))
    }


def row(q, k, v, columns, exact):
    _, warps, _ = TILES[columns]
    parts = [warp(q, k, v, number, columns, exact) for number in range(warps)]
    m, l, o = parts[0]
    if warps > 1:
        m = max(part[0] for part in parts)
        factors = [exponential(single(part[0] - m), exact) for part in parts]
        l = tree(single([factor * part[1] for factor, part in zip(factors, parts, strict=True)]))
        o = np.zeros_like(o)
        for factor, part in zip(factors, parts, strict=True):
            o = single(o + factor * part[2])
    return m, l, o, single(o / l)


def warp(q, k, v, number, columns, exact):
    """m, l and o over the keys of one warp: the number-th of every `warps` tiles of 16."""
    kv_block, warps, threads = TILES[columns]
    offset = single(single(3.0) * single(0.6931))
    m, o = LOWEST, np.zeros(v.shape[1])
    sums = np.zeros(1 if exact else threads)
    for start in range(0, len(k), kv_block):
        mine = np.arange(start, start + kv_block).reshape(-1, warps, MMA_KEYS)[:, number].ravel()
        live = mine < len(k)
        s = single(k[mine[live]] @ q) if exact else dots(k[mine[live]], q)
        m_next = max([m, *single(s + offset)])
        p = np.zeros(len(mine))  # what is no key weighs nothing
        p[live] = exponential(single(s - m_next), exact)
        added = single(p.sum(keepdims=True)) if exact else thread_sums(p, threads)

        drop = single(m - m_next)
        factor = exponential(drop, exact) if drop >= -20.0 else 0.0
        sums = single(single(factor * sums) + added)
        o = half(o * half(factor))
        values = np.zeros((len(mine), v.shape[1]))
        values[live] = v[mine[live]]
        for tile in range(0, len(mine), MMA_KEYS):
            sixteen = slice(tile, tile + MMA_KEYS)
            o = half(o + half(p[sixteen]) @ values[sixteen])
        m = m_next
    return m, tree(sums), o


def dots(k, q):
    """q·k in a float32 accumulator that takes 16 products at a time."""
    s = np.zeros(len(k))
    for start in range(0, len(q), 16):
        s = single(s + k[:, start : start + 16] @ q[start : start + 16])
    return s


def thread_sums(p, threads):
    """Each thread's float32 sum of the p that it holds: of every 8 keys one, or two neighbours."""
    sums = np.zeros(threads)
    for eight in p.reshape(-1, threads, 8 // threads):
        for one in eight.T:
            sums = single(sums + one)
    return sums


def tree(sums):
    """The float32 sum over threads or warps: __shfl_xor_sync from the largest distance down."""
    while len(sums) > 1:
        middle = len(sums) // 2
        sums = single(sums[:middle] + sums[middle:])
    return sums[0]


def exponential(x, exact):
    """expf; with -use_fast_math that is ex2.approx of the float32 product with log2(e)."""
    return single(np.exp(x) if exact else np.exp2(single(x * LOG2E)))


def half(x):
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float64)


def single(x):
    return np.asarray(x).astype(np.float32).astype(np.float64)
