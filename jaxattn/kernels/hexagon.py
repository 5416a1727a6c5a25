"""Flash attention on Qualcomm's Hexagon NPU, in ggml's backend: the HMX kernel before, in and after
the change that llama.cpp #24389 asked for, and the HVX kernel."""

from math import log

from jaxattn.formats import FLOAT16, FLOAT32
from jaxattn.recipe import Recipe

LN2 = log(2)

FP16 = Recipe(
    name="hexagon-hmx-fp16",
    citation=(
        "ggml-org/ggml, src/ggml-hexagon/htp/hmx-flash-attn-ops.c at 9d47b21b..7047417e "
        "(llama.cpp #22347, #23796, #23989): fa_softmax_thread, fa_ml_update_and_build_d, "
        "hmx_fa_qk_dot_worker, hmx_fa_o_update_worker, fa_build_d_diag_inv_l, hmx_fa_o_norm_worker"
    ),
    inferred=(
        "HMX accumulates in float32 (its accumulator has 30 significant bits by QEMU's model, "
        "androm3da/qemu target/hexagon/hmx_config.c) and rounds once at the tile store, keeping "
        "subnormals and overflowing to infinity (the model saturates unless told otherwise); "
        "l, a qfloat16 in the source, stands as IEEE half here (see -qf16 and -qf16-spill)"
    ),
    kv_block="hexagon-hmx-2026-06",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    scale=FLOAT16,
    scores=FLOAT16,
    softcap=FLOAT16,
    bias=FLOAT16,
    running_max=FLOAT16,
    difference=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    row_sum=FLOAT16,
    rescale=FLOAT16,
    rescaled_sum=FLOAT16,
    running_sum=FLOAT16,
    output=FLOAT16,
    inverse=FLOAT16,
    result=FLOAT16,
    # No infinities: a masked score is the lowest half, and so is m at first. A block without a
    # single unmasked key therefore averages V, until a later key wipes it out.
    initial_max=-65504.0,
    mask_value=-65504.0,
    mask_below=-16.0,
    empty_inverse=float("inf"),
    sinks="none",
)

QF16 = FP16.replace(
    name="hexagon-hmx-fp16-qf16",
    inferred=FP16.inferred.replace(
        "stands as IEEE half here (see -qf16 and -qf16-spill)",
        "has an odd significand here: what a stored qfloat16 reads as, on v79 exactly and on "
        "v68-v75 nearly, by QEMU's model (quic/qemu, target/hexagon/mmvec/mmvec_qfloat.c)",
    ),
    rescaled_sum="float16:odd",
    running_sum="float16:odd",
)

QF16_SPILL = FP16.replace(
    name="hexagon-hmx-fp16-qf16-spill",
    inferred=FP16.inferred.replace(
        "stands as IEEE half here (see -qf16 and -qf16-spill)",
        "is floored to an even significand here after each block, as if memory lost v79's extra "
        "bits and a load gave zeros for them: a worst case. QEMU's model contradicts it (a load "
        "sets the last bit, as in -qf16); no hardware was asked",
    ),
    rescaled_sum=FLOAT16,
    running_sum="e5m9:floor",
)

EXP2HF = FP16.replace(
    name="hexagon-hmx-exp2hf",
    citation=FP16.citation + "; hvx_exp2_hf under GGML_HEXAGON_FA_EXP2_HF",
    exp="exp2_half",
    cap="float32",
    bias_factor=LN2,  # the mask is added to base-2 scores without log2(e), as the source has it
)

PR24389 = FP16.replace(
    name="hexagon-pr24389",
    citation="ggml-org/llama.cpp pull request 24389 (closed unmerged): its description",
    inferred=(
        "hexagon-hmx-fp16 with m, the row sum and l in float32 and all else unchanged: the diff "
        "could not be read; " + FP16.inferred.split(";")[0]
    ),
    running_max="float32",
    row_sum="float32",
    running_sum="float32",
)

FP32 = Recipe(
    name="hexagon-hmx-fp32",
    citation=(
        "ggml-org/ggml, src/ggml-hexagon/htp/flash-attn-ops.c (fa_softmax_impl, "
        "fa_build_d_diag_inv_l, hmx_fa_o_update_worker) and htp/hvx-exp.h (hvx_vec_exp2_f16) at "
        "009f4ccd..d99724f2 (llama.cpp #25085, merged)"
    ),
    inferred=(
        "HMX accumulates in float32 and rounds once at the tile store, as in hexagon-hmx-fp16; "
        "kv_block follows the cost model of #26049 (c2a30bb8), three weeks younger; the "
        "qfloat16 steps of exp2 stand as IEEE half steps; a row whose every key is masked, "
        "undefined in the source, gives NaN"
    ),
    kv_block="hexagon-hmx-2026-08",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    scale=FLOAT16,
    cap=FLOAT16,
    scores=FLOAT16,
    softcap=FLOAT16,
    bias=FLOAT16,
    running_max=FLOAT32,
    seen_max=FLOAT16,
    difference=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    row_sum=FLOAT16,
    rescale=FLOAT16,
    output=FLOAT16,
    inverse=FLOAT16,
    result=FLOAT16,
    initial_max=-10000.0,
    mask_value=-65504.0,
    mask_below=-16.0,
    bias_factor=1.4423828125 * LN2,  # log2(e) in half precision
    empty_inverse=float("inf"),
    exp="exp2_half_clamped",
    tanh="tanh_half",
    sinks="seed",
)

HVX = Recipe(
    name="hexagon-hvx",
    citation=(
        "ggml-org/ggml, src/ggml-hexagon/htp/flash-attn-ops.c (flash_attn_ext_f16_thread) at "
        "d99724f2"
    ),
    inferred="float32 dot products and sums in this host's order; qfloat steps stand as IEEE ones",
    kv_block=64,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    log2e=FLOAT16,
    cap=FLOAT16,
    scores=FLOAT16,
    softcap=FLOAT16,
    bias=FLOAT16,
    seen_max=FLOAT16,
    difference=FLOAT16,
    exponent=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    rescale=FLOAT16,
    initial_max=-10000.0,
    mask_value=-65504.0,
    mask_below=-65504.0,
    exp="exp2_half_clamped",
    log2e_at="exponent",
    tanh="tanh_half",
    sinks="after",
)

RECIPES = (FP16, QF16, QF16_SPILL, EXP2HF, PR24389, FP32, HVX)
