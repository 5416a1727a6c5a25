"""The named regimes: how queries, keys and values of one kind are drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

PAGE = 4096  # keys that share one random generator; changing it changes every draw

Array = np.ndarray
Parameters = Mapping[str, float]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], p: Parameters) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], p: Parameters) -> Array:
    return rng.random(shape, dtype=np.float32)


def _symmetric(rng: np.random.Generator, shape: tuple[int, ...], p: Parameters) -> Array:
    return np.float32(2) * rng.random(shape, dtype=np.float32) - np.float32(1)


def _outliers(rng: np.random.Generator, shape: tuple[int, ...], p: Parameters) -> Array:
    x = rng.standard_normal(shape, dtype=np.float32)
    hit = rng.choice(x.size, rng.binomial(x.size, p["outlier_rate"]), replace=False, shuffle=False)
    x.reshape(-1)[hit] += np.float32(p["outlier_sd"]) * rng.standard_normal(hit.size, np.float32)
    return x


def _sink_logit(position: Array, length: int, p: Parameters) -> Array:
    return np.where(position < p["sinks"], p["sink_logit"], 0.0)


def _needle(length: int, p: Parameters) -> int:
    return min(int(p["depth"] * length), length - 1)


def _needle_logit(position: Array, length: int, p: Parameters) -> Array:
    return np.where(position == _needle(length, p), p["needle_logit"], 0.0)


def _needle_value(value: Array, position: Array, length: int, p: Parameters) -> Array:
    value[position == _needle(length, p)] = p["needle_value"]
    return value


def _rise(position: Array, length: int, p: Parameters) -> Array:
    return p["rise"] * position / length


@dataclass(frozen=True)
class Regime:
    """How one kind of input is drawn; scores are meant at scale 1/sqrt(H), in nats."""

    description: str
    parameters: Parameters  # name -> default
    draw: Callable[[np.random.Generator, tuple[int, ...], Parameters], Array] = _normal
    gain: float = 1.0  # of the query
    logit: Callable[[Array, int, Parameters], Array] | None = None  # added to a key's score
    value: Callable[[Array, Array, int, Parameters], Array] | None = None
    knows_length: bool = False


NORMAL = {"logit_sd": 1.0, "value_mean": 0.0}

REGIMES: dict[str, Regime] = {
    "gaussian": Regime("Q, K, V ~ N(0, 1); the scores have standard deviation logit_sd", NORMAL),
    "flat": Regime(
        "Q = 0, so that every key weighs the same; V ~ N(0, 1)", {"value_mean": 0.0}, gain=0.0
    ),
    "biased_v": Regime("gaussian with V of mean value_mean", NORMAL | {"value_mean": 1.0}),
    "sink": Regime(
        "gaussian; the first `sinks` keys score sink_logit more (attention sinks, 2309.17453)",
        NORMAL | {"sinks": 4.0, "sink_logit": 10.0},
        logit=_sink_logit,
    ),
    "needle": Regime(
        "gaussian; the key at depth * length scores needle_logit more, its V is needle_value",
        NORMAL | {"depth": 0.5, "needle_logit": 12.0, "needle_value": 4.0},
        logit=_needle_logit,
        value=_needle_value,
        knows_length=True,
    ),
    "rising_max": Regime(
        "gaussian; the scores drift up by rise nats over the length, so the maximum keeps moving",
        NORMAL | {"rise": 16.0},
        logit=_rise,
        knows_length=True,
    ),
    # The paper's 100 is a variance: its text gives the outliers a standard deviation of 10.
    "outliers": Regime(
        "Q, K, V ~ N(0, 1) + N(0, outlier_sd^2) * Bernoulli(outlier_rate)"
        " (FlashAttention-3, arXiv 2407.08608, section 4.3)",
        {"outlier_sd": 10.0, "outlier_rate": 0.001},
        draw=_outliers,
    ),
    "uniform01": Regime(
        "Q, K, V ~ U[0, 1), 1 where the dtype rounds up (Golden et al., arXiv 2405.02803)",
        {},
        draw=_uniform,
    ),
    "uniform11": Regime(
        "Q, K, V ~ U[-1, 1): scores of standard deviation 1/3 (llama.cpp's test-backend-ops)",
        {},
        draw=_symmetric,
    ),
}

RANGES = {
    "logit_sd": (0.0, 1e3),
    "value_mean": (-1e3, 1e3),
    "sinks": (0.0, float(PAGE)),
    "sink_logit": (-1e3, 1e3),
    "depth": (0.0, 1.0),
    "needle_logit": (-1e3, 1e3),
    "needle_value": (-1e3, 1e3),
    "rise": (-1e3, 1e3),
    "outlier_sd": (0.0, 1e3),
    "outlier_rate": (0.0, 1.0),
}
COUNTS = {"sinks"}
