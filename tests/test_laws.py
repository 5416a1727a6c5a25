"""Laws of sums in narrow formats, seen in the kernels' own recurrences.

u = 2^-t is a format's unit roundoff: t = 11 for float16, 8 for bfloat16. c is what one KV block
adds to the running sum l; blocks hold 64 keys unless a test says otherwise.
"""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import accumulation, online_softmax
from jaxattn.lanes import random_keys, rounder, weave
from jaxattn.recipe import Recipe
from jaxattn.rounding import round_to
from jaxattn.scores import Queries

T = {"float16": 11, "bfloat16": 8}


def narrow_sum(format, **changes):
    """A recipe whose only rounding is that of l; biases are in base 2 and m starts at 0."""
    base = Recipe(exp="exp2", bias_factor=np.log(2), kv_block=64, initial_max=0.0)
    return base.replace(**{"running_sum": format, "rescaled_sum": "float32"} | changes)


@functools.partial(jax.jit, static_argnums=0)
def _walk(lanes, f, scores, value):
    R, w = scores.shape[1:]
    one = jnp.ones((1,), jnp.float32)
    queries = Queries(jnp.zeros((1, R, 1), jnp.float32), one, None)
    key, value = jnp.zeros((1, w, 1), jnp.float32), jnp.broadcast_to(value, (1, w, len(value)))
    valid = jnp.ones((1, w), bool)

    def body(carry, block):
        number, s = block
        random = random_keys(lanes, number, ())
        carry = online_softmax.step(
            lanes, f, queries, carry, key, value, valid, s[:, None], None, random
        )
        return carry, carry

    start = online_softmax.init(lanes, f, R, value.shape[-1], None)
    return jax.lax.scan(body, start, (jnp.arange(len(scores)), scores))[1]


def walk(recipe, scores, value=(1.0,)):
    """The carries of `step` after each block: scores [blocks, rows, keys], one value for all keys.

    Fields of the Carry are [blocks, rows] or [blocks, rows, values].
    """
    lanes, f = weave([recipe])
    carries = _walk(lanes, f, np.float32(scores), np.float32(value))
    return jax.tree.map(lambda x: np.asarray(x)[:, 0], carries)


@functools.partial(jax.jit, static_argnums=0)
def _sums(lanes, f, r, a):
    round = rounder(lanes, f)

    def body(l, block):
        a, r = (x[None] for x in block)
        l = accumulation.next_sum(round, l, a, r)
        return l, l[0]

    return jax.lax.scan(body, jnp.zeros((1, r.shape[1]), jnp.float32), (a, r))[1]


def sums(recipe, r, a=None):
    """l after each block, [blocks, rows], of given row sums r and rescale factors a (or all 1)."""
    lanes, f = weave([recipe])
    a = np.ones_like(r) if a is None else a
    return np.asarray(_sums(lanes, f, np.float32(r), np.float32(a)))


def constant(c, blocks):
    """Row sums [blocks, rows] of rows that add the same c at every block."""
    return np.broadcast_to(np.float32(c), (blocks, len(c)))


def even_scores(c, blocks, keys=64):
    """Scores in base 2, [blocks, rows, keys], whose block sums are c."""
    s = np.log2(np.asarray(c, np.float64) / keys)
    return np.broadcast_to(np.float32(s)[None, :, None], (blocks, len(c), keys))


# --- harmonic sums -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "term"), [("float16", 7.0859375, 513), ("bfloat16", 5.0625, 65)]
)
def test_harmonic_sum_stops(name, total, term):
    """1 + 1/2 + 1/3 + ... until nothing changes, as Nicholas Higham put it to low precision."""

    def add(s, k):
        s = round_to(s + round_to(1 / k, name), name)
        return s, s

    k = jnp.arange(1, 1001, dtype=jnp.float32)
    partial = np.asarray(jax.jit(lambda k: jax.lax.scan(add, jnp.zeros((), k.dtype), k)[1])(k))
    unchanged = 1 + np.flatnonzero(partial[1:] == partial[:-1])
    assert unchanged[0] + 1 == term  # the first term that is lost
    assert partial[term - 1] == partial[-1] == total


# --- stagnation ----------------------------------------------------------------------------------


def stagnation_point(c, t):
    """l* = 2^(t + K), K being log2 c for a power of two (a tie, to even), else its floor plus 1."""
    fraction, exponent = math.frexp(c)
    return 2.0 ** (t + exponent - (fraction == 0.5))


