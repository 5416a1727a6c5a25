"""SageAttention 1, 2 and 2++: INT8 scores, and p·v in float16 or FP8.

The wrappers take the mean key of the whole sequence from K first (smooth_k), in K's own dtype. That
is a change of the inputs, which no softmax sees: do it to K where it matters.
"""

from math import log

from jaxattn.formats import FLOAT16, format_of
from jaxattn.recipe import Recipe

INT8, FP22 = format_of("int8"), format_of("fp22")
E4M3, E8M3 = format_of("float8_e4m3fn:sat"), format_of("e8m3")

_REPO = "thu-ml/SageAttention"
_SIZES = "the rounding of units, halves away from zero (amax / 127 + 1e-7 on a GPU), stands as even"

SAGE_1 = Recipe(
    name="sage-1",
    citation=(
        "sageattention 1.0.6 (PyPI), attn_qk_int8_per_block.py (_attn_fwd_inner, _attn_fwd), "
        f"quant_per_block.py and core.py (sageattn); the same arithmetic in {_REPO}, "
        "sageattention/triton/attn_qk_int8_per_block.py at d1a57a5"
    ),
    inferred=(
        "tl.dot with out_dtype float16 rounds after every 16 keys, as mma.m16n8k16 does (Triton's "
        "interpreter: once a block, pv_chunk=64); the rounding of units, amax / 127 and halves "
        "away from zero, stands as even; q·k is exact, as int32 sums are. 1.0.6 gives the slots "
        "behind a context that 64 does not divide a score of 0, HEAD masks them as here and adds a "
        "bias to base-2 scores as it is, without log2(e)"
    ),
    evidence="real kernel",
    kv_block=64,
    query=INT8,
    query_group=128,
    key=INT8,
    key_group=64,
    value=FLOAT16,
    probs=FLOAT16,
    pv_accum=FLOAT16,
    pv_chunk=16,
    mask_value=-1e6,
    bias_factor=log(2),
    exp="exp2",
    normalise="divide",
    sinks="none",
)

SM80 = Recipe(
    name="sage-sm80-fp32",
    citation=(
        f"{_REPO}, csrc/qattn/qk_int_sv_f16_cuda_sm80.cu (qk_int_sv_f16_attn_kernel), "
        "csrc/qattn/attn_utils.cuh (update_mdo, RS_32_to_16, accumulate_d, "
        "compute_fp16_sv_permuted, normalize_d), sageattention/core.py "
        "(sageattn_qk_int8_pv_fp16_cuda), triton/quant_per_thread.py at d1a57a5"
    ),
    inferred=(
        "ex2.approx and rcp.approx as correctly rounded, sums of a tensor core in float32 in this "
        f"host's order; s·scale - m is one FMA in the kernel; {_SIZES}; the 4 queries (of 32) and "
        "16 keys (of 64) that share a unit lie apart in the kernel and side by side here; a masked "
        "score is -5e6 before the scale there"
    ),
    kv_block=64,
    query=INT8,
    query_group=4,
    key=INT8,
    key_group=16,
    value=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    result=FLOAT16,
    initial_max=-5e6,
    mask_value=-5e6,
    exp="exp2",
    sinks="none",
)

SM80_FP16 = SM80.replace(
    name="sage-sm80-fp16",
    inferred=SM80.inferred + "; an f16 accumulator rounds once a 16-key instruction",
    output_rescale=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    output_every=16,
)

SM80_FP16_FP32 = SM80.replace(
    name="sage-sm80-fp16-fp32",
    citation=SM80.citation.replace("_sv_permuted", "_sv_permuted_inst_buf"),
    inferred=(
        SM80.inferred.replace("the 4 queries (of 32)", "the 2 queries (of 16, head dim 128)")
        + "; an f16 accumulator rounds once a 16-key instruction"
    ),
    query_group=2,
    pv_accum=FLOAT16,
    pv_chunk=16,
)

