"""Panels of error against context: rows in, lines on an Axes out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from plots.labels import End, label_ends
from plots.rows import RULE, TOLERANCE, blocks_of, select

FLOOR = 1e-15  # NMSE drawn for less, zero included: float32 results cannot show it
BLOCK_COLOURS = ("#D55E00", "#E69F00", "#56B4E9", "#009E73")
RULE_COLOUR = "#0072B2"
BESIDE = "#000000"
LONGEST_NAME = 40
DOTTED = (0, (1, 0.9))
PREDICTION: dict[str, Any] = {"linewidth": 0.6, "linestyle": (0, (4, 1.2, 1, 1.2))}

COLOURS = {
    "hexagon-hmx-fp16": "#D55E00",
    "hexagon-hmx-fp16-qf16": "#E69F00",
    "hexagon-hmx-fp16-qf16-spill": "#CC79A7",
    "hexagon-hmx-exp2hf": "#B8A800",
    "hexagon-pr24389": "#0072B2",
    "hexagon-hmx-fp32": "#009E73",
    "hexagon-hvx": "#56B4E9",
    "metal": "#999999",
    "ggml-cpu-decode": "#000000",
    "float32": "#555555",
}
SPARE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")


def recipe_colours(recipes: Sequence[str]) -> dict[str, str]:
    """A colour for each recipe: a fixed one where it is known, else one not taken yet."""
    colours = {name: COLOURS[name] for name in recipes if name in COLOURS}
    spare = [colour for colour in SPARE if colour not in colours.values()] + list(SPARE)
    unknown = [name for name in recipes if name not in colours]
    return colours | {name: spare[i % len(spare)] for i, name in enumerate(unknown)}


def short_name(recipe: str) -> str:
    """The recipe's name without its project: `hmx-fp16`, `cpu-decode`; cut if very long."""
    name = recipe.removeprefix("hexagon-").removeprefix("ggml-")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def block_colours(blocks: Sequence[str]) -> dict[str, str]:
    """Warm for small blocks, cool for large ones, blue for the kernel's own rule."""
    fixed = [block for block in blocks if block != RULE]
    step = max(1, len(BLOCK_COLOURS) // max(1, len(fixed))) if len(fixed) < 3 else 1
    colours = {b: BLOCK_COLOURS[i * step % len(BLOCK_COLOURS)] for i, b in enumerate(fixed)}
    return colours | {RULE: RULE_COLOUR}


def draw_curve(
    ax: Axes, curve: pd.DataFrame, colour: str, style: Any = "-"
) -> tuple[float, float] | None:
    """One line with its band, its overflow (x) and stagnation (|) marks; returns its end.

    Thin, with small marks: what theory expects of it.
    """
    drawn = curve[np.isfinite(curve["nmse"])]
    x, y = drawn["context"], drawn["nmse"].clip(lower=FLOOR)
    low, high = drawn["low"].clip(lower=FLOOR), drawn["high"].clip(FLOOR, 1e30)
    ax.plot(x, y, color=colour, linestyle=style, zorder=3)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    expected = curve[np.isfinite(curve["predicted"])]
    if len(expected):
        level = expected["predicted"].clip(lower=FLOOR)
        ax.plot(expected["context"], level, color=colour, zorder=2.9, **PREDICTION)
    _mark(ax, curve, "nmse", "", colour, 1.0)
    _mark(ax, curve, "predicted", "predicted_", colour, 0.6)
    return (float(x.iloc[-1]), float(y.iloc[-1])) if len(drawn) else None


def _mark(ax: Axes, curve: pd.DataFrame, level: str, of: str, colour: str, size: float) -> None:
    for flag, marker, points in (("stagnated", "|", 6.0), ("overflow", "x", 3.5)):
        first = curve[curve[of + flag] == 1].iloc[:1]
        if not first.empty:
            ax.plot(
                first["context"],
                first[level].clip(FLOOR, ax.get_ylim()[1]),
                marker,
                color=colour,
                markersize=size * points,
                markeredgewidth=size * 1.1,
                zorder=4,
                clip_on=False,
            )


def error_by_block(
    ax: Axes, lines: pd.DataFrame, panel: str, styles: Mapping[str, Any], beside: Sequence[str]
) -> Axes:
    """Recipes of `styles` (their line styles) at every block, by colour; `beside` in black."""
    colours = block_colours(blocks_of(lines))
    ends: list[End] = []
    for recipe, style in styles.items():
        for block in blocks_of(lines, recipe):
            end = draw_curve(ax, select(lines, panel, recipe, block), colours[block], style)
            if end and not any(block == text and near(end[1], y) for _, y, text, _ in ends):
                ends.append((*end, block, colours[block]))
    for recipe in beside:
        end = draw_curve(ax, select(lines, panel, recipe, RULE), BESIDE, DOTTED)
        if end:
            ends.append((*end, short_name(recipe).split("-")[0], BESIDE))
    label_ends(ax, ends)
    return ax


def near(one: float, other: float) -> bool:
    """Within a factor of five: one label does for both lines."""
    return abs(np.log(one / other)) < np.log(5)


def error_by_recipe(
    ax: Axes, lines: pd.DataFrame, panel: str, block: str, colours: Mapping[str, str]
) -> Axes:
    """Every recipe at one block setting; those without it at their own."""
    ends = []
    for recipe, colour in reversed(list(colours.items())):
        at = block if block in blocks_of(lines, recipe) else RULE
        end = draw_curve(ax, select(lines, panel, recipe, at), colour)
        if end:
            ends.append((*end, short_name(recipe), colour))
    label_ends(ax, ends)
    return ax


def context_axis(ax: Axes, contexts: Sequence[int], *, narrow: bool = False) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(contexts), max(max(contexts), min(contexts) + 1))
    wide = max(contexts) >= 16**2 * min(contexts)  # room for three names at steps of 16
    ax.xaxis.set_major_locator(LogLocator(base=16 if narrow and wide else 4, numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: context_name(n)))
    ax.xaxis.set_minor_locator(NullLocator())


def context_name(n: float) -> str:
    """256, 1k = 1,024, 64k, 1M: binary, as model cards have it."""
    for unit, word in ((2**20, "M"), (2**10, "k")):
        if n >= unit:
            return f"{n / unit:g}{word}"
    return f"{n:g}"


def error_axis(ax: Axes, low: float, high: float, *, label: bool) -> None:
    """A log axis with the tolerance as a line across, named once."""
    error_scale(ax, low, high)
    ax.axhline(TOLERANCE, color="#333333", linewidth=0.7, linestyle=(0, (4, 2)), zorder=2)
    if label:
        ax.annotate(
            "llama.cpp\ntest tolerance",
            (0.03, TOLERANCE),
            (0, 2.5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=5.8,
            linespacing=1.05,
            color="#333333",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3},
        )


def error_scale(ax: Axes, low: float, high: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    decades = round(np.log10(high / low))
    ax.yaxis.set_major_locator(LogLocator(base=10 ** (1 + (decades > 5)), numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
