import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn.reference import KEYS_PER_PIECE, State, extend, finish, reference_attention


def draw(seed, B=2, T=3, S=7, N=4, K=2, H=8, D=8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, D)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def by_mpmath(query, key, value, scale, softcap=None, bias=None, sinks=None):
    """Output [T, N, D] and lse [T, N] of one batch entry with 50 digits."""
    (T, N, _), (S, K, D) = query.shape, value.shape
    output, lse = np.empty((T, N, D)), np.empty((T, N))
    with mpmath.workdps(50):
        exact = [[[mpmath.mpf(float(x)) for x in row] for row in rows] for rows in key]
        for t in range(T):
            for n in range(N):
                h = n // (N // K)
                row = [mpmath.mpf(float(x)) for x in query[t, n]]
                s = [mpmath.fdot(row, exact[j][h]) * mpmath.mpf(float(scale)) for j in range(S)]
                if softcap is not None:
                    s = [softcap * mpmath.tanh(x / softcap) for x in s]
                if bias is not None:
                    s = [x + mpmath.mpf(float(bias[n, t, j])) for j, x in enumerate(s)]
                p = [mpmath.exp(x) for x in s]
                l = sum(p) + (0 if sinks is None else mpmath.exp(mpmath.mpf(float(sinks[n]))))
                lse[t, n] = mpmath.log(l)
                for d in range(D):
                    column = [mpmath.mpf(float(x)) for x in value[:, h, d]]
                    output[t, n, d] = mpmath.fdot(p, column) / l
    return output, lse


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_agrees_with_mpmath(dtype):
    query, key, value = draw(1, B=1, T=2, S=9, dtype=dtype)
    bias = np.random.default_rng(2).standard_normal((4, 2, 9))
    sinks = np.array([-1.0, 0.5, 2.0, 0.0])
    output, lse = reference_attention(
        query, key, value, bias, scale=0.3, softcap=2.0, sinks=sinks, return_residual=True
    )
    expected, expected_lse = by_mpmath(
        query[0], key[0], value[0], 0.3, softcap=2.0, bias=bias, sinks=sinks
    )
    assert output.dtype == lse.dtype == np.float64
    assert np.abs(output[0] - expected).max() <= 1e-15 * np.abs(expected).max()
    assert np.abs(lse[0] - expected_lse).max() <= 1e-15 * np.abs(expected_lse).max()


def test_default_scale_and_values_of_another_width_agree_with_mpmath():
    query, key, value = draw(3, B=1, T=2, S=5, N=2, K=1, H=4, D=6)
    output = reference_attention(query, key, value)
    expected, _ = by_mpmath(query[0], key[0], value[0], 0.5)
    assert output.shape == (1, 2, 2, 6)
    assert np.abs(output[0] - expected).max() <= 1e-15 * np.abs(expected).max()


