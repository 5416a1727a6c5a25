"""compare: a kernel's own output beside float64, and beside what recipes make of its inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn import kernels, metrics
from jaxattn.agreement import Agreement, agreement, correlation
from jaxattn.attention import dot_product_attention
from jaxattn.outputs import outputs
from jaxattn.recipe import Recipe
from jaxattn.reference import reference_attention

METRICS = ("nmse", "nmse_llama", "rel_l2", "max_abs", "cosine", "ulps", "bias_o")
WORST = {"max_abs": np.max, "ulps": np.max}  # the median over queries for other metrics
NEED_LSE = ("lse_error", "bias_l")
CONTROL = "float32"

# One of each kind of arithmetic; what is left out mostly differs from one of these in block size.
CANDIDATES = (
    CONTROL,
    "hexagon-hmx-fp16",
    "hexagon-pr24389",
    "hexagon-hmx-fp32",
    "hexagon-hvx",
    "metal",
    "ggml-cpu-decode",
    "ggml-cuda-mma-f16",
    "ggml-cuda-tile-f16",
    "ggml-vulkan-cm2",
    "ggml-opencl-f16",
    "flash-attention-2-fp16",
    "flash-attention-2-bf16",
    "flashinfer-fp16",
    "torch-cpu-math-fp16",
    "torch-cpu-math-bf16",
)

FEW_KEYS = 256  # queries that see no more share one region
FAR = 0.1  # NMSE that no rounding explains
SAME, ALIKE = 0.999, 0.5  # correlations of one arithmetic, and of some kinship


class Region(NamedTuple):
    """Queries that see more than `above` and at most `most` keys.

    queries:  how many
    observed: metric -> [B, N], as in Comparison
    emulated: metric -> [recipe, B, N]
    """

    above: int
    most: int
    queries: int
    observed: dict[str, np.ndarray]
    emulated: dict[str, np.ndarray]


class Comparison(NamedTuple):
    """A capture's output against float64, and recipes on the same inputs, nearest first.

    recipes:     names, by the correlation of their error vectors with the observed one
    agreement:   of each recipe, over all heads
    correlation: [recipe, B, N], of each head alone
    observed:    metric -> [B, N]: the median over the head's queries, of WORST the largest
    emulated:    metric -> [recipe, B, N], the recipe's output stored in the dtype of the observed
    regions:     by the number of keys that a query sees, where that differs
    remarks:     what is wrong with the output beyond rounding, in sentences
    """

    recipes: tuple[str, ...]
    agreement: tuple[Agreement, ...]
    correlation: np.ndarray
    observed: dict[str, np.ndarray]
    emulated: dict[str, np.ndarray]
    regions: tuple[Region, ...]
    remarks: tuple[str, ...]


def compare(
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    recipes: Sequence[Recipe | str] = CANDIDATES,
    *,
    names: Sequence[str] = METRICS,
    scale: float | None = None,
    causal: bool = False,
) -> Comparison:
    """The error of `output` against float64 attention, and the recipes that err most like it.

    query [B, T, N, H], key [B, S, K, H], value [B, S, K, D], output [B, T, N, D]: floats, finite
    names:  of jaxattn.metrics.METRICS, but those that need a log-sum-exp
    scale:  of the scores, 1/sqrt(H) by default
    causal: query t sees the keys up to S - T + t; otherwise every query sees all keys

    Raises ValueError or TypeError for what does not fit, in one line.
    """
    names = metrics.check_names(names)
    for name in NEED_LSE:
        if name in names:
            raise ValueError(f"{name} needs the kernel's log-sum-exp, of which there is none here")
    if isinstance(recipes, str | Recipe) or not recipes:
        raise ValueError("recipes must be a sequence of at least one recipe or name")
    chosen = [kernels.get(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    query, key, value, output = (np.asarray(x) for x in (query, key, value, output))
    expected = (*query.shape[:-1], value.shape[-1])
    if output.shape != expected:
        raise ValueError(f"output must be [B, T, N, D] = {expected}, got {output.shape}")
    T, S = query.shape[1], key.shape[1]
    if causal and T > S:
        raise ValueError(
            f"causal: {T} queries and {S} keys leave the first {T - S} queries without a key; "
            "leave out queries, or causal"
        )
    if causal:
        mask = np.tri(T, S, S - T, dtype=bool)
        ideal = reference_attention(query, key, value, mask=mask, scale=scale)
        emulated = np.stack([_attend(query, key, value, r, mask, scale) for r in chosen])
    else:
        found = outputs(query, key, value, chosen, contexts=[S], scale=scale)
        emulated, ideal = found.output[:, 0], found.reference[0]
    with np.errstate(over="ignore"):  # a recipe may exceed what the observed dtype holds
        emulated = emulated.astype(output.dtype).astype(np.float64)
    observed = output.astype(np.float64)

    agreements = [agreement(observed, one, ideal) for one in emulated]
    near = np.nan_to_num([one.correlation for one in agreements], nan=-2.0)
    rank = np.argsort(-near, kind="stable").tolist()
    emulated = emulated[rank]
    regions = _regions(names, observed, emulated, ideal, S) if causal else ()
    B, N = query.shape[0], query.shape[2]
    heads = [
        correlation((observed - ideal)[b, :, n], (one - ideal)[b, :, n])
        for one in emulated
        for b, n in np.ndindex(B, N)
    ]
    return Comparison(
        tuple(chosen[i].name for i in rank),
        tuple(agreements[i] for i in rank),
        np.array(heads).reshape(-1, B, N),
        *_by_head(names, observed, emulated, ideal),
        regions,
        tuple(_remarks(observed, ideal)),
    )


def _attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    recipe: Recipe,
    mask: np.ndarray,
    scale: float | None,
) -> np.ndarray:
    """The recipe's output, not rounded to the query's dtype."""
    wide = query if query.dtype.itemsize > 4 else query.astype(np.float32)
    mask = mask[None, None]
    out = dot_product_attention(wide, key, value, mask=mask, recipe=recipe, scale=scale)
    return np.asarray(out).astype(np.float64)


def _by_head(
    names: tuple[str, ...], observed: np.ndarray, emulated: np.ndarray, ideal: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """metric -> [B, N] of the observed [B, T, N, D], and [recipe, B, N]: one program for both."""
    both = np.concatenate([observed[None], emulated])
    rows = both.shape[:-1]
    found = metrics.measure(names, both, np.zeros(rows), ideal, np.zeros(rows[1:]))
    by_head = {name: WORST.get(name, np.median)(found[name], axis=-2) for name in names}
    return {n: x[0] for n, x in by_head.items()}, {n: x[1:] for n, x in by_head.items()}


def _regions(
    names: tuple[str, ...], observed: np.ndarray, emulated: np.ndarray, ideal: np.ndarray, keys: int
) -> tuple[Region, ...]:
    """Octaves of the keys that each query sees: keys - T + 1 and up."""
    T = observed.shape[1]
    seen = np.arange(keys - T + 1, keys + 1)
    octave = np.ceil(np.log2(np.maximum(seen, FEW_KEYS))).astype(int)
    regions = []
    for power in np.unique(octave):
        rows = octave == power
        some = _by_head(names, observed[:, rows], emulated[:, :, rows], ideal[:, rows])
        above = 0 if 2**power <= FEW_KEYS else 2 ** (power - 1)
        regions.append(Region(int(above), int(2**power), int(rows.sum()), *some))
    return tuple(regions)


def _remarks(observed: np.ndarray, ideal: np.ndarray) -> list[str]:
    """What no rounding explains, by head; batch entries are named where there are some."""
    found: dict[str, list[str]] = {}
    B, N = observed.shape[0], observed.shape[2]
    for b, n in np.ndindex(B, N):
        x, exact = observed[b, :, n], ideal[b, :, n]
        where = str(n) if B == 1 else f"{b}.{n}"
        error, size = np.sum((x - exact) ** 2), np.sum(exact**2)
        if not x.any() and exact.any():
            found.setdefault("all zero: it looks like a kernel that did not run", []).append(where)
        elif x.size > 1 and np.ptp(x) == 0 < np.ptp(exact):
            what = "one number throughout: it looks like a kernel that did not run"
            found.setdefault(what, []).append(where)
        elif error > FAR * size:
            what = "further from float64 than rounding goes: check scale, causality and layout"
            found.setdefault(what, []).append(where)
    return [
        f"output of {'all heads' if len(heads) == B * N else 'head ' + ', '.join(heads)}: {what}"
        for what, heads in found.items()
    ]


def verdict(comparison: Comparison) -> str:
    """One sentence on the nearest recipe."""
    name, best = comparison.recipes[0], comparison.agreement[0]
    if not best.correlation >= ALIKE:
        near = "none is defined" if np.isnan(best.correlation) else f"{name} {best.correlation:.3f}"
        return f"no recipe of {len(comparison.recipes)} errs like this kernel (nearest: {near})"
    if best.correlation >= SAME:
        return f"errs as {name} does: correlation {best.correlation:.6f}"
    return f"errs partly as {name} does: correlation {best.correlation:.3f}"


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison in values that JSON knows; what is not finite as a string."""
    c = comparison
    recipes = [
        {
            "recipe": name,
            **c.agreement[i]._asdict(),
            "correlation_by_head": c.correlation[i],
            "metrics": {metric: x[i] for metric, x in c.emulated.items()},
        }
        for i, name in enumerate(c.recipes)
    ]
    regions = [
        {
            **{field: getattr(region, field) for field in ("above", "most", "queries")},
            "observed": region.observed,
            "recipes": [
                {"recipe": name, **{metric: x[i] for metric, x in region.emulated.items()}}
                for i, name in enumerate(c.recipes)
            ],
        }
        for region in c.regions
    ]
    told = {"verdict": verdict(c), "remarks": c.remarks, "observed": c.observed}
    return plain({"question": "compare", **told, "recipes": recipes, "regions": regions})


