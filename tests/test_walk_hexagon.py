"""The walk itself: near float64 attention as far as its roundings allow, exact where it must be."""

import numpy as np
import pytest
import walk_hexagon
from walk_hexagon import VARIANTS, exp2_half, walk

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


def attention(query, key, value, scale):
    q, k, v = (np.asarray(np.float16(array), np.float64) for array in (query, key, value))
    s = q @ k.T * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True), s


def draw(seed, rows=6, keys=1000, head_dim=64, value_dim=32, mean=0.0):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((rows, head_dim)), rng.standard_normal((keys, head_dim))
    return q, k, rng.standard_normal((keys, value_dim)) + mean


def spacing(x):
    """The distance of halves at x."""
    return np.abs(np.spacing(np.float16(x))).astype(np.float64)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_near_exact_attention(variant, exact):
    query, key, value = draw(0, mean=1.0)
    expected, s = attention(query, key, value, 0.125)
    got = walk(query, key, value, scale=0.125, kv_block=64, variant=variant, exact=exact)
    # 16 blocks, a handful of half roundings in each: a few u = 2^-11 in all, and up to one unit of
    # the ten-bit significand more for every spill.
    limit = 1.5e-2 if variant == "fp16-qf16-spill" else 4e-3
    np.testing.assert_allclose(got["output"], expected, rtol=limit, atol=limit)
    base = np.log2(np.e) if variant in ("exp2hf", "fp32") else 1.0
    np.testing.assert_allclose(got["s"], s * base, rtol=1e-3, atol=1e-3)
    assert got["s"].shape == got["p"].shape == (6, 1000)
    assert np.array_equal(got["m"], got["s"].max(-1))
    assert all(array.dtype == np.float64 for array in got.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_values_are_halves(variant):
    got = walk(*draw(1), scale=0.125, kv_block=128, variant=variant)
    names = ["s", "p", "m", "o", "output"] + ["l"] * variant.startswith("fp16")
    for name in names:
        assert np.array_equal(got[name], np.float16(got[name]).astype(np.float64)), name
    assert not np.array_equal(walk(*draw(1), scale=0.125, kv_block=128, variant="fp32")["l"] % 1, 0)


def test_one_block_equals_the_steps_by_hand():
    query, key, value = draw(2, rows=1, keys=64)
    got = walk(query, key, value, scale=0.1, kv_block=64, variant="fp16", exact=True)
    q, k, v = (np.float16(a).astype(np.float64) for a in (query, key, value))
    s = np.float16(q @ k.T * float(np.float16(0.1)))[0]
    p = np.float16(np.exp(np.float16(s - s.max()).astype(np.float64))).astype(np.float64)
    l, o = np.float16(p.sum()), np.float16(p @ v)
    output = np.float16(o.astype(np.float64) * float(np.float16(1.0 / float(l))))
    assert np.array_equal(got["p"][0], p)
    assert got["l"][0] == l
    assert np.array_equal(got["o"][0], o)
    assert np.array_equal(got["output"][0], output)


def test_float32_and_float64_differ_by_single_half_steps():
    """In the same block layout only ties and near ties round otherwise."""
    query, key, value = draw(3, rows=8, keys=4096)
    a, b = (
        walk(query, key, value, scale=0.125, kv_block=256, variant="fp16", exact=exact)
        for exact in (False, True)
    )
    for name in ("s", "p"):
        assert np.mean(a[name] != b[name]) < 0.005
    # float32 sums of products that cancel are off by more than a step of the smallest halves.
    assert np.all(np.abs(a["s"] - b["s"]) <= np.maximum(spacing(b["s"]), 1e-6))
    same = a["s"] == b["s"]
    assert np.all(np.abs(a["p"] - b["p"])[same] <= spacing(b["p"])[same])


def test_uniform_scores_count_keys():
    """Zero scores: every p is 1 and l counts, exactly up to 2,048 and in steps beyond."""
    query, key, value = np.zeros((1, 8)), np.zeros((4096, 8)), np.ones((4096, 8))
    counts = {"fp16": 4096.0, "exp2hf": 4096.0, "pr24389": 4096.0, "fp32": 4096.0}
    for variant, count in counts.items():
        got = walk(query, key, value, scale=1.0, kv_block=64, variant=variant)
        assert got["l"][0] == count and np.all(got["output"] == 1.0), variant
    stalled = walk(query, key, value, scale=1.0, kv_block=1, variant="fp16")
    assert stalled["l"][0] == stalled["o"][0, 0] == 2048.0
    assert walk(query, key, value, scale=1.0, kv_block=1, variant="fp32")["l"][0] == 4096.0
    spilled = walk(query, key, value, scale=1.0, kv_block=1, variant="fp16-qf16-spill")
    assert spilled["l"][0] == 1024.0


def test_sums_drift_as_their_formats_say():
    """l against the sum of the p that entered it: flooring loses, odd significands do not."""
    query, key, value = draw(4, rows=1, keys=8192, head_dim=16)
    order = np.argsort(-(key @ query[0]))  # the largest score first: p is relative to the final m
    drift = {}
    for variant in VARIANTS:
        got = walk(query, key[order], value, scale=0.25, kv_block=64, variant=variant)
        drift[variant] = got["l"][0] / got["p"][0].sum() - 1
    assert abs(drift["pr24389"]) < 1e-6
    assert abs(drift["fp32"]) < 2e-4
    assert abs(drift["fp16"]) < 5e-3 and abs(drift["fp16-qf16"]) < 1e-2
    assert -0.1 < drift["fp16-qf16-spill"] < -0.01


def test_m_rises_and_old_weights_shrink():
    key = np.linspace(-4.0, 4.0, 512)[:, None]
    value = np.concatenate([np.zeros((256, 1)), np.ones((256, 1))])
    expected, _ = attention(np.full((1, 1), 4.0), key, value, 1.0)
    for variant in VARIANTS:
        got = walk(np.full((1, 1), 4.0), key, value, scale=1.0, kv_block=64, variant=variant)
        np.testing.assert_allclose(got["output"], expected, rtol=1e-2)


def test_partial_last_block_is_a_block():
    query, key, value = draw(5, keys=100)
    for variant in VARIANTS:
        got = walk(query, key, value, scale=0.125, kv_block=64, variant=variant)
        expected, _ = attention(query, key, value, 0.125)
        np.testing.assert_allclose(got["output"], expected, rtol=4e-3, atol=4e-3)
        whole = walk(query, key[:64], value[:64], scale=0.125, kv_block=64, variant=variant)
        assert np.array_equal(got["s"][:, :64], whole["s"])
        assert np.array_equal(got["p"][:, :64], whole["p"])


@pytest.mark.parametrize("clamp", [True, False])
def test_exp2_half(clamp):
    x = np.unique(HALVES[np.isfinite(HALVES) & (HALVES <= 0)])
    y, exact = exp2_half(x, clamp).astype(np.float64), np.exp2(x.astype(np.float64))
    normal = exact >= 2.0**-14
    relative = y[normal] / exact[normal] - 1
    assert 7e-4 < np.abs(relative).max() < 8e-4
    assert abs(relative.mean()) < 2e-5
    whole = -np.arange(15)
    assert np.array_equal(exp2_half(np.float16(whole), clamp), np.exp2(whole.astype(np.float64)))
    # The exponent field of 0 has no hidden bit.
    floor = (exact < 2.0**-14) & (exact >= 2.0**-15)
    np.testing.assert_allclose(y[floor], 2 * exact[floor] - 2.0**-14, atol=2.0**-24)
    assert np.all(y[exact <= 2.0**-15] == 0)
    assert exp2_half(np.float16(-np.inf), clamp) == 0


def test_exp2_half_takes_any_shape():
    x = np.float16([[0.0, -1.0, -2.5], [-3.0, -14.5, -60.0]])
    assert exp2_half(x).shape == (2, 3)
    assert np.array_equal(exp2_half(x)[1], [exp2_half(one) for one in x[1]])


def test_odd_and_even_significands():
    rng = np.random.default_rng(6)
    x = np.exp(rng.uniform(-6, 10, 2000))
    step = 2.0 ** (np.floor(np.log2(x)) - 10)
    odds = np.array([walk_hexagon.odd(one) for one in x]) / step
    evens = np.array([walk_hexagon.even_below(one) for one in x]) / step
    assert np.all(odds % 2 == 1) and np.all(evens % 2 == 0)
    assert np.all(np.abs(odds - x / step) <= 1) and abs(np.mean(odds - x / step)) < 0.05
    assert np.all((x / step - evens >= 0) & (x / step - evens < 2))
    assert walk_hexagon.odd(0.0) == walk_hexagon.even_below(0.0) == 0.0


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown variant 'fp8'"):
        walk(*draw(7), scale=1.0, kv_block=64, variant="fp8")
