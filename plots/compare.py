"""compare: a kernel's own error beside that of the recipes nearest to it, by head."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import figures
from plots.answers import context, decades, number, some, within, word
from plots.curves import context_axis, error_scale, recipe_colours, short_name
from plots.labels import label_ends

METRICS = ("nmse", "nmse_llama", "rel_l2", "max_abs", "ulps")  # errors, that a log axis can show
SHOWN, MOST_HEADS = 3, 8
OBSERVED = "#000000"


class Compared(NamedTuple):
    """errors: name -> [region, head], the observed first; keys: of each region, () for one of all
    keys; heads: their names; verdict: a sentence."""

    metric: str
    keys: tuple[int, ...]
    heads: tuple[str, ...]
    all_heads: int
    errors: dict[str, np.ndarray]
    verdict: str


def parse(told: dict[str, Any]) -> Compared:
    """Raises what the callers of answers.parsed expect where the answer is none."""
    metric = next((name for name in METRICS if name in told["observed"]), None)
    if metric is None:
        raise ValueError(f"holds none of {', '.join(METRICS)}, the errors that are drawn")
    nearest = some(told["recipes"], "recipes")[:SHOWN]
    parts = told["regions"] or [{"observed": told["observed"], "recipes": told["recipes"]}]
    grid = np.array(some(told["observed"][metric], "heads"), dtype=object)
    B, N = grid.shape
    agree = np.array([number(x, -2, 2) for row in nearest[0]["correlation_by_head"] for x in row])
    keys = tuple(context(region["most"]) for region in told["regions"])
    if agree.size != B * N or list(keys) != sorted(set(keys)):
        raise ValueError("heads or regions do not fit together")
    least = sorted(np.argsort(agree, kind="stable")[:MOST_HEADS].tolist())

    def by_region(values: list[Any]) -> np.ndarray:
        found = [[number(x) for row in one for x in row] for one in values]
        array = np.array(found)
        if array.shape != (len(parts), B * N):
            raise ValueError("regions differ in their heads")
        return array[:, least]

    errors = {"observed": by_region([part["observed"][metric] for part in parts])}
    for i, recipe in enumerate(nearest):
        own = [part["recipes"][i] for part in parts]
        errors[word(recipe["recipe"])] = by_region([x.get("metrics", x)[metric] for x in own])
    names = [f"{n}" if B == 1 else f"{b}.{n}" for b in range(B) for n in range(N)]
    return Compared(
        metric,
        keys,
        tuple(names[i] for i in least),
        B * N,
        errors,
        word(told["verdict"], 100),
    )


def draw(compared: Compared) -> Figure:
    """A panel for each head by keys, or one of all heads where every query sees all keys."""
    several = len(compared.keys) > 1
    title = "Error of the kernel, and of the recipes that err most like it"
    recipes = [name for name in compared.errors if name != "observed"]
    label = 0.12 + 0.05 * max(len(short_name(name)) for name in [*recipes, "observed"])
    panels = len(compared.heads) if several else 1
    figure, axes = figures.grid(panels, label=max(label, 0.8), key_rows=0)
    span = decades([float(x) for errors in compared.errors.values() for x in errors.ravel()])
    colours = {"observed": OBSERVED} | _colours(recipes)
    for place, ax in enumerate(axes):
        error_scale(ax, *span)
        if several:
            context_axis(ax, compared.keys)
            _curves(ax, compared, place, colours)
            ax.set_title(f"head {compared.heads[place]}")
        else:
            _heads(ax, compared, colours)
        if figures.is_first(ax):
            ax.set_ylabel(compared.metric)
        else:
            ax.set_yticklabels([])
    if several:
        below = figure.subplotpars.bottom - 0.37 / figure.get_figheight()
        figure.supxlabel("keys that a query sees, up to", y=below, fontsize=7)
    few = len(compared.heads) < compared.all_heads
    heads = f"; the {len(compared.heads)} heads of {compared.all_heads} least alike" * few
    return figures.finish(figure, title, compared.verdict + heads, [])


def _colours(recipes: list[str]) -> dict[str, str]:
    """Black is the kernel's own."""
    return {name: c for name, c in recipe_colours(["black", *recipes]).items() if name != "black"}


def _curves(ax: Axes, compared: Compared, head: int, colours: dict[str, str]) -> None:
    ends = []
    for name, errors in compared.errors.items():
        y = within(ax, errors[:, head])
        mine = name == "observed"
        style: Any = {"marker": "o", "linestyle": ":", "zorder": 4} if mine else {"zorder": 3}
        ax.plot(compared.keys, y, color=colours[name], markersize=2.8, clip_on=False, **style)
        ends.append((compared.keys[-1], float(y[-1]), short_name(name), colours[name]))
    label_ends(ax, ends)


def _heads(ax: Axes, compared: Compared, colours: dict[str, str]) -> None:
    places, ends = range(len(compared.heads)), []
    for name, errors in compared.errors.items():
        y = within(ax, errors[0])
        mine = name == "observed"
        style: Any = {"marker": "o", "markersize": 3, "zorder": 4} if mine else {"marker": "_"}
        ax.plot(places, y, color=colours[name], linestyle="", **{"markersize": 14, **style})
        ends.append((places[-1], float(y[-1]), short_name(name), colours[name]))
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_xticks(places, compared.heads)
    ax.set_xlabel("head")
    label_ends(ax, ends)
