"""Trials: what a rule makes of a kernel and of itself lifted: with accumulators in float32."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from scipy.stats import binomtest

from jaxattn import inputs, kernels
from jaxattn.formats import BFLOAT16, FLOAT16, FLOAT32, holds
from jaxattn.outputs import outputs
from jaxattn.practice import STATISTICS, Rule, dtype_of
from jaxattn.recipe import Recipe

ACCUMULATORS = (
    "running_max",
    "seen_max",
    "row_sum",
    "rescale",
    "output_rescale",
    "rescaled_sum",
    "running_sum",
    "pv_accum",
    "rescaled_output",
    "output",
    "final_output",
    "inverse",
)
SIZES = {"queries": 16, "heads": 4, "group": 1, "head_dim": 128}  # of the tensors of a search
CONFIDENCE = 0.95
STORED = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}

Array = np.ndarray


def lifted(recipe: Recipe) -> Recipe:
    """The recipe with m, l, row sums, rescale factors, o and 1/l in float32 at least."""
    narrow = [site for site in ACCUMULATORS if holds(FLOAT32, getattr(recipe, site))]
    name = f"{recipe.name} with float32 accumulators"
    return recipe.replace(name=name, **dict.fromkeys(narrow, FLOAT32))


class Tried(NamedTuple):
    """What a rule makes of the kernel and of the lifted one, on some inputs.

    contexts: int [C]
    kernel, lifted: the statistic, [C, seeds]; inf where an output is not finite
    limit:    the rule's
    """

    contexts: Array
    kernel: Array
    lifted: Array
    limit: float

    @property
    def seen(self) -> int | None:
        """The least context at which every seed fails the kernel."""
        return _first(self.contexts, self._all_seen)

    @property
    def useful(self) -> int | None:
        """The least context at which every seed fails the kernel and none the lifted one."""
        return _first(self.contexts, self.tells)

    @property
    def tells(self) -> Array:
        """Contexts at which every seed fails the kernel and none the lifted one: bool [C]."""
        return self._all_seen & ~self._any_alarm

    @property
    def unseen_again(self) -> bool:
        """Whether some seed lets the kernel pass at a longer context than `seen`."""
        return bool((np.diff(self._all_seen.astype(int)) < 0).any())

    @property
    def false_alarm(self) -> int | None:
        """The least context at which any seed fails the lifted kernel."""
        return _first(self.contexts, self._any_alarm)

    @property
    def _all_seen(self) -> Array:
        return np.asarray(np.all(self.kernel > self.limit, axis=1))

    @property
    def _any_alarm(self) -> Array:
        return np.asarray(np.any(self.lifted > self.limit, axis=1))


def _first(contexts: Array, failed: Array) -> int | None:
    found = np.flatnonzero(failed)
    return int(contexts[found[0]]) if found.size else None


def _recipe(one: Recipe | str) -> Recipe:
    return kernels.get(one) if isinstance(one, str) else one


def attempt(
    kernel: Recipe,
    rules: Sequence[Rule],
    regime: str,
    contexts: Sequence[int],
    seeds: Sequence[int],
    sizes: Mapping[str, int] = SIZES,
    by_head: bool = False,
) -> list[Tried]:
    """What each rule makes of the kernel, on a tensor a seed.

    sizes: queries, heads, group and head_dim of the regime; by_head: a tensor for each head
    """
    recipes = [kernel, lifted(kernel)]
    for rule in rules:
        for one in (rule.oracle, rule.baseline):
            if one is not None and _recipe(one) not in recipes:
                recipes.append(_recipe(one))
    found = []
    for seed in seeds:
        query, stream = inputs.regime(
            regime, length=max(contexts), seed=seed, dtype=dtype_of(kernel) or "float16", **sizes
        )
        drawn = outputs(query, stream, None, recipes, contexts=contexts)
        heads = range(query.shape[2])
        for tensor in [slice(n, n + 1) for n in heads] if by_head else [slice(None)]:
            some = drawn.output[:, :, 0, :, tensor]
            exact = drawn.reference[:, 0, :, tensor]
            found.append([_judge(rule, recipes, some, exact) for rule in rules])
    at = np.array(sorted(set(contexts)))
    scores = np.array(found)  # [tensor, rule, kernel or lifted, C]
    return [
        Tried(at, scores[:, i, 0].T, scores[:, i, 1].T, rule.limit) for i, rule in enumerate(rules)
    ]


def _judge(rule: Rule, recipes: list[Recipe], outs: Array, exact: Array) -> list[list[float]]:
    """The statistic of the first two recipes at each context.

    outs: [recipe, C, T, N, D]; exact: [C, T, N, D]
    """
    if rule.stored in STORED:
        with np.errstate(over="ignore"):
            outs, exact = (x.astype(STORED[rule.stored]).astype(np.float64) for x in (outs, exact))
    oracle = exact if rule.oracle is None else outs[recipes.index(_recipe(rule.oracle))]
    units = exact if rule.baseline is None else outs[recipes.index(_recipe(rule.baseline))]

    def score(output: Array, oracle: Array, unit: Array) -> float:
        if not (np.isfinite(output).all() and np.isfinite(oracle).all()):
            return math.inf
        return STATISTICS[rule.statistic](output, oracle, unit, rule.atol)

    return [[score(*x) for x in zip(each, oracle, units, strict=True)] for each in outs[:2]]


class Level(NamedTuple):
    """A limit for one context, and how often it errs.

    limit:       chosen on one half of the samples, of two digits
    lifted, kernel: medians of the statistic
    false_alarm, miss: (how many, of how many, low, high): the lifted kernel fails, the kernel
        passes, in the other half; the interval is Clopper and Pearson's of CONFIDENCE
    """

    context: int
    limit: float
    lifted: float
    kernel: float
    false_alarm: tuple[int, int, float, float]
    miss: tuple[int, int, float, float]


def levels(tried: Tried) -> list[Level]:
    """The limit at each context that tells kernel and the lifted one apart best."""
    half = tried.kernel.shape[1] // 2
    found = []
    for context, bad, good in zip(tried.contexts, tried.kernel, tried.lifted, strict=True):
        limit = separate(good[:half], bad[:half])
        alarms, misses = good[half:] > limit, bad[half:] <= limit
        medians = float(np.median(good)), float(np.median(bad))
        found.append(Level(int(context), limit, *medians, rate(alarms), rate(misses)))
    return found


def separate(good: Array, bad: Array) -> float:
    """The limit that the fewest `good` exceed and the fewest `bad` do not.

    In the middle, on a logarithmic scale, of where that is so; of two digits where that is room
    enough; inf where nothing is finite.
    """
    both = np.concatenate([good, bad])
    tops = np.unique(both[np.isfinite(both)])
    if not tops.size:
        return math.inf
    wrong = [np.sum(good > x) + np.sum(bad <= x) for x in tops]
    best = int(np.argmin(wrong))
    low = max(tops[best], np.finfo(float).tiny)
    above = tops[best + 1] if best + 1 < len(tops) else 100 * low
    middle = math.sqrt(low) * math.sqrt(above)
    rounded = (float(f"{middle:.{digits}e}") for digits in range(1, 17))
    return next((limit for limit in rounded if low <= limit < above), float(low))


def rate(events: Array) -> tuple[int, int, float, float]:
    """How many, of how many, and the interval of the probability."""
    k, n = int(np.sum(events)), len(events)
    interval = binomtest(k, n).proportion_ci(CONFIDENCE, method="exact")
    return k, n, float(interval.low), float(interval.high)
