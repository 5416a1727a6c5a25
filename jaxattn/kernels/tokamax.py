"""Tokamax: attention kernels for JAX on TPU and GPU, and the XLA ones that it falls back to."""

from typing import Any

from jaxattn.formats import BFLOAT16
from jaxattn.recipe import Recipe

_OPS = "openxla/tokamax, tokamax/_src/ops/attention"
_LOWEST = -3.4028234663852886e38
_REAL = "real kernel"
_INPUTS = ("query", "key", "value", "probs", "result")
_BF16: dict[str, Any] = dict.fromkeys(_INPUTS, BFLOAT16)

XLA_BF16 = Recipe(
    name="tokamax-xla-bf16",
    citation=f"{_OPS}/base.py (DotProductAttention._fwd, _softmax) in 0.0.12",
    inferred=(
        "p, which is float32, enters p·v in bfloat16 because the product asks for BF16_BF16_F32: "
        "so on TPU and GPU; XLA's CPU backend leaves it in float32 (measured); a bias goes in "
        "before the softcap there; sums in this host's order"
    ),
    evidence=_REAL,
    kv_block="whole",
    cap_at="scores",
    normalise="before",
    mask_value=_LOWEST,
    sinks="none",
    **_BF16,
)

XLA_CHUNKED_BF16 = XLA_BF16.replace(
    name="tokamax-xla-chunked-bf16",
    citation=(
        f"{_OPS}/xla_chunked.py (_attend_chunk, _attend_chunked) and api.py (_XLA_CHUNK_SIZE) in "
        "0.0.12"
    ),
    kv_block=1024,
    normalise="divide",
)

TRITON_BF16 = Recipe(
    name="tokamax-triton-bf16",
    citation=(
        f"{_OPS}/pallas_triton.py (_fwd_kernel_impl, _rescale, _get_heuristics_config) in 0.0.12, "
        "its defaults: base e, the stable softmax"
    ),
    inferred="tensor cores sum in float32, in this host's order; exp as correctly rounded",
    evidence=_REAL,
    kv_block=64,
    scale_at="query",
    cap_at="scores",
    scale=BFLOAT16,  # a Python number takes q's dtype
    scaled_query=BFLOAT16,
    normalise="divide",
    mask_value=_LOWEST,
    sinks="none",
    **_BF16,
)

MOSAIC_GPU_BF16 = Recipe(
    name="tokamax-mosaic-gpu-bf16",
    citation=(
        f"{_OPS}/pallas_mosaic_gpu_kernel_sm90.py (flash_attention_kernel, "
        "get_heuristics_config) in 0.0.12; pallas_mosaic_gpu_kernel_sm100.py rounds alike"
    ),
    inferred=(
        "tensor cores sum in float32, in this host's order; approximate exp2 as correctly rounded; "
        "s·scale - m, there one fused step, is two"
    ),
    kv_block=128,
    exp="exp2",
    normalise="multiply",
    mask_value=_LOWEST,
    sinks="none",
    **_BF16,
)

SPLASH_BF16 = Recipe(
    name="tokamax-splash-bf16",
    citation=(
        f"{_OPS}/pallas_mosaic_tpu.py (PallasMosaicTpuFlashAttention), and "
        "tokamax/_src/ops/experimental/tpu/splash_attention/splash_attention_kernel.py "
        "(flash_attention_kernel) in 0.0.12: q·scale and then q·log2(e) in q's dtype"
    ),
    inferred=(
        "p in float32 against v in bfloat16 (a TPU's matrix unit may round p too); "
        "sums in this host's order"
    ),
    evidence=_REAL,
    kv_block=128,
    exp="exp2",
    scale_at="query",
    log2e_at="query",
    cap_at="scores",
    scale=BFLOAT16,
    log2e=BFLOAT16,
    scaled_query=BFLOAT16,
    initial_max=_LOWEST,
    mask_value=_LOWEST,
    sinks="seed",
    **{**_BF16, "probs": "float32"},
)

RECIPES = (XLA_BF16, XLA_CHUNKED_BF16, TRITON_BF16, MOSAIC_GPU_BF16, SPLASH_BF16)
