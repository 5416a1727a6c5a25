"""The Hexagon study: from which context on do FP16 accumulators exceed llama.cpp's tolerance?

Every HMX recipe, at its own block rule and at fixed KV blocks, over eight regimes of inputs, beside
the kernels it is compared with in llama.cpp (#24389, #25085). The wall time is set by the sizes.
"""

import dataclasses

from sweeps.plan import Study

HMX = (
    "hexagon-hmx-fp16",
    "hexagon-hmx-fp16-qf16",
    "hexagon-hmx-fp16-qf16-spill",
    "hexagon-hmx-exp2hf",
    "hexagon-pr24389",
    "hexagon-hmx-fp32",
)
BESIDE = ("hexagon-hvx", "metal", "ggml-cpu-decode", "float32")
REGIMES = (
    "gaussian",
    "biased_v",
    "flat",
    "sink",
    "needle",
    "rising_max",
    "outliers",
    "uniform01",
)
HEADS, GROUP, QUERIES, HEAD_DIM = 1, 4, 4, 128

FULL = Study(
    name="hexagon",
    title="FP16 accumulators of Hexagon's HMX flash attention (llama.cpp #24389), by block size",
    recipes=HMX + BESIDE,
    block_axis=HMX,
    kv_blocks=(64, 128, 512),
    regimes=REGIMES,
    seeds=3,
    max_context=2**17,
    sizes={
        "heads": HEADS,
        "group": GROUP,
        "queries": QUERIES,
        "head_dim": HEAD_DIM,
        "dtype": "float16",
    },
)

QUICK = dataclasses.replace(
    FULL,
    recipes=("hexagon-hmx-fp16", "hexagon-pr24389", "hexagon-hmx-fp32", "ggml-cpu-decode"),
    kv_blocks=(64,),
    regimes=("gaussian", "biased_v", "flat", "sink"),
    seeds=1,
    max_context=2**13,
)
