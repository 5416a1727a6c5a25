"""Jobs cut into calls of error_curves, and dealt among processes.

What a call computes is stored once it returns, and it holds a compiled program for each of its
structures of recipes: a job of many is cut. Its numbers are the same in any company.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from sweeps.plan import Job

MOST_STRUCTURES = 16  # of a call: about a minute to compile; a kernel with its variants is one


@functools.lru_cache(maxsize=4096)
def structure_of(recipe: Any) -> Any:
    from jaxattn import lanes

    return lanes.structure_of(recipe)


def by_structure(recipes: Iterable[Any]) -> dict[Any, list[Any]]:
    """Recipes by what makes them one compiled program."""
    groups: dict[Any, list[Any]] = {}
    for recipe in recipes:
        groups.setdefault(structure_of(recipe), []).append(recipe)
    return groups


def without(job: Job, finished: Iterable[str]) -> Job:
    """The job without the parts that are finished already."""
    done = frozenset(finished)
    return dataclasses.replace(job, parts=tuple(p for p in job.parts if p.key not in done))


def calls_of(jobs: Sequence[Job], finished: Iterable[str] = ()) -> list[Job]:
    """What is not finished, as jobs of at most MOST_STRUCTURES structures, about equal in number.

    Those of the same structures follow each other, input by input: each is compiled once.
    """
    done = frozenset(finished)
    left = [without(job, done) for job in jobs]
    structures = by_structure(recipe for job in left for recipe in job.recipes)
    count = -(-len(structures) // MOST_STRUCTURES)
    group = {structure: i * count // len(structures) for i, structure in enumerate(structures)}
    calls = (_only(job, group, number) for number in range(count) for job in left)
    return [call for call in calls if call.parts]


def _only(job: Job, group: dict[Any, int], number: int) -> Job:
    parts = (part for part in job.parts if group[structure_of(part.recipe)] == number)
    return dataclasses.replace(job, parts=tuple(parts))


def compiling(jobs: Sequence[Job]) -> list[bool]:
    """Whether each job has structures that none before it has."""
    known: set[Any] = set()
    found = []
    for job in jobs:
        structures = by_structure(job.recipes).keys()
        found.append(not structures <= known)
        known |= structures
    return found


def share_of(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """The jobs of process `index` of `count`: the costliest first, each to the one that has least.

    Where there are fewer jobs than processes, the largest are halved. All processes that share the
    same jobs agree, and what they get is every part once.
    """
    pieces = list(jobs)
    while pieces and len(pieces) < count:
        at = max(range(len(pieces)), key=lambda i: len(pieces[i].parts))
        job = pieces[at]
        half = len(job.parts) // 2
        if not half:
            break
        pieces[at : at + 1] = (
            dataclasses.replace(job, parts=parts) for parts in (job.parts[:half], job.parts[half:])
        )
    loads, mine = [0] * count, []
    for at in sorted(range(len(pieces)), key=lambda i: -pieces[i].cost):
        least = loads.index(min(loads))
        loads[least] += pieces[at].cost
        if least == index:
            mine.append(at)
    return [pieces[at] for at in sorted(mine)]
