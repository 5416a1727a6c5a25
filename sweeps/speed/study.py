"""The speed study: ratios to a limit, the goal beside each.

The limit is a bare float32 q·kᵀ, p·v in jax, which takes turns with what is measured. Rows are kept
as those of other studies are: delete the directory to measure again.
"""

import dataclasses
import functools
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from sweeps.items import NOT_RUN, Item, ListStudy
from sweeps.speed import commands, gpu, ours, peers, scaling
from sweeps.speed.measure import LIMITS, NotRun, Row

WIDTH = 44  # of what is measured, in the table
MET, NOT_MET, MEASURED = "met", "not met", "measured"
PROCESS = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ({os.getpid()})"
TYPES: dict[str, pa.DataType] = {
    "what": pa.string(),
    "unit": pa.string(),
    "series": pa.string(),
    "why": pa.string(),
    **dict.fromkeys(("queries", "keys", "recipes", "contexts"), pa.int32()),
}
SCHEMA = {
    **dict.fromkeys(("item", "title", "status", "process"), pa.string()),
    **{f.name: TYPES.get(f.name, pa.float64()) for f in dataclasses.fields(Row)},
}


class Subject(NamedTuple):
    """What one item measures; slow: left out with --quick."""

    title: str
    rows: Callable[[], Iterator[Row]]
    slow: bool = False


SUBJECTS = {
    "limit": Subject("the limit itself", ours.limits),
    "one": Subject("one recipe, attention alone", ours.one),
    "eight": Subject(
        "eight recipes whose p differ, errors and reference included", ours.eight, slow=True
    ),
    "many": Subject("256 recipes that share scores and p, likewise", ours.many, slow=True),
    "binary": Subject("256 recipes, two formats at eight sites, likewise", ours.binary, slow=True),
    "oracle": Subject("a kernel that rounds its output at every key", ours.oracle),
    "recipes": Subject("cost against the number of recipes", ours.recipes, slow=True),
    "lengths": Subject("cost against the context", scaling.lengths, slow=True),
    "contexts": Subject("cost against the number of contexts", scaling.contexts, slow=True),
    "memory": Subject("memory at 2^24 keys", scaling.memory, slow=True),
    "start": Subject("from a command to its answer, run before", commands.start, slow=True),
    "gpu": Subject("eight recipes on a GPU", gpu.rows),
    "jaxattn": Subject("one configuration, by jaxattn", peers.ours),
    "jaxattn-256": Subject("256 configurations at once", peers.ours_at_once, slow=True),
    **{
        name.replace(", ", "-").replace(" + ", "-").replace(" ", "-").lower(): Subject(
            f"the same by {name}", functools.partial(peers.rows, name), peer.slow
        )
        for name, peer in peers.PEERS.items()
    },
}


def items(quick: bool) -> list[Item]:
    chosen = {name: x for name, x in SUBJECTS.items() if not (quick and x.slow)}
    return [Item(name, {}, functools.partial(_rows, name, x)) for name, x in chosen.items()]


def _rows(name: str, subject: Subject) -> list[dict[str, Any]]:
    words = {"item": name, "title": subject.title, "process": PROCESS}
    rows = []
    try:
        for row in subject.rows():
            rows.append({**words, **dataclasses.asdict(row), "status": judge(row)})
    except Exception as error:  # what cannot be measured here is a row of the table
        why = str(error) if isinstance(error, NotRun) else f"{type(error).__name__}: {error}"
        rows.append({**words, "status": NOT_RUN, "what": subject.title, "why": why, "series": ""})
    return rows


def judge(row: Row) -> str:
    if row.least is None and row.most is None:
        return MEASURED
    low = -math.inf if row.least is None else row.least
    high = math.inf if row.most is None else row.most
    return MET if low <= row.value <= high else NOT_MET


def table(rows: pd.DataFrame) -> str:
    """What was measured beside its goal, item by item, and a last line that counts."""
    columns = f"{'queries x keys':>16}{'time':>10}{'limit':>10}{'ratio':>9}  {'goal':<14}"
    text = [f"{'':<{WIDTH + 2}}{columns}".rstrip()]
    for name, part in rows.groupby("item", sort=False):
        text += ["", f"{name}: {part['title'].iloc[0]}"]
        for row in part.to_dict("records"):
            text += line(row)
    measured = rows[rows["status"] != NOT_RUN]
    processes = measured["process"].nunique()
    counts = [int((rows["status"] == status).sum()) for status in (MET, NOT_MET, NOT_RUN)]
    text += [
        "",
        "A ratio is of medians: of the call's time to the limit's, that of the bare float32 q·kᵀ,",
        "p·v of that shape which took turns with it, unless a unit follows.",
        "`python -m sweeps run speed --only NAME` measures one.",
        "All measured in one process."
        if processes <= 1
        else f"Measured in {processes} processes: delete the directory to measure all in one.",
        "",
        "speed: {} met, {} not met, {} not run".format(*counts),
    ]
    return "\n".join(text)


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table, what is said about it below it."""
    if row["status"] == NOT_RUN:
        return textwrap.wrap(
            f"not run: {row['why']}", 106, initial_indent="  ", subsequent_indent="    "
        )
    first, *more = textwrap.wrap(row["what"], WIDTH)
    shape = f"{row['queries']:,.0f} x {row['keys']:,.0f}" if pd.notna(row["keys"]) else ""
    unit = "" if row["unit"] == LIMITS else row["unit"]
    verdict = "" if row["status"] == MEASURED else row["status"].upper()
    text = [
        f"  {first:<{WIDTH}}{shape:>16}{duration(row['seconds']):>10}"
        f"{duration(row['limit_seconds']):>10}{number(row['value']):>9}"
        f"  {goal(row):<14}{verdict:<9}{unit}".rstrip()
    ]
    text += [f"    {rest}" for rest in more]
    return text + ([f"    ({row['why']})"] if row["why"] else [])


def number(value: float) -> str:
    if value >= 100 or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def duration(seconds: float) -> str:
    if pd.isna(seconds):
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def goal(row: dict[str, Any]) -> str:
    low, high = row["least"], row["most"]
    if pd.isna(high):
        return ""
    return f"at most {high:g}" if pd.isna(low) else f"{low:g} to {high:g}"


FULL = ListStudy(
    name="speed",
    title="what jaxattn costs, in bare float32 matrix products, beside its goals and its peers",
    items=items,
    schema=SCHEMA,
    sources=("sweeps", "jaxattn/kernels"),
    table=table,
    has_figures=True,
)
QUICK = FULL
