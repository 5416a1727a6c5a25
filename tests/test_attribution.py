"""Attribution of errors to rounding sites: axioms, brute force, and errors planted on purpose."""

import itertools
import math

import numpy as np
import pytest

import jaxattn
from jaxattn import kernels
from jaxattn.attribution import (
    SOFTMAX,
    capped,
    chosen_sites,
    errors_of,
    interaction_indices,
    interactions,
    lifted_alone,
    lowered_alone,
    rounded_sites,
    shapley,
    subsets,
)
from jaxattn.fields import FOLLOWS, SITES
from jaxattn.formats import FLOAT16, FLOAT32, format_of
from jaxattn.inputs import regime
from jaxattn.recipe import Recipe

HMX = kernels.get("hexagon-hmx-fp16")


def games(k, *shape, seed=0):
    return np.random.default_rng(seed).exponential(size=(2**k, *shape))


def by_permutations(value, players):
    """player -> mean of value(before) - value(with it) over all orders: the definition."""
    owed = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        lifted = frozenset()
        for player in order:
            with_it = lifted | {player}
            owed[player] += (value(lifted) - value(with_it)) / math.factorial(len(players))
            lifted = with_it
    return owed


def value_of(errors):
    """A game of sets of numbers (a pair counts as both) from a table of 2^k errors."""

    def value(lifted):
        members = {
            i for player in lifted for i in (player if isinstance(player, tuple) else (player,))
        }
        return errors[sum(1 << i for i in members)]

    return value


# the weights


def test_shapley_values_are_means_over_all_orders():
    errors = games(4, 2, 3)
    found = shapley(errors)
    assert found.shape == (4, 2, 3)
    for at in np.ndindex(2, 3):
        owed = by_permutations(value_of(errors[(slice(None), *at)]), range(4))
        np.testing.assert_allclose(found[(slice(None), *at)], [owed[i] for i in range(4)])


def test_interactions_are_of_the_pair_as_one_player_less_each_without_the_other():
    """The recursive axiom of Grabisch and Roubens, of values by brute force."""
    errors = games(4, seed=1)
    value, found = value_of(errors), interactions(errors)
    for i, j in itertools.combinations(range(4), 2):
        others = [n for n in range(4) if n not in (i, j)]
        both = by_permutations(value, [(i, j), *others])[(i, j)]
        alone = [by_permutations(value, [n, *others])[n] for n in (i, j)]
        assert found[i, j] == found[j, i] == pytest.approx(both - sum(alone))
    assert (np.diag(found) == 0).all()


@pytest.mark.parametrize("k", range(1, 9))
def test_shares_add_up_to_what_lifting_everything_removes(k):
    errors = games(k, 5)
    np.testing.assert_allclose(shapley(errors).sum(0), errors[0] - errors[-1], atol=1e-13)


def test_sites_that_do_the_same_owe_the_same():
    errors = games(5)
    subset = np.arange(32)
    swapped = (subset & ~0b1010) | (subset >> 1 & 1) << 3 | (subset >> 3 & 1) << 1
    found = shapley(errors + errors[swapped])
    assert found[1] == pytest.approx(found[3], rel=1e-12)
    np.testing.assert_allclose(shapley(errors[swapped])[[1, 3]], shapley(errors)[[3, 1]])


def test_indices_of_a_sum_are_sums_of_indices():
    one, other = games(4, 3, seed=2), games(4, 3, seed=3)
    both = interaction_indices(one + 2 * other)
    np.testing.assert_allclose(both, interaction_indices(one) + 2 * interaction_indices(other))


def test_errors_that_only_add_up_do_not_interact():
    costs = np.array([0.5, 3.0, -1.0, 1e-3])
    subset = np.arange(16)[:, None]
    errors = 0.1 + ((subset >> np.arange(4) & 1 == 0) * costs).sum(-1)
    for found in (shapley(errors), lifted_alone(errors), lowered_alone(errors)):
        np.testing.assert_allclose(found, costs)
    np.testing.assert_allclose(interactions(errors), 0, atol=1e-13)


