"""compare: an observed output's error, and the recipe that made it found among many."""

import json

import ml_dtypes
import numpy as np
import pytest
from command import run
from typer.testing import CliRunner

import jaxattn
from jaxattn import __main__ as cli
from jaxattn import compare as module
from jaxattn import kernels
from jaxattn.agreement import Agreement, agreement, correlation
from jaxattn.compare import compare
from jaxattn.compare_text import advice, text, to_dict, verdict
from jaxattn.outputs import outputs
from plots.answers import figure_of

RNG = np.random.default_rng(7)
QUERY = RNG.standard_normal((1, 8, 4, 32)).astype(np.float16)
KEY, VALUE = (RNG.standard_normal((2, 1, 1500, 2, 32)) + 0.3).astype(np.float16)
SITES = {"running_sum": "bfloat16", "output": "bfloat16", "probs": "e5m4", "row_sum": "e5m5"}


BASE = kernels.get("hexagon-hmx-fp16").replace(kv_block=64)
# Recipes of one program, which most tests here offer: nothing compiles twice.
OFFERED = [BASE, *(BASE.replace(name=site, **{site: f}) for site, f in SITES.items())]


def made_by(recipe, query=QUERY, key=KEY, value=VALUE, dtype=np.float16, **arguments):
    wide = query.astype(np.float32)
    out = jaxattn.dot_product_attention(wide, key, value, recipe=recipe, **arguments)
    return np.asarray(out).astype(dtype)


@pytest.mark.parametrize("hidden", OFFERED[1:2], ids=lambda recipe: recipe.name)
def test_the_hidden_recipe_is_found_among_its_likes(hidden, more=()):
    found = compare(QUERY, KEY, VALUE, made_by(hidden), [*OFFERED, *more])
    assert found.recipes[0] == hidden.name
    assert found.agreement[0].correlation > 0.9999
    assert found.agreement[1].correlation < 0.99
    assert (found.correlation[0] > 0.999).all()
    assert found.correlation.shape == (5 + len(more), 1, 4)
    assert hidden.name in verdict(found) and not found.remarks
    name, *changes = hidden.name.split("+")
    known = name in kernels.names()  # then what is left to ask is where it is safe
    asked = f"jaxattn advise --kernel {' --set '.join([name, *changes])} --context 131072"
    assert advice(found) == [f"up to what context that is safe: {asked}"] * known


@pytest.mark.slow
@pytest.mark.parametrize("hidden", OFFERED[:2], ids=lambda recipe: recipe.name)
def test_the_hidden_recipe_is_found_among_others(hidden):
    test_the_hidden_recipe_is_found_among_its_likes(
        hidden, ("metal", "float32", "hexagon-hmx-fp32")
    )


def test_an_output_without_error_names_no_recipe():
    key, value = KEY[:, :1], VALUE[:, :1]  # one key has weight 1
    found = compare(QUERY, key, value, np.repeat(value, 2, 2).repeat(8, 1), OFFERED[:2])
    assert verdict(found).startswith("no error against float64; of the recipes tried so ")
    assert not advice(found)
    assert text(found)[-1] == verdict(found)


def test_a_control_that_errs_otherwise_explains_nothing():
    near, control = (Agreement(c, 1.0, 9e-4, 1e-7, 90.0, 0.0) for c in (0.53, -0.09))
    some = np.zeros((2, 1, 1))
    found = module.Comparison(("near", "float32"), (near, control), some, {}, {}, (), ())
    assert verdict(found) == "errs partly as near does: correlation 0.530"


def test_an_output_that_is_not_finite_is_refused():
    output = made_by(BASE)
    output[0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="output must be finite"):
        compare(QUERY, KEY, VALUE, output, OFFERED[:1])


def test_a_kernel_that_is_not_offered_is_not_claimed(monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", ())
    exact = jaxattn.reference_attention(QUERY, KEY, VALUE)
    rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float16)
    found = compare(QUERY, KEY, VALUE, rounded, OFFERED)
    assert found.agreement[0].correlation < 0.5
    assert "no recipe of 5 errs like this kernel" in verdict(found)
    lines = advice(found)
    tried = " ".join(lines[: -1 - lines[-1].startswith("  ")])
    assert tried.startswith("tried: ") and all(recipe.name in tried for recipe in OFFERED)
    assert "--recipes all" in "".join(lines) and "--set kv_block=" in "".join(lines)
    assert text(found)[-len(lines) :] == to_dict(found)["advice"] == lines
    assert all(len(line) <= 100 for line in lines)


