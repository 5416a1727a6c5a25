"""advise: its front against brute force, what it recommends on fresh draws, what it refuses."""

import json
import sys

import numpy as np
import pytest

from jaxattn import __main__ as command_line
from jaxattn import advice_text, advise, candidates, error_curves, inputs, kernels, lattice
from jaxattn.candidates import front, recommend, staircase, weigher, worse
from jaxattn.cost import WEIGHTS, Cost, dominates
from jaxattn.recipe import Recipe
from plots.answers import figure_of

NARROW = kernels.get("hexagon-hmx-fp16").replace(kv_block=64)
NARROW_L = {"sites": ("running_sum",)}  # the same programs for all tests that weigh l alone
NAMES, CONTEXTS = ("one", "other"), (256, 512, 1024)


def made(recipe, errors, limit=1.0, before=None):
    before = np.ones((2, 3)) if before is None else before
    weigh = weigher(NARROW, before, NAMES, CONTEXTS, limit, (128, 128), None, WEIGHTS)
    return weigh(recipe, np.array(errors, float))


class TestCandidates:
    def test_it_holds_as_far_as_no_input_has_failed(self):
        """An error that passes the limit and returns has failed all the same."""
        got = made(NARROW, [[0.1, 0.2, 0.3], [0.2, 3.0, 0.9]])
        assert (got.safe, got.fails) == (256, (512, "other"))
        assert (got.worst, got.input, got.context) == (3.0, "other", 512)
        assert made(NARROW, [[2.0] * 3] * 2).safe == 0
        assert made(NARROW, [[1.0] * 3] * 2).safe == 1024, "the limit itself is held"

    def test_worse_is_said_of_the_largest_ratio_where_it_matters(self):
        before = np.array([[1.0, 5.0, 1.0], [1e-3, 1e-2, np.inf]])
        after = np.array([[1.05, 4.0, 1.09], [9e-3, 5e-2, np.inf]])
        (found,) = worse(before, after, NAMES, CONTEXTS, limit=1.0)
        assert found == ("other", 512, 1e-2, 5e-2, pytest.approx(5.0))  # 9e-3 does not matter
        assert worse(before, before, NAMES, CONTEXTS, 1.0) == []
        assert worse(np.zeros((2, 3)), before, NAMES, CONTEXTS, 1.0)[0].ratio == np.inf

    @pytest.mark.parametrize("seed", range(5))
    def test_the_front_is_that_of_brute_force(self, seed):
        rng = np.random.default_rng(seed)
        some = [
            made(NARROW, [[error] * 3] * 2)._replace(cost=Cost(*terms), price=float(sum(terms)))
            for error, terms in zip(
                rng.integers(1, 9, 300), rng.integers(1, 4, (300, 10)).tolist(), strict=True
            )
        ]
        assert_front(some, front(some))

    def test_steps_of_a_staircase(self):
        errors, prices = [5, 4, 4, 6, 1], [1.0, 2.0, 3.0, 4.0, 5.0]
        some = [
            made(NARROW, [[error] * 3] * 2)._replace(price=price)
            for error, price in zip(errors, prices, strict=True)
        ]
        assert [step.price for step in staircase(some)] == [1.0, 2.0, 5.0]

    def test_recommended_by_what_may_change(self):
        def one(price, before=None, **change):
            return made(NARROW.replace(**change), [[0.5] * 3] * 2, 1.0, before)._replace(
                price=price
            )

        lower = np.full((2, 3), 0.1)
        some = [
            made(NARROW, [[2.0] * 3] * 2)._replace(price=0.0),  # the cheapest fails
            one(1.0, lower, kv_block=128, max_offset=1.0),
            one(2.0, lower, max_offset=1.0, flush_every=4),
            one(3.0, kv_block=256, max_offset=1.0),
            one(4.0, flush_every=16),
            one(5.0, running_sum="float32", row_sum="float32"),
        ]
        titles = {title: candidate.price for title, candidate in recommend(some, 1.0)}
        assert titles == {
            "cheapest that holds": 1.0,
            "at the same KV block": 2.0,
            "worse on no input": 3.0,
            "by one change": 4.0,
            "by formats alone": 5.0,
        }
        assert recommend(some[:1], 1.0) == []
        assert [title for title, _ in recommend(some[5:], 1.0)] == [
            "cheapest that holds; at the same KV block; worse on no input; by formats alone"
        ]


