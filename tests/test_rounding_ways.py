"""The quicker ways to round, each against round_to where it may stand for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rounding import assert_same, every_exponent, neighbourhoods, rounded

from jaxattn.formats import FLOAT32, SATURATE, Format, format_of
from jaxattn.rounding import (
    common,
    round_to,
    round_to_common,
    round_to_half,
    round_to_half_or_not,
)

COMMON = [
    *("float16", "bfloat16", "tf32", "fp22", "float8_e4m3fn", "float8_e5m2", "float32"),
    *(
        "float16:sat",
        "bfloat16:sat",
        "float8_e4m3fn:sat",
        "e8m2",
        "e8m22",
        "e8m13:rz",
        "bfloat16:rz",
    ),
    *("e3m2", "e5m1", "e4m11", "e6m9", "e7m12", "e2m1:sat"),
]
UNCOMMON = [
    *("float16:ftz", "bfloat16:ftz", "float16:rz", "float16:odd", "bfloat16:floor", "float16:sr"),
    *("float64", "e11m3"),
]


@pytest.fixture(scope="module")
def inputs():
    words = np.random.default_rng(3).integers(0, 2**32, 300_000, dtype=np.uint32)
    return np.concatenate([neighbourhoods(np.float32), every_exponent(), words.view(np.float32)])


def test_which_formats_are_common():
    assert [name for name in COMMON if not common(format_of(name))] == []
    assert [name for name in UNCOMMON if common(format_of(name))] == []
    steps = Format(8, -118, 127)  # half of the smallest, 2^-126, is a normal float32 number
    assert common(steps) and not common(steps._replace(emin=-119))


@pytest.mark.isa
@pytest.mark.parametrize("name", COMMON)
def test_common_formats(name, inputs):
    lanes = Format(
        *(np.array([a, b], np.int32) for a, b in zip(format_of(name), FLOAT32, strict=True))
    )
    got = np.asarray(jax.jit(round_to_common)(np.stack([inputs, inputs]), lanes))
    assert_same(got[0], rounded(inputs, name), inputs)
    assert_same(got[1], inputs, inputs)


@pytest.mark.isa
def test_formats_at_the_edge_of_common(inputs):
    for format in (
        Format(8, -118, 127),
        Format(4, -122, 100, overflow=SATURATE),
        Format(24, -102, 90),
    ):
        assert common(format)
        lane = Format(*(np.array([field], np.int32) for field in format))
        got = np.asarray(jax.jit(round_to_common)(inputs[None], lane))[0]
        assert_same(got, np.asarray(jax.jit(round_to)(inputs[None], lane))[0], inputs)


@pytest.mark.isa
def test_float16_beside_float32(inputs):
    lanes = np.array([11, 24], np.int32)
    got = np.asarray(jax.jit(round_to_half_or_not)(np.stack([inputs, inputs]), lanes))
    assert_same(got[0], rounded(inputs, "float16"), inputs)
    assert_same(got[0], np.asarray(jax.jit(round_to_half)(inputs, np.int32(11))), inputs)
    assert_same(got[1], inputs, inputs)


@pytest.mark.isa
@pytest.mark.parametrize("way", [round_to_common, round_to_half_or_not])
def test_products_are_not_fused_with_what_follows(way):
    x, y, z = np.random.default_rng(7).uniform(-2, 2, (3, 1, 100_000)).astype(np.float32)
    lane = Format(*(np.array([field], np.int32) for field in FLOAT32))
    format = lane if way is round_to_common else lane.precision
    got = jax.jit(lambda x, y, z, format: way(x * y, format) + z)(x, y, z, format)
    assert_same(np.asarray(got), x * y + z, x)


@pytest.mark.parametrize("way", [round_to_common, round_to_half_or_not])
def test_gradients_pass_straight_through(way):
    lane = Format(*(np.array([field], np.int32) for field in format_of("float16")))
    format = lane if way is round_to_common else lane.precision
    gradient = jax.jit(jax.grad(lambda x, format: 3 * way(x, format).sum()))
    assert gradient(jnp.ones((1, 4), jnp.float32), format).tolist() == [[3.0] * 4]
