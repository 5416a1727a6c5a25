"""The atlas: a small panel for every kernel, all on one scale."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from plots.curves import TOLERANCE, context_axis, draw_curve
from plots.figures import LEFT, WIDTH, finish, limits, marks, name_contexts
from plots.rows import RULE, panels_of, read, select, summarise, with_panels

COLUMNS = 8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
FLOOR = 1e-14
LINE = 17  # characters of a name that a panel is wide
PANEL, BETWEEN, TOP, BELOW = 0.62, 0.36, 0.72, 0.62  # inches


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    rows, manifest = read(root)
    ran = set(rows["recipe"].unique())
    names = [name for name in manifest["recipes"] if name in ran]
    yield "atlas", small_multiples(rows, **manifest | {"recipes": names})


def small_multiples(
    rows: pd.DataFrame,
    recipes: Sequence[str],
    kinds: dict[str, str],
    predicted: pd.DataFrame | None = None,
) -> Figure:
    """A panel for each recipe, in their order; a line for each of the inputs."""
    rows = with_panels(rows, kinds)
    lines, inputs = summarise(rows, predicted), panels_of(rows, kinds)
    colours = dict(zip(inputs, COLOURS, strict=False))
    count = -(-len(recipes) // COLUMNS)
    height = TOP + BELOW + count * PANEL + (count - 1) * BETWEEN
    figure, axes = plt.subplots(count, COLUMNS, figsize=(WIDTH, height), squeeze=False)
    figure.subplots_adjust(
        left=0.36 / WIDTH,
        right=1 - 0.08 / WIDTH,
        top=1 - TOP / height,
        bottom=BELOW / height,
        wspace=0.12,
        hspace=BETWEEN / PANEL,
    )
    low, high = limits(lines, FLOOR)
    contexts = sorted(lines["context"].unique())
    last = len(recipes) - COLUMNS  # from here on nothing stands below a panel
    for place, ax in enumerate(axes.flat):
        if place >= len(recipes):
            ax.remove()
            continue
        _scale(ax, low, high, contexts, outer=(place % COLUMNS == 0, place >= last))
        for name, colour in colours.items():
            draw_curve(ax, select(lines, name, recipes[place], RULE), colour)
        ax.set_title(wrapped(recipes[place]), fontsize=4.9, pad=1.5, linespacing=0.95)
    key = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    dashes = {"color": "#333333", "linewidth": 0.6, "linestyle": (0, (4, 2))}
    key.append(Line2D([], [], label="llama.cpp's test tolerance", **dashes))  # type: ignore[arg-type]
    name_contexts(figure)
    figure.text(LEFT, 1 - 0.5 / height, "NMSE", fontsize=6.5, va="center")
    return finish(
        figure,
        "Error against context length of every kernel, on one scale",
        "medians over heads and queries, band: quartiles; each kernel at its own KV block",
        [*key, *marks(lines)],
    )


def _scale(
    ax: Axes, low: float, high: float, contexts: Sequence[int], outer: tuple[bool, bool]
) -> None:
    """The common axes, with numbers at the left and below alone."""
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(FixedLocator([10.0**e for e in (-12, -8, -4, 0)]))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.axhline(TOLERANCE, color="#333333", linewidth=0.5, linestyle=(0, (4, 2)), zorder=2)
    context_axis(ax, contexts)
    # None at the ends, where the numbers of neighbours would touch.
    inside = [n for n in (2**10, 2**14, 2**18) if contexts[0] < n < contexts[-1]]
    ax.xaxis.set_major_locator(FixedLocator(inside))
    ax.tick_params(labelsize=5, length=1.5, pad=1.2)
    left, below = outer
    if not left:
        ax.set_yticklabels([])
    if not below:
        ax.set_xticklabels([])


def wrapped(name: str) -> str:
    """The name in lines of LINE characters or fewer, broken at its hyphens."""
    lines = [""]
    for part in name.split("-"):
        joined = f"{lines[-1]}-{part}" if lines[-1] else part
        if lines[-1] and len(joined) > LINE:
            lines[-1] += "-"
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)
