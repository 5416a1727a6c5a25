"""ggml's Vulkan flash attention, head dim 128 and half KV: coopmat2, coopmat1 and scalar shaders.

llama.cpp asks for float32 precision always; o is a half all the same, unless K is bfloat16.
"""

from jaxattn.formats import FLOAT16
from jaxattn.recipe import Recipe

_SHADERS = "ggml-org/ggml, src/ggml-vulkan/vulkan-shaders"
_BASE = "flash_attn_base.glsl (O_TYPE, FATTN_KQ_MAX_OFFSET), vulkan-shaders-gen.cpp at d99724f2"
_OFFSET = 2.0792999267578125  # 3·0.6931 in float32
_LOWEST = -3.4028234663852886e38 / 2
_FLOAT = "exp as correctly rounded; float32 sums in this host's order"
_SPLIT = "split_k parts are merged in float32 and are not in the recipe"

CM2 = Recipe(
    name="ggml-vulkan-cm2",
    citation=(
        f"{_SHADERS}/flash_attn_cm2.comp, {_BASE}; ggml-vulkan.cpp "
        "(get_fa_tuning_params_coopmat2: 64 keys for 32 rows and more)"
    ),
    inferred=(
        f"{_FLOAT}; coopMatMulAdd with half accumulators adds 16 keys exactly and rounds once, as "
        f"mma.m16n8k16 does; a matrix of ones sums rounded p in float32; {_SPLIT}"
    ),
    kv_block=64,
    key=FLOAT16,
    value=FLOAT16,
    scale_at="query",
    scaled_query=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    output_rescale=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    output_every=16,
    initial_max=_LOWEST,
    max_offset=_OFFSET,
)

# ln 8 as a half; m starts at half of the lowest half.
CM2_F16ACC = CM2.replace(
    name="ggml-vulkan-cm2-f16acc",
    citation=CM2.citation.replace("_cm2.comp", "_cm2.comp with ACC_TYPE float16_t"),
    inferred=CM2.inferred.replace(
        "a matrix of ones sums rounded p in float32",
        "so do q·k, after 16 products, and the sums of p by a matrix of ones, which round once a "
        "block here; exp of a half as correctly rounded; the result's clamp to 65504 is left out",
    ),
    qk_accum=FLOAT16,
    qk_chunk=16,
    scores=FLOAT16,
    cap=FLOAT16,
    squashed=FLOAT16,
    softcap=FLOAT16,
    bias=FLOAT16,
    running_max=FLOAT16,
    difference=FLOAT16,
    row_sum=FLOAT16,
    rescale=FLOAT16,
    rescaled_sum=FLOAT16,
    running_sum=FLOAT16,
    inverse=FLOAT16,
    initial_max=-65504.0 / 2,
    max_offset=2.080078125,
)

CM1 = CM2.replace(
    name="ggml-vulkan-cm1",
    citation=(
        f"{_SHADERS}/flash_attn_cm1.comp, {_BASE}; ggml-vulkan.cpp "
        "(get_fa_tuning_params_coopmat1: 16 keys for each of 4 subgroups)"
    ),
    inferred=(
        f"{_FLOAT}; coopMatMulAdd with half accumulators adds 16 keys exactly and rounds once; "
        "the result's clamp to 65504 is left out; split_k parts are merged, and normalised, in "
        "float32 and are not in the recipe"
    ),
    pv_accum=FLOAT16,  # a block's p·v starts at zero, and is added to o
    pv_chunk=16,
    output_every=None,
    inverse=FLOAT16,
    result=FLOAT16,
)

SCALAR = CM2.replace(
    name="ggml-vulkan-scalar",
    citation=(
        f"{_SHADERS}/flash_attn.comp, {_BASE}; ggml-vulkan.cpp "
        "(get_fa_tuning_params_scalar: 32 keys, subgroups of 32 threads, d_split 8, row_split 4)"
    ),
    inferred=(
        f"{_FLOAT}; drivers make one fused multiply-add of half(p·v) and its sum, which rounds to "
        "float32 first here; 4 threads' chains of every fourth key, each with its own m, stand as "
        "4 quarters of the context, merged in float32 and rounded once, where the shader merges in "
        "half; the result's clamp to 65504 is left out; a single row has blocks of 64 keys; "
        "split_k parts are merged, and normalised, in float32 and are not in the recipe"
    ),
    kv_block=8,
    split_kv=4,
    output_every=1,
    final_output=FLOAT16,
    inverse=FLOAT16,
    result=FLOAT16,
)

RECIPES = (CM2, CM2_F16ACC, CM1, SCALAR)
