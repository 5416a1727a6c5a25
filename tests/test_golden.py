"""The recipes make the errors that the real ggml CPU kernel makes (tests/golden/README.md)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import jaxattn

FILE = Path(__file__).parent / "golden" / "ggml_cpu.npz"

with np.load(FILE, allow_pickle=False) as _file:
    META = json.loads(str(_file["meta"]))
    REAL = {case["name"]: _file[case["name"]] for case in META["cases"]}
CASES = {case["name"]: case for case in META["cases"]}
NARROW = [name for name in CASES if name.startswith("decode") and "f32kv" not in name]
WIDE = [name for name in CASES if name not in NARROW]


def draw(case):
    """q, k, v in float16, [heads, length, head_dim]: the very inputs that the kernel was given."""
    rng = np.random.default_rng(case["seed"])
    shapes = [(case["heads"], case["queries"], case["head_dim"])]
    shapes += 2 * [(case["kv_heads"], case["keys"], case["head_dim"])]
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    if case["regime"] == "biased_v":
        v += 1.0
    inputs = [x.astype(np.float16) for x in (q, k, v)]
    digest = hashlib.sha256(b"".join(x.tobytes() for x in inputs)).hexdigest()
    assert digest[:16] == case["inputs_sha256_16"]
    return inputs


def recipe_of(case):
    if case["name"].startswith("prefill"):
        return "ggml-cpu-prefill"
    if case["kv_dtype"] == "float32":
        return "ggml-cpu-decode-f32"
    if case["threads"] > 1:
        return jaxattn.kernels.get("ggml-cpu-splitkv").replace(split_kv=case["threads"])
    return "ggml-cpu-decode"


def errors(name):
    """(the real kernel's error against float64, the recipe's, the float64 output)."""
    case = CASES[name]
    q, k, v = (np.moveaxis(x, 0, 1) for x in draw(case))  # [length, heads, head_dim]
    q, k, v = q.astype(np.float32), k.astype(case["kv_dtype"]), v.astype(case["kv_dtype"])
    reference = jaxattn.reference_attention(q, k, v, scale=case["scale"])
    got = jaxattn.dot_product_attention(q, k, v, recipe=recipe_of(case), scale=case["scale"])
    assert got.dtype == np.float32
    real = np.moveaxis(REAL[name], 0, 1)
    return real - reference, np.asarray(got) - reference, reference


def nmse(error, reference):
    return np.sum(error**2) / np.sum(reference**2)


@pytest.mark.parametrize("name", NARROW)
def test_the_error_vector_is_the_real_one(name):
    """Half-precision outputs, rounded at every key: the same error, not only its size."""
    real, got, reference = errors(name)
    assert nmse(real, reference) == pytest.approx(CASES[name]["nmse_vs_float64"], rel=1e-6)
    assert np.corrcoef(real.ravel(), got.ravel())[0, 1] >= 0.9995
    assert nmse(got, reference) == pytest.approx(nmse(real, reference), rel=0.01)
    for head in range(CASES[name]["heads"]):
        assert np.corrcoef(real[:, head].ravel(), got[:, head].ravel())[0, 1] >= 0.995


@pytest.mark.parametrize("name", WIDE)
def test_float32_paths_are_as_good(name):
    """Where everything is float32 the order of summation decides the bits, not the size."""
    real, got, reference = errors(name)
    ratio = np.sqrt(np.mean(got**2) / np.mean(real**2))
    assert 1 / 1.5 < ratio < 1.5
    assert nmse(got, reference) < 1e-9 and nmse(real, reference) < 1e-9


def test_other_recipes_do_not_pass():
    """The test can fail: nearly the same arithmetic misses the real error vector."""
    case = CASES["decode_gaussian_256"]
    q, k, v = (np.moveaxis(x, 0, 1).astype(np.float32) for x in draw(case))
    reference = jaxattn.reference_attention(q, k, v, scale=case["scale"])
    real = np.moveaxis(REAL[case["name"]], 0, 1) - reference
    decode = jaxattn.kernels.get("ggml-cpu-decode")
    for changes in ({"output": "float16:rz"}, {"probs": "float16"}):
        recipe = decode.replace(**changes)
        got = np.asarray(jaxattn.dot_product_attention(q, k, v, recipe=recipe)) - reference
        assert np.corrcoef(real.ravel(), got.ravel())[0, 1] < 0.95, changes


def test_real_activations_make_the_error_that_they_make_in_the_real_kernel():
    """Median NMSE over queries of each head, as the real decode kernel has it on these inputs."""
    capture = jaxattn.captures.load(
        FILE.parents[2] / "sweeps" / "data" / "minilm_layer4_8k.safetensors"
    )
    curves = jaxattn.error_curves(
        capture.query, capture, None, ["ggml-cpu-decode"], contexts=[8192], metrics=("nmse",)
    )
    medians = np.median(curves.metrics["nmse"][0, 0, 0], axis=0)
    np.testing.assert_allclose(medians, [0.0272, 0.0039, 0.0028, 0.0015], rtol=0.02)
