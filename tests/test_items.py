"""Studies that are lists of items: what is computed, kept, computed again, refused and counted."""

import sys
import types

import pyarrow as pa
import pytest

import sweeps.__main__ as cli
from sweeps import items
from sweeps.items import NOT_RUN, Item, ListStudy

SCHEMA = {"name": pa.string(), "status": pa.string(), "number": pa.float64()}


class Bench:
    """A list study of three items that counts what it is asked for."""

    def __init__(self):
        self.asked, self.status = [], dict.fromkeys("abc", "run")
        self.interrupt = None

    def items(self, quick):
        return [
            Item(name, {"size": 1}, lambda name=name: self.rows(name))
            for name in "abc"[: 3 - quick]
        ]

    def rows(self, name):
        self.asked.append(name)
        if name == self.interrupt:
            raise KeyboardInterrupt
        return [{"name": name, "status": self.status[name], "number": float(ord(name))}]

    def table(self, rows):
        return f"bench: {', '.join(rows['name'])}, {(rows['status'] == NOT_RUN).sum()} not run"


@pytest.fixture
def bench(monkeypatch):
    bench = Bench()
    study = ListStudy(
        name="bench",
        title="a bench",
        items=bench.items,
        schema=SCHEMA,
        sources=("sweeps/claims",),
        table=bench.table,
    )
    module = types.ModuleType("bench")
    module.FULL = module.QUICK = study
    monkeypatch.setitem(sys.modules, "bench", module)
    monkeypatch.setitem(cli.STUDIES, "bench", "bench")
    return bench


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    def call(*arguments, study="bench"):
        line = ["sweeps", "run", study, "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_a_list_is_run_once_and_counted_on_the_last_line(bench, call):
    code, out, _ = call()
    assert code == 0 and out.splitlines()[-1] == "bench: a, b, c, 0 not run"
    code, out, err = call()
    assert code == 0 and bench.asked == ["a", "b", "c"] and "3 of 3 parts are finished" in err
    assert out.splitlines()[-1] == "bench: a, b, c, 0 not run"


def test_what_could_not_run_is_tried_again(bench, call):
    bench.status["b"] = NOT_RUN
    assert call()[1].splitlines()[-1] == "bench: a, b, c, 1 not run"
    bench.status["b"] = "run"
    assert call()[1].splitlines()[-1] == "bench: a, b, c, 0 not run"
    assert bench.asked == ["a", "b", "c", "b"]


def test_an_interrupted_list_goes_on(bench, call):
    bench.interrupt = "b"
    code, _, err = call()
    assert code == 130 and "1 of 3 parts are kept" in err
    bench.interrupt = None
    assert call()[0] == 0 and bench.asked == ["a", "b", "b", "c"]


def test_only_takes_some_in_the_order_named(bench, call):
    assert call("--only", "c,a,c")[1].splitlines()[-1] == "bench: c, a, 0 not run"
    assert call("--quick")[0] == 0 and bench.asked == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "study", "said"),
    [
        (["--only", "d"], "bench", "unknown item of bench 'd'"),
        (["--only", ""], "bench", "unknown item of bench ''"),
        (["--recipes", "metal"], "bench", "--recipes has no meaning with the study 'bench'"),
        (["--set", "probs=float16"], "bench", "--set has no meaning"),
        (["--only", "metal"], "hexagon", "--only has no meaning with the study 'hexagon'"),
        ([], "fidelty", "did you mean 'fidelity'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench, call, arguments, study, said, tmp_path):
    code, out, err = call(*arguments, study=study)
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not bench.asked


def test_an_item_of_other_identity_is_another_part(bench):
    study = sys.modules["bench"].FULL
    (first, *_), (again, *_) = (items.work_of(study, False, None).parts for _ in range(2))
    assert first == again
    bench.items = lambda quick: [Item("a", {"size": 2}, lambda: [])]
    changed = ListStudy(**{**vars(study), "items": bench.items})
    assert items.work_of(changed, False, None).parts[0]["key"] != first["key"]
