"""Published sums that stop, saturate or drift in narrow formats."""

import numpy as np

from sweeps.claims.claim import Claim, Outcome, exactly, near

# (row length, sd of the logits) -> relative error of a float16 row sum, in percent
TRACT = {
    (1024, 0.5): 0.2,
    (1024, 1.0): 1.2,
    (1024, 2.0): 2.0,
    (2048, 0.5): 2.1,
    (2048, 1.0): 3.8,
    (2048, 2.0): 4.6,
    (4096, 0.5): 15.4,
    (4096, 1.0): 10.1,
    (4096, 2.0): 9.0,
    (8192, 0.5): 38.2,
    (8192, 1.0): 28.3,
    (8192, 2.0): 14.2,
}
TT_METAL = {1024: (0.983110, 0.994318), 4096: (0.897854, 0.994760), 8192: (0.864987, 0.994859)}


def partial_sums(terms: np.ndarray, format: str) -> np.ndarray:
    """The running sum over the first axis, rounded to `format` after each addition."""
    import jax
    import jax.numpy as jnp

    from jaxattn import format_of, round_to

    narrow = format_of(format)

    def add(total: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = round_to(total + term, narrow)
        return total, total

    x = jnp.asarray(terms, jnp.float32)
    return np.asarray(jax.jit(lambda x: jax.lax.scan(add, jnp.zeros_like(x[0]), x)[1])(x))


def rounded(x: np.ndarray, format: str) -> np.ndarray:
    from jaxattn import round_to

    return np.asarray(round_to(x.astype(np.float32), format))


def uniform_attention(format: str, keys: int) -> tuple[float, float]:
    """(output, l) of equal scores over V = 1 where l is summed key by key in `format`."""
    import jaxattn

    recipe = jaxattn.Recipe().replace(kv_block=1, rescaled_sum=format, running_sum=format)
    zeros = np.zeros((keys, 1, 1), np.float32)
    out, lse = jaxattn.dot_product_attention(
        zeros[:1], zeros, zeros + 1, recipe=recipe, return_residual=True
    )
    return float(out[0, 0, 0]), round(float(np.exp(lse[0, 0])), 2)


def harmonic(format: str, total: float, term: int) -> Outcome:
    partial = partial_sums(rounded(1 / np.arange(1.0, 1001), format), format)
    lost = 2 + int(np.flatnonzero(partial[1:] == partial[:-1])[0])
    return exactly(
        {"sum": float(partial[-1]), "first term lost": lost},
        {"sum": total, "first term lost": term},
    )


def ones(format: str, keys: int, limit: float) -> Outcome:
    out, l = uniform_attention(format, keys)
    plain = float(partial_sums(np.ones(keys), format)[-1])
    return exactly(
        {"sum of ones": plain, "l": l, "row of probabilities sums to": out},
        {"sum of ones": limit, "l": limit, "row of probabilities sums to": keys / limit},
    )


def tract() -> Outcome:
    rng = np.random.default_rng(0)
    far, text = [], []
    for (length, sd), published in TRACT.items():
        logits = rounded(rng.normal(0, sd, (length, 256)), "float16")
        p = rounded(np.exp(logits - logits.max(axis=0)), "float16")
        exact = p.astype(np.float64).sum(axis=0)
        found = 100 * float(np.mean(np.abs(partial_sums(p, "float16")[-1] / exact - 1)))
        text.append(f"{length}/{sd:g}: {found:.1f} ({published})")
        if abs(found - published) > max(0.25 * published, 1.0):
            far.append(f"{length}/{sd:g}")
    why = f"off by over 25 % and 1 point: {', '.join(far)}" if far else "rows drawn anew"
    return Outcome(", ".join(text) + " percent, published in brackets", not far, why)


def tt_metal() -> Outcome:
    rng = np.random.default_rng(0)
    measured, expected = {}, {}
    for length, (main, fixed) in TT_METAL.items():
        logits = rounded(rng.standard_normal((length, 256)), "bfloat16")
        p = rounded(np.exp(logits - logits.max(axis=0)), "bfloat16")
        tiles = p.reshape(-1, 32, 256).sum(axis=1)
        sums = partial_sums(tiles, "bfloat16")[-1]
        measured[f"{length} keys"] = float(np.mean(p.astype(np.float64).sum(axis=0) / sums))
        expected[f"{length} keys"] = main / fixed
    outcome = near(measured, expected, 0.02)
    why = (
        "the inputs and the order inside a 16-bit Dest are not in what could be read; its sums "
        "come out too large at every length, which rounding to nearest does not do to N(0, 1)"
    )
    return Outcome(outcome.measured, outcome.met, outcome.why and f"{outcome.why}; {why}")


CLAIMS = (
    *(
        Claim(
            id=f"higham-harmonic-{format}",
            title=f"The harmonic series ends at {total} in {format}",
            source="N. Higham, nhigham.com, on half precision: 7.0859 at term 513 in float16, "
            "5.0625 at term 65 in bfloat16",
            setup="1/k rounded, then added one by one, 1000 terms",
            expected=f"{total}, and term {term} the first to be lost",
            measure=harmonic,
            arguments=(format, total, term),
        )
        for format, total, term in (("float16", 7.0859375, 513), ("bfloat16", 5.0625, 65))
    ),
    Claim(
        id="candle-2048",
        title="A float16 softmax over 4096 equal logits sums to 2",
        source="huggingface/candle #3727 and #3717: the sum stalls at 2048, rows sum to 2.0 "
        "(sonos/tract #2587: 4096 ones sum to 2048)",
        setup="4096 equal scores, l summed key by key, V = 1",
        expected="exactly 2048 and 2.0",
        measure=ones,
        arguments=("float16", 4096, 2048.0),
    ),
    Claim(
        id="executorch-256",
        title="A bfloat16 softmax over 512 equal logits gives 1/256 each",
        source="pytorch/executorch #20089 and #20090: the sum saturates at 256",
        setup="512 equal scores, l summed key by key, V = 1",
        expected="exactly 256 and 2.0",
        measure=ones,
        arguments=("bfloat16", 512, 256.0),
    ),
    Claim(
        id="tract-row-sums",
        title="Relative error of float16 row sums by length and spread of the logits",
        source="sonos/tract #2586: table of 12 cells, 0.2 % to 38.2 %",
        setup="256 rows of N(0, sd^2) logits in float16, e^(x - max) in float16, added in order",
        expected="every cell within 25 % or 1 percentage point",
        measure=tract,
    ),
    Claim(
        id="tt-metal-row-sums",
        title="bfloat16 softmax rows that sum to 0.98, 0.90 and 0.86",
        source="tenstorrent/tt-metal #52045 and #53643: 0.983110, 0.897854, 0.864987 at 1024, 4096 "
        "and 8192 against 0.994 to 0.995 with a float32 sum",
        setup="256 rows of N(0, 1) logits, e^(x - max) in bfloat16, tiles of 32 added in order in "
        "bfloat16; the ratio to an exact sum (published: one column over the other)",
        expected="each ratio within 2 %",
        measure=tt_metal,
    ),
)
