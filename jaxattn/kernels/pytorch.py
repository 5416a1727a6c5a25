"""PyTorch's scaled_dot_product_attention on CPUs."""

from jaxattn.formats import BFLOAT16, FLOAT16
from jaxattn.recipe import Recipe

_ATEN = "pytorch/pytorch, aten/src/ATen/native"
_SUMS = "sums in this host's order, p·v's over 128 keys at a time, as the size of its errors tells"


def _inputs(dtype: object) -> dict[str, object]:
    return {"query": dtype, "key": dtype, "value": dtype, "result": dtype}


FLASH_F32 = Recipe(
    name="torch-cpu-flash-f32",
    citation=(
        f"{_ATEN}/cpu/FlashAttentionKernel.cpp (cpu_flash_attention, "
        "_exp_reduce_sum_fusion_kernel) at 008ec6b1"
    ),
    inferred=f"exp_u20 as correctly rounded; {_SUMS}",
    evidence="real kernel",
    kv_block=512,
    output_every=128,
    sinks="none",
)
# Where p is narrow the vectors take a coarser exponential; the rescale factor stays std::exp.
FLASH_BF16 = FLASH_F32.replace(
    name="torch-cpu-flash-bf16",
    citation=FLASH_F32.citation + "; cpu/vec/vec512/vec512_float.h (fexp_u20) in torch 2.13.0",
    inferred=(
        f"{_SUMS}; fexp_u20 for 16-bit p, as the library's 2.13.0 build has it "
        "(read from its outputs; the source read is older and calls exp_u20)"
    ),
    exp="exp_cubic",
    rescale_exp="exact",
    probs=BFLOAT16,
    **_inputs(BFLOAT16),
)
FLASH_FP16 = FLASH_BF16.replace(name="torch-cpu-flash-fp16", probs=FLOAT16, **_inputs(FLOAT16))

MATH_F32 = Recipe(
    name="torch-cpu-math-f32",
    citation=f"{_ATEN}/transformers/attention.cpp (_scaled_dot_product_attention_math) at 008ec6b1",
    inferred=f"{_SUMS}; q and k are each scaled by the root of the scale there",
    evidence="real kernel",
    kv_block="whole",
    output_every=128,
    normalise="before",
    sinks="none",
)
# Half and bfloat16 inputs are widened to float32 first, and the result is narrowed.
MATH_BF16 = MATH_F32.replace(name="torch-cpu-math-bf16", **_inputs(BFLOAT16))
MATH_FP16 = MATH_F32.replace(name="torch-cpu-math-fp16", **_inputs(FLOAT16))

RECIPES = (FLASH_F32, FLASH_BF16, FLASH_FP16, MATH_F32, MATH_BF16, MATH_FP16)
