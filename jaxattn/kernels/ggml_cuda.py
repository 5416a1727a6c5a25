"""ggml's CUDA and HIP flash attention, head dim 128: matrix cores (mma), tile and vec kernels."""

from jaxattn.formats import FLOAT16
from jaxattn.recipe import Recipe

_REPO, _AT = "ggml-org/ggml, src/ggml-cuda", "at d99724f2"
_CONSTANTS = "fattn-common.cuh (FATTN_KQ_MAX_OFFSET, 3·0.6931; SOFTMAX_FTZ_THRESHOLD)"
_OFFSET = 2.0792999267578125  # 3·0.6931 in float32
_LOWEST = -3.4028234663852886e38 / 2
_SUMS = "float32 sums in this host's order"
_FAST = f"expf under -use_fast_math as correctly rounded; {_SUMS}"
_MERGED = (
    "parts of the context (parallel blocks, stream-k) are merged in float32, not in the recipe"
)

# Half2 accumulators live in registers from the first key to the last.
MMA = Recipe(
    name="ggml-cuda-mma-f16",
    citation=(
        f"{_REPO}/fattn-mma-f16.cuh (flash_attn_ext_f16_iter, flash_attn_ext_f16_process_tile; "
        f"mma_tile_sizes: T_C_VKQ is half2), mma.cuh, {_CONSTANTS} {_AT}: Ampere and newer, "
        "blocks of 64 keys (ggml_cuda_fattn_mma_get_config_ampere)"
    ),
    inferred=(
        f"{_FAST}; mma.m16n8k16 with f16 accumulators adds 16 keys exactly and rounds once; 64 "
        "columns of queries, where one warp sees all keys: with fewer, up to 4 warps share them, "
        f"each with an o of its own, merged in float32; {_MERGED}"
    ),
    kv_block=64,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    scale=FLOAT16,
    scaled_query=FLOAT16,
    scale_at="query",
    probs=FLOAT16,
    output_rescale=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    output_every=16,
    initial_max=_LOWEST,
    max_offset=_OFFSET,
    rescale_flush=-20.0,
    normalise="divide",
    empty_inverse=float("inf"),  # 0/0
)

TURING = MMA.replace(
    name="ggml-cuda-mma-f16-turing",
    citation=MMA.citation.replace(
        "Ampere and newer, blocks of 64 keys (ggml_cuda_fattn_mma_get_config_ampere)",
        "Turing, at most 32 columns (ggml_cuda_flash_attn_ext_mma_f16_case), blocks of 64 keys",
    ),
    inferred=(
        f"{_FAST}; mma.m16n8k8 with f16 accumulators adds 8 keys exactly and rounds once; two "
        "warps share the keys, 16 at a time in turn, each with an m and o of its own, merged in "
        f"float32: here each has one half of the context; {_MERGED}"
    ),
    kv_block=32,
    split_kv=2,
    output_every=8,
)

MFMA = MMA.replace(
    name="ggml-cuda-mma-mfma",
    citation=(
        "ggml-org/llama.cpp #28576 (merged September 2026; float accumulators on MFMA devices), on "
        f"ggml-org/ggml, src/ggml-cuda/fattn-mma-f16.cuh {_AT}, whose float T_C_VKQ is handed over "
        "in half (tile_Q_h); before it, mma.cuh converts the accumulators to half2 after every "
        "16 keys: ggml-cuda-mma-f16 as it stands"
    ),
    inferred=(
        f"the change itself, of which the thread alone could be read; {_SUMS}, expf as correctly "
        f"rounded; {_MERGED}"
    ),
    output_rescale="float32",
    rescaled_output="float32",
    output="float32",
    output_every=None,
    final_output=FLOAT16,
)

TILE = MMA.replace(
    name="ggml-cuda-tile-f16",
    citation=(
        f"{_REPO}/fattn-tile.cuh (flash_attn_tile, flash_attn_tile_iter and _iter_KQ with "
        f"FAST_FP16_AVAILABLE), common.cuh (ggml_cuda_mad), {_CONSTANTS} {_AT}"
    ),
    inferred=(
        f"{_FAST}; V·P and its sum in half2 become one fused multiply-add, which rounds to float32 "
        "first here; a quarter of the query goes into the product and four times the score comes "
        f"out, exact but at the ends of half's range; {_MERGED}"
    ),
    query="float32",
    scale="float32",
    qk_accum=FLOAT16,  # each product is a half, their sum float32
    qk_chunk=1,
    qk_promote=1,
    output_every=1,
    rescale_flush=float("-inf"),
    normalise="multiply",
)

