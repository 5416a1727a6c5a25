"""error_curves: every context from one pass, and the same bits as a pass of its own."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from finished import finished
from threadpoolctl import threadpool_info

from jaxattn import curves as curves_module
from jaxattn import (
    dot_product_attention,
    error_curves,
    inputs,
    kernels,
    metrics,
    passes,
    reference,
    reference_attention,
    tiles,
)
from jaxattn import errors as errors_module
from jaxattn import walk as walk_module
from jaxattn.curves import Curves
from jaxattn.exact import Exact
from jaxattn.pages import Pages
from jaxattn.recipe import Recipe
from jaxattn.walk import default_contexts

S, H, D = 20_000, 32, 16  # past the first piece of 2^14 keys
ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = kernels.get("float32")

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "to_mlir" in event else None
)


@pytest.fixture(scope="module")
def arrays():
    """Queries of two batch entries and four heads over two heads of keys; V has mean 1/2."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 3, 4, H), np.float32)
    key = rng.standard_normal((2, S, 2, H), np.float32).astype(np.float16)
    value = rng.standard_normal((2, S, 2, D), np.float32).astype(np.float16) + np.float16(0.5)
    return query, key, value


def assert_equal(one: Curves, other: Curves) -> None:
    for name, x in other.metrics.items():
        np.testing.assert_array_equal(one.metrics[name], x, err_msg=name)
    for a, b in zip(one[3:], other[3:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def outcomes(monkeypatch):
    """(context, (result, log-sum-exp, lost share of l)) of each error_curves, as they come."""
    seen, run_all = [], walk_module.run_all

    def spy(jobs, pages, exact, report, *rest, **shared):
        def see(members, context, outcome):
            seen.append((context, finished(outcome)))
            report(members, context, outcome)

        run_all(jobs, pages, exact, see, *rest, **shared)

    monkeypatch.setattr(walk_module, "run_all", spy)
    return seen


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize(("begin", "stop"), [(0, 1000), (300, 1001), (0, 48), (0, 1)])
def test_blocks_start_where_they_do_however_many_are_asked_for(begin, stop, order):
    tile = tiles.Tile(kv_block=48, width=64, blocks=3)
    starts = list(range(begin, stop, 48))
    starts = starts[::-1] if order == "backward" else starts
    count = tiles.tile_count(begin, stop, tile)
    assert 3 * (count - 1) < len(starts) <= 3 * count
    asked = range(count + 2)
    found = tiles.block_starts(begin, stop, tile, order, asked)
    assert found.ravel().tolist() == starts + [stop] * (3 * (count + 2) - len(starts))
    for i in asked:
        one = tiles.block_starts(begin, stop, tile, order, range(i, i + 1))
        np.testing.assert_array_equal(one, found[i : i + 1])


# name -> (recipe, contexts, the one of them that dot_product_attention repeats)
WALKS = {
    "blocks that divide nothing": (FLOAT32.replace(kv_block=48), [47, 5000, 16_390, S], 5000),
    "a rule": (kernels.get("hexagon-hmx-fp16"), [100, 400, 1111, 5000, 16_500, S], 1111),
    "every key": (kernels.get("ggml-cpu-decode"), [1, 777, 17_000], 777),
    "split": (kernels.get("ggml-cpu-splitkv"), [5, 1500, 17_001], 1500),
    "backward": (
        Recipe(kv_order="backward", running_sum="bfloat16", output="fp22"),
        [30, 1000, 17_000],
        1000,
    ),
}
MORE = {
    "the other rule": (kernels.get("hexagon-hmx-fp32"), [64, 1000, 9000, 16_500, S], 1000),
    "a rule, backward": (
        kernels.get("hexagon-pr24389").replace(kv_order="backward"),
        [100, 2000, S],
        2000,
    ),
    "split blocks": (FLOAT32.replace(split_kv=3, kv_block=64, probs="float16"), [2, 900, S], 900),
    "eight keys at a time": (kernels.get("metal-bf16"), [63, 1001, S], 1001),
    "lazy": (Recipe(lazy_threshold=1.0, output="fp22"), [70, 1001, S], 1001),
}


@pytest.mark.parametrize(
    "walk", [*WALKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_a_prefix_is_a_run_of_that_length(walk, arrays, outcomes):
    """Bit for bit: against a pass over fewer keys, and against dot_product_attention."""
    (query, key, value), (recipe, contexts, single) = arrays, (WALKS | MORE)[walk]
    curves = error_curves(query, key, value, [recipe], contexts=contexts)
    together = dict(outcomes)
    compiled.clear()
    for at, n in enumerate(contexts):
        alone = error_curves(query, key[:, :n], value[:, :n], [recipe], contexts=[n])
        for one, other in zip(together[n], outcomes[-1][1], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"at {n}")
        for name, x in alone.metrics.items():
            # The reference is summed in other pieces.
            near = dict(rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(curves.metrics[name][:, at], x[:, 0], **near)
        for x, y in zip(curves[3:], alone[3:], strict=True):
            np.testing.assert_array_equal(x[:, at], y[:, 0])
    assert sorted(together) == contexts and compiled == []

    expected = dot_product_attention(
        query, key[:, :single], value[:, :single], recipe=recipe, return_residual=True
    )
    B, T, N, _ = query.shape
    for one, other in zip(together[single][:2], expected, strict=True):
        one = np.moveaxis(one[:, 0].reshape(B, 2, T, N // 2, -1), 2, 1).reshape(other.shape)
        # Chunks are merged in a program of their own.
        ulps = 0 if recipe.split_kv == 1 else 4
        np.testing.assert_array_max_ulp(one, np.asarray(other), maxulp=ulps)


def test_metrics_are_those_of_the_outputs(arrays):
    query, key, value = (x[:, :2000] for x in arrays)
    curves = error_curves(
        query, key, value, ["float32", "ggml-cpu-decode"], contexts=[2000], scale=0.3
    )
    ideal = reference_attention(query, key, value, scale=0.3, return_residual=True)
    for i, recipe in enumerate(curves.recipes):
        got = dot_product_attention(
            query, key, value, recipe=recipe, scale=0.3, return_residual=True
        )
        errors = metrics.measure(curves_module.METRICS, *got, *ideal)
        assert set(errors) == set(curves.metrics)
        for name, x in errors.items():
            near = dict(rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(curves.metrics[name][i, 0], x, **near, err_msg=name)
        assert curves.metrics["nmse"].shape == (2, 1, 2, 3, 4)
    assert np.all(curves.metrics["nmse"][0] < 1e-11) and np.all(curves.metrics["nmse"][1] > 1e-8)


def test_errors_of_a_few_recipes_at_a_time_are_those_of_all(arrays, monkeypatch):
    """Bit for bit, of seven recipes: two at a time, which do not divide seven, and one."""
    query, key, value = (x[:, :300] for x in arrays)
    sites = ("output", "inverse", "result", "running_sum", "running_max", "final_output")
    recipes = [FLOAT32, *(FLOAT32.replace(name=s, **{s: "bfloat16"}) for s in sites)]
    together = error_curves(query, key, value, recipes, contexts=[70, 300])
    for elements in (2 * 4 * 6 * D, 1):
        monkeypatch.setattr(errors_module, "IN_CACHE", elements)
        jax.clear_caches()
        assert_equal(error_curves(query, key, value, recipes, contexts=[70, 300]), together)
    jax.clear_caches()  # what was compiled for these sizes


@pytest.mark.parametrize("site", ["output", "value", "inverse", "result", "probs"])
def test_recipes_that_differ_in_one_site(site, arrays):
    """Whatever they share, each recipe has its own row."""
    query, key, value = (x[:1, :300] for x in arrays)
    recipes = [FLOAT32, FLOAT32.replace(name="narrow", **{site: "bfloat16"})]
    curves = error_curves(query, key, value, recipes, contexts=[70, 300])
    nmse = curves.metrics["nmse"]
    assert np.all(nmse[0] < 1e-11) and np.all(nmse[1] > 1e-9)
    assert np.all(np.abs(curves.metrics["bias_l"][0]) < 1e-5)


@pytest.mark.parametrize("fields", [{"exp": "exp2"}, {"exp": "exp2", "split_kv": 3}])
def test_errors_in_company_are_errors_alone(fields, arrays):
    """In base 2 the log-sum-exp is a product and a sum, and a merge is two: no FMA in either."""
    query, key, value = (x[:1, :300] for x in arrays)
    base = Recipe(kv_block=16, **fields)
    changes = ({}, {"row_sum": "float16"}, {"output": "float16"}, {"running_sum": "fp22"})
    recipes = [base.replace(**change) for change in changes]
    metrics = [*curves_module.METRICS, "lse_error"]
    together = error_curves(query, key, value, recipes, contexts=[23, 64, 300], metrics=metrics)
    for i, recipe in enumerate(recipes):
        alone = error_curves(query, key, value, [recipe], contexts=[23, 64, 300], metrics=metrics)
        for name, x in alone.metrics.items():
            np.testing.assert_array_equal(x[0], together.metrics[name][i], f"{name} of {i}")


def test_two_calls_at_once_leave_the_threads_of_products_as_they_were():
    def threads():
        return [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]

    def enter():
        return Exact(None, np.zeros((1, 1, 1)), [1]).__enter__()

    before = threads()
    one, other = enter(), enter()
    assert set(threads()) == {1}
    one.__exit__()
    assert set(threads()) == {1}
    other.__exit__()
    assert threads() == before


def test_recipes_of_any_structure_keep_their_order(arrays):
    query, key, value = (x[:1, :300] for x in arrays)
    names = ["ggml-cpu-decode", "float32", "metal", "float64", "hexagon-hmx-fp16"]
    curves = error_curves(query, key, value, names, contexts=[300, 70, 70])
    assert curves.recipes == tuple(names)
    assert curves.contexts.tolist() == [70, 300]
    assert curves.kv_block.tolist() == [[1, 1], [64, 64], [64, 64], [64, 64], [64, 64]]
    nmse = curves.metrics["nmse"].max(axis=(1, 2, 3, 4))
    assert nmse[3] < 1e-28 < nmse[1] < 1e-12 < nmse[2] < 1e-6 < nmse[0]
    assert set(curves.metrics) == set(curves_module.METRICS)
    assert {x.dtype for x in curves.metrics.values()} == {np.dtype(np.float32)}
    assert curves.overflow.dtype == curves.stagnated.dtype == np.bool_
    assert not curves.overflow.any() and not curves.stagnated.any()
    assert not jax.config.jax_enable_x64


def test_float64_error_is_below_float32s_resolution(arrays):
    """The difference is taken in float64: a float32 one could not see 1e-15."""
    query, key, value = (x[:1, :300] for x in arrays)
    curves = error_curves(query, key, value, ["float64"], contexts=[300], metrics=["rel_l2"])
    assert list(curves.metrics) == ["rel_l2"]
    assert 0 < curves.metrics["rel_l2"].max() < 2e-15


class TestStreams:
    def test_a_stream_is_its_arrays(self):
        query, stream = inputs.regime(
            "sink", length=9000, seed=1, heads=2, group=2, queries=3, head_dim=H
        )
        key, value = (x[None] for x in stream.blocks(0, 9000))
        recipes = ["hexagon-hmx-fp16", "float32"]
        one = error_curves(query, stream, None, recipes, contexts=[500, 9000])
        other = error_curves(query, key, value, recipes, contexts=[500, 9000])
        assert_equal(one, other)

    @pytest.mark.parametrize(
        ("page", "spoil", "said"),
        [
            (0, lambda key, value: (key[1:], value[1:]), r"\[16384, 1, 8\].* got float16 \[16383"),
            (1, lambda key, value: (key, value[:-1]), r"blocks\(16384, 20000\).*\[3615, 1, 8\]"),
            (1, lambda key, value: (key.astype(np.float32), value), "got float32"),
            (0, lambda key, value: (key[..., :4], value), r"got float16 \[16384, 1, 4\]"),
        ],
    )
    def test_pages_that_do_not_fit_are_refused(self, page, spoil, said):
        query, stream = inputs.regime("gaussian", length=20_000, seed=0, heads=1, head_dim=8)

        class Spoilt:
            def __getattr__(self, name):
                return getattr(stream, name)

            def blocks(self, start, stop):
                found = stream.blocks(start, stop)
                return spoil(*found) if start == page * 2**14 else found

        with pytest.raises(ValueError, match=said):
            error_curves(query, Spoilt(), None, ["float32"], contexts=[20_000])

    def test_a_page_that_the_reference_could_not_take_in_is_not_left_out(self, monkeypatch):
        query, stream = inputs.regime("gaussian", length=40_000, seed=0, heads=1, head_dim=8)
        extend, calls = reference.extend, []

        def failing(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError("no memory")
            return extend(*arguments)

        monkeypatch.setattr(reference, "extend", failing)
        with pytest.raises(MemoryError, match="no memory"):
            error_curves(query, stream, None, ["float32"], contexts=[40_000])
        assert len(calls) == 2

    def test_the_device_is_never_far_behind(self, monkeypatch):
        """Or pieces of keys would pile up there: each is waited for when two more have come."""
        waited, wait = [], jax.block_until_ready
        monkeypatch.setattr(jax, "block_until_ready", lambda x: (waited.append(x), wait(x))[1])
        query, stream = inputs.regime("gaussian", length=2**17, seed=0, heads=1, head_dim=8)
        error_curves(query[:, :2], stream, None, ["float32"], contexts=[2**17])
        assert len(waited) == 2**17 // 2**14 - passes.AHEAD

    def test_pages_are_read_once_where_walks_go_forward(self, monkeypatch):
        query, stream = inputs.regime("gaussian", length=40_000, seed=0, heads=1, head_dim=8)
        asked = []

        class Counted:
            def __getattr__(self, name):
                return getattr(stream, name)

            def blocks(self, start, stop):
                asked.append((start, stop))
                return stream.blocks(start, stop)

        recipes = [FLOAT32, FLOAT32.replace(kv_block=96)]
        for kept in (2**28, 1):  # pages of which not even one has room
            monkeypatch.setattr("jaxattn.pages.KEPT", kept)
            asked.clear()
            error_curves(query, Counted(), None, recipes, contexts=[100, 20_000, 40_000])
            assert len(asked) > 2 and sorted(asked) == sorted(set(asked))

    def test_pages_are_let_go(self, monkeypatch):
        """However far apart the contexts are: 16 pages of 2^14 keys, never more than a few held."""
        held, forget = [], Pages.forget

        def spy(pages, below):
            held.append(len(pages.made))
            forget(pages, below)

        monkeypatch.setattr(Pages, "forget", spy)
        query, stream = inputs.regime("gaussian", length=2**18, seed=0, heads=1, head_dim=8)
        error_curves(query[:, :2], stream, None, ["float32"], contexts=[2**18])
        assert max(held) <= 4

    @pytest.mark.parametrize("changes", [{"kv_order": "backward"}, {"split_kv": 3}])
    def test_pages_that_walks_come_back_to_are_few(self, monkeypatch, changes):
        """Each context has walks of its own, which go over the same keys: 8 pages of 2^14."""
        query, stream = inputs.regime("gaussian", length=2**17, seed=0, heads=1, head_dim=8)
        recipes, contexts = [FLOAT32.replace(name="back", **changes)], [2**16, 2**17]
        expected = error_curves(query[:, :2], stream, None, recipes, contexts=contexts)
        made, read = [], Pages.read

        def spy(pages, start, stop):
            found = read(pages, start, stop)
            made.append(set(pages.made))
            return found

        monkeypatch.setattr(Pages, "read", spy)
        monkeypatch.setattr("jaxattn.pages.KEPT", 3 * 2**14 * (8 + 8) * 2)
        curves = error_curves(query[:, :2], stream, None, recipes, contexts=contexts)
        assert_equal(curves, expected)
        assert max(map(len, made)) <= 4 and set.union(*made) == set(range(8))

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_walk_that_comes_back_finds_pages_that_were_kept(self, monkeypatch, order):
        """However often it goes over ten pages of which six are kept; the oldest go last."""
        query, stream = inputs.regime("gaussian", length=10 * 2**14, seed=0, heads=1, head_dim=8)
        monkeypatch.setattr("jaxattn.pages.KEPT", 6 * 2**14 * (8 + 8) * 2)
        pages, asked = Pages(stream, stream.length), []
        make = pages._make
        monkeypatch.setattr(pages, "_make", lambda *at: (asked.append(at), make(*at))[1])
        for _ in range(4):
            for number in range(10)[::order]:
                pages.read(number * 2**14, (number + 1) * 2**14)
                assert len(pages.made) <= 6
        assert 10 < len(asked) <= 10 + 3 * 8  # 40 where the oldest go first

    def test_queries_of_a_stream_have_no_batch(self):
        query, stream = inputs.regime("gaussian", length=300, seed=0, heads=1, head_dim=8)
        two = np.concatenate([query, query])
        with pytest.raises(ValueError, match="one batch entry"):
            error_curves(two, stream, None, ["float32"])
        with pytest.raises(ValueError, match="value must be None"):
            error_curves(query, stream, two, ["float32"])


class TestContexts:
    def test_default(self):
        assert default_contexts(1024) == [256, 304, 368, 432, 512, 608, 720, 864, 1024]
        assert default_contexts(1000)[-2:] == [864, 1000]
        assert default_contexts(256) == [256] and default_contexts(100) == [100]
        assert default_contexts(1) == [1]
        longer = default_contexts(2**17)
        assert len(longer) == 4 * 9 + 1 and longer == sorted(set(longer))
        assert all(n % 16 == 0 for n in longer)

    def test_they_are_used(self, arrays):
        query, key, value = (x[:1, :500, :1] for x in arrays)
        curves = error_curves(query[:, :1], key, value, ["float32"])
        assert curves.contexts.tolist() == default_contexts(500)
        assert np.isfinite(curves.metrics["nmse"]).all()


class TestFlags:
    def test_a_log_sum_exp_that_float32_cannot_hold_is_no_overflow_of_float64(self):
        large = np.full((1, 600, 1, 8), 1e20, np.float32)
        value = np.ones((1, 600, 1, 8), np.float32)
        curves = error_curves(
            large[:, :1], large, value, ["float64", "float32"], contexts=[600], scale=1.0
        )
        assert curves.overflow.ravel().tolist() == [False, True]

    def test_overflow_and_stagnation(self):
        """Equal scores, blocks of 64: l is 64, 128, … In float16 it passes 65,519 with key 65,520;
        in bfloat16 it stays at 2^14, where 64 is half an ulp."""
        n = 2**16
        query, key = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, n, 1, 1), np.float32)
        value = np.ones((1, n, 1, 1), np.float32)
        recipes = [
            Recipe(name="half", running_sum="float16"),
            Recipe(name="bfloat", running_sum="bfloat16"),
            Recipe(name="wide"),
        ]
        contexts = [16_384, 16_500, 17_000, 65_472, 65_519, 65_520, n]
        curves = error_curves(query, key, value, recipes, contexts=contexts)
        overflow, stagnated = (x[:, :, 0, 0, 0] for x in (curves.overflow, curves.stagnated))
        assert overflow.tolist() == [[False] * 5 + [True] * 2, [False] * 7, [False] * 7]
        assert stagnated[1:].tolist() == [[False] * 2 + [True] * 5, [False] * 7]
        assert not stagnated[0, :5].any()
        bias = curves.metrics["bias_l"][:, :, 0, 0, 0]
        assert np.isposinf(bias[0, 5:]).all()
        np.testing.assert_allclose(bias[0, 3:5], [0, 65_504 / 65_519 - 1], atol=1e-6)
        np.testing.assert_allclose(bias[1], 16_384 / np.array(contexts) - 1, atol=1e-6)
        np.testing.assert_allclose(bias[2], 0, atol=1e-6)

    def test_an_infinite_output_overflows(self):
        query, key = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 300, 1, 1), np.float32)
        value = np.full((1, 300, 1, 1), 500.0, np.float32)
        recipe = Recipe(output="float16")  # 131 keys of 500
        curves = error_curves(query, key, value, [recipe], contexts=[64, 128, 192, 300])
        assert curves.overflow.ravel().tolist() == [False, False, True, True]
        nmse = curves.metrics["nmse"].ravel()
        assert np.isfinite(nmse[:2]).all() and np.isposinf(nmse[2:]).all()


class TestProgress:
    @pytest.mark.parametrize("recipes", [["float32"], ["ggml-cpu-splitkv", "hexagon-hmx-fp16"]])
    def test_it_rises_to_the_end(self, recipes, arrays):
        query, key, value = (x[:1] for x in arrays)
        calls = []
        error_curves(
            *(query, key, value, recipes),
            contexts=[1000, S],
            progress=lambda done, total: calls.append((done, total)),
        )
        done, totals = zip(*calls, strict=True)
        assert len(calls) >= 3 and len(set(totals)) == 1
        assert list(done) == sorted(done) and done[0] >= 0 and done[-1] == totals[-1]

    def test_an_interrupt_passes_and_nothing_stays_behind(self, arrays):
        query, key, value = (x[:1] for x in arrays)

        def interrupt(done, total):
            if done:
                raise KeyboardInterrupt

        expected = error_curves(query, key, value, ["float32"], contexts=[100, S])
        with pytest.raises(KeyboardInterrupt):
            error_curves(query, key, value, ["float32"], contexts=[100, S], progress=interrupt)
        assert not jax.config.jax_enable_x64
        compiled.clear()
        assert_equal(error_curves(query, key, value, ["float32"], contexts=[100, S]), expected)
        assert compiled == []


MEMORY = """
import json, resource, sys
from pathlib import Path
from jaxattn import error_curves, inputs
length = int(sys.argv[1])
query, stream = inputs.regime(
    "gaussian", length=length, seed=0, heads=1, queries=2, head_dim=32, dtype="float32"
)
curves = error_curves(query, stream, None, ["float32"], contexts=[length // 2, length])
# Linux counts the parent's memory into ru_maxrss, but not into VmHWM.
status = Path("/proc/self/status")
if status.exists():
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([float(curves.metrics["nmse"].max()), peak]))
"""


@pytest.mark.parametrize("length", [2**18, pytest.param(2**20, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_context(length):
    """Keys and values of 2^20 keys, and their scores, are 272 MB in float32 and 536 in float64."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(length)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    nmse, peak = json.loads(done.stdout.splitlines()[-1])
    assert nmse < 1e-9
    assert peak < 1.5 * 2**30 * (1.0 if length == 2**20 else 0.7)


def refused(error, said, *recipes, **arguments):
    return pytest.param(error, said, {"recipes": recipes or ("float32",)} | arguments, id=said[:40])


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        refused(ValueError, "unknown recipe 'flaot32'; did you mean .*'float32'", "flaot32"),
        refused(ValueError, "contexts must be whole numbers from 1 to 30 .the keys", contexts=[31]),
        refused(ValueError, "contexts must be whole numbers from 1", contexts=[0]),
        refused(ValueError, "contexts must be whole numbers from 1", contexts=[-4, 3]),
        refused(ValueError, "contexts must be whole numbers from 1", contexts=[2.5]),
        refused(ValueError, "contexts must be whole numbers from 1", contexts=[True]),
        refused(ValueError, "contexts must be a sequence", contexts=[]),
        refused(ValueError, "contexts must be a sequence", contexts=5),
        refused(ValueError, "tile_keys must be whole numbers from 1", tile_keys=64.5),
        refused(ValueError, "tile_keys must be whole numbers from 1", tile_keys=True),
        refused(ValueError, "unknown metric 'nsme'; did you mean 'nmse'", metrics=["nsme"]),
        refused(ValueError, "metrics must be a sequence of names", metrics="nmse"),
        refused(ValueError, "scale must be finite, got nan", scale=float("nan")),
        refused(TypeError, "query must be floating point, got int32", query=np.int32),
        refused(TypeError, "key must be floating point, got complex64", key=np.complex64),
        refused(TypeError, "value must be floating point, got bool", value=np.bool_),
        refused(ValueError, r"query must be \[B, T, N, H\]", query=(3, 2, 8)),
        refused(ValueError, r"query must be \[B, T, N, H\]", query=(1, 0, 2, 8)),
        refused(ValueError, "key and value must be", value=(1, 29, 2, 8)),
        refused(ValueError, "key and value must be", key=(30, 2, 8)),
        refused(ValueError, "key and value must be", key=(1, 0, 2, 8), value=(1, 0, 2, 8)),
        refused(ValueError, "must agree in batch size", query=(2, 3, 2, 8)),
        refused(ValueError, "query has head dim 9, key has 8", query=(1, 3, 2, 9)),
        refused(ValueError, "query heads must be a multiple", query=(1, 3, 3, 8)),
    ],
)
def test_bad_input(error, said, arguments):
    """Arrays are ones of [1, 30, 2, 8], or have another shape or dtype."""
    for name in ("query", "key", "value"):
        what = arguments.get(name, np.float32)
        shape, dtype = (what, np.float32) if isinstance(what, tuple) else ((1, 30, 2, 8), what)
        arguments = arguments | {name: np.ones(shape, dtype)}
    with pytest.raises(error, match=said):
        error_curves(**arguments)


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ([], "at least one recipe"),
        ([{}], "recipes must be Recipes or names, got a dict"),
        ("float32", "sequence"),
    ],
)
def test_bad_recipes(recipes, said):
    given = [np.ones((1, 30, 2, 8), np.float32)] * 3
    with pytest.raises((TypeError, ValueError), match=said):
        error_curves(*given, recipes)


def test_a_nan_among_the_keys_is_shown():
    """A NaN in the inputs is a NaN in the curve, not a crash."""
    query, key, value = (np.ones((1, 30, 2, 8), np.float32) for _ in range(3))
    key[0, 20] = np.nan
    curves = error_curves(query, key, value, ["float32"], contexts=[20, 30])
    assert np.isfinite(curves.metrics["nmse"][:, 0]).all()
    assert not np.isfinite(curves.metrics["nmse"][:, 1]).any()
    assert curves.overflow[:, 1].all() and not curves.overflow[:, 0].any()


def test_curves_are_printed_in_a_line():
    shape = (2, 3, 1, 4, 1)
    x = np.zeros(shape, np.float32)
    made = Curves(("a", "b"), np.array([1, 2, 3000]), {"nmse": x}, x > 0, x > 0, np.zeros((2, 3)))
    assert repr(made) == (
        "Curves of 2 recipes (a, b) at 3 contexts, 1 to 3,000 keys; metrics nmse "
        "[recipe, context, B, T, N] = [2, 3, 1, 4, 1]"
    )
