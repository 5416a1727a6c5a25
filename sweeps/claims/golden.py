"""Golden et al., "Is Flash Attention Stable?", arXiv 2405.02803: every operation in one format."""

import numpy as np

from sweeps.claims.claim import Claim, Outcome

HEAD_DIM, ROWS, SEEDS = 64, 64, 2
SOURCE = "Golden et al., arXiv 2405.02803"
SETUP = (
    f"Q, K, V ~ U[0, 1), head dim {HEAD_DIM}, {ROWS} rows, {SEEDS} seeds, tiles of 64 keys, "
    "FlashAttention-1 (o normalised every tile) with every operation in one format, largest "
    "difference from float64"
)
SITES = (
    *("query", "key", "value", "scale", "qk_accum", "scores", "running_max", "difference", "probs"),
    *("summand", "row_sum", "rescale", "rescaled_sum", "running_sum", "pv_accum"),
    *("rescaled_output", "output", "inverse", "result"),
)


def deviation(format: str, keys: int, flash: bool) -> float:
    """Largest |output - float64 output|, mean over the seeds."""
    import jaxattn

    recipe = (
        jaxattn.Recipe()
        .replace(**dict.fromkeys(SITES, format))
        .replace(kv_block=64 if flash else "whole", normalise="blocks" if flash else "before")
    )
    found = []
    for seed in range(SEEDS):
        query, stream = jaxattn.inputs.regime(
            "uniform01",
            length=keys,
            seed=seed,
            heads=1,
            queries=ROWS,
            head_dim=HEAD_DIM,
            dtype="float32",
        )
        q, (k, v) = query[0], stream.blocks(0, keys)
        out = np.asarray(jaxattn.dot_product_attention(q, k, v, recipe=recipe), np.float64)
        found.append(np.abs(out - jaxattn.reference_attention(q, k, v)).max())
    return float(np.mean(found))


def ratio() -> Outcome:
    flash, base = (deviation("bfloat16", 4096, x) for x in (True, False))
    met = 5 <= flash / base <= 20
    text = f"{flash / base:.1f} times at 4096 keys ({flash:.2e} against {base:.2e})"
    return Outcome(text, met, "the paper's context for this figure is not stated")


def growth() -> Outcome:
    contexts = (256, 1024, 4096)
    found = [deviation("bfloat16", n, True) for n in contexts]
    base = [deviation("bfloat16", n, False) for n in contexts]
    met = found[0] < found[1] < found[2] and base[2] < 1.5 * base[0]
    rows = zip(contexts, found, base, strict=True)
    text = ", ".join(f"{n}: {x:.2e} (baseline {y:.2e})" for n, x, y in rows)
    return Outcome(text, met, "" if met else "the deviation does not grow, or the baseline's does")


def precision() -> Outcome:
    formats = ("bfloat16", "float16", "e8m13", "float32")
    found = [deviation(f, 1024, True) for f in formats]
    met = all(a > 2 * b for a, b in zip(found, found[1:], strict=False))
    text = ", ".join(f"{f} {x:.1e}" for f, x in zip(formats, found, strict=True))
    return Outcome(text, met, "" if met else "some wider format is not better")


CLAIMS = (
    Claim(
        id="golden-bf16-ratio",
        title="Flash attention in bfloat16 deviates about 10 times more than the baseline",
        source=f"{SOURCE}, abstract and Figure 4: roughly an order of magnitude",
        setup=f"{SETUP}; 4096 keys",
        expected="5 to 20 times the deviation of attention that is not tiled",
        measure=ratio,
        slow=True,
    ),
    Claim(
        id="golden-growth",
        title="Its deviation grows with the sequence, the baseline's does not",
        source=f"{SOURCE}, Figure 5",
        setup=f"{SETUP}; 256, 1024 and 4096 keys in bfloat16",
        expected="larger at each length; the baseline's less than 1.5 times as large at the last",
        measure=growth,
        slow=True,
    ),
    Claim(
        id="golden-precision",
        title="More bits of significand, less deviation",
        source=f"{SOURCE}, Figure 3: four formats from bfloat16 to float64 (the two in between "
        "are not named; here bfloat16, float16, 14 bits, float32)",
        setup=f"{SETUP}; 1024 keys",
        expected="each format less than half the deviation of the one before",
        measure=precision,
        slow=True,
    ),
)