JAX_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "lopsided window": {"local_window_size": (1, 3)},
    "causal window": {"is_causal": True, "local_window_size": (2, 2)},
    "lengths": {"query_seq_lengths": [2, 5], "key_value_seq_lengths": [3, 7]},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("case", JAX_CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_agrees_with_jax_nn(case, heads):
    N, K = heads
    query, key, value = draw(4, T=6, S=7, N=N, K=K)
    options = dict(JAX_CASES[case])
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    ours, lse = reference_attention(query, key, value, return_residual=True, **options)
    theirs, their_lse = jax.nn.dot_product_attention(
        query, key, value, return_residual=True, **options
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    rows = np.isfinite(lse)
    np.testing.assert_allclose(lse[rows], np.asarray(their_lse)[rows], rtol=2e-6, atol=2e-6)
    if "query_seq_lengths" not in options:
        assert rows.all()


@pytest.mark.parametrize("shape", [(2, 4, 3, 7), (1, 1, 3, 7), (2, 1, 1, 7), (1, 4, 3, 1)])
def test_masks_and_biases_broadcast_as_in_jax_nn(shape):
    query, key, value = draw(5)
    rng = np.random.default_rng(6)
    bias = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape) < 0.8
    mask[..., 0, 0] = True
    full = np.broadcast_to(mask, (2, 4, 3, 7)).any(-1).transpose(0, 2, 1)
    ours = reference_attention(query, key, value, bias, mask)
    theirs = jax.nn.dot_product_attention(query, key, value, bias, mask)
    np.testing.assert_allclose(ours[full], np.asarray(theirs)[full], rtol=2e-6, atol=2e-6)
    assert not ours[~full].any()


def test_three_axes_and_jax_arrays():
    query, key, value = draw(7, B=1)
    batched, lse = reference_attention(query, key, value, return_residual=True)
    single, single_lse = reference_attention(
        jnp.asarray(query[0]), jnp.asarray(key[0]), jnp.asarray(value[0]), return_residual=True
    )
    assert single.shape == (3, 4, 8) and single_lse.shape == (3, 4)
    np.testing.assert_array_equal(single, batched[0])
    np.testing.assert_array_equal(single_lse, lse[0])


def test_narrow_dtypes_are_widened_exactly():
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        narrow = draw(8, dtype=dtype)
        wide = [x.astype(np.float64) for x in narrow]
        np.testing.assert_array_equal(reference_attention(*narrow), reference_attention(*wide))


def test_rows_without_keys_are_zero():
    query, key, value = draw(9)
    mask = np.ones((1, 1, 3, 1), bool)
    mask[0, 0, 1] = False
    output, lse = reference_attention(query, key, value, None, mask, return_residual=True)
    assert not output[:, 1].any() and np.isneginf(lse[:, 1]).all()
    assert output[:, 0].any() and np.isfinite(lse[:, [0, 2]]).all()
    bias = np.where(mask, 0.0, -np.inf)
    np.testing.assert_array_equal(reference_attention(query, key, value, bias), output)
    sinks = np.array([0.5, 1.0, -2.0, 0.0])
    output, lse = reference_attention(
        query, key, value, None, mask, sinks=sinks, return_residual=True
    )
    assert not output[:, 1].any()
    np.testing.assert_array_equal(lse[:, 1], np.broadcast_to(sinks, (2, 4)))
    output, lse = reference_attention(query, key[:, :0], value[:, :0], return_residual=True)
    assert not output.any() and np.isneginf(lse).all()


def test_a_sink_equals_one_more_key_of_zero_value():
    query, key, value = (x.astype(np.float64) for x in draw(10, B=1, N=2, K=2))
    sinks = np.array([1.5, -0.5])
    more_key = np.concatenate([key, np.zeros((1, 1, 2, 8))], axis=1)
    more_value = np.concatenate([value, np.zeros((1, 1, 2, 8))], axis=1)
    bias = np.zeros((1, 2, 3, 8))
    bias[..., 7] = sinks[None, :, None]
    np.testing.assert_allclose(
        reference_attention(query, key, value, sinks=sinks),
        reference_attention(query, more_key, more_value, bias),
        rtol=1e-14,
    )


def test_large_scores_do_not_overflow():
    query, key, value = draw(11)
    output = reference_attention(query * 1e6, key, value)
    assert np.isfinite(output).all()
    assert np.isnan(reference_attention(query * np.float32(np.nan), key, value)).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": np.ones((2, 3, 4, 8), int)}, TypeError, "query must hold floats"),
        ({"key": np.ones((2, 7, 2, 8), complex)}, TypeError, "key must hold floats"),
        ({"value": np.ones((2, 7, 2, 8), bool)}, TypeError, "value must hold floats"),
        ({"query": np.ones((2, 3, 4, 8), np.longdouble)}, TypeError, "at most 64 bits"),
        ({"query": np.ones((3, 8))}, ValueError, "3 or 4 axes"),
        ({"query": np.ones((2, 3, 3, 8))}, ValueError, "multiple of key/value heads, got 3 and 2"),
        ({"key": np.ones((2, 7, 2, 4))}, ValueError, "key must be"),
        ({"value": np.ones((2, 6, 2, 8))}, ValueError, "value must be"),
        ({"mask": np.ones((1, 1, 3, 7))}, TypeError, "mask must be bool"),
        ({"mask": np.ones((3, 6), bool)}, ValueError, "mask must be broadcastable"),
        ({"bias": np.ones((3, 4, 3, 7))}, ValueError, "bias must be broadcastable"),
        ({"bias": np.ones((1, 1, 3, 7), int)}, TypeError, "bias must hold floats"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
        ({"softcap": 0.0}, ValueError, "softcap must be"),
        ({"sinks": np.ones(3)}, ValueError, r"sinks must be \[4\]"),
        ({"query_seq_lengths": [1]}, ValueError, "query_seq_lengths"),
        ({"key_value_seq_lengths": [1, -1]}, ValueError, "not negative"),
        ({"key_value_seq_lengths": [1.0, 2.0]}, TypeError, "integers"),
        ({"local_window_size": (-1, 0)}, ValueError, "local_window_size"),
    ],
)
def test_refuses_bad_arguments(change, error, words):
    query, key, value = draw(12)
    with pytest.raises(error, match=words):
        reference_attention(**({"query": query, "key": key, "value": value} | change))


