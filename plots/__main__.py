"""`python -m plots DIR|FILE`: figures of the rows in DIR, as DIR/_figures/*.png and *.svg.

Or of FILE, what `jaxattn advise|compare|thresholds --json` printed, as .png and .svg beside it; or
of what standard input names, for `-`.

Exit codes: 0 when the figures are drawn, 2 for bad input (one line), 1 if they cannot be written.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source",
        metavar="DIR|FILE",
        type=Path,
        help="what `sweeps run` wrote, or what `jaxattn advise|compare|thresholds --json` printed",
    )
    root = parser.parse_args().source
    try:
        if root == Path("-") and (root := told()) is None:
            return
        draw_answer(root) if root.is_file() else draw(root)
    except (KeyError, TypeError) as error:
        print(f"plots: {root}: rows and manifest are of no study ({error!r})", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"plots: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def told() -> Path | None:
    """What standard input names, if anything; meanwhile, what takes a second to import is
    imported."""
    _studies()
    told = os.fsdecode(sys.stdin.buffer.read()).removesuffix("\n")
    return Path(told) if told else None


def draw(root: Path) -> None:
    """Read the rows of `root`, draw every figure they allow, print the files' names."""
    from plots.rows import manifest_of

    study = manifest_of(root)["study"]
    if study == "claims":
        raise ValueError(f"{root}: the study 'claims' is a table; it has no figures")
    drawn = _studies()
    read_and_draw = drawn.get(study, drawn["hexagon"]).read_and_draw
    _save(lambda: read_and_draw(root), root / "_figures")


def draw_answer(path: Path) -> None:
    """Draw the answer in `path`, beside it, and print the files' names."""
    from plots import answers

    _save(lambda: [(path.stem, answers.figure_of(path))], path.parent)


def _save(drawn: Callable[[], Iterable[tuple[str, Any]]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window is asked for
    import matplotlib.pyplot as plt

    from plots import figures

    with plt.style.context(figures.STYLE):
        for name, figure in drawn():
            for path in figures.save(figure, folder, name):
                print(path, flush=True)


def _studies() -> dict[str, Any]:
    from plots import ablation, atlas, fidelity, figures, speed, theory

    return {
        "hexagon": figures,
        "ablation": ablation,
        "atlas": atlas,
        "fidelity": fidelity,
        "speed": speed,
        "theory": theory,
    }


if __name__ == "__main__":
    main()
