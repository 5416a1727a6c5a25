"""The recipes that advise weighs: every format at every accumulator, then what else may help.

A pairwise row sum is not among them: a block's p are summed in float32 and rounded once, as r, so
that their order changes nothing that a recipe says.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from jaxattn.exponentials import EXPONENTIALS
from jaxattn.fields import FOLLOWS, INTEGERS, NUMBERS, SITES
from jaxattn.formats import FLOAT32, NEAREST_EVEN, STOCHASTIC, format_of, name_of
from jaxattn.recipe import Recipe

# m is left out: a maximum of numbers of the scores' format is exact in that format.
ACCUMULATORS = ("row_sum", "rescale", "running_sum", "output", "inverse")
FORMATS = ("float16", "bfloat16", "fp22", "float32")
MOST_FORMATS = 4
OFFSETS = (4.0, 8.0)  # l and o shrink by these: ik_llama.cpp #1196, llama.cpp #17746 and #18606
LAZY = 256.0  # what p may grow to before m moves (FlashAttention-4's threshold, log2(256))
FLUSHES = (16, 64)  # blocks between two flushes of l and o (FABsum; FlashAttention-3's two levels)
BLOCKS = (64, 128, 256, 512, 1024)
LARGER = 3  # how many of BLOCKS above a kernel's own are tried


def accumulators(
    kernel: Recipe, formats: Sequence[str] = FORMATS, sites: Sequence[str] = ACCUMULATORS
) -> list[Recipe]:
    """The kernel as it stands, then it with every one of `formats` at every one of `sites`, of
    those that it has (`idle`).

    Raises ValueError for an unknown format, and for more than MOST_FORMATS of them.
    """
    known = {format_of(name): None for name in formats}
    if not 1 <= len(known) <= MOST_FORMATS:
        raise ValueError(
            f"formats must be 1 to {MOST_FORMATS} different ones, got {', '.join(formats) or None}"
        )
    sites = [site for site in sites if site not in idle(kernel)]
    grid = itertools.product(known, repeat=len(sites))
    changed = _changed(kernel, [dict(zip(sites, row, strict=True)) for row in grid])
    return list(dict.fromkeys([kernel, *changed]))


def idle(kernel: Recipe) -> set[str]:
    """Those of ACCUMULATORS that none of the kernel's results passes through."""
    found = set()
    if kernel.normalise in ("divide", "before"):
        found.add("inverse")
    if kernel.kv_block == "whole":  # one block: nothing is rescaled
        found.add("rescale")
    if kernel.normalise == "before":  # p is divided by the row sum itself
        found.add("running_sum")
    return found


def mitigations(recipe: Recipe) -> list[Recipe]:
    """The recipe with an offset of its maximum, with a maximum that moves by powers of two, with
    what keeps l and o from drifting, with larger blocks, and with the offset beside each."""
    halves = [
        site
        for site in ("running_sum", "output")
        if (format := getattr(recipe, site)).precision <= 11 and format.rounding == NEAREST_EVEN
    ]
    narrow = recipe.running_sum != FLOAT32 or recipe.output != FLOAT32
    means: list[dict[str, Any]] = [{}]
    if recipe.kv_block != "whole":
        means.append({"lazy_threshold": _units(recipe, LAZY)})
        means += [_powers_of_two(recipe)] * (recipe.max_step == 0)
        means += [{"summation": "kahan"}] * (recipe.running_sum != FLOAT32)
        means += [{"flush_every": blocks} for blocks in FLUSHES if narrow]
    for count in range(1, len(halves) + 1):
        for some in itertools.combinations(halves, count):
            means.append(
                {site: getattr(recipe, site)._replace(rounding=STOCHASTIC) for site in some}
            )
    if isinstance(own := recipe.kv_block, int):
        larger = [{"kv_block": block} for block in BLOCKS if block > own][:LARGER]
        means += larger
        if recipe.output_every is not None:  # o then gains the p·v of a block at once
            means += [{"output_every": None} | fields for fields in larger[:1]]
    offsets = [{"max_offset": recipe.max_offset + _units(recipe, by)} for by in OFFSETS]
    return _changed(recipe, [mean | offset for mean in means for offset in ({}, *offsets)][1:])


def by_block(kernel: Recipe) -> list[Recipe]:
    """The kernel at each of BLOCKS, where it walks blocks of keys that may have another size."""
    return _changed(kernel, [{"kv_block": block} for block in BLOCKS])


def change(kernel: Recipe, recipe: Recipe) -> dict[str, str]:
    """What --set has to say to make the one of the other: field -> value."""
    fields = [*SITES, *NUMBERS, *INTEGERS, "summation", "kv_block"]
    found = {}
    for name in fields:
        before, after = getattr(kernel, name), getattr(recipe, name)
        if before != after:
            site = name_of(after) if name in SITES else None
            short = f"{after:.6g}" if name in NUMBERS else str(after).lower()
            exact = name not in NUMBERS or float(short) == after
            found[name] = site or (short if exact else repr(after))
    for site, leader in FOLLOWS.items():  # which replace() changes by itself
        if site in found and getattr(kernel, site) == getattr(kernel, leader) != FLOAT32:
            if found.get(leader) == found[site]:
                del found[site]
    return found


def _powers_of_two(recipe: Recipe) -> dict[str, Any]:
    """m in steps that make powers of two of a, so that a·l and a·o lose nothing (AMLA, arXiv
    2509.25224). In base e a narrow m does not hold them."""
    wide = {"running_max": FLOAT32} if not _base_2(recipe) else {}
    return {"max_step": _units(recipe, 2.0)} | wide


def _units(recipe: Recipe, factor: float) -> float:
    """The difference of two scores whose exponentials differ by this factor, to six digits."""
    return float(f"{math.log2(factor) if _base_2(recipe) else math.log(factor):.6g}")


def _base_2(recipe: Recipe) -> bool:
    return EXPONENTIALS[recipe.exp][1] == 2 and recipe.log2e_at != "exponent"


def _changed(recipe: Recipe, changes: Sequence[dict[str, Any]]) -> list[Recipe]:
    """The recipe with each of the changes that its other fields allow."""
    found = []
    for fields in changes:
        try:
            found.append(recipe.replace(**fields))
        except ValueError:  # such as a threshold that lets p outgrow its format
            continue
    return found
