"""The tests that projects run on their attention kernels, as one table of data.

A test is its shapes, its inputs, what it compares with, and what it lets pass: a statistic of a
tensor of outputs, and its limit.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxattn import metrics
from jaxattn.fields import SITES
from jaxattn.formats import BFLOAT16, FLOAT16, FLOAT32, Format, holds, unknown
from jaxattn.recipe import Recipe

UNFUSED = Recipe(
    name="pytorch-fp16-unfused",
    citation="Dao-AILab/flash-attention, tests/test_flash_attn.py (attention_ref, upcast=False)"
    " at 0251105a",
    inferred="q is scaled, where the source scales k; float32 inside each product and the softmax",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    scale_at="query",
    scaled_query=FLOAT16,
    scores=FLOAT16,
    probs=FLOAT16,
    normalise="before",
    kv_block="whole",
    result=FLOAT16,
)
UNFUSED_BF16 = UNFUSED.replace(
    name="pytorch-bf16-unfused",
    **{site: BFLOAT16 for site in SITES if getattr(UNFUSED, site) == FLOAT16},
)

Array = np.ndarray
Statistic = Callable[[Array, Array, Array, float], float]  # output, oracle, baseline, atol


def _ratio(part: float, whole: float) -> float:
    """part / whole; of a whole of 0, as a kernel that gives zeros makes it, inf (0 for no part)."""
    return float(part / whole) if whole else math.inf if part > 0 else 0.0


def nmse(output: Array, oracle: Array, baseline: Array, atol: float) -> float:
    """Squared error over squared oracle, of the whole tensor."""
    return _ratio(np.sum((output - oracle) ** 2), np.sum(oracle**2))


def nmse_llama(output: Array, oracle: Array, baseline: Array, atol: float) -> float:
    """Squared error over squared output, of the whole tensor: llama.cpp's mse(a, b) / mse(a, 0)."""
    return _ratio(np.sum((output - oracle) ** 2), np.sum(output**2))


def max_abs(output: Array, oracle: Array, baseline: Array, atol: float) -> float:
    """The largest error."""
    return float(np.max(np.abs(output - oracle)))


def close(output: Array, oracle: Array, baseline: Array, atol: float) -> float:
    """The least t with which allclose(rtol=t, atol=t) holds."""
    return float(np.max(np.abs(output - oracle) / (1 + np.abs(oracle))))


def times_baseline(output: Array, oracle: Array, baseline: Array, atol: float) -> float:
    """The largest error, less atol, over the largest of the baseline."""
    return _ratio(np.max(np.abs(output - oracle)) - atol, np.max(np.abs(baseline - oracle)))


STATISTICS: dict[str, Statistic] = {
    f.__name__: f for f in (nmse, nmse_llama, max_abs, close, times_baseline)
}


class Rule(NamedTuple):
    """Passes where the statistic is at most `limit`.

    statistic: in STATISTICS
    oracle:    what outputs are compared with: a recipe, a kernel's name, or None for float64
    baseline:  whose own distance from the oracle is the unit, if any
    atol:      what is let pass beside that
    stored:    the format that all outputs are stored in
    """

    statistic: str
    limit: float
    oracle: Recipe | str | None = None
    baseline: Recipe | str | None = None
    atol: float = 0.0
    stored: Format = FLOAT32


class Matrix(NamedTuple):
    """One project's test, as far as it concerns half-precision attention without a mask.

    inputs:   of jaxattn.inputs.REGIMES
    contexts: its numbers of keys
    sizes:    queries, heads (of keys), group and head_dim of what is tried here
    partial:  what the source tests besides, or in larger tensors
    shape:    a line that adds a context to it, with {keys} in its place
    dtypes:   of the tensors that it is run on, of those that are tried here
    """

    name: str
    citation: str
    inputs: str
    contexts: tuple[int, ...]
    sizes: Mapping[str, int]
    rule: Rule
    partial: str
    shape: str
    dtypes: tuple[str, ...] = ("float16",)


LLAMA = Matrix(
    name="llama.cpp test-backend-ops",
    citation="ggml-org/llama.cpp, tests/test-backend-ops.cpp (test_flash_attn_ext, nmse,"
    " make_test_cases_eval) at 0054f928",
    inputs="uniform11",
    contexts=(113, 512, 1024),
    sizes={"queries": 32, "heads": 4, "group": 1, "head_dim": 128},
    rule=Rule("nmse_llama", 5e-4, oracle="ggml-cpu-decode"),
    partial="nb 1, 3, 75 and other head sizes; bfloat16 and quantised K and V; masks U(-1, 1),"
    " sinks, ALiBi, softcap",
    shape="test_cases.emplace_back(new test_flash_attn_ext(128, 128, 4, {{1, 1}}, {keys}, 32,"
    " false, false, 0, 0, GGML_PREC_F32, GGML_TYPE_F16, GGML_TYPE_F16));",
)

