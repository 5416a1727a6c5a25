"""Predictions against closed forms, NumPy halves, and runs; the study's verdicts; its figure."""

import math

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import pandas as pd
import pytest

import jaxattn
from jaxattn import Recipe, format_of, theory
from jaxattn.formats import BFLOAT16, FLOAT16, FLOAT32
from jaxattn.theory.moments import PAGE
from jaxattn.theory.roundings import error_moments, rounded, ulp
from plots import theory as figure
from plots.figures import STYLE
from sweeps.theory import study

FP22 = format_of("fp22")


def half_sums(r):
    """l = half(l + r) over the first axis, every partial sum, by NumPy's own halves."""
    l, partial = np.zeros(r.shape[1:], np.float16), []
    for row in r:
        l = (l.astype(np.float32) + np.float32(row)).astype(np.float16)
        partial.append(l)
    return np.stack(partial).astype(np.float64)


# --- one rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "e4m3", "float16:rz", "fp22", "e5m8:ftz"])
def test_rounded_is_round_to(name):
    x = np.random.default_rng(0).standard_normal(4000) * 2.0 ** np.linspace(-40, 17, 4000)
    x = np.concatenate([x.astype(np.float32), np.float32([0, 1, 65519, 65520, 2**-25, 3 * 2**-25])])
    ours = rounded(x, format_of(name)).astype(np.float32)
    np.testing.assert_array_equal(ours, np.asarray(jaxattn.round_to(x, name)))


@pytest.mark.parametrize("format", [FLOAT16, FP22])
@pytest.mark.parametrize("sd", [0.0, 0.02, 0.09, 0.11, 0.2, 0.35, 0.6, 0.79, 0.9])
def test_moments_of_a_rounding(format, sd):
    """Against 200,000 draws; at sd 0 ties go to even, and toward zero nothing moves."""
    mean = np.array([7.0, 7.25, 7.47, 7.5, 7.53, 8.5])
    draws = mean + sd * np.random.default_rng(1).standard_normal((200_000, 1))
    whole = np.rint(draws) if format == FLOAT16 else np.trunc(draws)
    bias, variance = error_moments(mean, sd, 1.0, format)
    np.testing.assert_allclose(bias, (whole - draws).mean(0), atol=4e-3)
    np.testing.assert_allclose(variance, (whole - draws).var(0), atol=4e-3)


def test_step_sizes():
    np.testing.assert_array_equal(ulp([1.0, 1.99, 2.0, 65504.0], FLOAT16) * 1024, [1, 1, 2, 32768])
    assert ulp(0.0, FLOAT16) == ulp(2.0**-30, FLOAT16) == 2.0**-24


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "expected"), [(40, -0.0398), (57.59, 0.0368), (61.31, 0.0300), (90.12, 0.0392)]
)
def test_drift_of_the_published_table(c, expected):
    assert theory.drift(c, 512, FLOAT16) == pytest.approx(expected, abs=1e-4)


def test_drift_against_halves():
    c = np.random.default_rng(2).uniform(20, 125, 200).astype(np.float16).astype(np.float64)
    l = half_sums(np.broadcast_to(c, (512, len(c))))
    for n in (64, 200, 512):
        predicted = [theory.drift(x, n, FLOAT16) for x in c]
        assert np.abs(l[n - 1] / (n * c) - 1 - predicted).max() < 1.5e-3


def test_drift_toward_zero_is_down_and_grows_with_the_length():
    found = [theory.drift(100.1, n, FP22) for n in (1000, 2000, 4000)]
    assert 0 > found[0] > found[1] > found[2]


def test_spread_against_halves():
    """Within 5 % of the sd over 4,000 rows, where blocks scatter by half an ulp of l or more."""
    for mean, blocks in ((41.0, 64), (41.0, 256), (47.0, 512)):
        r = np.random.default_rng(3).normal(mean, 0.3 * mean, (blocks, 4000)).astype(np.float32)
        exact = r.astype(np.float64).sum(0)
        measured = (half_sums(r)[-1] / exact - 1).std()
        assert theory.spread(exact, blocks, FLOAT16).mean() == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("blocks", "expected"), [(64, 1.02e-3), (256, 2.03e-3), (1024, 3.42e-3)])
