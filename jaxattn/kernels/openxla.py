"""JAX's own attention: jax.nn, the Pallas kernels that come with jax, MaxText's and Flax's."""

from typing import Any

from jaxattn.formats import BFLOAT16, FLOAT16
from jaxattn.recipe import Recipe

_JAX = "jax-ml/jax"
_LOWEST = -0.7 * 3.4028234663852886e38  # what the Pallas kernels put for a masked score
_REAL = "real kernel"
_WHOLE: dict[str, Any] = {"kv_block": "whole", "mask_value": _LOWEST, "sinks": "none"}
_MXU = "a TPU's matrix unit takes float32 in passes of bfloat16, one by default"


def _inputs(dtype: Any) -> dict[str, Any]:
    return {"query": dtype, "key": dtype, "value": dtype, "probs": dtype, "result": dtype}


NN_F32 = Recipe(
    name="jax-nn-f32",
    citation=f"{_JAX}, jax/_src/nn/functions.py (_dot_product_attention_core, _softmax) in 0.10.2",
    inferred="XLA's sums, in this host's order; exp as correctly rounded; p as e·(1/l) by XLA",
    evidence=_REAL,
    normalise="before",
    **_WHOLE,
)

NN_BF16 = NN_F32.replace(
    name="jax-nn-bf16",
    inferred=(
        NN_F32.inferred + "; p·v, which asks for no type, is summed in float32 and rounded once "
        "on a CPU (measured); taken to be so on TPU and GPU"
    ),
    **_inputs(BFLOAT16),
)
NN_FP16 = NN_BF16.replace(
    name="jax-nn-fp16",
    inferred=NN_BF16.inferred.replace(
        "on a CPU (measured)",
        "on a CPU (measured; there the function falls back to plain einsum outside of jit, and "
        "fails inside: F16_F16_F32 is no algorithm of XLA's CPU backend)",
    ),
    **_inputs(FLOAT16),
)

# What float32 arrays get on accelerators unless a precision is asked for (jax, "Matmul precision").
NN_F32_TPU = NN_F32.replace(
    name="jax-nn-f32-tpu",
    inferred=NN_F32.inferred + "; one pass of bfloat16 on a TPU, operands rounded to nearest",
    evidence="",
    **{**_inputs(BFLOAT16), "result": "float32"},
)
NN_F32_TF32 = NN_F32.replace(
    name="jax-nn-f32-tf32",
    inferred=NN_F32.inferred + "; TF32 on an Nvidia GPU, operands rounded to nearest",
    evidence="",
    **{**_inputs("tf32"), "result": "float32"},
)

TPU_FLASH_F32 = Recipe(
    name="pallas-tpu-flash-f32",
    citation=(
        f"{_JAX}, jax/experimental/pallas/ops/tpu/flash_attention.py "
        "(_flash_attention_kernel_single_batch, BlockSizes.get_default) in 0.10.2"
    ),
    inferred=(
        f"sums in this host's order; {_MXU}; a single block of keys takes another kernel, that of "
        "jax-nn-*; the kernel adds a bias before it scales"
    ),
    evidence=_REAL,
    kv_block=128,
    normalise="blocks",
    mask_value=_LOWEST,
    sinks="none",
)
TPU_FLASH_BF16 = TPU_FLASH_F32.replace(
    name="pallas-tpu-flash-bf16",
    inferred=TPU_FLASH_F32.inferred.replace(f"; {_MXU}", ""),
    **_inputs(BFLOAT16),
)

SPLASH_F32 = Recipe(
    name="splash-f32",
    citation=(
        f"{_JAX}, jax/experimental/pallas/ops/tpu/splash_attention/splash_attention_kernel.py "
        "(flash_attention_kernel, BlockSizes.get_default) in 0.10.2"
    ),
    inferred=(
        f"sums in this host's order; {_MXU}; the kernel takes no scale: callers multiply q by it, "
        "in q's dtype"
    ),
    evidence=_REAL,
    kv_block=128,
    scale_at="query",
    cap_at="scores",
    initial_max=_LOWEST,
    mask_value=_LOWEST,
    sinks="seed",
)
SPLASH_BF16 = SPLASH_F32.replace(
    name="splash-bf16",
    query=BFLOAT16,
    key=BFLOAT16,
    value=BFLOAT16,
    scale=BFLOAT16,
    scaled_query=BFLOAT16,
    result=BFLOAT16,  # p stays in float32, and v is widened to it
)
SPLASH_BF16_MXU = SPLASH_BF16.replace(
    name="splash-bf16-mxu",
    inferred=SPLASH_F32.inferred + "; so p is rounded to bfloat16 inside the matrix unit",
    evidence="",
    probs=BFLOAT16,
    summand="float32",
)