FLASH_ATTENTION = Matrix(
    name="flash-attention test_flash_attn_output",
    citation="Dao-AILab/flash-attention, tests/test_flash_attn.py (test_flash_attn_output,"
    " attention_ref) at 0251105a",
    inputs="gaussian",
    contexts=(203, 512, 1024, 2048),
    sizes={"queries": 128, "heads": 6, "group": 1, "head_dim": 128},
    rule=Rule("times_baseline", 2.0, baseline=UNFUSED, stored=FLOAT16),
    partial="up to 2,048 queries, batches of 4, head dims 32 to 256; causal, windows",
    shape='@pytest.mark.parametrize("seqlen_q,seqlen_k", [(128, {keys})])',
    dtypes=("float16", "bfloat16"),
)

FLASH_ATTENTION_CACHE = Matrix(
    name="flash-attention test_flash_attn_kvcache",
    citation="Dao-AILab/flash-attention, tests/test_flash_attn.py (test_flash_attn_kvcache) at"
    " 0251105a",
    inputs="gaussian",
    contexts=(128, 800, 2048, 20000, 131072),
    sizes={"queries": 16, "heads": 6, "group": 1, "head_dim": 128},
    rule=Rule("times_baseline", 3.0, baseline=UNFUSED, atol=1e-5, stored=FLOAT16),
    partial="each batch entry sees a random part of the keys; new keys, rotary, paged caches",
    shape='@pytest.mark.parametrize("seqlen_q,seqlen_k", [(16, {keys})])',
)

FLASHINFER = Matrix(
    name="flashinfer test_single_prefill",
    citation="flashinfer-ai/flashinfer, tests/attention/test_single_prefill.py"
    " (single_prefill_with_kv_cache_ref) at fb28d724",
    inputs="gaussian",
    contexts=(501, 2042, 3771, 4932),
    sizes={"queries": 127, "heads": 1, "group": 4, "head_dim": 128},
    rule=Rule("close", 1e-3, oracle=UNFUSED, stored=FLOAT16),
    partial="up to 1,024 queries; causal; its oracle rounds scores twice, here once",
    shape='@pytest.mark.parametrize("kv_len", [{keys}])',
)

FLASHINFER_DECODE = Matrix(
    name="flashinfer test_batch_decode",
    citation="flashinfer-ai/flashinfer, tests/attention/test_batch_decode_kernels.py"
    " (test_batch_decode_with_paged_kv_cache) at fb28d724",
    inputs="gaussian",
    contexts=(54, 512, 2048, 16384),
    sizes={"queries": 12, "heads": 4, "group": 1, "head_dim": 128},
    rule=Rule("close", 1e-3, oracle="flashinfer-fp16", stored=FLOAT16),
    partial="batches of 12 to 128 with keys of their own; its oracle is its own decode kernel",
    shape='@pytest.mark.parametrize("kv_len", [{keys}])',
)

MATRICES = (LLAMA, FLASH_ATTENTION, FLASH_ATTENTION_CACHE, FLASHINFER, FLASHINFER_DECODE)

RULES = {
    "nmse": Rule("nmse", 5e-4),
    "nmse_llama": Rule("nmse_llama", 5e-4),
    "max_abs": Rule("max_abs", 1e-2),
    "allclose": Rule("close", 1e-3),
    "fa2x": Rule("times_baseline", 2.0, baseline=UNFUSED, stored=FLOAT16),
    "flashinfer": FLASHINFER.rule._replace(oracle=None),
}


def dtype_of(kernel: Recipe) -> str | None:
    """The dtype of the tensors that a test would give the kernel; None if of neither half. A kernel
    that scales its queries by groups makes its own formats of them."""
    if kernel.query == BFLOAT16:
        return "bfloat16"
    return "float16" if kernel.query_group or holds(kernel.query, FLOAT16) else None


def in_dtype(rule: Rule, dtype: str | None) -> Rule:
    """The rule as it is for tensors of this dtype."""
    if dtype != "bfloat16":
        return rule
    return rule._replace(
        oracle=UNFUSED_BF16 if rule.oracle == UNFUSED else rule.oracle,
        baseline=UNFUSED_BF16 if rule.baseline == UNFUSED else rule.baseline,
        stored=BFLOAT16 if rule.stored == FLOAT16 else rule.stored,
    )


def rule_of(text: str) -> Rule:
    """`nmse=1e-4`, or a name of RULES alone; outputs are compared with float64.

    Raises ValueError for another name, or a limit that is not a positive number.
    """
    name, limit = metrics.parse_limit(text)
    if name not in RULES:
        raise unknown("metric", name, RULES)
    return RULES[name] if limit is None else RULES[name]._replace(limit=limit)
