"""Recipe: a flat table that says no where its fields contradict each other."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest

from jaxattn import block_rules, kernels
from jaxattn.fields import CHOICES, FOLLOWS, INTEGERS, NUMBERS, SITES, WORDS
from jaxattn.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    STOCHASTIC,
    TOWARD_ZERO,
    Format,
    format_of,
)
from jaxattn.recipe import Recipe, parse_settings, with_changed

NAMES = (
    "float32 float64 hexagon-hmx-fp16 hexagon-hmx-fp16-qf16 hexagon-hmx-fp16-qf16-spill "
    "hexagon-hmx-exp2hf hexagon-pr24389 hexagon-hmx-fp32 hexagon-hvx metal metal-bf16 "
    "ggml-cpu-decode ggml-cpu-decode-f32 ggml-cpu-decode-neon ggml-cpu-decode-avx512fp16 "
    "ggml-cpu-prefill ggml-cpu-splitkv"
).split()
HALF = kernels.get("hexagon-hmx-fp16")


def test_defaults_are_those_of_an_ideal_kernel():
    recipe = Recipe()
    assert all(getattr(recipe, site) == FLOAT32 for site in SITES)
    assert recipe.storage == "float32" and recipe.max_offset == recipe.lazy_threshold == 0.0
    assert recipe.initial_max == recipe.mask_value == recipe.rescale_flush == float("-inf")


def test_the_documented_fields_are_the_fields():
    """Every field but the words is documented in one of the tables that --set and tables read."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == {*WORDS, *SITES, *NUMBERS, *CHOICES, *INTEGERS, "kv_block", "seed"}
    assert set(FOLLOWS) | set(FOLLOWS.values()) <= set(SITES)


def test_a_recipe_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().running_sum = FLOAT16  # type: ignore[misc]
    assert {HALF: 1}[kernels.get("hexagon-hmx-fp16")] == 1
    with pytest.raises(TypeError):
        Recipe("positional")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "format"),
    [
        ("float16", FLOAT16),
        (np.float16, FLOAT16),
        (np.dtype(np.float32), FLOAT32),
        ("bf16", BFLOAT16),
        ("fp22", Format(14, -126, 127, rounding=TOWARD_ZERO)),
        (Format(11, -14, 15, rounding=TOWARD_ZERO), format_of("float16:rz")),
    ],
)
def test_sites_take_what_format_of_takes(given, format):
    assert Recipe(running_sum=given).running_sum == format
    assert Recipe().replace(output=given).output == format


def test_replace_changes_what_it_names_and_nothing_else():
    changed = HALF.replace(running_max="float32", kv_block=64)
    assert changed.running_max == FLOAT32 and changed.kv_block == 64
    assert changed.replace(running_max="float16", kv_block=HALF.kv_block) == HALF
    assert HALF.running_max == FLOAT16  # the original stands


class TestFollows:
    """An intermediate in the format of the value it goes into changes with it."""

    @pytest.mark.parametrize(("site", "leader"), FOLLOWS.items())
    def test_it_follows_where_both_are_alike(self, site, leader):
        alike = Recipe(**{site: "float16", leader: "float16"})
        assert getattr(alike.replace(**{leader: "bfloat16"}), site) == BFLOAT16
        assert getattr(alike.replace(**{leader: "float32"}), site) == FLOAT32

    @pytest.mark.parametrize(("site", "leader"), FOLLOWS.items())
    def test_it_stays_where_it_is_named_or_differs(self, site, leader):
        alike = Recipe(**{site: "float16", leader: "float16"})
        named = alike.replace(**{leader: "bfloat16", site: "float16"})
        assert getattr(named, site) == FLOAT16
        apart = Recipe(**{site: "float32", leader: "float16"})
        assert getattr(apart.replace(**{leader: "bfloat16"}), site) == FLOAT32
        other = Recipe(**{site: "tf32", leader: "float16"})
        assert getattr(other.replace(**{leader: "bfloat16"}), site) == format_of("tf32")

    @pytest.mark.parametrize(("site", "leader"), FOLLOWS.items())
    def test_the_leader_does_not_follow(self, site, leader):
        alike = Recipe(**{site: "float16", leader: "float16"})
        assert getattr(alike.replace(**{site: "float32"}), leader) == FLOAT16

    def test_nothing_follows_out_of_float32(self):
        """A float32 intermediate is no rounding at all: it is not made one by accident."""
        assert Recipe().replace(running_sum="float16").rescaled_sum == FLOAT32

    def test_other_changes_leave_them_alone(self):
        assert HALF.replace(kv_block=64).rescaled_sum == FLOAT16


