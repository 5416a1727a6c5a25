"""Whole figures of a study: a grid of panels, shared axes, a key, a title; and their files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots.crossings import block_marker, block_name, passing_contexts
from plots.curves import (
    BESIDE,
    DOTTED,
    FLOOR,
    PREDICTION,
    block_colours,
    context_axis,
    error_axis,
    error_by_block,
    error_by_recipe,
    recipe_colours,
    short_name,
)
from plots.labels import size_in_points
from plots.rows import (
    RULE,
    blocks_of,
    crossings,
    featured,
    panels_of,
    read,
    summarise,
    with_panels,
)

WIDTH = 7.2  # inches: two columns of a paper
STYLE = Path(__file__).parent / "jaxattn.mplstyle"
LEFT = 0.1 / WIDTH
DASHED = (0, (3, 1.5))
NOTES = {"hexagon-hmx-fp16": " (before)", "hexagon-hmx-fp32": " (#25085)"}


def grid(
    count: int, *, label: float, key_rows: int = 1, left: float = 0.5, tall: float = 1.0
) -> tuple[Figure, list[Axes]]:
    """`count` panels, `label` inches of room right of each, `key_rows` lines below them all."""
    most = 4 if label < 0.8 and left < 1.8 else 2
    rows = -(-count // most)
    columns = -(-count // rows)
    panel = tall * (1.55 if columns > 2 else 2.0)
    top, below, between, apart = 0.62, 0.48 + 0.14 * key_rows, 0.42, label + 0.16
    height = top + below + rows * panel + (rows - 1) * between
    width = (WIDTH - left - label - 0.05 - (columns - 1) * apart) / columns
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False)
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - (label + 0.05) / WIDTH,
        top=1 - top / height,
        bottom=below / height,
        wspace=apart / width,
        hspace=between / panel,
    )
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def key_rows(handles: Sequence[Line2D]) -> int:
    """Rows that the key takes at the figure's width."""
    inches = sum(0.055 * len(str(handle.get_label())) + 0.5 for handle in handles)
    return -(-round(100 * inches) // round(100 * WIDTH))


def limits(lines: pd.DataFrame, floor: float) -> tuple[float, float]:
    """Whole decades around what is drawn, the tolerance always among them."""
    shown = lines["nmse"][np.isfinite(lines["nmse"]) & (lines["nmse"] > floor)]
    low, high = (shown.min(), shown.max()) if len(shown) else (1e-6, 1e-3)
    low, high = max(min(low, 1e-5), floor), min(max(high, 1e-2), 1e2)
    return float(10 ** np.floor(np.log10(low))), float(10 ** np.ceil(np.log10(2 * high)))


def fill(
    figure: Figure,
    axes: Sequence[Axes],
    panels: Sequence[str],
    lines: pd.DataFrame,
    draw: Callable[[Axes, str], object],
    span: tuple[float, float],
) -> None:
    """Axes, titles and curves of every panel."""
    contexts = sorted(lines["context"].unique())
    narrow = size_in_points(axes[0])[0] < 80
    for place, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        error_axis(ax, *span, label=place == 0)
        context_axis(ax, contexts, narrow=narrow)
        draw(ax, panel)
        ax.set_title(panel)
        if is_first(ax):
            ax.set_ylabel("NMSE")
        else:
            ax.set_yticklabels([])
    name_contexts(figure)


def mark(marker: str, colour: str, text: str, size: float = 3.5) -> Line2D:
    style = {"linestyle": "", "markeredgewidth": 1.1, "markersize": size}
    return Line2D([], [], color=colour, marker=marker, label=text, **style)  # type: ignore[arg-type]


def marks(lines: pd.DataFrame) -> list[Line2D]:
    """The key to the marks on curves and to what theory expects, as far as there are any."""
    stagnated = mark("|", "#333333", "l stagnates", 6.0)
    overflow = mark("x", "#333333", "overflow")
    theory = Line2D([], [], color="#333333", label="theory", **PREDICTION)
    shown = (
        (stagnated, lines["stagnated"].any()),
        (overflow, lines["overflow"].any()),
        (theory, lines["predicted"].notna().any()),
    )
    return [handle for handle, there in shown if there]


def name_contexts(figure: Figure) -> None:
    below = figure.subplotpars.bottom - 0.37 / figure.get_figheight()
    figure.supxlabel("context length (keys)", y=below, fontsize=7)


def finish(figure: Figure, title: str, below: str, handles: Sequence[Line2D]) -> Figure:
    """Title, a sentence on what is drawn, and the key below the panels."""
    height = figure.get_figheight()
    figure.text(LEFT, 1 - 0.17 / height, title, fontsize=8.5, weight="bold", va="center")
    figure.text(LEFT, 1 - 0.33 / height, below, fontsize=6.5, color="#444444", va="center")
    if handles:
        figure.legend(
            handles=list(handles),
            loc="lower center",
            ncols=-(-len(handles) // key_rows(handles)),
            bbox_to_anchor=(0.5, 0.02 / height),
            borderaxespad=0,
            columnspacing=1.4,
            handletextpad=0.5,
        )
    return figure


def by_block(
    lines: pd.DataFrame, panels: Sequence[str], recipes: Sequence[str], medians: str
) -> Figure | None:
    """The main figure: error against context, coloured by KV block, before and after."""
    pair, beside = featured(lines, recipes)
    if not pair:
        return None
    styles: dict[str, Any] = dict(zip(pair, ("-", DASHED), strict=False))
    shown = lines[lines["recipe"].isin([*pair, *beside])]
    key = [
        Line2D([], [], color="#555555", linestyle=style, label=name + NOTES.get(name, ""))
        for name, style in styles.items()
    ]
    key += [Line2D([], [], color=BESIDE, linestyle=DOTTED, label=name) for name in beside]
    key += marks(shown)
    figure, axes = grid(len(panels), label=0.3, key_rows=key_rows(key))

    def draw(ax: Axes, panel: str) -> None:
        error_by_block(ax, lines, panel, styles, beside)

    fill(figure, axes, panels, shown, draw, limits(shown, 1e-9))
    blocks = "colour: keys per KV block, rule: the block that the kernel itself chooses"
    return finish(
        figure,
        "Error of flash attention against context length, by KV block",
        f"{medians}; {blocks}",
        key,
    )


def by_recipe(
    lines: pd.DataFrame, panels: Sequence[str], recipes: Sequence[str], block: str, medians: str
) -> Figure:
    """Error against context of every recipe, at one block setting."""
    colours = recipe_colours(recipes)
    shown = lines[(lines["block"] == block) | (lines["block"] == RULE)]
    key = marks(shown)
    longest = max(len(short_name(recipe)) for recipe in recipes)
    label = 0.1 + 0.05 * longest
    figure, axes = grid(len(panels), label=label, key_rows=key_rows(key), left=0.54)

    def draw(ax: Axes, panel: str) -> None:
        error_by_recipe(ax, lines, panel, block, colours)

    fill(figure, axes, panels, shown, draw, limits(shown, FLOOR))
    if block == RULE:
        where, more = "at the KV block that each kernel chooses", ""
    else:
        where, more = f"at KV block {block}", "; kernels of one block size at theirs"
    title = f"Error of flash attention against context length, {where}"
    return finish(figure, title, medians + more, key)


def passing(lines: pd.DataFrame, panels: Sequence[str], recipes: Sequence[str]) -> Figure:
    """The context at which each recipe and block passes the tolerance."""
    found = crossings(lines)
    blocks = blocks_of(lines)
    colours = {block: block_colours(blocks)[block] for block in blocks}
    contexts = sorted(lines["context"].unique())
    never = max(contexts) * 2**0.75
    key = [
        mark(block_marker(blocks, block), colours[block], block_name(block))
        for block in blocks
        if len(blocks) > 1
    ]
    if any(len(blocks_of(lines, recipe)) == 1 for recipe in recipes):
        key.append(mark("d", "#000000", "kernels of one block size"))
    if lines["overflow"].any():
        key.append(mark("x", "#333333", "some row overflows"))
    longest = max(len(short_name(recipe)) for recipe in recipes)
    left, tall = 0.2 + 0.054 * longest, 0.25 + 0.105 * len(recipes)
    figure, axes = grid(len(panels), label=0.04, key_rows=key_rows(key), left=left, tall=tall)
    for ax, panel in zip(axes, panels, strict=True):
        context_axis(ax, contexts, narrow=size_in_points(ax)[0] < 80)
        ax.set_xlim(min(contexts), never)
        passing_contexts(ax, found, panel, recipes, colours, never)
        ax.set_title(panel)
        if not is_first(ax):
            ax.set_yticklabels([])
    name_contexts(figure)
    return finish(
        figure,
        "Context length from which the median NMSE exceeds 5e-4, llama.cpp's test tolerance",
        f"line: until it is within it again; hollow, right: not up to {max(contexts):,} keys",
        key,
    )


def is_first(ax: Axes) -> bool:
    place = ax.get_subplotspec()
    return place is not None and place.is_first_col()


def describe_medians(rows: pd.DataFrame) -> str:
    """What the lines and bands of `summarise` are, in words."""
    if rows["seed"].nunique() > 1:
        return "medians over seeds, heads and queries, band: range of the seeds' medians"
    if (rows["panel"] != rows["inputs"]).all():
        return f"{rows['inputs'].iloc[0]}: medians over queries, band: quartiles"
    return "medians over heads and queries, band: quartiles"


def figures_of(
    rows: pd.DataFrame,
    recipes: Sequence[str],
    kinds: dict[str, str],
    predicted: pd.DataFrame | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Every figure that the rows allow, with its file's name; the main one first."""
    rows = with_panels(rows, kinds)
    panels, medians = panels_of(rows, kinds), describe_medians(rows)
    lines = summarise(rows, predicted)
    ran = set(rows["recipe"].unique())
    present = [name for name in recipes if name in ran]
    main = by_block(lines, panels, present, medians)
    if main is not None:
        yield "error_by_block", main
    blocks = blocks_of(lines)
    for block in dict.fromkeys((blocks[0], blocks[-1])):
        yield f"error_by_recipe_{block}", by_recipe(lines, panels, present, block, medians)
    yield "passing", passing(lines, panels, present)


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    """The figures of the rows in `root`."""
    rows, manifest = read(root)
    yield from figures_of(rows, **manifest)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """PNG and SVG, whole or not at all; the same bytes for the same rows."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
        unfinished = path.with_name(f"_tmp-{path.name}")
        figure.savefig(unfinished, metadata=metadata)
        unfinished.replace(path)
    plt.close(figure)
    return paths
