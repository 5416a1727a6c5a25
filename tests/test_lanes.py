"""Lanes: recipes that run together get the bits that each gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finished import finished

from jaxattn import error_curves, kernels, passes, tiles
from jaxattn.formats import FLOAT32, format_of
from jaxattn.lanes import QUANTITIES, structure_of, weave
from jaxattn.pages import Pages
from jaxattn.recipe import Recipe
from jaxattn.walk import _Arrays

S, K, H, D = 1200, 2, 32, 16
CONTEXTS = [100, 640, S]  # inside a block, inside a tile, the end
SITES = ("scores", "probs", "row_sum", "rescale", "running_sum", "output", "inverse")
FORMATS = ("float16", "bfloat16", "float32")
BASES = {
    "float32": kernels.get("float32"),
    "hexagon": kernels.get("hexagon-hmx-fp16").replace(kv_block=64),
    "ggml": kernels.get("ggml-cpu-decode"),
}

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "to_mlir" in event else None
)


def lattice(base):
    """27 recipes over SITES: any two sites meet in all nine pairs of formats."""
    for i in range(27):
        a, b, c = i // 9, i // 3 % 3, i % 3
        row = (a, b, c, a + b, a + 2 * b, a + c, a + b + c)
        yield base.replace(**{s: FORMATS[f % 3] for s, f in zip(SITES, row, strict=True)})


def outcomes(recipes, queries, contexts=CONTEXTS):
    """context -> (result, log-sum-exp, lost share of l), each [recipe, K, queries, 1, ...]."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((K, queries, H), np.float32)
    key = rng.standard_normal((1, S, K, H), np.float32).astype(np.float16)
    value = rng.standard_normal((1, S, K, D), np.float32).astype(np.float16) + np.float16(0.5)
    tile = tiles.tile_of(recipes[0].kv_block, contexts[-1], H, D)
    job = passes.Job(list(range(len(recipes))), list(recipes), tile, list(contexts))
    formats = [format_of(dtype) for dtype in (np.float32, np.float16, np.float16)]
    steps = passes.run(job, Pages(_Arrays(key, value), key.shape[1]), rows, 1, D, H**-0.5, formats)
    return {
        context: tuple(x[:, outcome.lanes.recipes].swapaxes(0, 1) for x in finished(outcome))
        for _, context, outcome in steps
        if outcome is not None
    }


def assert_alone_equals_together(recipes, chosen, queries, contexts=CONTEXTS):
    together = outcomes(recipes, queries, contexts)
    assert sorted(together) == contexts
    for i in chosen:
        alone = outcomes([recipes[i]], queries, contexts)
        for context in contexts:
            for one, all_ in zip(alone[context], together[context], strict=True):
                np.testing.assert_array_equal(one[0], all_[i], err_msg=f"{i} at {context}")


@pytest.mark.parametrize(
    ("base", "queries", "chosen"),
    [
        ("float32", 3, (5, 17)),  # 1 and 16 queries: below
        ("hexagon", 3, (17,)),
        ("ggml", 3, (11,)),
    ],
)
def test_a_member_equals_its_one_recipe_run(base, queries, chosen):
    assert_alone_equals_together(list(lattice(BASES[base])), chosen, queries)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("base", BASES)
def test_every_member_equals_its_one_recipe_run(base, queries):
    assert_alone_equals_together(list(lattice(BASES[base])), range(27), queries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "sites"),
    [
        ("float32", {"query": ("float16", "bfloat16"), "key": ("float16", "float8_e4m3fn")}),
        ("float32", {"value": ("bfloat16", "float8_e5m2"), "summand": ("float32", "float16")}),
        ("float32", {"qk_accum": ("fp22", "tf32"), "pv_accum": ("fp22", "tf32")}),
        ("hexagon", {"running_max": ("float32", "float16"), "seen_max": ("float16", "bfloat16")}),
        ("float32", {"running_sum": ("float16:sr", "bfloat16:sr"), "output": ("fp22", "tf32")}),
    ],
)
def test_other_sites(base, sites):
    (one, firsts), (other, seconds) = sites.items()
    grid = [BASES[base].replace(**{one: a, other: b}) for a in firsts for b in seconds]
    assert_alone_equals_together(grid, range(4), 3)


def test_numbers_and_odd_blocks():
    """Offsets and thresholds are traced lanes as well; blocks of 5 fill no vector register."""
    base = Recipe(kv_block=5, lazy_threshold=1.0, running_sum="bfloat16")
    grid = [base.replace(lazy_threshold=t, max_offset=o) for t in (0.5, 2.0) for o in (0.0, 1.5)]
    grid += [one.replace(max_step=0.75) for one in grid]
    assert_alone_equals_together(grid, (0, 3), 3)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("fields", "one", "other"),
    [
        ({"normalise": "blocks"}, "inverse", "output"),
        slow({"normalise": "before", "kv_block": "whole"}, "row_sum", "probs"),
        ({"key_group": 32, "query_group": 2}, "key", "query"),
        slow({"key_shift": 0.9375}, "key", "scores"),
        slow({"qk_promote": 8, "qk_chunk": 1}, "qk_accum", "scores"),
        ({"output_every": 16, "pv_chunk": 4, "pv_accum": "fp22"}, "pv_accum", "output"),
    ],
)
def test_fields_that_few_kernels_need(fields, one, other):
    base, formats = Recipe(**fields), ("int8", "float16", "float32")
    grid = [base.replace(**{one: a, other: b}) for a in formats for b in formats]
    contexts = [S] if base.kv_block == "whole" else CONTEXTS
    if one.endswith("accum"):  # wide accumulators are another structure
        grid = [recipe for recipe in grid if getattr(recipe, one) != FLOAT32]
    assert_alone_equals_together(grid, (1, len(grid) - 1), 3, contexts)


