"""`python -m sweeps list | run STUDY | show DIR | report DIR`: parses and prints; the rest works.

Exit codes: 0 when the command completed, 2 for bad input (one line; nothing was computed),
1 when the machine failed it (disk full, no memory, a process lost), 130 after Ctrl-C; finished
parts are kept.
"""

import importlib
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from jaxattn.command import CLI_ERROR, call, fail, use_compilation_cache
from sweeps.faults import FAILURES, reason

STUDIES = {  # modules that hold FULL and QUICK
    "hexagon": "sweeps.hexagon",
    "atlas": "sweeps.atlas",
    "fidelity": "sweeps.fidelity",
    "ablation": "sweeps.ablation.study",
    "claims": "sweeps.claims.study",
    "theory": "sweeps.theory.study",
    "speed": "sweeps.speed.study",
}

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)


@app.command("list")
def list_studies() -> None:
    """The studies, and what each of them computes."""
    for name in STUDIES:
        full = _study(name, quick=False)
        print(f"{name}: {full.title}")
        for line in full.describe(_study(name, quick=True)):
            print(f"  {line}")


@app.command(short_help="Compute what is missing of a study, print and draw it.")
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="a study that `list` names")],
    quick: Annotated[bool, typer.Option("--quick", help="a first picture")] = False,
    out: Annotated[
        Path | None, typer.Option(help="where rows go [default: results/STUDY[-quick][-INPUTS]]")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="of fidelity, claims, theory and speed: these items A,B alone"),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="a .npz or .safetensors capture, `minilm`, or regimes A,B")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="recipes A,B instead of the study's")] = None,
    kernel: Annotated[
        str | None, typer.Option(help="of ablation: the recipe whose sites are lifted")
    ] = None,
    max_context: Annotated[int | None, typer.Option(help="the longest context, in keys")] = None,
    seeds: Annotated[int | None, typer.Option(help="draws of each regime: 0 to SEEDS - 1")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="site=format: a changed recipe beside each; all changes go into it"
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="spread each call over so many devices of this process")
    ] = None,
    processes: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="share the work among N processes; `auto`: as many as the cluster has"
        ),
    ] = None,
    process: Annotated[
        int | None, typer.Option(metavar="I", help="which of them this is, from 0")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="a free port where process 0 runs")
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="what theory expects as well: seconds for each curve")
    ] = False,
    figures: Annotated[bool, typer.Option(help="draw the figures as well")] = True,
) -> None:
    """Compute what is missing of STUDY, store it in OUT, print its table, draw its figures.

    The same command again resumes: finished parts are not computed a second time. Parts of other
    settings in OUT are moved to OUT/_aside, and fetched back when a run needs them. With
    --processes, every process gets the same command but for its own I, and sees the same OUT.
    """
    from sweeps import grid, items
    from sweeps import processes as many
    from sweeps.ablation import study as ablation
    from sweeps.drawing import drawing
    from sweeps.plan import Study
    from sweeps.store import check_directory, remove_figures

    chosen = _study(study, quick)
    many.check(processes, process, coordinator)
    if devices is not None and not 1 <= devices <= many.MOST_DEVICES:
        raise ValueError(f"--devices must be from 1 to {many.MOST_DEVICES}, got {devices}")
    options = {
        "--inputs": inputs,
        "--recipes": recipes,
        "--max-context": max_context,
        "--seeds": seeds,
        "--set": set_ or None,
    }
    if isinstance(chosen, ablation.Ablation):
        alone = {"--only": only, "--recipes": recipes, "--set": set_ or None}
        _refuse(study, alone, "use --kernel")
        work, notes = ablation.work_of(
            chosen, quick, kernel=kernel, inputs=inputs, seeds=seeds, max_context=max_context
        )
    elif isinstance(chosen, Study):
        _refuse(study, {"--only": only, "--kernel": kernel}, "use --recipes")
        work, notes = grid.work_of(
            chosen,
            quick,
            recipes=recipes,
            settings=set_,
            inputs=inputs,
            seeds=seeds,
            max_context=max_context,
        )
    else:
        _refuse(study, {"--devices": devices}, "use --processes")
        _refuse(study, {**options, "--kernel": kernel}, "use --only")
        names = only.split(",") if only is not None else None
        work, notes = items.work_of(chosen, quick, names), []
    if predict and work.predict is None:
        _refuse(study, {"--predict": predict}, "run hexagon or atlas with it")
    for note in notes:
        _note(note)
    root = out or Path("results", "-".join((work.study, *work.suffix)))
    check_directory(root, work.study)
    place = many.place_of(processes, process, coordinator, devices, _note)
    drawn = place.index == 0 and figures and chosen.has_figures
    with drawing() if drawn else nullcontext() as draw:

        def finish() -> None:
            if predict or draw is not None:
                remove_figures(root)  # what an older version left as well
            if predict:
                _predict(work, root)
            if draw is not None and not _drawn(draw, root):
                _note(f"the rows are in {root}, but no figure was drawn: python -m plots {root}")
                raise typer.Exit(1)
            if quick and only is None:
                _note("--quick is a first picture: the same command without it is the whole study")

        _carry_out(work, root, place, finish)


