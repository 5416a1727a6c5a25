"""Recipe: what a flash-attention kernel rounds, where, and in which format, as one flat table.

Its fields are those of fields.py, and what goes with what is checked here.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxattn import block_rules
from jaxattn.fields import CHOICES, FOLLOWS, INTEGERS, NUMBERS, OPTIONAL, SITES, WORDS
from jaxattn.formats import FLOAT32, STOCHASTIC, Format, format_of, holds, largest, name_of, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One kernel's arithmetic. Every field of SITES is a Format (or what format_of takes).

    name, citation, inferred: where it comes from, and what of it is inference rather than source
    evidence: beside a reading of the source: a run of the real kernel, a paper's table, or nothing
    kv_block: keys per block, or the name of a rule in block_rules.RULES
    output_every, pv_chunk: None for the whole block (pv_chunk: or for `output_every` keys);
        qk_chunk, qk_promote: None for the whole product; query_group, key_group: None for no scale;
        flush_every: None for never
    seed: of the random bits of sites that round stochastically
    The other fields are documented in NUMBERS and CHOICES and take the defaults of an ideal kernel.
    Raises ValueError where a name is unknown or fields contradict each other.
    """

    name: str = "unnamed"
    citation: str = ""
    inferred: str = ""
    evidence: str = ""

    query: Format = FLOAT32
    key: Format = FLOAT32
    value: Format = FLOAT32
    scale: Format = FLOAT32
    scaled_query: Format = FLOAT32
    log2e: Format = FLOAT32
    cap: Format = FLOAT32
    shift: Format = FLOAT32
    qk_accum: Format = FLOAT32
    scores: Format = FLOAT32
    squashed: Format = FLOAT32
    softcap: Format = FLOAT32
    bias: Format = FLOAT32
    running_max: Format = FLOAT32
    seen_max: Format = FLOAT32
    difference: Format = FLOAT32
    exponent: Format = FLOAT32
    probs: Format = FLOAT32
    summand: Format = FLOAT32
    row_sum: Format = FLOAT32
    rescale: Format = FLOAT32
    output_rescale: Format = FLOAT32
    rescaled_sum: Format = FLOAT32
    running_sum: Format = FLOAT32
    pv_accum: Format = FLOAT32
    rescaled_output: Format = FLOAT32
    output: Format = FLOAT32
    final_output: Format = FLOAT32
    inverse: Format = FLOAT32
    result: Format = FLOAT32

    initial_max: float = float("-inf")
    mask_value: float = float("-inf")
    mask_below: float = float("-inf")
    bias_factor: float = 1.0
    key_shift: float = 0.0
    max_offset: float = 0.0
    max_step: float = 0.0
    lazy_threshold: float = 0.0
    rescale_flush: float = float("-inf")
    empty_inverse: float = 0.0

    exp: str = "exp"
    rescale_exp: str = "same"
    log2e_at: str = "scale"
    scale_at: str = "scores"
    cap_at: str = "scale"
    tanh: str = "tanh"
    sinks: str = "end"
    summation: str = "plain"
    normalise: str = "multiply"
    kv_order: str = "forward"
    storage: str = "float32"

    kv_block: int | str = 64
    output_every: int | None = None
    flush_every: int | None = None
    qk_chunk: int | None = None
    qk_promote: int | None = None
    qk_partials: int = 1
    qk_tree: int = 1
    pv_chunk: int | None = None
    query_group: int | None = None
    key_group: int | None = None
    split_kv: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for site in SITES:
            object.__setattr__(self, site, format_of(getattr(self, site)))
        for field in NUMBERS:
            object.__setattr__(self, field, _number(field, getattr(self, field)))
        for field, names in CHOICES.items():
            if getattr(self, field) not in names:
                raise unknown(field, getattr(self, field), names)
        for field in (*INTEGERS, "kv_block", "seed"):
            value = getattr(self, field)
            if isinstance(value, np.integer):
                object.__setattr__(self, field, int(value))
        for field, meaning in INTEGERS.items():
            _check_positive(field, meaning, getattr(self, field))
        block_rules.check(self.kv_block)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer of 32 bits, got {self.seed!r}")
        if not all(holds(FLOAT32, getattr(self, site)) for site in SITES):
            object.__setattr__(self, "storage", "float64")
        _check_consistent(self)

    @property
    def one_walk(self) -> bool:
        """Whether one walk over the keys, the first one first, meets every context on its way."""
        return self.split_kv == 1 and self.kv_order == "forward"

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with some fields changed; unknown names suggest the nearest.

        Where the kernel rounds an intermediate to the format of the value that it goes into
        (FOLLOWS) and only the latter is changed, the intermediate changes with it.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise unknown("recipe field", name, known)
        for site, leader in FOLLOWS.items():
            format = getattr(self, site)
            if format == getattr(self, leader) != FLOAT32 and leader in changes:
                changes.setdefault(site, changes[leader])
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field in values that JSON knows: formats by name, infinities as strings."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {site: name_of(fields[site]) for site in SITES}
        return fields | {number: str(fields[number]) for number in NUMBERS}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Recipe":
        """The recipe that to_dict wrote."""
        return cls().replace(**fields)

    def identity(self) -> dict[str, Any]:
        """to_dict without its words: two kernels that round alike are one."""
        return {key: value for key, value in self.to_dict().items() if key not in WORDS}


