"""compare: a kernel's own output beside float64, and beside what recipes make of its inputs."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn import kernels, metrics
from jaxattn.agreement import Agreement, agreement, correlation
from jaxattn.attention import dot_product_attention
from jaxattn.captures import LAYOUT_RULE
from jaxattn.exact import ONE_THREAD
from jaxattn.outputs import outputs
from jaxattn.recipe import Recipe
from jaxattn.reference import reference_attention
from jaxattn.remarks import better_reading, remarks_on

METRICS = ("nmse", "nmse_llama", "rel_l2", "max_abs", "cosine", "ulps", "bias_o")
WORST = {"max_abs": np.max, "ulps": np.max}  # the median over queries for other metrics
NEED_LSE = ("lse_error", "bias_l")
CONTROL = "float32"

# One of each kind of arithmetic; what is left out mostly differs from one of these in block size.
CANDIDATES = (
    CONTROL,
    "hexagon-hmx-fp16",
    "hexagon-pr24389",
    "hexagon-hmx-fp32",
    "hexagon-hvx",
    "metal",
    "ggml-cpu-decode",
    "ggml-cuda-mma-f16",
    "ggml-cuda-tile-f16",
    "ggml-vulkan-cm2",
    "ggml-opencl-f16",
    "flash-attention-2-fp16",
    "flash-attention-2-bf16",
    "flashinfer-fp16",
    "torch-cpu-math-fp16",
    "torch-cpu-math-bf16",
)

FEW_KEYS = 256  # queries that see no more share one region
SAME, CLOSE, ALIKE = 0.999, 0.9, 0.5  # correlations: one arithmetic, nearly one, some kinship
# Where none is CLOSE, the nearest of some KIN are tried at other KV blocks, and those whose errors
# another block changes beyond recognition: l and o in 16 bits, and o alone.
NEAREST, KIN, BLOCKS = 3, 0.1, (16, 32, 64, 128, 512)
BY_BLOCK = ("hexagon-hmx-fp16", "hexagon-pr24389")


class Region(NamedTuple):
    """Queries that see more than `above` and at most `most` keys.

    queries:  how many
    observed: metric -> [B, N], as in Comparison
    emulated: metric -> [recipe, B, N]
    """

    above: int
    most: int
    queries: int
    observed: dict[str, np.ndarray]
    emulated: dict[str, np.ndarray]


class Comparison(NamedTuple):
    """A capture's output against float64, and recipes on the same inputs, nearest first.

    recipes:     names, by the correlation of their error vectors with the observed one; where
                 none was CLOSE, with some at other BLOCKS
    agreement:   of each recipe, over all heads
    correlation: [recipe, B, N], of each head alone
    observed:    metric -> [B, N]: the median over the head's queries, of WORST the largest
    emulated:    metric -> [recipe, B, N], the recipe's output stored in the dtype of the observed
    regions:     by the number of keys that a query sees, where that differs
    remarks:     what is wrong with the output beyond rounding, in sentences
    """

    recipes: tuple[str, ...]
    agreement: tuple[Agreement, ...]
    correlation: np.ndarray
    observed: dict[str, np.ndarray]
    emulated: dict[str, np.ndarray]
    regions: tuple[Region, ...]
    remarks: tuple[str, ...]


def compare(
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    recipes: Sequence[Recipe | str] = CANDIDATES,
    *,
    names: Sequence[str] = METRICS,
    scale: float | None = None,
    causal: bool = False,
    progress: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """The error of `output` against float64 attention, and the recipes that err most like it.

    query [B, T, N, H], key [B, S, K, H], value [B, S, K, D], output [B, T, N, D]: floats, finite
    names:  of jaxattn.metrics.METRICS, but those that need a log-sum-exp
    scale:  of the scores, 1/sqrt(H) by default
    causal: query t sees the keys up to S - T + t; otherwise every query sees all keys
    progress: called with a line on each piece of work

    Raises ValueError or TypeError for what does not fit, in one line.
    """
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and positive, got {scale}")
    names = metrics.check_names(names)
    for name in NEED_LSE:
        if name in names:
            raise ValueError(f"{name} needs the kernel's log-sum-exp, of which there is none here")
    if isinstance(recipes, str | Recipe) or not recipes:
        raise ValueError("recipes must be a sequence of at least one recipe or name")
    chosen = [kernels.get(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    query, key, value, output = (np.asarray(x) for x in (query, key, value, output))
    expected = (*query.shape[:-1], value.shape[-1])
    if output.shape != expected:
        raise ValueError(f"output must be [B, T, N, D] = {expected}, got {output.shape}")
    T, S = query.shape[1], key.shape[1]
    if causal and T > S:
        raise ValueError(
            f"--causal: {T} queries and {S} keys leave the first {T - S} queries without a key; "
            f"leave out queries, or --causal ({LAYOUT_RULE})"
        )
    observed = output.astype(np.float64)
    if not np.isfinite(observed).all():
        raise ValueError("output must be finite, got nan or inf; leave out the rows that hold them")

    def run(some: list[Recipe], what: str) -> tuple[np.ndarray, np.ndarray]:
        given = (query, key, value, some, scale)
        found, ideal = (_causal if causal else _full)(*given, _counter(progress, what))
        with np.errstate(over="ignore"):  # a recipe may exceed what the observed dtype holds
            return found.astype(output.dtype).astype(np.float64), ideal

    def agreements(emulated: np.ndarray) -> list[Agreement]:
        return [agreement(observed, one, ideal) for one in emulated]

    reading = better_reading(query, key, value, output, scale=scale, causal=causal)
    if reading is not None:
        progress(reading)
    emulated, ideal = run(chosen, f"{len(chosen)} recipes")
    remarks = remarks_on(observed, ideal, emulated, reading)
    found = agreements(emulated)
    rank = _ranked(found)
    if not remarks and found[0].nmse_real and not found[rank[0]].correlation >= CLOSE:
        near = [i for i in rank[:NEAREST] if found[i].correlation >= KIN]
        near += [i for i in rank if chosen[i].name in BY_BLOCK and i not in near]
        more = list(_at_other_blocks([chosen[i] for i in near or rank[:NEAREST]], chosen))
        if more:
            also, _ = run(more, "none is close; other KV blocks are tried")
            chosen, emulated = chosen + more, np.concatenate([emulated, also])
            found += agreements(also)
            rank = _ranked(found)

    emulated = emulated[rank]
    regions = _regions(names, observed, emulated, ideal, S) if causal else ()
    B, N = query.shape[0], query.shape[2]
    heads = [
        correlation((observed - ideal)[b, :, n], (one - ideal)[b, :, n])
        for one in emulated
        for b, n in np.ndindex(B, N)
    ]
    return Comparison(
        tuple(chosen[i].name for i in rank),
        tuple(found[i] for i in rank),
        np.array(heads).reshape(-1, B, N),
        *_by_head(names, observed, emulated, ideal),
        regions,
        tuple(remarks),
    )


def _full(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    recipes: list[Recipe],
    scale: float | None,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [recipe, B, T, N, D] and the reference, where every query sees all keys."""
    contexts = [key.shape[1]]
    found = outputs(query, key, value, recipes, contexts=contexts, scale=scale, progress=progress)
    return found.output[:, 0], found.reference[0]


