"""Console script `jaxattn`: questions about kernels. Prints; writes nothing but compiled programs,
into the user's cache."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from jaxattn import __version__, atlas, kernels
from jaxattn.command import CLI_ERROR, call, fail, use_compilation_cache
from jaxattn.recipe import with_changed

REGIMES = (
    "Regimes A,B of inputs: gaussian, flat, biased_v, sink, needle, rising_max, outliers, "
    "uniform01, uniform11."
)
SHOWN = 4  # recipes that compare shows of those it tries by itself

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def jaxattn(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end.")
    ] = False,
) -> None:
    """The numerics of flash attention: what real kernels round, and where."""


@app.command("kernels", short_help="The recipes of real kernels, or one in full.")
def show_kernels(
    name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the atlas of all kernels, KERNELS.md.")
    ] = False,
) -> None:
    """List the recipes of real kernels, or show one in full."""
    if as_markdown and (name or as_json):
        raise ValueError("--markdown is the atlas of all kernels: without NAME and --json")
    if as_json:
        names = kernels.names() if name is None else [name]
        recipes = [kernels.get(each).to_dict() for each in names]
        print(json.dumps(recipes if name is None else recipes[0], indent=2))
    elif name is not None:
        print("\n".join(atlas.card(kernels.get(name))))
    elif as_markdown:
        print(atlas.markdown(), end="")
    else:
        print("\n".join(atlas.text(kernels.families())))


@app.command("compare", short_help="Which recipe errs like a kernel's own output.")
def compare_capture(
    file: Annotated[Path, typer.Argument(help="Query, key, value and the kernel's output.")],
    recipes: Annotated[
        str | None, typer.Option(help="Recipes A,B to compare with, or all (minutes).")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Metrics A,B.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of the scores, 1/sqrt(head dim) by default.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value: a changed recipe beside each that it changes."),
    ] = None,
    causal: Annotated[
        bool,
        typer.Option("--causal", help="The last query sees all keys, each before it one less."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far a kernel's own output is from float64, and which recipes err like it.

    Tries 16 recipes by itself, and some with other KV blocks where none is close: one to two
    minutes the first time, most of which the compiler takes. Axes are [head, token, dim] or
    [batch, token, head, dim].
    """
    from jaxattn import captures, compare, compare_text

    capture = captures.load(file)
    if capture.output is None:
        raise ValueError(f"{file}: lacks the array 'output', the kernel's own, to compare")
    some = compare.CANDIDATES if recipes is None else tuple(recipes.split(","))
    some = tuple(kernels.names()) if some == ("all",) else some
    use_compilation_cache()
    found = compare.compare(
        capture.query,
        capture.key,
        capture.value,
        capture.output,
        with_changed([kernels.get(name) for name in some], changes or []),
        names=compare.METRICS if metrics is None else metrics.split(","),
        scale=scale,
        causal=causal,
        progress=_to_stderr,
    )
    if as_json:
        print(json.dumps(compare_text.to_dict(found), indent=2))
    else:
        print(f"{capture.label}: {capture.output.dtype} output, {capture.length:,} keys\n")
        print("\n".join(compare_text.text(found, SHOWN if recipes is None else None)))


@app.command("thresholds", short_help="Would tests in practice notice this kernel?")
def show_thresholds(
    kernel: Annotated[str, typer.Option(help="Name of a recipe.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="field=value: a change of the recipe.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="nmse, nmse_llama, max_abs, allclose, fa2x or flashinfer, or NAME=LIMIT."
        ),
    ] = "nmse_llama",
    regime: Annotated[str | None, typer.Option(help=REGIMES)] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Longest context of the search, 32768 by default.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Draws of each test, 3 by default.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Tensors that the limits rest on, 64 by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Would the tests in practice notice this kernel's accumulators, and which test would?"""
    from jaxattn import practice, thresholds, verdicts
    from jaxattn.compare_text import plain

    use_compilation_cache()
    found = thresholds.thresholds(
        with_changed([kernels.get(kernel)], changes or [])[-1],
        practice.rule_of(metric),
        max_context=thresholds.LONGEST if max_context is None else max_context,
        seeds=thresholds.SEEDS if seeds is None else seeds,
        samples=thresholds.SAMPLES if samples is None else samples,
        regimes=thresholds.REGIMES if regime is None else tuple(regime.split(",")),
        progress=_to_stderr,
    )
    if as_json:
        print(json.dumps(plain(verdicts.to_dict(found)), indent=2))
    else:
        print("\n".join(verdicts.text(found)))


@app.command("advise", short_help="What a kernel must change to hold a tolerance.")
def show_advice(
    kernel: Annotated[str, typer.Option(help="A recipe, of `jaxattn kernels`.")],
    context: Annotated[int, typer.Option(help="Keys up to which the tolerance is to hold.")],
    tolerance: Annotated[str, typer.Option(help="metric=number.")] = "nmse=5e-4",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="field=value: changes the kernel first.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="A capture, .npz or .safetensors, instead of regimes.")
    ] = None,
    regime: Annotated[str | None, typer.Option(help=REGIMES)] = None,
    seeds: Annotated[int | None, typer.Option(help="Draws of each regime: 2.")] = None,
    allow: Annotated[
        str, typer.Option(help="Formats of the accumulators; fp22 rounds toward zero.")
    ] = "float16,bfloat16,fp22,float32",
    rows: Annotated[
        str, typer.Option(help="Error over rows: median, p99 or max (of 16 rows the same).")
    ] = "median",
    weights: Annotated[
        str | None, typer.Option(help="Of the cost, to sort by: term=number,term=number.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a kernel has to change, at least, to hold a tolerance up to a context.

    Weighs over a thousand recipes: minutes, of which the compiler takes more than half the first
    time.
    """
    from jaxattn import advice_text
    from jaxattn.advise import SEEDS, advise
    from jaxattn.cost import parse_weights

    if seeds is not None and inputs is not None:
        raise ValueError("--seeds has no meaning with a capture: its values are given")
    use_compilation_cache()
    advice = advise(
        with_changed([kernels.get(kernel)], settings or [])[-1],
        context,
        tolerance,
        inputs=inputs,
        regimes=None if regime is None else regime.split(","),
        formats=allow.split(","),
        seeds=SEEDS if seeds is None else seeds,
        rows=rows,
        weights=parse_weights(weights),
        progress=_to_stderr,
    )
    if as_json:
        print(json.dumps(advice_text.values(advice), indent=2))
    else:
        print("\n".join(advice_text.text(advice)))


def _to_stderr(line: str) -> None:
    print(f"jaxattn: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Exit 0 when the question was answered, 2 for bad input, with one line that says why."""
    try:
        sys.exit(call(app, "jaxattn", sys.argv[1:] or ["--help"]))
    except CLI_ERROR as error:
        fail("jaxattn", cast(Any, error).format_message(), 2)
    except (ValueError, TypeError, OSError) as error:
        fail("jaxattn", error, 2)
    except (typer.Abort, KeyboardInterrupt):
        fail("jaxattn", "interrupted", 130)


if __name__ == "__main__":
    main()
