"""thresholds: planted defects are seen, sound kernels are not, stated rates are what they are."""

import functools
import json

import numpy as np
import pytest
from command import run
from scipy.stats import binomtest

from jaxattn import inputs, kernels, practice, thresholds, verdicts
from jaxattn.fields import SITES
from jaxattn.formats import BFLOAT16, FLOAT32, name_of
from jaxattn.practice import LLAMA, MATRICES, RULES, STATISTICS, Rule, rule_of
from jaxattn.trials import ACCUMULATORS, SIZES, Tried, attempt, levels, lifted, rate, separate
from plots.answers import figure_of

RNG = np.random.default_rng(11)
SMALL = {"queries": 4, "heads": 2, "group": 1, "head_dim": 16}
METAL = kernels.get("metal")
PLANTED = METAL.replace(name="planted", running_sum="float8_e5m2")


def test_statistics_are_those_of_the_sources():
    out, oracle, unit = RNG.standard_normal((3, 40, 8))
    error = out - oracle
    llama = np.mean(error**2) / np.mean(out**2)  # mse(a, b) / mse(a, 0), a under test
    assert STATISTICS["nmse_llama"](out, oracle, unit, 0) == pytest.approx(llama)
    assert STATISTICS["nmse"](out, oracle, unit, 0) == pytest.approx(
        llama * np.mean(out**2) / np.mean(oracle**2)
    )
    assert STATISTICS["max_abs"](out, oracle, unit, 0) == abs(error).max()
    t = STATISTICS["close"](out, oracle, unit, 0)
    assert np.allclose(out, oracle, rtol=t * 1.0001, atol=t * 1.0001)
    assert not np.allclose(out, oracle, rtol=t * 0.9999, atol=t * 0.9999)
    times = STATISTICS["times_baseline"](out, oracle, unit, 0.1)
    assert abs(error).max() == pytest.approx(times * abs(unit - oracle).max() + 0.1)


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: matrix.name)
def test_matrices_name_what_exists(matrix):
    assert matrix.inputs in inputs.REGIMES and list(matrix.contexts) == sorted(matrix.contexts)
    assert matrix.rule.statistic in STATISTICS and matrix.citation.count(" at ") == 1
    assert "{" not in matrix.shape.format(keys=777).replace("{1, 1}", "")
    assert "777" in matrix.shape.format(keys=777)
    for one in (matrix.rule.oracle, matrix.rule.baseline):
        if isinstance(one, str):
            kernels.get(one)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("nmse=1e-3", Rule("nmse", 1e-3)),
        ("allclose", Rule("close", 1e-3)),
        ("fa2x=3", RULES["fa2x"]._replace(limit=3.0)),
    ],
)
def test_a_metric_and_its_limit(text, rule):
    assert rule_of(text) == rule


@pytest.mark.parametrize("text", ["nsme", "nmse=", "nmse=x", "nmse=-1", "nmse=nan", "nmse=inf"])
def test_a_metric_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="metric"):
        rule_of(text)


@pytest.mark.parametrize("name", kernels.names())
def test_the_lifted_kernel_keeps_what_is_no_accumulator(name):
    recipe = kernels.get(name)
    sound = lifted(recipe)
    for site in SITES:
        was, now = getattr(recipe, site), getattr(sound, site)
        if site in ACCUMULATORS:
            assert now == FLOAT32 or (now == was and name_of(was) == "float64"), site
        else:
            assert now == was, site
    assert sound.kv_block == recipe.kv_block and sound.exp == recipe.exp


def test_limits_err_least():
    for shift in (0.5, 1.5, 30.0):
        good, bad = np.exp(RNG.standard_normal(30)), np.exp(RNG.standard_normal(30) + shift)
        limit = separate(good, bad)
        at = np.append(np.geomspace(1e-4, 1e16, 5001), limit)
        wrong = [np.sum(good > x) + np.sum(bad <= x) for x in at]
        assert wrong[-1] <= min(wrong) + 1  # two digits may let one slip
    assert good.max() < limit < bad.min()
    assert 0 < separate(np.array([0.0, 0.0]), np.array([np.inf, np.inf])) < np.inf
    assert separate(np.array([1.0, 2.0]), np.array([np.inf, np.inf])) > 2
    good, bad = np.array([1.001e-4] * 9), np.array([1.0035e-4] * 9)  # two digits cannot tell
    assert (good <= separate(good, bad)).all() and (bad > separate(good, bad)).all()
    assert 1.1e-5 < separate(np.array([1e-5, 1.1e-5, np.inf]), np.full(3, np.inf)) < np.inf
    assert separate(np.full(3, np.inf), np.full(3, np.inf)) == np.inf


