"""PASA (arXiv 2503.01873): all-float16 attention that shifts each block's keys by their mean."""

import numpy as np

from sweeps.claims.claim import Claim, Outcome

KEYS, ROWS, HEADS, HEAD_DIM = 1407, 32, 2, 128
SOURCE = "PASA, arXiv 2503.01873; chenglong92/PASA, PASA_Verification.py (gendata) at 8816b09"


def _attend(mean: float, size: float, hybrid: bool) -> tuple[float, list[tuple[float, float]]]:
    """Share of |q·k| beyond float16; then without and with PASA: share of rows that are not
    finite, and RMSE / rms(V) of the others."""
    import jaxattn
    from jaxattn.kernels import papers

    rng = np.random.default_rng(0)

    def draw(tokens: int) -> np.ndarray:
        shape = (tokens, HEADS, HEAD_DIM)
        if not hybrid:
            return rng.uniform(mean - size, mean + size, shape).astype(np.float16)
        outliers = rng.normal(0, size, shape) * rng.binomial(1, 0.001, shape)
        return (rng.normal(mean, 1, shape) + outliers).astype(np.float16)

    q, k, v = draw(ROWS), draw(KEYS), draw(KEYS)
    exact = jaxattn.reference_attention(q, k, v)
    products = np.einsum("thd,shd->hts", q.astype(np.float64), k.astype(np.float64))
    found = []
    for recipe in (papers.PASA_UNSHIFTED, papers.PASA):
        out = np.asarray(jaxattn.dot_product_attention(q, k, v, recipe=recipe), np.float64)
        good = np.isfinite(out).all(axis=-1)
        error = (out - exact)[good] if good.any() else np.array(np.inf)
        size_v = np.sqrt(np.mean(v.astype(np.float64) ** 2))
        found.append((float(np.mean(~good)), float(np.sqrt(np.mean(error**2)) / size_v)))
    return float(np.mean(np.abs(products) >= 65520)), found


def overflow(mean: float, size: float, hybrid: bool) -> Outcome:
    beyond, ((lost, _), (pasa_lost, pasa_error)) = _attend(mean, size, hybrid)
    text = (
        f"{beyond:.3%} of q·k beyond float16; rows lost without PASA {lost:.0%}, with PASA "
        f"{pasa_lost:.0%} (RMSE / rms(V) {pasa_error:.1e})"
    )
    met = lost > 0 and pasa_lost == 0 and pasa_error < 0.01
    return Outcome(text, met, "the paper's own RMSE could not be read")


def below() -> Outcome:
    beyond, ((lost, plain), (pasa_lost, shifted)) = _attend(20.0, 0.5, False)
    text = (
        f"{beyond:.0%} of q·k beyond float16, rows lost {lost:.0%} and {pasa_lost:.0%}; RMSE / "
        f"rms(V) {plain:.1e} without, {shifted:.1e} with PASA"
    )
    met = beyond == lost == pasa_lost == 0 and shifted < plain
    return Outcome(text, met, "" if met else "PASA is not the more accurate")


CLAIMS = (
    *(
        Claim(
            id=f"pasa-overflow-{name}",
            title=f"Float16 scores overflow at {words}; with PASA none do",
            source=f"{SOURCE}: overflow of S beyond 65504",
            setup=f"{words}; {KEYS} keys, head dim {HEAD_DIM}, blocks of 128, {HEADS} heads, "
            f"{ROWS} rows, one seed, float16 inputs, beta 0.9375",
            expected="rows without a finite result before, none with PASA, whose RMSE is below "
            "1 % of rms(V)",
            measure=overflow,
            arguments=arguments,
        )
        for name, words, arguments in (
            ("mean30", "uniform inputs of mean 30 ± 0.5 (128·900 = 115200)", (30.0, 0.5, False)),
            ("mean20-wide", "uniform inputs of mean 20 ± 20", (20.0, 20.0, False)),
            ("hybrid30", "N(30, 1) + N(0, 100)·Bernoulli(0.001)", (30.0, 10.0, True)),
        )
    ),
    Claim(
        id="pasa-mean20",
        title="Below the overflow PASA is more accurate than the same arithmetic without it",
        source=f"{SOURCE}; abstract and third-party summary: PASA reduces the RMSE of naive "
        "low-precision flash attention",
        setup=f"uniform inputs of mean 20 ± 0.5 (128·400 = 51200); {KEYS} keys, as above",
        expected="no overflow in either; RMSE with PASA the smaller",
        measure=below,
    ),
)