# format -> (c, l at the end, the block that reaches it)
STAGNATION = {
    "bfloat16": [(64.0, 16_384, 256), (57.5, 16_384, 261), (100.0, 32_768, 277)],
    "float16": [(16.0, 32_768, 2048), (1.0, 2048, 2048), (32.0, np.inf, 2048)],
}


@pytest.mark.parametrize("format", STAGNATION)
def test_running_sum_stagnates(format):
    """Published cases through whole steps of attention (m may lag a block's maximum by 2)."""
    c, ends, blocks = (np.array(column) for column in zip(*STAGNATION[format], strict=True))
    recipe = narrow_sum(format, row_sum=format, lazy_threshold=2.0)
    count = max(blocks) + 100
    carry = walk(recipe, even_scores(c, count))
    np.testing.assert_array_equal(carry.l[-1], ends)
    np.testing.assert_array_equal(np.argmax(carry.l == ends, axis=0) + 1, blocks)
    assert (carry.m == 0).all()
    for row in np.flatnonzero(np.isfinite(ends)):
        lost = carry.lost[:, row]
        assert lost[blocks[row] - 1] == 0 and (np.diff(lost[blocks[row] - 1 :]) > 0).all()
        # V is 1 and o is wide: outputs grow like N once l has stopped.
        output = carry.o[-1, row, 0] / ends[row]
        assert output == pytest.approx(count * c[row] / ends[row], rel=1e-5)


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_stagnation_of_any_weight(format):
    """fp16 stops after 2,048 to 4,096 blocks of net weight c, bf16 after 256 to 512."""
    t = T[format]
    rng = np.random.default_rng(0)
    c = np.concatenate([2.0 ** np.arange(-6, 5), rng.uniform(2.0**-6, 16.0, 200), [15.99, 8.01]])
    c = np.float32(c)
    l = sums(narrow_sum(format), constant(c, 2 ** (t + 1) + 2 ** (t - 3)))
    expected = [stagnation_point(float(x), t) for x in c]
    np.testing.assert_array_equal(l[-1], np.float32(expected))
    assert (2**t <= l[-1] / c).all() and (l[-1] / c < 2 ** (t + 1)).all()
    arrival = np.argmax(l == l[-1], axis=0) + 1
    assert (arrival >= 2**t * 0.7).all() and (np.diff(l, axis=0) >= 0).all()


def test_half_overflows_before_it_stagnates_above_16():
    c = np.float32([16.0, 16.01, 20.0, 31.9, 32.0, 64.0])
    l = sums(narrow_sum("float16"), constant(c, 4400))
    assert np.isinf(l[-1]).tolist() == [False] + 5 * [True]


def test_truncation_stagnates_as_soon_as_a_block_is_below_one_ulp():
    """FP22 has 14 bits and drops the rest: 100 a block ends at 2^20, to nearest at 2^21; and
    before that it loses about as much at every block, where nearest wins and loses."""
    c = np.float32([100.0, 99.0, 101.5])
    down, nearest = (sums(narrow_sum(name), constant(c, 22_000)) for name in ("fp22", "fp22:rn"))
    assert (down[-1] == 2.0**20).all() and (nearest[-1] == 2.0**21).all()
    half_way = down[5000] / (c.astype(np.float64) * 5001) - 1
    assert (half_way < -1e-2).all() and (half_way > -0.3).all()


def test_bfloat16_counts_no_further():
    """Uniform scores through dot_product_attention: l stops at 64·2^8 keys and outputs double."""
    context = 32_768
    q, k = np.zeros((1, 1, 1), np.float32), np.zeros((context, 1, 1), np.float32)
    recipe = Recipe(kv_block=64, running_sum="bfloat16")
    out, lse = jaxattn.dot_product_attention(q, k, k + 1, recipe=recipe, return_residual=True)
    assert float(lse[0, 0]) == pytest.approx(math.log(16_384), abs=1e-6)
    assert float(out[0, 0, 0]) == 2.0


def test_uniform_scores_are_counted_exactly_until_then():
    """Bc a power of two from 32 on: float16 l is exact to the last block before it overflows."""
    for kv_block in (32, 64):
        blocks = 65_536 // kv_block
        recipe = narrow_sum("float16", kv_block=kv_block)
        l = walk(recipe, np.zeros((blocks, 1, kv_block))).l[:, 0]
        np.testing.assert_array_equal(l[:-1], kv_block * np.arange(1.0, blocks))
        assert np.isinf(l[-1])


