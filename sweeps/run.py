"""Running jobs: one call of `jaxattn.error_curves` each, its rows stored before the next starts."""

import dataclasses
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from sweeps import calls
from sweeps.estimate import LONG, duration, estimate
from sweeps.plan import TILE_KEYS, Inputs, Job, Part
from sweeps.processes import Place
from sweeps.store import Store

METRICS = ("nmse", "rel_l2", "max_abs", "cosine", "bias_l", "bias_o")
FLAGS = ("overflow", "stagnated")
PACKAGES = ("jaxattn", "jax", "jaxlib", "numpy", "pyarrow")


def environment() -> dict[str, Any]:
    """What is recorded beside the rows and warned about, but is in no key."""
    import jax

    device = jax.local_devices()[0]
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def provenance(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `environment` that each part keeps."""
    return {
        "jax": environment["versions"]["jax"],
        "device": environment["device"],
        "xla_flags": environment["xla_flags"],
    }


def differences(finished: Iterable[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """One line for each other jax, device or flags that finished parts were computed with."""
    others: dict[str, int] = {}
    for part in finished:
        changes = [f"{name} {part.get(name)!r}" for name in now if part.get(name) != now[name]]
        if changes:
            others[", ".join(changes)] = others.get(", ".join(changes), 0) + 1
    return [f"{count} finished parts were computed with {what}" for what, count in others.items()]


def rows_of(part: Part, curves: Any, index: int) -> pa.Table:
    """One part's rows: context x batch x query x head, metrics float32, flags bool."""
    shape = np.shape(curves.overflow)[1:]
    count = int(np.prod(shape))
    context, batch, query, head = np.indices(shape, dtype=np.int32).reshape(4, count)
    words = {
        "study": part.study,
        "recipe": part.name,
        "inputs": part.inputs.label,
        "seed": pa.scalar(part.inputs.seed, pa.int32()),
        "block": part.block,
    }
    columns: dict[str, Any] = {name: pa.repeat(pa.scalar(v), count) for name, v in words.items()}
    columns["kv_block"] = np.asarray(curves.kv_block[index], np.int32)[context]
    columns["context"] = np.asarray(curves.contexts, np.int32)[context]
    columns |= {"batch": batch, "head": head, "query": query}
    for name in METRICS:
        columns[name] = np.asarray(curves.metrics[name][index], np.float32).reshape(count)
    for name in FLAGS:
        columns[name] = np.asarray(getattr(curves, name)[index], bool).reshape(count)
    return pa.table(columns)


def run_jobs(
    jobs: Sequence[Job],
    store: Store,
    finished: Iterable[str],
    origin: Mapping[str, Any],
    progress: "Progress",
    place: Place,
) -> int:
    """Compute and store this process's share of the parts that are not finished; how many.

    They are computed in calls (`calls_of`), and those of a call are stored once it returns.
    """
    import jax

    import jaxattn

    done = frozenset(finished)
    todo = calls.share_of(calls.calls_of(jobs, done), place.index, place.count)
    before = {part.recipe for job in jobs for part in job.parts if part.key in done}
    if (expected := estimate(todo, before)).seconds >= LONG:
        what = "what is left takes" if done else "this takes"
        progress.say(f"{what} {expected}, to the order of magnitude")
    progress.plan([job.cost for job in todo], calls.compiling(todo))
    compiled: set[Any] = set()

    for job in todo:
        progress.start(title(job))
        structures = calls.by_structure(job.recipes).keys()
        if len(compiled | structures) > calls.MOST_STRUCTURES:
            jax.clear_caches()  # their programs take memory, and serve no call to come
            compiled = set()
        compiled |= structures
        mesh = {} if place.devices is None else {"mesh": place.mesh(job.inputs.heads)}
        curves = jaxattn.error_curves(
            *job.inputs.arrays,
            job.recipes,
            contexts=list(job.contexts),
            metrics=METRICS,
            progress=progress.keys,
            tile_keys=TILE_KEYS,
            **mesh,
        )
        for index, part in enumerate(job.parts):
            store.write(part.key, rows_of(part, curves, index), origin)
        progress.finish()
    return sum(len(job.parts) for job in todo)


def title(job: Job) -> str:
    seed = f", seed {job.inputs.seed}" if job.inputs.kind == "regime" else ""
    return f"{job.inputs.label}{seed}: {len(job.parts)} curves"


def describe_inputs(inputs: Iterable[Inputs]) -> dict[str, Any]:
    """The manifest's account of the inputs, by label; seeds stand apart."""
    return {
        source.label: {
            "kind": source.kind,
            **{name: value for name, value in source.identity.items() if name != "seed"},
        }
        for source in inputs
    }


def describe_rules(recipes: Iterable[Any]) -> dict[str, Any]:
    """The configuration behind every named rule of KV block size that the recipes use."""
    from jaxattn.block_rules import DEFAULT

    names = sorted({recipe.kv_block for recipe in recipes if isinstance(recipe.kv_block, str)})
    return {name: dataclasses.asdict(DEFAULT) for name in names}


class Progress:
    """Progress of a run on one stream: a bar on a terminal, else a line before and after each job.

    name: what each line starts with, where several processes share the stream.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        name: str = "",
    ) -> None:
        self.stream, self.clock, self.name = stream or sys.stderr, clock, name
        self.weights: list[int] = []
        self.compiles: list[bool] = []
        self.took: list[float] = []
        self.job, self.label, self.started = 0, "", 0.0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                Remaining(),
                console=Console(file=self.stream),
                transient=True,
            )
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        print(f"{self.name}{line}", file=self.stream, flush=True)

    def plan(self, weights: Sequence[int], compiles: Sequence[bool] = ()) -> None:
        """weights of the jobs; compiles: which of them compile what later ones use."""
        self.weights = list(weights)
        self.compiles = list(compiles) or [False] * len(self.weights)
        if self.bar is not None:
            self.bar.add_task("starting", total=max(1, sum(weights)))

    def start(self, label: str, brief: bool = False) -> None:
        """brief: a job of a second or two, of which a line at its end is enough."""
        self.label, self.started = label, self.clock()
        if self.bar is None and not brief:
            self.say(f"{self._count(self.job + 1)} {label} ...")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], description=self.name + label)

    def keys(self, done: int, total: int) -> None:
        """For error_curves to call after each chunk of keys."""
        if self.bar is not None:
            before = sum(self.weights[: self.job])
            within = self.weights[self.job] * done / max(1, total)
            self.bar.update(self.bar.task_ids[0], completed=before + within)

    def finish(self) -> None:
        self.keys(1, 1)
        self.job += 1
        self.took.append(self.clock() - self.started)
        if self.bar is None:
            left = self._left()
            more = f", about {duration(left)} left" if left >= LONG else ""
            self.say(f"{self._count(self.job)} {self.label} in {self.took[-1]:.1f} s{more}")

    def _left(self) -> float:
        """Seconds, by the jobs that compiled nothing, and what the others took beside; 0 where
        none tells yet."""
        done = list(zip(self.took, self.weights, self.compiles, strict=False))
        plain = [(took, weight) for took, weight, compiles in done if not compiles]
        if all(self.compiles):
            plain = [(took, weight) for took, weight, _ in done]
        if not plain:
            return 0.0
        rate = sum(took for took, _ in plain) / max(1, sum(weight for _, weight in plain))
        beside = [took - rate * weight for took, weight, compiles in done if compiles]
        coming = sum(self.compiles[self.job :]) * sum(beside) / max(1, len(beside))
        return rate * sum(self.weights[self.job :]) + max(0.0, coming)

    def _count(self, job: int) -> str:
        return f"[{job}/{len(self.weights)}]"
