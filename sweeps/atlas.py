"""The atlas: error against context of every kernel there is a recipe of, on one scale."""

import dataclasses

from sweeps.plan import Study

FULL = Study(
    name="atlas",
    title="every kernel's error against context, on one scale",
    recipes=(),
    block_axis=(),
    kv_blocks=(),
    regimes=("gaussian", "biased_v"),
    seeds=1,
    max_context=2**16,
    sizes={"heads": 2, "group": 1, "queries": 8, "head_dim": 128, "dtype": "float16"},
)

QUICK = dataclasses.replace(FULL, regimes=("gaussian",), max_context=2**11)