class TestStorage:
    @pytest.mark.parametrize("site", ["scores", "running_sum", "output", "result"])
    @pytest.mark.parametrize("format", ["float64", "e8m24", "e11m10", "e9m4"])
    def test_float64_by_itself_where_float32_cannot_hold_a_format(self, site, format):
        assert Recipe(**{site: format}).storage == "float64"

    @pytest.mark.parametrize("format", ["float32", "e8m23", "fp22", "tf32", "float8_e5m2"])
    def test_float32_else(self, format):
        assert Recipe(**dict.fromkeys(SITES, format)).storage == "float32"

    def test_it_may_be_asked_for(self):
        assert HALF.replace(storage="float64").storage == "float64"
        assert kernels.get("float64").storage == "float64"
        assert Recipe(running_sum="float64", storage="float32").storage == "float64"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output_every": 48, "kv_block": 64}, "output_every=48 must divide kv_block=64"),
        ({"pv_chunk": 128, "kv_block": 64}, "pv_chunk=128 must divide kv_block=64"),
        ({"output_every": 48, "kv_block": "hexagon-hmx-2026-06"}, "must divide kv_block"),
        ({"output_every": 8, "pv_chunk": 16}, "pv_chunk=16 must divide output_every=8"),
        ({"key_group": 48, "kv_block": 64}, "key_group=48 must divide kv_block=64"),
        ({"key_group": 64, "kv_block": "whole", "output_every": 3}, "output_every=3 must divide"),
        ({"qk_promote": 12, "qk_chunk": 8}, "must be a multiple of recipe.qk_chunk=8"),
        ({"qk_promote": 8, "qk_partials": 4}, "goes with qk_partials=1"),
        ({"key_shift": 1.0}, "key_shift must be at least 0 and below 1, got 1"),
        ({"normalise": "before"}, "it goes with kv_block='whole', got kv_block=64"),
        ({"normalise": "blocks", "split_kv": 2}, "split_kv merges sums that are not normalised"),
        ({"normalise": "blocks", "output_every": 8}, "goes with output_every=None"),
        (
            {"probs": "fp8_e4m3", "exp": "exp2", "lazy_threshold": 4, "max_offset": -8},
            r"let p reach 2\^12, but probs=float8_e4m3fn ends at 448",
        ),
        ({"probs": "float16", "lazy_threshold": 12}, r"let p reach 2\^17.3"),
        ({"lazy_threshold": -1}, "lazy_threshold must be at least 0, got -1"),
        ({"qk_partials": 32, "qk_tree": 5}, "must divide"),
        ({"log2e_at": "query"}, "log2e_at='query' goes with scale_at='query'"),
        ({"split_kv": 4, "kv_order": "backward"}, "split_kv goes with kv_order='forward'"),
        (
            {"normalise": "before", "kv_block": "whole", "sinks": "seed"},
            "normalise='before' .* sinks cannot be 'seed'",
        ),
        ({"split_kv": 4, "sinks": "seed"}, "split_kv goes with any sinks but 'seed'"),
        ({"key": "float16:sr"}, "site 'key' cannot round stochastically"),
        ({"pv_accum": "fp22:sr"}, "site 'pv_accum' cannot round stochastically"),
        ({"result": "float16:sr"}, "site 'result' cannot round stochastically"),
        (
            {"running_max": "float16:sr", "sinks": "seed"},
            "site 'running_max' cannot round stochastically",
        ),
        ({"seed": -1}, "seed must be an integer of 32 bits, got -1"),
        ({"seed": 2**32}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"output_every": 0}, "output_every .* must be a positive integer, got 0"),
        ({"qk_partials": None}, "qk_partials .* must be a positive integer, got None"),
        ({"split_kv": True}, "split_kv .* must be a positive integer, got True"),
        ({"qk_chunk": 2.0}, "qk_chunk .* must be a positive integer, got 2.0"),
        ({"initial_max": float("nan")}, "initial_max must not be NaN"),
        ({"max_offset": "much"}, "max_offset must be a number, got 'much'"),
        ({"max_offset": "inf"}, "max_offset must be finite, got inf"),
        ({"max_step": -1}, "max_step must be finite and at least 0, got -1"),
        ({"max_step": "inf"}, "max_step must be finite and at least 0, got inf"),
        ({"mask_value": None}, "mask_value must be a number, got None"),
        ({"kv_block": 0}, "kv_block"),
        ({"kv_block": -64}, "kv_block"),
        ({"running_sum": "float15"}, "unknown format 'float15'; did you mean .*'float16'"),
        ({"running_sum": "float16:up"}, "unknown format suffix 'up'"),
        ({"running_sum": "e1m3"}, "2 <= E <= 11"),
        ({"exp": "exp3"}, "unknown exp 'exp3'; did you mean .*'exp2'"),
        ({"sinks": "start"}, "unknown sinks 'start'"),
        ({"kv_order": "backwards"}, "did you mean 'backward'"),
        ({"storage": "float16"}, "unknown storage"),
        ({"kv_block": "hexagon-hmx-2026-07"}, "did you mean 'hexagon-hmx-2026-0"),
    ],
)
def test_contradictions_and_unknown_names_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**fields)
    with pytest.raises(ValueError, match=said):
        Recipe().replace(**fields)


