"""Console script `jaxattn`: questions about kernels. Prints, writes nothing."""

import json
import sys
from typing import Annotated, Any

import typer

from jaxattn import kernels
from jaxattn.formats import name_of
from jaxattn.recipe import CHOICES, INTEGERS, NUMBERS, SITES, Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def jaxattn() -> None:
    """The numerics of flash attention: what real kernels round, and where."""


@app.command("kernels")
def show_kernels(
    name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes of real kernels, or show one in full."""
    chosen = [kernels.get(name)] if name else [kernels.get(each) for each in kernels.names()]
    if as_json:
        recipes = [recipe.to_dict() for recipe in chosen]
        print(json.dumps(recipes[0] if name else recipes, indent=2))
    elif name:
        print("\n".join(_card(chosen[0])))
    else:
        print("\n".join(_overview(chosen)))


_COLUMNS = ("scores", "probs", "row_sum", "rescale", "running_sum", "output", "inverse")


def _overview(recipes: list[Recipe]) -> list[str]:
    rows = [["recipe", "kv_block", "exp", *_COLUMNS]]
    for recipe in recipes:
        formats = [name_of(getattr(recipe, site)) for site in _COLUMNS]
        rows.append([recipe.name, str(recipe.kv_block), recipe.exp, *formats])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _card(recipe: Recipe) -> list[str]:
    ideal = Recipe()
    lines = [recipe.name, f"  source    {recipe.citation}"]
    if recipe.inferred:
        lines.append(f"  inferred  {recipe.inferred}")
    fields: list[tuple[str, Any, str]] = [
        (site, name_of(getattr(recipe, site)), SITES[site])
        for site in SITES
        if getattr(recipe, site) != getattr(ideal, site)
    ]
    for name, meaning in NUMBERS.items():
        if getattr(recipe, name) != getattr(ideal, name):
            fields.append((name, f"{getattr(recipe, name):g}", meaning))
    for name, meanings in CHOICES.items():
        if name == "log2e_at" and recipe.exp == "exp":
            continue  # scores are in base e
        fields.append((name, getattr(recipe, name), meanings[getattr(recipe, name)]))
    fields.append(("kv_block", recipe.kv_block, "keys, or the kernel's own rule"))
    for name, meaning in INTEGERS.items():
        if getattr(recipe, name) != getattr(ideal, name):
            fields.append((name, getattr(recipe, name), meaning))
    lines.append("  (sites that are not listed hold float32)")
    widths = [max(len(str(field[i])) for field in fields) for i in range(2)]
    for name, value, meaning in fields:
        lines.append(f"  {name:<{widths[0]}}  {value!s:<{widths[1]}}  {meaning}".rstrip())
    return lines


def main() -> None:
    """Exit 0 when the question was answered, 2 for bad input, with one line that says why."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        print(f"jaxattn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
