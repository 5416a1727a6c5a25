"""outputs: the very outputs that single runs give, and the reference's."""

import numpy as np

import jaxattn
from jaxattn.outputs import outputs

RECIPES = ("metal", "flash-attention-2-fp16")  # walked forward and backward


def test_outputs_are_those_of_single_runs_of_each_context():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 3, 4, 16)).astype(np.float16)
    key, value = rng.standard_normal((2, 2, 200, 2, 16)).astype(np.float16)
    calls: list[tuple[int, int]] = []
    tell = lambda *call: calls.append(call)  # noqa: E731
    found = outputs(query, key, value, RECIPES, contexts=[200, 7], progress=tell)
    assert (200, 407) in calls and calls == sorted(calls) and calls[-1] == (407, 407)
    assert found.recipes == RECIPES and found.contexts.tolist() == [7, 200]
    assert found.output.shape == (2, 2, 2, 3, 4, 16) and found.output.dtype == np.float64
    for i, recipe in enumerate(RECIPES):
        for j, n in enumerate(found.contexts):
            k, v = key[:, :n], value[:, :n]
            one = jaxattn.dot_product_attention(query.astype(np.float32), k, v, recipe=recipe)
            np.testing.assert_allclose(found.output[i, j], one, rtol=0, atol=2e-6)
            exact = jaxattn.reference_attention(query, k, v)
            np.testing.assert_allclose(found.reference[j], exact, rtol=0, atol=1e-14)


def test_errors_of_the_outputs_are_those_of_the_curves():
    query, stream = jaxattn.inputs.regime("biased_v", length=600, seed=3, queries=4, head_dim=32)
    recipes = ("metal", "float32")
    found = outputs(query, stream, None, recipes, contexts=[300, 600])
    curves = jaxattn.error_curves(
        query, stream, None, recipes, contexts=[300, 600], metrics=("nmse",)
    )
    error = found.output - found.reference
    nmse = (error**2).sum(-1) / (found.reference**2).sum(-1)
    np.testing.assert_allclose(nmse, curves.metrics["nmse"], rtol=1e-6)
