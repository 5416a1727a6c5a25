import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn.metrics import METRICS, check_names, measure

RELATIVE = ["nmse", "rel_l2", "rel_l1", "cosine", "bias_o"]
INF_IF_NOT_FINITE = ["nmse", "nmse_llama", "rmse", "rel_l2", "rel_l1", "max_abs", "ulps"]


def rows(seed=0, shape=(2, 3, 4), D=16, noise=1e-3):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((*shape, D))
    reference_lse = rng.standard_normal(shape) + 5.0
    output = (reference + noise * rng.standard_normal(reference.shape)).astype(np.float32)
    lse = (reference_lse + noise * rng.standard_normal(shape)).astype(np.float32)
    return output, lse, reference, reference_lse


def test_by_hand():
    reference, output = np.array([[3.0, -4.0]]), np.array([[3.0, -3.0]])
    got = measure(
        list(METRICS), output, np.array([np.log(3.0)]), reference, np.array([np.log(2.0)])
    )
    expected = {
        "nmse": 1 / 25,
        "nmse_llama": 1 / 18,
        "rmse": np.sqrt(0.5),
        "rel_l2": 1 / 5,
        "rel_l1": 1 / 7,
        "max_abs": 1.0,
        "cosine": 21 / (5 * np.sqrt(18)),
        "ulps": 256.0,  # 4 lies in [4, 8), where float16's step is 2^-8
        "lse_error": np.log(1.5),
        "bias_l": 0.5,
        "bias_o": 21 / 25 - 1,
        "nonfinite": 0.0,
    }
    assert set(got) == set(METRICS) == set(expected)
    for name, value in expected.items():
        assert got[name].shape == (1,) and got[name].dtype == np.float32
        assert got[name][0] == pytest.approx(value, rel=1e-6), name


def test_every_row_is_measured_by_itself():
    output, lse, reference, reference_lse = rows()
    names = [name for name in METRICS if name != "nmse_llama"]
    got = measure(names, output, lse, reference, reference_lse)
    for index in np.ndindex(2, 3, 4):
        one = measure(names, output[index], lse[index], reference[index], reference_lse[index])
        for name in names:
            assert got[name].shape == (2, 3, 4)
            assert got[name][index] == pytest.approx(float(one[name]), rel=1e-6)


def test_nmse_llama_sums_over_the_queries_of_a_head():
    output, lse, reference, reference_lse = rows()
    got = measure(["nmse_llama"], output, lse, reference, reference_lse)["nmse_llama"]
    error = ((output.astype(float) - reference) ** 2).sum(axis=(1, 3))
    expected = error / (output.astype(float) ** 2).sum(axis=(1, 3))
    assert got.shape == (2, 3, 4)
    np.testing.assert_allclose(got, np.broadcast_to(expected[:, None], got.shape), rtol=1e-6)


@given(st.integers(0, 2**16), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]))
def test_relative_metrics_do_not_depend_on_the_scale(seed, factor):
    output, lse, reference, reference_lse = rows(seed, shape=(3,))
    output = output.astype(np.float64)
    a = measure(RELATIVE, output, lse, reference, reference_lse)
    b = measure(RELATIVE, output * factor, lse, reference * factor, reference_lse)
    for name in RELATIVE:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-9)


@given(st.floats(-0.5, 0.5), st.integers(0, 1000))
def test_a_common_factor_is_a_bias_that_cosine_does_not_see(bias, seed):
    _, lse, reference, _ = rows(seed, shape=(3,))
    lse = lse.astype(np.float64)
    got = measure(["bias_o", "bias_l", "cosine", "rel_l2"], reference * (1 + bias),
                  lse + np.log1p(bias), reference, lse)  # fmt: skip
    np.testing.assert_allclose(got["bias_o"], bias, atol=1e-7)
    np.testing.assert_allclose(got["bias_l"], bias, atol=1e-7)
    np.testing.assert_allclose(got["rel_l2"], abs(bias), atol=1e-7)
    np.testing.assert_allclose(got["cosine"], 1.0, atol=1e-7)


def test_differences_are_taken_in_float64():
    reference = np.full((1, 4), 1.0 + 2.0**-40)
    output = np.ones((1, 4), np.float32)
    lse = np.zeros(1)
    got = measure(["max_abs", "nmse", "bias_o"], output, lse, reference, lse)
    assert got["max_abs"][0] == np.float32(2.0**-40)
    assert got["nmse"][0] == pytest.approx(2.0**-80, rel=1e-6)
    assert got["bias_o"][0] == pytest.approx(-(2.0**-40), rel=1e-6)


