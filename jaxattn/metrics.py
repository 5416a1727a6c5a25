"""Numbers that compare one kernel's rows with float64 ones, in float64 throughout.

A row is one query of one head. Every metric is a function of Rows that gives one number per row,
except nmse_llama, whose sums run over all queries of a head, as in llama.cpp's own test.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxattn.contraction import by_halves, total

Float64 = jax.Array


@dataclass(frozen=True)
class Rows:
    """What metrics look at, float64; leading axes are those of jax.nn's layout, [..., T, N].

    Sums that several metrics share are traced once.
    """

    output: Float64  # [..., D]
    lse: Float64  # [...], nats
    reference: Float64  # [..., D]
    reference_lse: Float64  # [...]
    error: Float64  # output - reference
    finite: jax.Array  # bool [...]: no element of output is inf or nan

    @functools.cached_property
    def squared_error(self) -> Float64:
        return total(self.error * self.error)

    @functools.cached_property
    def squared_output(self) -> Float64:
        return total(self.output * self.output)

    @functools.cached_property
    def squared_reference(self) -> Float64:
        return total(self.reference * self.reference)


def _largest(x: Float64) -> Float64:
    """max |x|, nan if one is nan."""
    return by_halves(jax.lax.max, jnp.abs(x))


def _ratio(part: Float64, whole: Float64) -> Float64:
    """part / whole; 0 where both are 0 (a row without keys, computed as such)."""
    return jnp.where((part == 0.0) & (whole == 0.0), 0.0, part / whole)


def _or_inf(rows: Rows, x: Float64) -> Float64:
    return jnp.where(rows.finite, x, jnp.inf)


def nmse(rows: Rows) -> Float64:
    """sum error^2 / sum reference^2."""
    return _or_inf(rows, _ratio(rows.squared_error, rows.squared_reference))


def nmse_llama(rows: Rows) -> Float64:
    """sum error^2 / sum output^2 over all queries of a head, the same number on each of its rows.

    llama.cpp normalises by the tensor under test, not by the reference, and sums over the whole
    tensor (ggml-org/llama.cpp, tests/test-backend-ops.cpp, nmse); here heads and batch entries
    stay apart. Axis -3 of the output holds the queries; without it a row stands alone.
    """
    squared, size = rows.squared_error, rows.squared_output
    if squared.ndim >= 2:  # a row that is not finite makes the sums inf or nan
        squared, size = (x.sum(axis=-2, keepdims=True) for x in (squared, size))
    per_head = jnp.where(jnp.isfinite(squared), _ratio(squared, size), jnp.inf)
    return jnp.broadcast_to(per_head, rows.finite.shape)


def rmse(rows: Rows) -> Float64:
    """sqrt(mean error^2)."""
    return _or_inf(rows, jnp.sqrt(rows.squared_error / rows.error.shape[-1]))


def rel_l2(rows: Rows) -> Float64:
    """||error||_2 / ||reference||_2, the square root of nmse."""
    return jnp.sqrt(nmse(rows))


def rel_l1(rows: Rows) -> Float64:
    """||error||_1 / ||reference||_1."""
    return _or_inf(rows, _ratio(total(jnp.abs(rows.error)), total(jnp.abs(rows.reference))))


def max_abs(rows: Rows) -> Float64:
    """max |error|."""
    return _or_inf(rows, _largest(rows.error))


def cosine(rows: Rows) -> Float64:
    """Cosine similarity of output and reference: 1 is best, 1 if both are zero, nan if not finite.

    Blind to any error that scales the whole row, such as one in l.
    """
    along = total(rows.output * rows.reference)
    squares = rows.squared_output, rows.squared_reference
    both_zero = (squares[0] == 0.0) & (squares[1] == 0.0)
    similarity = jnp.where(both_zero, 1.0, _ratio(along, jnp.sqrt(squares[0] * squares[1])))
    return jnp.where(rows.finite, similarity, jnp.nan)


def ulps(rows: Rows) -> Float64:
    """max |error| / ulp(reference), the ulp being float16's (2^-24 below its normal range)."""
    exponent = jnp.where(rows.reference == 0.0, -14, jnp.frexp(rows.reference)[1] - 1)
    ulp = jnp.ldexp(1.0, jnp.maximum(exponent, -14) - 10)
    return _or_inf(rows, _largest(rows.error / ulp))


def _lse_difference(rows: Rows) -> Float64:
    """lse - reference_lse; 0 where they are equal, both -inf included."""
    same = rows.lse == rows.reference_lse
    return jnp.where(same, 0.0, rows.lse - rows.reference_lse)


