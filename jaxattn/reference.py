"""Float64 attention on the host, in NumPy: the judge of every recipe, sharing no code with them.

`reference_attention` holds all scores of one head at once; `extend` and `finish` are the same
function as a stream of pieces of keys, for error curves. Both compute
softmax(softcap(scale * Q K^T) + bias) V with every input widened exactly to float64.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Map = Callable[..., Iterable[Any]]

KEYS_PER_PIECE = 1024  # of one head: they and their scores stay in cache; memory is flat in S


@overload
def reference_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    return_residual: Literal[False] = False,
) -> Float64: ...


@overload
def reference_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    return_residual: Literal[True],
) -> tuple[Float64, Float64]: ...


def reference_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    return_residual: bool = False,
) -> Float64 | tuple[Float64, Float64]:
    """Attention in float64 with the arguments and semantics of `jax.nn.dot_product_attention`.

    Args:
      query: [B, T, N, H] or [T, N, H]; any float dtype of at most 64 bits, widened exactly.
      key: [B, S, K, H] or [S, K, H], N a multiple of K; query head n reads key head n // (N // K).
      value: [B, S, K, D] or [S, K, D]; D may differ from H, dtypes may differ from each other.
      bias: floats broadcastable to [B, N, T, S], added after scale and softcap; -inf masks.
      mask: bools broadcastable to [B, N, T, S], True = attend.
      scale: multiplies the scores; 1/sqrt(H) if None.
      is_causal: query t attends to keys 0..t (aligned at the first key, as in jax.nn).
      local_window_size: (left, right): query t attends to keys t - left .. t + right.
      query_seq_lengths: integers [B]; rows at or past the length are 0 with lse -inf.
      key_value_seq_lengths: integers [B]; keys at or past the length are masked.
      softcap: scores become softcap * tanh(scores / softcap).
      sinks: floats [N]: one more logit per head whose value is zero (unscaled, uncapped).
      return_residual: also return the log-sum-exp, sinks included.

    Returns:
      float64 [B, T, N, D] (or [T, N, D]); with return_residual also lse [B, T, N] in nats.
      A row with no key to attend to is 0, and its lse is -inf (its sink, if there are sinks);
      jax.nn gives the mean of the values there. Non-finite inputs propagate.

    Raises:
      TypeError: an integer, complex, bool or over-wide dtype where floats are due.
      ValueError: shapes that do not fit, or a parameter out of range.
    """
    q, k, v = _widen("query", query), _widen("key", key), _widen("value", value)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim not in (3, 4):
            raise ValueError(f"{name} must have 3 or 4 axes ([B,] T|S, heads, dim), got {x.shape}")
    batched = q.ndim == 4
    q, k, v = (x if x.ndim == 4 else x[None] for x in (q, k, v))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    D = v.shape[3]
    if k.shape[0] != B or k.shape[3] != H or H == 0:
        raise ValueError(f"key must be [{B}, S, K, {H}] to fit the query {q.shape}, got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"value must be [{B}, {S}, {K}, D] to fit the key, got {v.shape}")
    if K == 0 or N % K:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {N} and {K}")
    scale = 1.0 / np.sqrt(H) if scale is None else float(scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not (np.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and positive (or None), got {softcap}")
    sink = None if sinks is None else _widen("sinks", sinks)
    if sink is not None and sink.shape != (N,):
        raise ValueError(f"sinks must be [{N}] (one logit per query head), got {sink.shape}")
    biases = None if bias is None else _broadcast("bias", _widen("bias", bias), (B, N, T, S))
    masks = None if mask is None else _broadcast("mask", _bools(mask), (B, N, T, S))
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, B, T)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, B, S)
    visible = _positions(T, S, is_causal, local_window_size)

    output = np.zeros((B, T, N, D))
    lse = np.full((B, T, N), -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        for b, n in np.ndindex(B, N):
            t, s, head = q_lengths[b], kv_lengths[b], n // (N // K)
            scores = scale * (q[b, :t, n] @ k[b, :s, head].T)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if biases is not None:
                scores = scores + biases[b, n, :t, :s]
            if masks is not None:
                scores[~masks[b, n, :t, :s]] = -np.inf
            if visible is not None:
                scores[~visible[:t, :s]] = -np.inf
            seed = None if sink is None else float(sink[n])
            output[b, :t, n], lse[b, :t, n] = _softmax_times(scores, v[b, :s, head], seed)
    if not batched:
        output, lse = output[0], lse[0]
    return (output, lse) if return_residual else output


def _softmax_times(scores: Float64, value: Float64, sink: float | None) -> tuple[Float64, Float64]:
    """softmax(scores [T, S]) value [S, D] and the row's log-sum-exp; scores are overwritten."""
    m = scores.max(axis=1, initial=-np.inf if sink is None else sink)
    shift = _shift(m)
    p = np.exp(np.subtract(scores, shift[:, None], out=scores), out=scores)
    l = p.sum(axis=1)
    if sink is not None:
        l += np.exp(sink - shift)
    return _normalise(shift, l, p @ value)