# V has a unit for each channel of the whole context, so that its largest number is FP8's: e8m3 is
# FP8 without an end to its range.
SM89 = Recipe(
    name="sage2-sm89-fp32",
    citation=(
        f"{_REPO}, csrc/qattn/qk_int_sv_f8_cuda_sm89.cuh (qk_int_sv_f8_attn_kernel), "
        "csrc/qattn/attn_utils.cuh (S_FP8_OFFSET, update_mdo, RS_32_to_8, accumulate_d, "
        "compute_fp8_sv, normalize_d), sageattention/core.py (sageattn_qk_int8_pv_fp8_cuda), "
        "quant.py (per_channel_fp8), csrc/numeric_conversion.cuh at d1a57a5; FP22: SageAttention2, "
        "arXiv 2411.10958, section 3.4"
    ),
    inferred=(
        f"{SM80.inferred}; the 32 products of an instruction are added exactly, and what the "
        "accumulator held before them is cut to FP22 first; V's unit for each channel, 448 / amax "
        "over the whole context, is no rounding here (e8m3: V keeps FP8's 4 bits, in steps that a "
        "unit which is no power of two would shift)"
    ),
    kv_block=64,
    query=INT8,
    query_group=4,
    key=INT8,
    key_group=16,
    value=E8M3,
    probs=E4M3,
    rescaled_output=FP22,
    output=FP22,
    output_every=32,
    result=FLOAT16,
    initial_max=-5e6,
    mask_value=-5e6,
    max_offset=-8.807,
    exp="exp2",
    sinks="none",
)

SM89_FP32_FP32 = SM89.replace(
    name="sage2-sm89-fp32-fp32",
    citation=SM89.citation.replace("compute_fp8_sv", "compute_fp8_sv_inst_buf"),
    rescaled_output="float32",
    output="float32",
    output_every=None,
    pv_accum=FP22,
    pv_chunk=32,
)

SM90_FP32_FP32 = SM89_FP32_FP32.replace(
    name="sage2-sm90-fp32-fp32",
    citation=(
        f"{_REPO}, csrc/qattn/qk_int_sv_f8_cuda_sm90.cu (qk_int8_sv_f8_attn_kernel), "
        "csrc/qattn/attn_utils.cuh (S_FP8_OFFSET, update_mdo, RS_32_to_8, normalize_d), "
        "sageattention/core.py (sageattn_qk_int8_pv_fp8_cuda_sm90) at d1a57a5; FP22: "
        "SageAttention2, arXiv 2411.10958, section 3.4"
    ),
    inferred=SM89.inferred.replace(
        "the 4 queries (of 32) and 16 keys (of 64)", "the 2 queries (of 16) and 32 keys (of 128)"
    ),
    kv_block=128,
    query_group=2,
    key_group=32,
)

PLUS_PLUS = SM89_FP32_FP32.replace(
    name="sage2pp-sm89-fp32-fp16",
    citation=(
        SM89.citation.replace("compute_fp8_sv", "compute_fp8_sv_inst_buf_fp16_accu")
        + "; SageAttention2++, arXiv 2505.21136"
    ),
    inferred=SM89.inferred.replace(
        "448 / amax over the whole context, is no rounding here (e8m3: V keeps FP8's 4 bits, in "
        "steps that a unit which is no power of two would shift)",
        "2.25 / amax over the whole context, stands as 1: exact for V whose largest number is "
        "2.25, and of the same kind for V ~ N(0, 1)",
    ).replace(
        "what the accumulator held before them is cut to FP22 first",
        "rounded once to float16 with what the accumulator held",
    ),
    value=E4M3,
    pv_accum=FLOAT16,
)

RECIPES = (
    SAGE_1,
    SM80,
    SM80_FP16,
    SM80_FP16_FP32,
    SM89,
    SM89_FP32_FP32,
    SM90_FP32_FP32,
    PLUS_PLUS,
)
