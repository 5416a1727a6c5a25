"""Studies that are lists: a real kernel that is run, a published claim that is tested.

An item gives a few rows of its own columns. It fails alone: what it raises is a row as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from sweeps.keys import part_key, sources_hash
from sweeps.processes import Place
from sweeps.run import Progress
from sweeps.store import Store
from sweeps.work import Finished, Work

NOT_RUN = "not run"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Item:
    """name: in the manifest; identity: what decides its rows, beside the sources; rows: makes them.

    A row whose `status` is NOT_RUN is made anew by every run.
    """

    name: str
    identity: Mapping[str, Any]
    rows: Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ListStudy:
    """A study of items, each with rows of the columns of `schema`.

    items:   (quick) -> the items, in the order of the table
    sources: folders of the checkout whose code decides the rows, as jaxattn's own does
    table:   rows -> the table, whose last line counts
    """

    name: str
    title: str
    items: Callable[[bool], Sequence[Item]]
    schema: Mapping[str, pa.DataType]
    sources: tuple[str, ...]
    table: Callable[[Any], str]
    has_figures: bool = False

    def text(self, rows: Any, manifest: Mapping[str, Any]) -> str:
        """The study's table, of its rows as a data frame."""
        return self.table(rows)

    def describe(self, quick: "ListStudy") -> list[str]:
        """Lines for `list`."""
        items, few = self.items(False), quick.items(True)
        return [f"{len(items)} items, {len(few)} with --quick", ", ".join(i.name for i in items)]


def work_of(study: ListStudy, quick: bool, only: Sequence[str] | None) -> Work:
    """The study's work; `only` names the items to take. Raises ValueError for an unknown name."""
    import jax

    import jaxattn
    from jaxattn.formats import unknown

    items = {item.name: item for item in study.items(quick)}
    left_out = {item.name for item in study.items(False)} - set(items)
    for name in only or ():
        if name in left_out:
            raise ValueError(f"{name} takes long and is no part of --quick: leave --quick out")
        if name not in items:
            raise unknown(f"item of {study.name}", name, items)
    chosen = [items[name] for name in dict.fromkeys(only)] if only else list(items.values())
    folders = (Path(jaxattn.__file__).parent, *(ROOT / folder for folder in study.sources))
    sources = "".join(sources_hash(folder) for folder in folders)
    schema = pa.schema(list(study.schema.items()))
    keys = {
        item.name: part_key({"study": study.name, "item": item.name, **item.identity}, sources)
        for item in chosen
    }

    def compute(
        store: Store,
        finished: Finished,
        origin: Mapping[str, Any],
        progress: Progress,
        place: Place,
    ) -> None:
        todo = [item for item in chosen if keys[item.name] not in finished]
        todo = todo[place.index :: place.count]
        progress.plan([1] * len(todo))
        for item in todo:
            progress.start(item.name)
            rows = item.rows()
            # Programs compiled for one item serve no other, and their memory maps are counted.
            jax.clear_caches()
            store.write(keys[item.name], pa.Table.from_pylist(rows, schema), origin)
            progress.finish()

    def again(store: Store, key: str) -> bool:
        status = pyarrow.parquet.read_table(store.path(key), columns=["status"])["status"]
        return NOT_RUN in status.to_pylist()

    return Work(
        study=study.name,
        title=study.title,
        suffix=("quick",) if quick else (),
        manifest={"sources": sources, "items": [item.name for item in chosen]},
        parts=[{"key": keys[item.name], "item": item.name} for item in chosen],
        compute=compute,
        again=again,
    )
