import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import __main__ as cli
from jaxattn.inputs import DTYPES, PAGE, RANGES, REGIMES, Stream, regime

SMALL = {"heads": 2, "queries": 3, "head_dim": 8}


def scores(query, stream):
    """Scaled scores [T, N, S] in float64; one query head per key/value head."""
    key, _ = stream.blocks(0, stream.length)
    scale = 1 / np.sqrt(stream.head_dim)
    return np.einsum("tnh,snh->tns", query[0].astype(float), key.astype(float)) * scale


@pytest.mark.parametrize("name", REGIMES)
def test_shapes_and_dtypes(name):
    query, stream = regime(name, length=100, seed=1, heads=2, queries=3, group=4, head_dim=16)
    key, value = stream.blocks(10, 60)
    assert isinstance(stream, Stream)
    assert query.shape == (1, 3, 8, 16) and key.shape == value.shape == (50, 2, 16)
    assert query.dtype == key.dtype == value.dtype == np.float16
    assert (stream.length, stream.heads, stream.head_dim, stream.value_dim) == (100, 2, 16, 16)
    assert stream.label == name and np.isfinite(key).all() and np.isfinite(value).all()
    np.testing.assert_array_equal(stream.query, query)
    json.dumps(stream.identity)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(REGIMES)),
    cuts=st.lists(st.integers(0, 2 * PAGE + 100), max_size=4).map(sorted),
    start=st.integers(0, 2 * PAGE + 100),
)
def test_bits_do_not_depend_on_the_pieces(name, cuts, start):
    length = 2 * PAGE + 100
    whole = regime(name, length=length, seed=3, **SMALL)[1].blocks(0, length)
    _, stream = regime(name, length=length, seed=3, **SMALL)
    edges = [start, *(c for c in cuts if c > start), length]
    pieces = [stream.blocks(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    for tensor in (0, 1):
        got = np.concatenate([piece[tensor] for piece in pieces])
        np.testing.assert_array_equal(got, whole[tensor][start:])


@pytest.mark.parametrize("name", REGIMES)
def test_a_longer_context_only_adds_keys_unless_the_regime_knows_the_length(name):
    short = regime(name, length=PAGE + 5, seed=3, **SMALL)
    long = regime(name, length=3 * PAGE, seed=3, **SMALL)
    np.testing.assert_array_equal(short[0], long[0])
    same = all(
        np.array_equal(a, b)
        for a, b in zip(short[1].blocks(0, PAGE), long[1].blocks(0, PAGE), strict=True)
    )
    assert same == (not REGIMES[name].knows_length)
    assert ("length" in short[1].identity) == REGIMES[name].knows_length


def test_seeds_and_tensors_and_pages_differ_and_repeat():
    def draw(seed):
        query, stream = regime("gaussian", length=2 * PAGE, seed=seed, **SMALL)
        key, value = stream.blocks(0, 2 * PAGE)
        return key[:PAGE], key[PAGE:], value[:PAGE], value[PAGE:]

    arrays = [*draw(0), *draw(1), *draw(2**40)]
    for i, a in enumerate(arrays):
        assert all(np.mean(a == b) < 0.01 for b in arrays[i + 1 :])
    for a, b in zip(draw(5), draw(5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_queries_of_a_shorter_list_are_the_first_ones():
    few = regime("gaussian", length=1, seed=0, **SMALL)[0]
    many = regime("gaussian", length=1, seed=0, **SMALL | {"queries": 9})[0]
    np.testing.assert_array_equal(few, many[:, :3])


def test_known_draws():
    """Pins the bits: a change here changes every stored result, so change GENERATOR with it."""
    query, stream = regime("gaussian", length=2 * PAGE, seed=0, heads=1, queries=1, head_dim=2)
    key, value = stream.blocks(PAGE, PAGE + 1)
    assert query.ravel().tolist() == PINNED["query"]
    assert key.ravel().tolist() == PINNED["key"]
    assert value.ravel().tolist() == PINNED["value"]


PINNED: dict[str, list[float]] = {
    "query": [0.31884765625, 0.74462890625],
    "key": [0.0203857421875, 0.312255859375],
    "value": [0.7587890625, -0.7431640625],
}


@pytest.mark.parametrize("logit_sd", [0.3, 1.0, 4.0])
def test_gaussian(logit_sd):
    query, stream = regime(
        "gaussian", length=4000, seed=2, heads=1, queries=64, head_dim=64, logit_sd=logit_sd
    )
    key, value = (x.astype(float) for x in stream.blocks(0, 4000))
    assert np.std(scores(query, stream)) == pytest.approx(logit_sd, rel=0.03)
    for x in (key, value):
        assert abs(x.mean()) < 0.01 and x.std() == pytest.approx(1.0, rel=0.01)


def test_flat_scores_are_all_zero():
    query, stream = regime("flat", length=100, seed=2, **SMALL)
    assert not query.any() and not np.signbit(query).any()
    assert stream.blocks(0, 100)[1].std() == pytest.approx(1.0, rel=0.1)


def test_biased_v_is_gaussian_with_another_mean():
    key, value = regime("gaussian", length=500, seed=2, dtype="float32", **SMALL)[1].blocks(0, 500)
    _, stream = regime("biased_v", length=500, seed=2, dtype="float32", value_mean=3.0, **SMALL)
    biased_key, biased_value = stream.blocks(0, 500)
    np.testing.assert_array_equal(key, biased_key)
    np.testing.assert_array_equal(value + np.float32(3.0), biased_value)
    assert stream.label == "biased_v(value_mean=3)"


def test_sink():
    query, stream = regime("sink", length=300, seed=2, logit_sd=0.05, sink_logit=7.0, **SMALL)
    s = scores(query, stream)
    np.testing.assert_allclose(s[..., :4], 7.0, atol=0.6)
    np.testing.assert_allclose(s[..., 4:], 0.0, atol=0.6)


def test_needle():
    query, stream = regime("needle", length=1000, seed=2, logit_sd=0.05, depth=0.25, **SMALL)
    s = scores(query, stream)
    assert (s.argmax(-1) == 250).all()
    np.testing.assert_allclose(s[..., 250], 12.0, atol=0.6)
    _, value = stream.blocks(0, 1000)
    assert (value[250] == 4.0).all() and not (value[[249, 251]] == 4.0).all()
    last = regime("needle", length=10, seed=2, depth=1.0, **SMALL)[1].blocks(9, 10)[1]
    assert (last == 4.0).all()


def test_rising_max():
    query, stream = regime("rising_max", length=2000, seed=2, logit_sd=0.05, rise=20.0, **SMALL)
    s = scores(query, stream)
    line = 20.0 * np.arange(2000) / 2000
    np.testing.assert_allclose(s, np.broadcast_to(line, s.shape), atol=0.6)
    peak = np.maximum.accumulate(s, axis=-1)
    assert (peak[..., 99::100][..., 1:] > peak[..., 99::100][..., :-1]).all()


def test_outliers_follow_the_mixture_of_flash_attention_3():
    query, stream = regime(
        "outliers", length=2 * PAGE, seed=2, heads=2, queries=2048, head_dim=64, dtype="float32"
    )
    for x in (query, *stream.blocks(0, 2 * PAGE)):
        x = x.astype(float).ravel()
        assert x.dtype == np.float64 and abs(x.mean()) < 0.01
        assert x.var() == pytest.approx(1.0 + 0.001 * 100.0, rel=0.04)
        # P(|x| > 5) is the outliers' alone: 0.001 * P(|N(0, 101)| > 5) = 0.001 * 0.6188.
        assert np.mean(np.abs(x) > 5.0) == pytest.approx(0.6188e-3, rel=0.15)


def test_uniform01():
    query, stream = regime("uniform01", length=5000, seed=2, dtype="float32", **SMALL)
    for x in stream.blocks(0, 5000):
        assert x.min() >= 0.0 and x.max() < 1.0
        assert x.mean() == pytest.approx(0.5, abs=0.01)
    assert query.min() >= 0.0


def test_narrow_dtypes_are_the_float32_draws_rounded():
    wide = regime("gaussian", length=100, seed=2, dtype=np.float32, **SMALL)[1].blocks(0, 100)
    for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        narrow = regime("gaussian", length=100, seed=2, dtype=dtype, **SMALL)[1].blocks(0, 100)
        named = regime("gaussian", length=100, seed=2, dtype=name, **SMALL)[1].blocks(0, 100)
        for a, b, c in zip(wide, narrow, named, strict=True):
            assert b.dtype == DTYPES[name]
            np.testing.assert_array_equal(a.astype(dtype), b)
            np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("name", REGIMES)
def test_extreme_parameters_stay_finite_in_float16(name):
    extremes = {k: RANGES[k][1] for k in REGIMES[name].parameters}
    query, stream = regime(name, length=300, seed=2, **SMALL, **extremes)
    for x in (query, *stream.blocks(0, 300)):
        assert np.isfinite(x).all()


def test_blocks_cannot_be_written_and_may_be_empty():
    _, stream = regime("gaussian", length=PAGE + 1, seed=0, **SMALL)
    for start, stop in ((0, 5), (0, PAGE + 1)):
        with pytest.raises(ValueError, match="read-only"):
            stream.blocks(start, stop)[0][0] = 0
    assert all(x.shape == (0, 2, 8) for x in stream.blocks(PAGE, PAGE))


@pytest.mark.parametrize("span", [(-1, 5), (5, 4), (0, 11)])
def test_blocks_refuse_a_range_outside_the_stream(span):
    _, stream = regime("gaussian", length=10, seed=0, **SMALL)
    with pytest.raises(ValueError, match="not within the stream of 10 keys"):
        stream.blocks(*span)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"name": "gausian"}, ValueError, "did you mean 'gaussian'"),
        ({"logit_sdd": 1.0}, ValueError, "did you mean 'logit_sd'"),
        ({"name": "uniform01", "logit_sd": 1.0}, ValueError, "known: none"),
        ({"logit_sd": np.nan}, ValueError, r"logit_sd must lie in \[0, 1000\], got nan"),
        ({"logit_sd": -1.0}, ValueError, "logit_sd"),
        ({"logit_sd": "1"}, TypeError, "logit_sd must be a number"),
        ({"name": "needle", "depth": 1.5}, ValueError, "depth"),
        ({"name": "sink", "sinks": 2.5}, ValueError, "sinks must be a whole number"),
        ({"dtype": "float61"}, ValueError, "unknown dtype 'float61'; did you mean 'float16'"),
        ({"dtype": np.int32}, ValueError, "unknown dtype 'int32'"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"length": 2.5}, TypeError, "length must be an integer"),
        ({"heads": True}, TypeError, "heads must be an integer"),
        ({"group": 0}, ValueError, "group must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"head_dim": 2**17}, ValueError, "head_dim"),
    ],
)
def test_refuses_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        regime(**({"name": "gaussian", "length": 10, "seed": 0} | change))


def test_identity_tells_streams_apart():
    _, stream = regime("needle", length=10, seed=0, **SMALL)
    seen = {json.dumps(stream.identity, sort_keys=True)}
    for change in (
        {"name": "gaussian", "parameters": dict(REGIMES["gaussian"].parameters)},
        {"length": 11},
        {"seed": 1},
        {"heads": 3},
        {"queries": 4},
        {"group": 2},
        {"head_dim": 4},
        {"dtype": "float32"},
        {"parameters": dict(stream.parameters) | {"depth": 0.1}},
    ):
        other = dataclasses.replace(stream, **change)
        seen.add(json.dumps(other.identity, sort_keys=True))
    assert len(seen) == 10


def test_help_names_all_regimes():
    assert cli.REGIMES == f"Regimes A,B of inputs: {', '.join(REGIMES)}."