def plain(x: Any) -> Any:
    """Nested dicts and lists of Python's numbers and strings."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, np.ndarray | list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float | np.floating):
        return float(f"{x:.9g}") if np.isfinite(x) else str(float(x))
    return x.item() if isinstance(x, np.generic) else x


def text(comparison: Comparison, shown: int | None = None) -> list[str]:
    """Lines for people. shown: how many recipes, and CONTROL besides; None for all."""
    c = comparison
    B, N = c.correlation.shape[1:]
    some = [i for i, name in enumerate(c.recipes) if shown is None or i < shown or name == CONTROL]
    wide = max(len(c.recipes[i]) for i in some) + 4

    def row(name: str, values: Mapping[str, Any]) -> str:
        cells = (number(m, WORST.get(m, np.median)(x)) for m, x in values.items())
        return f"  {name:<{wide - 2}}" + "".join(f"{x:>11}" for x in cells)

    def table(title: str, part: Comparison | Region) -> list[str]:
        emulated = [row(c.recipes[i], {m: x[i] for m, x in part.emulated.items()}) for i in some]
        lines = [f"{title:<{wide}}" + "".join(f"{name:>11}" for name in part.observed)]
        return [*lines, row("observed", part.observed), *emulated]

    lines = table("error", c)
    for b, n in np.ndindex(B, N):
        name = f"  head {n}" if B == 1 else f"  entry {b}, head {n}"
        lines.insert(2 + b * N + n, row(name, {m: x[b, n] for m, x in c.observed.items()}))
    for region in c.regions:
        title = f"{region.above + 1:,} to {region.most:,} keys"
        lines += ["", *table(title, region)]
    columns = ("correlation", "worst head", "unexplained", "RMS ratio", "equal")
    lines += ["", f"{'error vectors':<{wide}}" + "".join(f"{x:>13}" for x in columns)]
    for i in some:
        a, least = c.agreement[i], np.min(c.correlation[i])
        lines.append(
            f"  {c.recipes[i]:<{wide - 2}}{a.correlation:>13.6f}{least:>13.6f}"
            f"{a.unexplained:>13.2%}{a.rms_ratio:>13.3f}{a.equal:>13.1%}"
        )
    return [*lines, "", *c.remarks, verdict(c)]


def number(name: str, x: float) -> str:
    """A metric's value in few digits; a cosine by its distance from 1."""
    if name == "cosine":
        return f"1-{1 - x:.1e}" if x < 1 else f"{x:.3g}"
    return f"{x:.2e}" if name != "ulps" else f"{x:.4g}"
