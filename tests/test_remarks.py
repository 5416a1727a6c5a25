"""remarks: wrong causality and layout are found, in outputs of the float64 reference."""

import math

import numpy as np
import pytest

from jaxattn.reference import reference_attention
from jaxattn.remarks import better_reading, remarks_on

RNG = np.random.default_rng(3)


def draw(T, S, N=4, K=2, B=1):
    """Values of mean 1, so that only the first of many queries are far off where causality is."""
    query = RNG.standard_normal((B, T, N, 16))
    key, value = RNG.standard_normal((2, B, S, K, 16)) + np.array([0, 1]).reshape(2, 1, 1, 1, 1)
    return query, key, value


def attend(query, key, value, causal):
    T, S = query.shape[1], key.shape[1]
    mask = np.tri(T, S, S - T, dtype=bool) if causal else None
    return reference_attention(query, key, value, mask=mask).astype(np.float16)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("true", [False, True])
@pytest.mark.parametrize(("T", "S", "exchanged"), [(300, 300, 0), (20, 70, 0), (300, 300, 1)])
def test_the_reading_that_was_not_given_is_found(T, S, exchanged, given, true):
    arrays = draw(T, S, K=4, B=2)
    arrays = (*arrays, attend(*arrays, true))
    if exchanged:
        arrays = [np.swapaxes(x, 1, 2) for x in arrays]
    told = better_reading(*arrays, scale=None, causal=given)
    if not exchanged and given == true:
        assert told is None
        return
    assert ("with head and token exchanged" in told) == exchanged
    assert ("without --causal" in told) == (given and not true)
    assert (("with --causal") in told) == (true and not given)
    assert ("three axes are read as [head, token, dim]" in told) == exchanged
    assert told.endswith("?") == (not exchanged)


@pytest.mark.parametrize("factor", [0.25, math.log2(math.e), 0.5])
def test_another_scale_is_found(factor):
    query, key, value = draw(8, 60)
    output = attend(query * factor, key, value, False)
    told = better_reading(query, key, value, output, scale=None, causal=False)
    assert told.startswith(f"with --scale {0.25 * factor:.6g} ") and told.endswith("its scale?")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", ["last key of each query", "first key"])
def test_a_key_that_is_lost_is_found(keys, causal):
    query, key, value = draw(8, 60)
    mask = np.tri(8, 60, 52, dtype=bool) if causal else np.ones((8, 60), bool)
    if keys == "first key":
        mask[:, 0] = False
    else:
        mask &= np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
    output = reference_attention(query, key, value, mask=mask).astype(np.float16)
    told = better_reading(query, key, value, output, scale=None, causal=causal)
    assert told.startswith(f"without the {keys} ") and told.endswith("lose it?")


@pytest.mark.parametrize(("keys", "multiple"), [(60, 32), (200, 256), (1000, 32), (1020, 64)])
def test_padding_that_no_mask_hides_is_found(keys, multiple):
    query, key, value = draw(8, keys)
    padded = [np.pad(x, [(0, 0), (0, -keys % multiple), (0, 0), (0, 0)]) for x in (key, value)]
    output = reference_attention(query, *padded).astype(np.float16)
    told = better_reading(query, key, value, output, scale=None, causal=False)
    assert told.startswith(f"with {-keys % multiple} keys of zeros behind the last ")
    assert told.endswith("mask its padding?")
    output = attend(query, key, value, False)
    assert better_reading(query, key, value, output, scale=None, causal=False) is None


def test_query_heads_that_read_the_wrong_kv_head_are_found():
    query, key, value = draw(8, 60, N=6, K=3)
    order = np.arange(6) % 3
    output = attend(query, key[:, :, order], value[:, :, order], False)
    told = better_reading(query, key, value, output, scale=None, causal=False)
    assert told.startswith("with query head h on KV head h % K ")
    assert better_reading(query, key, value, output * 0, scale=None, causal=False) is None