def stream(query, key, value, cuts, scale):
    """reference_attention of one batch entry through extend and finish, pieces ending at cuts."""
    (T, N, H), K = query.shape, key.shape[1]
    rows = (query.astype(np.float64) * scale).reshape(T, K, N // K, H)
    rows = np.ascontiguousarray(rows.transpose(1, 0, 2, 3).reshape(K, T * (N // K), H))
    state = None
    for start, stop in zip([0, *cuts], [*cuts, key.shape[0]], strict=True):
        state = extend(state, rows, key[start:stop], value[start:stop])
    output, lse = finish(state)
    output = output.reshape(K, T, N // K, -1).transpose(1, 0, 2, 3).reshape(T, N, -1)
    return output, lse.reshape(K, T, N // K).transpose(1, 0, 2).reshape(T, N)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 2 * KEYS_PER_PIECE + 77), max_size=5).map(sorted),
    seed=st.integers(0, 100),
    scale=st.sampled_from([0.01, 0.35, 3.0]),
)
def test_streaming_agrees_with_direct(cuts, seed, scale):
    S = 2 * KEYS_PER_PIECE + 77
    query, key, value = draw(seed, B=1, T=3, S=S, N=4, K=2, H=8, D=5, dtype=np.float16)
    output, lse = stream(query[0], key[0], value[0], cuts, scale)
    direct, direct_lse = reference_attention(query, key, value, scale=scale, return_residual=True)
    error = np.linalg.norm(output - direct[0], axis=-1)
    assert (error <= 1e-13 * np.linalg.norm(direct[0], axis=-1)).all()
    np.testing.assert_allclose(lse, direct_lse[0], rtol=1e-13)


def test_extend_leaves_its_state_alone_and_an_empty_piece_changes_nothing():
    query, key, value = draw(13, B=1, S=50, N=2, K=1)
    rows = np.ascontiguousarray(query[0].astype(np.float64).transpose(1, 0, 2).reshape(1, 6, 8))
    first = extend(None, rows, key[0], value[0])
    kept = State(*(x.copy() for x in first))
    extend(first, rows, key[0], value[0])
    again = extend(first, rows, key[0, :0], value[0, :0])
    for before, now, after in zip(kept, first, again, strict=True):
        np.testing.assert_array_equal(before, now)
        np.testing.assert_array_equal(before, after)
    output, lse = finish(extend(None, rows, key[0, :0], value[0, :0]))
    assert not output.any() and np.isneginf(lse).all()


def test_extend_refuses_what_does_not_fit():
    query, key, value = draw(14, B=1, N=2, K=2)
    rows = query[0].astype(np.float64).transpose(1, 0, 2)
    with pytest.raises(TypeError, match="float64"):
        extend(None, rows.astype(np.float32), key[0], value[0])
    with pytest.raises(ValueError, match="key and value must be"):
        extend(None, rows, key[0, :, :1], value[0])
    with pytest.raises(TypeError, match="key must hold floats"):
        extend(None, rows, key[0].astype(int), value[0])