GPU_MHA_FP16 = Recipe(
    name="pallas-gpu-mha-fp16",
    citation=(
        f"{_JAX}, jax/experimental/pallas/ops/gpu/attention.py (mha_forward_kernel, "
        "BlockSizes.get_default) in 0.10.2"
    ),
    inferred="sums of a tensor core in float32 in this host's order; exp2 as correctly rounded",
    evidence=_REAL,
    kv_block=128,
    exp="exp2",
    normalise="divide",
    mask_value=_LOWEST,
    sinks="none",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    probs=FLOAT16,
    result=FLOAT16,
)
GPU_MHA_BF16 = GPU_MHA_FP16.replace(name="pallas-gpu-mha-bf16", **_inputs(BFLOAT16))

_MAXTEXT = (
    "AI-Hypercomputer/maxtext, src/maxtext/layers/attention_op.py (apply_attention_dot, "
    "qk_product, compute_local_attention, wv_product) at e591f30"
)
_NARROW_LOGITS = ("scores", "cap", "squashed", "softcap", "bias")
_NARROW_SOFTMAX = (
    *("running_max", "difference", "probs", "summand", "row_sum", "running_sum"),
    *("output", "result"),
)
MAXTEXT_BF16 = Recipe(
    name="maxtext-bf16",
    citation=_MAXTEXT + ", float32_logits and float32_qk_product false (base.yml's defaults)",
    inferred=(
        "products and the row sum run in float32 and are rounded once, as measured of XLA on a "
        "CPU; where XLA may keep excess precision the row sum takes p before it is rounded; "
        "q is scaled in its dtype (query_pre_attn_scalar; else the scale is in q's weights)"
    ),
    scale_at="query",
    cap_at="scores",
    scale=BFLOAT16,
    scaled_query=BFLOAT16,
    normalise="divide",
    # As bfloat16 has it; a sink is a column of the logits.
    **{**_WHOLE, "mask_value": -2.3793181124549994e38, "sinks": "end"},
    **{**dict.fromkeys(_NARROW_LOGITS + _NARROW_SOFTMAX, BFLOAT16), **_inputs(BFLOAT16)},
)
MAXTEXT_LOGITS = MAXTEXT_BF16.replace(
    name="maxtext-float32-logits",
    citation=_MAXTEXT + ", float32_logits true: softmax and p·v in float32",
    inferred=(
        "the product q·k is rounded once; p and v meet in float32 (a TPU rounds both to bfloat16 "
        "again unless matmul_precision says otherwise), and so does the result leave; q is scaled "
        "in its dtype"
    ),
    **dict.fromkeys(_NARROW_SOFTMAX, "float32"),
)
MAXTEXT_FLOAT32 = MAXTEXT_LOGITS.replace(
    name="maxtext-float32",
    citation=_MAXTEXT + ", float32_logits and float32_qk_product true",
    inferred=MAXTEXT_LOGITS.inferred.replace("the product q·k is rounded once; ", ""),
    **dict.fromkeys(_NARROW_LOGITS, "float32"),
)

FLAX_BF16 = MAXTEXT_BF16.replace(
    name="flax-bf16",
    citation=(
        "google/flax, flax/linen/attention.py (dot_product_attention_weights, "
        f"dot_product_attention) in 0.12.8, force_fp32_for_softmax false; {_JAX}, "
        "jax/_src/nn/functions.py (_softmax) in 0.10.2"
    ),
    inferred=(
        "products and the row sum run in float32 and are rounded once (measured on a CPU); where "
        "XLA may keep excess precision the row sum takes p before it is rounded; q is divided by "
        "the root of H in bfloat16, exact where that is a power of two"
    ),
    evidence=_REAL,
    scale="float32",
    mask_value=-3.3895313892515355e38,
    normalise="before",
    sinks="none",
)

RECIPES = (
    NN_F32,
    NN_BF16,
    NN_FP16,
    NN_F32_TPU,
    NN_F32_TF32,
    TPU_FLASH_F32,
    TPU_FLASH_BF16,
    SPLASH_F32,
    SPLASH_BF16,
    SPLASH_BF16_MXU,
    GPU_MHA_FP16,
    GPU_MHA_BF16,
    MAXTEXT_BF16,
    MAXTEXT_LOGITS,
    MAXTEXT_FLOAT32,
    FLAX_BF16,
)