def test_spread_of_the_published_table(blocks, expected):
    """u sqrt(n) times 0.218 to 0.259, as l's significand has it: the table lies in that range."""
    x = np.linspace(1, 2, 1000, endpoint=False)
    factor = theory.spread(x, blocks, FLOAT16) / (2.0**-11 * math.sqrt(blocks))
    assert factor.min() == pytest.approx(0.218, abs=1e-3)
    assert factor.max() == pytest.approx(0.259, abs=1e-3)
    reach = 2.0**-11 * math.sqrt(blocks)
    assert factor.min() * 0.99 <= expected / reach <= factor.max() * 1.01


def test_stagnation_and_overflow_points():
    assert theory.stagnation([64, 57.5, 100], BFLOAT16).tolist() == [16384, 16384, 32768]
    assert theory.stagnation([16, 1, 20, 32], FLOAT16).tolist() == [32768, 2048, np.inf, np.inf]
    assert theory.stagnation(100.0, FP22) == 2.0**20
    assert theory.stagnation(100.0, format_of("e8m13")) == 2.0**21
    assert theory.overflow(FLOAT16) == 65520 and theory.overflow(FP22) == math.inf
    assert theory.overflow(format_of("float16:sat")) == math.inf


def test_bounds_hold_and_become_vacuous():
    n = np.array([1, 64, 512, 2047])
    worst, likely = theory.bound_worst(n, FLOAT16), theory.bound_likely(n, FLOAT16)
    assert (np.diff(worst) > 0).all() and (np.diff(likely) > 0).all()
    assert (likely[1:] < worst[1:]).all()
    assert (theory.spread(1.3, n, FLOAT16) < likely).all()
    assert theory.bound_worst(2048, FLOAT16) == theory.bound_worst(256, BFLOAT16) == math.inf
    assert abs(theory.drift(57.59, 512, FLOAT16)) < theory.bound_worst(512, FLOAT16)


@pytest.mark.parametrize("name", ["float16:sr", "float16:odd", "float16:floor"])
def test_other_roundings_are_refused(name):
    with pytest.raises(ValueError, match="nearest even and toward zero"):
        theory.drift(40.0, 10, format_of(name))
    with pytest.raises(ValueError, match="nearest even and toward zero"):
        theory.stagnation(40.0, format_of(name))


# --- predictions ---------------------------------------------------------------------------------

CONTEXTS = [256, 1024, 4096, 16384]
GAUSSIAN = theory.gaussian(1.0, head_dim=64)
L16 = Recipe(kv_block=64, running_sum="float16", rescaled_sum="float16")


def test_a_float32_recipe_has_no_error():
    found = theory.predict(Recipe(), GAUSSIAN, CONTEXTS)
    assert (found.rel_l2 < 1e-6).all() and (found.bias_l < 1e-6).all()
    assert not found.stagnated.any() and not found.overflow.any() and not found.outside
    assert found.events == {"stagnation": None, "overflow": None}
    assert set(found.terms) == set(theory.TERMS)
    assert (np.diff(found.size) > 0).all() and found.kv_block.tolist() == [64] * 4


