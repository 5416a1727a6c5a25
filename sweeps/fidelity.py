"""The fidelity study: every real kernel that this machine can run, beside its recipe.

Both are judged against float64, and their error vectors against each other.
"""

import dataclasses
import functools
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from sweeps.items import NOT_RUN, Item, ListStudy
from sweeps.peers.compare import FIGURES, INPUTS, NotRun, compare, recipe_of
from sweeps.peers.peer import VECTOR, Peer, peers, versions

LEAST_CORRELATION = 0.999
MOST_RATIO = 1.5
AS_FAR = 4  # variances of two kernels add, and orders of sums differ in noise
AGREES, SHORT = "agrees", "falls short"
INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    "}
QUICK_CONTEXTS = 2  # the shortest of each peer's

WORDS = ("peer", "family", "function", "versions", "recipe", "dtype", "expect", "cause")
SCHEMA = {
    **dict.fromkeys((*WORDS, "status", "why", "inputs"), pa.string()),
    "context": pa.int32(),
    **dict.fromkeys(FIGURES, pa.float64()),
}


def items(quick: bool) -> list[Item]:
    return [_item(peer, quick) for peer in peers().values()]


def _item(peer: Peer, quick: bool) -> Item:
    if quick:
        peer = dataclasses.replace(peer, contexts=peer.contexts[:QUICK_CONTEXTS])
    identity = {**dataclasses.asdict(peer), "versions": _versions(peer), "inputs": INPUTS}
    identity["arithmetic"] = recipe_of(peer).identity()
    return Item(peer.name, identity, functools.partial(_rows, peer))


def _versions(peer: Peer) -> str:
    """`package version` of each; "" where one is not installed."""
    try:
        return ", ".join(f"{name} {version}" for name, version in versions(peer).items())
    except ModuleNotFoundError:
        return ""


def _rows(peer: Peer) -> list[dict[str, Any]]:
    words = {name: getattr(peer, name, _versions(peer)) for name in WORDS if name != "peer"}
    words = {"peer": peer.name, **words, "status": "run", "why": ""}
    try:
        return [{**words, **row} for row in compare(peer)]
    except NotRun as error:
        return [{**words, "status": NOT_RUN, "why": str(error)}]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each peer, in their order: the worst of its rows, and a verdict.

    verdict: "agrees", "falls short" or NOT_RUN
    """
    lines = []
    for name, part in rows.groupby("peer", sort=False):
        first = part.iloc[0]
        line = {"peer": name, **first[["recipe", "versions", "expect", "cause", "why"]]}
        if first["status"] == NOT_RUN:
            lines.append({**line, "verdict": NOT_RUN})
            continue
        ratio = part["rms_ratio"].to_numpy()
        worst = {
            "correlation": part["correlation"].min(skipna=False),
            "settled": part["settled"].min(skipna=False),
            "ceiling": part["ceiling"].min(skipna=False),
            "ties": part["ties"].max(),
            "control": part["control"].median(),
            "unexplained": part["unexplained"].max(skipna=False),
            "rms_ratio": float(ratio[np.argmax(np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)))]),
            "equal": part["equal"].median(),
            "nmse_real": part["nmse_real"].max(),
        }
        if first["expect"] == VECTOR:
            agrees = worst["correlation"] >= LEAST_CORRELATION
        else:
            agrees = 1 / MOST_RATIO <= worst["rms_ratio"] <= MOST_RATIO
        lines.append({**line, **worst, "verdict": AGREES if agrees else SHORT})
    return pd.DataFrame(lines)


def table(rows: pd.DataFrame) -> str:
    """The summary as text, what falls short explained below it, and a last line that counts."""
    lines = summary(rows)
    wide = max(len(name) for name in lines["peer"]) + 2
    text = [
        f"{'real kernel':<{wide}}{'correlation':>12}{'settled':>10}{'ceiling':>10}{'control':>9}"
        f"{'unexplained':>13}{'RMS ratio':>11}{'equal':>7}  verdict"
    ]
    notes = []
    for line in lines.to_dict("records"):
        if line["verdict"] == NOT_RUN:
            text.append(f"{line['peer']:<{wide}}{'':>72}  not run: {line['why']}")
            continue
        text.append(
            f"{line['peer']:<{wide}}{line['correlation']:>12.6f}{line['settled']:>10.6f}"
            f"{line['ceiling']:>10.6f}{line['control']:>9.3f}{line['unexplained']:>13.2%}{line['rms_ratio']:>11.3f}"
            f"{line['equal']:>7.0%}  {line['verdict']}{'' if line['expect'] == VECTOR else ' *'}"
        )
        if line["verdict"] == SHORT:
            notes += textwrap.wrap(f"{line['peer']}: {cause_of(line)}", 98, **INDENT)
    counts = [int((lines["verdict"] == v).sum()) for v in (AGREES, SHORT, NOT_RUN)]
    text += ["", *(["What falls short:", *notes, ""] if notes else [])]
    text += [
        "Error vectors e against float64, of real kernel and recipe; the worst over inputs and",
        "contexts. correlation: of the two; settled: without the results that lie so near to the",
        "middle of two numbers that float32 noise decides; ceiling: of the recipe with itself, its",
        "float32 sums taken in float64; control: correlation for a recipe that rounds nothing",
        "inside (median); unexplained: |e_real - e_recipe| / |e_real|; RMS ratio: |e_real| /",
        "|e_recipe|; equal: elements that agree to the bit (median). A kernel agrees where every",
        f"correlation is {LEAST_CORRELATION} or more; where its error is float32 noise of an order",
        f"that is not known (*), where every RMS ratio is within {MOST_RATIO}.",
        "",
        "fidelity: {} agree, {} fall short, {} not run".format(*counts),
    ]
    return "\n".join(text)


def cause_of(line: dict[str, Any]) -> str:
    """Why it falls short: measured, where ties are all, else as the peer says."""
    if line["expect"] == VECTOR and line["settled"] >= LEAST_CORRELATION:
        return (
            f"results at a tie, up to {line['ties']:.2%} of the elements, which float32 noise "
            f"rounds the other way; without them {line['settled']:.6f}"
        )
    cause, ceiling = line["cause"], line["ceiling"]
    if line["expect"] == VECTOR and 1 - line["correlation"] <= AS_FAR * (1 - ceiling):
        return (
            "values inside at a tie, which float32 noise rounds the other way: the recipe alone, "
            f"its float32 sums taken in float64, goes down to {ceiling:.6f}. {cause}"
        ).rstrip()
    return str(cause) or "the cause is not known"


FULL = ListStudy(
    name="fidelity",
    title="real kernels, executed on this machine beside their recipes",
    items=items,
    schema=SCHEMA,
    sources=("sweeps/peers",),
    table=table,
    has_figures=True,
)
QUICK = FULL