def _number(field: str, value: Any) -> float:
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{field} must be a number, got {value!r}") from None
    if value != value:
        raise ValueError(f"{field} must not be NaN")
    return value


def _check_positive(field: str, meaning: str, value: Any) -> None:
    if value is None and field in OPTIONAL:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} ({meaning}) must be a positive integer, got {value!r}")


def _check_consistent(recipe: Recipe) -> None:
    unit, step = block_rules.unit(recipe.kv_block), recipe.output_every
    for field, whole, of in (
        ("output_every", unit, f"kv_block={recipe.kv_block}"),
        ("pv_chunk", step or unit, f"output_every={step}" if step else f"kv_block={unit}"),
        ("key_group", unit, f"kv_block={recipe.kv_block}"),
    ):
        part = getattr(recipe, field)
        if part is not None and whole % part:
            raise ValueError(f"{field}={part} must divide {of}")
    if recipe.qk_partials % recipe.qk_tree:
        raise ValueError(f"{recipe.qk_tree=} must divide {recipe.qk_partials=}")
    if recipe.qk_promote and (recipe.qk_partials > 1 or recipe.qk_promote % (recipe.qk_chunk or 1)):
        raise ValueError(
            f"qk_promote={recipe.qk_promote} must be a multiple of {recipe.qk_chunk=}, and goes "
            "with qk_partials=1"
        )
    if recipe.log2e_at == "query" and recipe.scale_at != "query":
        raise ValueError("log2e_at='query' goes with scale_at='query', whose result it multiplies")
    if recipe.initial_max == math.inf:
        raise ValueError("initial_max must be a number that scores can exceed, or -inf, got inf")
    if recipe.lazy_threshold < 0:
        raise ValueError(f"lazy_threshold must be at least 0, got {recipe.lazy_threshold}")
    if not math.isfinite(recipe.max_offset):
        raise ValueError(f"max_offset must be finite, got {recipe.max_offset}")
    if not 0 <= recipe.max_step < math.inf:
        raise ValueError(f"max_step must be finite and at least 0, got {recipe.max_step}")
    if not 0 <= recipe.key_shift < 1:
        raise ValueError(f"key_shift must be at least 0 and below 1, got {recipe.key_shift}")
    _check_normalisation(recipe)
    _check_range(recipe)
    if recipe.split_kv > 1 and recipe.kv_order == "backward":
        raise ValueError("split_kv goes with kv_order='forward' only")
    if recipe.split_kv > 1 and recipe.sinks == "seed":
        raise ValueError("split_kv goes with any sinks but 'seed', which would count per chunk")
    fixed = {"query", "key", "value", "scale", "scaled_query", "log2e", "cap", "shift"}
    fixed |= {"qk_accum", "pv_accum", "final_output", "inverse", "result"}
    fixed |= {"running_max"} if recipe.sinks == "seed" else set()
    for site in sorted(fixed):
        if getattr(recipe, site).rounding == STOCHASTIC:
            raise ValueError(f"site {site!r} cannot round stochastically: choose another rounding")