def by_hand(query, key, value, block):
    """FP16 attention as one writes it: all that is stored is half, sums within a block are float32;
    [T, H], [S, H], [S, D] -> [T, D]."""
    half, single = np.float16, np.float32
    m = np.full(len(query), -np.inf, half)
    l, o = np.zeros(len(query), half), np.zeros((len(query), value.shape[1]), half)
    for first in range(0, len(key), block):
        k, v = (x[first : first + block].astype(single) for x in (key, value))
        scale = single(half(query.shape[1] ** -0.5))
        s = (query.astype(single) @ k.T * scale).astype(half)
        peak = np.maximum(m, s.max(1))
        p = np.exp((s - peak[:, None]).astype(single)).astype(half)
        a = np.exp((m - peak).astype(single)).astype(half).astype(single)
        l = (a * l + p.astype(single).sum(1).astype(half)).astype(half)
        o = (a[:, None] * o + p.astype(single) @ v).astype(half)
        m = peak
    return (o.astype(single) / l[:, None].astype(single)).astype(half)


def test_a_kernel_of_other_blocks_is_found_at_its_own(monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", (64, 512))
    heads = [by_hand(QUERY[0, :, n], KEY[0, :, n // 2], VALUE[0, :, n // 2], 64) for n in range(4)]
    output, lines = np.stack(heads, 1)[None], []
    offered = [recipe.replace(kv_block=512) for recipe in OFFERED[:2]]
    found = compare(QUERY, KEY, VALUE, output, offered, progress=lines.append)
    assert found.recipes[0] == f"{BASE.name}+kv_block=64"
    own, likes, *others = (one.correlation for one in found.agreement)
    assert own > 0.8 > 0.5 > max(likes, *others)
    assert any("other KV blocks are tried" in line for line in lines)
    assert f"errs partly as {BASE.name}+kv_block=64 does" in verdict(found)
    told = " ".join(advice(found))
    assert f"{found.agreement[0].unexplained:.0%} of the error" in told
    assert f"--recipes {BASE.name} --set kv_block=64 --set FIELD=VALUE" in told


@pytest.mark.slow
def test_a_kernel_of_other_blocks_is_found_among_the_candidates():
    query = RNG.standard_normal((1, 16, 4, 64)).astype(np.float16)
    key, value = RNG.standard_normal((2, 1, 4096, 2, 64)).astype(np.float16)
    heads = [by_hand(query[0, :, n], key[0, :, n // 2], value[0, :, n // 2], 64) for n in range(4)]
    found = compare(query, key, value, np.stack(heads, 1)[None])
    assert found.recipes[0] == "hexagon-hmx-fp16+kv_block=64"
    assert found.agreement[0].correlation > 0.9 > 0.85 > found.agreement[1].correlation
    assert set(module.CANDIDATES) < set(found.recipes)


def test_a_causal_kernel_compared_without_causal_is_told_at_once_and_in_the_end():
    value, mask, lines = VALUE.copy(), np.tri(8, 1500, 1492, dtype=bool), []
    value[:, -4:] += 600  # which the first four queries do not see
    exact = jaxattn.reference_attention(QUERY, KEY, value, mask=mask).astype(np.float16)
    found = compare(QUERY, KEY, value, exact, OFFERED, progress=lines.append)
    assert lines[0].startswith("with --causal the largest NMSE of a query is ")
    assert "rows, queries 0 to " in found.remarks[0] and found.remarks[1:] == (lines[0],)
    assert not advice(found) and len(found.recipes) == 5  # other blocks would tell nothing


def test_metrics_are_those_of_numpy():
    output = made_by(OFFERED[1])
    found = compare(QUERY, KEY, VALUE, output, OFFERED)
    exact = jaxattn.reference_attention(QUERY, KEY, VALUE)
    error = output.astype(np.float64) - exact
    nmse = (error**2).sum(-1) / (exact**2).sum(-1)
    llama = (error**2).sum((1, 3)) / (output.astype(np.float64) ** 2).sum((1, 3))
    expected = {
        "nmse": np.median(nmse, 1),
        "nmse_llama": llama,
        "rel_l2": np.median(np.sqrt(nmse), 1),
        "max_abs": abs(error).max((1, 3)),
        "bias_o": np.median((error * exact).sum(-1) / (exact**2).sum(-1), 1),
    }
    assert tuple(found.observed) == module.METRICS
    for name, values in expected.items():
        np.testing.assert_allclose(found.observed[name], values, rtol=1e-5, err_msg=name)
    for name, values in found.emulated.items():  # the recipe itself comes first
        np.testing.assert_allclose(values[0], found.observed[name], rtol=1e-3, err_msg=name)


def test_causal_regions_group_queries_by_the_keys_that_they_see(tmp_path):
    query = np.resize(QUERY[:, :, :2], (1, 400, 2, 32))
    key, value = KEY[:, :600], VALUE[:, :600]
    mask = np.tri(400, 600, 200, dtype=bool)[None, None]
    narrow = kernels.get("float32").replace(name="narrow", kv_block=4, output="bfloat16")
    output = made_by(narrow, query, key, value, mask=mask)
    found = compare(query, key, value, output, [narrow], names=("nmse",), causal=True)
    assert found.agreement[0].correlation > 0.9999
    assert [r[:3] for r in found.regions] == [(0, 256, 56), (256, 512, 256), (512, 1024, 88)]
    exact = jaxattn.reference_attention(query, key, value, mask=mask)
    nmse = ((output - exact) ** 2).sum(-1) / (exact**2).sum(-1)
    first, _, last = found.regions
    np.testing.assert_allclose(last.observed["nmse"], np.median(nmse[:, 312:], 1), rtol=1e-5)
    np.testing.assert_allclose(last.emulated["nmse"][0], last.observed["nmse"], rtol=1e-3)
    assert (last.observed["nmse"] > 1.2 * first.observed["nmse"]).all()  # a rounding each block
    (tmp_path / "x.json").write_text(json.dumps(to_dict(found)))
    assert len(figure_of(tmp_path / "x.json").axes) == 2  # a panel for each head


@pytest.mark.parametrize(
    ("spoil", "remark"),
    [
        (lambda x: 0 * x, "all heads: all zero: it looks like a kernel that did not run"),
        (lambda x: 0 * x + 1, "all heads: one number throughout"),
        (lambda x: np.where(np.arange(4)[:, None] == 2, 0, x), "head 2: all zero"),
        (lambda x: -x, "all heads: further from float64 than rounding goes"),
    ],
)
def test_outputs_that_are_no_attention_are_told_and_numbered_all_the_same(spoil, remark):
    output = spoil(made_by(OFFERED[1])).astype(np.float16)
    found = compare(QUERY, KEY, VALUE, output, OFFERED)
    assert any(remark in line for line in found.remarks), found.remarks
    assert np.isfinite(found.observed["nmse"]).all()
    told = json.loads(json.dumps(to_dict(found)))
    assert told["question"] == "compare" and told["remarks"] and text(found)


def test_agreement_of_vectors_with_known_angles():
    reference = np.ones((2, 3))
    a, b = np.array([[1.0, -1, 0], [0, 0, 0]]), np.array([[1.0, 0, -1], [0, 0, 0]])
    found = agreement(reference + a, reference + b, reference)
    assert found.correlation == pytest.approx(0.5)
    assert found.unexplained == pytest.approx(1.0)
    assert found.rms_ratio == pytest.approx(1.0)
    assert (found.nmse_real, found.equal) == (pytest.approx(1 / 3), pytest.approx(4 / 6))
    assert np.isnan(correlation(np.zeros(3), a[0])) and np.isnan(correlation(a * np.nan, b))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"output": VALUE}, r"output must be \[B, T, N, D\] = \(1, 8, 4, 32\)"),
        ({"names": ("bias_l",)}, "bias_l needs the kernel's log-sum-exp"),
        ({"names": ("nsme",)}, "did you mean 'nmse'"),
        ({"recipes": ()}, "at least one recipe"),
        ({"recipes": ("metall",)}, "metal"),
        ({"scale": float("nan")}, "scale must be finite"),
        (
            {"key": KEY[:, :5], "value": VALUE[:, :5], "causal": True},
            "first 3 queries without a.*three axes are read",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, match):
    given = {"query": QUERY, "key": KEY, "value": VALUE, "output": np.zeros(QUERY.shape)}
    given = {**given, "recipes": ("float32",), **arguments}
    names = [given.pop(name) for name in ("query", "key", "value", "output", "recipes")]
    with pytest.raises(ValueError, match=match):
        compare(*names, **given)


def test_the_command_names_the_kernel(tmp_path, monkeypatch, capsys):
    path, base = tmp_path / "mine.npz", kernels.get("float32")
    both = outputs(QUERY, KEY, VALUE, [base, base.replace(output="bfloat16")], contexts=[1500])
    output = both.output[1, 0].astype(np.float16)
    np.savez(path, query=QUERY, key=KEY, value=VALUE, output=output)
    options = (path, "--recipes", "float32", "--set", "output=bfloat16", "--metrics", "nmse,cosine")
    code, out, error = run(monkeypatch, capsys, "compare", *options)
    assert code == 0 and "recipes:" not in out
    assert error.splitlines() == ["jaxattn: 2 recipes: 0%", "jaxattn: 2 recipes: 100%"]
    assert "errs as float32+output=bfloat16 does: correlation 1.0" in out
    code, out, _ = run(monkeypatch, capsys, "compare", *options, "--json")
    told = json.loads(out)
    assert told["recipes"][0]["recipe"] == "float32+output=bfloat16"
    assert told["recipes"][0]["correlation"] > 0.9999 and list(told["observed"]) == [
        "nmse",
        "cosine",
    ]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"output": None}, (), "lacks the array 'output'"),
        ({"output": VALUE}, (), "output must have the tokens and heads of query"),
        ({"output": np.ones((1, 8, 4, 32), int)}, (), "output must hold floats"),
        ({"output": np.full((1, 8, 4, 32), np.nan, np.float16)}, (), "a capture must be finite"),
        ({"output": np.full((1, 8, 4, 32), np.inf, np.float16)}, (), "a capture must be finite"),
        ({}, ("--set", "storage=float32"), "changes none of the recipes"),
        ({}, ("--set", "no=float32"), "recipe field"),
        ({}, ("--recipes", "metall"), "metal"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    change, options, message, tmp_path, monkeypatch, capsys
):
    arrays = {"query": QUERY, "key": KEY, "value": VALUE, "output": QUERY, **change}
    np.savez(tmp_path / "x.npz", **{name: x for name, x in arrays.items() if x is not None})
    code, out, error = run(monkeypatch, capsys, "compare", tmp_path / "x.npz", *options)
    assert code == 2 and not out and message in error
    assert error.startswith("jaxattn: ") and error.count("\n") == 1


def test_help_says_what_a_capture_holds():
    told = " ".join(CliRunner().invoke(cli.app, ["compare", "--help"]).output.split())
    assert "Query, key, value" in told and "[batch, token, head, dim]" in told
    assert f"Tries {len(module.CANDIDATES)} recipes by itself" in told and "minute" in told


@pytest.mark.slow
def test_the_real_ggml_kernel_is_recognised_among_the_candidates():
    """Outputs of ggml's own CPU kernel, kept in tests/golden, at 4,096 keys."""
    from test_golden import CASES, REAL, draw

    name = next(n for n, c in CASES.items() if n.startswith("decode") and c["keys"] == 4096)
    query, key, value = (np.moveaxis(x, 0, 1)[None] for x in draw(CASES[name]))
    output, scale = np.moveaxis(REAL[name], 0, 1)[None], CASES[name]["scale"]
    found = compare(query, key, value, output, scale=scale)
    assert found.recipes[0] == "ggml-cpu-decode" and found.agreement[0].correlation > 0.9995
    assert found.agreement[1].correlation < 0.99


@pytest.mark.parametrize(("best", "said"), [(0.30, "as well: it is the rounding"), (0.20, None)])
def test_a_recipe_that_explains_no_more_than_float32_is_not_the_kernel(best, said):
    near = Agreement(0.95, best, 1e-3, 1e-3, 1.0, 0.5)
    control = near._replace(correlation=0.949, unexplained=0.31)
    found = module.Comparison(("metal", "float32"), (near, control), np.ones((2, 1, 1)), *4 * [{}])
    assert (said or "correlation 0.950") in verdict(found)
    assert ("as well" in verdict(found)) == bool(said)
