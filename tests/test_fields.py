"""Fields of Recipe that few kernels need, each against its arithmetic written out in NumPy."""

import ml_dtypes
import numpy as np
import pytest

from jaxattn import dot_product_attention, error_curves, reference_attention
from jaxattn.formats import FLOAT16, FLOAT32, Format
from jaxattn.recipe import Recipe

T, S, H, D = 5, 300, 64, 16
F32 = np.float32


def draw(seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 1, d)).astype(F32) for n, d in ((T, H), (S, H), (S, D)))
    return q, k, v + F32(mean)


def attend(inputs, **fields):
    return np.asarray(dot_product_attention(*inputs, recipe=Recipe(**fields)))[:, 0]


def exact(inputs):
    return reference_attention(*inputs)[:, 0]


def two_dims(inputs):
    return (x[:, 0] for x in inputs)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def half(x):
    return np.asarray(x).astype(np.float16).astype(F32)


def differ(a, b):
    """The share of elements that differ by more than float32 noise."""
    return np.mean(~np.isclose(a, b, rtol=3e-5, atol=3e-6))


def test_probs_are_normalised_and_rounded_before_the_product():
    inputs = draw(mean=1.0)
    q, k, v = two_dims(inputs)
    p = softmax(q @ k.T / 8).astype(ml_dtypes.bfloat16).astype(F32)
    got = attend(inputs, normalise="before", kv_block="whole", probs="bfloat16")
    np.testing.assert_allclose(got, p @ v, rtol=1e-4, atol=1e-5)
    # Rounded p no longer add up to one, which a kernel that divides by their sum does not see.
    after = attend(inputs, kv_block=64, probs="bfloat16", summand="bfloat16")
    assert abs(got - exact(inputs)).max() > 1.3 * abs(after - exact(inputs)).max()


@pytest.mark.parametrize("normalise", ["before", "blocks"])
def test_without_roundings_every_normalisation_is_attention(normalise):
    inputs = draw(mean=1.0)
    kv_block = "whole" if normalise == "before" else 64
    got = attend(inputs, normalise=normalise, kv_block=kv_block)
    np.testing.assert_allclose(got, exact(inputs), rtol=2e-5, atol=2e-6)
    sinks = np.float32([0.5])
    got = dot_product_attention(
        *inputs, recipe=Recipe(normalise=normalise, kv_block=kv_block), sinks=sinks
    )
    np.testing.assert_allclose(got, reference_attention(*inputs, sinks=sinks), rtol=2e-5, atol=2e-6)
    masked = np.zeros((1, 1, T, S), bool)
    masked[..., 2:, :] = True  # two rows without a key, which give 0
    got = dot_product_attention(
        *inputs, mask=masked, recipe=Recipe(normalise=normalise, kv_block=kv_block)
    )
    expected = reference_attention(*inputs, mask=masked)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


ONE_BIT = Format(1, -126, 127)  # of the numbers that it holds, all are powers of two


def rising(seed=0):
    """Inputs whose scores grow along the keys, so that m moves with most blocks."""
    q, k, v = draw(seed, mean=0.3)
    return q, k * np.linspace(0.2, 3, S, dtype=F32)[:, None, None], v


@pytest.mark.parametrize(
    "fields",
    [
        {"exp": "exp2", "max_step": 1.0},
        {"exp": "exp2", "max_step": 1.0, "running_max": "float16", "lazy_threshold": 2.5},
        {"max_step": 0.693147, "rescale": "float16"},
    ],
)
def test_a_maximum_in_steps_makes_powers_of_two_of_a(fields):
    """One bit of a, and l and o in half, lose nothing of a, a·l and a·o; without steps they do."""
    inputs = rising()
    narrow = {"kv_block": 16, "running_sum": "float16", "output": "float16"}
    kept = {"rescale": ONE_BIT, "rescaled_sum": FLOAT16, "rescaled_output": FLOAT16}
    free = {"rescale": FLOAT32, "rescaled_sum": FLOAT32, "rescaled_output": FLOAT32}
    free["rescale"] = fields.get("rescale", FLOAT32)
    stepped = attend(inputs, **narrow, **{**fields, **free})
    np.testing.assert_array_equal(attend(inputs, **narrow, **{**fields, **kept}), stepped)
    plain = {**fields, "max_step": 0.0}
    assert differ(
        attend(inputs, **narrow, **{**plain, **kept}), attend(inputs, **narrow, **{**plain, **free})
    )


