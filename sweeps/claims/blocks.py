"""Laws of a running sum l that takes one rounding per KV block, and of 1/l in float16.

c is what a block adds to l, t the bits of l's significand, u = 2^-t.
"""

import math
from typing import Any

import numpy as np

from sweeps.claims.claim import Claim, Outcome, exactly, near

BLOCK = 64
HIGHAM = "N. Higham, Accuracy and Stability of Numerical Algorithms (2002), section 4.2"


def _narrow(format: str) -> Any:
    """A recipe whose only rounding is l's, and whose m stays at 0."""
    from jaxattn import Recipe

    return Recipe().replace(
        name=format, kv_block=BLOCK, initial_max=0.0, lazy_threshold=30.0, running_sum=format
    )


def running_sums(format: str, c: list[float], blocks: list[int]) -> np.ndarray:
    """l [c, blocks] where each block adds c: scores ln(c / 64), in base e."""
    import jaxattn

    longest = BLOCK * max(blocks)
    query = np.log(np.asarray(c) / BLOCK).reshape(1, -1, 1, 1).astype(np.float32)
    ones = np.ones((1, longest, 1, 1), np.float32)
    found = []
    for count in blocks:
        _, lse = jaxattn.dot_product_attention(
            query,
            ones,
            ones,
            recipe=_narrow(format),
            scale=1.0,
            key_value_seq_lengths=np.array([BLOCK * count], np.int32),
            return_residual=True,
        )
        found.append(np.exp(np.asarray(lse, np.float64)[0, :, 0]))
    return np.transpose(found)


def stagnation() -> Outcome:
    cases = {64.0: (16384, 256), 57.5: (16384, 261), 100.0: (32768, 277)}
    measured, expected = {}, {}
    for c, (end, block) in cases.items():
        before, at, long = running_sums("bfloat16", [c], [block - 1, block, 400])[0]
        measured[f"c={c:g}"] = (round(at), round(long), round(before) < end)
        expected[f"c={c:g}"] = (end, end, True)
    return exactly(measured, expected)


def drift() -> Outcome:
    cases = {40.0: -0.0391, 57.59: 0.0369, 61.31: 0.0301, 90.12: 0.0388}
    found = running_sums("float16", list(cases), [512])[:, 0] / (512 * np.array(list(cases))) - 1
    met = bool(np.abs(found - list(cases.values())).max() <= 1.5e-3)
    pairs = zip(cases.items(), found, strict=True)
    text = ", ".join(f"c={c:g}: {x:+.4f} ({p:+.4f})" for (c, p), x in pairs)
    return Outcome(text, met, "" if met else "further than 0.0015 from the prediction")


def random_walk() -> Outcome:
    import jaxattn

    rows, blocks, bits = 4096, 96, 11
    rng = np.random.default_rng(0)
    q = rng.standard_normal((rows, 1, 64)).astype(np.float32)
    k = rng.standard_normal((BLOCK * blocks, 1, 64)).astype(np.float32)
    v = np.zeros((len(k), 1, 1), np.float32)
    narrow, wide = (
        np.exp(
            np.asarray(
                jaxattn.dot_product_attention(
                    q,
                    k,
                    v,
                    recipe=_narrow(format),
                    return_residual=True,
                )[1],
                np.float64,
            )
        )[:, 0]
        for format in ("float16", "float32")
    )
    x = 2 * np.frexp(wide)[0]
    predicted = 2.0**-bits * np.sqrt(blocks * (4 * (x - 1) + 4 / 7) / (12 * x**3))
    error = narrow / wide - 1
    return near(
        {"sd over predicted": float(np.std(error / predicted))}, {"sd over predicted": 1.0}, 0.05
    )


