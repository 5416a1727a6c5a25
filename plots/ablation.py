"""The ablation study: which site owes how much of the error, and which pairs only together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from plots.crossings import block_name
from plots.curves import DOTTED, FLOOR, context_axis, context_name, error_axis
from plots.figures import DASHED, WIDTH, finish, is_first, mark, name_contexts
from plots.labels import size_in_points
from plots.rows import manifest_of, rows_of

COLUMNS = ["recipe", "inputs", "head", "block", "context", "subset"]
COLUMNS += ["nmse", "overflow", "owed_nmse"]
COLOURS = {
    "running_sum": "#D55E00",
    "output": "#0072B2",
    "scores": "#009E73",
    "difference": "#56B4E9",
    "probs": "#E69F00",
    "row_sum": "#CC79A7",
    "rescale": "#B8A800",
    "inverse": "#882255",
}
SPARE = ("#009E73", "#56B4E9", "#E69F00", "#CC79A7", "#B8A800", "#882255", "#D55E00", "#0072B2")
OTHERS, LEFT_OVER = "#999999", "#DDDDDD"
LETTERS = {"running_max": "m", "running_sum": "l", "rescale": "a", "output": "o", "inverse": "1/l"}
LEAST = 0.05  # share of the error anywhere, for a colour of its own
MOST = 2.0  # share drawn for more; below zero half of it
NAMED = 0.3  # share from which on an area bears its name
WIDE = 5  # panels side by side
CHOSEN = (4096, 32768, 131072)


class Panel(NamedTuple):
    """nmse, overflow, owed: [context, subset], as stored."""

    name: str
    nmse: pd.DataFrame
    overflow: pd.DataFrame
    owed: pd.DataFrame


def read_and_draw(root: Path) -> Iterator[tuple[str, Figure]]:
    manifest = manifest_of(root)
    rows, sites = rows_of(root, manifest, COLUMNS), list(manifest["sites"])
    for block in sorted(rows["block"].unique(), key=lambda b: (not b.isdigit(), b)):
        panels = panels_of(rows[rows["block"] == block])
        size = block_name(block) if block.isdigit() else "its own KV blocks"
        where = f"{rows['recipe'].iloc[0]}, {size}"
        if (rows["head"] >= 0).all():
            where += f", on {rows['inputs'].iloc[0]}"
        for start in range(0, len(panels), WIDE):
            some, more = panels[start : start + WIDE], f"_{start // WIDE + 1}" * bool(start)
            yield f"owed_{block}{more}", owed(some, sites, where)
            if len(sites) > 1:
                yield f"together_{block}{more}", together(some, sites, where)


def panels_of(rows: pd.DataFrame) -> list[Panel]:
    """A panel for each input, or for each head of a capture."""
    panels = []
    for (source, head), part in rows.groupby(["inputs", "head"], sort=False):
        columns = ("nmse", "overflow", "owed_nmse")
        a, b, c = (part.pivot(index="context", columns="subset", values=x) for x in columns)
        panels.append(Panel(source if head < 0 else f"head {head}", a, b, c))
    return panels


def owed(panels: Sequence[Panel], sites: Sequence[str], where: str) -> Figure:
    """Above: NMSE as it is and with sites lifted. Below: the share of it that each site owes."""
    shares = [_shares(panel, sites) for panel in panels]
    largest = pd.concat([part.abs().max() for part in shares], axis=1).max(axis=1)
    ranked = list(largest.sort_values(ascending=False).index)
    main, shown = ranked[:2], [site for site in ranked if largest[site] >= LEAST]
    colours = _colours(shown or main[:1])
    figure, axes = _grid(2, len(panels), heights=(1.15, 1.3), left=0.56)
    lifted = 2 ** len(sites) - 1
    span = _decades(
        min(panel.nmse[[0, lifted]].min().min() for panel in panels),
        max(panel.nmse[0].max() for panel in panels),
    )
    lowest = min(part.clip(upper=0).sum(axis=1).min() for part in shares)
    highest = max(part.clip(lower=0).sum(axis=1).max() for part in shares)
    limits = max(-MOST / 2, 0.25 * np.floor(4 * lowest + 0.5)), min(MOST, max(1.1, highest))
    contexts = sorted({n for panel in panels for n in panel.nmse.index})
    for column, (panel, share) in enumerate(zip(panels, shares, strict=True)):
        above, below = axes[:, column]
        error_axis(above, *span, label=column == 0)
        errors(above, panel, sites, main, colours)
        above.set_title(panel.name)
        stack(below, share, colours, limits)
        for ax, label in ((above, "NMSE"), (below, "share owed")):
            context_axis(ax, contexts, narrow=True)
            if is_first(ax):
                ax.set_ylabel(label)
                ax.yaxis.set_label_coords(-0.42 * 72 / size_in_points(ax)[0], 0.5)
            else:
                ax.set_yticklabels([])
        above.set_xticklabels([])
    name_contexts(figure)
    key: list[Any] = [Patch(color=colour, label=_name(site)) for site, colour in colours.items()]
    if len(shown) < len(sites):
        key.append(Patch(color=OTHERS, label="other sites"))
    key.append(Patch(color=LEFT_OVER, label="left over"))
    key.append(Line2D([], [], color="#000000", label="as it is"))
    grey = {"color": "#555555", "linewidth": 1.0}
    if len(main) > 1:
        pair = " and ".join(LETTERS.get(site, site) for site in sorted(main, key=sites.index))
        key.append(Line2D([], [], linestyle=DASHED, label=f"{pair} lifted", **grey))  # type: ignore[arg-type]
    key.append(Line2D([], [], linestyle=DOTTED, label="all lifted", **grey))  # type: ignore[arg-type]
    if any((panel.overflow[0] > 0).any() for panel in panels):
        key.append(mark("x", "#000000", "overflow"))
    cut = f"; cut at {100 * MOST:.0f} %" if highest > MOST else ""
    return finish(
        figure,
        f"Who owes the error: {where}",
        "above, in colour: that site alone lifted to float32. Below: Shapley values, less than "
        f"zero where lifting costs more than it saves{cut}",
        key,
    )


def errors(
    ax: Axes, panel: Panel, sites: Sequence[str], main: Sequence[str], colours: dict[str, str]
) -> Axes:
    """NMSE as it is, with each of the `main` sites lifted alone, with both, and with all."""
    bits = {site: 1 << sites.index(site) for site in main}
    drawn: list[tuple[int, str, Any, float]] = [(0, "#000000", "-", 1.3)]
    drawn += [(bit, colours.get(site, OTHERS), "-", 1.0) for site, bit in bits.items()]
    drawn += [(sum(bits.values()), "#555555", DASHED, 1.0)] * (len(bits) > 1)
    drawn += [(2 ** len(sites) - 1, "#555555", DOTTED, 1.0)]
    for order, (subset, colour, style, width) in enumerate(drawn):
        curve = panel.nmse[subset].clip(lower=FLOOR)
        ax.plot(
            curve.index, curve, color=colour, linestyle=style, linewidth=width, zorder=9 - order
        )
        lost = curve[panel.overflow[subset] > 0].iloc[:1]
        if len(lost) and subset in (0, *bits.values()):
            cross = {"markersize": 3.5, "markeredgewidth": 1.1, "clip_on": False, "zorder": 9.5}
            ax.plot(lost.index, lost, "x", color=colour, **cross)  # type: ignore[arg-type]
    return ax


def stack(
    ax: Axes, shares: pd.DataFrame, colours: dict[str, str], limits: tuple[float, float]
) -> Axes:
    """Signed areas: what sites owe stacks up from 0, what lifting them would add hangs below."""
    drawn = {site: shares[site].to_numpy() for site in colours}
    drawn[OTHERS] = shares.drop(columns=list(colours)).sum(axis=1).to_numpy()
    drawn[LEFT_OVER] = 1 - shares.sum(axis=1).to_numpy()
    x = shares.index.to_numpy(float)
    ax.set_ylim(*limits)
    for sign in (1, -1):
        level = np.zeros(len(x))
        for site, share in drawn.items():
            height = np.clip(sign * share, 0, None)
            other, colour = level + sign * height, colours.get(site, site)
            ax.fill_between(x, level, other, color=colour, linewidth=0, alpha=0.9)
            seen = np.abs(np.clip(other, *limits) - np.clip(level, *limits))
            name = LETTERS.get(site, site)
            at = _thickest(seen, 2 + len(seen) // 6 * (len(name) > 3))
            if site in colours and at is not None:
                middle = (np.clip(level[at], *limits) + np.clip(other[at], *limits)) / 2
                words: dict[str, Any] = {"color": "white", "fontsize": 6.5, "weight": "bold"}
                words["style"] = "italic" if name != site else "normal"
                ax.text(x[at], middle, name, ha="center", va="center_baseline", **words)
            level = other
    ax.axhline(0, color="#000000", linewidth=0.7)
    ax.yaxis.set_major_locator(MultipleLocator(0.5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %".replace("-", "−")))
    return ax


def _thickest(heights: np.ndarray, margin: int) -> int | None:
    """Where an area is thick enough for its name, and so are two places either side of it."""
    places = range(max(2, margin), len(heights) - max(2, margin))
    least = {at: float(heights[at - 2 : at + 3].min()) for at in places}
    at = max(least, key=lambda at: least[at], default=None)
    return at if at is not None and least[at] >= NAMED else None


def together(panels: Sequence[Panel], sites: Sequence[str], where: str) -> Figure:
    """Heat maps of pairs: what lifting both removes beyond each, as a share of the error."""
    contexts = sorted({n for panel in panels for n in panel.nmse.index})
    chosen = sorted({n for n in contexts if n in CHOSEN} | {contexts[-1]})
    left, right = 0.92, 0.75
    side = min(1.2, (WIDTH - left - right) / len(panels) - 0.1)
    right = WIDTH - left - len(panels) * side - (len(panels) - 1) * 0.1 - 0.08
    heights = [side] * len(chosen)
    figure, axes = _grid(len(chosen), len(panels), heights, left=left, right=right, below=0.72)
    norm = SymLogNorm(0.1, linscale=0.5, vmin=-10, vmax=10)
    names = [_name(site) for site in sites]
    for row, n in enumerate(chosen):
        for column, panel in enumerate(panels):
            ax = axes[row, column]
            image = pairs(ax, panel, sites, n, norm)
            ax.tick_params(length=0, labelsize=5.5)
            ax.set_yticks(range(len(sites) - 1), names[1:] if column == 0 else [])
            below = names[:-1] if row == len(chosen) - 1 else []
            ax.set_xticks(range(len(sites) - 1), below, rotation=90)
            if row == 0:
                ax.set_title(panel.name)
            if column == 0:
                ax.set_ylabel(f"{context_name(n)} keys")
    last = axes[-1, -1].get_position()
    tall = axes[0, -1].get_position().y1 - last.y0
    bar = figure.add_axes((last.x1 + 0.15 / WIDTH, last.y0 + 0.1 * tall, 0.09 / WIDTH, 0.8 * tall))
    percents = FuncFormatter(lambda y, _: percent(y))
    ticks = [-10, -1, -0.1, 0, 0.1, 1, 10]
    scale = figure.colorbar(image, cax=bar, format=percents, ticks=ticks)
    assert scale.solids is not None
    scale.solids.set(rasterized=False, edgecolor="face")  # a report takes no images
    bar.tick_params(length=0, labelsize=5.5)
    bar.minorticks_off()
    return finish(
        figure,
        f"Which sites err together: {where}",
        "what lifting both removes beyond each of them, of the error. Orange: their errors "
        "cancel, lift both or none; purple: one makes up for the other",
        [],
    )


def pairs(ax: Axes, panel: Panel, sites: Sequence[str], context: int, norm: Any) -> Any:
    """The pairs of sites below the diagonal, the strongest in words above it.

    A context that was not computed stays empty.
    """
    count = len(sites)
    table = np.full((count - 1, count - 1), np.nan)
    if context in panel.owed.index:
        for i in range(1, count):
            for j in range(i):
                table[i - 1, j] = panel.owed[1 << i | 1 << j][context] / panel.nmse[0][context]
        row, column = divmod(int(np.nanargmax(np.abs(table))), count - 1)
        if abs(table[row, column]) >= LEAST:
            pair = " × ".join(LETTERS.get(site, site) for site in (sites[column], sites[row + 1]))
            words = f"{pair}\n{percent(table[row, column])}"
            ax.text(1, 0.98, words, transform=ax.transAxes, fontsize=5.8, ha="right", va="top")
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.set_aspect("equal")
    edges = np.arange(count) - 0.5
    ax.set_ylim(edges[-1], edges[0])
    return ax.pcolormesh(edges, edges, table, cmap="PuOr_r", norm=norm)


def percent(share: float) -> str:
    return f"{100 * share:+,.0f} %".replace("-", "−").replace("+0 ", "0 ")


def _shares(panel: Panel, sites: Sequence[str]) -> pd.DataFrame:
    """[context, site]: parts of the NMSE; with what lifting all leaves over they add up to 1."""
    return pd.DataFrame({s: panel.owed[1 << i] / panel.nmse[0] for i, s in enumerate(sites)})


def _colours(sites: Sequence[str]) -> dict[str, str]:
    known = {site: COLOURS[site] for site in sites if site in COLOURS}
    spare = [colour for colour in SPARE if colour not in known.values()] + list(SPARE)
    unknown = [site for site in sites if site not in known]
    found = known | {site: spare[i % len(spare)] for i, site in enumerate(unknown)}
    return {site: found[site] for site in sites}


def _name(site: str) -> str:
    return f"{site} {LETTERS[site]}" if site in LETTERS else site


def _decades(low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 1e-5), max(high, 1e-2)
    return float(10 ** np.floor(np.log10(low))), float(10 ** np.ceil(np.log10(1.5 * high)))


def _grid(
    rows: int,
    columns: int,
    heights: Sequence[float],
    left: float,
    right: float = 0.08,
    below: float = 0.78,
) -> tuple[Figure, np.ndarray]:
    top, between, apart = 0.62, 0.12, 0.1
    height = top + below + sum(heights) + between * (rows - 1)
    width = (WIDTH - left - right - (columns - 1) * apart) / columns
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), height_ratios=heights, squeeze=False
    )
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - right / WIDTH,
        top=1 - top / height,
        bottom=below / height,
        wspace=apart / width,
        hspace=between / (sum(heights) / rows),
    )
    return figure, axes
