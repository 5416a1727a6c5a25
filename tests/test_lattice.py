"""The recipes that advise weighs."""

import math

import numpy as np
import pytest

from jaxattn import kernels, lattice
from jaxattn.formats import STOCHASTIC
from jaxattn.outputs import outputs
from jaxattn.recipe import Recipe, parse_settings

HEXAGON = kernels.get("hexagon-hmx-fp16")
NARROW = HEXAGON.replace(kv_block=64)


@pytest.mark.parametrize("name", ["hexagon-hmx-fp16", "float32", "hexagon-hvx"])
def test_every_format_at_every_accumulator_and_the_kernel_first(name):
    kernel = kernels.get(name)
    recipes = lattice.accumulators(kernel)
    assert recipes[0] == kernel
    assert len(recipes) == len(set(recipes)) == 4**5  # the kernel is one of them


def test_a_kernel_outside_the_lattice_stands_before_it():
    outside = lattice.accumulators(HEXAGON.replace(running_sum="e5m9"), ("float16", "float32"))
    assert len(outside) == 2**5 + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"normalise": "divide", "kv_block": 64},
        {"normalise": "multiply", "kv_block": "whole"},
        {"normalise": "before", "kv_block": "whole"},
        {"normalise": "blocks", "kv_block": 64},
    ],
)
def test_what_is_idle_changes_nothing_and_what_is_not_does(fields):
    kernel = Recipe(name="kernel", **fields)
    narrow = [kernel.replace(name=s, **{s: "e8m4"}) for s in lattice.ACCUMULATORS]
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, n, 1, 16)) for n in (3, 200, 200))
    plain, *others = outputs(query, key, value, [kernel, *narrow], contexts=[200]).output
    same = {s for s, x in zip(lattice.ACCUMULATORS, others, strict=True) if (x == plain).all()}
    assert same == lattice.idle(kernel)
    tried = {name for r in lattice.accumulators(kernel) for name in lattice.change(kernel, r)}
    assert not tried & same


def test_one_block_has_nothing_to_rescale_or_to_flush():
    whole = Recipe(kv_block="whole", running_sum="float16", output="float16")
    tried = {name for r in lattice.mitigations(whole) for name in lattice.change(whole, r)}
    assert tried == {"running_sum", "output", "max_offset"}


def test_formats_are_few():
    with pytest.raises(ValueError, match="1 to 4"):
        lattice.accumulators(NARROW, ("float16", "bfloat16", "tf32", "fp22", "float32"))
    with pytest.raises(ValueError, match="bfloat16"):
        lattice.accumulators(NARROW, ("bfloat61",))


def test_mitigations():
    recipes = lattice.mitigations(NARROW)
    assert len(recipes) == len(set(recipes)) == 3 * (1 + 1 + 1 + 1 + 2 + 3 + 3) - 1
    changes = [lattice.change(NARROW, recipe) for recipe in recipes]
    assert {"max_offset": "2.07944"} in changes and {"max_offset": "1.38629"} in changes
    assert {"max_step": "0.693147", "running_max": "float32"} in changes
    assert {"summation": "kahan", "max_offset": "1.38629"} in changes
    assert {"flush_every": "16"} in changes and {"kv_block": "512"} in changes
    assert {"running_sum": "float16:sr", "output": "float16:sr"} in changes
    assert all(r.running_max == NARROW.running_max for r in recipes if not r.max_step)


def test_o_that_is_rounded_within_a_block_may_gain_a_block_at_once():
    decode = kernels.get("ggml-cpu-decode").replace(output_every=1)
    changes = [lattice.change(decode, recipe) for recipe in lattice.mitigations(decode)]
    assert {"output_every": "none", "kv_block": "64"} in changes


def test_what_cannot_help_is_not_tried():
    wide = lattice.mitigations(Recipe(kv_block="hexagon-hmx-2026-06"))
    fields = {name for recipe in wide for name in lattice.change(Recipe(), recipe)}
    assert fields == {"max_offset", "max_step", "lazy_threshold", "kv_block"}
    assert all(recipe.kv_block == "hexagon-hmx-2026-06" for recipe in wide)
    odd = lattice.mitigations(NARROW.replace(running_sum="float16:odd"))
    assert not any(recipe.running_sum.rounding == STOCHASTIC for recipe in odd)


@pytest.mark.parametrize(
    ("fields", "offset"),
    [
        ({"exp": "exp"}, math.log(4)),
        ({"exp": "exp2"}, 2),
        ({"exp": "exp2", "log2e_at": "exponent"}, math.log(4)),
        ({"exp": "exp", "max_offset": 1.0}, 1 + math.log(4)),
    ],
)
def test_offsets_are_in_the_units_of_the_scores(fields, offset):
    recipe = lattice.mitigations(Recipe(**fields))[0]
    assert recipe.max_offset == pytest.approx(offset, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["hexagon-hmx-fp16", "ggml-cpu-decode", "metal", "flash-attention-3-fp8"]
)
def test_a_change_makes_the_recipe_again(name):
    kernel = kernels.get(name)
    recipes = [
        *lattice.accumulators(kernel, ("float16", "fp22"), ("running_sum", "output", "rescale")),
        *lattice.mitigations(kernel),
        *lattice.by_block(kernel),
    ]
    for recipe in recipes:
        settings = [f"{name}={value}" for name, value in lattice.change(kernel, recipe).items()]
        assert kernel.replace(**parse_settings(settings)) == recipe, settings


def test_what_follows_a_change_is_not_said_twice():
    recipe = NARROW.replace(running_sum="float32")
    assert recipe.rescaled_sum == recipe.running_sum
    assert lattice.change(NARROW, recipe) == {"running_sum": "float32"}


def test_blocks_only_where_a_kernel_has_them():
    assert [recipe.kv_block for recipe in lattice.by_block(HEXAGON)] == list(lattice.BLOCKS)
    whole = Recipe(kv_block="whole", normalise="before")
    assert lattice.by_block(whole) == []
