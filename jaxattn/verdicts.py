"""Thresholds in words: would the tests notice, where would they, and what to write instead."""

from typing import Any

import numpy as np

from jaxattn.formats import name_of
from jaxattn.practice import MATRICES, Matrix, Rule, dtype_of
from jaxattn.recipe import beside
from jaxattn.thresholds import SAMPLE_SIZES, Thresholds
from jaxattn.trials import ACCUMULATORS, CONFIDENCE, SIZES, Tried, lifted

WORDS = {
    "nmse": "NMSE",
    "nmse_llama": "NMSE over the output's square",
    "max_abs": "largest error",
    "close": "allclose at rtol = atol",
    "times_baseline": "largest error in units of unfused PyTorch's",
}
SOUND = "Its accumulators are float32 already: there is nothing to lift."
_TRIED = f"{SIZES['queries']} queries of each of {SIZES['heads']} heads"


def rule_text(rule: Rule) -> str:
    oracle = "float64" if rule.oracle is None else getattr(rule.oracle, "name", rule.oracle)
    rest = f" (and {rule.atol:g})" if rule.atol else ""
    return f"{WORDS[rule.statistic]} <= {rule.limit:g}{rest}, against {oracle}"


def noticed(tried: Tried) -> str:
    """`seen from 4,096`, with ~ where not at all longer ones, and whether that means anything."""
    seen, alarm = tried.seen, tried.false_alarm
    sometimes = bool((tried.kernel > tried.limit).any())
    words = "seen in some draws only" if sometimes else "not seen"
    words = words if seen is None else f"seen from {seen:,}" + "~" * tried.unseen_again
    return words if alarm is None else f"{words}; fails the lifted one too, from {alarm:,}"


def text(found: Thresholds) -> list[str]:
    """Lines for people."""
    regimes = list(found.levels)
    lines = [
        f"{found.kernel.name}, beside the same kernel with its max, sums, o and 1/l in float32"
        " (`lifted`)",
        *([SOUND] if sound(found) else least(found)),
        *_beyond(found),
        "",
        "The tests as they are, at their own contexts (statistic at the longest, median of seeds)",
    ]
    dtype = dtype_of(found.kernel)
    if others := [matrix.name for matrix in MATRICES if dtype not in matrix.dtypes]:
        dtype = dtype or name_of(found.kernel.query)
        lines.append(f"  not run on {dtype} tensors here: {', '.join(others)}")
    for matrix in found.matrices:
        own = found.practice[matrix.name]
        kernel, other = np.median(own.kernel[-1]), np.median(own.lifted[-1])
        lines += [
            f"  {matrix.name}: {rule_text(matrix.rule)}",
            f"    {matrix.inputs}, {_numbers(own.contexts)} keys: {noticed(own)}"
            f" ({kernel:.2g}; lifted {other:.2g})",
            f"    not tried: {matrix.partial}",
        ]
    longest = found.search["", regimes[0]].contexts[-1]
    lines += ["", f"The same rules at longer contexts, to {longest:,} keys, on {_TRIED}"]
    for name in ("", *(matrix.name for matrix in found.matrices)):
        lines.append(f"  {name or 'the rule asked about: ' + rule_text(found.rule)}")
        lines += [f"    {regime}: {noticed(found.search[name, regime])}" for regime in regimes]
    if sound(found):
        return lines
    statistic = WORDS[found.rule.statistic]
    lines += [
        "",
        f"A limit for each context: {statistic} against float64, of one head's 16 queries",
    ]
    for regime in regimes:
        lines.append(
            f"  {regime:<12}{'keys':>9}{'lifted':>10}{'kernel':>10}{'limit':>10}"
            f"{'false alarms':>24}{'misses':>24}"
        )
        for level in found.levels[regime]:
            lines.append(
                f"  {'':<12}{level.context:>9,}{level.lifted:>10.2g}{level.kernel:>10.2g}"
                f"{level.limit:>10.2g}{_rate(level.false_alarm):>24}{_rate(level.miss):>24}"
            )
    lines += [
        f"  (of the half of the samples that did not choose the limit; {CONFIDENCE:.0%} interval."
        " ~: some draw lets it pass again at a longer context)",
    ]
    if found.matrices:
        lines += [
            "",
            "What to add: the fewest keys, of the test's own inputs if these show it, in fresh"
            " draws at its own size",
        ]
    for matrix in found.matrices:
        lines += [f"  {matrix.name}", *(f"    {line}" for line in advice(found, matrix))]
    return lines


