"""`python -m sweeps list | run STUDY | show DIR`: parses and prints; the rest of sweeps works.

Exit codes: 0 when the command completed, 2 for bad input (one line; nothing was computed),
1 when the machine failed it (disk full, no memory), 130 after Ctrl-C (finished parts are kept).
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from sweeps.hexagon import FULL, QUICK

STUDIES = {FULL.name: (FULL, QUICK)}
ROOT = Path(__file__).resolve().parent.parent
# click's ClickException, wherever this version of typer keeps it
CLI_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)


@app.command("list")
def list_studies() -> None:
    """The studies: recipes, inputs, contexts, and how many curves each computes."""
    for name, (full, quick) in STUDIES.items():
        print(f"{name}: {full.title}")
        for word, study in (("full", full), ("--quick", quick)):
            blocks = len(study.recipes) + len(study.block_axis) * len(study.kv_blocks)
            blocks -= sum(len(study.kv_blocks) for r in study.block_axis if r not in study.recipes)
            print(
                f"  {word}: {len(study.recipes)} recipes at KV blocks "
                f"{', '.join(map(str, study.kv_blocks))} and their own, "
                f"{len(study.regimes)} regimes, {study.seeds} seeds, contexts 256 to "
                f"{study.max_context:,}: {blocks * len(study.regimes) * study.seeds} curves"
            )
        print(f"  recipes: {', '.join(full.recipes)}")
        print(f"  regimes: {', '.join(full.regimes)}")


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="a study that `list` names")],
    quick: Annotated[bool, typer.Option("--quick", help="a first picture")] = False,
    out: Annotated[
        Path | None, typer.Option(help="where rows go [default: results/STUDY[-quick][-INPUTS]]")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="a .npz or .safetensors capture, `minilm`, or regimes A,B")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="recipes A,B instead of the study's")] = None,
    max_context: Annotated[int | None, typer.Option(help="the longest context, in keys")] = None,
    seeds: Annotated[int | None, typer.Option(help="draws of each regime: 0 to SEEDS - 1")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="site=format: a changed recipe beside each; all changes go into it"
        ),
    ] = None,
    figures: Annotated[bool, typer.Option(help="draw the figures as well")] = True,
) -> None:
    """Compute what is missing of STUDY, store it in OUT, print its table, draw its figures.

    The same command again resumes: finished parts are not computed a second time. Parts of other
    settings in OUT are moved to OUT/_aside, and fetched back when a run needs them.
    """
    from sweeps import plan
    from sweeps import run as running
    from sweeps.keys import sources_hash
    from sweeps.store import check_directory, writing

    chosen = _study(study, quick)
    names = recipes.split(",") if recipes is not None else chosen.recipes
    by_name = plan.recipes_of(list(names), set_ or [])
    sources = plan.inputs_of(chosen, inputs, seeds, max_context)
    if any(source.observed for source in sources):
        _note("the capture's own `output` is checked, but this study does not compare with it")
    labels = list(dict.fromkeys(source.label for source in sources))
    default = [chosen.name, *(["quick"] if quick else []), *(labels if inputs else [])]
    root = out or Path("results", "-".join(default))
    check_directory(root, chosen.name)

    import jaxattn

    numbers = sources_hash(Path(jaxattn.__file__).parent)
    jobs = plan.jobs_of(chosen, by_name, sources, numbers)
    parts = [part for job in jobs for part in job.parts]
    running.use_compilation_cache()
    environment = running.environment()
    manifest = {
        "study": chosen.name,
        "title": chosen.title,
        "command": shlex.join(["python", "-m", "sweeps", *sys.argv[1:]]),
        **environment,
        "sources": numbers,
        "recipes": {name: recipe.to_dict() for name, recipe in by_name.items()},
        "block_rules": running.describe_rules(by_name.values()),
        "inputs": running.describe_inputs(sources),
        "seeds": sorted({source.seed for source in sources}),
        "contexts": list(jobs[0].contexts),
        "parts": [part.describe() for part in parts],
    }
    with writing(root, chosen.name, _note) as store:
        finished: dict[str, Any] = {}
        try:
            finished = store.begin(manifest, [part.key for part in parts])
            origin = running.provenance(environment)
            for line in running.differences(finished.values(), origin):
                _note(f"warning: {line}; delete {root} to compute them again")
            if finished:
                _note(f"{len(finished)} of {len(parts)} parts are finished already")
            with running.Progress() as progress:
                running.run_jobs(jobs, store, finished, origin, progress)
        except KeyboardInterrupt:
            kept = sum(store.path(part.key).exists() for part in parts)
            _note(
                f"interrupted: {kept} of {len(parts)} parts are kept in {root}; "
                f"the same command again goes on from there"
            )
            raise typer.Exit(130) from None
        _print_tables(root)
    if figures:
        _draw(root)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="what `run` wrote")],
) -> None:
    """Print the table of stored rows again; computes nothing."""
    _print_tables(directory)


def _study(name: str, quick: bool) -> Any:
    if name not in STUDIES:
        from jaxattn.formats import unknown

        raise unknown("study", name, STUDIES)
    return STUDIES[name][int(quick)]


def _print_tables(root: Path) -> None:
    from sweeps.store import read_rows
    from sweeps.table import crossings, table

    manifest, stored = read_rows(root)
    rows = stored.to_pandas()
    present = set(rows["inputs"])
    recipes, labels = list(manifest["recipes"]), [x for x in manifest["inputs"] if x in present]
    print(table(rows, recipes, labels))
    print()
    print(crossings(rows, recipes, labels))
    done = len(rows[["recipe", "inputs", "seed", "block"]].drop_duplicates())
    if done < len(manifest["parts"]):
        _note(f"{done} of {len(manifest['parts'])} parts are finished; `run` again for the rest")


def _draw(root: Path) -> None:
    """Figures are drawn by a process of their own: sweeps imports nothing of plots."""
    command = [sys.executable, "-m", "plots", str(root.resolve())]
    if subprocess.run(command, cwd=ROOT).returncode:
        _note(f"the rows are in {root}, but no figure was drawn: python -m plots {root}")
        raise typer.Exit(1)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(message: object, code: int) -> NoReturn:
    _note(f"sweeps: {' '.join(str(message).split())}")
    sys.exit(code)


def main() -> None:
    try:
        sys.exit(app(prog_name="python -m sweeps", standalone_mode=False))
    except CLI_ERROR as error:
        _fail(cast(Any, error).format_message(), 2)
    except (ValueError, TypeError) as error:
        _fail(error, 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; finished parts are kept", 130)
    except (OSError, MemoryError) as error:
        _fail(error, 1)


if __name__ == "__main__":
    main()
