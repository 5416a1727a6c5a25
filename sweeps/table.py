"""The rows of a study as text: errors at a few contexts, and where the tolerance is exceeded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

TOLERANCE = 5e-4  # NMSE that llama.cpp's test-backend-ops allows FLASH_ATTN_EXT
CONTEXTS = (4096, 32768, 131072)
MOST_HEADS = 8  # of a capture that are told apart


def medians(rows: pd.DataFrame, group: Sequence[str]) -> pd.DataFrame:
    """Medians of nmse, bias_l and bias_o over all else than `group` and context.

    A row that is not finite counts as infinitely wrong in nmse, and not at all in the biases.
    """
    metrics = rows[["bias_l", "bias_o"]].astype("float64").assign(nmse=_or_inf(rows["nmse"]))
    for bias in ("bias_l", "bias_o"):
        metrics[bias] = metrics[bias].where(np.isfinite(metrics[bias]))
    keyed = pd.concat([rows[[*group, "context"]], metrics], axis=1)
    return keyed.groupby([*group, "context"], sort=False, observed=True).median().sort_index()


def _or_inf(nmse: pd.Series) -> pd.Series:
    return nmse.astype("float64").fillna(np.inf)


def crossing(contexts: np.ndarray, nmse: np.ndarray, overflows: bool = False) -> str:
    """The first context whose NMSE exceeds TOLERANCE; '-' if none does.

    A trailing '~' says that a longer context is within the tolerance again, '!' that some row
    overflows at some context: a median can hide that.
    """
    above = nmse > TOLERANCE
    mark = "!" if overflows else ""
    if not above.any():
        return f"-{mark}"
    first = int(np.argmax(above))
    return f"{int(contexts[first]):,}" + ("" if above[first:].all() else "~") + mark


def reported(contexts: Sequence[int]) -> list[int]:
    """Those of CONTEXTS that were computed, and the longest."""
    return sorted({n for n in contexts if n in CONTEXTS} | {max(contexts)})


def table(rows: pd.DataFrame, recipes: Sequence[str], inputs: Sequence[str]) -> str:
    """One line for each recipe and block, one paragraph for each input."""
    group = ["inputs", "recipe", "block"]
    curves = medians(rows, group)
    overflows = rows.groupby(group, observed=True)["overflow"].any()
    sizes = rows.groupby([*group, "context"], observed=True)["kv_block"].max()
    at = reported(sorted(rows["context"].unique()))
    width = max(8, *(len(name) + 2 for name in recipes))
    words = ("NMSE at", "error of l at", "error of o at")
    wide = max(9, -(-16 // len(at)))  # a heading is 14 letters
    above = "".join(f"{word:>{wide * len(at)}}" for word in words)
    head = f"{'recipe':<{width}}{'KV block':<10}" + "".join(f"{n:>{wide},}" for n in at) * 3
    lines = []
    for source in inputs:
        lines += ["", f"{source:<{width + 10}}{above}", f"{head}{'exceeds':>10}"]
        for recipe, block in _pairs(rows, recipes, source):
            key = (source, recipe, block)
            curve = curves.loc[key]
            size = int(sizes.loc[(*key, curve.index[-1])])
            cells = [_nmse(curve["nmse"].get(n)) for n in at]
            cells += [_signed(curve[bias].get(n)) for bias in ("bias_l", "bias_o") for n in at]
            first = crossing(curve.index.to_numpy(), curve["nmse"].to_numpy(), overflows[key])
            cells.append(first)
            line = f"{recipe:<{width}}{_block(block, size):<10}"
            lines.append(
                line + "".join(f"{cell:>{wide}}" for cell in cells[:-1]) + f"{cells[-1]:>10}"
            )
    lines += [
        "",
        "Medians over seeds, heads and queries. Errors of the running sum l and the output o are",
        "relative and signed; that of l is of exp(log-sum-exp): errors of scores are part of it.",
        "KV block: own where the kernel has one size; rule where it chooses by context: the size",
        "at the longest. exceeds: first context with NMSE above 5e-4; ~: within it again at a",
        "longer one; !: some row overflows at some context; -: none.",
    ]
    return "\n".join(lines[1:])


def own_blocks(rows: pd.DataFrame, recipes: Mapping[str, Any]) -> pd.DataFrame:
    """The rows with `own` instead of `rule` where a recipe's block is no rule."""
    blocks = {name: recipe["kv_block"] for name, recipe in recipes.items()}
    fixed = [name for name, block in blocks.items() if isinstance(block, int) or block == "whole"]
    own = (rows["block"] == "rule") & rows["recipe"].isin(fixed)
    return rows.assign(block=rows["block"].where(~own, "own"))