def test_shifts_are_lanes():
    base = Recipe(scores="float16")
    grid = [base.replace(key_shift=b, key=k) for b in (0.5, 0.9375) for k in FORMATS]
    assert_alone_equals_together(grid, (0, 4), 3)


def test_the_members_differ():
    """The lattice would prove nothing if its recipes all gave the same numbers."""
    results = outcomes(list(lattice(BASES["float32"])), 3)[S][0]
    assert len({result.tobytes() for result in results}) == 27


class TestSharing:
    @staticmethod
    def reads(quantity):
        """Every field that a quantity depends on; q is scaled where a kernel scales it only."""
        own, parents = QUANTITIES[quantity]
        own = {"query"} if quantity == "q" else set(own)
        return own.union(*(TestSharing.reads(parent) for parent in parents))

    def test_as_many_lanes_as_distinct_dependencies(self):
        recipes = list(lattice(BASES["hexagon"]))
        recipes += [recipe.replace(scale="float32") for recipe in recipes[:5]]
        recipes += [recipe.replace(max_offset=1.0) for recipe in recipes[3:8]]
        lanes, traced = weave(recipes)
        for quantity in QUANTITIES:
            fields = sorted(self.reads(quantity))
            distinct = {tuple(getattr(recipe, name) for name in fields) for recipe in recipes}
            assert lanes.count(quantity) == len(distinct), quantity
            for number in traced[quantity].values():
                assert len(number) == len(distinct)
        assert lanes.count("d") == 1 and lanes.count("y") == len(recipes)

    def test_a_grid_over_l_and_o(self):
        grid = [
            Recipe(running_sum=l, output=o, inverse=y)
            for l in FORMATS
            for o in FORMATS
            for y in FORMATS[:2]
        ]
        lanes, _ = weave(grid)
        counts = {quantity: lanes.count(quantity) for quantity in QUANTITIES}
        ones = dict.fromkeys(set(QUANTITIES) - set("loy"), 1)
        assert counts == ones | {"l": 3, "o": 3, "y": 18}
        assert lanes.recipes == tuple(range(18))

    def test_equal_recipes_are_one_lane(self):
        lanes, _ = weave([Recipe(name="a"), Recipe(name="b", citation="c"), Recipe(probs="tf32")])
        assert lanes.count("y") == 2 and lanes.recipes == (0, 0, 1)

    def test_sites_that_no_lane_rounds_are_left_out(self):
        def ways(*recipes, inputs="float32"):
            lanes, _ = weave(recipes, *(format_of(inputs),) * 3)
            return {site: way for site, way in lanes.way.items() if way != "not"}

        assert ways(Recipe()) == {}
        assert ways(Recipe(), Recipe(probs="float16")) == {"probs": "half or not"}
        narrow = Recipe(query="float16", key="bfloat16")
        assert ways(narrow, inputs="float16") == {"key": "common"}  # float16 is what it is

    def test_the_cheapest_way_that_holds_for_all_lanes(self):
        def way(*formats, storage="float32"):
            recipes = [Recipe(probs=format, storage=storage) for format in formats]
            return weave(recipes)[0].way["probs"]

        assert way("float16") == "half"
        assert way("float16", "float32") == "half or not"
        assert way("float16", "bfloat16", "fp22", "float32", "e4m3fn", "e5m2:sat") == "common"
        for other in ("float16:ftz", "float16:rz", "float16:odd", "float16:floor", "float16:sr"):
            assert way("float16", other) == "any"
        assert way("float16", storage="float64") == "any"

    def test_take(self):
        lanes, _ = weave([Recipe(running_sum=l, output=o) for l in FORMATS for o in FORMATS])
        x = jnp.arange(3.0)
        assert lanes.take("l", "r", x[:1]) is not None and lanes.take("l", "r", x[:1]).shape == (1,)
        assert lanes.take("y", "l", x).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert lanes.take("y", "o", x).tolist() == [0, 1, 2] * 3

    def test_structures_do_not_mix(self):
        one, other = Recipe(kv_block=64), Recipe(kv_block=128)
        assert structure_of(one) != structure_of(other)
        assert structure_of(one) == structure_of(one.replace(probs="float16", max_offset=2.0))
        with pytest.raises(ValueError, match="different structure"):
            weave([one, other])


class TestCompilations:
    """error_curves compiles one step per structure, whatever the contexts."""

    @staticmethod
    def curves(recipes, contexts, seed=0):
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((1, 3, 2, H), np.float32)
        key, value = (rng.standard_normal((1, S, 2, H), np.float32) for _ in range(2))
        before = passes._advance._cache_size()
        compiled.clear()
        curves = error_curves(query, key, value, recipes, contexts=contexts)
        return passes._advance._cache_size() - before, curves

    def test_one_step_per_structure(self):
        hexagon = kernels.get("hexagon-hmx-fp16")
        twins = [hexagon, hexagon.replace(name="wide l", running_sum="float32")]
        # Under the rule, three block layouts.
        contexts = [128, 300, S]
        steps, curves = self.curves(twins, contexts)
        assert steps == 1 and len(np.unique(curves.kv_block)) == 3

        steps, _ = self.curves(twins, [77, 256, 1000, 1001], seed=1)  # other contexts and values
        assert steps == 0 and compiled == []

        more = [*twins, hexagon.replace(name="wide o", output="float32")]
        steps, together = self.curves(more, contexts)
        assert steps <= 1
        for name, x in curves.metrics.items():
            np.testing.assert_array_equal(together.metrics[name][:2], x)

    def test_two_structures_are_two_steps(self):
        steps, _ = self.curves([Recipe(kv_block=48), Recipe(kv_block=80)], [S])
        assert steps == 2
