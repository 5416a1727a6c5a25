"""thresholds: would a test notice what a kernel's narrow accumulators do, and which one would.

The kernel is set beside itself with accumulators in float32: a test is of use where it lets the one
pass and not the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxattn import inputs
from jaxattn.formats import unknown
from jaxattn.practice import MATRICES, RULES, Matrix, Rule, dtype_of, in_dtype
from jaxattn.recipe import Recipe
from jaxattn.trials import SIZES, Level, Tried, attempt, levels

REGIMES = ("uniform11", "gaussian", "biased_v")  # those of the tests, and V with a mean
SHORTEST, LONGEST, SEEDS, SAMPLES = 256, 32_768, 3, 64
SAMPLE_HEADS = 8  # samples that are drawn at once: one head's queries are one
SAMPLE_SIZES = SIZES | {"heads": SAMPLE_HEADS}
SHAPE_DRAWS = 8  # of each shape that is proposed
FIRST_SAMPLE = 1000  # the seed of the first: searches have those from 0


class Thresholds(NamedTuple):
    """Answers about one kernel.

    matrices: the tests that were tried: those of tensors that the kernel takes
    practice: matrix -> its own test, at its own contexts
    search:   (matrix or "" for the rule asked about, regime) -> the same at octaves of contexts
    levels:   regime -> limits of the rule asked about, by context
    shapes:   matrix -> the shape to add to it, that failed the kernel in most draws and the
        lifted one in none, where there is one
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
    size its rule fails the kernel, and in how many the lifted one."""

    regime: str
    context: int
    seen: int
    alarms: int
    draws: int

    @property
    def tells(self) -> bool:
        """Whether most draws fail the kernel, and none the lifted one."""
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
            raise unknown("regime", regime, inputs.REGIMES)
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
    seen, alarms = (int(np.sum(x > tried.limit)) for x in (tried.kernel, tried.lifted))
    return Shape(regime, context, seen, alarms, SHAPE_DRAWS)
