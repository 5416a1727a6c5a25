"""The store: parts whole or absent, found by key, never mixed, whatever else lies in DIR."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from sweeps import store
from sweeps.keys import part_key, sources_hash
from sweeps.store import StoreError, check_directory, read_rows, writing

ROOT = Path(__file__).resolve().parent.parent


def rows_for(recipe: str, value: float = 1.0) -> pa.Table:
    return pa.table(
        {"recipe": pa.repeat(pa.scalar(recipe), 4), "nmse": np.full(4, value, np.float32)}
    )


def fill(root: Path, names: list[str], study: str = "s") -> list[str]:
    """Begin a run of the parts `names` and compute what is missing; the names computed."""
    keys = {name: part_key({"recipe": name}, "sources") for name in names}
    manifest = {"study": study, "recipes": {n: {} for n in names}}
    manifest["parts"] = [{"key": key} for key in keys.values()]
    with writing(root, study, pytest.fail) as rows:
        finished = rows.begin(manifest, list(keys.values()))
        missing = [name for name in names if keys[name] not in finished]
        for name in missing:
            rows.write(keys[name], rows_for(name), {"jax": "0"})
    return missing


def path_of(root: Path, name: str) -> Path:
    return root / f"{part_key({'recipe': name}, 'sources')}.parquet"


def recipes_in(root: Path) -> set[str]:
    return set(pd.read_parquet(root)["recipe"])


def test_key_does_not_depend_on_order_or_container_types():
    one = {"a": 1, "b": [0.5, float("-inf")], "c": {"x": None, "y": True}}
    other = {"c": {"y": np.bool_(True), "x": None}, "b": (0.5, float("-inf")), "a": np.int32(1)}
    assert part_key(one, "s") == part_key(other, "s")


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None}, {"a": True}]
)
def test_key_depends_on_every_value(other):
    assert part_key({"a": 1}, "s") != part_key(other, "s")


def test_key_depends_on_sources():
    assert part_key({"a": 1}, "s") != part_key({"a": 1}, "t")


@pytest.mark.parametrize("name", ["rounding.py", "contraction/blocked.py", "new_module.py"])
def test_sources_hash_sees_numeric_modules(tmp_path, name):
    (tmp_path / "contraction").mkdir()
    for known in ("rounding.py", "contraction/blocked.py", "__init__.py"):
        (tmp_path / known).write_text("a = 1\n")
    before = sources_hash(tmp_path)
    (tmp_path / name).write_text("a = 2\n")
    assert sources_hash(tmp_path) != before


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py", "theory.py", "kernels/metal.py"])
def test_sources_hash_ignores_what_changes_no_number(tmp_path, name):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "rounding.py").write_text("a = 1\n")
    before = sources_hash(tmp_path)
    (tmp_path / name).write_text("a = 2\n")
    assert sources_hash(tmp_path) == before


def test_a_finished_part_is_not_computed_again(tmp_path):
    assert fill(tmp_path / "d", ["a", "b"]) == ["a", "b"]
    assert fill(tmp_path / "d", ["a", "b", "c"]) == ["c"]
    assert fill(tmp_path / "d", ["a", "b", "c"]) == []


def test_pandas_reads_the_directory_whatever_is_reserved(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "_figures").mkdir()
    (tmp_path / "_figures" / "figure.png").write_bytes(b"no parquet")
    (tmp_path / "_figures" / "stray.parquet").write_bytes(b"no parquet")
    (tmp_path / f"{store.TEMPORARY}left").write_bytes(b"half a part")
    (tmp_path / ".hidden").write_bytes(b"")
    rows = pd.read_parquet(tmp_path)
    assert len(rows) == 8 and set(rows["recipe"]) == {"a", "b"}
    assert rows["nmse"].dtype == np.float32


def test_directory_holds_parts_and_manifest_only(tmp_path):
    fill(tmp_path, ["a", "b"])
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {path_of(tmp_path, "a").name, path_of(tmp_path, "b").name, "_manifest.json"}


def test_parts_of_other_settings_leave_the_rows_and_come_back(tmp_path):
    fill(tmp_path, ["a", "b"])
    assert fill(tmp_path, ["b", "c"]) == ["c"]
    assert recipes_in(tmp_path) == {"b", "c"}
    assert fill(tmp_path, ["a", "b"]) == []
    assert recipes_in(tmp_path) == {"a", "b"}


def moved(root: Path, **manifest: object) -> str:
    """What is said of the one part in `root` that a run of none moves."""
    said: list[str] = []
    with writing(root, "s", pytest.fail) as rows:
        key = part_key({"recipe": "a"}, "sources")
        rows.begin({"study": "s", "sources": "1", "command": "run a", "parts": []}, [key])
        if key not in {path.stem for path in root.iterdir()}:
            rows.write(key, rows_for("a"), {})
        rows.begin({"study": "s", "sources": "1", "parts": [], **manifest}, [], said.append)
    (line,) = said
    return line


def test_what_is_moved_is_said_and_the_way_back_if_there_is_one(tmp_path):
    line = f"parts of other settings, moved to {tmp_path / '_aside'}: 1"
    assert moved(tmp_path, command="run b") == f"{line}; `run a` brings them back"
    assert moved(tmp_path, command="run b", sources="2") == line
    assert moved(tmp_path, command="run a") == line  # other inputs of the same name


def test_whatever_changes_the_rows_removes_the_figures(tmp_path):
    def drawn() -> bool:
        return bool(store.figures_in(tmp_path))

    def draw() -> None:
        (tmp_path / "_figures").mkdir(exist_ok=True)
        (tmp_path / "_figures" / "passing.svg").write_text("")

    fill(tmp_path, ["a", "b"])
    draw()
    fill(tmp_path, ["a", "b"])
    assert drawn()
    for names in (["a"], ["a", "b"], ["a", "b", "c"]):  # moved aside, brought back, computed
        draw()
        fill(tmp_path, names)
        assert not drawn()
    path_of(tmp_path, "a").write_bytes(b"")
    draw()
    with writing(tmp_path, "s", pytest.fail) as rows:
        rows.begin({"study": "s", "parts": []}, [path_of(tmp_path, n).stem for n in "abc"])
    assert not drawn()


def test_every_figure_that_plots_draws_is_known_by_its_name():
    """sweeps imports nothing of plots: its sources say what their figures are called."""
    drawn = re.compile(r'yield f?"([^"]+)"')
    texts = [path.read_text() for path in (ROOT / "plots").glob("*.py")]
    names = [re.sub(r"{.*?}", "64", name) for text in texts for name in drawn.findall(text)]
    assert {"error_by_block", "atlas", "owed_6464"} <= set(names)
    assert all(store.FIGURE_NAME.fullmatch(f"{name}.svg") for name in names)


def test_what_is_not_ours_stays_among_the_figures(tmp_path):
    fill(tmp_path / "d", ["a"])
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "atlas.svg").write_text("precious")
    figures = tmp_path / "d" / "_figures"
    figures.symlink_to(tmp_path / "else")
    fill(tmp_path / "d", ["b"])
    assert [path.name for path in store.figures_in(tmp_path / "d")] == ["atlas.svg"]  # read
    figures.unlink()
    figures.mkdir()
    (figures / "atlas.svg").symlink_to(tmp_path / "else" / "atlas.svg")
    (figures / "notes.svg").write_text("precious")
    (figures / "speed.png").mkdir()
    fill(tmp_path / "d", ["a"])
    assert len(list(figures.iterdir())) == 3
    assert (tmp_path / "else" / "atlas.svg").read_text() == "precious"


def test_a_directory_in_place_of_a_part_is_refused(tmp_path):
    fill(tmp_path, ["a"])
    path = path_of(tmp_path, "a")
    path.unlink()
    path.mkdir()
    with pytest.raises(store.StoreError, match="a directory, where a part belongs"):
        fill(tmp_path, ["a"])


@pytest.mark.parametrize("damage", ["truncated", "empty", "footer", "page", "renamed", "list"])
def test_a_damaged_part_is_computed_again(tmp_path, damage):
    fill(tmp_path, ["a", "b"])
    path = path_of(tmp_path, "a")
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "footer":
        path.write_bytes(content[:-20] + bytes(20))
    elif damage == "page":
        path.write_bytes(content[:30] + bytes([content[30] ^ 255]) + content[31:])
    elif damage == "list":
        rows = pa.parquet.read_table(path).replace_schema_metadata({store.METADATA: b'["x"]'})
        pa.parquet.write_table(rows, path)
    else:
        path.write_bytes(path_of(tmp_path, "b").read_bytes())
    assert fill(tmp_path, ["a", "b"]) == ["a"]
    assert recipes_in(tmp_path) == {"a", "b"}


def test_a_failed_write_leaves_no_part(tmp_path, monkeypatch):
    fill(tmp_path, ["a"])
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with writing(tmp_path, "s", pytest.fail) as rows, pytest.raises(OSError, match="full"):
        rows.write(part_key({"recipe": "b"}, "sources"), rows_for("b"), {})
    assert recipes_in(tmp_path) == {"a"}
    assert not list(tmp_path.glob(f"{store.TEMPORARY}*"))


def test_left_over_temporary_files_are_removed(tmp_path):
    fill(tmp_path, ["a"])
    (tmp_path / f"{store.TEMPORARY}left").write_bytes(b"half a part")
    fill(tmp_path, ["a"])
    assert not list(tmp_path.glob(f"{store.TEMPORARY}*"))


def test_read_rows_takes_the_manifest_order_and_skips_what_is_missing(tmp_path):
    fill(tmp_path, ["b", "a", "c"])
    path_of(tmp_path, "a").unlink()
    manifest, rows = read_rows(tmp_path)
    assert manifest["study"] == "s"
    assert rows["recipe"].to_pylist() == ["b"] * 4 + ["c"] * 4


def test_provenance_is_kept_with_each_part(tmp_path):
    fill(tmp_path, ["a"])
    path = path_of(tmp_path, "a")
    assert store.read_provenance(path) == {"jax": "0", "key": path.stem}


def test_manifest_is_strict_json(tmp_path):
    with writing(tmp_path, "s", pytest.fail) as rows:
        rows.begin({"study": "s", "recipes": {"a": {"m": float("-inf")}}, "parts": []}, [])
    text = (tmp_path / "_manifest.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["recipes"]["a"]["m"] == "-inf"


@pytest.mark.parametrize("text", ["", '{"study": ', "[]", '{"format": "another"}', "[" * 10**5])
def test_a_damaged_manifest_is_rebuilt_around_the_parts(tmp_path, text):
    fill(tmp_path, ["a"])
    (tmp_path / "_manifest.json").write_text(text)
    with pytest.raises(StoreError, match="_manifest.json"):
        read_rows(tmp_path)
    assert fill(tmp_path, ["a"]) == []
    assert read_rows(tmp_path)[1].num_rows == 4


def test_foreign_directories_are_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"thesis\.tex.*--out"), writing(tmp_path, "s", print):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_strangers_in_our_own_directory_are_refused(tmp_path):
    fill(tmp_path, ["a"])
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        check_directory(tmp_path, "s")


def test_a_directory_of_another_study_is_refused(tmp_path):
    fill(tmp_path, ["a"], study="one")
    with pytest.raises(StoreError, match="'one'.*'two'"):
        check_directory(tmp_path, "two")


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/that"])
def test_a_file_in_place_of_the_directory(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not a directory"):
        check_directory(tmp_path / name, "s")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(StoreError, match="link to nothing"):
        check_directory(tmp_path / "link", "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directories(tmp_path):
    (tmp_path / "d").mkdir(mode=0o555)
    for path in (tmp_path / "d", tmp_path / "d" / "below"):
        with pytest.raises(StoreError, match="not writable"):
            check_directory(path, "s")


def test_a_directory_that_cannot_be_written_after_all(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match="Read-only"), writing(tmp_path, "s", print):
        pass


def test_checking_creates_nothing(tmp_path):
    check_directory(tmp_path / "a" / "b", "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_reading_what_is_no_sweep(tmp_path, make):
    make(tmp_path / "d")
    with pytest.raises(StoreError, match="no such directory|not a directory of sweeps"):
        read_rows(tmp_path / "d")


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    import pyarrow as pa
    from sweeps.keys import part_key
    from sweeps.store import writing

    root, name = Path(sys.argv[1]), sys.argv[2]
    keys = [part_key({"part": n}, "") for n in range(4)]
    with writing(root, "s", lambda line: print("waits", flush=True)) as store:
        manifest = {"study": "s", "parts": [{"key": key} for key in keys]}
        finished = store.begin(manifest, keys)
        print("begun", len(finished), flush=True)
        for key in keys:
            if key not in finished:
                store.write(key, pa.table({"by": [name]}), {})
                sys.stdin.readline()
""")


def test_two_processes_do_not_corrupt_a_directory(tmp_path):
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "d"), name]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    first = start("one")
    assert first.stdout is not None and first.stdout.readline() == "begun 0\n"
    second = start("two")
    assert second.stdout is not None and second.stdout.readline() == "waits\n"
    assert first.communicate("\n" * 4) == ("", None)
    assert second.communicate("\n" * 4) == ("begun 4\n", None)
    assert (first.returncode, second.returncode) == (0, 0)
    assert list(pd.read_parquet(tmp_path / "d")["by"]) == ["one"] * 4
