"""A directory of rows: Parquet parts, each written whole or not at all and found by its key.

Layout of DIR::

    <sha256>.parquet    one part: the rows of one recipe, input, seed and block size
    _manifest.json      the present run: recipes in full, versions, seeds, command, its parts
    _figures/           drawn by `python -m plots DIR`
    _report.html        written by `python -m sweeps report DIR`
    _predicted.parquet  written by `run --predict`: what theory expects of the rows
    _aside/             parts that this directory's last run did not ask for

A figure never shows other rows than stand beside it: whatever changes the rows removes the
figures, until they are drawn again.

Readers of Parquet directories skip names that begin with `_` or `.`, so that
`pandas.read_parquet(DIR)` gives the rows of the present run and no others. A run moves the parts
of other settings or of older sources to `_aside` and fetches them back when it needs them again:
nothing is computed twice, nothing mixes silently. Deleting `_aside` loses nothing but time.

One run writes at a time: the directory itself is locked (flock), and a second run waits, then finds
the parts finished. The processes of one run (processes.py) write under the lock of its first, each
its own parts. A part is written under a temporary name, flushed to disk and
renamed; a part whose footer or pages cannot be read is deleted and computed again.
"""

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from sweeps.keys import FORMAT, canonical, plain

MANIFEST, ASIDE, FIGURES, TEMPORARY = "_manifest.json", "_aside", "_figures", "_tmp-"
REPORT, PREDICTED = "_report.html", "_predicted.parquet"
PART_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
FIGURE_NAME = re.compile(  # of `python -m plots`: whatever else lies in _figures is the user's
    r"(error_by_block|error_by_recipe_(\d+|rule)|passing|(owed|together)_(\d+|rule)(_\d+)?|atlas"
    r"|fidelity|speed|theory)\.(png|svg)"
)
METADATA = b"jaxattn"


class StoreError(ValueError):
    """The directory cannot be used as asked; the message says why and what to do."""


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of `root`; StoreError if there is none, or none that can be read."""
    path = root / MANIFEST
    if not root.is_dir():
        raise StoreError(f"{root}: no such directory; `python -m sweeps run` writes one")
    if not path.is_file():
        raise StoreError(f"{root}: not a directory of sweeps (it has no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise StoreError(
            f"{path}: unreadable ({error}); the same `run` again rebuilds it, the parts are kept"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: not a manifest of {FORMAT!r}")
    for field, kind in (("study", str), ("parts", list)):
        if not isinstance(manifest.get(field), kind):
            raise StoreError(
                f"{path}: says no {field}; the same `run` again rebuilds it, the parts are kept"
            )
    return manifest


def _parts(root: Path, manifest: Mapping[str, Any]) -> list[Path]:
    try:
        return [root / f"{part['key']}.parquet" for part in manifest["parts"]]
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{root / MANIFEST}: its parts cannot be read ({error!r}); the same `run` again "
            "rebuilds it"
        ) from None


def finished(root: Path, manifest: dict[str, Any]) -> tuple[int, int]:
    """How many of the manifest's parts are stored, and how many there are."""
    paths = _parts(root, manifest)
    return sum(path.is_file() for path in paths), len(paths)


def read_rows(root: Path) -> tuple[dict[str, Any], pa.Table]:
    """Manifest and rows of the present run's finished parts, in the order of the manifest."""
    manifest = read_manifest(root)
    paths = _parts(root, manifest)
    stored = [str(path) for path in paths if path.is_file()]
    if not stored:
        raise StoreError(f"{root}: no part is finished yet; run the same command again")
    try:
        rows = pyarrow.dataset.dataset(stored, format="parquet").to_table()
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{root}: a part cannot be read ({error}); the same `run` again replaces it"
        ) from None
    return manifest, rows


def check_directory(root: Path, study: str) -> None:
    """Raise StoreError unless `root` may be written by `study`. Creates and changes nothing."""
    if root.is_symlink() and not root.exists():
        raise StoreError(f"{root}: a link to nothing; remove it or choose another --out")
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root}: not a directory; choose another --out")
    if not root.exists():
        parent = next(p for p in root.absolute().parents if p.exists() or p.is_symlink())
        if not parent.is_dir():
            raise StoreError(f"{root}: {parent} is not a directory; choose another --out")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise StoreError(f"{root}: {parent} is not writable; choose another --out")
        return
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(f"{root}: not writable; choose another --out")
    strangers = sorted(p.name for p in root.iterdir() if not _ours(p.name))
    try:
        owner = read_manifest(root)["study"]
    except StoreError:
        if strangers:
            raise StoreError(
                f"{root}: not empty and not a directory of sweeps "
                f"(it holds {strangers[0]!r}); choose another --out"
            ) from None
        return
    if owner != study:
        raise StoreError(f"{root}: holds the study {owner!r}, not {study!r}; choose another --out")
    if strangers:
        raise StoreError(
            f"{root}: holds {strangers[0]!r}, which is no part of a sweep and would break "
            f"readers of the directory; move it away"
        )


def _ours(name: str) -> bool:
    reserved = name in (MANIFEST, ASIDE, FIGURES, REPORT, PREDICTED)
    return reserved or name.startswith((".", TEMPORARY)) or bool(PART_NAME.fullmatch(name))


