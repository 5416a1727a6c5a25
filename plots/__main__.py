"""`python -m plots DIR`: figures of the rows in DIR, as DIR/_figures/*.png and *.svg.

Exit codes: 0 when the figures are drawn, 2 for bad input (one line), 1 if they cannot be written.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__.split("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="what `sweeps run` wrote")
    root = parser.parse_args().directory
    try:
        draw(root)
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


if __name__ == "__main__":
    main()