def test_the_numbers_are_those_of_the_worst_query():
    arrays = draw(8, 40)
    output, wrong = attend(*arrays, True), attend(*arrays, False)
    nmse = ((output - wrong) ** 2).sum(-1) / (wrong.astype(float) ** 2).sum(-1)
    told = better_reading(*arrays, output, scale=None, causal=False)
    assert float(told.partition(", not ")[2].partition(":")[0]) == pytest.approx(nmse.max(), 0.06)


def test_no_other_reading_is_believed_without_reason():
    query, key, value = draw(30, 30)
    exact = attend(query, key, value, False)
    noise = RNG.standard_normal(exact.shape)
    for output in (exact + 0.05 * noise, noise, 0 * noise, -exact):  # a poor kernel, and none
        assert better_reading(query, key, value, output, scale=None, causal=False) is None
    one = draw(1, 30)  # a query that sees all keys either way
    assert better_reading(*one, attend(*one, True) * 2, scale=None, causal=False) is None
    more = draw(9, 5)  # queries that causality would leave without a key
    assert better_reading(*more, attend(*more, False) * 2, scale=None, causal=False) is None


def test_heads_in_another_order_are_named_though_v_has_a_mean():
    query, key, value = draw(20, 300, N=4, K=2)
    ideal = attend(query, key, 4 + value, False).astype(float)
    recipe = (ideal + 1e-4 * RNG.standard_normal(ideal.shape))[None]
    observed = ideal[:, :, [1, 0, 2, 3]]
    assert np.sum((observed - ideal) ** 2) < 0.01 * np.sum(ideal**2)
    told = remarks_on(observed, ideal, recipe, None)
    assert told[0] == "output of another head: head 0 (head 1's), 1 (head 0's)"
    assert told[1].startswith(
        "output of head 0, 1: over 30 times the squared error of every recipe"
    )
    assert remarks_on(recipe[0], ideal, recipe, None) == []
    overflown = np.stack([recipe[0], np.full(ideal.shape, np.inf)])
    assert remarks_on(observed, ideal, overflown, None) == told
    scaled = np.where(np.arange(4)[:, None] == 2, 1.2, 1) * ideal
    assert remarks_on(scaled, ideal, recipe, None)[0].startswith("output of head 2: over 30 times")


def test_first_queries_that_are_wrong_do_not_drown():
    arrays = draw(400, 400)
    output, ideal = attend(*arrays, True).astype(float), attend(*arrays, False).astype(float)
    assert np.sum((output - ideal) ** 2) < 0.03 * np.sum(ideal**2)
    told = remarks_on(output, ideal, ideal[None], None)[0]
    assert "all heads: further from float64" in told and "of 1,600 rows, queries 0 to " in told


def test_queries_that_no_rounding_explains_are_counted_by_head():
    ideal = np.ones((1, 10, 3, 4)) + np.arange(4)
    observed = ideal.copy()
    observed[0, 2:4, 1] *= -1
    told = remarks_on(observed, ideal, ideal[None], None)
    assert told[0] == (
        "output of head 1: further from float64 than rounding goes in 2 of 10 rows, queries 2 to 3"
    )
    assert told[1].startswith(
        "check --scale, --causal (the last query sees all keys), the order of "
    )
    assert remarks_on(observed, ideal, observed[None], None) == []  # a recipe errs like it
    told = remarks_on(-ideal, ideal, ideal[None], "so it is")
    assert told == ["output of all heads: further from float64 than rounding goes", "so it is"]
    assert remarks_on(ideal, ideal, ideal[None] * np.nan, None) == []
    observed[0, :, 2] = 0
    assert remarks_on(observed, ideal, ideal[None], None)[0].startswith(
        "output of head 2: all zero"
    )


def test_one_number_throughout_is_right_where_v_is_constant():
    query, key, value = draw(5, 40)
    exact = attend(query, key, np.ones_like(value), False).astype(float)
    ideal = exact + 1e-16 * RNG.standard_normal(exact.shape)
    assert not remarks_on(exact, ideal, exact[None], None)
    assert "one number throughout" in remarks_on(exact, ideal + value.mean(), exact[None], None)[0]
