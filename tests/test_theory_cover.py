"""What the theory says that it covers, it predicts: sites alone and the atlas, against runs."""

from functools import cache

import numpy as np
import pytest

from jaxattn import Recipe, error_curves, format_of, inputs, kernels, theory
from jaxattn.fields import SITES
from jaxattn.theory.roundings import dithered, relative, rounded

FORMATS = ("float16", "float16:rz", "bfloat16", "bfloat16:rz", "e4m3", "float8_e4m3fn", "fp22")
# Sites that gaussian inputs without a cap or a bias do not reach, and those that are outside.
UNREACHED = {"cap", "shift", "squashed", "softcap", "bias", "qk_accum", "pv_accum"}
BASE_2 = {"exp": "exp2", "log2e_at": "exponent"}
BESIDE = {"scaled_query": {"scale_at": "query"}, "log2e": BASE_2, "exponent": BASE_2}
COVERED = 72  # of the atlas
FACTOR = 1.5
FLOOR = 2e-6  # of float32's own errors, which are not predicted


@cache
def alone():
    """One narrow site at a time, in every format that it may have."""
    found = []
    for site in (x for x in SITES if x not in UNREACHED):
        for format in FORMATS:
            fields = {site: format, **BESIDE.get(site, {})}
            found.append(Recipe(name=f"{site}={format}", kv_block=64, **fields))
    return [recipe for recipe in found if not theory.outside(recipe)]


@cache
def atlas():
    """Real kernels that are covered, and chunks of keys by other numbers than theirs."""
    found = [kernels.get(name) for name in kernels.names()]
    split = kernels.get("ggml-cpu-splitkv")
    found += [split.replace(name=f"{split.name} in {n}", split_kv=n) for n in (2, 4)]
    return [recipe for recipe in found if not theory.outside(recipe)]


def check(recipes, regime, contexts, head_dim):
    query, stream = inputs.regime(
        regime, length=max(contexts), seed=2, heads=2, group=2, queries=32, head_dim=head_dim
    )
    curves = error_curves(query, stream, None, recipes, contexts=contexts, metrics=("rel_l2",))
    moments, wrong = theory.measured(query, stream), []
    for recipe, errors in zip(recipes, curves.metrics["rel_l2"], strict=True):
        measured = np.median(errors.reshape(len(contexts), -1), axis=1)
        predicted = theory.predict(recipe, moments, contexts).rel_l2
        low, high = measured / FACTOR, measured * FACTOR
        same = (predicted == measured) | ((low <= predicted) & (predicted <= high))
        if not (same | (np.maximum(predicted, measured) < FLOOR)).all():
            wrong.append(f"{recipe.name} on {regime}: {predicted} of {measured}")
    assert not wrong, "\n".join(wrong)


def test_as_many_kernels_are_covered_as_ever():
    assert sum(not theory.outside(kernels.get(name)) for name in kernels.names()) >= COVERED
    assert {recipe.split_kv for recipe in atlas()} >= {1, 2, 4, 8, 16}
    named = {recipe.name.split("=")[0] for recipe in alone()}
    assert named == set(SITES) - UNREACHED
    assert len(alone()) == len(named) * len(FORMATS) - 2  # differences need an infinity


@pytest.mark.parametrize("regime", ["gaussian", "biased_v"])
def test_a_sample_is_predicted(regime):
    rng = np.random.default_rng(len(regime))
    sites = rng.choice(len(alone()), 10, replace=False)
    check([alone()[i] for i in sites], regime, [256, 1024], 64)


def test_a_sample_of_the_atlas_is_predicted():
    """One kernel in chunks, and one without."""
    split = [recipe for recipe in atlas() if recipe.split_kv > 1]
    whole = [recipe for recipe in atlas() if recipe.split_kv == 1 and recipe.output_every is None]
    rng = np.random.default_rng(3)
    check([rng.choice(np.array(x, object)) for x in (split, whole)], "gaussian", [512], 64)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["gaussian", "biased_v"])
@pytest.mark.parametrize(("recipes", "head_dim"), [(alone, 64), (atlas, 128)])
def test_all_are_predicted(recipes, head_dim, regime):
    check(recipes(), regime, [256, 1024, 4096], head_dim)


def test_chunks_add_up_as_their_values_do():
    """o in float16: of V of mean zero, chunks scatter like o itself, and the error stays; of V that
    is nothing but its mean, errors scatter and o does not, and it falls like 1 / sqrt(chunks)."""
    zero = theory.gaussian(1.0, head_dim=64)
    mean = theory.gaussian(1.0, head_dim=64, value_mean=1.0, value_sd=0.01)
    recipe = Recipe(kv_block=64, output="float16", rescaled_output="float16")

    def error(moments, chunks):
        # each chunk as long as before, so that it has as many roundings
        found = theory.predict(recipe.replace(split_kv=chunks), moments, [2048 * chunks])
        return found.terms["output"][0]

    assert error(zero, 16) == pytest.approx(error(zero, 1), rel=0.02)
    assert error(mean, 16) == pytest.approx(error(mean, 1) / 4, rel=0.2)


@pytest.mark.parametrize("format", ["float16", "float16:rz", "e4m3", "fp22"])
def test_one_rounding_of_any_number(format):
    format = format_of(format)
    x = 2.0 ** np.random.default_rng(4).uniform(0, 3, 400_000)
    mean, variance = relative(format)
    error = rounded(x, format) / x - 1
    u = 2.0**-format.precision
    assert error.mean() == pytest.approx(mean, abs=0.02 * u)
    assert error.var() == pytest.approx(variance, abs=0.02 * u**2)
    near = -np.random.default_rng(5).uniform(1.25, 1.75, 400_000)
    mean, variance = dithered(-1.5, format)
    error = rounded(near, format) - near
    assert error.mean() == pytest.approx(float(mean), abs=0.02 * u)
    assert error.var() == pytest.approx(float(variance), abs=0.02 * u**2)
