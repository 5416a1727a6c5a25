"""llama.cpp's flash attention on Apple GPUs."""

from jaxattn.formats import BFLOAT16, FLOAT16
from jaxattn.recipe import Recipe

METAL = Recipe(
    name="metal",
    citation=(
        "ggml-org/ggml, src/ggml-metal/ggml-metal.metal (kernel_flash_attn_ext_impl) at d99724f2"
    ),
    inferred=(
        "fast-math exp as correctly rounded; sums in this host's order; fewer than 20 queries go "
        "to kernel_flash_attn_ext_vec, where a head dim is a multiple of 32: blocks of 32 keys"
    ),
    kv_block=64,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    initial_max=-3.4028234663852886e38 / 2,
)

METAL_BF16 = METAL.replace(
    name="metal-bf16",
    citation=METAL.citation.replace("_impl)", "_impl with FA_TYPES_BF)"),
    inferred=(
        METAL.inferred
        + ", all in half, o in float32; one rounding of o per 8-key matrix instruction, and of the "
        "rescale factor where it multiplies a half vector"
    ),
    query=BFLOAT16,
    key=BFLOAT16,
    value=BFLOAT16,
    output_rescale=FLOAT16,
    rescaled_output=FLOAT16,
    output=FLOAT16,
    output_every=8,
)

RECIPES = (METAL, METAL_BF16)
