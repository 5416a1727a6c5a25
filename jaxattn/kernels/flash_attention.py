"""FlashAttention 2, 3 and 4: blocks of head dim 128 (-d64: of head dim 64), not causal."""

from jaxattn.formats import BFLOAT16, FLOAT16, format_of
from jaxattn.recipe import Recipe

E4M3, FP22 = format_of("float8_e4m3fn:sat"), format_of("fp22")

_REPO, _AT = "Dao-AILab/flash-attention", "at 0251105a"
_APPROXIMATE = (
    "ex2.approx (exp2f under --use_fast_math) as correctly rounded; float32 sums, a tensor core's "
    "too, in this host's order; s·scale - m·scale is one FMA in the kernel; the softcap's fast "
    "tanh (about 2^-11 off) as correctly rounded"
)

FA2_FP16 = Recipe(
    name="flash-attention-2-fp16",
    citation=(
        f"{_REPO}, csrc/flash_attn/src/softmax.h (scale_apply_exp2, softmax_rescale_o, "
        "normalize_softmax_lse), flash_fwd_kernel.h (compute_attn_1rowblock), "
        f"flash_fwd_launch_template.h (run_mha_fwd_hdim128: 128 x 64) {_AT}"
    ),
    inferred=f"{_APPROXIMATE}; on GPUs of capability 8.6 and 8.9 a block of head dim 128 is 32",
    evidence="paper: FlashAttention-3 (arXiv 2407.08608), table 3",
    kv_block=64,
    kv_order="backward",
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    probs=FLOAT16,
    result=FLOAT16,
    exp="exp2",
    empty_inverse=1.0,
    sinks="none",
)

FA3_FP16 = FA2_FP16.replace(
    name="flash-attention-3-fp16",
    citation=(
        f"{_REPO}, hopper/softmax.h (max_get_scale, online_softmax, finalize), "
        "hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp (mma), hopper/tile_size.h (tile_size_fwd_sm90: "
        f"128 x 176) {_AT}"
    ),
    inferred=f"{_APPROXIMATE}; causal blocks are 128",
    kv_block=176,
    empty_inverse=0.0,
)

# Q, K and V arrive in FP8 with a unit for each batch and KV head, which the caller chooses.
FA3_FP8 = FA3_FP16.replace(
    name="flash-attention-3-fp8",
    citation=(
        f"{_REPO}, hopper/softmax.h (scale_apply_exp2 with Max_offset), "
        "hopper/flash_fwd_kernel_sm90.h (Max_offset 8), "
        "hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp (mma; o stays in the WGMMA's registers), "
        f"hopper/tile_size.h (tile_size_fwd_sm90: 128 x 224) {_AT}; FP22: SageAttention2, arXiv "
        "2411.10958, section 3.4, and DeepSeek-V3, arXiv 2412.19437, section 3.5.2"
    ),
    inferred=(
        f"{_APPROXIMATE}; the 32 products of a WGMMA are added exactly and what its accumulator "
        "held is cut to FP22 first; units of Q, K and V (q_descale ...) are 1; the kernel pairs P "
        "and V in another order of keys within an instruction"
    ),
    kv_block=224,
    query=E4M3,
    key=E4M3,
    value=E4M3,
    qk_accum=FP22,
    qk_chunk=32,
    probs=E4M3,
    rescaled_output=FP22,
    output=FP22,
    output_every=32,
    max_offset=-8.0,
    result=BFLOAT16,
)

FA4_FP16 = FA2_FP16.replace(
    name="flash-attention-4-fp16",
    citation=(
        f"{_REPO}, flash_attn/cute/softmax.py (SoftmaxSm100: update_row_max, "
        "scale_subtract_rowmax, apply_exp2_convert, update_row_sum), flash_fwd_sm100.py "
        "(softmax_step, correction_loop; rescale_threshold 8 for 16 bits), utils.py (POLY_EX2, "
        f"ex2_emulation_2), interface.py (128 x 128) {_AT}"
    ),
    inferred=(
        "the polynomial for every key, where the kernel gives it to fewer than one in five at head "
        "dim 128 (2 of 5 pairs in the middle two of 4 fragments; none on SM103) and ex2.approx to "
        "the rest; ex2.approx and rcp.approx as correctly rounded, and the softcap's fast tanh; "
        "float32 sums, in TMEM too, in this host's order"
    ),
    evidence="paper: FlashAttention-4, table 2 (its exp2)",
    kv_block=128,
    lazy_threshold=8.0,
    exp="exp2_poly3",
    rescale_exp="exact",
    sinks="end",
)

FA4_FP16_HARDWARE = FA4_FP16.replace(
    name="flash-attention-4-fp16-hardware",
    inferred=(
        "ex2.approx for every key, as with ex2_emu_freq = 0 (SM103); ex2.approx, rcp.approx and "
        "the softcap's fast tanh as correctly rounded; float32 sums, in TMEM too, in this host's "
        "order"
    ),
    evidence="",
    exp="exp2",
    rescale_exp="same",
)

FA4_FP8 = FA4_FP16.replace(
    name="flash-attention-4-fp8",
    citation=(
        FA4_FP16.citation.replace("8 for 16 bits", "0 and max_offset 8 for 8 bits")
        + ", Note [Low Precision Scaling]"
    ),
    inferred=(
        f"{FA4_FP16.inferred}; units of Q, K and V (q_descale ...) are 1; sums of FP8 products in "
        "TMEM are full float32"
    ),
    query=E4M3,
    key=E4M3,
    value=E4M3,
    probs=E4M3,
    lazy_threshold=0.0,
    max_offset=-8.0,
    result=BFLOAT16,
)


def _bf16(recipe: Recipe) -> Recipe:
    fields = dict.fromkeys(("query", "key", "value", "probs", "result"), BFLOAT16)
    return recipe.replace(name=recipe.name.replace("fp16", "bf16"), evidence="", **fields)


def _d64(recipe: Recipe, kv_block: int, tile: tuple[str, str]) -> Recipe:
    citation = recipe.citation.replace(*tile)
    fields = {"kv_block": kv_block, "citation": citation, "evidence": ""}
    return recipe.replace(name=f"{recipe.name}-d64", **fields)


_BF16 = tuple(_bf16(recipe) for recipe in (FA2_FP16, FA3_FP16, FA4_FP16, FA4_FP16_HARDWARE))
FA2_BF16, FA3_BF16, FA4_BF16, FA4_BF16_HARDWARE = _BF16
_TILE_2 = ("hdim128: 128 x 64", "hdim64: 128 x 128")
_TILE_3 = ("128 x 176", "192 x 192")

RECIPES = (
    *(FA2_FP16, FA2_BF16),
    *(_d64(recipe, 128, _TILE_2) for recipe in (FA2_FP16, FA2_BF16)),
    *(FA3_FP16, FA3_BF16, FA3_FP8),
    *(_d64(recipe, 192, _TILE_3) for recipe in (FA3_FP16, FA3_BF16)),
    _d64(FA3_FP8, 160, ("128 x 224", "192 x 160")),
    *(FA4_FP16, FA4_FP16_HARDWARE, FA4_BF16, FA4_BF16_HARDWARE, FA4_FP8),
)