def test_equal_blocks_are_halves_to_the_last_bit():
    """c = 57 where every key weighs the same: l by NumPy's halves, the partial block included."""
    moments = theory.gaussian(0.0, head_dim=64)
    contexts = [100, 5700, 57 * 512 + 30]
    found = theory.predict(L16.replace(kv_block=57), moments, contexts)
    for n, drift in zip(contexts, found.drift, strict=True):
        r = np.float32([57] * (n // 57) + [n % 57] * (n % 57 > 0))[:, None]
        assert half_sums(r)[-1, 0] / n - 1 == pytest.approx(drift, abs=1e-12)
    expected = np.abs(found.drift / (1 + found.drift))
    np.testing.assert_allclose(found.rel_l2, expected, rtol=1e-4, atol=1e-6)


def test_uniform_scores_overflow_and_stagnate_where_they_do():
    moments = theory.gaussian(0.0, head_dim=64)
    half = theory.predict(L16, moments, [65472, 65536])
    assert half.overflow.tolist() == [0, 1] and half.rel_l2[1] == 1 and half.bias_l[1] == math.inf
    assert half.rel_l2[0] < 1e-6 and half.events["overflow"] == 65536
    bf16 = L16.replace(running_sum="bfloat16", rescaled_sum="bfloat16")
    late = theory.predict(bf16, moments, [16384, 32768])
    assert late.drift == pytest.approx([0, -0.5]) and late.stagnated.tolist() == [0, 1]
    offset = theory.predict(L16.replace(max_offset=math.log(8)), moments, [65536])
    assert offset.overflow[0] == 0


def test_output_overflows_at_its_own_size():
    moments = theory.gaussian(0.0, value_mean=0.5, value_sd=0.0, head_dim=64)
    recipe = Recipe(kv_block=512, output="float16")
    assert theory.predict(recipe, moments, [130560, 131072]).overflow.tolist() == [0, 1]


def test_l_and_o_drift_together():
    """V of mean 1 and no scatter: what l loses, o loses, and o / l is right; l alone is not."""
    moments = theory.gaussian(0.0, value_mean=1.0, value_sd=0.0, head_dim=64)
    both = theory.predict(L16.replace(kv_block=57, output="float16"), moments, [57 * 512])
    alone = theory.predict(L16.replace(kv_block=57), moments, [57 * 512])
    assert both.drift == pytest.approx(both.output_drift) and abs(both.drift[0]) > 0.01
    assert both.rel_l2[0] < 1e-6 < 0.01 < alone.rel_l2[0]


def test_more_bits_and_longer_blocks_are_better():
    def error(**changes):
        recipe = L16.replace(output="float16").replace(**changes)
        return theory.predict(recipe, GAUSSIAN, [256, 4096, 16384]).rel_l2

    assert (error(kv_block=512)[1:] < error()[1:]).all()
    wide = error(running_sum="e5m12", rescaled_sum="e5m12", output="e5m12")
    assert (wide < error() / 2).all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"running_sum": "float16:sr"}, "running_sum rounds neither"),
        ({"pv_accum": "fp22"}, "pv_accum is narrow"),
        ({"rescaled_sum": "fp22", "output": "fp22"}, "both round toward zero"),
        ({"difference": "float8_e4m3fn"}, "difference has no infinity"),
        ({"exp": "exp2_poly3"}, "exp='exp2_poly3' has an error of its own"),
        ({"query": "int8", "query_group": 4}, "by groups"),
        ({"normalise": "blocks", "output": "float16"}, "output rounded at every block"),
        ({"running_sum": "float16", "summation": "kahan"}, "compensated or flushed"),
        ({"running_sum": "float16", "flush_every": 16}, "compensated or flushed"),
    ],
)
def test_what_is_outside_is_nan_and_says_why(changes, why):
    found = theory.predict(Recipe(kv_block=64).replace(**changes), GAUSSIAN, [512])
    assert why in found.outside and np.isnan(found.rel_l2).all() and np.isnan(found.drift).all()
    assert all(np.isnan(term).all() for term in found.terms.values())
    assert found.kv_block.tolist() == [64]


def test_a_rule_chooses_the_block():
    recipe = jaxattn.kernels.get("hexagon-hmx-fp16")
    found = theory.predict(recipe, theory.gaussian(1.0, head_dim=128), [256, 4096])
    assert found.kv_block[0] < found.kv_block[1] and (found.rel_l2 > 1e-4).all()


@pytest.mark.parametrize("contexts", [[], [0, 5], [5, 4], [4, 4]])
def test_contexts_ascend(contexts):
    with pytest.raises(ValueError, match="contexts must be positive, ascending and different"):
        theory.predict(L16, GAUSSIAN, contexts)


# --- moments -------------------------------------------------------------------------------------


def test_moments_of_a_regime():
    query, stream = jaxattn.inputs.regime(
        "biased_v", length=2 * PAGE, seed=0, heads=2, queries=32, head_dim=64
    )
    seen, drawn = theory.measured(query, stream), theory.gaussian(1.0, value_mean=1.0, head_dim=64)
    assert seen.sd.shape == (64,) and seen.sd.mean() == pytest.approx(drawn.sd.mean(), rel=0.03)
    assert seen.sd.std() == pytest.approx(drawn.sd.std(), rel=0.4)
    assert abs(seen.mean).max() < 0.1 and seen.tail == pytest.approx(1, abs=0.05)
    assert seen.value_mean == pytest.approx(1, abs=0.02)
    assert seen.value_sd == pytest.approx(1, abs=0.02)
    assert (seen.head_dim, seen.scale, seen.inputs[0]) == (64, 0.125, FLOAT16)
    key, value = stream.blocks(0, 2 * PAGE)
    again = theory.measured(query, key[None], value[None])
    np.testing.assert_array_equal(again.peaks, seen.peaks)