def _causal(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    recipes: list[Recipe],
    scale: float | None,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """The same where query t sees the keys up to S - T + t; not rounded to the query's dtype."""
    T, S = query.shape[1], key.shape[1]
    mask = np.tri(T, S, S - T, dtype=bool)[None, None]
    wide = query if query.dtype.itemsize > 4 else query.astype(np.float32)
    found = []
    for i, recipe in enumerate(recipes):
        progress(i, len(recipes))
        one = dot_product_attention(wide, key, value, mask=mask, recipe=recipe, scale=scale)
        found.append(np.asarray(one).astype(np.float64))
    progress(len(recipes), len(recipes))
    with ONE_THREAD:
        return np.stack(found), reference_attention(query, key, value, mask=mask, scale=scale)


def _counter(progress: Callable[[str], object], what: str) -> Callable[[int, int], None]:
    """Tells of every quarter of the work."""
    told = -1

    def count(done: int, total: int) -> None:
        nonlocal told
        if (quarters := 4 * done // total) > told:
            told = quarters
            progress(f"{what}: {25 * quarters}%")

    return count


def _ranked(found: list[Agreement]) -> list[int]:
    """Nearest first."""
    near = np.nan_to_num([one.correlation for one in found], nan=-2.0)
    return np.argsort(-near, kind="stable").tolist()


def _at_other_blocks(some: list[Recipe], known: list[Recipe]) -> Iterator[Recipe]:
    """What of BLOCKS their other fields allow, and is not known yet."""
    identities = [recipe.identity() for recipe in known]
    for recipe, block in itertools.product(some, BLOCKS):
        try:
            name = "+".join(x for x in recipe.name.split("+") if not x.startswith("kv_block="))
            other = recipe.replace(kv_block=block, name=f"{name}+kv_block={block}")
        except ValueError:  # such as softmax that is not online
            continue
        if other.identity() not in identities:
            identities.append(other.identity())
            yield other


def _by_head(
    names: tuple[str, ...], observed: np.ndarray, emulated: np.ndarray, ideal: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """metric -> [B, N] of the observed [B, T, N, D], and [recipe, B, N]: one program for both."""
    both = np.concatenate([observed[None], emulated])
    rows = both.shape[:-1]
    found = metrics.measure(names, both, np.zeros(rows), ideal, np.zeros(rows[1:]))
    by_head = {name: WORST.get(name, np.median)(found[name], axis=-2) for name in names}
    return {n: x[0] for n, x in by_head.items()}, {n: x[1:] for n, x in by_head.items()}


def _regions(
    names: tuple[str, ...], observed: np.ndarray, emulated: np.ndarray, ideal: np.ndarray, keys: int
) -> tuple[Region, ...]:
    """Octaves of the keys that each query sees: keys - T + 1 and up."""
    T = observed.shape[1]
    seen = np.arange(keys - T + 1, keys + 1)
    octave = np.ceil(np.log2(np.maximum(seen, FEW_KEYS))).astype(int)
    regions = []
    for power in np.unique(octave):
        rows = octave == power
        some = _by_head(names, observed[:, rows], emulated[:, :, rows], ideal[:, rows])
        above = 0 if 2**power <= FEW_KEYS else 2 ** (power - 1)
        regions.append(Region(int(above), int(2**power), int(rows.sum()), *some))
    return tuple(regions)
