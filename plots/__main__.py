"""`python -m plots DIR|FILE`: figures of the rows in DIR, as DIR/_figures/*.png and *.svg.

Or of FILE, what `jaxattn advise|compare|thresholds --json` printed, as .png and .svg beside it.

Exit codes: 0 when the figures are drawn, 2 for bad input (one line), 1 if they cannot be written.
"""

import argparse
import sys
from pathlib import Path


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
        draw_answer(root) if root.is_file() else draw(root)
    except (KeyError, TypeError) as error:
        print(f"plots: {root}: rows and manifest are of no study ({error!r})", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"plots: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def draw(root: Path) -> None:
    """Read the rows of `root`, draw every figure they allow, print the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from plots import ablation, atlas, fidelity, figures, speed, theory
    from plots.rows import manifest_of

    study = manifest_of(root)["study"]
    if study == "claims":
        raise ValueError(f"{root}: the study 'claims' is a table; it has no figures")
    drawn = {
        "ablation": ablation,
        "atlas": atlas,
        "fidelity": fidelity,
        "speed": speed,
        "theory": theory,
    }
    read_and_draw = drawn.get(study, figures).read_and_draw
    with plt.style.context(figures.STYLE):
        for name, figure in read_and_draw(root):
            for path in figures.save(figure, root / "_figures", name):
                print(path, flush=True)


def draw_answer(path: Path) -> None:
    """Draw the answer in `path`, beside it, and print the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from plots import answers, figures

    with plt.style.context(figures.STYLE):
        for drawn in figures.save(answers.figure_of(path), path.parent, path.stem):
            print(drawn, flush=True)


if __name__ == "__main__":
    main()