def test_a_mean_of_v_that_is_noise_is_none():
    query, stream = jaxattn.inputs.regime("gaussian", length=PAGE, seed=0, queries=8, head_dim=64)
    assert theory.measured(query, stream).value_mean == 0


def test_moments_that_cannot_be_taken():
    x = np.zeros((1, 8, 2, 4), np.float32)
    with pytest.raises(ValueError, match="do not fit each other"):
        theory.measured(x, x[..., :3], x)
    with pytest.raises(ValueError, match="must be"):
        theory.measured(x[0], x, x)
    with pytest.raises(ValueError, match="must not be negative"):
        theory.gaussian(-1.0)


# --- against walks of NumPy's and ml_dtypes' own numbers ------------------------------------------


def walked(dtype, block, keys, logit_sd, value_mean, value_sd, *, l_too, rows=24, dim=16):
    """Median relative L2 error of o / l over rows, at each of `keys`: block by block in `dtype`."""
    rng = np.random.default_rng(6)
    narrow = l_too and dtype or np.float64
    query = rng.standard_normal((rows, dim)) * logit_sd / 4
    v = rng.normal(value_mean, value_sd, (max(keys), dim))
    s = query @ rng.standard_normal((dim, max(keys)))
    l, o = np.zeros(rows, narrow), np.zeros((rows, dim), dtype)
    m, true_l, true_o = np.full(rows, -np.inf), np.zeros(rows), np.zeros((rows, dim))
    found = []
    for n in range(block, max(keys) + 1, block):
        m, before = np.maximum(m, s[:, n - block : n].max(1)), m
        a, p = np.exp(before - m), np.exp(s[:, n - block : n] - m[:, None])
        r, pv = p.sum(1), p @ v[n - block : n]
        true_l, true_o = a * true_l + r, a[:, None] * true_o + pv
        l = ((a * l.astype(float)).astype(narrow).astype(float) + r).astype(narrow)
        o = ((a[:, None] * o.astype(float)).astype(dtype).astype(float) + pv).astype(dtype)
        if n in keys:
            exact = true_o / true_l[:, None]
            error = o.astype(float) / l.astype(float)[:, None] - exact
            found.append(np.median(np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1)))
    return found


def test_l_and_o_stand_on_their_powers_of_two():
    """bfloat16, 16 keys a block: l stops at 4,096 and o at 2,048, so that o / l is V's mean."""
    keys = [2048, 8192, 16384]
    both = dict.fromkeys(("running_sum", "rescaled_sum", "output", "rescaled_output"), "bfloat16")
    moments = theory.gaussian(0.1, value_mean=0.5, value_sd=0.05, head_dim=16, rows=64)
    found = theory.predict(Recipe(kv_block=16).replace(**both), moments, keys)
    measured = walked(ml_dtypes.bfloat16, 16, keys, 0.1, 0.5, 0.05, l_too=True)
    np.testing.assert_allclose(found.rel_l2, measured, rtol=0.25, atol=5e-4)
    assert found.drift[-1] < -0.5 and found.rel_l2[-1] < 0.002


def test_single_keys_are_lost_one_by_one():
    """o rounded to float16 at every key, V of mean 1: it drifts long before it stagnates."""
    keys = [512, 2048]
    recipe = Recipe(kv_block=1, output_every=1, output="float16", rescaled_output="float16")
    moments = theory.gaussian(1.0, value_mean=1.0, head_dim=16, rows=64)
    found = theory.predict(recipe, moments, keys)
    measured = walked(np.float16, 1, keys, 1.0, 1.0, 1.0, l_too=False)
    np.testing.assert_allclose(found.rel_l2, measured, rtol=0.25)
    assert found.output_drift[-1] < -0.01


# --- against runs --------------------------------------------------------------------------------


