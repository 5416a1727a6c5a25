"""advise: what a kernel has to change, at least, to hold a tolerance up to a context.

The error of a recipe at a context is a statistic over the rows of an input (its median, unless
asked otherwise), infinite where any row overflows, worst over seeds. A recipe holds up to N if that
error is within the tolerance on every input at every context up to N that is looked at: one that
passes earlier does not hold.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxattn import captures, kernels, lattice, metrics
from jaxattn.candidates import Candidate, front, recommend, staircase, weigher
from jaxattn.cost import WEIGHTS, in_matrix_unit
from jaxattn.curves import error_curves
from jaxattn.formats import unknown
from jaxattn.inputs import REGIMES, regime
from jaxattn.recipe import Recipe
from jaxattn.walk import LONGEST, default_contexts

SHORTEST = 256  # the first context that is looked at
DEFAULT_REGIMES = ("gaussian", "biased_v", "flat", "sink", "uniform01")
SIZES: Mapping[str, int] = {"heads": 1, "queries": 4, "group": 4, "head_dim": 128}
SEEDS = 2
MOST_BASES = 20  # recipes that mitigations are tried on

ROWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "median": lambda x: np.median(x, axis=-1),
    "p99": lambda x: np.percentile(x, 99, axis=-1, method="higher"),
    "max": lambda x: np.max(x, axis=-1),
}
SIGNED = ("bias_l", "bias_o")
NO_ERRORS = ("cosine", "nonfinite")


class Advice(NamedTuple):
    """What advise found. candidates: all that were weighed, the kernel as it stands first; front:
    those that no other beats in error and in every term of the cost, by price; recommended: (what
    it is the cheapest of, candidate); best: the smallest error of all; blocks: the kernel as it
    stands by kv_block, its own first."""

    kernel: Recipe
    metric: str
    tolerance: float
    rows: str
    contexts: tuple[int, ...]
    inputs: tuple[str, ...]
    seeds: int
    weights: dict[str, float]
    candidates: tuple[Candidate, ...]
    blocks: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    recommended: tuple[tuple[str, Candidate], ...]
    best: Candidate

    @property
    def stands(self) -> Candidate:
        return self.candidates[0]

    @property
    def tried(self) -> int:
        return len(self.candidates)


class Source(NamedTuple):
    """One draw of an input: labels of its KV heads, and what error_curves takes."""

    labels: tuple[str, ...]
    arrays: tuple[Any, Any, Any]
    seed: int
    sizes: tuple[int, int]


def parse_tolerance(text: str) -> tuple[str, float]:
    """ "nmse=5e-4" -> ("nmse", 5e-4).

    Raises ValueError for an unknown metric, one that is no error, and a limit that is not positive.
    """
    name, limit = metrics.parse_limit(text)
    if limit is None:
        raise ValueError(f"a tolerance is metric=number, such as nmse=5e-4, got {text!r}")
    metrics.check_names([name])
    if name in NO_ERRORS:
        raise ValueError(f"a tolerance bounds an error, which {name} is not: take nmse or rel_l2")
    return name, limit


def sources_of(
    context: int, inputs: str | Path | None, regimes: Sequence[str] | None, seeds: int
) -> list[Source]:
    """A capture's KV heads, or draws of regimes, of at least `context` keys.

    Raises ValueError where they do not fit.
    """
    if context < SHORTEST:
        raise ValueError(f"context must be at least {SHORTEST} keys, got {context}")
    if context > LONGEST:
        raise ValueError(f"context must be at most {LONGEST} keys, got {context}")
    if inputs is not None:
        if regimes is not None:
            raise ValueError("inputs come from a file or from regimes, not from both")
        capture = captures.load(inputs)
        if context > capture.length:
            raise ValueError(
                f"context {context}: {capture.path} ends after {capture.length} keys; ask for "
                f"{capture.length} or less, or capture a longer one"
            )
        batch = [f"entry {b} " if capture.batch > 1 else "" for b in range(capture.batch)]
        labels = tuple(f"{b}head {h}" for b in batch for h in range(capture.heads))
        arrays = (capture.query, capture.key[:, :context], capture.value[:, :context])
        return [Source(labels, arrays, 0, (capture.head_dim, capture.value_dim))]
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    names = tuple(dict.fromkeys(DEFAULT_REGIMES if regimes is None else regimes))
    for name in names:
        if name not in REGIMES:
            raise unknown("regime", name, REGIMES)
    return [draw(name, context, seed) for seed in range(seeds) for name in names]


def draw(name: str, context: int, seed: int) -> Source:
    query, stream = regime(name, length=context, seed=seed, **SIZES)
    return Source((name,), (query, stream, None), seed, (stream.head_dim, stream.value_dim))


def measure(
    recipes: Sequence[Recipe], source: Source, contexts: Sequence[int], metric: str, rows: str
) -> np.ndarray:
    """float64 [recipe, KV head, context]: the statistic over the rows of each KV head; inf where
    any of them overflows, which a median would hide."""
    curves = error_curves(*source.arrays, recipes, contexts=contexts, metrics=(metric,))
    x = curves.metrics[metric].astype(np.float64)  # [recipe, context, B, T, N]
    x = np.abs(x) if metric in SIGNED else x
    x = np.where(np.isnan(x), np.inf, x)
    R, C, B, T, N = x.shape
    K = len(source.labels) // B

    def by_head(x: np.ndarray) -> np.ndarray:
        split = x.reshape(R, C, B, T, K, N // K)
        return np.moveaxis(split, (2, 4, 1), (1, 2, 3)).reshape(R, B * K, C, -1)

    return np.where(by_head(curves.overflow).any(axis=-1), np.inf, ROWS[rows](by_head(x)))


def advise(
    kernel: Recipe | str,
    context: int,
    tolerance: str,
    *,
    inputs: str | Path | None = None,
    regimes: Sequence[str] | None = None,
    formats: Sequence[str] = lattice.FORMATS,
    sites: Sequence[str] = lattice.ACCUMULATORS,
    seeds: int = SEEDS,
    rows: str = "median",
    weights: Mapping[str, float] = WEIGHTS,
    progress: Callable[[str], object] = lambda line: None,
) -> Advice:
    """The front of error against cost around a kernel, and the cheapest recipe that holds.

    context:   keys up to which the tolerance is to hold
    tolerance: "nmse=5e-4", of an error in jaxattn.metrics
    inputs:    a capture (jaxattn.captures); or regimes: names, DEFAULT_REGIMES by default, of
               `seeds` seeds each
    formats:   allowed at `sites`; what else is tried is in lattice.py
    rows:      a name of ROWS
    weights:   of the terms of the cost, for sorting
    progress:  called with a line before each piece of work

    All formats at the kernel's own KV block come first, then mitigations of the cheap ones.
    Raises ValueError where arguments do not fit.
    """
    kernel = kernels.get(kernel) if isinstance(kernel, str) else kernel
    metric, limit = parse_tolerance(tolerance)
    if rows not in ROWS:
        raise unknown("statistic of rows", rows, ROWS)
    first = lattice.accumulators(kernel, formats, sites)
    sources = sources_of(context, inputs, regimes, seeds)
    contexts = default_contexts(context)
    names = tuple(dict.fromkeys(label for source in sources for label in source.labels))

    def errors(recipes: Sequence[Recipe], what: str) -> np.ndarray:
        found = np.zeros((len(recipes), len(names), len(contexts)))
        for i, source in enumerate(sources):
            progress(f"{what}: {source.labels[0]}, seed {source.seed} ({i + 1}/{len(sources)})")
            at = [names.index(label) for label in source.labels]
            found[:, at] = np.maximum(
                found[:, at], measure(recipes, source, contexts, metric, rows)
            )
        return found

    unit = kernel.output if in_matrix_unit(kernel) else None
    measured = errors(first, f"{len(first)} recipes of formats")
    weigh = weigher(kernel, measured[0], names, contexts, limit, sources[0].sizes, unit, weights)
    candidates = [weigh(*each) for each in zip(first, measured, strict=True)]
    blocks = lattice.by_block(kernel)
    further = [r for base in _bases(candidates) for r in lattice.mitigations(base.recipe)]
    known = set(first)
    more = [r for r in dict.fromkeys([*blocks, *further]) if r not in known]
    if more:
        measured = errors(more, f"{len(more)} recipes of mitigations")
        candidates += [weigh(*each) for each in zip(more, measured, strict=True)]

    of = {candidate.recipe: candidate for candidate in candidates}
    return Advice(
        kernel=kernel,
        metric=metric,
        tolerance=limit,
        rows=rows,
        contexts=tuple(contexts),
        inputs=names,
        seeds=1 if inputs is not None else seeds,
        weights=dict(weights),
        candidates=tuple(candidates),
        blocks=tuple(of[recipe] for recipe in dict.fromkeys([kernel, *blocks])),
        front=tuple(front(candidates)),
        recommended=tuple(recommend(candidates, limit)),
        best=min(candidates, key=lambda c: (c.worst, c.price)),
    )


def _bases(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that mitigations are tried on: the kernel itself, and what is better than
    all that is cheaper on some input, or on all, the cheapest of them first."""
    stairs = [staircase(candidates, [i]) for i in range(len(candidates[0].errors))]
    stairs.append(staircase(candidates))
    steps = itertools.chain(*itertools.zip_longest(*stairs))
    chosen = {id(step): step for step in (candidates[0], *steps) if step is not None}
    return list(chosen.values())[:MOST_BASES]
