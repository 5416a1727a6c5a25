"""Arithmetic that papers describe, where no kernel's source could be read.

Not here: BAPS (arXiv 2602.02071) needs HiF8, whose precision tapers with the exponent and which is
no format of formats.py. "Why Low-Precision Transformer Training Fails" (arXiv 2510.04212) analyses
FlashAttention-2 in bfloat16 as it is; its remedy moves m only in rows whose maximum repeats, which
no field says.
"""

from jaxattn.formats import BFLOAT16, FLOAT16, format_of
from jaxattn.recipe import Recipe

E4M3, E8M3, FP22 = (format_of(name) for name in ("float8_e4m3fn:sat", "e8m3", "fp22"))

# DeepSeek-V3's are matrix products, not attention: here they are those of attention.
DEEPSEEK_V3 = Recipe(
    name="deepseek-v3-fp8",
    citation=(
        "DeepSeek-V3 Technical Report, arXiv 2412.19437v2, sections 3.3.2 (FP8 products keep "
        "around 14 bits on H800; promotion to float32 registers every N_C = 128, 4 WGMMAs) and "
        "3.5.2 (32 products are aligned and cut before they are added)"
    ),
    inferred=(
        "its products used for attention; 14 bits are FP22 (8 of exponent, 13 of fraction, toward "
        "zero), cut once after the exact sum of 32 products and not in each product; a unit for "
        "each token of Q and K (1x128 tiles at head dim 128), none for V (e8m3), and 2^8 for P; up "
        "to head dim 128 q·k is promoted once, at its end"
    ),
    kv_block=128,
    query=E4M3,
    query_group=1,
    key=E4M3,
    key_group=1,
    value=E8M3,
    qk_accum=FP22,
    qk_chunk=32,
    qk_promote=128,
    probs=E4M3,
    pv_accum=FP22,
    pv_chunk=32,
    output_every=128,
    max_offset=-8.0,
    exp="exp2",
    sinks="none",
)

DEEPSEEK_V3_UNPROMOTED = DEEPSEEK_V3.replace(
    name="deepseek-v3-fp8-unpromoted",
    inferred=DEEPSEEK_V3.inferred + "; o stays in the accumulator over all keys",
    qk_promote=None,
    pv_accum="float32",
    pv_chunk=None,
    rescaled_output=FP22,
    output=FP22,
    output_every=32,
)

PASA = Recipe(
    name="pasa",
    citation=(
        "PASA, arXiv 2503.01873; chenglong92/PASA, PASA_Verification.py (pasa, tiling_par) at "
        "8816b09: every product and vector in float16, beta 0.9375"
    ),
    inferred=(
        "products on an Ascend accumulate in float32 and round once; K is shifted in float32 and "
        "rounded once, its scale on the score; PASA adds the mean back to m, relative to the mean "
        "of the blocks so far, so that its m stays small: here it goes back to s, and m, which is "
        "then large, stands in float32; p is of its block's m there, then brought to m "
        "by a factor"
    ),
    evidence="paper: PASA, overflow of S at mean 30, and none with the shift",
    kv_block=128,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    scores=FLOAT16,
    difference=FLOAT16,
    probs=FLOAT16,
    summand=FLOAT16,
    row_sum=FLOAT16,
    rescale=FLOAT16,
    rescaled_sum=FLOAT16,
    running_sum=FLOAT16,
    pv_accum=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    result=FLOAT16,
    key_shift=0.9375,
    normalise="divide",
    sinks="none",
)

PASA_UNSHIFTED = PASA.replace(
    name="pasa-unshifted",
    citation="PASA, arXiv 2503.01873: the all-float16 flash attention that it is compared with",
    inferred=(
        "S is stored in float16 before the scale, and m is too; " + PASA.inferred.split(";")[0]
    ),
    qk_accum=FLOAT16,
    running_max=FLOAT16,
    key_shift=0.0,
)

AMLA = Recipe(
    name="amla",
    citation=(
        "AMLA: MUL by ADD in FlashAttention Rescaling, arXiv 2509.25224: abstract (o in float32 is "
        "rescaled by adding n·2^23 to its bits)"
    ),
    inferred=(
        "the listing could not be read: m rounded to the nearest whole number in base 2, so that a "
        "is a power of two and p may reach sqrt(2); bfloat16 inputs and P; blocks of 512 keys; the "
        "compensation of P's scale, itself in bfloat16, is left out; P is summed before it rounds"
    ),
    kv_block=512,
    query=BFLOAT16,
    key=BFLOAT16,
    value=BFLOAT16,
    running_max=format_of("int24"),
    probs=BFLOAT16,
    result=BFLOAT16,
    exp="exp2",
    sinks="none",
)

RECIPES = (DEEPSEEK_V3, DEEPSEEK_V3_UNPROMOTED, PASA, PASA_UNSHIFTED, AMLA)