def by_head(rows: pd.DataFrame, captures: Sequence[str]) -> pd.DataFrame:
    """The rows of a capture, each of its heads an input of its own."""
    if not captures or not 1 < rows["head"].nunique() <= MOST_HEADS:
        return rows
    return rows.assign(inputs="head " + rows["head"].astype(str))


def crossings(rows: pd.DataFrame, recipes: Sequence[str], inputs: Sequence[str]) -> str:
    """The context at which each curve exceeds the tolerance, recipe and block x input: of the
    median row, and of the worst."""
    group = ["inputs", "recipe", "block"]
    overflows = rows.groupby(group, observed=True)["overflow"].any()
    count = int(rows.groupby([*group, "context"], observed=True).size().max())
    longest = f"{int(rows['context'].max()):,}"
    keyed = rows.assign(nmse=_or_inf(rows["nmse"]))
    worst = keyed.groupby([*group, "context"], observed=True)["nmse"].max().sort_index()
    median = [
        f"First context at which the median NMSE exceeds 5e-4 (-: not up to {longest};",
        "~: within it again later; !: some row overflows)",
        *_crossings(medians(rows, group)["nmse"], overflows, rows, recipes, inputs),
    ]
    some = [
        "",
        f"First context at which the NMSE of any of {count} rows exceeds 5e-4, or it overflows",
        *_crossings(worst, overflows & False, rows, recipes, inputs),
    ]
    return "\n".join(median + some * (count > 1))


def _crossings(
    curves: pd.Series,
    overflows: pd.Series,
    rows: pd.DataFrame,
    recipes: Sequence[str],
    inputs: Sequence[str],
) -> list[str]:
    width = max(8, *(len(name) + 2 for name in recipes))
    wide = max(len(name) for name in inputs) + 2
    lines = [f"{'recipe':<{width}}{'KV block':<9}" + "".join(f"{name:>{wide}}" for name in inputs)]
    for recipe, block in _pairs(rows, recipes):
        cells = []
        for source in inputs:
            try:
                curve = curves.loc[(source, recipe, block)]
                overflowed = overflows[(source, recipe, block)]
                cells.append(crossing(curve.index.to_numpy(), curve.to_numpy(), overflowed))
            except KeyError:
                cells.append("")
        lines.append(f"{recipe:<{width}}{block:<9}" + "".join(f"{cell:>{wide}}" for cell in cells))
    return lines


def _pairs(
    rows: pd.DataFrame, recipes: Sequence[str], source: str | None = None
) -> list[tuple[str, str]]:
    """Recipe and block of every curve, recipes in the given order, fixed blocks by size first."""
    rows = rows if source is None else rows[rows["inputs"] == source]
    pairs = rows[["recipe", "block"]].drop_duplicates().itertuples(index=False, name=None)
    return sorted(pairs, key=lambda pair: (recipes.index(pair[0]), _size(pair[1])))


def _size(block: str) -> float:
    return float(block) if block.isdigit() else float("inf")


def _block(block: str, size: int) -> str:
    return block if block.isdigit() else f"{block} {size}"


def _nmse(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _signed(value: float | None) -> str:
    if value is None:
        return ""
    return "nan" if np.isnan(value) else f"{value:+.1e}"
