"""The kernels' own choice of KV block size, as functions of the context. Pure Python integers.

A recipe's `kv_block` is a number or a name of RULES: "whole" for softmax that is not online, where
the whole context is one block, or the search of a Hexagon kernel. The HMX kernel searches the query
block Br and the KV block Bc that minimise an estimated time among those whose buffers fit into
VTCM, the DSP's scratch memory. So Bc grows with the context until VTCM is full, and depends on the
head sizes, the threads and the number of queries: `HmxConfiguration` holds what is not a shape.
"""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

TILE = 32  # rows and columns of an HMX tile
UNIT = 2 * TILE  # the softmax writes P in pairs of tiles, so a KV block is a multiple of this
PAIRS = 3  # KV blocks that the pipeline needs to overlap its stages
HALF, FLOAT = 2, 4  # bytes
PAGE, TILE_BYTES, LINE, VECTOR = 4096, 2048, 256, 128  # alignments, bytes
WHOLE_UNIT = 256  # slots of the smallest block of "whole"
LARGEST = 2**20  # keys in a block: a block is held in memory whole


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class HmxConfiguration:
    """What the search sees besides context and head sizes; the defaults are this project's choice.

    vtcm_bytes: asked of the device at run time; 8 MiB where the query fails
    threads: HVX contexts of the device, or the user's NHVX; 8 where the query fails
    queries: tokens in the batch being decoded (llama.cpp's ubatch, 512 by default)
    group: query heads for each KV head
    query_float32: Q arrives as float32 (else float16) and is staged as such
    Source: ggml-org/ggml, ggml-hexagon.cpp, ggml_hexagon_session and
    ggml_hexagon_precompute_flash_attn_params, and htp/main.c, htp_iface_hwinfo (d99724f2).
    Raises ValueError where a number is not positive.
    """

    vtcm_bytes: int = 8 * 2**20
    threads: int = 6
    queries: int = 512
    group: int = 4
    query_float32: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "query_float32":
                _positive(f"{type(self).__name__}.{field.name}", getattr(self, field.name))


Rule = Callable[[int, int, int, HmxConfiguration], int]
Fits = tuple[tuple[int, int], ...]  # (Br, the largest Bc that fits beside it), Br falling


def HMX_FLASH_2026_06(
    context: int, head_dim: int, value_dim: int, configuration: HmxConfiguration
) -> int:
    """KV block size of the FP16 kernel: cost 1400 a query block, 200 a KV iteration.

    Source: ggml-org/ggml, src/ggml-hexagon/htp/hmx-flash-attn-ops.c, hmx_fa_find_chunk_size and
    hmx_fa_compute_vtcm_usage (7047417e, llama.cpp #23989). Br is capped at the queries, Bc at a
    third of the context. The kernel itself takes head sizes that are multiples of 32 only.
    The rework of llama.cpp #25085 kept these costs until c2a30bb8 (#26049), with another layout.
    Raises ValueError where no block fits.
    """
    pipeline = _pipelined(context, configuration)
    fits = _fits_2026_06(head_dim, value_dim, configuration, pipeline)

    def cost(query_blocks: int, kv_blocks: int, rows: int) -> int:
        return query_blocks * (1400 + kv_blocks * 200)

    return _cheapest(context, configuration, pipeline, fits, cost)


def HMX_FLASH_2026_08(
    context: int, head_dim: int, value_dim: int, configuration: HmxConfiguration
) -> int:
    """KV block size since c2a30bb8 (#26049): the softmax's share of threads enters the cost.

    800 a query block; a KV iteration costs 200, and 600 for each vector of 64 rows that the busiest
    thread has. Fewer than three KV blocks run on one thread.
    Source: ggml-org/ggml, src/ggml-hexagon/htp/flash-attn-ops.h, hmx_fa_find_chunk_size and
    hmx_fa_vtcm_layout_build (d99724f2; D packed by 37c79ff5, llama.cpp #27042). The kernel itself
    takes head sizes that are multiples of 64 only (ggml-hexagon.cpp,
    ggml_hexagon_flash_attn_is_hmx_eligible). Raises ValueError where no block fits.
    """
    pipeline = _pipelined(context, configuration)
    fits = _fits_2026_08(head_dim, value_dim, configuration, pipeline)

    def cost(query_blocks: int, kv_blocks: int, rows: int) -> int:
        threads = configuration.threads if kv_blocks >= PAIRS else 1
        vectors = _ceil(rows, 64)
        busiest = _ceil(vectors, min(vectors, threads))
        return query_blocks * (800 + kv_blocks * (200 + 600 * busiest))

    return _cheapest(context, configuration, pipeline, fits, cost)


