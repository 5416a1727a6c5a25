"""The claims study: published numbers, and what is measured here."""

import functools
import textwrap
import time
from typing import Any

import pandas as pd
import pyarrow as pa

from sweeps.claims.claim import Claim
from sweeps.claims.registry import CLAIMS
from sweeps.items import NOT_RUN, Item, ListStudy

WORDS = ("claim", "title", "source", "setup", "expected", "status", "measured", "why")
SCHEMA = {**dict.fromkeys(WORDS, pa.string()), "seconds": pa.float64()}
MET, NOT_MET = "met", "not met"


def items(quick: bool) -> list[Item]:
    chosen = [claim for claim in CLAIMS if not (quick and claim.slow)]
    return [Item(claim.id, {}, functools.partial(_rows, claim)) for claim in chosen]


def _rows(claim: Claim) -> list[dict[str, Any]]:
    words = {name: getattr(claim, name) for name in ("title", "source", "setup", "expected")}
    started = time.monotonic()
    try:
        outcome = claim.check()
        found = {
            "status": MET if outcome.met else NOT_MET,
            "measured": outcome.measured,
            "why": outcome.why,
        }
    except Exception as error:  # a claim that cannot be tested is a row of the table
        found = {"status": NOT_RUN, "measured": "", "why": f"{type(error).__name__}: {error}"}
    return [{"claim": claim.id, **words, **found, "seconds": time.monotonic() - started}]


def table(rows: pd.DataFrame) -> str:
    """A paragraph for each claim, and a last line that counts."""
    text = []
    for row in rows.to_dict("records"):
        text.append(f"{row['claim']}: {row['status'].upper()}  {row['title']}")
        for word in ("source", "setup", "expected", "measured", "why"):
            if row[word]:
                text += textwrap.wrap(
                    row[word], 100, initial_indent=f"  {word:<10}", subsequent_indent=" " * 12
                )
    counts = [int((rows["status"] == status).sum()) for status in (MET, NOT_MET, NOT_RUN)]
    text += ["", "claims: {} met, {} not met, {} not run".format(*counts)]
    return "\n".join(text)


FULL = ListStudy(
    name="claims",
    title="published claims about the numerics of attention, measured",
    items=items,
    schema=SCHEMA,
    sources=("sweeps/claims", "jaxattn/kernels"),
    table=table,
)
QUICK = FULL
