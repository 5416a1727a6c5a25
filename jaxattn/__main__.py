"""Console script `jaxattn`: questions about kernels. Prints, writes nothing."""

import json
import sys
from typing import Annotated

import typer

from jaxattn import atlas, kernels

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def jaxattn() -> None:
    """The numerics of flash attention: what real kernels round, and where."""


@app.command("kernels")
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


def main() -> None:
    """Exit 0 when the question was answered, 2 for bad input, with one line that says why."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        print(f"jaxattn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
