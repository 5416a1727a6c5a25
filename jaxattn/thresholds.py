"""thresholds: would a test notice what a kernel's narrow accumulators do, and which one would.

The kernel is set beside itself with accumulators in float32: a test is of use where it lets the one
pass and not the other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from scipy.stats import binomtest

from jaxattn import inputs, kernels
from jaxattn.formats import BFLOAT16, FLOAT16, FLOAT32, holds, unknown
from jaxattn.outputs import outputs
from jaxattn.practice import MATRICES, RULES, STATISTICS, Matrix, Rule, dtype_of, in_dtype
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
REGIMES = ("uniform11", "gaussian", "biased_v")  # those of the tests, and V with a mean
SHORTEST, LONGEST, SEEDS, SAMPLES = 256, 32_768, 3, 64
SIZES = {"queries": 16, "heads": 4, "group": 1, "head_dim": 128}  # of the tensors of a search
SAMPLE_HEADS = 8  # samples that are drawn at once: one head's queries are one
SAMPLE_SIZES = SIZES | {"heads": SAMPLE_HEADS}
CONFIDENCE = 0.95
SHAPE_DRAWS = 8  # of each shape that is proposed
STORED = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
FIRST_SAMPLE = 1000  # the seed of the first: searches have those from 0

Array = np.ndarray


def corrected(recipe: Recipe) -> Recipe:
    """The recipe with m, l, row sums, rescale factors, o and 1/l in float32 at least."""
    narrow = [site for site in ACCUMULATORS if holds(FLOAT32, getattr(recipe, site))]
    name = f"{recipe.name} with float32 accumulators"
    return recipe.replace(name=name, **dict.fromkeys(narrow, FLOAT32))


class Tried(NamedTuple):
    """What a rule makes of the kernel and of the corrected one, on some inputs.

    contexts: int [C]
    kernel, correct: the statistic, [C, seeds]; inf where an output is not finite
    limit:    the rule's
    """

    contexts: Array
    kernel: Array
    correct: Array
    limit: float

    @property
    def seen(self) -> int | None:
        """The least context at which every seed fails the kernel."""
        return _first(self.contexts, self._all_seen)

    @property
    def useful(self) -> int | None:
        """The least context at which every seed fails the kernel and none the corrected one."""
        return _first(self.contexts, self.tells)

    @property
    def tells(self) -> Array:
        """Contexts at which every seed fails the kernel and none the corrected one: bool [C]."""
        return self._all_seen & ~self._any_alarm

    @property
    def unseen_again(self) -> bool:
        """Whether some seed lets the kernel pass at a longer context than `seen`."""
        return bool((np.diff(self._all_seen.astype(int)) < 0).any())

    @property
    def false_alarm(self) -> int | None:
        """The least context at which any seed fails the corrected kernel."""
        return _first(self.contexts, self._any_alarm)

    @property
    def _all_seen(self) -> Array:
        return np.asarray(np.all(self.kernel > self.limit, axis=1))

    @property
    def _any_alarm(self) -> Array:
        return np.asarray(np.any(self.correct > self.limit, axis=1))


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
    recipes = [kernel, corrected(kernel)]
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
    scores = np.array(found)  # [tensor, rule, kernel or correct, C]
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
    correct, kernel: medians of the statistic
    false_alarm, miss: (how many, of how many, low, high): the corrected kernel fails, the kernel
        passes, in the other half; the interval is Clopper and Pearson's of CONFIDENCE
    """

    context: int
    limit: float
    correct: float
    kernel: float
    false_alarm: tuple[int, int, float, float]
    miss: tuple[int, int, float, float]


def levels(tried: Tried) -> list[Level]:
    """The limit at each context that tells kernel and corrected kernel apart best."""
    half = tried.kernel.shape[1] // 2
    found = []
    for context, bad, good in zip(tried.contexts, tried.kernel, tried.correct, strict=True):
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


class Thresholds(NamedTuple):
    """Answers about one kernel.

    matrices: the tests that were tried: those of tensors that the kernel takes
    practice: matrix -> its own test, at its own contexts
    search:   (matrix or "" for the rule asked about, regime) -> the same at octaves of contexts
    levels:   regime -> limits of the rule asked about, by context
    shapes:   matrix -> the shape to add to it, that failed the kernel in most draws and the
        corrected one in none, where there is one
    """

    kernel: Recipe
    rule: Rule
    matrices: tuple[Matrix, ...]
    practice: dict[str, Tried]
    search: dict[tuple[str, str], Tried]
    levels: dict[str, list[Level]]
    shapes: dict[str, "Shape"]