@pytest.mark.parametrize("roundings", [1, 2])
def test_running_sum_in_half_arithmetic(roundings):
    """l = half(a·l + r) or half(half(a·l) + r), as NumPy's halves have it, while m keeps rising."""
    rng = np.random.default_rng(8)
    r = rng.uniform(1, 64, (200, 300)).astype(np.float16)
    a = rng.uniform(0.5, 1.0, (200, 300)).astype(np.float16)
    a[rng.random(a.shape) < 0.5] = 1
    changes = {} if roundings == 1 else {"rescaled_sum": "float16"}
    got = sums(narrow_sum("float16", **changes), r, a)
    l = np.zeros(300, np.float16)
    for n in range(200):
        carried = a[n].astype(np.float32) * l.astype(np.float32)  # exact: 22 bits
        carried = carried if roundings == 1 else carried.astype(np.float16)
        l = (carried + r[n]).astype(np.float16)
        np.testing.assert_array_equal(got[n], l.astype(np.float32))


# --- overflow ------------------------------------------------------------------------------------


def test_running_sum_overflows_at_65520():
    """The last block brings l from 65,472 to just below the threshold, to it, and past it."""
    last = np.float32([32.0, 47.96875, 48.0, 64.0])
    scores = np.zeros((1024, 4, 64), np.float32)
    scores[-1] = np.log2(last / 64)[:, None]
    l = walk(narrow_sum("float16", row_sum="e5m15"), scores).l
    assert (l[-2] == 65_472).all()
    assert l[-1].tolist() == [65_504.0, 65_504.0, np.inf, np.inf]


def attend(recipe, contexts, mean):
    """(output, log-sum-exp), float [contexts], of one zero query over keys whose V is `mean`."""
    longest = max(contexts)
    q = np.zeros((len(contexts), 1, 1, 1), np.float32)
    k = np.zeros((len(contexts), longest, 1, 1), np.float32)
    out, lse = jaxattn.dot_product_attention(
        q,
        k,
        k + np.float32(mean),
        recipe=recipe,
        key_value_seq_lengths=np.array(contexts, np.int32),
        return_residual=True,
    )
    return np.asarray(out)[:, 0, 0, 0], np.asarray(lse)[:, 0, 0]


@pytest.mark.parametrize("name", ["hexagon-hmx-fp16", "hexagon-hmx-exp2hf"])
def test_a_kernel_overflows_at_65536_uniform_keys(name):
    """One block earlier the answer is still right; then l is infinite and the output 0 or NaN."""
    recipe = jaxattn.kernels.get(name).replace(kv_block=64)
    out, lse = attend(recipe, [65_472, 65_536], 0.5)
    assert np.isfinite(lse).tolist() == [True, False]
    assert lse[0] == pytest.approx(math.log(65_472), abs=1e-5)
    # 1/l is a subnormal half by then: good to l·2^-25 only.
    assert out[0] == pytest.approx(0.5, rel=65_472 * 2.0**-25 + 2.0**-10)
    assert not out[1] > 0


def test_a_float32_sum_does_not_save_a_half_output():
    """o holds l·mean(v): 65,536 after 131,072 keys of mean 0.5, wherever l is kept."""
    recipe = Recipe(kv_block=64, rescaled_output="float16", output="float16")
    out, lse = attend(recipe, [131_008, 131_072], 0.5)
    assert np.isfinite(lse).all()
    assert out[0] == pytest.approx(0.5, rel=0.01) and np.isinf(out[1])


def test_output_overflows_at_its_own_size():
    """o is infinite as soon as l·|mean v| reaches 65,520."""
    recipe = narrow_sum("float32", rescaled_output="float16", output="float16")
    o = walk(recipe, np.zeros((1024, 1, 64)), value=(1.0, 4.0, -4.0, 64.0)).o[:, 0]
    assert (np.argmax(np.isinf(o), axis=0) + 1).tolist() == [1024, 256, 256, 16]
    assert o[-1].tolist() == [np.inf, np.inf, -np.inf, np.inf]
    assert o[254, 1] == 4 * 64 * 255


def test_a_max_offset_trades_overflow_for_stagnation():
    """Three bits down l would overflow at 8 times the context, but 8 per block stop at 2^14."""
    recipe = narrow_sum("float16", initial_max=-jnp.inf, max_offset=3.0)
    l = walk(recipe, np.zeros((4096, 1, 64))).l[:, 0]
    assert l[2047] == l[-1] == 16_384.0
    sooner = walk(recipe.replace(max_offset=1.0), np.zeros((4096, 1, 64))).l[:, 0]
    assert np.argmax(np.isinf(sooner)) + 1 == 2048


