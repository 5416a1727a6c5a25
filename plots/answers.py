"""One answer of `jaxattn advise|compare|thresholds --json`: read, checked, drawn.

Files come from anywhere: each number and each word of one passes through here before it is drawn.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.curves import FLOOR

MOST_BYTES = 2**26
CEILING = 1e4  # errors above, infinite ones among them, are drawn at the upper edge
LONGEST_NAME = 60
MOST_CONTEXT, MOST_PRICE = 2**40, 1e9
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


def figure_of(path: Path) -> Figure:
    """The figure of the answer in `path`.

    Raises ValueError, of one line, for a file that is no such answer or not a whole one.
    """
    from plots import advise, compare, thresholds

    told = read(path)
    question = told.get("question")
    if question == "advise":
        return advise.draw(parsed(path, advise.parse, told))
    if question == "compare":
        return compare.draw(parsed(path, compare.parse, told))
    if question == "thresholds":
        return thresholds.draw(parsed(path, thresholds.parse, told))
    raise ValueError(
        f"{path}: no answer to draw; keep what jaxattn advise, compare or thresholds --json prints"
    )


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if path.suffix in (".png", ".svg"):
        raise ValueError(f"{path}: a figure, where the answer that it is drawn from is wanted")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"over {MOST_BYTES >> 20} MiB")
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, or not all of it ({reason(error)})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: no answer of jaxattn: a JSON object is wanted")
    return told


def parsed(path: Path, parse: Any, told: dict[str, Any]) -> Any:
    try:
        return parse(told)
    except MALFORMED as error:
        raise ValueError(
            f"{path}: not what jaxattn {told['question']} --json prints ({reason(error)})"
        ) from None


def reason(error: Exception) -> str:
    words = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(words.split())[:150] or type(error).__name__


def word(x: object, most: int = LONGEST_NAME) -> str:
    """A text that can be drawn: of one line, in the font, without mathematics, not too long."""
    if not isinstance(x, str):
        raise TypeError(f"a text is wanted, got {type(x).__name__}")
    some = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in x[: most + 1])
    some = some if len(some) <= most else some[: most - 1] + "…"
    return some.replace("$", r"\$")


def number(x: object, low: float = 0.0, high: float = math.inf) -> float:
    """A number within [low, high], which JSON holds as a number, or as text if not finite.

    What is not a number counts as infinite.
    """
    if isinstance(x, bool) or not isinstance(x, int | float | str):
        raise TypeError(f"a number is wanted, got {type(x).__name__}")
    value = float(x)
    value = math.inf if math.isnan(value) else value
    if not low <= value <= high:
        raise ValueError(f"a number from {low:g} to {high:g} is wanted, got {value:g}")
    return value


def context(x: object) -> int:
    return int(number(x, 1, MOST_CONTEXT))


def some(x: Any, what: str) -> Any:
    """x, which holds at least one thing."""
    if not x:
        raise ValueError(f"holds no {what}")
    return x


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole powers of ten around what can be drawn of the values."""
    shown = [x for x in values if FLOOR < x < CEILING] or [1e-6, 1e-3]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(1.5 * max(shown)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def within(ax: Axes, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values, those beyond the axis at its edge."""
    return np.clip(np.asarray(values, float), *ax.get_ylim())
