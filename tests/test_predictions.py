"""Predictions stored beside the rows of a grid study: which curves, which keys, and made once."""

import io

import numpy as np
import pyarrow.parquet
import pytest

from jaxattn import theory
from plots import rows as plot_rows
from sweeps import grid, hexagon, predictions
from sweeps.run import Progress
from sweeps.store import PREDICTED, Store, check_directory

RECIPES = "hexagon-pr24389,hexagon-hmx-fp32"


def add(root, inputs="gaussian,flat,sink", **options):
    """The work, what was not predicted, and the lines of progress."""
    work, _ = grid.work_of(hexagon.FULL, False, inputs=inputs, recipes=RECIPES, **options)
    stream = io.StringIO()
    with Progress(stream) as progress:
        notes = work.predict(root, progress)
    return work, notes, stream.getvalue().splitlines()


def test_a_prediction_for_each_curve_that_theory_covers(tmp_path):
    work, notes, lines = add(tmp_path, max_context=512, seeds=2)
    stored = pyarrow.parquet.read_table(tmp_path / PREDICTED).to_pandas()
    assert set(stored["recipe"]) == {"hexagon-pr24389"}
    assert set(stored["inputs"]) == {"gaussian", "flat"} and set(stored["head"]) == {-1}
    assert set(stored["block"]) == {"rule", "64", "128", "512"} and len(lines) == 8
    assert set(stored["context"]) == set(work.manifest["contexts"]) and len(stored) == 8 * 5
    by_key = {part["key"]: part for part in work.parts}
    for row in stored.to_dict("records"):
        part = by_key[row["key"]]
        assert (part["recipe"], part["inputs"], part["block"], part["seed"]) == (
            *(row["recipe"], row["inputs"], row["block"]),
            0,
        )
    assert [note.split(":")[1].strip() for note in notes] == ["hexagon-hmx-fp32", "sink"]
    part = next(p for p in by_key.values() if p["inputs"] == "gaussian" and p["block"] == "64")
    some = stored[stored["key"] == part["key"]].sort_values("context")
    query, stream = hexagon_inputs(512)
    from jaxattn import kernels

    recipe = kernels.get("hexagon-pr24389").replace(kv_block=64)
    expected = theory.predict(recipe, theory.measured(query, stream), list(some["context"]))
    np.testing.assert_array_equal(some["nmse"], expected.nmse)


def hexagon_inputs(length):
    from jaxattn import inputs

    return inputs.regime("gaussian", length=length, seed=0, **hexagon.FULL.sizes)


def test_made_once_and_anew_when_theory_changes(tmp_path, monkeypatch):
    assert len(add(tmp_path, "flat", max_context=256, seeds=1)[2]) == 4
    before = (tmp_path / PREDICTED).read_bytes()
    assert not add(tmp_path, "flat", max_context=256, seeds=1)[2]
    assert (tmp_path / PREDICTED).read_bytes() == before
    assert len(add(tmp_path, "flat,gaussian", max_context=256, seeds=1)[2]) == 4  # gaussian's alone
    assert pyarrow.parquet.read_table(tmp_path / PREDICTED).num_rows == 8
    monkeypatch.setattr(predictions, "_version", lambda: "another")
    assert len(add(tmp_path, "flat", max_context=256, seeds=1)[2]) == 4
    (tmp_path / PREDICTED).write_bytes(b"PAR1 cut off")
    assert len(add(tmp_path, "flat", max_context=256, seeds=1)[2]) == 4


def test_a_run_leaves_them_where_they_are(tmp_path):
    work, *_ = add(tmp_path, "flat", max_context=256, seeds=1)
    check_directory(tmp_path, "hexagon")
    Store(tmp_path).begin({"study": "hexagon", "parts": work.parts}, [])
    assert (tmp_path / PREDICTED).is_file()
    found = plot_rows.predictions_of(tmp_path, {"parts": work.parts})
    assert found is not None and len(found) == 4
    assert plot_rows.predictions_of(tmp_path, {"parts": [{"key": "of another run"}]}) is None
    (tmp_path / PREDICTED).write_bytes(b"")
    with pytest.raises(ValueError, match="unreadable .* delete it"):
        plot_rows.predictions_of(tmp_path, {"parts": work.parts})


def test_heads_of_a_capture_are_predicted_apart(tmp_path):
    _, notes, lines = add(tmp_path, "minilm", max_context=256)
    stored = pyarrow.parquet.read_table(tmp_path / PREDICTED).to_pandas()
    assert set(stored["head"]) == {0, 1, 2, 3} and len(lines) == 4
    assert stored.groupby("head")["nmse"].sum().nunique() == 4