def WHOLE(context: int, head_dim: int, value_dim: int, configuration: HmxConfiguration) -> int:
    """The whole context. Raises ValueError past LARGEST: a block is held in memory whole."""
    if context > LARGEST:
        raise ValueError(f"kv_block='whole' goes up to {LARGEST} keys, got a context of {context}")
    return context


RULES: dict[str, Rule] = {
    "whole": WHOLE,
    "hexagon-hmx-2026-06": HMX_FLASH_2026_06,
    "hexagon-hmx-2026-08": HMX_FLASH_2026_08,
}
DEFAULT = HmxConfiguration()


def check(rule: int | str) -> None:
    """Raise unless `rule` is a positive number of keys or a name of RULES.

    Raises ValueError (the nearest name is suggested) or TypeError.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            near = difflib.get_close_matches(rule, RULES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"rules: {', '.join(RULES)}"
            raise ValueError(f"kv_block must be a number of keys or a rule, got {rule!r}; {hint}")
        return
    _positive("kv_block", rule)
    if rule > LARGEST:
        raise ValueError(f"kv_block must be at most {LARGEST} keys, got {rule}")


def block_size(
    rule: int | str,
    context: int,
    head_dim: int,
    value_dim: int,
    configuration: HmxConfiguration = DEFAULT,
) -> int:
    """Keys in one KV block at `context` keys; a number passes through.

    Raises ValueError or TypeError for what is not positive, unknown or does not fit.
    """
    check(rule)
    for name, size in (("context", context), ("head_dim", head_dim), ("value_dim", value_dim)):
        _positive(name, size)
    if isinstance(rule, str):
        return RULES[rule](context, head_dim, value_dim, configuration)
    return rule


def largest(
    rule: int | str, head_dim: int, value_dim: int, configuration: HmxConfiguration = DEFAULT
) -> int:
    """The block that `rule` settles on as the context grows without bound: VTCM is the limit.

    A number passes through; "whole" ends at LARGEST. Raises as block_size.
    """
    context = LARGEST if rule == "whole" else 2**60
    return block_size(rule, context, head_dim, value_dim, configuration)


def width(rule: int | str, context: int, head_dim: int, value_dim: int) -> int:
    """Slots that a block of `rule` is laid in at `context` keys: few sizes, each a compilation.

    A number passes through; the HMX rules have thirds of their widest block, "whole" the next
    power of two. Raises as block_size.
    """
    kv_block = block_size(rule, context, head_dim, value_dim)
    if not isinstance(rule, str):
        return kv_block
    if rule == "whole":
        return max(WHOLE_UNIT, 1 << (context - 1).bit_length())
    most = widest(rule, head_dim, value_dim)
    thirds = (_up(_ceil(i * most, 3), UNIT) for i in (1, 2, 3))
    return next((width for width in thirds if width >= kv_block), kv_block)


@functools.cache
def widest(rule: str, head_dim: int, value_dim: int) -> int:
    """The largest block that an HMX rule chooses at any multiple of 64 keys up to 2^16, or settles
    on. Raises as block_size.
    """
    sizes = (block_size(rule, n, head_dim, value_dim) for n in range(UNIT, 2**16, UNIT))
    return max(largest(rule, head_dim, value_dim), *sizes)


def unit(rule: int | str) -> int:
    """A number that divides every block of `rule`: the number itself, 64 for HMX, 256 for the
    slots of "whole"."""
    check(rule)
    if rule == "whole":
        return WHOLE_UNIT
    return UNIT if isinstance(rule, str) else rule


def _pipelined(context: int, configuration: HmxConfiguration) -> bool:
    return context >= PAIRS * UNIT and configuration.threads >= 2


def _cheapest(
    context: int,
    configuration: HmxConfiguration,
    pipeline: bool,
    fits: Fits,
    cost: Callable[[int, int, int], int],
) -> int:
    """Bc of the cheapest pair; equal costs go to the larger area, then to the larger Br."""
    cap = max(UNIT, _down(context // PAIRS if pipeline else context, UNIT))
    best: tuple[int, int] | None = None
    chosen = 0
    for br, fit in fits:
        bc = min(fit, cap)
        blocks = _ceil(configuration.queries, br), _ceil(context, bc)
        candidate = (cost(*blocks, br * configuration.group), -br * bc)
        if best is None or candidate < best:
            best, chosen = candidate, bc
    if not chosen:
        raise ValueError(
            f"no KV block fits into vtcm_bytes={configuration.vtcm_bytes} "
            "beside these head sizes and threads; give it more"
        )
    return chosen


def _query_blocks(configuration: HmxConfiguration) -> range:
    """Br from the largest down: multiples of the rows that fill a tile across the group."""
    step = _ceil(TILE, configuration.group)
    return range(max(step, _down(configuration.queries, step)), 0, -step)


@functools.lru_cache(maxsize=64)
def _fits_2026_06(
    head_dim: int, value_dim: int, configuration: HmxConfiguration, pipeline: bool
) -> Fits:
    group, threads = configuration.group, configuration.threads
    usable = configuration.vtcm_bytes - (2 * LINE + 13 * PAGE)
    values = 4 if pipeline else 3

    def bytes_used(br: int, bc: int) -> int:
        rows = _up(group * br, TILE)
        used = _up(rows * head_dim * HALF, PAGE)
        used += 2 * _up(rows * value_dim * HALF, PAGE) + _up(rows * rows * HALF, PAGE)  # O; rescale
        used += 2 * _up(bc * _up(head_dim * HALF, VECTOR), PAGE)  # K and V as they arrive
        used += 2 * _up(bc * _up(value_dim * HALF, VECTOR), PAGE)
        used += _up(bc * head_dim * HALF, PAGE) + (values - 2) * _up(bc * value_dim * HALF, PAGE)
        used += 2 * _up(rows * bc * HALF, PAGE) + 4 * _up(rows * HALF, LINE)  # S, P; m, l, …
        used += 2 * threads * _up(bc * HALF, LINE) + _up(rows * HALF, VECTOR) + 2 * LINE
        return used + _up(br * _up(bc * HALF, VECTOR), PAGE)  # the mask

    fits = []
    for br in _query_blocks(configuration):
        rows = _up(group * br, TILE)
        rest = usable - rows * (head_dim + 2 * value_dim + 4) * HALF - rows * rows * HALF
        per_key = (3 * head_dim + values * value_dim + 2 * threads + 2 * rows + br) * HALF
        # The kernel solves for Bc without the buffers' padding, then steps down until they fit.
        bc = _down(rest // per_key, UNIT) if rest > 0 else 0
        while bc and bytes_used(br, bc) > configuration.vtcm_bytes:
            bc -= UNIT
        if bc:
            fits.append((br, bc))
    return tuple(fits)


@functools.lru_cache(maxsize=64)
def _fits_2026_08(
    head_dim: int, value_dim: int, configuration: HmxConfiguration, pipeline: bool
) -> Fits:
    group, threads = configuration.group, configuration.threads
    copies = 2 if pipeline else 1

    def bytes_used(br: int, bc: int) -> int:
        rows = _up(group * br, TILE)
        column = _up(rows * FLOAT, LINE)
        kept = _up(rows * head_dim * HALF, TILE_BYTES)
        kept += 2 * _up(rows * value_dim * HALF, TILE_BYTES)
        kept += (copies + 1) * (rows // TILE * TILE_BYTES)  # rescale; and 1/l, both diagonal
        work = _up(bc * head_dim * HALF, TILE_BYTES) + _up(bc * value_dim * HALF, TILE_BYTES)
        work += 2 * _up(rows * bc * HALF, TILE_BYTES)  # S and P
        work = copies * work + 2 * column + 2 * threads * _up(bc * HALF, LINE)
        arriving = 2 * bc * (_up(head_dim * HALF, VECTOR) + _up(value_dim * HALF, VECTOR))
        rest = 2 * column + 2 * LINE + 4 * _up(br * _up(bc * HALF, VECTOR), LINE)  # m, l; masks
        # Q arrives in the space where K, V, S and P are worked on later.
        staged = _up(rows * head_dim * (FLOAT if configuration.query_float32 else HALF), VECTOR)
        return kept + max(work, staged) + arriving + rest + _up(rows * HALF, VECTOR)

    fits = []
    for br in _query_blocks(configuration):
        low, high = 0, 1
        while bytes_used(br, high * UNIT) <= configuration.vtcm_bytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if bytes_used(br, middle * UNIT) <= configuration.vtcm_bytes:
                low = middle
            else:
                high = middle
        if low:
            fits.append((br, low * UNIT))
    return tuple(fits)


def _ceil(number: int, step: int) -> int:
    return -(-number // step)


def _up(number: int, step: int) -> int:
    return _ceil(number, step) * step


def _down(number: int, step: int) -> int:
    return number // step * step