def test_a_maximum_in_steps_walked_by_hand():
    """m is the next integer above the scores in base 2; l and o in half."""
    inputs = rising()
    q, k, v = two_dims(inputs)
    s = q @ k.T * F32(np.log2(np.e) / 8)
    m = np.full((T, 1), -np.inf, F32)
    l, o = np.zeros((T, 1), F32), np.zeros((T, D), F32)
    for start in range(0, S, 16):
        block = s[:, start : start + 16]
        m_next = np.maximum(m, np.ceil(block.max(-1, keepdims=True)))
        p, a = np.exp2(block - m_next), np.exp2(m - m_next)
        l = half(a * l + p.sum(-1, keepdims=True))
        o = half(a * o + p @ v[start : start + 16])
        m = m_next
    fields = {"exp": "exp2", "kv_block": 16, "running_sum": "float16", "output": "float16"}
    got = attend(inputs, max_step=1.0, **fields)
    assert differ(got, o / l) < 0.02
    assert differ(attend(inputs, **fields), o / l) > 0.5


@pytest.mark.parametrize("step", [0.25, 1.0, 3.0])
def test_without_roundings_a_maximum_in_steps_is_attention(step):
    inputs = rising()
    masked = np.ones((1, 1, T, S), bool)
    masked[..., :2, :70] = masked[..., 2, :] = False  # whole blocks without a key, and a row
    got = dot_product_attention(*inputs, mask=masked, recipe=Recipe(max_step=step, kv_block=32))
    expected = reference_attention(*inputs, mask=masked)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_o_is_brought_to_the_new_l_with_every_block():
    """One rounding of o/l to half per block, walked by hand."""
    inputs = draw(mean=1.0)
    q, k, v = two_dims(inputs)
    s = q @ k.T / F32(8)
    m = np.full((T, 1), -np.inf, F32)
    l, o = np.zeros((T, 1), F32), np.zeros((T, D), F32)
    for start in range(0, S, 64):
        block = s[:, start : start + 64]
        m_next = np.maximum(m, block.max(-1, keepdims=True))
        p, a = np.exp(block - m_next), np.exp(m - m_next)
        l_next = a * l + p.sum(-1, keepdims=True)
        y = 1 / l_next
        o = half(o * (a * l * y) + (p @ v[start : start + 64]) * y)
        m, l = m_next, l_next
    got = attend(inputs, normalise="blocks", kv_block=64, output="float16")
    assert differ(got, o) < 0.01
    assert differ(attend(inputs, kv_block=64, output="float16"), o) > 0.5


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_the_whole_context_is_a_block_at_every_context(order):
    q, k, v = (x[None] for x in draw(mean=1.0))
    recipe = Recipe(normalise="before", kv_block="whole", probs="bfloat16", kv_order=order)
    curves = error_curves(q, k, v, [recipe], contexts=[7, 256, 300], metrics=("nmse",))
    assert curves.kv_block.tolist() == [[7, 256, 300]]
    for i, n in enumerate((7, 256, 300)):
        got = dot_product_attention(q, k[:, :n], v[:, :n], recipe=recipe)
        ideal = reference_attention(q, k[:, :n], v[:, :n])
        nmse = ((got - ideal) ** 2).sum(-1) / (ideal**2).sum(-1)
        np.testing.assert_allclose(curves.metrics["nmse"][0, i], nmse, rtol=1e-3)


def test_accumulators_are_promoted_every_so_many_keys():
    """p·v in half within 16 keys, then in float32: the error of 16 additions, not of all."""
    inputs = draw(mean=1.0)
    q, k, v = two_dims(inputs)
    s = q @ k.T / F32(8)
    o, p = np.zeros((T, D), F32), np.exp(s - s.max(-1, keepdims=True))
    for start in range(0, S, 16):
        part = np.zeros((T, D), F32)
        for j in range(start, min(start + 16, S)):
            part = half(part + half(p[:, j : j + 1] * v[j]))
        o = o + part
    expected = o / p.sum(-1, keepdims=True)
    fields = {"pv_accum": "float16", "pv_chunk": 1}
    got = attend(inputs, kv_block=304, output_every=16, **fields)
    # The kernel rounds product and sum; here one multiply-add rounds once.
    assert (
        np.corrcoef((got - exact(inputs)).ravel(), (expected - exact(inputs)).ravel())[0, 1] > 0.7
    )
    assert (
        abs(got - exact(inputs)).max()
        < 0.5 * abs(attend(inputs, kv_block=304, **fields) - exact(inputs)).max()
    )


