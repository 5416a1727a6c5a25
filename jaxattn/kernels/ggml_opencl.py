"""ggml's OpenCL flash attention for Adreno and Intel GPUs: float32 but for what it reads."""

from jaxattn.formats import FLOAT16
from jaxattn.recipe import Recipe

_KERNELS = "ggml-org/ggml, src/ggml-opencl/kernels"
_EXP = (
    "native_exp as correctly rounded; sums of q·k in this host's order; the kernel caps scores "
    "after it has added the mask, here before"
)

F16 = Recipe(
    name="ggml-opencl-f16",
    citation=f"{_KERNELS}/flash_attn_f16.cl (flash_attn_f16: a softmax step of 4 keys) at d99724f2",
    inferred=(
        f"{_EXP}; masks are additive, -inf; the is_causal flag would put -3e38 instead; "
        "ggml_flash_attn_ext, whose result is float32, never calls it (see -f32-f16), and its "
        "decoding kernel shares keys among threads"
    ),
    kv_block=4,
    output_every=1,
    query=FLOAT16,
    key=FLOAT16,
    value=FLOAT16,
    result=FLOAT16,
    initial_max=-3.0e38,
)

F32_F16 = F16.replace(
    name="ggml-opencl-f32-f16",
    citation=(
        f"{_KERNELS}/flash_attn_f32_f16.cl (flash_attn_f32_f16: a softmax step of 2 keys; m at "
        "-3e38 counts as no key yet) at d99724f2"
    ),
    inferred=(
        f"{_EXP}; Adreno's split variant, from 64 keys on: elsewhere a step takes 4 keys; the "
        "decoding kernels of the same file share keys among threads"
    ),
    kv_block=2,
    query="float32",
    result="float32",
)

RECIPES = (F16, F32_F16)
