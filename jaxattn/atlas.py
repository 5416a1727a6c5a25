"""The atlas of kernels: what each of them rounds, and where, as text and as Markdown.

Generated from the recipes: KERNELS.md is `jaxattn kernels --markdown`, and a test holds it so.
"""

import textwrap
from collections.abc import Mapping, Sequence

from jaxattn import kernels
from jaxattn.fields import CHOICES, INTEGERS, NUMBERS, SITES
from jaxattn.formats import FLOAT32, name_of
from jaxattn.recipe import Recipe

SOURCE_ONLY = "source"
_SHORT = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}
_EVIDENCE = {
    "real kernel": "run beside the real kernel by `python -m sweeps run fidelity`",
    "paper": "reproduces a paper's numbers, by `python -m sweeps run claims`",
    SOURCE_ONLY: "the kernel's source was read, and no more",
}
_COMMAND = "jaxattn kernels --markdown > KERNELS.md"


def code(recipe: Recipe, site: str) -> str:
    """The site's format in a few letters; "" where it is float32."""
    format = getattr(recipe, site)
    if format == FLOAT32:
        return ""
    name, colon, suffix = name_of(format).partition(":")
    return _SHORT.get(name, name) + colon + suffix


def evidence(recipe: Recipe) -> str:
    return recipe.evidence or SOURCE_ONLY


def sites_of(recipes: Sequence[Recipe]) -> list[str]:
    """The sites that some of the recipes round to less than float32."""
    return [s for s in SITES if any(code(recipe, s) not in ("", "f64") for recipe in recipes)]


def _shape(recipe: Recipe) -> list[str]:
    """Block, how often o is rounded, exponential, and how it is normalised."""
    every = recipe.output_every
    return [str(recipe.kv_block), "block" if every is None else str(every), recipe.exp]


_SHAPE = ("kv_block", "o_every", "exp")


def text(families: Mapping[str, Sequence[Recipe]]) -> list[str]:
    """A table for each family, of the sites at which its kernels differ; float32 is a dot. What all
    of them round alike is said above it."""
    lines = []
    for title, recipes in families.items():
        codes = {site: {code(recipe, site) for recipe in recipes} for site in sites_of(recipes)}
        sites = [site for site, some in codes.items() if len(some) > 1]
        alike = [f"{site} {some.pop()}" for site, some in codes.items() if len(some) == 1]
        heads = [["kernel"], *(name.split("_") for name in (*_SHAPE, *sites)), ["evidence"]]
        deep = max(map(len, heads))
        rows = [list(row) for row in zip(*([""] * (deep - len(h)) + h for h in heads), strict=True)]
        for recipe in recipes:
            formats = [code(recipe, site) or "·" for site in sites]
            rows.append(
                [recipe.name, *_shape(recipe), *formats, evidence(recipe).partition(":")[0]]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [title, ""]
        if alike:
            lines += [*textwrap.wrap(f"all: {', '.join(alike)}", 100, subsequent_indent="  "), ""]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("")
    return [*lines, "Sites that are not listed, and dots, hold float32."]


def card(recipe: Recipe) -> list[str]:
    """One recipe in full: every field that is not an ideal kernel's, with what it means."""
    ideal = Recipe()
    lines = [recipe.name]
    words = {"source": recipe.citation, "inferred": recipe.inferred, "evidence": evidence(recipe)}
    for word, said in words.items():
        lines += _paragraph(word, said)
    fields: list[tuple[str, str, str]] = [
        (site, name_of(getattr(recipe, site)), SITES[site])
        for site in SITES
        if getattr(recipe, site) != getattr(ideal, site)
    ]
    for name, meaning in NUMBERS.items():
        if getattr(recipe, name) != getattr(ideal, name):
            fields.append((name, f"{getattr(recipe, name):g}", meaning))
    for name, meanings in CHOICES.items():
        if name == "log2e_at" and not recipe.exp.startswith("exp2"):
            continue  # scores are in base e
        fields.append((name, getattr(recipe, name), meanings[getattr(recipe, name)]))
    fields.append(("kv_block", str(recipe.kv_block), "keys, or the kernel's own rule"))
    for name, meaning in INTEGERS.items():
        if getattr(recipe, name) != getattr(ideal, name):
            fields.append((name, str(getattr(recipe, name)), meaning))
    lines.append("  (sites that are not listed hold float32)")
    widths = [max(len(field[i]) for field in fields) for i in range(2)]
    for name, value, meaning in fields:
        lines.append(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {meaning}".rstrip())
    return lines


def _paragraph(word: str, said: str) -> list[str]:
    indent = " " * 12
    return textwrap.wrap(said, 100, initial_indent=f"  {word:<10}", subsequent_indent=indent)


def markdown() -> str:
    """KERNELS.md: every recipe in one table, a column a site, and below it where it comes from."""
    families = kernels.families()
    recipes = [recipe for members in families.values() for recipe in members]
    sites = sites_of(recipes)
    lines = [
        "# Kernels",
        "",
        f"Generated by `{_COMMAND}`: the tables in `jaxattn/kernels/` are where to change it.",
        "`jaxattn kernels NAME` shows one of them in full, with what every field means.",
        "",
        "![Error against context of every kernel](plots/gallery/atlas.png)",
        "",
        "The figure: `make sweep STUDY=atlas`.",
        "",
        "A row is a kernel, a column a place where it rounds; empty cells hold float32. "
        "`o_every`: keys between two roundings of o. *evidence*:",
        "",
        *(f"- {word}: {meaning}" for word, meaning in _EVIDENCE.items()),
        "",
        _row(["kernel", *(f"`{name}`" for name in (*_SHAPE, *sites)), "evidence"]),
        _row(["---"] * (len(sites) + 5)),
    ]
    for recipe in recipes:
        cells = [code(recipe, site) for site in sites]
        anchor = f"[{recipe.name}](#{recipe.name})"
        lines.append(_row([anchor, *_shape(recipe), *cells, evidence(recipe).partition(":")[0]]))
    lines += ["", "## Sites", ""]
    lines += [f"- `{site}`: {SITES[site]}" for site in sites]
    for title, members in families.items():
        lines += ["", f"## {title.rstrip('.')}"]
        for recipe in members:
            lines += ["", f"### {recipe.name}", "", f"Source: {_plain(recipe.citation)}."]
            if recipe.inferred:
                lines += ["", f"Inferred: {_plain(recipe.inferred)}."]
            if recipe.evidence:
                lines += ["", f"Evidence: {recipe.evidence}."]
    return "\n".join(lines) + "\n"


def _plain(said: str) -> str:
    return said.replace("*", r"\*").replace("<", "&lt;")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