def assert_front(all_, got):
    """By comparing each with every other; of equals one stays."""
    point = lambda c: (c.worst, *c.cost)  # noqa: E731
    beaten = {
        point(a)
        for a in all_
        for b in all_
        if b.worst <= a.worst
        and (b.cost == a.cost or dominates(b.cost, a.cost))
        and point(a) != point(b)
    }
    assert {point(c) for c in got} == {point(c) for c in all_} - beaten
    assert len({point(c) for c in got}) == len(got)
    assert [c.price for c in got] == sorted(c.price for c in got)


@pytest.fixture
def few(monkeypatch):
    """No mitigations: each would compile a program more."""
    monkeypatch.setattr(lattice, "by_block", lambda kernel: [])
    monkeypatch.setattr(lattice, "mitigations", lambda recipe: [])


def test_float32_l_alone_makes_biased_v_worse_and_that_is_said(few):
    """l and o drift together: lifted alone, l no longer hides what o does (README, the finding)."""
    got = advise.advise(
        NARROW,
        131_072,
        "nmse=5e-3",
        regimes=("sink", "biased_v"),
        formats=("float32",),
        sites=("running_sum",),
        seeds=1,
    )
    assert got.stands.fails is not None and got.stands.fails[1] == "sink"
    ((title, chosen),) = got.recommended
    assert chosen.change == {"running_sum": "float32"} and "worse on no input" not in title
    (said,) = chosen.worse
    assert (said.input, said.context) == ("biased_v", 131_072) and said.ratio > 5
    lines = advice_text.text(got)
    assert any(line.startswith("  WORSE than as it stands on biased_v, up to") for line in lines)
    assert_front([got.stands, chosen], got.front)


def test_a_tolerance_that_nothing_meets(few):
    got = advise.advise(NARROW, 512, "nmse=1e-12", regimes=("gaussian",), seeds=1, **NARROW_L)
    assert got.recommended == () and got.best.worst > 1e-12
    said = "\n".join(advice_text.text(got))
    assert f"none of {got.tried} recipes holds: the best reaches {got.best.worst:.2e}" in said
    assert "what stops it: gaussian" in said and "it holds as it stands" not in said


def test_a_kernel_that_holds_is_told_so(few):
    got = advise.advise(NARROW, 512, "nmse=0.1", regimes=("gaussian",), seeds=1, **NARROW_L)
    said = "\n".join(advice_text.text(got))
    assert f"it holds as it stands, {0.1 / got.stands.worst:.3g} times below" in said
    assert f"as it stands {got.stands.worst:.2e} (gaussian" in said
    own = "where products add in its format: --weights output_ops=0,output_conversions=0"
    assert own not in said  # o is the matrix unit's
    for output in ("float16", "float32"):
        other = NARROW.replace(output=output, output_every=16)
        said = "\n".join(advice_text.text(got._replace(kernel=other)))
        assert (own in said) == (output == "float16")