def compared(regime, sites, contexts):
    """(recipe's name, predicted and measured median relative L2) in float16, 64 keys a block."""
    query, stream = jaxattn.inputs.regime(
        regime, length=max(contexts), seed=1, heads=2, queries=256, head_dim=32
    )
    chosen = [recipe for _, f, recipe in study.recipes(sites, (64,)) if f == "float16"]
    curves = jaxattn.error_curves(
        query, stream, None, chosen, contexts=contexts, metrics=("rel_l2",)
    )
    moments = theory.measured(query, stream)
    for recipe, errors in zip(chosen, curves.metrics["rel_l2"], strict=True):
        found = theory.predict(recipe, moments, contexts)
        yield recipe.name, found.rel_l2, np.median(errors.reshape(len(contexts), -1), axis=1)


def test_predictions_are_within_a_quarter_of_a_run():
    """Of every site alone: medians over 512 rows at 512 and 2,048 keys."""
    for name, predicted, measured in compared("gaussian", tuple(study.SITES), [512, 2048]):
        np.testing.assert_allclose(predicted, measured, rtol=0.25, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["gaussian", "biased_v", "uniform01"])
def test_a_whole_kernel_is_predicted_within_a_tenth(regime):
    for name, predicted, measured in compared(regime, (study.TOGETHER,), [512, 2048, 4096]):
        np.testing.assert_allclose(predicted, measured, rtol=0.1, err_msg=name)


# --- the study and its figure --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "measured", "low", "high", "status"),
    [
        (1.2, 1.0, 1.0, 1.0, study.MET),
        (1.3, 1.0, 0.9, 1.02, study.NOT_MET),
        (1.3, 1.0, 0.9, 1.05, study.NEAR),
        (1e-7, 1e-6, 1e-6, 1e-6, study.NONE),
        (math.inf, math.inf, math.inf, math.inf, study.MET),
        (math.inf, 1.0, 1.0, 1.0, study.NOT_MET),
        (1.0, math.inf, 1.0, math.inf, study.NEAR),
    ],
)
def test_verdicts(predicted, measured, low, high, status):
    assert study._row(1, "rel_l2", "random", predicted, measured, low, high)["status"] == status


def test_interval_of_a_median():
    measured, low, high = study._interval(np.arange(101.0))
    assert (measured, low, high) == (50, 40, 60)
    assert study._interval(np.array([3.0])) == (3.0, 3.0, 3.0)
    assert study._interval(np.array([np.nan, 1.0, np.nan]))[0] == math.inf


def made_rows():
    rows = []
    for site, format, recipe in study.recipes((*study.SITES, study.TOGETHER), (64, 128, 512)):
        for name in ("gaussian-1", "biased_v"):
            for context in (256, 4096, 65536):
                error = 1e-5 * math.sqrt(context)
                row = study._row(context, "rel_l2", "random", error, 1.1 * error, error, error)
                same = {"inputs": name, "recipe": recipe.name, "site": site, "format": format}
                marks = {"stagnated": context > 4096, "overflow": False}
                rows.append(same | row | marks | {"kv_block": recipe.kv_block})
    return pd.DataFrame(rows)


def test_the_table_counts():
    rows = made_rows()
    rows.loc[0, "status"] = study.NOT_MET
    text = study.table(rows).splitlines()
    assert (
        text[-1] == f"theory: {(len(rows) - 1) / len(rows):.1%} of {len(rows)} points met, "
        f"0.0% more within noise, {1 / len(rows):.1%} not met"
    )
    assert any(line.startswith("running_sum") and " 0.91" in line for line in text)


def test_the_figure_draws_what_the_rows_say():
    with plt.style.context(STYLE):
        drawn = figure.agreement(made_rows())
    titles = [ax.get_title(loc="left") for ax in drawn.axes]
    assert "each place alone, float16, gaussian" in titles
    assert "l alone, every key alike" not in titles
    panel = drawn.axes[titles.index("HMX kernel, V of mean 1, by KV block")]
    lines = [line for line in panel.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(lines[1].get_ydata(), 1.1 * np.asarray(lines[0].get_ydata()))
    plt.close(drawn)


def test_formats_are_what_the_study_says():
    assert {f for _, f, _ in study.recipes(("output",), (64,))} == set(study.FORMATS)
    for _, format, recipe in study.recipes((study.TOGETHER,), (64,)):
        assert recipe.running_sum == recipe.inverse == format_of(format)
        assert recipe.query == FLOAT16 and recipe.pv_accum == FLOAT32