def sound(found: Thresholds) -> bool:
    """Whether the kernel is itself when lifted, so that no limit tells them apart."""
    return lifted(found.kernel).identity() == found.kernel.identity()


def least(found: Thresholds) -> list[str]:
    """Where the fewest keys are enough."""
    places = [(tried.useful, *place) for place, tried in found.search.items()]
    seen = [(keys, name, regime) for keys, name, regime in places if keys is not None]
    if not seen:
        return ["None of these rules sees it and lets the lifted one pass."]
    keys, name, regime = min(seen, key=lambda place: place[0])
    rule = name or rule_text(found.rule)
    return [
        f"The fewest keys at which one sees it and lets the lifted one pass: {keys:,},"
        f" with inputs {regime} ({rule})"
    ]


def _beyond(found: Thresholds) -> list[str]:
    """Where float32 accumulators do not help."""
    places = [(regime, found.search["", regime].false_alarm) for regime in found.levels]
    some = [f"{regime} from {keys:,} keys" for regime, keys in places if keys is not None]
    if not some:
        return []
    others = ", ".join(beside(found.kernel, ACCUMULATORS)) or "in no format or function"
    return [
        f"Lifted, it fails the rule asked about on {', '.join(some)}: what is wrong there is"
        f" elsewhere ({others})"
    ]


def _numbers(contexts: np.ndarray) -> str:
    return " / ".join(f"{n:,}" for n in contexts)


def _rate(rate: tuple[int, int, float, float]) -> str:
    k, n, low, high = rate
    return f"{k}/{n} ({low:.1%} to {high:.1%})"


def advice(found: Thresholds, matrix: Matrix) -> list[str]:
    """A shape that would see the kernel by the test's own rule, or else a limit that would."""
    shape = found.shapes.get(matrix.name)
    if shape is not None:
        inputs = "its own inputs" if shape.regime == matrix.inputs else f"inputs {shape.regime}"
        return [
            matrix.shape.format(keys=shape.context),
            f"sees it in {shape.seen} of {shape.draws} draws of this shape, with {inputs}",
        ]
    regime = matrix.inputs if matrix.inputs in found.levels else next(iter(found.levels))
    told = [x for x in found.levels[regime] if max(x.false_alarm[0], x.miss[0]) == 0]
    if not told:
        return ["no context of these tells the kernel from the lifted one by a limit"]
    level, queries = told[0], SAMPLE_SIZES["queries"]
    return [
        matrix.shape.format(keys=level.context),
        f"by its own limit does not see it; {WORDS[found.rule.statistic]} <= {level.limit:g}, of"
        f" {queries} queries of each head against float64, does in {level.miss[1]} of"
        f" {level.miss[1]} samples of inputs {regime}",
    ]


def to_dict(found: Thresholds) -> dict[str, Any]:
    """The answers in values that JSON knows, what is not finite left to `compare_text.plain`."""

    def tried(x: Tried) -> dict[str, Any]:
        return {
            "contexts": x.contexts,
            "limit": x.limit,
            "kernel": x.kernel,
            "lifted": x.lifted,
            "seen_from": x.seen,
            "false_alarm_from": x.false_alarm,
        }

    return {
        "question": "thresholds",
        "kernel": found.kernel.name,
        "rule": rule_text(found.rule),
        "statistic": WORDS[found.rule.statistic],
        "tests": [
            {
                "name": matrix.name,
                "citation": matrix.citation,
                "beside": matrix.partial,
                "rule": rule_text(matrix.rule),
                "inputs": matrix.inputs,
                "own": tried(found.practice[matrix.name]),
                "longer": {
                    regime: tried(found.search[matrix.name, regime]) for regime in found.levels
                },
                "add": advice(found, matrix),
                "shape": found.shapes[matrix.name]._asdict() if matrix.name in found.shapes else {},
            }
            for matrix in found.matrices
        ],
        "longer": {regime: tried(found.search["", regime]) for regime in found.levels},
        "limits": {
            regime: [level._asdict() for level in levels] for regime, levels in found.levels.items()
        },
    }
