"""Attention of inference runtimes: ONNX Runtime, MLX, OpenVINO and ExecuTorch."""

from typing import Any

from jaxattn.formats import BFLOAT16, FLOAT16
from jaxattn.recipe import Recipe

_REAL = "real kernel"


def _narrow(format: Any) -> dict[str, Any]:
    """Everything that MLX's operations store between them, softmax's own float32 apart."""
    sites = "query key value scale scaled_query scores probs result".split()
    return dict.fromkeys(sites, format)


ONNXRUNTIME = Recipe(
    name="onnxruntime-mha",
    citation=(
        "microsoft/onnxruntime, onnxruntime/core/mlas/lib/flashattn.cpp "
        "(MlasFlashAttentionThreaded) at 19094f87"
    ),
    inferred="kv_block, which the kernel takes from the L2 cache's size; sums in this host's order",
    evidence=_REAL,
    kv_block=256,
    initial_max=-3.4028234663852886e38,
    normalise="divide",
    sinks="none",
)

EXECUTORCH = Recipe(
    name="executorch-sdpa",
    citation=(
        "pytorch/executorch, extension/llm/custom_ops/op_sdpa_impl.h (cpu_flash_attention) at "
        "00f16074"
    ),
    inferred=(
        "kv_block=512, as in the ATen kernel that it comes from; sums in this host's order, p·v's "
        "over 128 keys at a time, as the size of its errors tells"
    ),
    evidence=_REAL,
    kv_block=512,
    output_every=128,
    sinks="none",
)

MLX_F32 = Recipe(
    name="mlx-cpu-f32",
    citation="ml-explore/mlx, mlx/fast.cpp (scaled_dot_product_attention, fallback) at 0017d3c3",
    inferred="its matrix product adds one key after another in float32 (from its error's growth)",
    evidence=_REAL,
    kv_block="whole",
    output_every=1,
    scale_at="query",
    normalise="before",
    mask_value=-3.4028234663852886e38,
    sinks="none",
)
MLX_FP16 = MLX_F32.replace(name="mlx-cpu-fp16", **_narrow(FLOAT16))
MLX_BF16 = MLX_F32.replace(name="mlx-cpu-bf16", **_narrow(BFLOAT16))

_METAL = "ml-explore/mlx, mlx/backend/metal/kernels"

MLX_VECTOR = Recipe(
    name="mlx-sdpa-vector-fp16",
    citation=f"{_METAL}/sdpa_vector.h (sdpa_vector) at 846d1762: few queries",
    inferred=(
        "fast::exp as correctly rounded; the kernel walks keys in 32 interleaved chains that it "
        "merges in float32, here they are one (the first starts at the sink); the kernel of two "
        "passes for long contexts splits them further, in float32 too"
    ),
    kv_block=32,
    scale_at="query",
    normalise="divide",
    initial_max=-3.4028234663852886e38,
    sinks="seed",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    result=FLOAT16,
)
MLX_STEEL = MLX_VECTOR.replace(
    name="mlx-steel-attention-fp16",
    citation=(
        f"{_METAL}/steel/attn/kernels/steel_attention.h (attention: ExpSubOp, DivOp; S, P and O in "
        "float) and mlx/backend/metal/scaled_dot_product_attention.cpp "
        "(sdpa_full_self_attention_metal) at 846d1762: 16 keys at head dim 128, 32 below"
    ),
    inferred="fast::exp2 as correctly rounded; sums in this host's order",
    kv_block=16,
    exp="exp2",
    scale_at="scores",
    mask_value=-3.4028234663852886e38,
)

OPENVINO_F32 = Recipe(
    name="openvino-cpu-f32",
    citation=(
        "openvinotoolkit/openvino, src/common/snippets/src/pass/mha_tokenization.cpp, as the "
        "openvino 2026.4.1 package runs ScaledDotProductAttention"
    ),
    inferred="all fields: read from the outputs of the real kernel, not from its source",
    evidence=_REAL,
    kv_block="whole",
    normalise="before",
    sinks="none",
)
OPENVINO_BF16 = OPENVINO_F32.replace(
    name="openvino-cpu-bf16", query=BFLOAT16, key=BFLOAT16, value=BFLOAT16, probs=BFLOAT16
)

RECIPES = (
    ONNXRUNTIME,
    EXECUTORCH,
    MLX_F32,
    MLX_FP16,
    MLX_BF16,
    MLX_VECTOR,
    MLX_STEEL,
    OPENVINO_F32,
    OPENVINO_BF16,
)
