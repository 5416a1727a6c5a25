"""What keeps float16 accumulators in range, and what bounds their error."""

import math
from typing import Any

import numpy as np

from sweeps.claims.claim import Claim, Outcome, exactly

MEAN = 8.0  # of V, so that o = l·8


def _cuda(offset: float) -> Any:
    """llama.cpp's CUDA tensor-core kernel: o in float16, rounded every 16 keys."""
    from jaxattn import Recipe

    return Recipe().replace(
        name=f"{offset:.2f}",
        kv_block=64,
        probs="float16",
        rescaled_output="float16",
        output="float16",
        output_every=16,
        max_offset=offset,
    )


def max_offset() -> Outcome:
    import jaxattn

    contexts = [8128, 8192, 16320, 16384, 32768]
    longest = contexts[-1]
    zeros = np.zeros((1, longest, 1, 16), np.float32)
    recipes = [_cuda(x) for x in (0.0, math.log(2), math.log(8))]
    curves = jaxattn.error_curves(
        zeros[:, :1],
        zeros,
        np.full((1, longest, 1, 2), MEAN, np.float32),
        recipes,
        contexts=contexts,
        metrics=("rel_l2",),
    )
    lost = curves.overflow[:, :, 0, 0, 0]
    first = {
        name: next((n for n, bad in zip(contexts, row, strict=True) if bad), "never")
        for name, row in zip(("none", "ln 2", "ln 8"), lost, strict=True)
    }
    return exactly(first, {"none": 8192, "ln 2": 16384, "ln 8": "never"})


def offset_cost() -> Outcome:
    import jaxattn

    query, stream = jaxattn.inputs.regime(
        "gaussian", length=4096, seed=0, heads=2, queries=32, head_dim=64
    )
    recipes = [_cuda(x) for x in (0.0, math.log(8))]
    curves = jaxattn.error_curves(
        query, stream, None, recipes, contexts=[512, 4096], metrics=("rel_l2",)
    )
    plain, shifted = curves.metrics["rel_l2"].mean(axis=(2, 3, 4))
    met = bool(np.abs(shifted / plain - 1).max() < 0.01)
    text = f"{plain[0]:.5f} and {shifted[0]:.5f} at 512 keys, {plain[1]:.5f} and {shifted[1]:.5f} "
    return Outcome(text + "at 4096", met, "" if met else "the offset changes the error by over 1 %")


def bounded_partials() -> Outcome:
    import jaxattn

    base = jaxattn.Recipe().replace(kv_block=64, probs="float16", pv_accum="float16", pv_chunk=1)
    recipes = (
        base.replace(rescaled_output="float16", output="float16", output_every=1),
        base.replace(output_every=16),
    )
    query, stream = jaxattn.inputs.regime(
        "biased_v", length=16384, seed=0, heads=2, queries=32, head_dim=64
    )
    contexts = (512, 4096, 16384)
    found = []
    for context in contexts:
        q, (k, v) = query[0], stream.blocks(0, context)
        exact, size = (jaxattn.reference_attention(q, k, x) for x in (v, np.abs(v)))
        outs = (jaxattn.dot_product_attention(np.float32(q), k, v, recipe=r) for r in recipes)
        # Errors in units of sum p·|v| / l, which is what the law bounds.
        found.append([np.abs(np.asarray(out, np.float64) - exact) / size for out in outs])
    (stock, bounded), law = np.transpose([[x.mean() for x in row] for row in found]), 17 * 2.0**-11
    worst = max(float(row[1].max()) for row in found)
    met = bool(bounded.max() <= 1.2 * bounded[0] and stock[2] > 10 * stock[0] and worst < law)
    pairs = ", ".join(
        f"{n}: {a:.1e} / {b:.1e}" for n, a, b in zip(contexts, stock, bounded, strict=True)
    )
    text = f"stock / bounded at {pairs}; largest bounded error {worst:.1e} of {law:.1e} allowed"
    return Outcome(text, met, "" if met else "bounded partials do not hold the law")


def underflow() -> Outcome:
    from jaxattn import round_to

    measured = {}
    for scale in (1, 256):
        low, high = -20.0, 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            p = np.float32(math.exp(middle) * scale)
            gone = float(round_to(p, "float8_e4m3fn:sat")) == 0.0
            low, high = (middle, high) if gone else (low, middle)
        measured[f"S={scale}"] = round(high, 2)
    return exactly(measured, {"S=1": -6.93, "S=256": -12.48})


CLAIMS = (
    Claim(
        id="llamacpp-max-offset",
        title="An offset of ln 2 or ln 8 postpones the overflow of float16 o by 2 or 8",
        source="ggml-org/llama.cpp #17746 and #18614 (issues 17610, 18606: Granite 4.0): range "
        "shifted by a factor of 2, then 8",
        setup="equal scores, V = 8, o in float16 rounded every 16 keys, 64-key blocks, contexts "
        "around 8192 and 16384, and 32768",
        expected="first overflow at 8192 keys without offset (o = 65536), at 16384 with ln 2, none "
        "at 32768 with ln 8",
        measure=max_offset,
    ),
    Claim(
        id="llamacpp-max-offset-cost",
        title="Where nothing overflows the offset costs nothing",
        source="ggml-org/llama.cpp #17746: LLaMA-3-8B perplexity 6.717177 becomes 6.717161",
        setup="gaussian, 2 heads, 32 rows, head dim 64, 512 and 4096 keys, o in float16",
        expected="relative L2 error changes by less than 1 %",
        measure=offset_cost,
    ),
    Claim(
        id="ik-bounded-partials",
        title="Float16 partial sums of 16 keys have an error that does not grow with the context",
        source="ikawrakow/ik_llama.cpp #2151 (P100): about (B + 1)·u, flat, where the stock "
        "kernel's error grows with context",
        setup="biased_v, 2 heads, 32 rows, head dim 64, 512, 4096 and 16384 keys; p·v in float16 "
        "key by key, flushed to float32 every 16 keys, or never",
        expected="mean |error| / sum p|v|: bounded at most 1.2 times that at 512 keys, and every "
        "one within 17·u; stock grows over 10 times from 512 to 16384",
        measure=bounded_partials,
        slow=True,
    ),
    Claim(
        id="pcast-underflow",
        title="E4M3 probabilities vanish 6.93 nats below the maximum, 12.48 at scale 256",
        source="P-Cast, arXiv 2606.06521, abstract: the threshold 6.93 - ln S",
        setup="the largest s - m whose e^(s-m)·S rounds to 0, by bisection",
        expected="-6.93 and -12.48, to two places",
        measure=underflow,
    ),
)