class Store:
    """The parts of one directory, for one run. `writing` makes its first process's."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / f"{key}.parquet"

    def begin(
        self,
        manifest: Mapping[str, Any],
        keys: Sequence[str],
        note: Callable[[str], object] = lambda line: None,
    ) -> dict[str, dict[str, Any]]:
        """Make DIR hold the finished ones among `keys` and no others; write the manifest.

        Returns the provenance of every finished part by its key; the rest is to be computed.
        `note` is told of parts that are moved.
        """
        aside = self.root / ASIDE
        for path in self.root.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)
        there = [path for path in self.root.glob("*.parquet") if path.name != PREDICTED]
        if others := [path for path in there if path.stem not in set(keys)]:
            back = self._way_back(manifest)
            note(f"parts of other settings, moved to {aside}: {len(others)}{back}")
            aside.mkdir(exist_ok=True)
        for path in others:
            self._move(path, aside / path.name)
        finished = {}
        for key in keys:
            path = self.path(key)
            if path.is_dir():
                raise StoreError(f"{path}: a directory, where a part belongs; move it")
            if not path.exists() and (aside / path.name).exists():
                self._move(aside / path.name, path)
            if path.exists():
                provenance = read_provenance(path)
                if provenance is None or provenance.get("key") != key:
                    remove_figures(self.root)
                    path.unlink()
                else:
                    finished[key] = provenance
        text = json.dumps(plain({"format": FORMAT, **manifest}), indent=1, allow_nan=False)
        write_whole(self.root / MANIFEST, lambda path: path.write_text(text + "\n"))
        return finished

    def _move(self, path: Path, target: Path) -> None:
        remove_figures(self.root)
        os.replace(path, target)

    def _way_back(self, manifest: Mapping[str, Any]) -> str:
        """What fetches the parts of the last run, if another command than this one does."""
        try:
            last = read_manifest(self.root)
        except StoreError:
            return ""
        same = last.get("sources") == manifest.get("sources")
        if not same or last.get("command") in (None, manifest.get("command")):
            return ""
        return f"; `{last['command']}` brings them back"

    def join(self, keys: Sequence[str], patience: float = 60.0) -> dict[str, dict[str, Any]]:
        """What `begin` gave to the process that called it, for another process of the same run.

        patience: seconds for a network file system to show what that process has written.
        """
        deadline = time.monotonic() + patience
        while not self._has_begun(keys):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.root}: does not hold the run that process 0 began; start every process "
                    "with the same command, on a file system that all of them see"
                )
            time.sleep(0.2)
        found = {key: read_provenance(self.path(key)) for key in keys if self.path(key).exists()}
        return {key: provenance for key, provenance in found.items() if provenance is not None}

    def _has_begun(self, keys: Sequence[str]) -> bool:
        try:
            return [path.stem for path in _parts(self.root, read_manifest(self.root))] == list(keys)
        except StoreError:
            return False

    def write(self, key: str, rows: pa.Table, provenance: Mapping[str, Any]) -> None:
        """Write one part, whole or not at all."""
        metadata = {METADATA: canonical({**provenance, "key": key}).encode()}
        rows = rows.replace_schema_metadata(metadata)
        remove_figures(self.root)
        write_whole(
            self.path(key),
            lambda path: pa.parquet.write_table(
                rows, path, compression="zstd", write_page_checksum=True
            ),
        )


def figures_in(root: Path) -> list[Path]:
    """What `python -m plots` drew of the rows in `root`; links there are not its own."""
    folder = root / FIGURES
    if not folder.is_dir():
        return []
    ours = (path for path in folder.iterdir() if FIGURE_NAME.fullmatch(path.name))
    return sorted(path for path in ours if path.is_file() and not path.is_symlink())


def remove_figures(root: Path) -> None:
    """Where `_figures` is a link, what it links to is left alone."""
    for path in () if (root / FIGURES).is_symlink() else figures_in(root):
        path.unlink(missing_ok=True)


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """What `write` puts into the file that it is given, as `target`, whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
    temporary = Path(name)
    try:
        os.fchmod(handle, 0o644)
        write(temporary)
        os.fsync(handle)
        os.replace(temporary, target)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What a part says about its making; None if any byte of it that matters cannot be read."""
    try:
        rows = pa.parquet.read_table(path, page_checksum_verification=True)
        provenance = json.loads(rows.schema.metadata[METADATA])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return provenance if isinstance(provenance, dict) else None


@contextlib.contextmanager
def writing(root: Path, study: str, waiting: Callable[[str], object]) -> Iterator[Store]:
    """Create `root` if need be, lock it, and give its Store; `waiting` is told of a busy one.

    Raises StoreError for a directory that is foreign, of another study or not writable.
    """
    check_directory(root, study)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=TEMPORARY, dir=root):
            pass
    except OSError as error:
        raise StoreError(f"{root}: not writable ({error.strerror}); choose another --out") from None
    handle = os.open(root, os.O_RDONLY)
    try:
        _lock(handle, lambda: waiting(f"{root}: another process is writing here; waiting for it"))
        check_directory(root, study)
        yield Store(root)
    finally:
        os.close(handle)  # and with it the lock


def _lock(handle: int, busy: Callable[[], object]) -> None:
    try:
        import fcntl
    except ImportError:  # no flock on this system: parts stay whole, two runs may both compute
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return