class Shape(NamedTuple):
    """A context that a test may add, with these inputs: in how many fresh tensors of the test's own
    size its rule fails the kernel, and in how many the corrected one."""

    regime: str
    context: int
    seen: int
    alarms: int
    draws: int

    @property
    def tells(self) -> bool:
        """Whether most draws fail the kernel, and none the corrected one."""
        return not self.alarms and 2 * self.seen > self.draws


def thresholds(
    kernel: Recipe,
    rule: Rule = RULES["nmse_llama"],
    *,
    max_context: int = LONGEST,
    seeds: int = SEEDS,
    samples: int = SAMPLES,
    matrices: Sequence[Matrix] = MATRICES,
    regimes: Sequence[str] = REGIMES,
    progress: Callable[[str], None] = lambda line: None,
) -> Thresholds:
    """What tests in practice see of the kernel's accumulators, where one would see them, and a
    limit for each context.

    max_context: contexts are searched in octaves from SHORTEST; a matrix's own may exceed it
    seeds:   of each test, of SIZES in the search
    samples: tensors of QUERIES of one head, for the limits
    Raises ValueError where max_context, seeds or samples are out of range, or a regime is unknown.
    """
    for regime in regimes:
        if regime not in inputs.REGIMES:
            raise unknown("inputs", regime, inputs.REGIMES)
    if not SHORTEST <= max_context <= 2**20:
        raise ValueError(f"max_context must be from {SHORTEST} to {2**20} keys, got {max_context}")
    if not 1 <= seeds <= FIRST_SAMPLE:
        raise ValueError(f"seeds must be from 1 to {FIRST_SAMPLE}, got {seeds}")
    if samples < 2 * SAMPLE_HEADS or samples % SAMPLE_HEADS:
        raise ValueError(
            f"samples must be a multiple of {SAMPLE_HEADS}, two at least, got {samples}"
        )
    dtype = dtype_of(kernel)
    rule = in_dtype(rule, dtype)
    matrices = [m._replace(rule=in_dtype(m.rule, dtype)) for m in matrices if dtype in m.dtypes]
    octaves = [SHORTEST << i for i in range(21) if SHORTEST << i <= max_context]
    practice: dict[str, Tried] = {}
    search: dict[tuple[str, str], Tried] = {}
    limits: dict[str, list[Level]] = {}
    for matrix in matrices:
        progress(f"{matrix.name}: its own shapes")
        (practice[matrix.name],) = attempt(
            kernel, [matrix.rule], matrix.inputs, matrix.contexts, range(seeds), matrix.sizes
        )
    rules = {"": rule} | {matrix.name: matrix.rule for matrix in matrices}
    for regime in regimes:
        progress(f"{regime}: {octaves[0]:,} to {octaves[-1]:,} keys")
        found = attempt(kernel, list(rules.values()), regime, octaves, range(seeds))
        search |= {(name, regime): x for name, x in zip(rules, found, strict=True)}
        progress(f"{regime}: {samples} samples")
        draws = range(FIRST_SAMPLE, FIRST_SAMPLE + samples // SAMPLE_HEADS)
        (sample,) = attempt(kernel, [rule], regime, octaves, draws, SAMPLE_SIZES, by_head=True)
        limits[regime] = levels(sample)
    shapes: dict[str, Shape] = {}
    for matrix in matrices:
        for place in _places(search, matrix, regimes):
            progress(f"{matrix.name}: {place[1]:,} keys of {place[0]}, at its own size")
            shape = _tried(kernel, matrix, *place)
            if shape.tells:
                shapes[matrix.name] = shape
                break
    return Thresholds(kernel, rule, tuple(matrices), practice, search, limits, shapes)


def _places(
    search: Mapping[tuple[str, str], Tried], matrix: Matrix, regimes: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """Inputs and numbers of keys at which the search found the matrix's rule of use: its own inputs
    first, and few keys."""
    for regime in sorted(regimes, key=lambda regime: regime != matrix.inputs):
        tried = search[matrix.name, regime]
        yield from ((regime, int(n)) for n in tried.contexts[tried.tells])


def _tried(kernel: Recipe, matrix: Matrix, regime: str, context: int) -> Shape:
    draws = range(FIRST_SAMPLE, FIRST_SAMPLE + SHAPE_DRAWS)
    (tried,) = attempt(kernel, [matrix.rule], regime, [context], draws, matrix.sizes)
    seen, alarms = (int(np.sum(x > tried.limit)) for x in (tried.kernel, tried.correct))
    return Shape(regime, context, seen, alarms, SHAPE_DRAWS)
