"""Where curves pass the tolerance: a dot for each recipe and block, one panel for each input."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from plots.curves import short_name
from plots.rows import RULE

MARKERS = ("o", "s", "D", "v", "p")


def block_marker(blocks: Sequence[str], block: str) -> str:
    return "^" if block == RULE else MARKERS[blocks.index(block) % len(MARKERS)]


def passing_contexts(
    ax: Axes,
    found: pd.DataFrame,
    panel: str,
    recipes: Sequence[str],
    colours: Mapping[str, str],
    never: float,
) -> Axes:
    """A row for each recipe: a filled mark where it passes, and a line until it is within again; a
    hollow one at `never` if it does not pass; a cross where some row overflows.

    found: what rows.crossings returns. colours: by block setting, in the order drawn.
    """
    here = found[found["panel"] == panel]
    blocks = list(colours)
    step = 0.72 / max(1, len(blocks) - 1)
    for row, recipe in enumerate(recipes):
        if row % 2 == 0:
            ax.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        mine = here[here["recipe"] == recipe].set_index("block")
        single = len(mine) == 1
        for place, block in enumerate(blocks):
            if block not in mine.index:
                continue
            n, until, overflow = mine.loc[block, ["context", "until", "overflow"]]
            level = row if single else row - 0.36 + place * step
            colour = "#000000" if single else colours[block]
            passed = bool(np.isfinite(n))
            if passed:
                end = until if np.isfinite(until) else never
                ax.plot([n, end], [level, level], color=colour, linewidth=1.4, alpha=0.35)
            if np.isfinite(overflow):
                ax.plot(overflow, level, "x", color=colour, markersize=3.2, markeredgewidth=0.8)
            ax.plot(
                n if passed else never,
                level,
                "d" if single else block_marker(blocks, block),
                color=colour,
                markersize=3.2 if passed else 2.2,
                markerfacecolor=colour if passed else "white",
                markeredgewidth=0.7,
                clip_on=False,
                zorder=3,
            )
    ax.set_ylim(len(recipes) - 0.5, -0.5)
    ax.set_yticks(range(len(recipes)), [short_name(recipe) for recipe in recipes])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    return ax


def block_name(block: str) -> str:
    return "the kernel's own rule" if block == RULE else f"{block} keys per block"
