"""What a run takes, said before it starts: memory within a factor of two, time within a few.

Fitted to the peak resident memory and to the time of error_curves on two CPU cores; the largest
terms are one compiled step's scores and weights, the float64 outputs that a context's errors are
taken of, and the keys that each pass over them holds.
"""

import functools
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sweeps.calls import by_structure
from sweeps.plan import TILE_KEYS, Job

TILE_ARRAYS = 5  # arrays of the size of a tile's scores that a step has at once
OUTPUT_ARRAYS = 5  # float64 arrays of the size of the outputs that are measured at once
ROW_BYTES = 6 * 4 + 2  # the metrics and flags of one recipe, context and query row
TABLE_BYTES = 150  # a row of a part that is being written
PROGRAM_BYTES = 25 * 2**20  # compiled, or being compiled: one structure of recipes
COMPILING = 5.0  # seconds, likewise, where no cache has it
LOADING = 1.0  # where one has
BASE_BYTES = 60 * 2**20  # of XLA itself
SPEED = 2e9  # products of a query's and a key's, or a weight and a value's, entries per second
CONTAINER = Path("/sys/fs/cgroup")
LONG = 60.0  # seconds from which on a run is worth a word about its length


class Estimate(NamedTuple):
    """memory in bytes; seconds, on a machine like the one that this was fitted on."""

    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} and {size(self.memory)} of memory"


def estimate(jobs: Iterable[Job], before: Collection[Any] = ()) -> Estimate:
    """Of jobs one after another, each a call; before: recipes of parts that are finished."""
    jobs = list(jobs)
    programs = {tuple(some) for job in jobs for some in by_structure(job.recipes).values()}
    cached = sum(set(some) <= set(before) for some in programs)
    return Estimate(
        max((_memory(job) for job in jobs), default=0),
        LOADING * cached
        + COMPILING * (len(programs) - cached)
        + sum(_work(job) for job in jobs) / SPEED,
    )


def refuse(needed: Estimate, free: int) -> None:
    """Raises ValueError where the memory that is needed is not there."""
    if needed.memory > free:
        raise ValueError(
            f"this needs {needed}, and {size(free)} are free; take fewer --recipes, a shorter "
            "--max-context, or inputs of fewer queries and heads"
        )


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, its container and its own limit."""
    import psutil

    free = [psutil.virtual_memory().available]
    for limit, used in (  # a container's, of either generation
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            texts = [(CONTAINER / name).read_text() for name in (limit, used)]
            free.append(int(texts[0]) - int(texts[1]))
        except (OSError, ValueError):  # none, or "max"
            continue
    process = psutil.Process()
    if hasattr(process, "rlimit"):
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free.append(limit - process.memory_info().vms)
    return max(0, min(free))


def _memory(job: Job) -> int:
    query, inputs = job.inputs.arrays[0], job.inputs
    sizes = (np.shape(query), inputs.heads, inputs.value_dim, query.dtype.itemsize)
    return _bytes(job.recipes, job.contexts, *sizes)


@functools.lru_cache(maxsize=64)  # the jobs of a study are of the same recipes
def _bytes(
    recipes: tuple[Any, ...],
    C: tuple[int, ...],
    shape: tuple[int, ...],
    heads: int,
    D: int,
    itemsize: int,
) -> int:
    from jaxattn.errors import IN_CACHE
    from jaxattn.exact import thread_count
    from jaxattn.pages import KEPT, PAGE_KEYS
    from jaxattn.reference import KEYS_PER_PIECE
    from jaxattn.tiles import tile_of

    rows, H = math.prod(shape[:3]), shape[3]
    results = len(recipes) * len(C) * rows * ROW_BYTES + len(C) * rows * (TABLE_BYTES + 8 * D)
    piece = heads * (H + D) * min(PAGE_KEYS, C[-1]) * itemsize
    # Of the float64 reference: what its threads work on, and what they make of a page.
    scores = thread_count() * (H + D + rows // heads) * KEYS_PER_PIECE * 8
    sums = min(PAGE_KEYS, C[-1]) / KEYS_PER_PIECE * rows * D * 8
    held, step, outputs = 4 * piece + scores + int(sums), 0, 0
    if not all(recipe.one_walk for recipe in recipes):
        held += min(KEPT, heads * (H + D) * C[-1] * itemsize)
    groups = by_structure(recipes).values()
    for members in groups:
        layouts = {tile_of(members[0].kv_block, n, H, D, TILE_KEYS): n for n in C}
        width = 8 if members[0].storage == "float64" else 4
        lanes = len(members)
        waiting = sum(n > PAGE_KEYS for n in layouts.values())  # for the others to catch up
        held += waiting * (piece + 2 * lanes * rows * D * width) + rows * H * width
        tile = max(tile.width * tile.blocks for tile in layouts)
        # p·v of each block, but where each key's is added as it is made
        values = max(tile.blocks * D * (tile.width > 1) for tile in layouts)
        step = max(step, lanes * rows * (TILE_ARRAYS * tile + values) * width)
        some = max(rows * D, min(lanes * rows * D, IN_CACHE))
        outputs = max(outputs, OUTPUT_ARRAYS * some * 8)
    return BASE_BYTES + results + held + step + outputs + PROGRAM_BYTES * len(groups)


def _work(job: Job) -> float:
    """Products to make: of every key, and of half a tile more for each context that is reported;
    of all keys of each context, where each has walks of its own."""
    from jaxattn.tiles import TILE_KEYS as TILE

    shape, C = np.shape(job.inputs.arrays[0]), job.contexts
    again = sum(not recipe.one_walk for recipe in job.recipes)
    keys = len(job.parts) * (C[-1] + len(C) * TILE / 2) + again * (sum(C) - C[-1])
    return keys * math.prod(shape[:3]) * (shape[3] + job.inputs.value_dim)


def duration(seconds: float) -> str:
    """In the largest unit that there are two of, roughly."""
    units = (("years", 31557600.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    for name, unit in units:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.0f} seconds"


def size(count: float) -> str:
    """Bytes in GB, two digits."""
    return f"{float(f'{count / 1e9:.2g}'):,g} GB"