def _drawn(draw: Callable[[Path], bool], root: Path) -> bool:
    from sweeps.store import remove_figures

    try:
        return draw(root)
    except BaseException:  # such as Ctrl-C: all figures or none
        remove_figures(root)
        raise


def _refuse(study: str, options: dict[str, Any], instead: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} has no meaning with the study {study!r}; {instead}")


def _carry_out(work: Any, root: Path, place: Any, finish: Callable[[], None]) -> None:
    """Compute and store what is missing of the work in `root`; process 0 prints its table, and
    finishes while no other run may change the rows."""
    from sweeps import run as running
    from sweeps.store import Store, writing

    work.refuse({path.stem for path in root.glob("*.parquet")})
    use_compilation_cache()
    environment = running.environment()
    manifest = {
        "study": work.study,
        "title": work.title,
        "command": shlex.join(["python", "-m", "sweeps", *sys.argv[1:]]),
        **environment,
        **work.manifest,
        "parts": work.parts,
    }
    first = place.index == 0
    with writing(root, work.study, _note) if first else nullcontext(Store(root)) as store:
        try:
            keys = [part["key"] for part in work.parts]
            finished = place.begin(store, manifest, keys, _note)
            finished = {k: v for k, v in finished.items() if not work.again(store, k)}
            origin = running.provenance(environment)
            for line in running.differences(finished.values(), origin) if first else ():
                _note(f"warning: {line}; delete {root} to compute them again")
            if finished and first:
                _note(f"{len(finished)} of {len(work.parts)} parts are finished already")
            with running.Progress(name=place.name) as progress:
                work.compute(store, finished, origin, progress, place)
            place.wait()
        except KeyboardInterrupt:
            _note(f"interrupted: {_kept(work, root)}")
            raise SystemExit(130) from None
        except FAILURES as error:
            if (why := reason(error)) is None:
                raise
            _note(f"sweeps: {why}; {_kept(work, root)}")
            raise typer.Exit(1) from None
        if first:
            _print_tables(root)
            finish()
        place.leave()


def _predict(work: Any, root: Path) -> None:
    from sweeps.run import Progress

    with Progress() as progress:
        notes = work.predict(root, progress)
    for note in notes:
        _note(note)


def _kept(work: Any, root: Path) -> str:
    kept = sum((root / f"{part['key']}.parquet").is_file() for part in work.parts)
    return (
        f"{kept} of {len(work.parts)} parts are kept in {root}; "
        "the same command again goes on from there"
    )


@app.command(short_help="Print the table of stored rows again.")
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="what `run` wrote")],
) -> None:
    """Print the table of stored rows again; computes nothing."""
    _print_tables(directory)


@app.command(short_help="Write studies and answers as one HTML page.")
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="what `run` wrote")],
    answer: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="what a jaxattn command printed, text or JSON"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the page [default: DIR/_report.html, of the first]")
    ] = None,
) -> None:
    """Write one self-contained HTML page: question, method, figures, tables, provenance."""
    from sweeps import answers
    from sweeps import report as reports
    from sweeps.store import REPORT, read_manifest, write_whole

    studies = [read_manifest(root)["study"] for root in directories]
    path = out or directories[0] / REPORT
    if path.suffix != ".html" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out {path}: must be an .html file, in a directory that is there")
    sections = [
        reports.section(root, _study(name, quick=False), number)
        for number, (root, name) in enumerate(zip(directories, studies, strict=True))
    ]
    answered = [answers.answer(path, number) for number, path in enumerate(answer or ())]
    text = reports.page(sections, answered)
    write_whole(path, lambda temporary: temporary.write_text(text))
    print(path)


def _study(name: str, quick: bool) -> Any:
    if name not in STUDIES:
        from jaxattn.formats import unknown

        raise unknown("study", name, STUDIES)
    module = importlib.import_module(STUDIES[name])
    return module.QUICK if quick else module.FULL


def _print_tables(root: Path) -> None:
    from sweeps.store import finished, read_rows

    manifest, stored = read_rows(root)
    done, parts = finished(root, manifest)
    study = _study(manifest["study"], quick=False)
    try:
        text = study.text(stored.to_pandas(), manifest)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{root}: rows and manifest are not those of one study ({error!r}); the same `run` "
            "again rebuilds the manifest"
        ) from None
    print(text)
    if done < parts:
        _note(f"{done} of {parts} parts are finished; `run` again for the rest")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    try:
        sys.exit(call(app, "python -m sweeps", sys.argv[1:] or ["--help"]))
    except CLI_ERROR as error:
        message = cast(Any, error).format_message()
        known = " (`python -m sweeps list` tells which there are)" * ("'STUDY'" in message)
        fail("sweeps", f"{message}{known}", 2)
    except (ValueError, TypeError) as error:
        fail("sweeps", error, 2)
    except (typer.Abort, KeyboardInterrupt):
        fail("sweeps", "interrupted; finished parts are kept", 130)
    except FAILURES as error:
        if (why := reason(error)) is None:
            raise
        fail("sweeps", why, 1)


if __name__ == "__main__":
    main()
