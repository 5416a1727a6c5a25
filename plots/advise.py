"""advise: error against price, of all recipes that were weighed."""

import textwrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from plots import figures
from plots.answers import MOST_PRICE, context, decades, number, some, within, word
from plots.curves import error_scale
from plots.labels import spread

RIGHT, TOP, BELOW, LEFT = 2.55, 0.62, 0.48, 0.5  # inches around the panel
WRAP, SIZE, LEADING = 47, 6.0, 1.2  # of the labels: characters, points, and their lines
AS_IT_STANDS, HOLDS, FRONT, LIMIT = "#D55E00", "#00704F", "#0072B2", "#333333"


class Named(NamedTuple):
    """A recipe by its change, and what is to be said of it."""

    price: float
    error: float
    change: str
    title: str


class Advised(NamedTuple):
    """candidates, steps: [price, error] of all, and of those with less error than all cheaper."""

    kernel: str
    metric: str
    tolerance: float
    context: int
    rows: str
    candidates: np.ndarray
    steps: np.ndarray
    stands: Named
    recommended: tuple[Named, ...]


class Label(NamedTuple):
    text: str
    level: float
    colour: str


def parse(told: dict[str, Any]) -> Advised:
    """Raises what the callers of answers.parsed expect where the answer is none."""
    return Advised(
        word(told["kernel"]["name"]),
        word(told["metric"]),
        number(told["tolerance"], 1e-300, 1e300),
        max(context(n) for n in told["contexts"]),
        word(told["rows"]),
        points(told["candidates"]),
        points(told["steps"]),
        named(told["as_it_stands"], "as it stands"),
        tuple(named(one, one["title"]) for one in told["recommended"][:8]),
    )


def points(told: Any) -> np.ndarray:
    pairs = [
        (number(price, -MOST_PRICE, MOST_PRICE), number(error))
        for price, error in some(told, "recipes")
    ]
    return np.array(pairs)


def named(told: Any, title: str) -> Named:
    change = " ".join(f"{word(field)}={word(value)}" for field, value in told["change"].items())
    price = number(told["price"], -MOST_PRICE, MOST_PRICE)
    return Named(price, number(told["worst"]["error"]), change, word(title))


def draw(advised: Advised) -> Figure:
    """All candidates as dots, the front as a step line, what is recommended by number and name."""
    front = advised.steps[:, 1].min()
    labels = [Label(_text(i, one), one.error, HOLDS) for i, one in _numbered(advised)]
    labels.append(Label("front: less error than all cheaper", front, FRONT))

    panel = max(2.5, _gap(labels) * len(labels) / 72)
    figure, ax = figures.plt.subplots(figsize=(figures.WIDTH, TOP + panel + BELOW))
    width, height = figure.get_size_inches()
    figure.subplots_adjust(LEFT / width, BELOW / height, 1 - RIGHT / width, 1 - TOP / height)
    _axes(ax, advised)
    _dots(ax, advised)
    _numbers(ax, advised)
    _label(ax, labels)
    over = "; at the upper edge: overflow" if np.isinf(advised.candidates[:, 1]).any() else ""
    holds = advised.stands.error <= advised.tolerance
    what = "holds as it stands" if holds else "has to change to hold"
    return figures.finish(
        figure,
        f"{'' if holds else 'What '}{advised.kernel} {what} up to {advised.context:,} keys",
        f"a dot: one of {len(advised.candidates):,} recipes; error: the {advised.rows} over rows, "
        f"worst of seeds, inputs and contexts{over}",
        [],
    )


def _numbered(advised: Advised) -> list[tuple[int, Named]]:
    """As jaxattn advise numbers them."""
    return list(enumerate(advised.recommended, 1))


def _text(i: int, one: Named) -> str:
    change = textwrap.wrap(f"{i}  {one.change or 'no change'}", WRAP, subsequent_indent="    ")
    title = textwrap.wrap(
        f"({one.title})", WRAP + 7, initial_indent="    ", subsequent_indent="    "
    )
    return "\n".join([*change, *title]).replace("  ", 2 * "\u00a0")  # or SVG drops the second


