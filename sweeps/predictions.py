"""Predictions of jaxattn.theory beside the rows of a grid study, in DIR/_predicted.parquet.

A curve takes the theory a second or two, hardly less than a run of it, and its sources are not
those of the rows: predictions are made where they are asked for, and stand apart from the parts.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from sweeps.keys import sources_hash
from sweeps.plan import Inputs, Job, Part
from sweeps.run import Progress
from sweeps.store import PREDICTED, write_whole

ALL_HEADS = -1
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "theory", "recipe", "inputs", "block")),
        *((name, pa.int32()) for name in ("head", "context")),
        ("nmse", pa.float64()),
        *((name, pa.bool_()) for name in ("stagnated", "overflow")),
    ]
)


def add(jobs: Sequence[Job], root: Path, progress: Progress) -> list[str]:
    """Predict every curve of the first seed of each input; what is not predicted, in words.

    key: of the part that holds the curve; theory: a hash of its sources; head: of a capture, or
    ALL_HEADS. Curves that were predicted before are kept; each input is stored once it is whole.
    """
    from jaxattn import theory

    version, path = _version(), root / PREDICTED
    first = {job.inputs.label: job for job in reversed(jobs)}
    some = [first[label] for label in dict.fromkeys(job.inputs.label for job in jobs)]
    steady = [job for job in some if _steady(job.inputs)]
    parts = [part for job in steady for part in job.parts if not theory.outside(part.recipe)]
    rows = _read(path, version, {part.key for part in parts})
    there = set(rows["key"].to_pylist())
    todo = {part.key: part for part in parts if part.key not in there}
    progress.plan([part.contexts[-1] for part in todo.values()])
    for job in steady:
        missing = [part for part in job.parts if part.key in todo]
        moments = _moments(job.inputs) if missing else {}
        found = []
        for part in missing:
            label = f"theory: {part.inputs.label}, {part.name}, KV block {part.block}"
            progress.start(label, brief=True)
            found += [_rows(part, head, x, version) for head, x in moments.items()]
            progress.finish()
        if found:
            rows = pa.concat_tables([rows, *found])
            write_whole(path, functools.partial(pa.parquet.write_table, rows))
    why = {part.name: theory.outside(part.recipe) for job in some for part in job.parts}
    notes = [f"not predicted: {name}: {reason}" for name, reason in why.items() if reason]
    moving = [job.inputs.label for job in some if not _steady(job.inputs)]
    if moving:
        notes.append(f"not predicted: {', '.join(moving)}: a key's score depends on its place")
    return notes


def _steady(inputs: Inputs) -> bool:
    """Whether the first keys tell of the others: no regime lifts some by their place."""
    from jaxattn.inputs import REGIMES

    return inputs.kind == "capture" or REGIMES[inputs.arrays[1].name].logit is None


def _moments(inputs: Inputs) -> dict[int, Any]:
    """Of all heads of a regime together, of each head of a capture alone."""
    from jaxattn import theory

    query, key, value = inputs.arrays
    if inputs.kind != "capture":
        return {ALL_HEADS: theory.measured(query, key)}
    group = query.shape[2] // key.shape[2]
    heads = [(slice(n, n + 1), slice(n // group, n // group + 1)) for n in range(query.shape[2])]
    return {
        n: theory.measured(query[:, :, one], key[:, :, other], value[:, :, other])
        for n, (one, other) in enumerate(heads)
    }


def _rows(part: Part, head: int, moments: Any, version: str) -> pa.Table:
    from jaxattn import theory

    found = theory.predict(part.recipe, moments, list(part.contexts))
    count = len(part.contexts)
    words = (part.key, version, part.name, part.inputs.label, part.block)
    numbers = (np.full(count, head), found.contexts, found.nmse)
    flags = (found.stagnated >= 0.5, found.overflow >= 0.5)
    columns = [*([word] * count for word in words), *numbers, *flags]
    return pa.table([pa.array(x, f.type) for x, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def _read(path: Path, version: str, keys: set[str]) -> pa.Table:
    """What is stored of these parts by this version of the theory; nothing of a file that is not
    ours or cannot be read."""
    try:
        rows = pa.parquet.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException):
        return SCHEMA.empty_table()
    same = [
        v == version and k in keys
        for v, k in zip(*(rows[c].to_pylist() for c in ("theory", "key")), strict=True)
    ]
    return rows.filter(pa.array(same, pa.bool_()))


def _version() -> str:
    from jaxattn import theory

    return sources_hash(Path(str(theory.__file__)).parent)
