"""A comparison in words and in JSON: tables of errors, the nearest recipes, what to try next."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxattn import kernels
from jaxattn.compare import ALIKE, CLOSE, CONTROL, SAME, WORST, Comparison, Region

WIDTH = 100
MEANINGS = {
    "nmse_llama": "squared error over the output's own square",
    "ulps": "largest error in steps of the output's dtype",
    "bias_o": "error along the exact output, signed",
    "unexplained": "what the recipe's errors leave of the observed ones, in RMS",
    "RMS ratio": "observed errors over the recipe's",
    "equal": "share of results that are the same",
}
NO_BETTER = 1.1  # unexplained error of CONTROL to that of the best, which then says nothing


def verdict(comparison: Comparison) -> str:
    """One sentence on the nearest recipe."""
    name, best = comparison.recipes[0], comparison.agreement[0]
    if best.nmse_real == 0:
        pairs = zip(comparison.recipes, comparison.agreement, strict=True)
        same = [recipe for recipe, one in pairs if one.nmse_recipe == 0]
        return f"no error against float64; of the recipes tried so {', '.join(same) or 'none'}"
    as_good = ""
    if CONTROL in comparison.recipes[1:]:
        control = comparison.agreement[comparison.recipes.index(CONTROL)]
        alike = control.correlation >= ALIKE
        if alike and control.unexplained < NO_BETTER * best.unexplained:
            as_good = f"; {CONTROL} as well: it is the rounding of the stored result"
    if not best.correlation >= ALIKE:
        near = "none is defined" if np.isnan(best.correlation) else f"{name} {best.correlation:.3f}"
        return f"no recipe of {len(comparison.recipes)} errs like this kernel (nearest: {near})"
    if best.correlation >= SAME:
        return f"errs as {name} does: correlation {best.correlation:.6f}{as_good}"
    return f"errs partly as {name} does: correlation {best.correlation:.3f}{as_good}"


def advice(comparison: Comparison) -> list[str]:
    """What was tried, what the agreement means and what to ask next; nothing where that is said."""
    best, (name, *changes) = comparison.agreement[0], comparison.recipes[0].split("+")
    if comparison.remarks or best.nmse_real == 0:
        return []
    settings = "".join(f" --set {change}" for change in changes)
    asked = f"jaxattn advise --kernel {name}{settings} --context 131072"
    known = best.correlation >= CLOSE and name in kernels.names()
    lines = [f"up to what context that is safe: {asked}"] * known
    if best.correlation >= SAME:
        return lines
    tried: dict[str, list[str]] = {}
    for recipe in comparison.recipes:
        base, plus, change = recipe.partition("+")
        tried.setdefault(base, []).extend([change] * bool(plus))
    names = (f"{base} (and {', '.join(also)})" if also else base for base, also in tried.items())
    if not best.correlation >= CLOSE:
        lines.append(f"tried: {', '.join(names)}")
    if best.correlation >= ALIKE:
        lines += [
            f"{best.unexplained:.0%} of the error, in RMS, is left unexplained: the kernel differs "
            "from that recipe in a format, a function, or the size or order of blocks",
            f"next: --recipes {name}{settings} --set FIELD=VALUE (`jaxattn kernels {name}` lists "
            "the fields)",
        ]
    else:
        further = "--recipes all (minutes), or " * (len(tried) < len(kernels.names()))
        lines.append(
            f"next: {further}a recipe near your kernel with its own blocks and formats: --recipes "
            "NAME --set kv_block=32 --set output=float16 (`jaxattn kernels NAME` lists the fields)"
        )
    fit = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [line for text in lines for line in fit.wrap(text)]


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
    told = {"verdict": verdict(c), "advice": advice(c), "remarks": c.remarks}
    observed = {"observed": c.observed, "recipes": recipes, "regions": regions}
    return plain({"question": "compare", **told, **observed})


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
    lines.append("")
    known = [f"{x}: {MEANINGS[x]}" for x in (*c.observed, *columns) if x in MEANINGS]
    lines += [*textwrap.wrap("; ".join(known), WIDTH, break_on_hyphens=False), ""]
    return [*lines, *c.remarks, verdict(c), *advice(c)]


def number(name: str, x: float) -> str:
    """A metric's value in few digits; a cosine by its distance from 1."""
    if name == "cosine":
        return f"1-{1 - x:.1e}" if x < 1 else f"{x:.3g}"
    return f"{x:.2e}" if name != "ulps" else f"{x:.4g}"
