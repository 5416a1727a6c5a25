"""The ablation study as text: what each site owes, and what lifting it alone would change."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from sweeps.table import crossing, reported

SMALLEST = 1e-6  # NMSE below which nothing matters
MATTERS = 0.1  # change of the median NMSE
SURE = 2.5  # standard deviations of how many rows get better by chance; 8 of 8 are more
PAIRS = 3  # interactions that are printed
LETTERS = {
    "running_max": "running_max m",
    "running_sum": "running_sum l",
    "rescale": "rescale a",
    "output": "output o",
    "inverse": "inverse 1/l",
}
# Lifted together: by llama.cpp #24389 (and m, which FP16 scores do not round), and what cancels.
TOGETHER = {"l, row sum (#24389)": ("running_sum", "row_sum"), "l, o": ("running_sum", "output")}


class Panel(NamedTuple):
    """One curve with all its subsets; every table is [context, subset].

    nmse, overflow: what is left with the subset lifted; better: share of the rows with less NMSE
    owed, owed_overflow: interaction indices
    distinct: by context, how many rows differ, which is how many draws there are
    sites: names by bit; the first `inside` of them have all their subsets
    """

    name: str
    block: str
    nmse: pd.DataFrame
    overflow: pd.DataFrame
    better: pd.DataFrame
    owed: pd.DataFrame
    owed_overflow: pd.DataFrame
    kv_block: int
    distinct: np.ndarray
    sites: tuple[str, ...]
    inside: int

    def bits(self, *sites: str) -> int:
        return sum(1 << self.sites.index(site) for site in sites)


def panels_of(rows: pd.DataFrame, sites: Sequence[str], beside: Sequence[str]) -> list[Panel]:
    """Every curve of the rows: by input (and head, of a capture), fixed blocks first."""
    panels = []
    for (source, head), part in rows.groupby(["inputs", "head"], sort=False):
        name = f"{source}" if head < 0 else f"{source}, head {head}"
        for block in sorted(part["block"].unique(), key=lambda b: (not b.isdigit(), b)):
            here = part[part["block"] == block]
            columns = ("nmse", "overflow", "better", "owed_nmse", "owed_overflow")
            tables = [here.pivot(index="context", columns="subset", values=x) for x in columns]
            size = int(here["kv_block"].iloc[here["context"].argmax()])
            draws = here.groupby("context")["distinct"].first().to_numpy()
            names = (*sites, *beside)
            panels.append(Panel(name, block, *tables, size, draws, names, len(sites)))  # type: ignore[call-arg]
    return panels


def tables(rows: pd.DataFrame, sites: Sequence[str], beside: Sequence[str]) -> str:
    """A paragraph for each curve, then for each block setting what one site changes."""
    panels = panels_of(rows, sites, beside)
    kernel = rows["recipe"].iloc[0]
    lines = [line for panel in panels for line in (*_shares(panel), "")]
    lines += [
        "owes: each site's share of the NMSE: Shapley values, which add up to 100 % with what is",
        "left over when all are lifted; below 0 % where lifting costs more than it saves.",
        "alone: how lifting it alone changes the NMSE (above 0 %: worse). adds: the NMSE that it",
        "adds where all others are lifted. overflow: share of the rows that it makes overflow.",
        "interactions: what lifting both removes beyond each of them. (): all other subsets leave",
        "it as it is. NMSE: medians over seeds, heads and queries.",
        "",
    ]
    for block in dict.fromkeys(panel.block for panel in panels):
        lines += _answers(kernel, [panel for panel in panels if panel.block == block])
    lines += [
        f"from: the first context with NMSE above {SMALLEST:g} from which on, for an octave,",
        f"lifting changes it by more than {MATTERS:.0%} for the better (+) or the worse (-), and",
        f"more of the distinct rows than chance explains ({SURE:g} standard deviations);",
        "?: too few rows differ to tell.",
        "exceeds: first context with NMSE above 5e-4; ~: within it again at a longer one;",
        "!: some row overflows at some context; -: none.",
    ]
    return "\n".join(lines)


def _shares(panel: Panel) -> list[str]:
    at = reported(list(panel.nmse.index))
    wide = max(9, -(-16 // len(at)))
    columns: dict[str, list[list[str]]] = {x: [] for x in ("owes", "alone", "adds", "overflow")}
    for i in range(len(panel.sites)):
        bit, none = 1 << i, [""] * len(at)
        others = 2 ** (panel.inside if i < panel.inside else len(panel.sites)) - 1
        adds = panel.nmse[others ^ bit] - panel.nmse[others]
        columns["adds"].append([f"{adds[n] + 0.0:.1e}" for n in at])
        owes = [_percent(panel.owed[bit][n] / panel.nmse[0][n]) for n in at]
        lost = [_percent(panel.owed_overflow[bit][n]) for n in at]
        columns["owes"].append(owes if i < panel.inside else none)
        columns["overflow"].append(lost if i < panel.inside else none)
        alone = [_percent(panel.nmse[bit][n] / panel.nmse[0][n] - 1, "+") for n in at]
        columns["alone"].append(alone)
    if not (panel.overflow[0] > 0).any():
        del columns["overflow"]
    names = [s if i < panel.inside else f"({s})" for i, s in enumerate(panel.sites)]
    lines = [
        f"{panel.name}, {_block(panel)}",
        f"{'':<16}" + "".join(f"{word:>{wide * len(at)}}" for word in columns),
        f"{'':<16}" + "".join(f"{n:>{wide},}" for n in at) * len(columns),
    ]
    for name, *cells in zip(names, *columns.values(), strict=True):
        lines.append(f"{name:<16}" + "".join(f"{x:>{wide}}" for some in cells for x in some))
    left = panel.nmse[2**panel.inside - 1]
    cells = [f"{_percent(left[n] / panel.nmse[0][n]):>{wide}}" for n in at]
    lines.append(f"{'left over':<16}" + "".join(cells))
    for word, subset in (("NMSE", 0), ("all lifted", 2**panel.inside - 1)):
        levels = [f"{panel.nmse[subset][n]:.1e}" for n in at]
        lines.append(f"{word:<16}" + "".join(f"{level:>{wide}}" for level in levels))
    return [*(line.rstrip() for line in lines), _strongest(panel, at)]


def _strongest(panel: Panel, at: Sequence[int]) -> str:
    """The pairs whose interaction is the largest share of the error at any of the contexts."""
    found = [
        (panel.owed[panel.bits(a, b)][n] / panel.nmse[0][n], n, f"{a} x {b}")
        for a, b in itertools.combinations(panel.sites[: panel.inside], 2)
        for n in at
    ]
    best: dict[str, tuple[float, int]] = {}
    for share, n, pair in sorted(found, key=lambda x: -abs(x[0])):
        best.setdefault(pair, (share, n))
    some = list(best.items())[:PAIRS]
    cells = [f"{pair} {_percent(share, '+')} at {n:,}" for pair, (share, n) in some]
    return f"{'interactions':<16}" + "; ".join(cells)


def _answers(kernel: str, panels: Sequence[Panel]) -> list[str]:
    """From where lifting one site matters, and what then exceeds 5e-4; inputs side by side.

    Sites that change nothing of any input share a line.
    """
    first = panels[0]
    wide = max(17, *(len(panel.name) + 2 for panel in panels))
    choices: dict[str, tuple[str, ...]] = {LETTERS.get(s, s): (s,) for s in first.sites}
    choices |= {word: s for word, s in TOGETHER.items() if set(s) <= set(first.sites)}
    choices[f"all {first.inside}"] = first.sites[: first.inside]
    lines = []
    for title, question, beside in (("from", matters, {}), ("exceeds", exceeds, {"nothing": ()})):
        heads = "".join(f"{panel.name:>{wide}}" for panel in panels)
        lines += [f"{kernel}, {_block(first)}", f"{title + ', with lifted':<22}{heads}"]
        rows = {
            word: [question(panel, panel.bits(*some)) for panel in panels]
            for word, some in {**beside, **choices}.items()
        }
        usual = rows.get("nothing", ["-"] * len(panels))
        alike = [word for word, cells in rows.items() if cells == usual and word != "nothing"]
        for word, cells in rows.items():
            if word not in alike:
                lines.append(f"{word:<22}" + "".join(f"{cell:>{wide}}" for cell in cells))
        lines += [f"no change: {', '.join(alike)}"] * bool(alike) + [""]
    return lines


def matters(panel: Panel, subset: int) -> str:
    """From which contexts on lifting the subset changes the median NMSE: `4,096+ 65,536-`, or -;
    ? where too few rows differ to tell."""
    before, after = panel.nmse[0].to_numpy(), panel.nmse[subset].to_numpy()
    contexts = panel.nmse.index.to_numpy()
    changes = (after / before - 1) * (before > SMALLEST)
    worse = 1 - 2 * panel.better[subset].to_numpy()  # from -1 to 1, 0 by chance
    sure = SURE / np.sqrt(panel.distinct)

    def first(far: np.ndarray) -> int | None:
        for i, n in enumerate(contexts):
            octave = far[i:][contexts[i:] <= 2 * n]
            if octave.all() and len(octave) >= min(2, len(contexts)):
                return int(n)
        return None

    found = []
    for sign, mark in ((-1, "+"), (1, "-")):
        far = sign * changes > MATTERS
        if (n := first(far & (sign * worse > sure))) is not None:
            found.append((n, f"{n:,}{mark}"))
        elif (sure >= 1).all() and first(far) is not None:
            return "?"
    return " ".join(text for _, text in sorted(found)) or "-"


def exceeds(panel: Panel, subset: int) -> str:
    nmse, overflow = panel.nmse[subset], panel.overflow[subset]
    return crossing(nmse.index.to_numpy(), nmse.to_numpy(), bool((overflow > 0).any()))


def _block(panel: Panel) -> str:
    if panel.block.isdigit():
        return f"KV block {panel.block}"
    return f"its own KV block ({panel.kv_block} at the longest context)"


def _percent(share: float, sign: str = "") -> str:
    if np.isnan(share):
        return "nan"
    return f"{round(100 * share, 1) + 0.0:{sign}.1f}%"  # + 0.0: no -0.0
