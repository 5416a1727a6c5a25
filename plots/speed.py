"""Speed: cost against context and against the number of recipes, and beside other ways."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from plots.figures import WIDTH, finish, mark
from plots.labels import End, label_ends
from plots.rows import manifest_of, rows_of

OURS, PEER, PLAIN, LIMIT = "#0072B2", "#7F7F7F", "#C9C9C9", "#000000"
LINES = {  # series, recipes -> label, colour
    ("ours", 256): ("256 recipes", "#009E73"),
    ("ours", 8): ("8 recipes", "#0072B2"),
    ("ours", 1): ("1 recipe", "#56B4E9"),
    ("reference", 0): ("float64 reference", "#D55E00"),
    ("limit", 0): ("the limit", LIMIT),
}
KEY = ((OURS, "jaxattn"), (PEER, "rounds inside, as asked"), (PLAIN, "rounds nothing inside"))
CURVES, ROW, TOP, BETWEEN, BELOW, APART, LABEL = 1.9, 0.15, 0.75, 0.8, 0.68, 0.42, 0.86  # inches
COLUMNS = ["item", "what", "status", "series", "queries", "keys", "recipes", "value", "seconds"]


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    rows = rows_of(root, manifest_of(root), COLUMNS)
    rows = rows[(rows["status"] != "not run") & (rows["series"] != "")]
    rows = rows.assign(recipes=rows["recipes"].fillna(0).astype(int))
    lengths, counts = rows[rows["item"] == "lengths"], rows[rows["item"] == "recipes"]
    ways = rows[rows["series"].isin(["peer", "plain"]) | (rows["item"].str.startswith("jaxattn"))]
    if lengths.empty and counts.empty and ways.empty:
        print(f"{root}: nothing that a figure shows was measured")
    else:
        yield "speed", costs(lengths, counts, ways)


def costs(lengths: pd.DataFrame, counts: pd.DataFrame, ways: pd.DataFrame) -> Figure:
    """Cost against the context and the number of recipes, and below them bars; what there is."""
    names = list(
        dict.fromkeys(ways.sort_values(["keys", "value"], ascending=[False, True])["what"])
    )
    shapes = ways[["queries", "keys"]].drop_duplicates().to_numpy().astype(int).tolist()
    upper = 0.0 if lengths.empty and counts.empty else CURVES + BETWEEN
    height = TOP + upper + ROW * len(names) + BELOW
    figure = plt.figure(figsize=(WIDTH, height))
    if not lengths.empty:
        against_context(_axes(figure, 0.56, TOP, (WIDTH - 1.14) / 2 - LABEL, CURVES), lengths)
    if not counts.empty:
        left = (WIDTH + 1.14) / 2
        against_recipes(_axes(figure, left, TOP, WIDTH - left - LABEL, CURVES), counts, ways)
    left = 0.2 + 0.054 * max(map(len, names), default=0)
    wide = (WIDTH - left - 0.1 - APART * (len(shapes) - 1)) / max(1, len(shapes))
    for place, (queries, keys) in enumerate(shapes):
        where = (left + place * (wide + APART), TOP + upper, wide, ROW * len(names))
        ax = _axes(figure, *where)
        one_way_each(ax, ways[(ways["queries"] == queries) & (ways["keys"] == keys)], names)
        ax.set_xlim(ways["value"].min() / 2.8, ways["value"].max() * 2.2)
        ax.set_title(f"one configuration, {queries:,} queries, {keys:,} keys")
        ax.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
    return finish(
        figure,
        "What error curves cost, and what else computes one",
        "limit: a bare float32 q·kᵀ, p·v of the same size; above with errors and float64 "
        "reference, others one recipe after the other",
        [mark("s", colour, text, 5.0) for colour, text in KEY] if names else [],
    )


def _axes(figure: Figure, left: float, top: float, wide: float, tall: float) -> Axes:
    """Axes of this place and size, in inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    place = (left / width, 1 - (top + tall) / height, wide / width, tall / height)
    return figure.add_axes(place)