def _gap(labels: list[Label]) -> float:
    """Points that the tallest label takes, and some air."""
    lines = max(label.text.count("\n") + 1 for label in labels)
    return SIZE * LEADING * (lines + 0.45)


def _axes(ax: Axes, advised: Advised) -> None:
    prices, errors = advised.candidates.T
    error_scale(ax, *decades([*errors, *advised.steps[:, 1], advised.tolerance]))
    low, high = float(prices.min()), float(prices.max())
    if 0 < 1.2 * low < high:
        ax.set_xscale("log", base=2)
        ax.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.04)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        ax.set_xlim(low - 0.06 * (high - low) - 0.01, high + 0.04 * (high - low) + 0.01)
    ax.set_xlabel("price of a row: terms of the cost times their weights")
    ax.set_ylabel(f"worst {advised.metric}")


def _dots(ax: Axes, advised: Advised) -> None:
    prices, errors = advised.candidates.T
    ax.plot(prices, within(ax, errors), ".", color="#9A9A9A", markersize=3, alpha=0.35, mew=0)
    price, error = advised.steps[np.argsort(advised.steps[:, 0], kind="stable")].T
    edge = ax.get_xlim()[1]
    ax.step([*price, edge], within(ax, [*error, error[-1]]), where="post", color=FRONT)
    ax.axhline(advised.tolerance, color=LIMIT, linewidth=0.7, linestyle=(0, (4, 2)))
    limit = f"tolerance: {advised.metric} {advised.tolerance:g}"
    _beside(ax, limit, (edge, advised.tolerance), (-1, 5), LIMIT, "right", weight="normal")
    style: Any = {"zorder": 5, "clip_on": False, "mec": "white", "mew": 0.6}
    for one in advised.recommended:
        ax.plot(one.price, within(ax, [one.error]), "o", color=HOLDS, markersize=5, **style)
    stands = advised.stands
    at = stands.price, float(within(ax, [stands.error])[0])
    ax.plot(*at, "s", color=AS_IT_STANDS, markersize=5, **(style | {"zorder": 4}))
    _beside(ax, stands.title, at, (6, 5), AS_IT_STANDS, "left")


def _numbers(ax: Axes, advised: Advised) -> None:
    """Left of each recommended recipe's mark its number; apart where marks share a place."""
    to_axes = ax.transData + ax.transAxes.inverted()
    height = figures.size_in_points(ax)[1]
    marks = [(one.price, float(within(ax, [one.error])[0])) for one in advised.recommended]
    levels = [float(to_axes.transform(at)[1]) for at in marks]
    places = spread(levels, 1.1 * SIZE / height, 0.0, 1.0)
    for (i, _), at, level, place in zip(_numbered(advised), marks, levels, places, strict=True):
        _beside(ax, str(i), at, (-5, height * (place - level)), HOLDS, "right")


def _beside(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    away: tuple[float, float],
    colour: str,
    side: str,
    weight: str = "bold",
) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
    style: Any = {"fontsize": SIZE + 0.5, "weight": weight, "ha": side, "va": "center", "bbox": box}
    ax.annotate(text, at, away, textcoords="offset points", color=colour, zorder=6, **style)


def _label(ax: Axes, labels: list[Label]) -> None:
    """Each label right of the panel, near its height."""
    width, height = figures.size_in_points(ax)
    to_axes = ax.transData + ax.transAxes.inverted()
    edge = ax.get_xlim()[1]
    levels = [
        float(to_axes.transform((edge, float(within(ax, [label.level])[0])))[1]) for label in labels
    ]
    places = spread(levels, _gap(labels) / height, 0.0, 1.0)
    style: Any = {"transform": ax.transAxes, "clip_on": False}
    for label, level, place in zip(labels, levels, places, strict=True):
        if label.colour != HOLDS:
            line = [1.0, 1.0 + 5 / width, 1.0 + 9 / width], [level, place, place]
            ax.plot(*line, color=label.colour, linewidth=0.5, **style)
        text: Any = {"fontsize": SIZE, "va": "center", "linespacing": LEADING, **style}
        ax.text(1.0 + 11 / width, place, label.text, color=label.colour, **text)