def _normalise(m: Float64, l: Float64, o: Float64) -> tuple[Float64, Float64]:
    """o / l and m + log l; where l = 0 (no keys) these are 0 and -inf."""
    empty = l == 0.0
    divisor = np.where(empty, 1.0, l)
    return o / divisor[..., None], np.where(empty, -np.inf, m + np.log(divisor))


class State(NamedTuple):
    """What a stream of keys has left behind, for K key/value heads and R rows each."""

    m: Float64  # [K, R] running max of the scores; -inf before the first key
    l: Float64  # [K, R] sum of exp(score - m)
    o: Float64  # [K, R, D] sum of exp(score - m) * value


def extend(
    state: State | None, query: Float64, key: ArrayLike, value: ArrayLike, each: Map = map
) -> State:
    """The state after some more keys; the state given is left as it was.

    Args:
      state: what came before, or None at the first key.
      query: float64 [K, R, H], already multiplied by the scale; R rows share one key/value head.
      key: [S, K, H], any float dtype, widened exactly.
      value: [S, K, D].
      each: `map`, or that of an executor whose threads share the work; the result is the same.

    Raises:
      TypeError, ValueError: dtypes or shapes that do not fit.
    """
    key, value = _floats("key", key), _floats("value", value)
    if query.dtype != np.float64:
        raise TypeError(f"query must be float64, already scaled, got {query.dtype}")
    K, R, H = query.shape
    S, D = key.shape[0], value.shape[-1]
    if key.shape != (S, K, H) or value.shape != (S, K, D):
        raise ValueError(
            f"key and value must be [S, {K}, {H}] and [S, {K}, D], got {key.shape}, {value.shape}"
        )

    def part(at: tuple[int, int]) -> State:
        start, head = at
        piece = slice(start, start + KEYS_PER_PIECE)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            scores = query[head] @ key[piece, head].astype(np.float64).T
            m = scores.max(axis=1)
            p = np.exp(np.subtract(scores, _shift(m)[:, None], out=scores), out=scores)
            return State(m, p.sum(axis=1), p @ value[piece, head].astype(np.float64))

    if state is None:
        m, l, o = np.full((K, R), -np.inf), np.zeros((K, R)), np.zeros((K, R, D))
    else:
        m, l, o = (x.copy() for x in state)
    places = [(start, head) for start in range(0, S, KEYS_PER_PIECE) for head in range(K)]
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        parts = each(part, places) if len(places) > 1 else map(part, places)
        for (_, h), new in zip(places, parts, strict=True):
            m_next = np.maximum(m[h], new.m)
            a, b = (np.exp(x - _shift(m_next)) for x in (m[h], new.m))
            l[h] = a * l[h] + b * new.l
            o[h] = a[:, None] * o[h] + b[:, None] * new.o
            m[h] = m_next
    return State(m, l, o)


def _shift(m: Float64) -> Float64:
    """m, or 0 where it is -inf: of no key, or of keys that are all masked."""
    return np.where(m == -np.inf, 0.0, m)


def finish(state: State) -> tuple[Float64, Float64]:
    """Output [K, R, D] and log-sum-exp [K, R] (nats) of the keys so far; 0 and -inf if none."""
    return _normalise(_shift(state.m), state.l, state.o)


def _floats(name: str, x: ArrayLike) -> NDArray[np.floating]:
    """x as an array of a float dtype that float64 holds exactly (bfloat16 and float8 included)."""
    array = np.asarray(x)
    dtype = array.dtype
    # The extension floats of ml_dtypes have kind "V" and a name that says what they are.
    is_float = dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bf", "float")))
    if not is_float or dtype.itemsize > 8:
        raise TypeError(f"{name} must hold floats of at most 64 bits, got {dtype}: convert it")
    return array


def _widen(name: str, x: ArrayLike) -> Float64:
    return _floats(name, x).astype(np.float64)


def _bools(mask: ArrayLike) -> Bool:
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"mask must be bool (True = attend), got {array.dtype}; floats are a bias")
    return array


def _broadcast(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name} must be broadcastable to [B, N, T, S] = {list(shape)}, got {list(x.shape)}"
        ) from None


def _lengths(name: str, lengths: ArrayLike | None, batch: int, full: int) -> list[int]:
    if lengths is None:
        return [full] * batch
    array = np.asarray(lengths)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.shape != (batch,) or (array < 0).any():
        raise ValueError(f"{name} must be [{batch}] and not negative, got {array.tolist()}")
    return [min(int(x), full) for x in array]


def _positions(
    T: int, S: int, is_causal: bool, local_window_size: int | tuple[int, int] | None
) -> Bool | None:
    """Which keys [T, S] the causal mask and the local window leave; None for all."""
    ahead = np.arange(S)[None, :] - np.arange(T)[:, None]
    visible = ahead <= 0 if is_causal else None
    if local_window_size is not None:
        window = local_window_size
        left, right = (window, window) if isinstance(window, int) else window
        if left < 0 or right < 0:
            raise ValueError(f"local_window_size must not be negative, got {window}")
        inside = (ahead >= -left) & (ahead <= right)
        visible = inside if visible is None else visible & inside
    return visible
