"""FlashInfer's prefill kernel (its own, backend "fa2"): 128 query rows, 64 keys."""

from jaxattn.formats import BFLOAT16, FLOAT16
from jaxattn.recipe import Recipe

_PREFILL = "flashinfer-ai/flashinfer, include/flashinfer/attention/prefill.cuh"
_OTHERS = (
    "mma.cuh (m16k16_rowsum_f16f16f32), math.cuh (ptx_exp2), attention/variant_helper.cuh "
    "(OutputTransform), flashinfer/jit/attention/variants.py (AttentionSink) at fb28d724"
)
_TILES = (
    "fewer than 65 packed query rows have other tiles, and at most 16 have 4 warps with a softmax "
    "of their own each; GPUs with 100 KiB of shared memory (8.6, 8.9, 12.0) take 32 keys at head "
    "dim 128"
)
_TANH = "the softcap's tanh.approx (about 2^-11 off) as correctly rounded"

FP16 = Recipe(
    name="flashinfer-fp16",
    citation=(
        f"{_PREFILL} (update_mdo_states, compute_sfm_v: a tensor core sums rounded P, "
        f"SinglePrefillWithKVCacheDispatched: 4 x 16 keys), {_OTHERS}"
    ),
    inferred=(
        "ex2.approx.ftz and rcp.approx.ftz as correctly rounded; float32 sums, a tensor core's "
        f"too, in this host's order; {_TANH}; {_TILES}"
    ),
    kv_block=64,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    result=FLOAT16,
    exp="exp2",
    sinks="end",
)

BF16 = FP16.replace(
    name="flashinfer-bf16",
    **dict.fromkeys(("query", "key", "value", "probs", "summand", "result"), BFLOAT16),
)

# m·scale is rounded to half; s·scale goes into the subtraction unrounded, as one half FMA.
FP16_QK = FP16.replace(
    name="flashinfer-fp16-qk",
    citation=(
        f"{_PREFILL} (compute_qk and update_mdo_states with DTypeQKAccum = half, from "
        f"use_fp16_qk_reduction; logits_transform), {_OTHERS}"
    ),
    inferred=(
        "what the source means: the path does not compile at fb28d724 and reads scores by value "
        "instead of by bits (flashinfer #4297, #4298); an f16 accumulator rounds once a 16-product "
        "instruction; half2 s·scale - m becomes one FMA, as PTX allows; the rescale factor's "
        "difference, float32 in the source, is a half here; ex2.approx.f16x2, good to 2^-9.9, and "
        f"rcp.approx.ftz as correctly rounded; {_TANH}; scale/cap, float32 in the source, is a "
        f"half here; {_TILES}"
    ),
    scale=FLOAT16,
    cap=FLOAT16,
    squashed=FLOAT16,
    qk_accum=FLOAT16,
    qk_chunk=16,
    running_max=FLOAT16,
    difference=FLOAT16,
    sinks="none",
)

RECIPES = (FP16, BF16, FP16_QK)
