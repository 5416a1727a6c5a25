"""What a recipe costs: a few plain counts for each query row, never one number alone.

The model is that of a kernel that keeps m, l and o of a row between KV blocks and works on them
with vector operations, beside a matrix unit that makes q·k and p·v. It counts what formats and
mitigations change, and nothing else: the products themselves are the same for all recipes.

What it rests on: everything outside the two products is vector work, and dear (FlashAttention-2,
arXiv 2307.08691, section 3.1: on an A100 an operation outside a product costs 16 inside); so is
rescaling o, which FlashAttention-4 therefore skips where it can (flash_attn/cute/softmax.py,
SoftmaxSm100). o in the format of the product's own accumulator stays there, and p·v is added for
nothing; o in another has to be fetched, widened, added to and narrowed. Where the matrix unit takes
o itself in and rounds once as it stores (ggml's Hexagon kernel, hmx_fa_o_update_worker: one product
with [diag(a), P]), all work on o is the unit's.

A maximum in steps makes a power of two of a, and an addition to exponents of a·o. It is counted as
the multiplication is: AMLA (arXiv 2509.25224) gains by where it adds, atomically in global memory,
which no term here knows.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxattn import block_rules
from jaxattn.formats import FLOAT32, STOCHASTIC, Format, unknown
from jaxattn.recipe import Recipe

KAHAN = 4.0  # three further additions, and the rescaling of the correction term


class Cost(NamedTuple):
    """Bits that each query row keeps, then vector work and moves for each key of a row."""

    sum_bits: float
    output_bits: float
    block_bits: float
    score_moves: float
    carry_moves: float
    sum_ops: float
    output_ops: float
    conversions: float
    output_conversions: float
    draws: float


TERMS: dict[str, str] = {
    "sum_bits": "bits kept for m, l, 1/l, a and r of a row, and what corrects or collects l",
    "output_bits": "bits kept for o of a row, and for the wide sums that o is flushed into",
    "block_bits": "bits of scratch for S and P of one KV block of a row",
    "score_moves": "bits of S and P moved, for each key",
    "carry_moves": "bits kept for l and o, read and written once a block, for each key",
    "sum_ops": "vector operations on m and l, for each key",
    "output_ops": "vector operations on o, for each key",
    "conversions": "changes of format on the way to l and a, for each key",
    "output_conversions": "changes of format of o's elements, for each key",
    "draws": "random words drawn, for each key",
}

# In vector operations of one 32-bit lane, for each key of a row.
WEIGHTS: dict[str, float] = {
    # K and V of a key, 128 dims of 16 bits each, are 128 moves of a word, shared by the rows that
    # fit into 512 KiB (2^22 bits) of scratch together.
    **dict.fromkeys(("sum_bits", "output_bits", "block_bits"), 2.0**-15),
    **dict.fromkeys(("score_moves", "carry_moves"), 1 / 32),
    **dict.fromkeys(("sum_ops", "output_ops", "conversions", "output_conversions"), 1.0),
    # xorshift32: three shifts and three exclusive ors (Marsaglia, doi 10.18637/jss.v008.i14)
    "draws": 6.0,
}


def bits(format: Format) -> int:
    """Sign, exponent and stored significand of a static format (float16: 16, fp22: 22)."""
    return 1 + (format.emax - format.emin + 1).bit_length() + format.precision - 1


def in_matrix_unit(recipe: Recipe) -> bool:
    """Whether the kernel hands o itself to the matrix unit, which rounds a·o + p·v once a block."""
    return recipe.output != FLOAT32 == recipe.rescaled_output and recipe.output_every is None


def cost(
    recipe: Recipe, context: int, head_dim: int, value_dim: int, unit: Format | None = None
) -> Cost:
    """The terms of a recipe at a context (which decides where kv_block is a rule).

    unit: the format in which the matrix unit takes o itself in, and rescales, adds and rounds it;
        None where it hands over p·v in its accumulator's format, and vectors do the rest
    """
    w = min(block_rules.block_size(recipe.kv_block, context, head_dim, value_dim), context)
    steps = max(1, w // (recipe.output_every or w))
    flushes = 1 / recipe.flush_every if recipe.flush_every else 0.0
    l, o = recipe.running_sum, recipe.output
    kahan = recipe.summation == "kahan"
    inside = unit is not None and _same(o, unit)
    narrow = 0 if inside or _same(o, recipe.pv_accum) else steps
    apart = 0 if inside else steps if unit is not None else narrow  # steps that vectors add

    sum_bits = bits(recipe.running_max) + bits(l)
    sum_bits += bits(recipe.inverse) if recipe.normalise in ("multiply", "blocks") else 0
    sum_bits += bits(recipe.rescale) + bits(recipe.row_sum) + kahan * bits(l)
    sum_bits += 2 * bits(FLOAT32) * (recipe.flush_every is not None)
    output_bits = value_dim * bits(o)
    output_bits += value_dim * bits(FLOAT32) * (recipe.flush_every is not None)
    scores = bits(recipe.scores) + bits(recipe.probs)

    sum_ops = 3 + KAHAN * kahan + 2 * flushes  # the maximum, a·l and its sum
    sum_ops += (recipe.max_offset != 0) + (recipe.lazy_threshold != 0)
    sum_ops += {0.0: 0, 1.0: 1}.get(recipe.max_step, 3)  # upward to an integer, in units of a step
    lazy = recipe.lazy_threshold != 0 and recipe.normalise != "blocks"  # which moves o anyway
    rescaled = not inside and not lazy
    output_ops = value_dim * (rescaled + apart + 2 * flushes)
    made = ((FLOAT32, recipe.row_sum), (FLOAT32, recipe.rescale))
    used = ((recipe.row_sum, l), (recipe.rescale, l))
    changes = sum(not _same(one, other) for one, other in made + used)
    conversions = changes + flushes * (not _same(l, FLOAT32))
    output_conversions = value_dim * (2 * narrow + flushes * (not _same(o, FLOAT32)))
    draws = (l.rounding == STOCHASTIC) + value_dim * steps * (o.rounding == STOCHASTIC)
    return Cost(
        sum_bits=float(sum_bits),
        output_bits=float(output_bits),
        block_bits=float(w * scores),
        score_moves=float(scores),
        carry_moves=2 * (bits(l) * (1 + kahan) + value_dim * bits(o)) / w
        + 2 * flushes * bits(FLOAT32) * (1 + value_dim) / w,
        sum_ops=sum_ops / w,
        output_ops=output_ops / w,
        conversions=conversions / w,
        output_conversions=output_conversions / w,
        draws=draws / w,
    )


def price(cost: Cost, weights: Mapping[str, float]) -> float:
    """Terms times weights, for sorting alone: vector operations for each key of a row."""
    return sum(weights[name] * term for name, term in cost._asdict().items())


def dominates(one: Cost, other: Cost) -> bool:
    """Whether `one` costs no more in any term, and less in some."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def parse_weights(settings: str | None) -> dict[str, float]:
    """WEIGHTS, some of them changed by "output_ops=2,draws=10".

    Raises ValueError for an unknown term, and for a weight that is no finite number from 0 up.
    """
    weights = dict(WEIGHTS)
    for setting in settings.split(",") if settings else []:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"a weight is term=number, got {setting!r}")
        if name not in WEIGHTS:
            raise unknown("term of the cost", name, WEIGHTS)
        try:
            weights[name] = float(text)
        except ValueError:
            raise ValueError(f"the weight of {name} must be a number, got {text!r}") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"the weight of {name} must be finite and at least 0, got {text}")
    return weights


def _same(one: Format, other: Format) -> bool:
    """Whether the two hold the same numbers: no conversion between them."""
    return one[:5] == other[:5]