@pytest.mark.parametrize("kv_block", [64.0, True, None, (64,)])
def test_a_kv_block_that_is_no_count_or_name(kv_block):
    with pytest.raises((TypeError, ValueError), match="kv_block"):
        Recipe(kv_block=kv_block)


@pytest.mark.parametrize("field", ["running_sums", "runing_sum", "running sum"])
def test_replace_suggests_the_nearest_field(field):
    with pytest.raises(ValueError, match="unknown recipe field .*did you mean 'running_sum'"):
        Recipe().replace(**{field: "float16"})


def test_dict_round_trip_through_json():
    odd = Recipe(
        name="odd",
        running_sum="e5m9:floor",
        output="fp22",
        probs=Format(11, -14, 15, 0, rounding=STOCHASTIC),
        mask_value=-65504.0,
        initial_max=-3.4028234663852886e38 / 2,
        bias_factor=1.4423828125,
        kv_block=48,
        pv_chunk=16,
        seed=7,
    )
    text = json.dumps(odd.to_dict(), allow_nan=False)
    assert Recipe.from_dict(json.loads(text)) == odd
    assert json.loads(text)["probs"] == "float16:sr:ftz"
    assert json.loads(text)["rescale_flush"] == "-inf"


def test_from_dict_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown recipe field 'running_summ'"):
        Recipe.from_dict(Recipe().to_dict() | {"running_summ": "float16"})


def test_identity_is_the_arithmetic_alone():
    one = HALF.replace(name="a", citation="b", inferred="c")
    assert one != HALF and one.identity() == HALF.identity()
    assert one.replace(running_sum="fp22").identity() != HALF.identity()
    assert not {"name", "citation", "inferred"} & set(HALF.identity())
    assert one.replace(seed=1).identity() != HALF.identity()


class TestParseSettings:
    def test_every_kind_of_field(self):
        settings = [
            "running_sum=fp22",
            "output=float16:rz",
            "kv_block=128",
            "output_every=8",
            "pv_chunk=none",
            "max_offset=2.5",
            "mask_value=-inf",
            "exp=exp2",
            "seed=3",
        ]
        recipe = Recipe().replace(**parse_settings(settings), name="mine")
        with pytest.raises(ValueError, match="unknown recipe field 'name'"):
            parse_settings(["name=other"])
        assert recipe == Recipe(
            name="mine",
            running_sum="fp22",
            output="float16:rz",
            kv_block=128,
            output_every=8,
            max_offset=2.5,
            exp="exp2",
            seed=3,
        )

    def test_a_named_rule(self):
        assert parse_settings(["kv_block=hexagon-hmx-2026-08"]) == {
            "kv_block": "hexagon-hmx-2026-08"
        }
        assert parse_settings([]) == {}

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("running_sum", "a setting is field=value, got 'running_sum'"),
            ("running_sum=", "a setting is field=value"),
            ("=float16", "unknown recipe field ''"),
            ("runing_sum=float16", "did you mean 'running_sum'"),
            ("running_sum=flot16", "did you mean .*'float16'"),
            ("output_every=often", "output_every must be an integer, got 'often'"),
            ("seed=1.5", "seed must be an integer, got '1.5'"),
            ("running_sum=float64:nearest", "unknown format suffix"),
        ],
    )
    def test_what_it_refuses(self, setting, said):
        with pytest.raises(ValueError, match=said):
            parse_settings(["kv_block=64", setting])

    @pytest.mark.parametrize(
        "setting", ["kv_block=-5", "kv_block=none", "split_kv=none", "max_offset=x", "seed=none"]
    )
    def test_what_replace_refuses(self, setting):
        with pytest.raises(ValueError, match=setting.partition("=")[0]):
            Recipe().replace(**parse_settings([setting]))