# --- drift ---------------------------------------------------------------------------------------


def predicted_drift(c, blocks, t):
    """Relative error of l after `blocks` equal c: in a binade of ulp q each adds RNE(c/q)·q."""
    c = Fraction(float(c))
    exponent = math.frexp(float(c))[1] - 1
    l, left = Fraction(0), blocks
    while left:
        ulp = Fraction(2) ** (exponent - t + 1)
        step = round(c / ulp) * ulp  # Python rounds halves to even
        if step == 0:
            break
        stay = min(left, math.ceil((Fraction(2) ** (exponent + 1) - l) / step))
        l, left, exponent = l + stay * step, left - stay, exponent + 1
    return float(l / (c * blocks) - 1)


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_drift_of_equal_blocks_is_predicted(format):
    """Within 1.5e-3 of l, for hundreds of c and at many lengths, either sign, up to n·u."""
    t = T[format]
    c = np.random.default_rng(1).uniform(20, 125, 300).astype(np.float32)
    blocks = 512 if format == "float16" else 128
    l = sums(narrow_sum(format), constant(c, blocks))
    for n in (blocks // 8, blocks // 4, blocks // 2, blocks * 3 // 4, blocks):
        drift = l[n - 1] / (np.float64(c) * n) - 1
        predicted = np.array([predicted_drift(x, n, t) for x in c])
        # bfloat16's ulp is eight times float16's, and so is what a change of binade costs.
        assert np.abs(drift - predicted).max() < 1.5e-3 * 2.0 ** (11 - t)
        assert np.abs(drift).max() <= n * 2.0**-t
    assert drift.max() > 0.02 and drift.min() < -0.02


@pytest.mark.parametrize(
    ("c", "drift"), [(40.0, -0.0391), (57.59, 0.0369), (61.31, 0.0301), (90.12, 0.0388)]
)
def test_drift_of_published_cases(c, drift):
    l = walk(narrow_sum("float16", lazy_threshold=2.0), even_scores([c], 512)).l[-1, 0]
    assert l / (512 * c) - 1 == pytest.approx(drift, abs=1.5e-3)


def test_no_drift_where_every_block_is_whole_ulps():
    l = sums(narrow_sum("float16"), constant(np.float32([32.0, 64.0, 96.0]), 512))
    np.testing.assert_array_equal(l[-1], np.float32([32.0, 64.0, 96.0]) * 512)


# --- random walks --------------------------------------------------------------------------------


def predicted_spread(l, blocks, t):
    """sd of l's relative error: u·sqrt(n)·sqrt((4(x - 1) + 4/7) / (12 x^3)) for l = x·2^e."""
    x = 2 * np.frexp(l)[0]
    return 2.0**-t * np.sqrt(blocks * (4 * (x - 1) + 4 / 7) / (12 * x**3))


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
@pytest.mark.parametrize("mean", [40.0, 47.0, 60.0])
def test_spread_of_random_blocks_is_predicted(format, mean):
    """Within 5 % over 6,000 rows where blocks scatter by at least half an ulp of the last l."""
    t = T[format]
    blocks = 512 if format == "float16" else 64
    r = np.random.default_rng(2).normal(mean, 0.3 * mean, (blocks, 6000))
    r = np.abs(r).astype(np.float32)
    l = sums(narrow_sum(format), r)
    for n in (blocks // 2, blocks):
        exact = r[:n].astype(np.float64).sum(0)
        ulp = 2.0 ** (np.floor(np.log2(exact.max())) - t + 1)
        assert r.std() >= 0.5 * ulp
        error = l[n - 1] / exact - 1
        assert error.std() == pytest.approx(predicted_spread(exact, n, t).mean(), rel=0.05)
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(6000)


def test_spread_through_whole_steps():
    """The same law for the scores of a kernel: 4,096 rows, normal scores, half l, 96 blocks."""
    recipe = Recipe(kv_block=64, initial_max=0.0, running_sum="float16", lazy_threshold=80.0)
    recipe = recipe.replace(rescaled_sum="float32")
    scores = np.random.default_rng(3).standard_normal((96, 4096, 64), np.float32)
    narrow, wide = (walk(r, scores) for r in (recipe, recipe.replace(running_sum="float32")))
    exact = wide.l[-1].astype(np.float64)
    error = narrow.l[-1] / exact - 1
    assert error.std() == pytest.approx(predicted_spread(exact, 96, 11).mean(), rel=0.05)
    assert abs(error.mean()) < 5 * error.std() / 64


def test_stochastic_rounding_neither_drifts_nor_stagnates():
    """l in float16:sr is unbiased where rounding to nearest drifts by 4 %."""
    c = np.float32([40.0, 57.59, 90.12])
    rows = 400
    recipe = narrow_sum("float16:sr", lazy_threshold=2.0)
    l = walk(recipe, even_scores(np.repeat(c, rows), 512)).l[-1].astype(np.float64)
    error = l.reshape(3, rows) / (512.0 * c[:, None]) - 1
    assert (error.std(1) > 1e-3).all() and (error.std(1) < 2e-2).all()
    assert (np.abs(error.mean(1)) < 5 * error.std(1) / math.sqrt(rows)).all()


# --- l and o together ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_with_constant_values_the_drifts_cancel(format):
    """V = 1 in one format: o is l at every block, so o/l is 1 however far both are off."""
    recipe = narrow_sum(format, output=format, rescaled_output="float32")
    # Probabilities of few bits, so that the row sum and p·v are exact in any order.
    recipe = recipe.replace(probs="e5m3", summand="e5m3")
    scores = np.random.default_rng(4).normal(-1.0, 0.7, (512, 16, 1)).astype(np.float32)
    scores = np.minimum(np.broadcast_to(scores[:1], (512, 16, 64)), 0)
    both, exact = (walk(r, scores) for r in (recipe, recipe.replace(running_sum="float32")))
    np.testing.assert_array_equal(both.o[..., 0], both.l)
    # More precision in one place makes it worse: l alone in float32.
    assert np.abs(both.l[-1] / exact.l[-1] - 1).max() > 0.02
    np.testing.assert_array_equal(exact.o, both.o)


# --- the running maximum -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hexagon-hmx-fp16",
        "hexagon-hmx-fp16-qf16",
        "hexagon-hmx-fp16-qf16-spill",
        "hexagon-hmx-exp2hf",
        "hexagon-pr24389",
    ],
)
def test_half_maximum_of_half_scores_is_exact(name):
    """m in float16 or float32 makes no bit of difference while S is float16."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((3, 4, 64)).astype(np.float32)
    k, v = rng.standard_normal((2, 2000, 2, 64)).astype(np.float16)
    bias = np.where(rng.random((1, 1, 3, 2000)) < 0.5, -1.25, 0.0).astype(np.float32)
    recipe = jaxattn.kernels.get(name).replace(kv_block=64)
    results = [
        jaxattn.dot_product_attention(
            q, k, v, bias, recipe=recipe.replace(running_max=format), return_residual=True
        )
        for format in ("float16", "float32")
    ]
    for half, single in zip(*results, strict=True):
        np.testing.assert_array_equal(half, single)


def test_half_maximum_of_float32_scores_is_not():
    """What the test above would see if m were rounded at all."""
    rng = np.random.default_rng(6)
    q = rng.standard_normal((3, 4, 64)).astype(np.float32)
    k, v = rng.standard_normal((2, 500, 4, 64)).astype(np.float32)
    recipe = jaxattn.kernels.get("hexagon-hmx-fp16").replace(kv_block=64, scores="float32")
    half, single = (
        np.asarray(jaxattn.dot_product_attention(q, k, v, recipe=recipe.replace(running_max=m)))
        for m in ("float16", "float32")
    )
    assert np.mean(half != single) > 0.05


# --- 1/l -----------------------------------------------------------------------------------------


def test_half_inverse_of_a_long_sum_underflows():
    """1/l in half precision: good to u up to 2^14, then to l·2^-25, and 0 from 2^25 on."""
    l = 2.0 ** np.random.default_rng(7).uniform(0, 26, 100_000)
    inverse = np.asarray(round_to(1 / l, "float16"), np.float64)
    error = np.abs(inverse * l - 1)
    assert error[l <= 2**14].max() <= 2.0**-11
    long = (l > 2**14) & (l < 2**25)
    assert (error[long] <= l[long] * 2.0**-25 * (1 + 1e-6)).all()
    # The tie at 2^-25 goes to 0, and so does all that is smaller.
    assert not inverse[l >= 2**25].any()
    for exponent, worst in ((16, 3.9e-3), (20, 5.9e-2), (22, 0.20)):
        inside = (l >= 2.0**exponent) & (l < 2.0 ** (exponent + 1))
        assert error[inside].max() == pytest.approx(worst, rel=0.03)
    flushed = np.asarray(round_to(1 / l, "float16:ftz"))
    assert not flushed[l > 2**14 * (1 + 2.0**-10)].any()
