"""Flash attention written in Triton: the tutorial on fused attention; flash-linear-attention."""

from jaxattn.formats import BFLOAT16, FLOAT16, format_of
from jaxattn.recipe import Recipe

E5M2, FP22 = format_of("float8_e5m2"), format_of("fp22")

_TUTORIAL = "triton-lang/triton, python/tutorials/06-fused-attention.py"
_SUMS = "exp2 as correctly rounded (ex2.approx on NVIDIA); float32 sums in this host's order"

FP16 = Recipe(
    name="triton-tutorial-fp16",
    citation=(
        f"{_TUTORIAL} (_attn_fwd_inner, _attn_fwd) at 003da478; the same arithmetic in "
        "flash-attn-triton 0.1.1 (PyPI), triton_kernel/attention_kernel.py"
    ),
    inferred=f"{_SUMS}; blocks of 64 keys, where the autotuner may choose 32 (or 128 with TMA)",
    evidence="real kernel",
    kv_block=64,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    probs=FLOAT16,
    result=FLOAT16,
    mask_value=-1e6,
    exp="exp2",
    normalise="divide",
    sinks="none",
)

_BF16 = dict.fromkeys(("query", "key", "value", "probs", "result"), BFLOAT16)

# The tutorial itself casts P to float16 or FP8 alone: bfloat16 is the package's addition.
BF16 = FP16.replace(
    name="triton-tutorial-bf16",
    citation=(
        "flash-attn-triton 0.1.1 (PyPI), triton_kernel/attention_kernel.py (_attn_fwd_inner and "
        "_attn_fwd with IS_BF16)"
    ),
    inferred=f"{_SUMS}; blocks of 64 keys, where the autotuner may choose 16 or 32",
    **_BF16,
)

FP8 = FP16.replace(
    name="triton-tutorial-fp8",
    citation=(
        f"{_TUTORIAL} (_attn_fwd_inner with fp8_v; bench_flash_attention) at 003da478; triton "
        "3.9.0 (PyPI), backends/nvidia/compiler.py (max_num_imprecise_acc_default on sm_90)"
    ),
    inferred=(
        f"{_SUMS}; a Hopper GPU, where Triton never promotes an FP8 accumulator: FP22, the 32 "
        "products of a WGMMA added exactly, what it held cut first; blocks of 64 keys"
    ),
    evidence="",
    query=E5M2,
    key=E5M2,
    value=E5M2,
    qk_accum=FP22,
    qk_chunk=32,
    probs=E5M2,
    rescaled_output=FP22,
    output=FP22,
    output_every=32,
    result=E5M2,
)

FLA_FP16 = Recipe(
    name="fla-parallel-attn-fp16",
    citation=(
        "fla-core 0.6.0 (PyPI), fla/ops/attn/parallel.py (parallel_attn_fwd_kernel, "
        "parallel_attn_fwd), fla/ops/utils/op.py (exp2): flash-linear-attention's softmax "
        "attention, always causal"
    ),
    inferred=f"{_SUMS}; blocks of 32 keys, 64 on Hopper",
    evidence="real kernel",
    kv_block=32,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    probs=FLOAT16,
    result=FLOAT16,
    exp="exp2",
    normalise="divide",
    sinks="end",
)

FLA_BF16 = FLA_FP16.replace(name="fla-parallel-attn-bf16", **_BF16)

RECIPES = (FP16, BF16, FP8, FLA_FP16, FLA_BF16)