TILE_DOT2 = TILE.replace(
    name="ggml-cuda-tile-dot2",
    citation=TILE.citation + "; V_DOT2_F32_F16_AVAILABLE: AMD RDNA2 to 4, CDNA, gfx906",
    inferred=(
        f"{_SUMS}, v_dot2_f32_f16's too, expf as correctly rounded; V·P and its sum in half2 "
        "become one fused multiply-add, which rounds to float32 first here; where several warps "
        f"share the keys of two columns, they add their o in half2; {_MERGED}"
    ),
    qk_accum="float32",
    qk_chunk=None,
    qk_promote=None,
)

# K and V are halves in memory whatever the arithmetic.
TILE_F32 = TILE.replace(
    name="ggml-cuda-tile-f32",
    citation=TILE.citation.replace("with FAST_FP16", "without FAST_FP16")
    + ": compute capability 6.1, and below 6.0",
    inferred=f"{_FAST}; {_MERGED}",
    scaled_query="float32",
    qk_accum="float32",
    qk_chunk=None,
    qk_promote=None,
    probs="float32",
    output_rescale="float32",
    rescaled_output="float32",
    output="float32",
)

_CHAINS = (
    "4 warps, each with an m of its own, of 4 groups of threads, each with an o of its own (2 on "
    "Pascal): every fourth of its warp's 32 of each 128 keys there, a sixteenth of the context here"
)
VEC = TILE_F32.replace(
    name="ggml-cuda-vec",
    citation=f"{_REPO}/fattn-vec.cuh (flash_attn_ext_vec, 128 threads), {_CONSTANTS} {_AT}: NVIDIA",
    inferred=f"{_FAST}; {_CHAINS}, merged in float32; {_MERGED}",
    kv_block=8,
    split_kv=16,
    normalise="divide",
)

VEC_AMD = VEC.replace(
    name="ggml-cuda-vec-amd",
    citation=(
        f"{_REPO}/fattn-vec.cuh (flash_attn_ext_vec with V_DOT2_F32_F16_AVAILABLE), {_CONSTANTS} "
        f"{_AT}: AMD RDNA2 to 4, CDNA, gfx906"
    ),
    inferred=(
        f"{_SUMS}, v_dot2_f32_f16's too, expf as correctly rounded; half2 V·P and its sum become "
        f"one fused multiply-add, which rounds to float32 first here; {_CHAINS}, merged in "
        f"float32, where the kernel brings each to the common m in half; {_MERGED}"
    ),
    query=FLOAT16,
    scale=FLOAT16,
    scaled_query=FLOAT16,
    probs=FLOAT16,
    output_rescale=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
)

IK_BOUNDED = TILE.replace(
    name="ik-llama-cuda-bounded",
    citation=(
        "ikawrakow/ik_llama.cpp pull request #2151, ggml/src/ggml-cuda/fattn-tile-f16.cu "
        "(flash_attn_tile_ext_f16: FABSUM_PV_BLOCK 16, QK_FLUSH_BLOCK 8), fattn-common.cuh "
        "(max offset ln 4) at 0e3c93c0d"
    ),
    inferred=(
        f"{_FAST}; half2 V·P and its sum become one fused multiply-add, which rounds to float32 "
        "first here; in q·k 8 even or 8 odd of 16 products share a half accumulator there, 8 "
        f"neighbours here; {_MERGED}"
    ),
    query=FLOAT16,
    scale=FLOAT16,
    max_offset=1.3862943649291992,
    normalise="divide",
    qk_promote=8,
    pv_accum=FLOAT16,
    pv_chunk=1,
    output_rescale="float32",
    rescaled_output="float32",
    output="float32",
    output_every=16,
)

RECIPES = (MMA, TURING, MFMA, TILE, TILE_DOT2, TILE_F32, VEC, VEC_AMD, IK_BOUNDED)
