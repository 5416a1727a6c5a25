"""The cost of a recipe: counted by hand, and moving the way that each mitigation should move it."""

import math

import numpy as np
import pytest

from jaxattn import cost as costs
from jaxattn import kernels
from jaxattn.cost import TERMS, WEIGHTS, Cost, bits, cost, dominates, in_matrix_unit, price
from jaxattn.formats import format_of
from jaxattn.recipe import Recipe

HEXAGON = kernels.get("hexagon-hmx-fp16").replace(kv_block=64)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("float16", 16), ("bfloat16", 16), ("fp22", 22), ("tf32", 19), ("float32", 32)),
        *(("float64", 64), ("float8_e4m3fn", 8), ("e5m2", 8), ("int8", 8), ("float16:sr", 16)),
    ],
)
def test_bits_of_a_format(name, size):
    assert bits(format_of(name)) == size


def test_counted_by_hand():
    """The Hexagon kernel at 64 keys a block and 128 dims: all but l's path is the matrix unit's."""
    got = cost(HEXAGON, 4096, 128, 128, format_of("float16"))
    assert got == Cost(
        sum_bits=16 * 5,  # m, l, 1/l, a, r
        output_bits=128 * 16,
        block_bits=64 * (16 + 16),
        score_moves=32,
        carry_moves=2 * (16 + 128 * 16) / 64,
        sum_ops=3 / 64,
        output_ops=0,
        conversions=2 / 64,  # r and a are made in float32
        output_conversions=0,
        draws=0,
    )


def test_counted_by_hand_with_everything():
    """o outside the unit, in two steps a block, flushed every 4 blocks, l compensated; 8 dims."""
    recipe = Recipe(
        kv_block=32,
        output_every=16,
        flush_every=4,
        summation="kahan",
        max_offset=1.0,
        scores="float16",
        probs="float8_e4m3fn",
        running_sum="bfloat16",
        output="float16:sr",
    )
    got = cost(recipe, 4096, 64, 8)
    assert got == Cost(
        sum_bits=32 + 16 + 32 + 32 + 32 + 16 + 64,  # m, l, 1/l, a, r; correction; wide m and l
        output_bits=8 * 16 + 8 * 32,
        block_bits=32 * 24,
        score_moves=24,
        carry_moves=(2 * (2 * 16 + 8 * 16) + 2 / 4 * 32 * 9) / 32,
        sum_ops=(3 + 4 + 2 / 4 + 1) / 32,
        output_ops=8 * (1 + 2 + 2 / 4) / 32,
        conversions=(2 + 1 / 4) / 32,  # r to l and a to l; l to its wide sum
        output_conversions=8 * (2 * 2 + 1 / 4) / 32,
        draws=8 * 2 / 32,
    )


def test_a_rule_costs_as_the_block_that_it_chooses():
    ruled = kernels.get("hexagon-hmx-fp16")
    assert cost(ruled, 512, 128, 128) == cost(ruled.replace(kv_block=128), 512, 128, 128)
    assert cost(ruled, 131_072, 128, 128).output_conversions < 0.5


def test_a_block_ends_where_the_context_does():
    assert cost(HEXAGON.replace(kv_block=512), 256, 128, 128) == cost(
        HEXAGON.replace(kv_block=256), 256, 128, 128
    )


def test_float32_accumulators_of_a_tensor_core_cost_no_conversion():
    """o in another format than the product's is fetched, widened, added to and narrowed."""
    wide, narrow = cost(Recipe(), 1024, 128, 128), cost(Recipe(output="float16"), 1024, 128, 128)
    assert (wide.output_conversions, wide.output_ops) == (0, 128 / 64)
    assert (narrow.output_conversions, narrow.output_ops) == (4, 2 * 128 / 64)
    assert narrow.output_bits < wide.output_bits  # a trade: neither dominates
    assert not dominates(wide, narrow) and not dominates(narrow, wide)


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"running_sum": "float32"}, {"sum_bits", "carry_moves", "conversions"}),
        (
            {"output": "float32"},
            {"output_bits", "carry_moves", "output_ops"},
        ),
        ({"max_offset": 1.0}, {"sum_ops"}),
        ({"max_step": 1.0}, {"sum_ops"}),
        ({"summation": "kahan"}, {"sum_bits", "carry_moves", "sum_ops"}),
        ({"running_sum": "float16:sr"}, {"draws"}),
        ({"inverse": "float32"}, {"sum_bits"}),
    ],
)
def test_a_change_moves_these_terms_and_no_others(changes, terms):
    before, after = (
        cost(recipe, 4096, 128, 128, format_of("float16"))
        for recipe in (HEXAGON, HEXAGON.replace(**changes))
    )
    assert {name for name in TERMS if getattr(before, name) != getattr(after, name)} == terms
    assert dominates(before, after) and not dominates(after, before)


def test_steps_of_one_cost_an_operation_and_others_three():
    ops = [cost(Recipe(max_step=step), 4096, 128, 128).sum_ops for step in (0.0, 1.0, 0.7)]
    assert (np.array(ops) * 64).tolist() == [3, 4, 6]


def test_lazy_rescaling_saves_work_on_o():
    eager, lazy = Recipe(kv_block=128), Recipe(kv_block=128, lazy_threshold=5.0)
    eager, lazy = (cost(recipe, 4096, 128, 128) for recipe in (eager, lazy))
    assert (eager.output_ops, lazy.output_ops) == (1, 0) and lazy.sum_ops > eager.sum_ops


def test_who_keeps_o_in_the_matrix_unit():
    assert in_matrix_unit(HEXAGON)
    assert not in_matrix_unit(kernels.get("ggml-cpu-decode")) and not in_matrix_unit(Recipe())


class TestPrice:
    def test_terms_times_weights(self):
        got = Cost(*range(1, 11))
        assert price(got, dict.fromkeys(TERMS, 1.0)) == 55
        assert price(got, dict.fromkeys(TERMS, 0.0) | {"draws": 2.0}) == 20

    def test_what_dominates_is_no_dearer(self):
        one = cost(HEXAGON, 4096, 128, 128)
        other = cost(HEXAGON.replace(summation="kahan", max_offset=1.0), 4096, 128, 128)
        assert dominates(one, other) and price(one, WEIGHTS) < price(other, WEIGHTS)

    def test_every_term_is_documented_and_weighed(self):
        assert tuple(TERMS) == tuple(WEIGHTS) == Cost._fields

    def test_weights_of_the_user(self):
        weights = costs.parse_weights("output_ops=2,draws=0")
        assert (weights["output_ops"], weights["draws"]) == (2.0, 0.0)
        assert costs.parse_weights(None) == WEIGHTS

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("output_op=2", "output_ops"),
            ("draws", "term=number"),
            ("draws=many", "must be a number"),
            ("draws=-1", "at least 0"),
            (f"draws={math.nan}", "finite"),
        ],
    )
    def test_weights_that_are_none(self, text, said):
        with pytest.raises(ValueError, match=said):
            costs.parse_weights(text)