def against_context(ax: Axes, rows: pd.DataFrame) -> Axes:
    """Seconds against keys, a line for each number of recipes, the reference and the limit."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ends: list[End] = []
    for (series, count), (label, colour) in LINES.items():
        line = rows[(rows["series"] == series) & (rows["recipes"] == count)].sort_values("keys")
        if line.empty:
            continue
        style = (0, (3, 1.5)) if series == "limit" else "-"
        ax.plot(line["keys"], line["seconds"], "o", color=colour, markersize=2.5, zorder=3)
        ax.plot(line["keys"], line["seconds"], color=colour, linestyle=style)
        ends.append((line["keys"].iloc[-1], line["seconds"].iloc[-1], label, colour))
    ax.xaxis.set_major_locator(FixedLocator(sorted(rows["keys"].unique())))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: keys_name(int(n))))
    ax.set_xlim(rows["keys"].min(), rows["keys"].max())
    _decades(ax, "seconds")
    ax.set_xlabel("context length (keys)")
    ax.set_title(f"error curves against the context, {int(rows['queries'].max())} queries")
    label_ends(ax, ends)
    return ax


def against_recipes(ax: Axes, rows: pd.DataFrame, ways: pd.DataFrame) -> Axes:
    """Limits against the number of recipes; others compute one after the other."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    rows = rows.sort_values("recipes")
    most, keys = rows["recipes"].iloc[-1], rows["keys"].iloc[0]
    peers = ways[(ways["series"] == "peer") & (ways["keys"] == keys)]
    ends: list[End] = []
    for name, limits in zip(peers["what"], peers["value"], strict=True):
        ax.plot([1, most], [limits, most * limits], color=PEER, linewidth=0.7, zorder=2)
        ends.append((most, most * limits, name, "#555555"))
    ax.plot(rows["recipes"], rows["value"], "o-", color=OURS, markersize=2.5, zorder=3)
    ends.append((most, rows["value"].iloc[-1], "jaxattn", OURS))
    ax.axhline(1, color=LIMIT, linewidth=0.8, linestyle=(0, (3, 1.5)))
    ends.append((most, 1, "the limit", LIMIT))
    ax.set_xlim(1, most)
    ax.xaxis.set_major_locator(FixedLocator(list(rows["recipes"])))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    _decades(ax, "limits")
    ax.set_xlabel("recipes")
    ax.set_title(f"against the number of recipes, {keys_name(int(keys))} keys")
    label_ends(ax, sorted(ends, key=lambda end: -end[1]))
    return ax


def one_way_each(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> Axes:
    """Bars from 1, the limit, to the time that each way takes, in limits."""
    colours = {"ours": OURS, "peer": PEER, "plain": PLAIN}
    ax.set_xscale("log")
    for what, value, series in zip(rows["what"], rows["value"], rows["series"], strict=True):
        place = names.index(what)
        ax.barh(place, value - 1, left=1, height=0.62, color=colours[series], zorder=2)
        ax.annotate(
            f"{value:.2f}" if value < 10 else f"{value:.0f}",
            (value, place),
            xytext=(2.5 if value >= 1 else -2.5, 0),
            textcoords="offset points",
            ha="left" if value >= 1 else "right",
            va="center_baseline",
            fontsize=6,
            color=OURS if series == "ours" else "#333333",
        )
    ax.axvline(1, color=LIMIT, linewidth=0.8, zorder=3)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(LogLocator(base=10))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("time in limits")
    return ax


def _decades(ax: Axes, label: str) -> None:
    """Decades around the lines that are drawn."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    low, high = np.floor(np.log10(drawn.min())), np.ceil(np.log10(drawn.max()))
    ax.set_ylim(10.0**low / 1.5, 10.0**high)
    ax.yaxis.set_major_locator(LogLocator(base=10))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.set_ylabel(label)


def keys_name(keys: int) -> str:
    """16384 -> 16k, 1048576 -> 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if keys % size == 0:
            return f"{keys // size}{letter}"
    return str(keys)
