"""error_curves on several devices: a mesh's numbers are those of one device, bit for bit."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxattn

# Devices are counted when the backend starts, so it needs a process of its own.
SCRIPT = """
import jax
import numpy as np
from jax.sharding import Mesh

from jax.sharding import Mesh

import jaxattn

jax.config.update("jax_num_cpu_devices", 4)
rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((2, n, 2, 32)).astype(np.float16) for n in (5, 900, 900))
base = jaxattn.kernels.get("hexagon-hmx-fp16").replace(kv_block=64)
changes = ({}, {"probs": "float16:sr"}, {"running_sum": "bfloat16"}, {"kv_order": "backward"})
changes += ({"exp": "exp2"}, {"exp": "exp2", "row_sum": "float32"})
recipes = [base.replace(name=str(i), **change) for i, change in enumerate(changes)]
recipes += ["hexagon-hmx-fp32", "ggml-cpu-splitkv", base.replace(storage="float64")][:EXTRA]

def curves(mesh):
    return jaxattn.error_curves(query, key, value, recipes, contexts=[300, 512, 900], mesh=mesh)

try:
    curves(Mesh(np.array(jax.devices()[:3]).reshape(1, 3), ("recipes", "heads")))
except ValueError as error:
    assert "must divide the number of batch entries times key/value heads, 4" in str(error)
else:
    raise AssertionError("three devices share out four heads")

one = curves(None)
assert all(np.isfinite(x).all() for x in one.metrics.values())
for shape in SHAPES:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    many = curves(Mesh(devices, ("recipes", "heads")))
    for name in one.metrics:
        np.testing.assert_array_equal(one.metrics[name], many.metrics[name], f"{name} {shape}")
    np.testing.assert_array_equal(one.overflow, many.overflow)
    np.testing.assert_array_equal(one.stagnated, many.stagnated)
"""


@pytest.mark.parametrize(
    ("shapes", "extra"),
    [
        pytest.param([(2, 2)], 0, id="quick"),
        pytest.param([(1, 2), (1, 4), (2, 1), (4, 1)], 3, id="all", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_bit(shapes, extra):
    script = SCRIPT.replace("SHAPES", repr(shapes)).replace("EXTRA", str(extra))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mesh_of_other_axes():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 4, 3, 8), np.float32) for _ in range(3))

    def curves(mesh):
        return jaxattn.error_curves(query, key, value, ["metal"], mesh=mesh)

    with pytest.raises(ValueError, match="mesh must hold devices"):
        curves(Mesh(np.array([]).reshape(0, 1), ("recipes", "heads")))
    with pytest.raises(ValueError, match="axes 'recipes' and 'heads'"):
        curves(Mesh(np.array(jax.devices()[:1]), ("heads",)))
