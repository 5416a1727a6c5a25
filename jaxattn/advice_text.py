"""What `jaxattn advise` prints: an Advice as text, or as values that JSON knows."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from jaxattn.advise import SHORTEST, Advice
from jaxattn.candidates import MATTERS, WORSE, Candidate, staircase
from jaxattn.cost import TERMS, in_matrix_unit
from jaxattn.formats import FLOAT32
from jaxattn.lattice import ACCUMULATORS
from jaxattn.recipe import Recipe, beside

MOST_LINES = 24  # of the front


def text(advice: Advice) -> list[str]:
    """Paragraphs: the question, the kernel as it stands, what holds, the front, the cost."""
    return [
        *_question(advice),
        "",
        *_as_it_stands(advice),
        "",
        *_recommended(advice),
        "",
        *_front(advice),
        "",
        *_cost(advice),
    ]


def _question(advice: Advice) -> list[str]:
    limit = f"{advice.metric} <= {advice.tolerance:g}"
    worst = f"{_count(advice.seeds, 'seed')}, {_count(len(advice.inputs), 'input')} and contexts"
    return [
        f"{advice.kernel.name} (kv_block {advice.kernel.kv_block}) up to "
        f"{advice.contexts[-1]:,} keys: {limit}",
        f"error: the {advice.rows} over the rows of an input; the worst of {worst} from {SHORTEST}",
        "inf where any row overflows, whatever the others are",
        f"inputs: {', '.join(advice.inputs)}",
        f"worse: by over {WORSE - 1:.0%} at some context, where the error is over "
        f"{MATTERS * advice.tolerance:.2g}",
    ]


def _as_it_stands(advice: Advice) -> list[str]:
    """Up to where the kernel holds by KV block, and where it first fails on each input."""
    rows = [["kv_block", "safe up to", *advice.inputs]]
    for candidate in advice.blocks:
        own = " (as it stands)" if candidate is advice.stands else ""
        row = [f"{candidate.recipe.kv_block}{own}", _keys(candidate.safe, "none")]
        for errors in candidate.errors:
            passed = errors > advice.tolerance
            first = advice.contexts[int(passed.argmax())] if passed.any() else 0
            row.append(_keys(first, "-"))
        rows.append(row)
    return [
        "safe context of the kernel, all else as it stands, and where it fails on each input",
        *_table(rows),
    ]


def _recommended(advice: Advice) -> list[str]:
    if not advice.recommended:
        best = advice.best
        return [
            f"none of {advice.tried:,} recipes holds: the best reaches {best.worst:.2e} on "
            f"{best.input} at {best.context:,} keys, with {_change(best)}",
            f"  what stops it: {', '.join(_stopped(advice))}",
            *_worse(best, advice),
            *_not_weighed(advice.kernel),
        ]
    lines, stands = [], advice.stands
    if stands.worst <= advice.tolerance:
        lines = [
            f"it holds as it stands, {_below(stands, advice)} the "
            "tolerance at worst: what follows costs less, or is what one would change",
        ]
    for i, (title, candidate) in enumerate(advice.recommended, 1):
        lines += [
            f"({i}) {title}:",
            f"  {_change(candidate)}",
            f"  {candidate.worst:.2e} at worst ({candidate.input} at {candidate.context:,} keys), "
            f"{_below(candidate, advice)} the tolerance; "
            f"price {candidate.price:.3f}",
            f"  as it stands {stands.worst:.2e} ({stands.input} at {stands.context:,} keys); "
            f"price {stands.price:.3f}",
            *_worse(candidate, advice),
        ]
    return lines


def _below(candidate: Candidate, advice: Advice) -> str:
    if candidate.worst == 0:
        return "without any error, below"
    return f"{advice.tolerance / candidate.worst:.3g} times below"


def _not_weighed(kernel: Recipe) -> list[str]:
    """What rounds besides the accumulators, where no choice of theirs holds."""
    found = beside(kernel, ACCUMULATORS)
    said = f"not weighed, and tried by --set (such as --set exp=exp2): {', '.join(found)}"
    return textwrap.wrap(said, 100, initial_indent="  ", subsequent_indent="    ") if found else []


def _stopped(advice: Advice) -> list[str]:
    """The inputs on which the best of all passes the tolerance."""
    errors = advice.best.errors.max(axis=1)
    return [
        f"{name} ({error:.2e})"
        for name, error in zip(advice.inputs, errors, strict=True)
        if error > advice.tolerance
    ]


def _worse(candidate: Candidate, advice: Advice) -> list[str]:
    if not candidate.worse:
        return [f"  no worse on any input where its error is over {MATTERS * advice.tolerance:.2g}"]
    return [
        f"  WORSE than as it stands on {w.input}, up to {w.ratio:.3g} times: {w.after:.2e} instead "
        f"of {w.before:.2e} at {w.context:,} keys"
        for w in candidate.worse
    ]


def _front(advice: Advice) -> list[str]:
    steps = staircase(advice.front)
    rows = [["price", "error", "safe up to", "worse on", "change"]]
    for step in steps[:MOST_LINES]:
        rows.append(
            [
                f"{step.price:.3f}",
                f"{step.worst:.2e}",
                _keys(step.safe, "none"),
                ", ".join(w.input for w in step.worse) or "-",
                _change(step),
            ]
        )
    others = len(advice.front) - len(rows) + 1
    return [
        f"front of error against price, of {advice.tried:,} recipes",
        *_table(rows),
        *([f"  {others} more trade one term of the cost for another: --json"] if others else []),
    ]


def _cost(advice: Advice) -> list[str]:
    some = [("as it stands", advice.stands)]
    some += [(f"({i})", c) for i, (_, c) in enumerate(advice.recommended, 1)]
    rows = [["term", "weight", *(title for title, _ in some), ""]]
    for name, meaning in TERMS.items():
        terms = [f"{getattr(c.cost, name):.6g}" for _, c in some]
        rows.append([name, f"{advice.weights[name]:.3g}", *terms, meaning])
    rows.append(["price", "", *(f"{c.price:.4g}" for _, c in some), "terms times weights, to sort"])
    lines = [
        "cost of a row; weights: vector operations of one lane for each key. A bit kept costs its "
        "row's",
        "share of reading K and V once for all rows that fit into 512 KiB (--weights changes them)",
        *_table(rows),
    ]
    if in_matrix_unit(advice.kernel):
        lines.append(
            "  o as it stands is the matrix unit's own; elsewhere vectors work on it, and p·v is "
            "supposed to arrive in float32"
        )
    elif advice.kernel.output not in (FLOAT32, advice.kernel.pv_accum):
        lines += [
            "  o as it stands is priced as vector work, with two conversions at each addition;",
            "  where products add in its format: --weights output_ops=0,output_conversions=0",
        ]
    return lines


def _change(candidate: Candidate) -> str:
    """What makes the recipe of the kernel, as --set takes it."""
    said = [f"{field}={value}" for field, value in candidate.change.items()]
    return " ".join(said) or "no change"


def _keys(context: int, none: str) -> str:
    return f"{context:,}" if context else none


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def values(advice: Advice) -> dict[str, Any]:
    """An Advice in values that JSON knows; infinities as strings, as Recipe.to_dict has them.

    candidates, steps: [price, worst error] of all, and of those with less error than all cheaper.
    """
    return {
        "question": "advise",
        "kernel": advice.kernel.to_dict(),
        "metric": advice.metric,
        "tolerance": advice.tolerance,
        "rows": advice.rows,
        "contexts": list(advice.contexts),
        "inputs": list(advice.inputs),
        "seeds": advice.seeds,
        "weights": advice.weights,
        "tried": advice.tried,
        "as_it_stands": _values(advice, advice.stands),
        "kv_blocks": [{"kv_block": c.recipe.kv_block, **_safety(c)} for c in advice.blocks],
        "recommended": [{"title": t, **_values(advice, c)} for t, c in advice.recommended],
        "best": _values(advice, advice.best),
        "front": [_values(advice, candidate) for candidate in advice.front],
        "steps": [_point(candidate) for candidate in staircase(advice.front)],
        "candidates": [_point(candidate) for candidate in advice.candidates],
    }


def _values(advice: Advice, candidate: Candidate) -> dict[str, Any]:
    errors = zip(advice.inputs, candidate.errors, strict=True)
    return {
        "change": candidate.change,
        "holds": candidate.worst <= advice.tolerance,
        "worst": {
            "error": _number(candidate.worst),
            "input": candidate.input,
            "context": candidate.context,
        },
        **_safety(candidate),
        "price": candidate.price,
        "cost": candidate.cost._asdict(),
        "errors": {name: [_number(error) for error in row] for name, row in errors},
        "worse": [
            {key: _number(value) for key, value in worse._asdict().items()}
            for worse in candidate.worse
        ],
    }


def _point(candidate: Candidate) -> list[Any]:
    return [candidate.price, _number(candidate.worst)]


def _safety(candidate: Candidate) -> dict[str, Any]:
    at, on = candidate.fails or (None, None)
    return {"safe_up_to": candidate.safe, "fails_at": at, "fails_on": on}


def _number(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(float(value))