def test_intervals_are_exact():
    events = np.array([False] * 16)
    assert rate(events) == pytest.approx((0, 16, 0.0, 1 - 0.025 ** (1 / 16)))
    assert rate(~events) == pytest.approx((16, 16, 0.025 ** (1 / 16), 1.0))


def test_a_planted_defect_is_seen_and_float32_is_not():
    rule = Rule("nmse", 5e-4)
    for kernel, seen in ((PLANTED, True), (METAL, False)):
        (tried,) = attempt(kernel, [rule], "gaussian", (300, 600), (0, 1), SMALL)
        assert tried.kernel.shape == tried.lifted.shape == (2, 2)
        assert (tried.seen is not None) == seen and tried.false_alarm is None
    np.testing.assert_array_equal(tried.kernel, tried.lifted)  # float32 is its own correction


def test_an_oracle_does_not_see_itself_and_fails_a_sound_kernel():
    rules = [Rule("nmse", 5e-4, oracle=PLANTED), Rule("nmse", 5e-4)]
    by_itself, by_float64 = attempt(PLANTED, rules, "gaussian", (300, 600), (0,), SMALL)
    assert (by_itself.kernel == 0).all() and by_itself.false_alarm == 300
    assert by_float64.seen == 300 and by_float64.false_alarm is None


def test_a_changed_kernel_is_not_taken_for_the_oracle_of_its_name():
    kernel = METAL.replace(running_sum="float8_e5m2")  # still named metal
    (tried,) = attempt(
        kernel, [Rule("nmse", 5e-4, oracle="metal")], "gaussian", (300,), (0,), SMALL
    )
    assert tried.seen == 300 and tried.false_alarm is None


def test_an_overflow_is_seen():
    """l passes e4m3's 448 and is inf, so that the output is 0; with v inf, the output is nan."""
    kernel = METAL.replace(name="overflows", running_sum="e4m3")
    rules = [Rule("nmse", 5e-4), Rule("nmse_llama", 5e-4)]
    by_oracle, by_output = attempt(kernel, rules, "flat", (300, 600), (0,), SMALL)
    assert by_oracle.kernel[1] == pytest.approx(1) and by_output.kernel[1] == np.inf
    kernel = METAL.replace(name="broken", rescaled_output="e2m3", output="e2m3")
    for tried in attempt(kernel, rules, "flat", (300, 600), (0,), SMALL):
        assert tried.kernel[1] == np.inf and tried.lifted[1] < 1e-6


