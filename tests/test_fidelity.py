"""The fidelity study: its figures, its verdicts, what cannot be run, and what real kernels gave."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import jaxattn
from jaxattn import kernels
from jaxattn.agreement import correlation
from sweeps import fidelity
from sweeps.peers import compare, golden
from sweeps.peers.peer import NOISE, VECTOR, Peer, peers

GOLDEN = Path(__file__).parent / "golden" / "peers.npz"
PEERS = peers()
META, OUTPUTS = golden.read(GOLDEN)

# Those that compile soonest; `make test-all` takes all of them.
QUICK = "ggml-cpu-decode-gqa jax-nn-xla-bf16 mlx-cpu-bf16 torch-math-fp16".split()

PLAIN = Peer(name="p", family="none", function="f", packages=("numpy",), recipe="float32")


def test_every_peer_names_a_recipe_and_says_what_it_calls():
    assert len(PEERS) >= 10
    for name, peer in PEERS.items():
        assert peer.name == name and peer.function and peer.packages
        assert peer.expect in (VECTOR, NOISE)
        compare.recipe_of(peer)  # its changes fit
    assert {"real kernel"} <= {kernels.get(p.recipe).evidence.split(":")[0] for p in PEERS.values()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in META]
)
def test_the_error_vector_is_that_of_the_real_kernel(name):
    """As the study judges it, on the outputs that were kept of a run of the real kernel."""
    peer = PEERS[name]
    drawn = golden.case(peer)
    assert golden.digest(drawn) == META[name]["inputs_sha256"]
    found = compare.judge(peer, drawn, OUTPUTS[name].astype(np.float32))
    if peer.expect == NOISE:
        # Where the order of sums is known to be another (`cause`), all that is left is the noise.
        most = 5.0 if peer.cause else fidelity.MOST_RATIO
        assert 1 / most < found["rms_ratio"] < most
        assert max(found["nmse_real"], found["nmse_recipe"]) < 2e-12
        return
    agrees = max(found["correlation"], found["settled"]) >= fidelity.LEAST_CORRELATION
    # Else rounding turns on float32 noise, and the recipe itself moves as much with its sums.
    apart = fidelity.AS_FAR * (1 - found["ceiling"])
    explained = 1 - found["correlation"] <= apart or (peer.cause and found["correlation"] > 0.9)
    assert agrees or explained, found
    assert found["correlation"] > 0.99 * found["control"]


def test_figures_of_planted_errors():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((4, 2, 8))
    e, other = rng.standard_normal((2, 4, 2, 8)) * 1e-3
    found = compare.figures(reference + e, reference + e, reference + other, reference)
    assert found["correlation"] == pytest.approx(1) and abs(found["control"]) < 0.4
    assert found["unexplained"] == 0 and found["rms_ratio"] == 1 and found["equal"] == 1
    assert found["nmse_real"] == pytest.approx(np.sum(e**2) / np.sum(reference**2))
    found = compare.figures(reference + 2 * e, reference + e, reference, reference)
    assert found["correlation"] == pytest.approx(1) and found["equal"] == 0
    assert found["unexplained"] == pytest.approx(0.5) and found["rms_ratio"] == pytest.approx(2)
    assert np.isnan(found["control"])  # no error at all
    broken = reference.copy()
    broken[0, 0, 0] = np.nan
    assert np.isnan(compare.figures(broken, reference + e, reference, reference)["correlation"])


def test_the_control_rounds_inputs_and_result_alone():
    recipe = compare.control_of(kernels.get("hexagon-hmx-fp16"))
    assert recipe.query == recipe.result == kernels.get("hexagon-hmx-fp16").result
    assert recipe.output == recipe.probs == recipe.scores == jaxattn.format_of("float32")


@pytest.mark.parametrize("name", compare.INPUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inputs_are_exact_in_the_peers_dtype(name, dtype):
    peer = dataclasses.replace(PLAIN, dtype=dtype, head_dim=64, queries=3)
    query, key, value, scale = compare.draw(peer, name, 300)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == 64 and len(key) == 300
    for x in (query, key, value):
        format = jaxattn.format_of(dtype)
        assert x.dtype == np.float32 and np.array_equal(jaxattn.round_to(x, format), x)
    assert scale == (32**-0.5 if name == "minilm" else 0.125)


def test_causal_inputs_have_a_query_for_each_key():
    peer = dataclasses.replace(PLAIN, causal=True)
    assert len(compare.draw(peer, "gaussian", 100).query) == 100
    assert compare.draw(peer, "minilm", 100) is None


def test_a_package_that_is_missing_is_named():
    peer = dataclasses.replace(PLAIN, packages=("numpy", "no-such-package"))
    rows = fidelity._rows(peer)
    assert [(row["status"], row["why"]) for row in rows] == [
        ("not run", "no-such-package is not installed")
    ]
    assert fidelity._versions(peer) == ""
    assert fidelity._versions(PLAIN) == f"numpy {np.__version__}"


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        ({"returncode": -4, "stderr": ""}, "killed by SIGILL"),
        ({"returncode": -33, "stderr": ""}, "killed by signal 33"),
        ({"returncode": 1, "stderr": "Traceback\n  x\nRuntimeError: no AMX\n"}, "failed: Runtime"),
        ({"returncode": 3, "stderr": ""}, "failed: exit code 3"),
        (subprocess.TimeoutExpired("x", 1200), "took longer than 1200 s"),
    ],
)
def test_a_kernel_that_fails_is_a_row_and_stops_nothing(monkeypatch, outcome, why):
    def run(*arguments, **options):
        if isinstance(outcome, Exception):
            raise outcome
        return types.SimpleNamespace(**outcome)

    monkeypatch.setattr(compare.subprocess, "run", run)
    (row,) = fidelity._rows(PLAIN)
    assert row["status"] == "not run" and row["why"].startswith(why)


def test_an_output_of_another_shape_is_refused_and_none_too(monkeypatch):
    def run(command, **options):
        np.save(Path(command[-1]) / "0.npy", np.zeros((2, 3)))
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(compare.subprocess, "run", run)
    (row,) = fidelity._rows(PLAIN)
    assert row["why"] == "gave an output of shape (2, 3), not (16, 2, 64)"

    for content in (b"no array", b""):

        def nothing(command, content=content, **options):
            (Path(command[-1]) / "0.npy").write_bytes(content)
            return types.SimpleNamespace(returncode=0, stderr="")

        monkeypatch.setattr(compare.subprocess, "run", nothing)
        (row,) = fidelity._rows(PLAIN)
        assert row["status"] == "not run"
        assert row["why"].startswith("gave no output that can be read")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "check: missing a required argument"),
        (["golden", "no/such/folder/x.npz"], "its folder does not exist"),
        (["install", "foo"], "install: too many positional arguments"),
        (["check", "torch-flash-fp61"], "unknown real kernel 'torch-flash-fp61'; did you mean"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, said):
    command = [sys.executable, "-m", "sweeps.peers", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=compare.ROOT)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_ties_are_results_that_noise_decides():
    truth, emulated = np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.25, 2.25, 3.5])
    unrounded = np.array([1.01, 1.1251, 2.2, 3.25])
    tied = compare.ties(truth, emulated, unrounded, 1e-3)
    assert list(tied) == [False, True, False, True]
    reference = np.array([1.01, 1.12, 2.21, 3.1])
    found = compare.figures(truth, emulated, emulated, reference, exact=truth, tied=tied)
    clear = ~tied
    assert found["ties"] == 0.5 and found["ceiling"] == found["correlation"] < 1
    expected = correlation((truth - reference)[clear], (emulated - reference)[clear])
    assert found["settled"] == expected


def test_a_shortfall_is_explained_by_what_was_measured():
    line = {"expect": VECTOR, "correlation": 0.99, "settled": 0.9995, "ties": 0.002, "ceiling": 1.0}
    assert fidelity.cause_of({**line, "cause": ""}).startswith("results at a tie, up to 0.20%")
    line = {**line, "settled": 0.99, "ceiling": 0.995}
    assert "goes down to 0.995" in fidelity.cause_of({**line, "cause": ""})
    line = {**line, "ceiling": 0.9999}
    assert fidelity.cause_of({**line, "cause": "its own"}) == "its own"
    assert fidelity.cause_of({**line, "cause": ""}) == "the cause is not known"
    assert fidelity.cause_of({**line, "expect": NOISE, "cause": "its own"}) == "its own"


def rows(name, correlation=1.0, ratio=1.0, expect=VECTOR, status="run", **more):
    words = {"peer": name, "recipe": "r", "versions": "v 1", "expect": expect, "status": status}
    figures = dict.fromkeys(compare.FIGURES, 0.5) | {
        "correlation": correlation,
        "ceiling": 1.0,
        "rms_ratio": ratio,
    }
    return {"cause": "", "why": "", **words, **figures, **more}


def test_the_worst_row_decides():
    frame = pd.DataFrame(
        [
            rows("good"),
            rows("good", 0.9991),
            rows("bad"),
            rows("bad", 0.9989, cause="blocks of 512"),
            rows("noise", 0.1, 1.4, NOISE),
            rows("loud", 0.1, 1.4, NOISE),
            rows("loud", 0.1, 0.6, NOISE),
            rows("nan", np.nan),
            rows("absent", status="not run", why="x is not installed"),
        ]
    )
    verdicts = dict(fidelity.summary(frame)[["peer", "verdict"]].itertuples(index=False))
    assert verdicts == {
        "good": "agrees",
        "bad": "falls short",
        "noise": "agrees",
        "loud": "falls short",
        "nan": "falls short",
        "absent": "not run",
    }
    text = fidelity.table(frame)
    assert text.splitlines()[-1] == "fidelity: 2 agree, 3 fall short, 1 not run"
    assert "not run: x is not installed" in text


def test_goldens_are_made_and_kept(monkeypatch, tmp_path):
    peer = dataclasses.replace(PLAIN, contexts=(8, 16), queries=2)
    gone = dataclasses.replace(peer, name="gone")
    monkeypatch.setattr(golden, "peers", lambda: {"p": peer, "gone": gone})
    outputs = {"p": np.full((2, 2, 64), 0.5, np.float32), "gone": np.full((2, 2, 64), 0.1)}
    monkeypatch.setattr(golden, "real", lambda peer, cases: [outputs[peer.name]])
    path = tmp_path / "peers.npz"
    assert [line.split(":")[0] for line in golden.make(path, [])] == ["p", "gone"]

    def not_run(peer, drawn):
        raise compare.NotRun("it is gone")

    monkeypatch.setattr(golden, "real", not_run)
    assert list(golden.make(path, ["gone"])) == ["gone: not run: it is gone"]
    meta, kept = golden.read(path)
    assert set(meta) == set(kept) == {"p", "gone"} and meta["p"]["context"] == 16
    assert kept["p"].dtype == np.float16 and kept["gone"].dtype == np.float32
