"""Fidelity: how far each recipe's error vector is from the real kernel's, one row a kernel."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from plots.figures import WIDTH, finish, mark
from plots.rows import manifest_of, rows_of

LEAST_CORRELATION, MOST_RATIO = 0.999, 1.5  # as sweeps.fidelity judges
NEAREST = 1e-8  # 1 - correlation drawn for less
MOST_DRAWN = 1e3  # ratio drawn for more, and where one of the two errors is none or no number
INPUTS = {"gaussian": "#0072B2", "biased_v": "#D55E00", "minilm": "#009E73"}
CONTROL = "#8A8A8A"
ROW, BETWEEN, TOP, BELOW = 0.125, 0.62, 0.62, 0.62  # inches
COLUMNS = ["peer", "expect", "status", "inputs", "correlation", "control", "rms_ratio"]


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    rows = rows_of(root, manifest_of(root), COLUMNS)
    rows = rows[rows["status"] == "run"]
    if rows.empty:
        print(f"{root}: no real kernel ran, so there is no figure to draw")
    else:
        yield "fidelity", agreement(rows)


def agreement(rows: pd.DataFrame) -> Figure:
    """1 - correlation of error vectors, and below it RMS ratios where the error is noise."""
    parts = [rows[rows["expect"] == expect] for expect in ("vector", "noise")]
    parts = [part for part in parts if not part.empty]
    names = [list(dict.fromkeys(part["peer"])) for part in parts]
    tall = [ROW * len(each) for each in names]
    height = TOP + BELOW + sum(tall) + BETWEEN * (len(parts) - 1)
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(WIDTH, height), height_ratios=tall, squeeze=False
    )
    left = 0.2 + 0.054 * max(len(name) for each in names for name in each)
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - 0.15 / WIDTH,
        top=1 - TOP / height,
        bottom=BELOW / height,
        hspace=BETWEEN / (sum(tall) / len(tall)),
    )
    for ax, part, each in zip(axes.flat, parts, names, strict=True):
        draw = correlations if part["expect"].iloc[0] == "vector" else ratios
        draw(ax, part, each)
        _rows(ax, each)
    key = [mark("o", colour, name) for name, colour in INPUTS.items() if name in set(rows.inputs)]
    key.append(mark("|", CONTROL, "a recipe that rounds nothing inside", 5.0))
    return finish(
        figure,
        "Real kernels beside their recipes, executed on this machine",
        "a dot for each input and context; the shaded side is where they agree",
        key,
    )


def correlations(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> Axes:
    """1 - correlation of the kernel's error vector with its recipe's, and with the control's."""
    ax.set_xscale("log")
    ax.set_xlim(NEAREST / 1.5, 2)
    ax.axvspan(NEAREST / 1.5, 1 - LEAST_CORRELATION, color="#009E73", alpha=0.08, linewidth=0)
    places = rows["peer"].map({name: i for i, name in enumerate(names)})
    far = (1 - rows["control"]).clip(lower=NEAREST)
    ax.plot(far, places, "|", color=CONTROL, markersize=5, markeredgewidth=0.8)
    _dots(ax, rows, (1 - rows["correlation"]).clip(lower=NEAREST), places)
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=20))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - x:.9g}" if x < 1 else "0"))
    ax.set_xlabel("correlation of the error vectors (1 at the left: they are the same)")
    return ax


def ratios(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> Axes:
    """RMS error of the kernel over its recipe's."""
    ax.set_xscale("log")
    ax.axvspan(1 / MOST_RATIO, MOST_RATIO, color="#009E73", alpha=0.08, linewidth=0)
    places = rows["peer"].map({name: i for i, name in enumerate(names)})
    found = rows["rms_ratio"].fillna(MOST_DRAWN).clip(1 / MOST_DRAWN, MOST_DRAWN)
    _dots(ax, rows, found, places)
    widest = max(2.2, 1.1 * float(np.exp(np.abs(np.log(found)).max())))
    ax.set_xlim(1 / widest, widest)
    ticks = [x for x in (0.25, 1 / 3, 0.5, 1 / 1.5, 1, 1.5, 2, 3, 4) if 1 / widest <= x <= widest]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{x:.2g}" for x in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("RMS error of the kernel over its recipe's, where it is float32 noise")
    return ax


def _dots(ax: Axes, rows: pd.DataFrame, x: pd.Series, places: pd.Series) -> None:
    for name, colour in INPUTS.items():
        chosen = rows["inputs"] == name
        ax.plot(
            x[chosen],
            places[chosen],
            "o",
            color=colour,
            markersize=3.2,
            markeredgewidth=0,
            alpha=0.8,
            zorder=3,
            clip_on=False,
        )


def _rows(ax: Axes, names: Sequence[str]) -> None:
    for row in range(0, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.035, linewidth=0, zorder=0)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