def overflow() -> Outcome:
    import jaxattn

    recipe = jaxattn.kernels.get("hexagon-hmx-fp16").replace(kv_block=BLOCK)
    zeros = np.zeros((1, 65536, 1, 4), np.float32)
    curves = jaxattn.error_curves(
        zeros[:, :1],
        zeros,
        zeros + np.float32(0.5),
        [recipe],
        contexts=[65472, 65536],
        metrics=("rel_l2",),
    )
    from jaxattn import round_to

    edge = [float(x) for x in round_to(np.array([65519.996, 65520.0], np.float32), "float16")]
    return exactly(
        {"at 65472 and 65536 keys": curves.overflow[0, :, 0, 0, 0].tolist(), "rounded": edge},
        {"at 65472 and 65536 keys": [False, True], "rounded": [65504.0, math.inf]},
    )


def half_inverse() -> Outcome:
    from jaxattn import round_to

    l = 2.0 ** np.random.default_rng(0).uniform(0, 26, 200_000)
    inverse = np.asarray(round_to((1 / l).astype(np.float32), "float16"), np.float64)
    error = np.abs(inverse * l - 1)
    measured = {
        f"2^{e} to 2^{e + 1}": float(error[(l >= 2.0**e) & (l < 2.0 ** (e + 1))].max())
        for e in (16, 20, 22)
    }
    expected = dict(zip(measured, (3.9e-3, 5.9e-2, 0.20), strict=True))
    outcome = near(measured, expected, 0.03)
    zero = not inverse[l >= 2.0**25].any()
    return Outcome(
        f"{outcome.measured}; from 2^25 on {'all' if zero else 'not all'} are 0",
        outcome.met and zero,
        outcome.why or ("" if zero else "1/l is not 0 from 2^25 on"),
    )


CLAIMS = (
    Claim(
        id="stagnation-bf16",
        title="l in bfloat16 stops at 2^8 to 2^9 times what a block adds",
        source=f"{HIGHAM}: a sum stops once its terms are below half an ulp; here per block",
        setup="64-key blocks that add c = 64, 57.5, 100; 400 blocks",
        expected="l ends at 16384, 16384, 32768, first reached at block 256, 261, 277",
        measure=stagnation,
    ),
    Claim(
        id="drift-fp16",
        title="Equal blocks drift: l in float16 is off by 3 to 4 % after 512, either way",
        source="arithmetic: in a binade of ulp q each block adds RN(c / q)·q instead of c",
        setup="64-key blocks that add c = 40, 57.59, 61.31, 90.12; 512 blocks",
        expected="-0.0391, +0.0369, +0.0301, +0.0388, each within 0.0015",
        measure=drift,
    ),
    Claim(
        id="random-walk-fp16",
        title="Random blocks make l's error a random walk of u·sqrt(n)",
        source="Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis (2019): "
        "sqrt(n)·u; the constant is ulp^2/12 per block",
        setup="N(0, 1) scores, 4096 rows, 96 blocks of 64 keys, l in float16",
        expected="sd of the error over u·sqrt(n)·sqrt((4(x - 1) + 4/7) / (12 x^3)), l = x·2^e, "
        "within 5 % of 1",
        measure=random_walk,
        slow=True,
    ),
    Claim(
        id="overflow-65520",
        title="Float16 l overflows at 65520: 65536 equal keys",
        source="IEEE 754 binary16; ggml-org/llama.cpp #24389's kernel (hexagon-hmx-fp16)",
        setup="equal scores, blocks of 64, 65472 and 65536 keys; and two numbers at the threshold",
        expected="finite at 65472, not at 65536; 65519.996 rounds to 65504, 65520 to infinity",
        measure=overflow,
        slow=True,
    ),
    Claim(
        id="half-inverse",
        title="1/l in float16 is off by 0.4 % at 2^17, 6 % at 2^21, and 0 from 2^25",
        source="ggml-org/ggml, htp/hmx-flash-attn-ops.c (fa_build_d_diag_inv_l): a float16 tile of "
        "1/l, whose subnormals are 2^-24 apart",
        setup="200,000 values of l, log-uniform from 1 to 2^26",
        expected="largest relative errors 3.9e-3, 5.9e-2, 0.20 within 3 %, then 0",
        measure=half_inverse,
    ),
)
