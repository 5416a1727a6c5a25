"""What SageAttention's papers say of granularity and formats; their inputs are real tensors, so
that only the order of their numbers can be looked for on drawn ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweeps.claims.claim import Claim, Outcome

KEYS = 4096
SETUP = f"gaussian, {KEYS} keys, 2 heads, 64 rows, head dim 128, one seed, relative L1 error"


def _errors(recipes: Sequence[Any], regime: str) -> np.ndarray:
    import jaxattn

    query, stream = jaxattn.inputs.regime(
        regime, length=KEYS, seed=0, heads=2, queries=64, head_dim=128
    )
    curves = jaxattn.error_curves(
        query, stream, None, recipes, contexts=[KEYS], metrics=("rel_l1",)
    )
    return curves.metrics["rel_l1"].mean(axis=(1, 2, 3, 4))


def _ordered(variants: Mapping[str, Mapping[str, Any]]) -> Outcome:
    """Whether each variant of INT4 attention is better than the one before, on gaussian inputs."""
    from jaxattn import Recipe

    base = Recipe().replace(
        exp="exp2", kv_block=64, query="int4", query_group=4, key="int4", key_group=16
    )
    recipes = [base.replace(name=name, **fields) for name, fields in variants.items()]
    plain, outliers = (_errors(recipes, regime) for regime in ("gaussian", "outliers"))
    text, other = (
        ", ".join(f"{name} {x:.3f}" for name, x in zip(variants, found, strict=True))
        for found in (plain, outliers)
    )
    met = bool((np.diff(plain) < 0).all())
    return Outcome(text, met, f"with outliers, where INT4 fails altogether: {other}")


def granularity() -> Outcome:
    return _ordered(
        {
            "tensor": {"query_group": 64, "key_group": KEYS, "kv_block": KEYS},
            "block": {"query_group": 64, "key_group": 64},
            "thread": {},
        }
    )


def formats() -> Outcome:
    return _ordered(
        {
            "E5M2": {"probs": "float8_e5m2", "value": "e8m2"},
            "E4M3": {"probs": "float8_e4m3fn:sat", "value": "e8m3", "max_offset": -8.807},
            "float16": {"probs": "float16", "value": "float16"},
        }
    )


def plus_plus() -> Outcome:
    from jaxattn.kernels import sage

    two, one = _errors([sage.SM89_FP32_FP32, sage.PLUS_PLUS], "gaussian")
    reach = 32 * 448 * 2.25
    met = bool(abs(one / two - 1) < 0.05 and reach <= 65504)
    text = f"{two:.4f} with float32 buffers, {one:.4f} with float16; 32·448·2.25 = {reach:.0f}"
    why = (
        "the paper compares end-to-end metrics of models; rounding Q, K, P and V hides the "
        "accumulator, so that 5 bits of fraction would do here as well"
    )
    return Outcome(text, met, why)


CLAIMS = (
    Claim(
        id="sage2-table6-order",
        title="Finer quantisation of Q and K: tensor, block, thread",
        source="SageAttention2, arXiv 2411.10958, Table 6: relative L1 0.1800 per tensor, 0.1492 "
        "per block, 0.0622 per thread (INT4, CogVideoX)",
        setup=SETUP + "; INT4 Q and K with a scale for the tensor, 64 tokens, 4 and 16 tokens",
        expected="each finer one has the smaller error",
        measure=granularity,
        slow=True,
    ),
    Claim(
        id="sage2-table7-order",
        title="Formats of P and V: E5M2, E4M3, float16",
        source="SageAttention2, arXiv 2411.10958, Table 7: relative L1 0.0905, 0.0683, 0.0649 "
        "(INT4 Q and K, CogVideoX)",
        setup=SETUP + "; INT4 Q and K with a scale for 4 and 16 tokens",
        expected="each has a smaller error than the one before",
        measure=formats,
        slow=True,
    ),
    Claim(
        id="sage2pp-accuracy",
        title="FP8 products in float16 accumulators are as accurate as in float32 ones",
        source="SageAttention2++, arXiv 2505.21136, abstract: the same attention accuracy; the "
        "ranges of P and V keep 32 products within 65504",
        setup=SETUP + "; sage2-sm89-fp32-fp32 and sage2pp-sm89-fp32-fp16",
        expected="errors within 5 % of each other; 32·448·2.25 (the code's ranges) below 65504",
        measure=plus_plus,
        slow=True,
    ),
)
