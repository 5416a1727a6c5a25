"""The accumulator of Hopper's and Ada's FP8 matrix instructions, about 14 bits, and promotion."""

import numpy as np

from sweeps.claims.claim import Claim, Outcome, exactly

ROWS = 128
DEEPSEEK = "DeepSeek-V3 Technical Report, arXiv 2412.19437v2, section 3.3.2"
SETUP = (
    f"{ROWS} x {ROWS} results of E4M3 matrices drawn from N(0, 1), an accumulator that is cut to "
    "FP22 after each 32 products; one seed"
)


def product_error(inner: int, promote: int | None, uniform: bool = False) -> float:
    """Largest error of a product over `inner` terms, relative to the RMS of the results."""
    import jax.numpy as jnp

    from jaxattn import contraction, format_of, round_to

    rng = np.random.default_rng(0)
    draw = rng.random if uniform else rng.standard_normal
    a, b = (
        np.asarray(round_to(draw(shape, np.float32), "float8_e4m3fn:sat"))
        for shape in ((ROWS, inner), (inner, ROWS))
    )
    width = promote or inner
    parts = contraction.narrow_values(
        jnp.asarray(a.reshape(ROWS, -1, width)),
        jnp.asarray(b.reshape(-1, width, ROWS)),
        format_of("fp22"),
        32,
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.asarray(parts, np.float64).sum(axis=0) - exact
    return float(np.abs(error).max() / np.sqrt(np.mean(exact**2)))


def bit_rule() -> Outcome:
    from jaxattn import round_to

    words = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    words = words[(words >> 23 & 255 > 0) & (words >> 23 & 255 < 255)]  # normal numbers
    rounded = np.asarray(round_to(words.view(np.float32), "fp22")).view(np.uint32)
    kept = int(np.sum(rounded == words & ~np.uint32(0x3FF)))
    name = "cut to 13 bits of fraction"
    found = exactly({name: kept}, {name: len(words)})
    why = "that the format is what the paper found; no hardware was asked"
    return Outcome(found.measured, found.met, "; ".join(filter(None, (found.why, why))))


def without_promotion() -> Outcome:
    found = product_error(4096, None)
    why = (
        "the report names neither distribution nor norm: U[0, 1) gives "
        f"{product_error(4096, None, uniform=True):.2%} here; an instruction also cuts each of its "
        "32 products (section 3.5.2), here only their sum"
    )
    return Outcome(f"{found:.2%}", 0.01 <= found <= 0.04, why)


def growth() -> Outcome:
    contexts = (512, 4096, 16384)
    found = [product_error(n, None) for n in contexts]
    met = found[1] > 3 * found[0] and found[2] > 2 * found[1]
    text = ", ".join(f"K={n}: {x:.2e}" for n, x in zip(contexts, found, strict=True))
    return Outcome(text, met, "" if met else "the error does not grow with K")


def promotion() -> Outcome:
    contexts = (512, 4096, 16384)
    found = [product_error(n, 128) for n in contexts]
    plain = product_error(4096, None)
    met = max(found) < 2 * min(found) and found[1] < plain / 10
    text = ", ".join(f"K={n}: {x:.2e}" for n, x in zip(contexts, found, strict=True))
    return Outcome(
        f"{text}; without promotion {plain:.2e} at K=4096",
        met,
        "" if met else "promotion every 128 does not keep the error flat and ten times smaller",
    )


def flush_interval() -> Outcome:
    import jaxattn

    every = (128, 512, 8192)
    base = jaxattn.Recipe().replace(kv_block=8192, exp="exp2", pv_accum="fp22", pv_chunk=32)
    recipes = [base.replace(name=str(n), output_every=n) for n in every]
    query, stream = jaxattn.inputs.regime(
        "biased_v", length=16384, seed=0, heads=2, queries=32, head_dim=64
    )
    curves = jaxattn.error_curves(
        query, stream, None, recipes, contexts=[16384], metrics=("rel_l2",)
    )
    found = curves.metrics["rel_l2"].mean(axis=(1, 2, 3, 4))
    met = bool(found[0] < found[1] < found[2])
    text = ", ".join(f"every {n} keys {x:.1e}" for n, x in zip(every, found, strict=True))
    return Outcome(text, met, "an ordering of errors; the threads score retrieval at 128K")


def sage2_gain() -> Outcome:
    from jaxattn import error_curves, inputs
    from jaxattn.kernels import sage

    recipes = [
        recipe.replace(query="float16", query_group=None, key="float16", key_group=None)
        for recipe in (sage.SM89, sage.SM89_FP32_FP32)
    ]
    recipes = [r.replace(value="float32", probs="float32", result="float32") for r in recipes]
    query, stream = inputs.regime(
        "biased_v", length=16384, seed=0, heads=2, queries=32, head_dim=64
    )
    curves = error_curves(query, stream, None, recipes, contexts=[1024, 16384], metrics=("rel_l2",))
    one, two = curves.metrics["rel_l2"].mean(axis=(2, 3, 4))
    met = bool(one[1] > 5 * one[0] and two[1] < 1.5 * two[0] and one[1] > 10 * two[1])
    text = (
        f"FP22 throughout {one[0]:.1e} at 1024 keys and {one[1]:.1e} at 16384; two levels "
        f"{two[0]:.1e} and {two[1]:.1e}"
    )
    return Outcome(text, met, "" if met else "two-level accumulation does not bound the error")


CLAIMS = (
    Claim(
        id="sage2-fp22-bits",
        title="The accumulator of mma.f32.f8.f8.f32 drops the low 10 bits of float32",
        source="SageAttention2, arXiv 2411.10958, section 3.4: 1 + 8 + 13 bits, found with zero "
        "products and a varied accumulator",
        setup="a million random float32 numbers of the normal range rounded to fp22",
        expected="every one has its 10 low bits cleared and nothing else changed",
        measure=bit_rule,
    ),
    Claim(
        id="deepseek-k4096",
        title="Without promotion an FP8 product of K = 4096 is off by up to 2 %",
        source=f"{DEEPSEEK}: maximum relative error of nearly 2 % for two random matrices",
        setup=SETUP,
        expected="largest error between 1 % and 4 % of the results' RMS (2 % within a factor of 2)",
        measure=without_promotion,
    ),
    Claim(
        id="deepseek-growth",
        title="Without promotion the error grows with K",
        source=f"{DEEPSEEK}: the problem becomes more pronounced when the inner dimension is large",
        setup=f"{SETUP}; K = 512, 4096, 16384",
        expected="over 3 times from K = 512 to 4096, and over 2 times from there to 16384",
        measure=growth,
    ),
    Claim(
        id="deepseek-promotion",
        title="Promotion to float32 every 128 products keeps the error small and flat",
        source=f"{DEEPSEEK}: N_C = 128 improves precision significantly",
        setup=f"{SETUP}; K = 512, 4096, 16384, promoted every 128",
        expected="within a factor of 2 over all K, a tenth of the unpromoted error at 4096",
        measure=promotion,
    ),
    Claim(
        id="fa3-fp8-flush",
        title="FP8 attention is better the more often its accumulator is flushed",
        source="vllm-project/flash-attention #104 and #122, vllm-project/vllm #23813: "
        "niah_multikey_2 at 128K 0.89 flushed every tile, 0.88 every 4 tiles, 0.856 every 64",
        setup="biased_v, 16384 keys, 2 heads, 32 rows, head dim 64; p·v in FP22, all else float32; "
        "flushed every 128, 512 and 8192 keys",
        expected="each longer interval has the larger error",
        measure=flush_interval,
        slow=True,
    ),
    Claim(
        id="sage2-two-level",
        title="SageAttention2's two-level accumulation confines the error of FP22 to a block",
        source="SageAttention2, arXiv 2411.10958, section 3.4: a second buffer in float32 for "
        "each block",
        setup="sage2-sm89-fp32 and -fp32-fp32 with all other roundings removed, biased_v, 2 heads, "
        "32 rows, head dim 64, 1024 and 16384 keys",
        expected="one level grows over 5 times, two levels under 1.5 times and are 10 times better",
        measure=sage2_gain,
        slow=True,
    ),
)