def lse_error(rows: Rows) -> Float64:
    """|lse - reference_lse| in nats; inf where lse is inf or nan."""
    difference = jnp.abs(_lse_difference(rows))
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)


def bias_l(rows: Rows) -> Float64:
    """Signed relative error of l: exp(lse - reference_lse) - 1; inf for overflow, nan for nan."""
    return jnp.expm1(_lse_difference(rows))


def bias_o(rows: Rows) -> Float64:
    """Signed relative error of the output along the reference; nan where it is not finite.

    <output, reference> / <reference, reference> - 1; 0 where the reference is 0.
    """
    along = total(rows.error * rows.reference)  # no cancellation, unlike the quotient minus 1
    bias = _ratio(along, rows.squared_reference)
    return jnp.where(rows.finite, bias, jnp.nan)


def nonfinite(rows: Rows) -> Float64:
    """1 if any element of the row is inf or nan, else 0."""
    return jnp.where(rows.finite, 0.0, 1.0)


METRICS: Mapping[str, Callable[[Rows], Float64]] = {
    f.__name__: f
    for f in (
        nmse,
        nmse_llama,
        rmse,
        rel_l2,
        rel_l1,
        max_abs,
        cosine,
        ulps,
        lse_error,
        bias_l,
        bias_o,
        nonfinite,
    )
}


def parse_limit(text: str) -> tuple[str, float | None]:
    """ "nmse=5e-4" -> ("nmse", 5e-4); a name alone -> (name, None).

    Raises ValueError for a limit that is not a positive number.
    """
    name, equals, limit = text.partition("=")
    if not equals:
        return name, None
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"the limit of metric {name} must be a positive number, got {limit!r}")
    return name, value


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
      ValueError: a name that METRICS lacks (the message suggests the nearest), or a bare string.
    """
    if isinstance(names, str):
        raise ValueError(f"metrics must be a sequence of names, got the string {names!r}")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), METRICS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown metric {name!r}{hint} (known: {', '.join(METRICS)})")
    return tuple(names)


def measure(
    names: Sequence[str],
    output: ArrayLike,
    lse: ArrayLike,
    reference: ArrayLike,
    reference_lse: ArrayLike,
) -> dict[str, NDArray[np.float32]]:
    """One float32 number per metric and row.

    Args:
      names: of METRICS.
      output: [..., D], any float dtype, NumPy's or jax's, widened exactly; [..., T, N, D] for
        nmse_llama.
      lse: [...], the kernel's log-sum-exp in nats.
      reference: float64, broadcastable to output (several recipes share one); finite.
      reference_lse: float64, broadcastable to lse.

    Returns:
      name -> float32 [...]. A row with inf or nan has nmse, rmse, rel_l2, rel_l1, max_abs and ulps
      inf, never nan; its cosine and bias_o are nan. No warning is raised.

    Raises:
      ValueError: an unknown name, or shapes that do not fit.
    """
    names = check_names(names)
    shape, rows = np.shape(output), np.shape(lse)
    if len(shape) == 0 or shape[-1] == 0 or rows != shape[:-1]:
        raise ValueError(f"output must be [..., D] and lse [...], got {shape} and {rows}")
    exact = np.asarray(reference, np.float64), np.asarray(reference_lse, np.float64)
    try:
        fits = np.broadcast_shapes(exact[0].shape, shape) == shape
        fits = fits and np.broadcast_shapes(exact[1].shape, rows) == rows
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"reference and reference_lse must broadcast to {shape} and {rows},"
            f" got {exact[0].shape} and {exact[1].shape}"
        )
    with jax.enable_x64(True):
        errors = measure_rows(names, jnp.asarray(output), jnp.asarray(lse), *exact)
    return {name: np.asarray(values) for name, values in errors.items()}


@functools.partial(jax.jit, static_argnums=0)
def measure_rows(
    names: tuple[str, ...],
    output: jax.Array,
    lse: jax.Array,
    reference: Float64,
    reference_lse: Float64,
) -> dict[str, jax.Array]:
    """`measure` of arrays on the device, in the scope of jax.enable_x64."""
    finite = jnp.isfinite(_largest(output))
    output, lse = output.astype(jnp.float64), lse.astype(jnp.float64)
    reference = jnp.broadcast_to(reference, output.shape)
    reference_lse = jnp.broadcast_to(reference_lse, lse.shape)
    rows = Rows(output, lse, reference, reference_lse, output - reference, finite)
    return {name: METRICS[name](rows).astype(jnp.float32) for name in names}