@pytest.fixture(scope="module")
def found():
    """Samples and the matrix have the shape of the search, so that one program does for all."""
    shape = SIZES
    matrix = LLAMA._replace(contexts=(113,), sizes=shape, rule=Rule("nmse_llama", 5e-4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "SAMPLE_SIZES", shape)
        patch.setattr(thresholds, "SAMPLE_HEADS", shape["heads"])
        return thresholds.thresholds(
            PLANTED, max_context=512, seeds=2, samples=16, matrices=(matrix,), regimes=("gaussian",)
        )


def test_answers_in_words_and_numbers(found):
    words = "\n".join(verdicts.text(found))
    assert "gaussian: seen from 256" in words and "new test_flash_attn_ext(128, 128, 4" in words
    assert "lets the lifted one pass: 256, with inputs gaussian" in words
    assert found.practice[LLAMA.name].seen == 113
    assert [level.context for level in found.levels["gaussian"]] == [256, 512]
    for level in found.levels["gaussian"]:
        assert level.lifted < level.limit < level.kernel
        assert level.false_alarm[:2] == level.miss[:2] == (0, 8)
    told = json.loads(json.dumps(thresholds_plain(found)))
    assert told["limits"]["gaussian"][0]["context"] == 256
    assert told["tests"][0]["longer"]["gaussian"]["seen_from"] == 256


def test_a_shape_is_proposed_once_it_was_tried_at_its_own_size(found):
    assert found.shapes == {LLAMA.name: thresholds.Shape("gaussian", 256, 8, 0, 8)}
    assert "    sees it in 8 of 8 draws of this shape, with inputs gaussian" in verdicts.text(found)
    judged = [thresholds.Shape("gaussian", 256, *x) for x in ((4, 0, 8), (8, 1, 8), (5, 0, 8))]
    assert [shape.tells for shape in judged] == [False, False, True]
    places = thresholds._places(found.search, LLAMA, ["gaussian"])
    assert list(places) == [("gaussian", 256), ("gaussian", 512)]
    withheld = "\n".join(verdicts.advice(found._replace(shapes={}), LLAMA))
    assert "by its own limit does not see it" in withheld
    matrix = LLAMA._replace(sizes=SMALL, rule=Rule("nmse_llama", 5e-4))
    tried = thresholds._tried(METAL, matrix, "gaussian", 64)
    assert (tried.seen, tried.alarms, tried.draws) == (0, 0, 8)


def test_the_answer_as_json_can_be_drawn(found, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(thresholds_plain(found)))
    assert len(figure_of(tmp_path / "x.json").axes) == 1


def thresholds_plain(found):
    from jaxattn.compare_text import plain

    return plain(verdicts.to_dict(found))


def test_the_command_answers(found, monkeypatch, capsys):
    asked = []

    def answer(kernel, rule, **options):
        asked.append((kernel, rule, options))
        return found

    monkeypatch.setattr(thresholds, "thresholds", answer)
    options = ("--kernel", "metal", "--set", "output=float16", "--metric", "nmse=1e-3")
    code, out, _ = run(
        monkeypatch, capsys, "thresholds", *options, "--regime", "flat,sink", "--seeds", "5"
    )
    assert code == 0 and "What to add" in out
    ((kernel, rule, given),) = asked
    assert name_of(kernel.output) == "float16" and rule == Rule("nmse", 1e-3)
    assert given["regimes"] == ("flat", "sink") and given["seeds"] == 5
    code, out, _ = run(monkeypatch, capsys, "thresholds", *options, "--json")
    assert json.loads(out)["kernel"] == "planted" and json.loads(out)["question"] == "thresholds"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kernel", "metall"), "metal"),
        (("--kernel", "metal", "--metric", "nsme"), "metric"),
        (("--kernel", "metal", "--set", "output=float32"), "changes none"),
        (("--kernel", "metal", "--max-context", "100"), "max_context must be from 256"),
        (("--kernel", "metal", "--seeds", "0"), "seeds must be"),
        (("--kernel", "metal", "--samples", "20"), "samples must be a multiple of 8"),
        (("--kernel", "metal", "--regime", "gausian"), "gaussian"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, monkeypatch, capsys):
    code, out, error = run(monkeypatch, capsys, "thresholds", *options)
    assert code == 2 and not out and message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: matrix.name)
def test_every_test_in_practice_sees_a_planted_defect_and_lets_float32_pass(matrix):
    contexts = [n for n in matrix.contexts if n <= 2048]
    for kernel, seen in ((kernels.get("flashinfer-fp16"), False), (PLANTED, True)):
        (tried,) = attempt(kernel, [matrix.rule], matrix.inputs, contexts, (0, 1), matrix.sizes)
        assert (tried.seen is not None) == seen
        assert tried.false_alarm is None


@pytest.mark.slow
@pytest.mark.parametrize("output", ["bfloat16", "e5m12"])
def test_fresh_draws_err_as_often_as_stated(output):
    """A plain defect, and one so small that no limit tells every draw."""
    kernel = kernels.get("flashinfer-fp16").replace(name="narrow", output=output)
    rule, contexts, sizes = Rule("nmse", 5e-4), (256, 1024), {**SMALL, "heads": 8}
    draw = functools.partial(
        attempt, kernel, [rule], "gaussian", contexts, sizes=sizes, by_head=True
    )
    (sample,), (fresh,) = draw(range(16)), draw(range(5000, 5050))
    for i, level in enumerate(levels(sample)):
        alarms, misses = fresh.lifted[i] > level.limit, fresh.kernel[i] <= level.limit
        for stated, events in ((level.false_alarm, alarms), (level.miss, misses)):
            k, n = int(events.sum()), len(events)
            assert n == 400 and stated[1] == 64
            # the true rate lies in the stated interval, as far as the fresh draws can tell
            assert binomtest(k, n, stated[3], "greater").pvalue > 1e-3
            assert binomtest(k, n, stated[2], "less").pvalue > 1e-3
        if output == "e5m12" and i == 0:
            assert 0.05 < alarms.mean() + misses.mean() < 1


