"""Candidates: recipes with their errors and their cost, and which of them are worth naming."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxattn import lattice
from jaxattn.cost import Cost, cost, price
from jaxattn.formats import Format
from jaxattn.recipe import Recipe

# Said to be worse: an error that grows by over a tenth, where it is over a hundredth of the limit.
WORSE, MATTERS = 1.1, 0.01


class Worse(NamedTuple):
    """Where a recipe is worse than the kernel as it stands: the errors at `context`, and their
    ratio, the largest of this input."""

    input: str
    context: int
    before: float
    after: float
    ratio: float


class Candidate(NamedTuple):
    """A recipe weighed: change: field -> value, as --set takes it; errors [input, context];
    worst, input, context: its largest error and where; safe: the longest context up to which it
    holds (0: none); fails: the next one and the input that fails there, or None; worse: see Worse.
    """

    recipe: Recipe
    change: dict[str, str]
    cost: Cost
    price: float
    errors: np.ndarray
    worst: float
    input: str
    context: int
    safe: int
    fails: tuple[int, str] | None
    worse: tuple[Worse, ...]


def weigher(
    kernel: Recipe,
    before: np.ndarray,
    names: Sequence[str],
    contexts: Sequence[int],
    limit: float,
    sizes: tuple[int, int],
    unit: Format | None,
    weights: Mapping[str, float],
) -> Callable[[Recipe, np.ndarray], Candidate]:
    def weigh(recipe: Recipe, errors: np.ndarray) -> Candidate:
        of = cost(recipe, contexts[-1], *sizes, unit)
        i, j = (int(at) for at in np.unravel_index(np.argmax(errors), errors.shape))
        passed = np.flatnonzero((errors > limit).any(axis=0))
        held = contexts[: passed[0]] if len(passed) else contexts
        fails = None
        if len(passed):
            fails = (contexts[passed[0]], names[int(np.argmax(errors[:, passed[0]]))])
        return Candidate(
            recipe=recipe,
            change=lattice.change(kernel, recipe),
            cost=of,
            price=price(of, weights),
            errors=errors,
            worst=float(errors[i, j]),
            input=names[i],
            context=contexts[j],
            safe=held[-1] if len(held) else 0,
            fails=fails,
            worse=tuple(worse(before, errors, names, contexts, limit)),
        )

    return weigh


def worse(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    contexts: Sequence[int],
    limit: float,
) -> list[Worse]:
    """The inputs on which errors [input, context] after a change pass those before it, at some
    context, by WORSE and where it MATTERS; the largest ratio of each input."""
    found = []
    for name, was, now in zip(names, before, after, strict=True):
        grown = (now > was) & (now > MATTERS * limit)  # not from one infinity to another
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(grown, now / was, 1.0)
        at = int(np.argmax(ratios))
        if ratios[at] > WORSE:
            found.append(
                Worse(name, contexts[at], float(was[at]), float(now[at]), float(ratios[at]))
            )
    return found


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other equals or beats in error and every term of the cost, by price.

    Of equals, the one with the fewest changes.
    """
    ordered = sorted(candidates, key=lambda c: (c.price, c.worst, len(c.change)))
    points = np.array([(c.worst, *c.cost) for c in ordered])
    kept = []
    for i, point in enumerate(points):
        no_more = (points <= point).all(axis=1)
        less = no_more & (points < point).any(axis=1)
        same_before = no_more[:i] & (points[:i] == point).all(axis=1)
        if not less.any() and not same_before.any():
            kept.append(ordered[i])
    return kept


def staircase(
    candidates: Sequence[Candidate], inputs: Sequence[int] | None = None
) -> list[Candidate]:
    """Those with less error than all that is cheaper, by price; on all inputs, or on some."""
    largest = {
        id(c): float((c.errors if inputs is None else c.errors[inputs]).max()) for c in candidates
    }
    steps: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.price, largest[id(c)], len(c.change))):
        if not steps or largest[id(candidate)] < largest[id(steps[-1])]:
            steps.append(candidate)
    return steps


def recommend(candidates: Sequence[Candidate], limit: float) -> list[tuple[str, Candidate]]:
    """The cheapest that hold: of all, and of those that leave alone what may not be changed.

    Of prices that print alike, the one with the fewest changes.
    """
    classes: dict[str, Callable[[Candidate], bool]] = {
        "cheapest that holds": lambda c: True,
        "at the same KV block": lambda c: "kv_block" not in c.change,
        "worse on no input": lambda c: not c.worse,
        "by one change": lambda c: len(c.change) == 1,
        "by formats alone": lambda c: set(c.change) <= set(lattice.ACCUMULATORS),
    }
    found: dict[int, tuple[str, Candidate]] = {}
    for title, belongs in classes.items():
        some = [c for c in candidates if c.worst <= limit and belongs(c)]
        if some:
            one = min(some, key=lambda c: (float(f"{c.price:.3e}"), len(c.change), c.worst))
            before = found.get(id(one))
            found[id(one)] = (f"{before[0]}; {title}" if before else title, one)
    return list(found.values())