def test_an_error_that_any_site_of_three_causes_is_owed_in_thirds():
    """Unanimity: it goes away where all of three are lifted; the fourth has no part in it."""
    errors = np.where(np.arange(16) & 0b111 == 0b111, 0.0, 1.0)
    np.testing.assert_allclose(shapley(errors), [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-15)
    np.testing.assert_allclose(lifted_alone(errors), 0)
    np.testing.assert_allclose(lowered_alone(errors), [1, 1, 1, 0])
    index = interaction_indices(errors)
    assert index[0b111] == pytest.approx(1.0)  # the three together, and half of it for each pair
    np.testing.assert_allclose(index[[0b011, 0b101, 0b110]], 0.5)
    np.testing.assert_allclose(index[[0b1001, 0b1111]], 0, atol=1e-14)


def test_lifted_and_lowered_alone_are_the_two_ends():
    errors = games(3, 2)
    np.testing.assert_array_equal(lifted_alone(errors), errors[0] - errors[[1, 2, 4]])
    np.testing.assert_array_equal(lowered_alone(errors), errors[[6, 5, 3]] - errors[7])


@pytest.mark.parametrize("errors", [np.zeros(3), np.zeros(1), np.zeros((0, 4)), 1.0, np.zeros(512)])
def test_only_tables_of_all_subsets_are_taken(errors):
    with pytest.raises(ValueError, match=r"errors must be \[2\^k"):
        shapley(errors)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("function", [shapley, interactions, lifted_alone, lowered_alone])
def test_what_is_not_finite_is_refused(function, bad):
    errors = games(2)
    errors[1] = bad
    with pytest.raises(ValueError, match="finite.*overflow"):
        function(errors)


# errors


def test_rows_that_are_lost_count_as_lost_and_never_as_nan():
    nmse = np.array([[1e-3, 2e-3, np.inf, 3e-3], [np.nan, np.inf, 7.0, 1e-3]], np.float32)
    overflow = np.array([[False, False, True, False], [True, True, False, False]])
    found = errors_of(nmse, overflow)
    np.testing.assert_allclose(found.nmse, [2.5e-3, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(found.overflow, [0.25, 0.5])
    assert capped(nmse).max() == 1.0 and not np.isnan(capped(nmse)).any()


# subsets of sites


def test_bit_i_of_the_index_lifts_site_i_and_what_follows_it():
    recipes = subsets(HMX)
    assert len(recipes) == 256 and recipes[0] is HMX
    for index, recipe in enumerate(recipes):
        lifted = {site for i, site in enumerate(SOFTMAX) if index >> i & 1}
        lifted |= {site for site, leader in FOLLOWS.items() if leader in lifted}
        for site in SITES:
            wanted = FLOAT32 if site in lifted else getattr(HMX, site)
            assert getattr(recipe, site) == wanted, (index, site)
    assert len({r.name for r in recipes}) == 256


def test_what_holds_as_much_already_is_left_alone():
    recipe = Recipe(probs="float16", running_sum="float64")
    one, other = (r.identity() for r in subsets(recipe, ["running_sum"]))
    assert one == other
    wider = subsets(recipe, ["probs"], lifted="e8m12")[1]
    assert wider.probs == format_of("e8m12") and wider.running_sum == recipe.running_sum


def test_an_intermediate_of_its_own_format_is_a_site_of_its_own():
    assert "rescaled_sum" not in rounded_sites(HMX)
    spill = kernels.get("hexagon-hmx-fp16-qf16-spill")
    assert "rescaled_sum" in rounded_sites(spill)
    recipe = subsets(spill, ["running_sum", "rescaled_sum"])[1]
    assert (recipe.running_sum, recipe.rescaled_sum) == (FLOAT32, FLOAT16)


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        (["running_summ"], "did you mean 'running_sum'"),
        (["output", "output"], "different ones"),
        ([], "1 to 8"),
        ([*SOFTMAX, "result"], "1 to 8"),
        (["running_sum", "rescaled_sum"], "are one in hexagon-hmx-fp16.*leave 'rescaled_sum' out"),
    ],
)
def test_sites_that_make_no_game_are_refused(sites, said):
    with pytest.raises(ValueError, match=said):
        subsets(HMX, sites)


def test_the_sites_of_hexagon_are_the_eight_and_the_rest_stands_beside():
    assert chosen_sites(HMX) == (SOFTMAX, ("scale", "running_max", "result"))
    assert chosen_sites(kernels.get("float32")) == ((), ())


@pytest.mark.parametrize("name", kernels.names())
def test_every_kernel_has_a_game_or_rounds_nothing(name):
    recipe = kernels.get(name)
    sites, beside = chosen_sites(recipe)
    assert not set(sites) & set(beside) and len(sites) <= 8
    if sites:
        last = subsets(recipe, sites)[-1]
        assert not set(rounded_sites(last)) & set(sites)


# planted errors


@pytest.fixture(scope="module")
def planted():
    """Errors of a recipe's subsets on 1,024 keys that are normal with V of mean 1."""
    query, stream = regime(
        "biased_v", length=1024, seed=0, heads=1, group=2, queries=8, head_dim=32, dtype="float16"
    )

    def errors(recipe, sites=SOFTMAX):
        curves = jaxattn.error_curves(
            query, stream, None, subsets(recipe, sites), contexts=[1024], metrics=("nmse",)
        )
        rows = len(curves.recipes)
        return errors_of(
            curves.metrics["nmse"].reshape(rows, -1), curves.overflow.reshape(rows, -1)
        )

    return errors


@pytest.mark.parametrize("bad", ["e5m4", "float8_e5m2"])
@pytest.mark.parametrize("site", SOFTMAX)
def test_the_one_bad_site_is_named_among_eight_good_ones(planted, site, bad):
    """All eight round, to 21 bits; one of them to 5 or 3."""
    followers = ("summand", "rescaled_sum")
    good = Recipe(kv_block=64, **dict.fromkeys((*SOFTMAX, *followers), "e8m20"))
    recipe = good.replace(**{site: bad})
    errors = planted(recipe).nmse
    owed, removed = shapley(errors), errors[0] - errors[-1]
    place = SOFTMAX.index(site)
    assert owed[place] / removed >= 0.99
    assert np.abs(np.delete(owed, place)).sum() / removed <= 0.01
    assert errors[0] > 1e-8 > 1e3 * errors[-1]
    alone = lifted_alone(errors)
    assert alone.argmax() == place and alone[place] / removed >= 0.99


@pytest.mark.parametrize(
    "site", [s if s == "inverse" else pytest.param(s, marks=pytest.mark.slow) for s in SOFTMAX]
)
def test_the_one_bad_site_owes_all_where_no_other_rounds(planted, site):
    recipe = Recipe(kv_block=64).replace(**{site: "e5m4"})
    errors = planted(recipe).nmse
    owed, removed = shapley(errors), errors[0] - errors[-1]
    others = np.delete(owed, SOFTMAX.index(site))
    assert removed > 1e-8 and owed[SOFTMAX.index(site)] == pytest.approx(removed, rel=1e-12)
    assert np.abs(others).max() <= 1e-12 * removed


def test_l_and_o_of_equal_values_cancel_and_are_better_lifted_together():
    """Where V is 1 everywhere l and o round alike: o/l is 1, unless one of them is lifted."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 8, 1, 16)).astype(np.float32)
    key = rng.standard_normal((1, 4096, 1, 16)).astype(np.float32)
    recipe = Recipe(
        kv_block=64,
        **dict.fromkeys(("probs", "summand", "rescale"), "float16"),
        **dict.fromkeys(("running_sum", "rescaled_sum", "output"), "float16"),
    )
    curves = jaxattn.error_curves(
        query,
        key,
        np.ones_like(key[..., :4]),
        subsets(recipe, ["running_sum", "output"]),
        contexts=[4096],
        metrics=("nmse", "bias_l"),
    )
    nmse = curves.metrics["nmse"].reshape(4, -1)
    errors = errors_of(nmse, curves.overflow.reshape(4, -1)).nmse
    drift = np.median(np.float64(curves.metrics["bias_l"][0]) ** 2)  # of l alone, then of o alone
    assert errors[0] < 1e-2 * drift and errors[3] < 1e-10
    assert (lifted_alone(errors) < 0).all() and (lowered_alone(errors) > 0).all()
    assert errors[1] == pytest.approx(drift, rel=0.3) == errors[2]
    assert interactions(errors)[0, 1] == pytest.approx(2 * drift, rel=0.3)


@pytest.mark.parametrize(("name", "sign"), [("biased_v", 1), ("gaussian", -1)])
def test_l_and_o_of_hexagon_cancel_where_v_has_a_mean(name, sign):
    """At 131,072 keys, 64 a block, lifting either makes it worse; without a mean it does not."""
    query, stream = regime(
        name, length=2**17, seed=0, heads=1, group=1, queries=16, head_dim=64, dtype="float16"
    )
    recipe = HMX.replace(kv_block=64)
    curves = jaxattn.error_curves(
        query,
        stream,
        None,
        subsets(recipe, ["running_sum", "output"]),
        contexts=[2**17],
        metrics=("nmse",),
    )
    errors = errors_of(curves.metrics["nmse"].reshape(4, -1), curves.overflow.reshape(4, -1)).nmse
    together = interactions(errors)[0, 1] / errors[0]
    if sign > 0:
        assert (lifted_alone(errors) < 0).all() and together > 1
    else:
        assert together < 0.1 and lifted_alone(errors)[0] > 0


def test_overflow_is_owed_by_l():
    """Where all scores are equal, l is the number of keys, and 65,520 no longer an FP16 number."""
    query, stream = regime(
        "flat", length=65600, seed=0, heads=1, group=1, queries=4, head_dim=16, dtype="float16"
    )
    sites = ("probs", "running_sum", "output", "inverse")
    recipes = subsets(HMX.replace(kv_block=64), sites)
    curves = jaxattn.error_curves(
        query, stream, None, recipes, contexts=[8192, 65600], metrics=("nmse",)
    )
    shape = (16, 2, -1)
    errors = errors_of(curves.metrics["nmse"].reshape(shape), curves.overflow.reshape(shape))
    np.testing.assert_allclose(
        shapley(errors.overflow), [[0, 0], [0, 1], [0, 0], [0, 0]], atol=1e-12
    )
    owed = shapley(errors.nmse)
    assert errors.nmse[0, 1] == 1.0 and owed[1, 1] > 0.999  # an output of zeros
    assert owed[2, 0] / (errors.nmse[0, 0] - errors.nmse[-1, 0]) > 0.99  # before it, o alone
