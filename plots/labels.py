"""Labels at the ends of lines, moved apart where they would overlap."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

End = tuple[float, float, str, str]  # x, y, text, colour


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to `wanted` (least squares) that are `gap` apart and within [low, high].

    Where they cannot all fit, the gap shrinks until they do.
    """
    count = len(wanted)
    if count > 1:
        gap = min(gap, (high - low) / (count - 1))
    order = sorted(range(count), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # [sum, size]: neighbours that touch move as one
    for rank, i in enumerate(order):
        pools.append([min(max(wanted[i], low), high) - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, size = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += size
    flat = [total / size for total, size in pools for _ in range(int(size))]
    places = [0.0] * count
    for rank, i in enumerate(order):
        slack = min(max(flat[rank], low), high - (count - 1) * gap)
        places[i] = slack + rank * gap
    return places


def size_in_points(ax: Axes) -> tuple[float, float]:
    box, figure = ax.get_position(), ax.get_figure(root=True)
    assert figure is not None
    return 72 * box.width * figure.get_figwidth(), 72 * box.height * figure.get_figheight()


def label_ends(
    ax: Axes,
    ends: Sequence[End],
    *,
    size: float = 6.0,
    offset: float = 4.0,
) -> None:
    """Write each (x, y, text, colour) `offset` points right of the axes, near its line's end.

    Lines that end at the same height are labelled in the order given, first at the top.
    """
    if not ends:
        return
    width, height = size_in_points(ax)
    right = 1 + offset / width
    to_axes = ax.transData + ax.transAxes.inverted()
    gap = 1.12 * size / height
    ends = ends[::-1]
    levels = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in ends]
    places = spread([round(2 * level / gap) * gap / 2 for level in levels], gap, 0.0, 1.0)
    for (x, y, text, colour), place in zip(ends, places, strict=True):
        level = float(np.clip(to_axes.transform((x, y))[1], 0, 1))
        start = float(to_axes.transform((x, y))[0])
        ax.plot(
            [start, 1.0, right - 1 / width],
            [level, level if start > 0.99 else place, place],
            color=colour,
            linewidth=0.4,
            alpha=0.7,
            transform=ax.transAxes,
            clip_on=False,
            zorder=1,
        )
        ax.text(
            right,
            place,
            text,
            color=colour,
            fontsize=size,
            va="center_baseline",
            ha="left",
            transform=ax.transAxes,
        )
