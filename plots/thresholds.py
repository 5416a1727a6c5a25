"""thresholds: errors of a kernel and of the lifted one, and limits that tell them apart."""

import textwrap
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import figures
from plots.answers import context, decades, number, some, within, word
from plots.curves import context_axis, error_scale
from plots.labels import label_ends

KERNEL, LIFTED, LIMIT, RULE = "#D55E00", "#009E73", "#0072B2", "#333333"
MOST_REGIMES = 8


class Limits(NamedTuple):
    """By context: medians of the statistic, a limit for it, and whether that erred on a sample."""

    contexts: list[int]
    kernel: list[float]
    lifted: list[float]
    limit: list[float]
    errs: list[bool]


class Judged(NamedTuple):
    kernel: str
    rule: str
    statistic: str
    limit: float
    regimes: dict[str, Limits]


def parse(told: dict[str, Any]) -> Judged:
    """Raises what the callers of answers.parsed expect where the answer is none."""
    regimes = list(some(told["limits"], "limits").items())[:MOST_REGIMES]
    return Judged(
        word(told["kernel"]),
        word(told["rule"], 90),
        word(told["statistic"]),
        number(told["longer"][regimes[0][0]]["limit"]),
        {word(name): _limits(some(levels, "contexts")) for name, levels in regimes},
    )


def _limits(levels: Any) -> Limits:
    def column(name: str) -> list[float]:
        return [number(level[name]) for level in levels]

    errs = [number(level["false_alarm"][0]) + number(level["miss"][0]) > 0 for level in levels]
    contexts = [context(level["context"]) for level in levels]
    if contexts != sorted(set(contexts)):
        raise ValueError("contexts do not grow")
    return Limits(contexts, column("kernel"), column("lifted"), column("limit"), errs)


def draw(judged: Judged) -> Figure:
    """A panel for each regime; limits that tell every sample are filled marks, others hollow."""
    key = [
        figures.mark("o", LIMIT, "limit that errs on none of the samples that did not choose it")
    ]
    hollow = figures.mark("o", LIMIT, "on some")
    hollow.set_markerfacecolor("white")
    key += [hollow] * any(any(limits.errs) for limits in judged.regimes.values())
    figure, axes = figures.grid(len(judged.regimes), label=0.55, left=0.62)
    values = [x for limits in judged.regimes.values() for column in limits[1:4] for x in column]
    span = decades([*map(float, values), judged.limit])
    for ax, (regime, limits) in zip(axes, judged.regimes.items(), strict=True):
        error_scale(ax, *span)
        context_axis(ax, limits.contexts, narrow=figures.size_in_points(ax)[0] < 80)
        _panel(ax, limits, judged.limit)
        ax.set_title(regime)
        if figures.is_first(ax):
            ax.set_ylabel("\n".join(textwrap.wrap(judged.statistic, 28)))
        else:
            ax.set_yticklabels([])
    figures.name_contexts(figure)
    return figures.finish(
        figure,
        f"Limits to tell {judged.kernel} from itself lifted",
        f"medians over samples of one head; lifted: accumulators in float32; rule: {judged.rule}",
        key,
    )


def _panel(ax: Axes, limits: Limits, rule: float) -> None:
    ax.axhline(rule, color=RULE, linewidth=0.7, linestyle=(0, (4, 2)))
    x, last = limits.contexts, limits.contexts[-1]
    kernel, lifted = within(ax, limits.kernel), within(ax, limits.lifted)
    limit = within(ax, limits.limit)
    ax.plot(x, kernel, color=KERNEL)
    ax.plot(x, lifted, color=LIFTED)
    ax.plot(x, limit, color=LIMIT, linestyle=figures.DASHED, linewidth=0.8)
    for n, y, errs in zip(x, limit, limits.errs, strict=True):
        face = "white" if errs else LIMIT
        style: Any = {"markersize": 3.2, "markerfacecolor": face, "clip_on": False, "zorder": 4}
        ax.plot(n, y, "o", color=LIMIT, **style)
    ends = [
        (last, rule, "the rule's", RULE),
        (last, float(kernel[-1]), "kernel", KERNEL),
        (last, float(limit[-1]), "limit", LIMIT),
        (last, float(lifted[-1]), "lifted", LIFTED),
    ]
    label_ends(ax, ends)
