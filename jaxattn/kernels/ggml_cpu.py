"""ggml's CPU flash attention: the oracle of llama.cpp's own FLASH_ATTN_EXT test."""

from jaxattn.formats import FLOAT16, FLOAT32
from jaxattn.recipe import Recipe

_OPS = "ggml-org/ggml, src/ggml-cpu/ops.cpp"

DECODE = Recipe(
    name="ggml-cpu-decode",
    citation=(
        f"{_OPS} (ggml_compute_forward_flash_attn_ext_f16_one_chunk, float16 V) and vec.h "
        "(ggml_vec_mad_f16, ggml_vec_scale_f16; x86 with F16C) at d99724f2"
    ),
    inferred=(
        "float32 sums inside q·k in this host's order; a single query token with 512 keys and more "
        "is split (ggml-cpu-splitkv)"
    ),
    evidence="real kernel",
    kv_block=1,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    output_every=1,
    sinks="after",
)

DECODE_F32 = DECODE.replace(
    name="ggml-cpu-decode-f32",
    citation=DECODE.citation.replace("float16 V", "V of another type: o in float32"),
    query=FLOAT32,
    key=FLOAT32,
    value=FLOAT32,
    output=FLOAT32,
)

DECODE_NEON = DECODE.replace(
    name="ggml-cpu-decode-neon",
    citation=DECODE.citation.replace("x86 with F16C", "Arm NEON with half arithmetic")
    + "; ggml_vec_dot_f16 in vec.cpp, GGML_F16x8_REDUCE in simd-mappings.h",
    inferred=(
        "half fused multiply-adds round to float32 before they round to half; the last value dims, "
        "where 32 does not divide them, take p and the factor in float32 there"
    ),
    evidence="",
    qk_accum=FLOAT16,
    qk_chunk=1,
    qk_partials=32,
    qk_tree=8,
    probs=FLOAT16,
    output_rescale=FLOAT16,
)

DECODE_AVX512FP16 = DECODE.replace(
    name="ggml-cpu-decode-avx512fp16",
    citation=DECODE.citation.replace("x86 with F16C", "x86 with AVX512-FP16")
    + "; ggml_vec_dot_f16 in vec.cpp",
    inferred=(
        "half fused multiply-adds round to float32 before they round to half; the last value dims, "
        "where 128 does not divide them (all of head dim 64), take p and the factor in float32 "
        "there"
    ),
    evidence="",
    qk_accum=FLOAT16,
    qk_chunk=1,
    qk_partials=128,
    qk_tree=1,
    probs=FLOAT16,
    output_rescale=FLOAT16,
)

PREFILL = Recipe(
    name="ggml-cpu-prefill",
    citation=(
        f"{_OPS} (ggml_compute_forward_flash_attn_ext_tiled) and simd-gemm.h at d99724f2: one "
        "float32 multiply-add per key"
    ),
    inferred=(
        "a tile's row sum, double in the source, is float32 here; its exponential, a polynomial "
        "(ggml_v_expf), as correctly rounded; q·k, one serial chain, in this host's order"
    ),
    evidence="real kernel",
    kv_block=64,
    output_every=1,
)

SPLITKV = DECODE.replace(
    name="ggml-cpu-splitkv",
    citation=DECODE.citation + "; ggml_flash_attn_ext_reduce_partials",
    inferred=(
        "float32 sums inside q·k in this host's order; 8 threads, the kernel's chunks being "
        "ceil(keys / threads)"
    ),
    split_kv=8,
)

RECIPES = (DECODE, DECODE_F32, DECODE_NEON, DECODE_AVX512FP16, PREFILL, SPLITKV)