def test_what_was_weighed_is_what_error_curves_says(few, tmp_path):
    """The statistic over the rows, worst over seeds, at every context; and as JSON."""
    names = ("gaussian", "uniform01")
    got = advise.advise(NARROW, 600, "nmse=1e-3", regimes=names, rows="max", **NARROW_L)
    recipes = lattice.accumulators(NARROW, **NARROW_L)
    want = []
    for name in names:
        draws = [inputs.regime(name, length=600, seed=s, **advise.SIZES) for s in (0, 1)]
        both = [
            error_curves(*draw, None, recipes, contexts=got.contexts, metrics=("nmse",))
            for draw in draws
        ]
        want.append(np.max([c.metrics["nmse"].max(axis=(2, 3, 4)) for c in both], axis=0))
    by_recipe = {c.recipe: c.errors for c in (*got.front, got.stands)}
    assert len(by_recipe) >= 2
    for recipe, errors in by_recipe.items():
        at = recipes.index(recipe)
        np.testing.assert_array_equal(errors, [errors[at] for errors in want])
    read = json.loads(json.dumps(advice_text.values(got), allow_nan=False))
    assert read["tried"] == got.tried == 4 and len(read["front"]) == len(got.front)
    assert read["question"] == "advise" and read["steps"][0] in read["candidates"]
    assert read["candidates"] == [[c.price, c.worst] for c in got.candidates]
    assert read["as_it_stands"]["errors"]["gaussian"] == got.stands.errors[0].tolist()
    (tmp_path / "x.json").write_text(json.dumps(read))
    assert len(figure_of(tmp_path / "x.json").axes) == 1


def test_heads_of_a_capture_are_inputs(tmp_path):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((heads, n, 16)).astype(np.float16)
        for heads, n in ((4, 3), (2, 300), (2, 300))
    )
    key[1] *= 4
    np.savez(tmp_path / "two.npz", query=query, key=key, value=value)
    (source,) = advise.sources_of(300, tmp_path / "two.npz", None, 2)
    assert source.labels == ("head 0", "head 1") and source.sizes == (16, 16)
    got = advise.measure([NARROW], source, [256, 300], "nmse", "median")
    assert got.shape == (1, 2, 2)
    layout = [x.transpose(1, 0, 2)[None] for x in (query, key, value)]
    rows = error_curves(*layout, [NARROW], contexts=[256, 300], metrics=("nmse",)).metrics["nmse"]
    for head in range(2):  # of keys, two of queries each
        want = np.median(rows[0, :, 0, :, 2 * head : 2 * head + 2], axis=(1, 2))
        np.testing.assert_allclose(got[0, head], want, rtol=1e-6)
    assert not np.allclose(got[0, 0], got[0, 1], rtol=0.1)


def test_one_row_that_overflows_is_not_hidden_by_a_median(tmp_path):
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, n, 16)) for n in (7, 600, 600))
    query[:, 0] = 0  # all weights 1, so that l is the number of keys
    np.savez(tmp_path / "one.npz", query=query * 4, key=key, value=value)
    (source,) = advise.sources_of(600, tmp_path / "one.npz", None, 1)
    small = NARROW.replace(name="small", running_sum="e4m10")  # to 255.9
    got = advise.measure([small], source, [128, 600], "nmse", "median")
    assert got[0, 0, 0] < 1e-3 and np.isposinf(got[0, 0, 1])


def test_statistics_of_rows():
    x = np.array([[1.0, 2.0, 3.0, np.inf]])
    assert [float(f(x)[0]) for f in advise.ROWS.values()] == [2.5, np.inf, np.inf]
    assert advise.ROWS["p99"](np.arange(201.0)[None])[0] == 198


def share(recipes, regimes, context, limit, seeds):
    """[recipe]: of draws (one seed of each regime), those in which it holds up to the context."""
    contexts = advise.default_contexts(context)
    held = np.zeros(len(recipes))
    for seed in seeds:
        draws = [advise.draw(name, context, seed) for name in regimes]
        errors = [advise.measure(recipes, draw, contexts, "nmse", "median") for draw in draws]
        held += (np.concatenate(errors, axis=1) <= limit).all(axis=(1, 2))
    return held / len(seeds)


def test_what_is_recommended_holds_on_fresh_seeds(few):
    limit, regimes = 1e-5, ("sink",)
    got = advise.advise(NARROW, 4096, f"nmse={limit}", regimes=regimes, **NARROW_L)
    recipes = lattice.accumulators(NARROW, **NARROW_L)
    shares = share(recipes, regimes, 4096, limit, range(100, 105))
    chosen = [shares[recipes.index(candidate.recipe)] for _, candidate in got.recommended]
    assert chosen and min(chosen) >= 0.8 and shares[0] <= 0.2