def test_the_baseline_is_the_kernel_that_the_source_describes():
    """UNFUSED against a NumPy walk of attention_ref(upcast=False): the same error vector."""
    import jaxattn

    query = RNG.standard_normal((1, 4, 2, 64)).astype(np.float16)
    key, value = RNG.standard_normal((2, 1, 200, 2, 64)).astype(np.float16)
    half = np.float16
    q = (query / half(8)).astype(half).astype(np.float32)
    scores = np.einsum("btnh,bsnh->bnts", q, key.astype(np.float32)).astype(half)
    p = np.exp(scores.astype(np.float32) - scores.max(-1, keepdims=True).astype(np.float32))
    p = (p / p.sum(-1, keepdims=True)).astype(half).astype(np.float32)
    walk = np.einsum("bnts,bsnd->btnd", p, value.astype(np.float32)).astype(half)
    got = jaxattn.dot_product_attention(query, key, value, recipe=practice.UNFUSED)
    exact = jaxattn.reference_attention(query, key, value)
    e, r = walk - exact, np.asarray(got) - exact
    assert np.corrcoef(e.ravel(), r.ravel())[0, 1] > 0.98


def test_a_sound_kernel_is_told_so(found):
    sound = found._replace(kernel=METAL)
    assert verdicts.text(sound)[1].startswith("Its accumulators are float32 already")
    assert not verdicts.sound(found)


def test_words_do_not_hide_a_false_alarm():
    at, bad, good = np.array([256, 512]), np.array([[0.0, 2], [2, 2]]), np.zeros((2, 2))
    tried = Tried(at, bad, good, 1.0)
    assert verdicts.noticed(tried) == "seen from 512" and tried.useful == 512
    assert verdicts.noticed(tried._replace(kernel=bad[:1], contexts=at[:1])) == (
        "seen in some draws only"
    )
    assert verdicts.noticed(tried._replace(kernel=good)) == "not seen"
    alarming = tried._replace(lifted=bad)  # one draw is enough to call it one
    assert verdicts.noticed(alarming) == "seen from 512; fails the lifted one too, from 256"
    assert alarming.useful is None
    early = tried._replace(kernel=2 * np.ones((2, 2)), lifted=np.array([[2.0, 0], [0, 0]]))
    assert early.seen == 256 and early.useful == 512
    gone = tried._replace(kernel=bad[::-1])
    assert verdicts.noticed(gone) == "seen from 256~" and gone.useful == 256


def test_nothing_over_nothing_is_no_error():
    same = np.ones((2, 2))
    assert practice.times_baseline(same, same, same, 0.0) == 0
    assert practice.times_baseline(same, same, same, 1e-5) == 0
    assert practice.times_baseline(same + 1, same, same, 0.0) == np.inf
    assert practice.nmse(0 * same, 0 * same, same, 0.0) == 0


def test_a_bfloat16_kernel_is_held_to_the_rule_of_bfloat16():
    kernel = kernels.get("flash-attention-2-bf16")
    assert [m.name for m in MATRICES if practice.dtype_of(kernel) in m.dtypes] == [
        "flash-attention test_flash_attn_output"
    ]
    rule = practice.in_dtype(practice.FLASH_ATTENTION.rule, "bfloat16")
    assert rule.baseline == practice.UNFUSED_BF16 and rule.baseline.probs == BFLOAT16
    (tried,) = attempt(kernel, [rule], "gaussian", [203, 512], [0], SMALL)
    assert (tried.kernel <= 1).all() and tried.seen is None
    assert practice.in_dtype(practice.LLAMA.rule, "float16") == practice.LLAMA.rule


def test_no_test_here_takes_an_eight_bit_kernel():
    kernel = kernels.get("flash-attention-3-fp8")
    found = thresholds.thresholds(
        kernel, max_context=256, seeds=1, samples=16, regimes=["gaussian"]
    )
    assert found.matrices == () and found.practice == {}
    assert any("not run on float8_e4m3fn:sat tensors" in line for line in verdicts.text(found))


def test_what_lifting_leaves_over_the_limit_is_said():
    kernel = kernels.get("hexagon-hmx-fp32")
    some = {"max_context": 4096, "seeds": 1, "samples": 16, "regimes": ["sink"]}
    words = verdicts.text(thresholds.thresholds(kernel, matrices=(), **some))
    (line,) = (line for line in words if line.startswith("Lifted, it fails"))
    assert "sink from 4,096 keys" in line and "exp=exp2_half_clamped" in line
