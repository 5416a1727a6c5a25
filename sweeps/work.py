"""Work: what any study asks of the command line: parts to find again, and how to compute them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sweeps.processes import Place
from sweeps.run import Progress
from sweeps.store import Store

Finished = Mapping[str, Mapping[str, Any]]  # key of a part -> its provenance


class Work(NamedTuple):
    """study, title: of the manifest; suffix: of the directory that rows go to by default.

    manifest: what the study adds to it
    parts:    an entry of the manifest for each part, each with its `key`
    compute:  stores this process's share of the parts that are not finished; called with the
              Store, the finished parts, the provenance of new ones, the progress, and the place
    refuse:   raises ValueError where the memory does not suffice, for what is missing beside the
              parts of these keys
    again:    whether a finished part, by its key, is to be computed again all the same
    predict:  stores what theory expects of the parts in a directory; notes for the user
    """

    study: str
    title: str
    suffix: tuple[str, ...]
    manifest: dict[str, Any]
    parts: list[dict[str, Any]]
    compute: Callable[[Store, Finished, Mapping[str, Any], Progress, Place], None]
    refuse: Callable[[set[str]], None] = lambda there: None
    again: Callable[[Store, str], bool] = lambda store, key: False
    predict: Callable[[Path, Progress], list[str]] | None = None
