"""One self-contained HTML page of what studies found, its figures inline SVG: no network.

A section for each directory that `run` wrote, and one for each answer of the `jaxattn` command
(sweeps/answers.py).
"""

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sweeps.store import StoreError, figures_in, finished, read_rows

TEMPLATE = Path(__file__).parent / "report.html.j2"
TITLE = "The numerics of flash attention"
QUESTION = (
    "Up to what context may a flash-attention kernel keep its running max, running sum or output "
    "in 16 bits, which of them must be wider, and would its test notice? Made by jaxattn; all of "
    "this page can be made again by the commands under Provenance."
)
MOST_BYTES = 2**22  # of one figure: a page that a phone can open
DECLARATION = re.compile(r"<\?xml[^>]*\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", re.DOTALL)
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ROOT, HREF = f"{{{SVG}}}svg", f"{{{XLINK}}}href"
# What matplotlib writes; nothing else comes onto the page.
ELEMENTS = {
    f"{{{SVG}}}{name}" for name in "svg g path use defs clipPath rect text tspan style".split()
}
ATTRIBUTES = {HREF, *"style x y id d clip-path transform width height viewBox version type".split()}
STYLE = "*{stroke-linejoin: round; stroke-linecap: butt}"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)
NAMED = re.compile(r'(\bid="|url\(#|href="#)')  # what names, or points to, a part of a picture


class Section(NamedTuple):
    """What one directory holds; text: the study's tables; facts: name and value, of its making."""

    anchor: str
    title: str
    method: Sequence[str]
    figures: Sequence[str]
    text: str
    recipes: Sequence[dict[str, Any]]
    facts: Sequence[tuple[str, str]]


def section(root: Path, study: Any, number: int) -> Section:
    """Of the rows, the manifest and the figures in `root`, which `study` made.

    Raises StoreError where there are none, or where they are not those of one study.
    """
    manifest, stored = read_rows(root)
    try:
        done, parts = finished(root, manifest)
        text, facts = study.text(stored.to_pandas(), manifest), _facts(manifest)
        method, recipes = _method(manifest), _recipes(manifest)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{root}: rows and manifest are not those of one study ({error!r})"
        ) from None
    if done < parts:
        text = f"Unfinished: what follows is of {done} of {parts} parts.\n\n{text}"
        facts = [*facts, ("finished", f"{done} of {parts} parts")]
    drawn = figures_in(root) if study.has_figures else []
    paths = [path for path in drawn if path.suffix == ".svg"]
    if study.has_figures and not paths:
        raise StoreError(f"{root}: no figures are drawn; python -m plots {root} draws them")
    return Section(
        f"study-{number}",
        str(manifest["title"]),
        method,
        [picture(path, f"s{number}f{i}-") for i, path in enumerate(paths)],
        text,
        recipes,
        facts,
    )


def picture(path: Path, prefix: str) -> str:
    """The SVG in `path`, its names set apart by `prefix`, so that pictures share a page.

    Raises StoreError for what is no picture of ours: one with a script, or a link to elsewhere.
    """
    if path.stat().st_size > MOST_BYTES:
        raise StoreError(f"{path}: a figure of more than {MOST_BYTES >> 20} MiB")
    foreign = f"{path}: not a figure that python -m plots draws; delete it, draw again"
    try:
        root = ElementTree.fromstring(DECLARATION.sub("", path.read_text(errors="replace")).strip())
    except (ElementTree.ParseError, ValueError):
        raise StoreError(foreign) from None
    for part in root.iter():
        known = part.tag in ELEMENTS and set(part.attrib) <= ATTRIBUTES
        if part.tag == f"{{{SVG}}}style":  # which would reach the whole page
            known = known and (part.text or "").strip() == STYLE
        if not known or not part.get(HREF, "#").startswith("#"):
            raise StoreError(foreign)
    text = ElementTree.tostring(root, "unicode")  # of what was looked at alone: no comments
    if root.tag != ROOT or re.search(r"url\((?!#)|@import", text, re.IGNORECASE):
        raise StoreError(foreign)
    text = NAMED.sub(rf"\g<1>{prefix}", text)
    label = html.escape(path.stem.replace("_", " "))
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def page(sections: Sequence[Section], answers: Sequence[Any]) -> str:
    """The page of sections and answers.Answer; every text is escaped, figures alone are markup."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text())
    both = {"sections": list(sections), "answers": list(answers)}
    return template.render(title=TITLE, question=QUESTION, **both)


def _method(manifest: dict[str, Any]) -> list[str]:
    lines = []
    if inputs := manifest.get("inputs"):
        lines.append(f"Inputs: {', '.join(inputs)}; {_seeds(manifest.get('seeds', []))}.")
    if contexts := manifest.get("contexts"):
        lines.append(
            f"{len(contexts)} contexts from {contexts[0]:,} to {contexts[-1]:,} keys, all of one "
            "pass over the keys; every query sees the first n of them."
        )
    if "recipes" in manifest:
        lines.append(
            "Each recipe rounds where its kernel does; errors are against float64 attention over "
            "the inputs as given, one number for each query row and head."
        )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    low, high = min(seeds, default=0), max(seeds, default=0)
    return f"seed {low}" if low == high else f"seeds {low} to {high}"


def _recipes(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    words = ("name", "citation", "inferred", "evidence")
    return [
        {word: str(recipe.get(word, "")) for word in words} | {"name": name}
        for name, recipe in manifest.get("recipes", {}).items()
    ]


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    left_out = {"title", "parts", "recipes", "inputs", "contexts", "block_rules", "format", "items"}
    return [
        (name.replace("_", " "), str(value))
        for name, value in manifest.items()
        if name not in left_out and isinstance(value, str | int | float | list) and value != ""
    ] + [
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items())),
        ("parts", str(len(manifest["parts"]))),
    ]