def test_a_product_may_round_before_it_is_added():
    inputs = draw(mean=1.0)
    q, k, v = two_dims(inputs)
    s = q @ k.T / F32(8)
    m, o = np.full((T, 1), -np.inf, F32), np.zeros((T, D), F32)
    l = np.zeros((T, 1), F32)
    for start in range(0, S, 4):
        block = s[:, start : start + 4]
        m_next = np.maximum(m, block.max(-1, keepdims=True))
        p, a = half(np.exp(block - m_next)), np.exp(m - m_next)
        l, o, m = a * l + p.sum(-1, keepdims=True), a * o, m_next
        for j in range(block.shape[1]):
            o = half(o + half(p[:, j : j + 1] * v[start + j]))
    fields = {"probs": "float16", "summand": "float16", "output": "float16", "output_every": 1}
    got = attend(inputs, kv_block=4, pv_accum="float16", pv_chunk=1, **fields)
    assert differ(got, o / l) < 0.02
    assert differ(attend(inputs, kv_block=4, **fields), o / l) > 0.2


def test_qk_accumulators_are_promoted_every_so_many_products():
    q, k, _ = two_dims(draw())
    inputs = (half(q)[:, None], half(k)[:, None], np.eye(S, D, dtype=F32)[:, None])
    s = np.zeros((T, S), F32)
    for start in range(0, H, 8):
        part = np.zeros((T, S), F32)
        for c in range(start // 8, H, H // 8):  # interleaved
            part = half(part + half(q)[:, c : c + 1] * half(k)[:, c])
        s += part
    expected = softmax(s / 8) @ inputs[2][:, 0]
    got = attend(inputs, qk_accum="float16", qk_chunk=1, qk_promote=8)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert differ(attend(inputs, qk_accum="float16", qk_chunk=1), expected) > 0.15


def test_groups_share_a_scale():
    """int8 with a scale of amax/127 for 3 query rows or 32 keys."""
    inputs = draw()
    q, k, v = two_dims(inputs)
    k[40] *= 5  # an outlier costs its group precision, and no other

    def integers(x, group):
        pieces = [x[i : i + group] for i in range(0, len(x), group)]
        units = [np.abs(piece).max() / F32(127) for piece in pieces]
        return np.concatenate([np.round(x / u) * u for x, u in zip(pieces, units, strict=True)])

    inputs = (q[:, None], k[:, None], v[:, None])
    expected = softmax(integers(q, 3) @ integers(k, 32).T / 8) @ v
    got = attend(inputs, query="int8", key="int8", query_group=3, key_group=32)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    coarse = attend(inputs, query="int8", key="int8", query_group=5, key_group=64)
    assert differ(coarse, expected) > 0.9
    # A context that ends inside a group sets that group's scale by its own keys alone.
    recipe = Recipe(query="int8", key="int8", query_group=3, key_group=32)
    curves = error_curves(*(x[None] for x in inputs), [recipe], contexts=[36, S], metrics=("nmse",))
    got = attend(
        (inputs[0], inputs[1][:36], inputs[2][:36]),
        query="int8",
        key="int8",
        query_group=3,
        key_group=32,
    )
    ideal = reference_attention(inputs[0], inputs[1][:36], inputs[2][:36])[:, 0]
    nmse = ((got - ideal) ** 2).sum(-1) / (ideal**2).sum(-1)
    np.testing.assert_allclose(curves.metrics["nmse"][0, 0, 0, :, 0], nmse, rtol=1e-4)


def test_a_scaled_query_rounds_after_its_scale():
    q, k, v = draw()
    expected = softmax(half(half(q[:, 0]) * F32(0.1)) @ k[:, 0].T) @ v[:, 0]
    recipe = Recipe(scale_at="query", query="float16", scaled_query="float16")
    got = np.asarray(dot_product_attention(q, k, v, recipe=recipe, scale=0.1))[:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    once = dot_product_attention(q, k, v, recipe=recipe.replace(scaled_query="float32"), scale=0.1)
    assert differ(np.asarray(once)[:, 0], expected) > 0.5


def test_a_share_of_the_mean_key_is_taken_and_given_back():
    """Keys with a large common part overflow half products; without most of it they do not."""
    q, k, v = draw()
    inputs = (q + F32(40), k + F32(40), v)
    fields = {"qk_accum": "float16", "scores": "float16"}  # of q·k itself, before its scale
    assert not np.isfinite(attend(inputs, **fields)).all()
    shifted = attend(inputs, key_shift=0.9375, **fields)
    assert np.isfinite(shifted).all()
    plain = attend(inputs, key_shift=0.9375)
    np.testing.assert_allclose(plain, exact(inputs), rtol=2e-3, atol=2e-3)


def test_probabilities_see_m_as_it_is_stored_for_them():
    """A sink of 10 nats is 14.427 in base 2, and 14.4375 in bfloat16."""
    q, k, v = np.zeros((1, 1, 4), F32), np.zeros((1, 1, 4), F32), np.ones((1, 1, 1), F32)
    recipe = Recipe(exp="exp2", sinks="seed", seen_max="bfloat16")
    got = dot_product_attention(q, k, v, recipe=recipe, sinks=np.float32([10.0]))
    p = 2.0**-14.4375
    np.testing.assert_allclose(got, p / (1 + p), rtol=1e-6)


@pytest.mark.parametrize(("bias", "masked"), [(-16.0, True), (-15.9921875, False)])
def test_a_bias_at_the_threshold_masks(bias, masked):
    """The second key scores 40 more than the first, so that without a mask it decides."""
    q, k = np.ones((1, 1, 1), F32), F32([[[0.0]], [[40.0]]])
    v, low = F32([[[1.0]], [[2.0]]]), F32([[[[0.0, bias]]]])
    recipe = Recipe(mask_below=-16.0)
    got = dot_product_attention(q, k, v, bias=low, recipe=recipe, scale=1.0)
    assert got == (1.0 if masked else 2.0)


@pytest.mark.parametrize(("flush", "kept"), [(-2.0, False), (-4.0, True)])
def test_a_rescale_factor_below_the_threshold_is_nothing(flush, kept):
    q, k = np.ones((1, 1, 1), F32), F32([[[0.0]], [[3.0]]])
    v = F32([[[1.0]], [[2.0]]])
    recipe = Recipe(kv_block=1, rescale_flush=flush)
    got = dot_product_attention(q, k, v, recipe=recipe, scale=1.0)
    a = np.exp(-3.0) if kept else 0.0
    np.testing.assert_allclose(got[0, 0, 0], (a + 2) / (a + 1), rtol=1e-6)


def test_curves_draw_the_random_bits_that_attention_draws():
    """Three tiles, each with bits of its own."""
    q, k, v = (x[None] for x in draw())
    k, v = np.tile(k, (1, 4, 1, 1)), np.tile(v, (1, 4, 1, 1))
    recipe = Recipe(kv_block=1, running_sum="bfloat16:sr")
    curves = error_curves(q, k, v, [recipe], contexts=[4 * S], metrics=("bias_l",))
    lse = dot_product_attention(q, k, v, recipe=recipe, return_residual=True)[1]
    exact_lse = reference_attention(q, k, v, return_residual=True)[1]
    bias = np.expm1(np.asarray(lse, np.float64) - exact_lse)
    assert np.ptp(bias) > 1e-3
    np.testing.assert_allclose(curves.metrics["bias_l"][0, 0], bias, atol=2e-6)


def test_final_output_rounds_o_once_before_it_is_normalised():
    """Beyond 65504 it overflows, where a narrow result alone would not."""
    query, key = np.zeros((1, 1, 1, 8), np.float32), np.zeros((1, 64, 1, 8), np.float32)
    value = np.full((1, 64, 1, 8), 1000.25, np.float32)
    recipe = Recipe(final_output=FLOAT16)
    out = np.asarray(dot_product_attention(query, key, value, recipe=recipe))
    assert out == pytest.approx(float(np.float16(64 * 1000.25)) / 64, rel=1e-7)
    assert out.flat[0] != 1000.25
    out = dot_product_attention(query, key, 2 * value, recipe=recipe)
    assert np.isinf(np.asarray(out)).all()
    out = dot_product_attention(query, key, 2 * value, recipe=Recipe(result=FLOAT16))
    assert np.asarray(out) == pytest.approx(2000, rel=1e-7)


def test_a_scale_belongs_to_queries_of_one_head():
    """A head whose queries are large takes nothing from its neighbour's steps."""
    rng = np.random.default_rng(7)
    q = rng.standard_normal((6, 4, H)).astype(F32)
    k, v = (rng.standard_normal((S, 2, d)).astype(F32) for d in (H, D))
    loud = q * np.where(np.arange(4) % 2, F32(30), F32(1))[:, None]
    recipe = Recipe(query="int8", query_group=4)
    got = np.asarray(dot_product_attention(loud, k, v, recipe=recipe))
    alone = np.asarray(dot_product_attention(q, k, v, recipe=recipe))
    np.testing.assert_array_equal(got[:, ::2], alone[:, ::2])
    # Curves order their rows alike.
    arrays = (x[None] for x in (loud, k, v))
    curves = error_curves(*arrays, [recipe], contexts=[S], metrics=("max_abs",))
    error = abs(got - reference_attention(loud, k, v)).max(-1)
    np.testing.assert_allclose(curves.metrics["max_abs"][0, 0, 0], error, rtol=1e-2)


@pytest.mark.parametrize("base", ["exp", "exp2"])
def test_a_bias_is_in_nats_whatever_the_base_of_scores(base):
    inputs = draw()
    bias = (3 * np.random.default_rng(8).standard_normal((1, T, S))).astype(F32)
    for at in ("scale", "exponent"):
        recipe = Recipe(exp=base, log2e_at=at)
        got = dot_product_attention(*inputs, bias, recipe=recipe)
        np.testing.assert_allclose(got, reference_attention(*inputs, bias), atol=2e-5)
    half_as_much = dot_product_attention(*inputs, bias, recipe=recipe.replace(bias_factor=0.5))
    np.testing.assert_allclose(half_as_much, reference_attention(*inputs, bias / 2), atol=2e-5)


@pytest.mark.parametrize("scale_at", ["scores", "query"])
def test_a_cap_is_folded_in_the_scale_or_divided_by_apart(scale_at):
    """Where the scale is rounded, scale/50 loses bits that a scale of 1/8 would keep."""
    inputs = draw(mean=1.0)
    want = reference_attention(*inputs, softcap=50.0)
    for base, scale, exact_at in (
        ("exp", "bfloat16", ("scores",)),
        ("exp", "float32", ("scores", "scale")),
        ("exp2", "float32", ("scores", "scale")),
    ):
        for at in ("scores", "scale"):
            recipe = Recipe(exp=base, scale_at=scale_at, scale=scale, cap_at=at)
            error = abs(dot_product_attention(*inputs, recipe=recipe, softcap=50.0) - want).max()
            assert error < 1e-5 if at in exact_at else error > 1e-4, recipe


def test_scores_are_stored_after_the_division_and_after_the_tanh():
    inputs = draw()
    q, k, v = two_dims(inputs)
    cap = F32(3.0)
    s = half(half(q @ k.T * F32(0.125)) / cap)
    want = softmax(half(half(np.tanh(s)) * cap)) @ v
    fields = {"scores": FLOAT16, "squashed": FLOAT16, "softcap": FLOAT16, "cap_at": "scores"}
    got = dot_product_attention(*inputs, recipe=Recipe(**fields), softcap=3.0)[:, 0]
    assert differ(got, want) < 0.05
    for site in ("squashed", "softcap"):
        recipe = Recipe(**fields | {site: "float32"})
        other = dot_product_attention(*inputs, recipe=recipe, softcap=3.0)
        assert differ(other[:, 0], want) > 0.5, site


def test_a_sink_at_the_end_meets_the_formats_of_the_keys_before():
    """One block, so that l and o are not rescaled before the sink comes."""
    inputs = draw(mean=1.0)
    q, k, v = two_dims(inputs)
    s = q @ k.T / F32(8)
    m = s.max(-1)
    sink = m[0] + F32(1.3)
    e = np.exp(s - m[:, None])
    o, l = half(e @ v), half(e.sum(-1))
    top = np.maximum(m, sink)
    a = half(np.exp(m - top))
    end_l = half(half(a * l) + half(np.exp(sink - top)))
    end_o = half(half(a)[:, None] * o)
    after_l = np.exp(m - top) * l + np.exp(sink - top)
    after_o = np.exp(m - top)[:, None] * o
    sites = ("rescale", "rescaled_sum", "running_sum", "rescaled_output", "output")
    fields = dict.fromkeys(sites, FLOAT16) | {"kv_block": "whole"}
    sinks = np.array([sink], F32)
    end, after = end_o / end_l[:, None], after_o / after_l[:, None]
    for kind, want, not_this in (("end", end, after), ("after", after, end)):
        recipe = Recipe(sinks=kind, **fields)
        got = np.asarray(dot_product_attention(*inputs, recipe=recipe, sinks=sinks))[:, 0]
        assert differ(got, want) < 0.1 and differ(got, not_this) > 0.7, kind
    # Handed over between the two: a sink at the end is met before, one after it is not rounded.
    for kind, want in (("end", half(np.exp(m - top)[:, None] * (e @ v))), ("after", None)):
        recipe = Recipe(sinks=kind, kv_block="whole", final_output=FLOAT16)
        got = np.asarray(dot_product_attention(*inputs, recipe=recipe, sinks=sinks))[:, 0]
        full_l = np.exp(m - top) * e.sum(-1) + np.exp(sink - top)
        want = np.exp(m - top)[:, None] * half(e @ v) if want is None else want
        assert differ(got, want / full_l[:, None]) < 0.05, kind
    # The factor of a sink far above is flushed, as any other.
    flushing = Recipe(kv_block="whole", rescale_flush=-5.0)
    for above, gone in ((4.9, False), (5.1, True)):
        far = np.array([m.max() + above], F32)
        got = np.asarray(dot_product_attention(*inputs, recipe=flushing, sinks=far))[m.argmax(), 0]
        assert (abs(got).max() == 0) == gone


def test_a_sink_at_the_end_may_meet_stochastic_sites():
    inputs = draw()
    recipe = Recipe(running_sum="bfloat16:sr", output="bfloat16:sr")
    got = dot_product_attention(*inputs, recipe=recipe, sinks=np.array([2.0], F32))
    want = reference_attention(*inputs, sinks=np.array([2.0]))
    assert 1e-4 < abs(got - want).max() < 0.05


def test_log2e_may_multiply_a_scaled_query_apart():
    """Two roundings of q and one of log2(e), where scale·log2(e) in one would be one of each."""

    def bf16(x):
        return np.asarray(x).astype(ml_dtypes.bfloat16).astype(F32)

    q, k, v = draw()
    twice = bf16(bf16(bf16(q[:, 0]) * bf16(F32(0.3))) * bf16(F32(np.log2(np.e))))
    expected = softmax((twice @ k[:, 0].T) * F32(np.log(2))) @ v[:, 0]
    fields = dict.fromkeys(("query", "scale", "scaled_query", "log2e"), "bfloat16")
    recipe = Recipe(exp="exp2", scale_at="query", log2e_at="query", **fields)
    got = np.asarray(dot_product_attention(q, k, v, recipe=recipe, scale=0.3))[:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    once = dot_product_attention(q, k, v, recipe=recipe.replace(log2e_at="scale"), scale=0.3)
    assert differ(np.asarray(once)[:, 0], expected) > 0.5
    wide = recipe.replace(**dict.fromkeys(fields, "float32"))
    for more in ({}, {"softcap": 3.0}):
        got = dot_product_attention(q, k, v, recipe=wide, scale=0.3, **more)
        want = reference_attention(q, k, v, scale=0.3, **more)
        np.testing.assert_allclose(got, want, atol=1e-5)
