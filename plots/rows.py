"""Stored rows, and the medians, bands and crossings that the figures draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TOLERANCE = 5e-4  # NMSE that llama.cpp's test-backend-ops allows FLASH_ATTN_EXT
RULE = "rule"  # the block setting "as the recipe has it"
CURVE = ["panel", "recipe", "block"]
PREDICTED = "_predicted.parquet"
COLUMNS = ["recipe", "inputs", "seed", "block", "kv_block", "context", "head", "nmse"]
COLUMNS += ["overflow", "stagnated"]
MOST_PANELS = 8


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest of a directory that `python -m sweeps run` wrote; ValueError if none."""
    path = root / "_manifest.json"
    if not path.is_file():
        raise ValueError(f"{root}: no directory that `sweeps run` wrote")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        manifest["study"], [part["key"] for part in manifest["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: unreadable ({error}); the same `sweeps run` again rebuilds it"
        ) from None
    return manifest


def rows_of(root: Path, manifest: Mapping[str, Any], columns: list[str] | None) -> pd.DataFrame:
    """The rows of every finished part; ValueError if there are none, or they lack `columns`."""
    paths = [root / f"{part['key']}.parquet" for part in manifest["parts"]]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"{root}: no part is finished yet")
    try:
        return pd.concat([pd.read_parquet(path, columns=columns) for path in paths])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{root}: a part cannot be read ({error})") from None


def read(root: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of a grid study, and its recipes, the kinds of its inputs and what theory expects
    (predictions_of); ValueError if none."""
    manifest = manifest_of(root)
    try:
        kinds = {label: source["kind"] for label, source in manifest["inputs"].items()}
        recipes = list(manifest["recipes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root}: no rows of a grid study (its manifest: {error!r})") from None
    more = {"recipes": recipes, "kinds": kinds, "predicted": predictions_of(root, manifest)}
    return rows_of(root, manifest, COLUMNS), more


def predictions_of(root: Path, manifest: Mapping[str, Any]) -> pd.DataFrame | None:
    """What theory expects of the present parts, as `run --predict` stored it; None if nothing."""
    path = root / PREDICTED
    if not path.is_file():
        return None
    try:
        rows = pd.read_parquet(path)
        rows = rows[rows["key"].isin([part["key"] for part in manifest["parts"]])]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: unreadable ({error}); delete it") from None
    return rows if len(rows) else None


def with_panels(rows: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Rows with a column `panel`: the input, or each head of a single capture."""
    labels = list(rows["inputs"].unique())
    heads = sorted(rows["head"].unique())
    if len(labels) == 1 and kinds.get(labels[0]) == "capture" and 1 < len(heads) <= MOST_PANELS:
        return rows.assign(panel="head " + rows["head"].astype(str))
    return rows.assign(panel=rows["inputs"])


def panels_of(rows: pd.DataFrame, kinds: Mapping[str, str]) -> list[str]:
    """Panel names in the order of the study."""
    present = set(rows["panel"].unique())
    ordered = [label for label in kinds if label in present]
    return ordered + sorted(present - set(ordered), key=lambda name: (len(name), name))


def summarise(rows: pd.DataFrame, predicted: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line for each panel, recipe, block and context: what the figures draw.

    nmse: the median over seeds, heads and queries; a row that is not finite counts as infinite.
    low, high: least and greatest median of a seed; with one seed the quartiles over its rows.
    kv_block: the block's size; overflow: of any row; stagnated: of half of the rows or more.
    predicted: the NMSE that theory expects (predictions_of), the median of a panel's heads, NaN
    where it expects none; predicted_stagnated, predicted_overflow: of half of the rows, likewise.
    """
    rows = rows.assign(nmse=rows["nmse"].astype("float64").fillna(np.inf))
    by = [*CURVE, "context"]
    groups = rows.groupby(by, observed=True)
    lines = groups.agg(
        nmse=("nmse", "median"),
        kv_block=("kv_block", "max"),
        overflow=("overflow", "any"),
        stagnated=("stagnated", "mean"),
    )
    lines["stagnated"] = lines["stagnated"] >= 0.5
    if rows["seed"].nunique() > 1:
        seeds = rows.groupby([*by, "seed"], observed=True)["nmse"].median().groupby(by)
        lines["low"], lines["high"] = seeds.min(), seeds.max()
    else:
        lines["low"] = groups["nmse"].quantile(0.25, interpolation="lower")
        lines["high"] = groups["nmse"].quantile(0.75, interpolation="higher")
    by_head = bool((rows["panel"] != rows["inputs"]).all())
    return _with_predictions(lines.reset_index(), predicted, by_head)


def _with_predictions(
    lines: pd.DataFrame, predicted: pd.DataFrame | None, by_head: bool
) -> pd.DataFrame:
    names = {"nmse": "predicted", **{x: f"predicted_{x}" for x in ("stagnated", "overflow")}}
    if predicted is None:
        return lines.assign(**dict.fromkeys(names.values(), np.nan))
    panel = "head " + predicted["head"].astype(str) if by_head else predicted["inputs"]
    found = predicted.assign(nmse=predicted["nmse"].fillna(np.inf), panel=panel)
    found = found.groupby([*CURVE, "context"], observed=True)[list(names)].median()
    return lines.merge(found.rename(columns=names).reset_index(), "left", [*CURVE, "context"])


def select(lines: pd.DataFrame, panel: str, recipe: str, block: str) -> pd.DataFrame:
    """One curve, by context."""
    wanted = (lines["panel"] == panel) & (lines["recipe"] == recipe) & (lines["block"] == block)
    return lines[wanted].sort_values("context")


def crossings(lines: pd.DataFrame) -> pd.DataFrame:
    """Contexts of each panel, recipe and block: the first above TOLERANCE, `until`: the first that
    is within it again, `overflow`: the first at which any row overflows; NaN if there is none."""
    above = lines["nmse"] > TOLERANCE
    first = lines["context"].where(above).groupby([lines[name] for name in CURVE]).transform("min")
    found = lines.assign(
        context=first,
        until=lines["context"].where(~above & (lines["context"] > first)),
        overflow=lines["context"].where(lines["overflow"]),
    )
    names = ["context", "until", "overflow"]
    return found.groupby(CURVE, observed=True, as_index=False)[names].min()


def blocks_of(lines: pd.DataFrame, recipe: str | None = None) -> list[str]:
    """Block settings by size, the recipe's own last."""
    rows = lines if recipe is None else lines[lines["recipe"] == recipe]
    return sorted(rows["block"].unique(), key=lambda b: float(b) if b.isdigit() else float("inf"))


def featured(lines: pd.DataFrame, recipes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Up to two recipes that ran at several blocks, and up to one that ran at its own only.

    A kernel as it is and as `--set` changes it; else the kernel before and after llama.cpp #25085
    and ggml's CPU decode kernel, where they ran.
    """
    several = [name for name in recipes if len(blocks_of(lines, name)) > 1]
    single = [name for name in recipes if len(blocks_of(lines, name)) == 1]
    changed = [[name.split("+")[0], name] for name in several if "+" in name]
    pairs = [*changed, ["hexagon-hmx-fp16", "hexagon-hmx-fp32"], several[:2]]
    oracle: list[str] = [name for name in ("ggml-cpu-decode",) if name in single]
    return next(pair for pair in pairs if set(pair) <= set(several)), (oracle or single[:1])
