"""Claim: a published number and the function that measures it; Outcome: what it found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """measured: the numbers; met: as the claim's `expected` defines it; why: a caveat, or the
    reason where it is not met (needed then)."""

    measured: str
    met: bool
    why: str = ""

    def __post_init__(self) -> None:
        if not self.measured or not (self.met or self.why):
            raise ValueError(f"an outcome needs its numbers, and its reason where not met: {self}")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """id: kebab-case; title, source (paper or thread, with the number), setup (sizes and seeds),
    expected (numbers and tolerance): text; measure(*arguments) measures it; slow: takes over ~3 s.
    """

    id: str
    title: str
    source: str
    setup: str
    expected: str
    measure: Callable[..., Outcome]
    arguments: tuple[Any, ...] = ()
    slow: bool = False

    def check(self) -> Outcome:
        """Measure it, and say whether it holds."""
        return self.measure(*self.arguments)

    @property
    def function(self) -> str:
        """Where the measurement is written, `module.function`."""
        return f"{self.measure.__module__}.{self.measure.__qualname__}"


def near(
    measured: Mapping[str, float],
    expected: Mapping[str, float],
    tolerance: float,
    why: str = "",
) -> Outcome:
    """Whether every number is within a share `tolerance` of the expected one of its name."""
    far = [
        name
        for name, number in measured.items()
        if not abs(number - expected[name]) <= tolerance * abs(expected[name])
    ]
    text = ", ".join(f"{name} {x:.3g} ({expected[name]:.3g})" for name, x in measured.items())
    if far:
        why = "; ".join(filter(None, [f"off by over {tolerance:.0%}: {', '.join(far)}", why]))
    return Outcome(f"{text}; published in brackets", not far, why)


def exactly(measured: Mapping[str, object], expected: Mapping[str, object]) -> Outcome:
    """Whether everything measured equals what is expected."""
    wrong = [name for name, value in measured.items() if value != expected[name]]
    text = ", ".join(f"{name} {value}" for name, value in measured.items())
    return Outcome(text, not wrong, f"expected {expected}" if wrong else "")
