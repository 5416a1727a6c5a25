"""Answers of the `jaxattn` command in a report: text as it is; JSON as a figure and its numbers."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sweeps.report import MOST_BYTES, picture

ROOT = Path(__file__).resolve().parent.parent
MOST_JSON = 2**26
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


class Answer(NamedTuple):
    """What a command printed, under the name of the file that keeps it; figure: SVG, or none."""

    anchor: str
    title: str
    text: str
    figure: str = ""


def answer(path: Path, number: int) -> Answer:
    """Raises ValueError for what is no text, too much of it, or JSON that is no whole answer."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; keep what a jaxattn command prints in it")
    data = path.read_bytes()[: MOST_JSON + 1]
    named = f"answer-{number}", path.stem.replace("_", " ")
    told = _told(path, data)
    if told is not None:
        return Answer(*named, _numbers(path, told), _figure(path, f"a{number}-"))
    if not data.strip() or len(data) > MOST_BYTES:
        raise ValueError(
            f"{path}: an answer is the text that a jaxattn command printed, of at most"
            f" {MOST_BYTES >> 20} MiB, and not empty"
        )
    try:
        return Answer(*named, data.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: an answer is text, in UTF-8") from None


def _told(path: Path, data: bytes) -> dict[str, Any] | None:
    """An answer to a question of NUMBERS; None for what is no JSON object, or none that asks."""
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, or not all of it ({str(error)[:150]})") from None
    return told if "question" in told else None


def _figure(path: Path, prefix: str) -> str:
    """Drawn by a process of its own, in a folder of its own: sweeps imports nothing of plots."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{path.stem}.json"
        copy.write_bytes(path.read_bytes())
        command = [sys.executable, "-m", "plots", str(copy)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no figure was drawn"]
            why = lines[-1].removeprefix("plots: ").removeprefix(f"{copy}: ")
            raise ValueError(f"{path}: {why}")
        return picture(copy.with_suffix(".svg"), prefix)


def _numbers(path: Path, told: dict[str, Any]) -> str:
    if not isinstance(told["question"], str) or told["question"] not in NUMBERS:
        raise ValueError(f"{path}: none of {', '.join(NUMBERS)}, whose answers have figures")
    try:
        return "\n".join(NUMBERS[told["question"]](told))
    except MALFORMED as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"{path}: not what jaxattn {told['question']} --json prints ({why[:150]})"
        ) from None


def _advise(told: dict[str, Any]) -> list[str]:
    some = [("as it stands", told["as_it_stands"])]
    some += [(f"({i}) {one['title']}", one) for i, one in enumerate(told["recommended"], 1)]
    lines = [
        f"{told['kernel']['name']} up to {int(told['contexts'][-1]):,} keys: "
        f"{told['metric']} <= {float(told['tolerance']):g}",
        f"inputs: {', '.join(told['inputs'])}; {int(told['tried']):,} recipes weighed",
    ]
    for title, one in some:
        change = " ".join(f"{field}={value}" for field, value in one["change"].items())
        at = f"{one['worst']['input']} at {int(one['worst']['context']):,} keys"
        lines += ["", f"{title}:"]
        lines += [f"  {change}"] * bool(change)
        lines += [
            f"  {float(one['worst']['error']):.2e} at worst ({at}), safe up to "
            f"{int(one['safe_up_to']):,} keys; price {float(one['price']):.3f}"
        ]
        lines += [
            f"  worse than as it stands on {w['input']}, up to {float(w['ratio']):.3g} times"
            for w in one["worse"]
        ]
    return lines if told["recommended"] else [*lines, "", "no recipe holds"]


def _compare(told: dict[str, Any]) -> list[str]:
    metrics = [name for name in told["observed"] if name != "cosine"]  # which is no error
    rows = [["largest over heads", *metrics, "correlation", "unexplained"]]
    rows.append(["observed", *(_largest(told["observed"][name]) for name in metrics), "", ""])
    for one in told["recipes"]:
        errors = [_largest(one["metrics"][name]) for name in metrics]
        agreement = f"{float(one['correlation']):.6f}", f"{float(one['unexplained']):.2%}"
        rows.append([one["recipe"], *errors, *agreement])
    return [told["verdict"], *told["remarks"], "", *_table(rows)]


def _largest(heads: Sequence[Sequence[Any]]) -> str:
    return f"{max((float(x) for row in heads for x in row), key=abs):.3g}"


def _thresholds(told: dict[str, Any]) -> list[str]:
    lines = [f"{told['kernel']}; the rule asked about: {told['rule']}", ""]
    rows = [["inputs", "keys", "lifted", "kernel", "limit", "false alarms", "misses"]]
    for regime, levels in told["limits"].items():
        for level in levels:
            numbers = [f"{float(level[name]):.2g}" for name in ("lifted", "kernel", "limit")]
            rates = ["{}/{}".format(*level[name][:2]) for name in ("false_alarm", "miss")]
            rows.append([regime, f"{int(level['context']):,}", *numbers, *rates])
    lines += [*_table(rows), "", "What to add"]
    for test in told["tests"]:
        seen, alarm = (test["own"][name] for name in ("seen_from", "false_alarm_from"))
        own = "does not see it" if seen is None else f"sees it from {int(seen):,} keys"
        own += "" if alarm is None else f", fails the lifted one from {int(alarm):,}"
        lines += [f"  {test['name']}: as it is, {own}", *(f"    {line}" for line in test["add"])]
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


NUMBERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "advise": _advise,
    "compare": _compare,
    "thresholds": _thresholds,
}