@pytest.mark.slow
def test_what_is_recommended_holds_on_a_hundred_fresh_seeds():
    limit, regimes = 1e-5, advise.DEFAULT_REGIMES
    got = advise.advise(NARROW, 8192, f"nmse={limit}")
    recipes = [candidate.recipe for _, candidate in got.recommended]
    assert len(recipes) >= 2
    shares = share(recipes, regimes, 8192, limit, range(1000, 1100))
    assert min(shares) >= 0.95, shares


class TestCommandLine:
    @staticmethod
    def run(monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["jaxattn", "advise", *arguments])
        with pytest.raises(SystemExit) as stop:
            command_line.main()
        return stop.value.code, capsys.readouterr()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("--kernel", "hexagon-hmx-fp61"), "did you mean 'hexagon-hmx-fp16'"),
            (("--tolerance", "5e-4"), "metric=number"),
            (("--tolerance", "nmes=5e-4"), "did you mean 'nmse'"),
            (("--tolerance", "nmse=-1"), "must be a positive number"),
            (("--tolerance", "cosine=0.9"), "an error, which cosine is not"),
            (("--context", "100"), "at least 256"),
            (("--context", "2147483648"), "at most 1073741824"),
            (("--regime", "gausian"), "did you mean 'gaussian'"),
            (("--regime", "gaussian", "--inputs", "short.npz"), "not from both"),
            (("--inputs", "short.npz"), "ends after 300 keys; ask for 300 or less"),
            (("--inputs", "short.npz", "--seeds", "3"), "--seeds has no meaning"),
            (("--inputs", "none.npz"), "no such file"),
            (("--seeds", "0"), "seeds must be at least 1"),
            (("--allow", "float16,float61"), "unknown format 'float61'"),
            (("--rows", "mean"), "unknown statistic of rows 'mean'"),
            (("--weights", "draw=2"), "did you mean 'draws'"),
            (("--set", "runing_sum=fp22"), "did you mean 'running_sum'"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(
        self, monkeypatch, capsys, tmp_path, change, said
    ):
        monkeypatch.chdir(tmp_path)
        x = np.zeros((1, 300, 8), np.float16)
        np.savez("short.npz", query=x[:, :2], key=x, value=x)
        arguments = {"--kernel": "hexagon-hmx-fp16", "--context": "1024"}
        arguments |= dict(zip(change[::2], change[1::2], strict=True))
        flat = [word for pair in arguments.items() for word in pair]
        code, printed = self.run(monkeypatch, capsys, *flat)
        assert code == 2 and printed.out == ""
        assert said in printed.err and len(printed.err.splitlines()) == 1

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_an_answer(self, monkeypatch, capsys, few, form):
        arguments = ("--kernel", "float32", "--context", "300", "--regime", "gaussian")
        arguments += ("--seeds", "1", "--allow", "float16,float32", "--weights", "draws=0")
        code, printed = self.run(
            monkeypatch, capsys, *arguments, *(("--json",) if form == "json" else ())
        )
        assert code == 0 and "gaussian, seed 0 (1/1)" in printed.err
        if form == "json":
            answer = json.loads(printed.out)
            assert answer["weights"]["draws"] == 0 and answer["recommended"][0]["holds"]
        else:
            assert "safe context of the kernel" in printed.out and "price" in printed.out


def test_mitigations_are_tried_on_the_kernel_and_on_cheap_steps():
    some = [made(Recipe(), [[5.0] * 3, [1.0] * 3])._replace(price=9.0)]
    for price, errors in enumerate([(5.0, 2.0), (1.0, 3.0), (0.5, 0.1)]):
        some.append(made(NARROW, [[e] * 3 for e in errors])._replace(price=float(price)))
    assert {id(c) for c in advise._bases(some)} == {id(c) for c in some}
    many = some * (advise.MOST_BASES + 1)
    assert len(advise._bases([c._replace(price=c.price) for c in many])) <= advise.MOST_BASES
    assert candidates.WORSE > 1
