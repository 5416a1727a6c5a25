"""The list of published claims, their verdicts, and that a wrong function would change them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxattn
from jaxattn import exponentials as jaxattn_exponentials
from sweeps.claims import blocks, flash3, fp22, offsets, pasa, sums
from sweeps.claims.claim import Claim, Outcome, exactly, near
from sweeps.claims.registry import CLAIMS

ROOT = Path(__file__).resolve().parent.parent
BY_ID = {claim.id: claim for claim in CLAIMS}
NOT_MET = {"tt-metal-row-sums"}  # whatever else is not met is news


def test_the_list_is_sound():
    assert len(BY_ID) == len(CLAIMS) >= 21
    for claim in CLAIMS:
        assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", claim.id), claim.id
        assert all((claim.title, claim.source, claim.setup, claim.expected)), claim.id
        assert claim.function.startswith("sweeps.claims."), claim.function
    assert NOT_MET <= set(BY_ID)


def test_listing_claims_does_not_import_jax():
    code = "import sys, sweeps.claims.registry; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "claim",
    [pytest.param(c, marks=pytest.mark.slow if c.slow else (), id=c.id) for c in CLAIMS],
)
def test_verdict(claim: Claim):
    outcome = claim.check()
    assert outcome.met == (claim.id not in NOT_MET), outcome
    assert "nan" not in outcome.measured


def test_an_outcome_needs_numbers_and_a_reason():
    with pytest.raises(ValueError, match="reason"):
        Outcome("1.0", False)
    with pytest.raises(ValueError, match="numbers"):
        Outcome("", True)


def test_judges():
    assert near({"a": 1.2}, {"a": 1.0}, 0.25).met
    assert not near({"a": 1.3}, {"a": 1.0}, 0.25).met
    assert not near({"a": float("nan")}, {"a": 1.0}, 0.25).met
    assert not near({"a": 0.9, "b": 2.0}, {"a": 1.0, "b": 1.0}, 0.25).met
    assert exactly({"a": 1.0}, {"a": 1.0}).met
    assert not exactly({"a": 1.0}, {"a": 2.0}).met


# --- planted faults ------------------------------------------------------------------------------


def test_another_polynomial_is_noticed(monkeypatch):
    table = jaxattn_exponentials.EXPONENTIALS
    monkeypatch.setitem(table, "exp2_poly4", table["exp2_poly3"])
    assert not BY_ID["fa4-table2-degree4"].check().met
    assert not BY_ID["fa4-degree4-bf16"].check().met


def _rounding_as(monkeypatch, wrong):
    """jaxattn.round_to and format_of with some names standing for others."""
    real, format_of = jaxattn.round_to, jaxattn.format_of

    def lie(name):
        return wrong.get(name, name) if isinstance(name, str) else name

    monkeypatch.setattr(jaxattn, "round_to", lambda x, f, bits=None: real(x, lie(f), bits))
    monkeypatch.setattr(jaxattn, "format_of", lambda name: format_of(lie(name)))


@pytest.mark.parametrize(
    ("wrong", "claims"),
    [
        ({"fp22": "fp22:rn"}, ["sage2-fp22-bits"]),
        ({"fp22": "float32"}, ["deepseek-k4096", "deepseek-promotion", "deepseek-growth"]),
        ({"float16": "tf32:rz"}, ["half-inverse", "higham-harmonic-float16"]),
        ({"bfloat16": "bfloat16:rz"}, ["higham-harmonic-bfloat16"]),
        ({"float16": "float32"}, ["candle-2048", "tract-row-sums"]),
        ({"float8_e4m3fn:sat": "float8_e5m2"}, ["pcast-underflow"]),
    ],
)
def test_another_rounding_is_noticed(monkeypatch, wrong, claims):
    _rounding_as(monkeypatch, wrong)
    for name in claims:
        assert not BY_ID[name].check().met, name


def test_another_kernel_is_noticed(monkeypatch):
    """Recipes with one field undone: no offset in effect, a wide l, keys that are not shifted."""
    real = jaxattn.Recipe.replace

    def undone(**undo):
        def replace(self, **changes):
            return real(self, **{k: v for k, v in changes.items() if k not in undo} | undo)

        return replace

    with monkeypatch.context() as patch:
        patch.setattr(jaxattn.Recipe, "replace", undone(max_offset=0.0))
        assert not offsets.max_offset().met
    with monkeypatch.context() as patch:
        patch.setattr(jaxattn.Recipe, "replace", undone(running_sum="float32"))
        assert not blocks.stagnation().met
        assert not blocks.drift().met
        assert not sums.ones("float16", 4096, 2048.0).met
    from jaxattn.kernels import papers

    monkeypatch.setattr(papers, "PASA", papers.PASA_UNSHIFTED)
    assert not pasa.overflow(30.0, 0.5, False).met


@pytest.mark.slow
def test_quantisation_that_is_no_quantisation_is_noticed(monkeypatch):
    monkeypatch.setattr(flash3, "quantised", lambda x, block: x)
    assert not BY_ID["fa3-table3-fp8-no-incoherent"].check().met


def test_quantised_keeps_the_largest_number():
    x = np.random.default_rng(0).standard_normal((64, 2, 8)).astype(np.float32)
    y = flash3.quantised(x, 16)
    assert y.shape == x.shape
    blocks_of = np.abs(x).reshape(4, -1)
    at = blocks_of.argmax(axis=1)
    kept = np.abs(y).reshape(4, -1)
    np.testing.assert_allclose(kept[range(4), at], blocks_of[range(4), at], rtol=1e-6)
    h = flash3.rotation(0)
    np.testing.assert_allclose(h @ h.T, np.eye(len(h)), atol=1e-5)


def test_promotion_of_the_whole_product_is_none():
    assert fp22.product_error(256, None) == fp22.product_error(256, 256)