def _check_normalisation(recipe: Recipe) -> None:
    if recipe.normalise == "before" and recipe.kv_block != "whole":
        raise ValueError(
            "normalise='before' needs l of all keys before p·v: it goes with kv_block='whole', got "
            f"kv_block={recipe.kv_block!r}"
        )
    if recipe.normalise == "before" and recipe.sinks == "seed":
        raise ValueError("normalise='before' divides by the row sum alone: sinks cannot be 'seed'")
    if recipe.normalise in ("blocks", "before") and recipe.split_kv > 1:
        raise ValueError(f"split_kv merges sums that are not normalised: {recipe.normalise=}")
    if recipe.normalise in ("blocks", "before") and (
        recipe.flush_every or recipe.summation != "plain"
    ):
        raise ValueError(
            "flush_every and summation='kahan' go with l and o that are normalised at the end, "
            f"got normalise={recipe.normalise!r}"
        )
    if recipe.summation == "kahan" and STOCHASTIC in (
        recipe.running_sum.rounding,
        recipe.rescaled_sum.rounding,
    ):
        raise ValueError("summation='kahan' corrects roundings that it can repeat: no stochastic l")
    if recipe.normalise == "blocks" and recipe.output_every:
        raise ValueError(
            "normalise='blocks' brings o to the new l once a block: it goes with output_every=None"
        )


def _check_range(recipe: Recipe) -> None:
    """That no p exceeds what `probs` holds: m may lag behind a score, or be set below it."""
    nats = not recipe.exp.startswith("exp2") or recipe.log2e_at == "exponent"
    exponent = (recipe.lazy_threshold - recipe.max_offset) * (math.log2(math.e) if nats else 1.0)
    top = recipe.probs.emax + math.log2(largest(recipe.probs) / 2.0**recipe.probs.emax)
    if exponent > top:
        raise ValueError(
            f"lazy_threshold={recipe.lazy_threshold:g} and max_offset={recipe.max_offset:g} let p "
            f"reach 2^{exponent:g}, but probs={name_of(recipe.probs)} ends at "
            f"{largest(recipe.probs):g}: lower the threshold or raise the offset"
        )


def with_changed(recipes: Sequence[Recipe], settings: Sequence[str]) -> list[Recipe]:
    """The recipes, and beside each what the settings make of it, `NAME+SETTINGS`, if it differs.

    Raises ValueError for settings that parse_settings refuses, and for some that change nothing.
    """
    if not settings:
        return list(recipes)
    changes, both = parse_settings(list(settings)), []
    for recipe in recipes:
        changed = recipe.replace(**changes, name=f"{recipe.name}+{'+'.join(settings)}")
        both += [recipe, changed] if changed.identity() != recipe.identity() else [recipe]
    if len(both) == len(recipes):
        raise ValueError(f"--set {' '.join(settings)} changes none of the recipes")
    return both


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["running_sum=fp22", "kv_block=128"]` as keyword arguments of Recipe.replace.

    Raises ValueError for an unknown field or format, naming the nearest.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)} - set(WORDS)
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not text:
            raise ValueError(f"a setting is field=value, got {setting!r}")
        if name not in fields:
            raise unknown("recipe field", name, fields)
        if name in SITES:
            changes[name] = format_of(text)
        elif name in (*INTEGERS, "seed") or (name == "kv_block" and text.lstrip("-").isdigit()):
            try:
                changes[name] = None if text == "none" else int(text)
            except ValueError:
                raise ValueError(f"{name} must be an integer, got {text!r}") from None
        else:
            changes[name] = text
    return changes


def beside(recipe: Recipe, sites: Iterable[str]) -> list[str]:
    """What else than these sites rounds or errs, as --set takes it; but for what holds inputs in 16
    bits, and for caps and biases, which few inputs have."""
    left_out = {*sites, *FOLLOWS, "cap", "squashed", "softcap", "bias"}
    found = [f"exp={recipe.exp}"] * (recipe.exp not in ("exp", "exp2"))
    for site in (site for site in SITES if site not in left_out):
        format = getattr(recipe, site)
        given = site in ("query", "key", "value") and format.precision in (8, 11)
        if not given and not holds(format, FLOAT32):
            found.append(f"{site}={name_of(format)}")
    return found