# Arithmetic that no repository shows, and kernels that round as another project's do.
PAPERS = ("DeepSeek-V3", "PASA", "AMLA")
ALIKE = {"executorch-sdpa": "torch-cpu-flash-f32"}


class TestKernels:
    def test_names(self):
        assert set(NAMES) <= set(kernels.names())
        assert len(set(kernels.names())) == len(kernels.names())

    @pytest.mark.parametrize("name", kernels.names())
    def test_a_kernel_constructs_and_survives_json(self, name):
        recipe = kernels.get(name)
        assert recipe.name == name
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False)))
        assert again == recipe and again.identity() == recipe.identity()
        assert recipe.replace() == recipe
        assert isinstance(recipe.kv_block, int) or recipe.kv_block in block_rules.RULES

    @pytest.mark.parametrize("name", kernels.names())
    def test_a_kernel_says_where_it_comes_from(self, name):
        recipe = kernels.get(name)
        if name in ("float32", "float64"):
            assert "no kernel in particular" in recipe.citation
            return
        if recipe.citation.startswith(PAPERS) and "arXiv" in recipe.citation:
            return
        assert re.search(r"\b[\w.-]+/[\w.-]+\b", recipe.citation)  # a repository
        if "pull request" not in recipe.citation:
            assert re.search(r"\b[\w/.-]+\.(c|h|cl|cpp|cu|cuh|metal|py)\b", recipe.citation)
            at = r"\b([0-9a-f]{7,40}|\d+\.\d+\.\d+)\b"  # a commit or a release
            assert re.search(at, recipe.citation)
        assert recipe.inferred  # no kernel's every rounding is stated in its source

    def test_no_two_kernels_are_one(self):
        """But those that other projects wrote anew."""
        names = [name for name in kernels.names() if name not in ALIKE]
        identities = [json.dumps(kernels.get(name).identity()) for name in names]
        assert len(set(identities)) == len(identities)
        for name, other in ALIKE.items():
            assert kernels.get(name).identity() == kernels.get(other).identity()

    def test_an_unknown_name_suggests_the_nearest(self):
        with pytest.raises(ValueError, match="unknown recipe 'hexagon-hmx-fp61'.*hexagon-hmx-fp16"):
            kernels.get("hexagon-hmx-fp61")
        with pytest.raises(ValueError, match="'zzz'; `jaxattn kernels` lists them"):
            kernels.get("zzz")


def test_numpy_integers_are_integers():
    recipe = Recipe(kv_block=np.int64(64), output_every=np.int32(8), seed=np.uint32(7))
    assert recipe == Recipe(kv_block=64, output_every=8, seed=7)
    assert type(recipe.kv_block) is int and json.dumps(recipe.to_dict())


def test_settings_make_changed_recipes_beside_those_that_they_change():
    wide = Recipe(name="wide")
    both = with_changed([wide, HALF], ["running_max=float32"])
    assert [recipe.name for recipe in both] == [
        "wide",
        HALF.name,
        f"{HALF.name}+running_max=float32",
    ]
    assert both[-1].running_max == FLOAT32 and with_changed([wide], []) == [wide]
    with pytest.raises(ValueError, match="changes none of the recipes"):
        with_changed([wide], ["running_max=float32"])


@pytest.mark.parametrize(
    ("tables", "error", "words"),
    [
        (((HALF.replace(name="mine"),), (HALF.replace(name="mine"),)), ValueError, "'mine' is ano"),
        ((HALF,), TypeError, "b: RECIPES must be a tuple of recipes"),
        ((("half",),), TypeError, "b: RECIPES must be a tuple of recipes"),
    ],
)
def test_families_that_do_not_fit_are_refused(tables, error, words):
    families = [types.SimpleNamespace(__name__="b", RECIPES=table) for table in tables]
    with pytest.raises(error, match=words):
        kernels.by_name(families)
