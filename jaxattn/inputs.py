"""Named input regimes, and Stream: keys and values of any length, a piece at a time.

Every page of PAGE keys has a random generator of its own, seeded by (seed, tensor, page), so that
what a key holds depends neither on the pieces asked for nor, unless its regime says so, on the
length of the context. Regimes with the same seed share their draws: biased_v is gaussian with
another mean of V, and so on.
"""

import difflib
import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jaxattn.regimes import COUNTS, PAGE, RANGES, REGIMES, Array, Parameters

GENERATOR = f"numpy SFC64, a page of {PAGE} keys"  # part of the identity of what is drawn
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
QUERY, KEY, VALUE = 0, 1, 2
BEACON = 8.0  # coordinate 0 of every query, where a regime sets the scores of single keys


@runtime_checkable
class Stream(Protocol):
    """Keys and values of one sequence, read piece by piece, and the queries that attend to them.

    length is the number of keys S, heads K, head_dim H and value_dim D; query is [1, T, N, H];
    label names the inputs in tables and figures; identity is what decides their every bit, as
    values that JSON can hold; blocks(start, stop) gives key [stop - start, K, H] and value
    [stop - start, K, D] of that range of keys.
    """

    @property
    def length(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def query(self) -> Array: ...
    def blocks(self, start: int, stop: int) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class Synthetic:
    """A Stream of one regime; made by `regime`, which checks what it is given."""

    name: str
    length: int
    seed: int
    heads: int
    queries: int
    group: int
    head_dim: int
    dtype: str
    parameters: Parameters

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def label(self) -> str:
        defaults = REGIMES[self.name].parameters
        changed = [f"{k}={v:g}" for k, v in self.parameters.items() if v != defaults[k]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Regime, parameters, shapes, seed; the length only where the regime knows it."""
        return {
            "regime": self.name,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "heads": self.heads,
            "queries": self.queries,
            "group": self.group,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "generator": GENERATOR,
        } | ({"length": self.length} if REGIMES[self.name].knows_length else {})

    @functools.cached_property
    def query(self) -> Array:
        """[1, T, N, H]; row t does not depend on T."""
        how = REGIMES[self.name]
        shape = (1, self.queries, self.heads * self.group, self.head_dim)
        query = how.draw(self._generator(QUERY, 0), shape, self.parameters)
        query *= np.float32(how.gain * self.parameters.get("logit_sd", 1.0))
        query += np.float32(0.0)  # -0 becomes 0
        if how.logit is not None:
            query[..., 0] = BEACON
        return _read_only(query.astype(DTYPES[self.dtype]))

    def blocks(self, start: int, stop: int) -> tuple[Array, Array]:
        """Key and value [stop - start, K, H], read-only.

        Raises:
          ValueError: a range that is not within 0 <= start <= stop <= length.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"keys {start}:{stop} are not within the stream of {self.length} keys")
        pieces = []
        for page in range(start // PAGE, max(-(-stop // PAGE), start // PAGE + 1)):
            first = page * PAGE
            piece = slice(max(start - first, 0), min(stop - first, PAGE))
            pieces.append([x[piece] for x in self._page(page)])
        if len(pieces) == 1:
            return pieces[0][0], pieces[0][1]
        key, value = (np.concatenate(x) for x in zip(*pieces, strict=True))
        return _read_only(key), _read_only(value)

    def _page(self, page: int) -> tuple[Array, Array]:
        """One whole page; the last one made is kept, for pieces that end inside it."""
        kept = self.__dict__.get("_kept")
        if kept is not None and kept[0] == page:
            return kept[1]
        how, p = REGIMES[self.name], self.parameters
        shape = (PAGE, self.heads, self.head_dim)
        key = how.draw(self._generator(KEY, page), shape, p)
        value = how.draw(self._generator(VALUE, page), shape, p)
        position = np.arange(page * PAGE, (page + 1) * PAGE)
        if mean := p.get("value_mean", 0.0):
            value += np.float32(mean)
        if how.logit is not None:
            logit = how.logit(position, self.length, p)
            key[..., 0] = (logit * math.sqrt(self.head_dim) / BEACON)[:, None]
        if how.value is not None:
            value = how.value(value, position, self.length, p)
        dtype = DTYPES[self.dtype]
        made = _read_only(key.astype(dtype)), _read_only(value.astype(dtype))
        self.__dict__["_kept"] = (page, made)
        return made

    def _generator(self, tensor: int, page: int) -> np.random.Generator:
        entropy = np.random.SeedSequence(self.seed, spawn_key=(tensor, page))
        return np.random.Generator(np.random.SFC64(entropy))


def regime(
    name: str,
    *,
    length: int,
    seed: int,
    heads: int = 2,
    queries: int = 16,
    group: int = 1,
    head_dim: int = 128,
    dtype: Any = "float16",
    **parameters: float,
) -> tuple[Array, Synthetic]:
    """The queries and the stream of keys and values of a named regime.

    Args:
      name: one of REGIMES.
      length: number of keys S.
      seed: not negative.
      heads: key/value heads K.
      queries: T.
      group: query heads per key/value head; N = heads * group.
      head_dim: H, of the values too.
      dtype: float16 (a KV cache), bfloat16 or float32: what the draws are rounded to.
      **parameters: the regime's own, see REGIMES[name].parameters for names and defaults.

    Returns:
      query [1, T, N, H], and a Stream whose blocks(start, stop) gives key and value
      [stop - start, K, H]; the same arguments give the same bits, whatever pieces are asked for.

    Raises:
      ValueError: an unknown regime, parameter or dtype, or a value out of range.
      TypeError: a count that is no integer, or a parameter that is no number.
    """
    _known("regime", name, REGIMES)
    counts = {"length": length, "heads": heads, "queries": queries, "group": group}
    counts = {k: _integer(k, v, 1) for k, v in (counts | {"head_dim": head_dim}).items()}
    if counts["head_dim"] > 2**16:
        raise ValueError(f"head_dim must be at most {2**16}, got {head_dim}")
    settings = dict(REGIMES[name].parameters)
    for key, value in parameters.items():
        _known(f"parameter of {name}", key, settings)
        settings[key] = _number(key, value, *RANGES[key])
        if key in COUNTS and settings[key] != int(settings[key]):
            raise ValueError(f"{key} must be a whole number, got {value}")
    stream = Synthetic(
        name=name,
        seed=_integer("seed", seed, 0),
        dtype=_known("dtype", _dtype_name(dtype), DTYPES),
        parameters=settings,
        **counts,
    )
    return stream.query, stream


def _read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


def _known(kind: str, name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})")
    return name


def _dtype_name(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def _integer(name: str, value: int, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return number


def _number(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return float(value)
