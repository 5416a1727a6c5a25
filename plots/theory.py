"""Theory: predicted curves (lines) through measured ones (points), and how well they agree."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

from plots.curves import context_axis
from plots.figures import WIDTH, finish, mark
from plots.labels import label_ends
from plots.rows import manifest_of, rows_of

COLUMNS = ["inputs", "recipe", "site", "format", "kv_block", "context", "quantity", "regime"]
COLUMNS += ["predicted", "measured", "low", "high", "ratio", "stagnated", "overflow", "status"]
NOTHING = "nothing there"  # as sweeps.theory has it
TOGETHER = "hexagon-hmx-fp16"

# title -> (inputs, quantity, label -> (site, format, KV block))
Curves = dict[str, tuple[str, str, int]]
PANELS: dict[str, tuple[str, str, Curves]] = {
    "l alone, every key alike": (
        "equal-blocks",
        "bias_l",
        {
            "bf16, c = 64": ("running_sum", "bfloat16", 64),
            "e5m8, c = 57": ("running_sum", "e5m8", 57),
            "fp16, c = 40": ("running_sum", "float16", 40),
            "fp16, c = 57": ("running_sum", "float16", 57),
        },
    ),
    "each place alone, float16, gaussian": (
        "gaussian-1",
        "rel_l2",
        {
            "o": ("output", "float16", 64),
            "l": ("running_sum", "float16", 64),
            "s": ("scores", "float16", 64),
            "p": ("probs", "float16", 64),
            "1/l": ("inverse", "float16", 64),
        },
    ),
    "HMX kernel in three formats, gaussian": (
        "gaussian-1",
        "rel_l2",
        {
            "bfloat16": (TOGETHER, "bfloat16", 64),
            "e5m8": (TOGETHER, "e5m8", 64),
            "float16": (TOGETHER, "float16", 64),
        },
    ),
    "HMX kernel, V of mean 1, by KV block": (
        "biased_v",
        "rel_l2",
        {
            "64": (TOGETHER, "float16", 64),
            "128": (TOGETHER, "float16", 128),
            "512": (TOGETHER, "float16", 512),
        },
    ),
}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000")  # where all have one format
SITE_NAMES = {
    "running_sum": "l",
    "output": "o",
    "split output": "o of\n8 chunks",
    "probs": "p",
    "scores": "s",
    "inverse": "1/l",
    TOGETHER: "all of\nHMX's",
}
FORMATS = {"float16": "#D55E00", "bfloat16": "#0072B2", "e5m8": "#009E73"}
WIDEST = 2.0  # ratio drawn for more
HEIGHT, TOP, BELOW, BETWEEN, RATIOS = 1.72, 0.62, 1.05, 0.62, 1.45  # inches
LOWEST, WIDE = 1e-6, 3e3  # least error drawn; and the largest over the least, in a panel


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    rows = rows_of(root, manifest_of(root), COLUMNS)
    yield "theory", agreement(rows)


def agreement(rows: pd.DataFrame) -> Figure:
    """Curves of PANELS that were computed, and below them all ratios of predicted to measured."""
    present = set(rows["inputs"])
    panels = [title for title, (inputs, _, _) in PANELS.items() if inputs in present]
    lines = -(-len(panels) // 2)
    height = TOP + BELOW + lines * (HEIGHT + BETWEEN) + RATIOS
    figure = plt.figure(figsize=(WIDTH, height))
    left, label, apart = 0.5, 0.62, 0.1
    width = (WIDTH - left - 2 * label - left - apart) / 2
    for place, title in enumerate(panels):
        row, column = divmod(place, 2)
        box = (
            (left + column * (width + label + left + apart)) / WIDTH,
            1 - (TOP + (row + 1) * HEIGHT + row * BETWEEN) / height,
            width / WIDTH,
            HEIGHT / height,
        )
        ax = figure.add_axes(box)
        inputs, quantity, wanted = PANELS[title]
        curves(ax, rows[rows["inputs"] == inputs], quantity, wanted)
        ax.set_title(title)
        ax.set_ylabel("relative error of l" if quantity == "bias_l" else "relative L2 error")
    below = figure.add_axes(
        (left / WIDTH, BELOW / height, 1 - (left + 0.1) / WIDTH, RATIOS / height)
    )
    ratios(below, rows)
    key = [
        Line2D([], [], color="#555555", linewidth=0.8, label="predicted"),
        mark("o", "#555555", "measured, median over rows", 2.6),
        mark("|", "#333333", "l stagnates", 6.0),
        mark("x", "#333333", "overflow"),
        *(mark("s", colour, name, 3.0) for name, colour in FORMATS.items()),
    ]
    return finish(
        figure,
        "Predicted and measured errors of flash attention",
        "lines know the recipe and moments of the first 4,096 keys; points are whole runs",
        key,
    )


def curves(ax: Axes, rows: pd.DataFrame, quantity: str, wanted: Curves) -> Axes:
    """A line of predictions and points of measurements for each of `wanted`."""
    rows = rows[rows["quantity"] == quantity]
    ax.set_yscale("log")
    ends = []
    drawn = []
    several = len({format for _, format, _ in wanted.values()}) > 1
    spare = list(FORMATS.values()) if several else []
    for (name, (site, format, block)), colour in zip(wanted.items(), COLOURS, strict=False):
        colour = FORMATS[format] if FORMATS[format] in spare else colour
        spare = [x for x in spare if x != colour]
        mine = rows[(rows.site == site) & (rows.format == format) & (rows.kv_block == block)]
        mine = mine.sort_values("context")
        if mine.empty:
            continue
        x, predicted = mine["context"].to_numpy(), mine["predicted"].to_numpy()
        measured = mine["measured"].to_numpy()
        seen = np.isfinite(predicted) & (predicted > LOWEST)
        ax.plot(x, np.where(seen, predicted, np.nan), color=colour, linewidth=0.8, zorder=3)
        there = np.isfinite(measured) & (measured > LOWEST)
        size = 2.6 if len(x) < 40 else 1.5
        ax.plot(x[there], measured[there], "o", color=colour, markersize=size, markeredgewidth=0)
        drawn.append(measured[there])
        if seen.any():
            last = np.flatnonzero(seen)[-1]
            ends.append((float(x[last]), float(predicted[last]), name, colour))
        for flag, marker, large in (("stagnated", "|", 7.0), ("overflow", "x", 3.5)):
            first = mine[mine[flag]].iloc[:1]
            if len(first):
                level = first["measured"].to_numpy()
                last_level = measured[there][-1] if there.any() else LOWEST
                level = np.where(np.isfinite(level) & (level > LOWEST), level, last_level)
                ax.plot(
                    first["context"],
                    level,
                    marker,
                    color=colour,
                    markersize=large,
                    markeredgewidth=1.1,
                    zorder=5,
                    clip_on=False,
                )
    values = np.concatenate(drawn) if drawn else np.array([1e-4, 1e-2])
    low, high = max(values.min(), values.max() / WIDE), values.max()
    ax.set_ylim(10 ** (np.floor(2 * np.log10(low)) / 2 - 0.1), 10 ** (np.log10(high) + 0.2))
    ax.yaxis.set_major_locator(LogLocator(base=10, numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
    context_axis(ax, sorted(rows["context"].unique()))
    ax.set_xlabel("context length (keys)")
    label_ends(ax, ends)
    return ax


def ratios(ax: Axes, rows: pd.DataFrame) -> Axes:
    """Predicted over measured, a dot for each point, a column for each site by its inputs."""
    rows = rows[(rows["status"] != NOTHING) & np.isfinite(rows["ratio"])]
    sites = [site for site in SITE_NAMES if site in set(rows["site"])]
    names = list(dict.fromkeys(rows["inputs"]))
    ax.set_yscale("log")
    ax.axhspan(0.75, 1.25, color="#009E73", alpha=0.08, linewidth=0)
    ax.axhspan(0.95, 1.05, color="#009E73", alpha=0.12, linewidth=0)
    ax.axhline(1, color="#333333", linewidth=0.6, zorder=2)
    place = 0.0
    ticks: list[float] = []
    texts: list[str] = []
    for site in sites:
        mine = [name for name in names if ((rows.site == site) & (rows.inputs == name)).any()]
        for name in mine:
            some = rows[(rows.site == site) & (rows.inputs == name)]
            for shift, (format, colour) in zip((-0.25, 0, 0.25), FORMATS.items(), strict=True):
                dots = some[some.format == format]
                wide = spread_of(len(dots))
                ax.plot(
                    place + shift + wide,
                    dots["ratio"].clip(1 / WIDEST, WIDEST),
                    "o",
                    color=colour,
                    markersize=1.6,
                    markeredgewidth=0,
                    alpha=0.55,
                    clip_on=False,
                )
            ticks.append(place)
            texts.append(name)
            place += 1
        middle = place - (len(mine) + 1) / 2
        ax.text(middle, WIDEST * 1.04, SITE_NAMES[site].replace("\n", " "), ha="center", fontsize=7)
        ax.axvline(place - 0.25, color="#CCCCCC", linewidth=0.6)
        place += 0.5
    ax.set_xlim(-0.75, place - 0.75)
    ax.set_ylim(1 / WIDEST, WIDEST)
    levels = [0.5, 0.75, 1, 1.25, 2]
    ax.yaxis.set_major_locator(FixedLocator(levels))
    ax.yaxis.set_major_formatter(FixedFormatter([f"{x:g}" for x in levels]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, texts, rotation=90, fontsize=5.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False, axis="x")
    ax.set_ylabel("predicted / measured")
    return ax


def spread_of(count: int) -> np.ndarray:
    """Places side by side, so that dots do not hide each other."""
    return 0.09 * np.sin(2.4 * np.arange(count))