def test_ulps_of_rounding_to_float16_are_at_most_half():
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((500, 8)) * 2.0 ** rng.integers(-26, 15, (500, 1))
    output, lse = reference.astype(np.float16), np.zeros(500)
    got = measure(["ulps"], output, lse, reference, lse)["ulps"]
    assert 0.4 < got.max() <= 0.5
    up = np.nextafter(output, np.float16(np.inf))
    got = measure(["ulps"], up, lse, output.astype(float), lse)["ulps"]
    assert (got <= 1.0).all() and (got >= 0.5).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_rows_that_are_not_finite(bad):
    output, lse, reference, reference_lse = rows(shape=(2, 3, 4))
    output[1, 2, 3, 5], lse[1, 2, 3] = bad, bad
    got = measure(list(METRICS), output, lse, reference, reference_lse)
    for name in INF_IF_NOT_FINITE:
        assert got[name][1, 2, 3] == np.inf
    assert np.isnan(got["cosine"][1, 2, 3]) and np.isnan(got["bias_o"][1, 2, 3])
    assert got["lse_error"][1, 2, 3] == np.inf
    expected = {np.inf: np.inf, -np.inf: -1.0}.get(bad, np.nan)
    np.testing.assert_equal(got["bias_l"][1, 2, 3], np.float32(expected))
    assert got["nonfinite"].sum() == got["nonfinite"][1, 2, 3] == 1.0
    for name, values in got.items():
        others = values[0] if name == "nmse_llama" else np.delete(values.ravel(), -1)
        assert np.isfinite(others).all(), name


def test_rows_without_keys():
    zero, empty = np.zeros((1, 4)), np.array([-np.inf])
    got = measure(list(METRICS), zero, empty, zero, empty)
    assert got.pop("cosine")[0] == 1.0
    assert all(values[0] == 0.0 for values in got.values())
    got = measure(["nmse", "rel_l1", "bias_l", "cosine"], zero + 1, zero[:, 0], zero, empty)
    assert got["nmse"][0] == got["rel_l1"][0] == got["bias_l"][0] == np.inf


def test_float32_overflow_is_silent():
    got = measure(["nmse"], np.full((1, 2), 1e38), np.zeros(1), np.full((1, 2), 1e-38), np.zeros(1))
    assert got["nmse"][0] == np.inf


def test_one_reference_serves_several_recipes_of_any_dtype():
    output, lse, reference, reference_lse = rows(shape=(3, 2))
    several = np.stack([output, output]).astype(ml_dtypes.bfloat16)
    got = measure(["nmse", "bias_l"], several, np.stack([lse, lse]), reference, reference_lse)
    assert got["nmse"].shape == (2, 3, 2) and (got["nmse"] > 0).all()
    np.testing.assert_array_equal(got["nmse"][0], got["nmse"][1])


def test_refuses_bad_arguments():
    arguments = rows()
    with pytest.raises(ValueError, match="unknown metric 'nsme'; did you mean 'nmse'"):
        measure(["nsme"], *arguments)
    with pytest.raises(ValueError, match="got the string 'nmse'"):
        check_names("nmse")
    with pytest.raises(ValueError, match="lse"):
        measure(["nmse"], arguments[0], arguments[1][0], *arguments[2:])
    with pytest.raises(ValueError, match="broadcast"):
        measure(["nmse"], *arguments[:2], arguments[2][..., :3], arguments[3])


def test_a_reference_that_the_queries_share():
    output, lse, reference, reference_lse = rows(shape=(5, 2, 3, 4))
    names = ["nmse", "nmse_llama"]
    shared = reference[0, 0, 0], reference_lse[0, 0, 0]  # [N, D] and [N]
    got = measure(names, output, lse, *shared)
    spread = (np.broadcast_to(x, like.shape) for x, like in zip(shared, (output, lse), strict=True))
    for name, expected in measure(names, output, lse, *spread).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6)


def test_lists():
    got = measure(["nmse", "bias_l"], [[1.0, 2.0]], [0.5], [[1.0, 1.0]], [0.5])
    assert got["nmse"].tolist() == [0.5] and got["bias_l"].tolist() == [0.0]
