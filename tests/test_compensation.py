"""l with a correction term, and l and o flushed into wide sums: against plain NumPy walks."""

import numpy as np
import pytest
from test_lanes import assert_alone_equals_together

from jaxattn import dot_product_attention, error_curves
from jaxattn.recipe import Recipe

HALF = np.float16
S, W, H, D = 4096, 16, 32, 8


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 3, 1, H), np.float32)
    key, value = (rng.standard_normal((1, S, 1, d), np.float32) for d in (H, D))
    return query, key, value + np.float32(1)


def walk(arrays, flush_every=None, kahan=False):
    """[T, D]: row sums, l, o and a in half, all else in float64, one block after another."""
    query, key, value = (x[0, :, 0].astype(np.float64) for x in arrays)
    wide_l, wide_o, wide_m = np.zeros(len(query)), np.zeros((len(query), D)), None
    l, o = np.zeros(len(query), HALF), np.zeros((len(query), D), HALF)
    surplus, m, since = np.zeros_like(l), np.full(len(query), -np.inf), 0
    scores = query @ key.T / np.sqrt(H)
    for start in range(0, S, W):
        s, v = scores[:, start : start + W], value[start : start + W]
        m_prev, m = m, np.maximum(m, s.max(-1))
        p, a = np.exp(s - m[:, None]), np.exp(m_prev - m).astype(HALF)
        r = p.sum(-1).astype(HALF)
        l = a * l
        if kahan:
            surplus = a * surplus
            added = r - surplus
            total = l + added
            surplus = (total - l) - added
            l = total
        else:
            l = l + r
        o = (a.astype(float)[:, None] * o + p @ v).astype(HALF)
        since += 1
        if since == flush_every:
            lead = 0.0 if wide_m is None else np.exp(wide_m - m)
            wide_l = wide_l * lead + (l.astype(float) - surplus)
            wide_o = wide_o * np.expand_dims(lead, -1) + o
            wide_m, since = m, 0
            l, o, surplus = (np.zeros_like(x) for x in (l, o, surplus))
    lead = 0.0 if wide_m is None else np.exp(wide_m - m)
    whole = wide_l * lead + (l.astype(float) - surplus)
    return (wide_o * np.expand_dims(lead, -1) + o) / whole[:, None]


HALVES = Recipe(
    kv_block=W,
    normalise="divide",
    **dict.fromkeys(("row_sum", "rescale", "rescaled_sum", "running_sum", "output"), "float16"),
)
MEANS = {
    "kahan": {"summation": "kahan"},
    "flushed": {"flush_every": 7},
    "flushed at the last block": {"flush_every": 128},
    "both": {"flush_every": 7, "summation": "kahan"},
}


@pytest.mark.parametrize("means", MEANS)
def test_an_error_vector_is_that_of_a_walk(arrays, means):
    changes = MEANS[means]
    got = np.asarray(dot_product_attention(*arrays, recipe=HALVES.replace(**changes)))[0, :, 0]
    exact = np.asarray(dot_product_attention(*arrays, recipe=Recipe(kv_block=W)))[0, :, 0]
    want = walk(arrays, changes.get("flush_every"), "summation" in changes)
    error, wanted = (got - exact).ravel(), (want - exact).ravel()
    assert np.corrcoef(error, wanted)[0, 1] > 0.99
    assert np.linalg.norm(error - wanted) < 0.1 * np.linalg.norm(wanted)


def test_a_compensated_sum_stops_drifting(arrays):
    """Of l's own error, n·u becomes 2u (Higham 2002, section 4.3); and what l drops is not lost."""
    long = [np.tile(x, (1, 16, 1, 1)) if len(x[0]) == S else x for x in arrays]
    narrow = Recipe(kv_block=W, running_sum="bfloat16")
    both = [narrow, narrow.replace(summation="kahan")]
    curves = error_curves(*long, both, contexts=[16 * S], metrics=("bias_l",))
    plain, kahan = np.abs(curves.metrics["bias_l"][:, 0, 0, :, 0])
    assert (plain > 0.2).all() and (kahan < 2 * 2.0**-8).all()
    assert curves.stagnated[0].all() and not curves.stagnated[1].any()


def test_flushing_after_every_block_is_a_float32_sum_of_halves(arrays):
    flushed = HALVES.replace(flush_every=1, rescale="float32")
    wide = flushed.replace(flush_every=None, rescaled_sum="float32", running_sum="float32")
    wide = wide.replace(output="float32", rescaled_output="float32")
    nmse = (
        error_curves(*arrays, [HALVES, flushed, wide], contexts=[S], metrics=("nmse",))
        .metrics["nmse"][:, 0]
        .mean((1, 2, 3))
    )
    assert nmse[0] > 20 * nmse[1] and nmse[1] < 20 * nmse[2]


@pytest.mark.parametrize(
    "means", ["kahan", pytest.param("flushed", marks=pytest.mark.slow), "both"]
)
def test_a_member_equals_its_one_recipe_run(means):
    formats = ("float16", "bfloat16", "float32")
    base = Recipe(kv_block=16, rescaled_sum="float16", row_sum="float16", **MEANS[means])
    grid = [base.replace(running_sum=l, output=o) for l in formats for o in formats]
    assert_alone_equals_together(grid, (4,), 3)


def test_a_sink_at_the_end_meets_the_wide_sums():
    """An l of 70,000 overflows 16 bits, and the float32 sum that it is flushed into does not."""
    query, key = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 70_000, 1, 4), np.float32)
    halves = {"kv_block": 100, "running_sum": "float16", "sinks": "end"}
    recipe = Recipe(**halves, flush_every=16)
    sinks = np.array([np.log(70_000)], np.float32)
    out = dot_product_attention(query, key, key + 1, recipe=recipe, sinks=sinks)
    np.testing.assert_allclose(out, 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"flush_every": 2, "normalise": "blocks"}, "normalised at the end"),
        ({"summation": "kahan", "normalise": "before", "kv_block": "whole"}, "normalised at the"),
        ({"summation": "kahan", "running_sum": "float16:sr"}, "stochastic"),
        ({"flush_every": 0}, "positive"),
    ],
)
def test_what_does_not_go_together(fields, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**fields)
