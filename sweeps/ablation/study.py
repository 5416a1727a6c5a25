"""The ablation study: every subset of a kernel's rounding sites lifted to float32.

It began with llama.cpp #24389, which asked for m, l and the row sum of Hexagon's HMX kernel in
FP32. All 2^8 subsets of eight sites share their lanes, so that one call computes them together.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sweeps import estimate, hexagon, plan
from sweeps.keys import part_key, sources_hash
from sweeps.plan import Inputs, Study
from sweeps.processes import Place
from sweeps.run import Progress, describe_inputs, describe_rules
from sweeps.store import Store
from sweeps.work import Finished, Work

METRICS = ("nmse", "bias_l", "bias_o")
ALL_HEADS = -1
SOURCES = ("jaxattn/attribution.py", "sweeps/ablation/study.py")
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Study):
    """A Study of one kernel, at its own KV block and at `kv_blocks`, whose sites are lifted."""

    def of(self, kernel: str) -> "Ablation":
        return dataclasses.replace(self, recipes=(kernel,), block_axis=(kernel,))

    def text(self, rows: Any, manifest: Mapping[str, Any]) -> str:
        from sweeps.ablation.table import tables

        return tables(rows, manifest["sites"], manifest["beside"])

    def describe(self, quick: "Study") -> list[str]:
        lines = [
            f"{word}: {len(study.regimes)} regimes, seeds: {study.seeds}, contexts 256 to "
            f"{study.max_context:,}"
            for word, study in (("full", self), ("--quick", quick))
        ]
        blocks = f"KV block {', '.join(map(str, self.kv_blocks))} and its own"
        lines.append(f"kernel: {self.recipes[0]} (or --kernel NAME) at {blocks}")
        return [*lines, f"regimes: {', '.join(self.regimes)}"]


FULL = Ablation(
    name="ablation",
    title="which rounding site owes how much of the error, and which only together",
    recipes=("hexagon-hmx-fp16",),
    block_axis=("hexagon-hmx-fp16",),
    kv_blocks=(64,),
    regimes=("gaussian", "biased_v", "flat", "sink", "uniform01"),
    seeds=3,
    max_context=2**17,
    # Lifting a site draws all other errors anew: many rows; and in `flat`, where all queries are
    # one, a row is a draw only where its values are its own.
    sizes={**hexagon.FULL.sizes, "heads": 4, "group": 1, "queries": 32},
)

QUICK = dataclasses.replace(FULL, seeds=1, max_context=2**13)


@dataclasses.dataclass(frozen=True)
class Part:
    """The unit that is stored: one input, all of its seeds, at one block setting.

    recipes: by the subset of sites that are lifted (see `lattice`)
    """

    key: str
    kernel: str
    block: str
    sources: tuple[Inputs, ...]
    recipes: Mapping[int, Any]
    contexts: tuple[int, ...]

    @property
    def label(self) -> str:
        return self.sources[0].label

    def describe(self) -> dict[str, Any]:
        """The part's entry in the manifest."""
        return {"key": self.key, "inputs": self.label, "block": self.block}


def lattice(recipe: Any, sites: tuple[str, ...], beside: tuple[str, ...]) -> dict[int, Any]:
    """Recipes by subset: bit i of it says that the i-th of (*sites, *beside) is lifted.

    Every subset of `sites`; and each of those beside them lifted alone, lowered alone, and all.
    """
    from jaxattn.attribution import lift, subsets

    names = (*sites, *beside)
    every = 2 ** len(names) - 1
    found = dict(enumerate(subsets(recipe, sites)))
    for bit in (1 << i for i in range(len(sites), len(names))):
        for subset in (bit, every ^ bit, every):
            found[subset] = lift(recipe, [s for i, s in enumerate(names) if subset >> i & 1])
    return found


def work_of(
    study: Ablation,
    quick: bool,
    *,
    kernel: str | None = None,
    inputs: str | None = None,
    seeds: int | None = None,
    max_context: int | None = None,
) -> tuple[Work, list[str]]:
    """The study's work as the options change it, and notes for the user.

    Raises ValueError where the options do not fit, or the kernel rounds nowhere.
    """
    import jaxattn
    from jaxattn import attribution

    study = study.of(kernel or study.recipes[0])
    name = study.recipes[0]
    recipe = plan.recipes_of([name])[name]
    sites, beside = attribution.chosen_sites(recipe)
    if not sites:
        raise ValueError(f"--kernel {name} rounds nothing to less than float32: no site to lift")
    sources = plan.inputs_of(study, inputs, seeds, max_context)
    numbers = sources_hash(Path(jaxattn.__file__).parent)
    for path in SOURCES:
        numbers += hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
    parts = _parts(study, recipe, sites, beside, sources, numbers)

    def refuse(there: set[str]) -> None:
        missing = [_job(part) for part in parts if part.key not in there]
        estimate.refuse(estimate.estimate(missing), estimate.free_memory())

    def compute(
        store: Store,
        finished: Finished,
        origin: Mapping[str, Any],
        progress: Progress,
        place: Place,
    ) -> None:
        todo = [part for part in parts if part.key not in finished][place.index :: place.count]
        progress.plan([len(part.sources) * part.contexts[-1] for part in todo])
        for part in todo:
            progress.start(f"{part.label}, KV block {part.block}: {len(part.recipes)} recipes")
            rows = _rows(part, len(sites), progress, place)
            store.write(part.key, rows, origin)
            progress.finish()

    labels = list(dict.fromkeys(source.label for source in sources))
    suffix = [name] * (name != FULL.recipes[0]) + ["quick"] * quick + labels * (inputs is not None)
    work = Work(
        study=study.name,
        title=study.title,
        suffix=tuple(suffix),
        manifest={
            "sources": numbers,
            "recipes": {name: recipe.to_dict()},
            "sites": sites,
            "beside": beside,
            "block_rules": describe_rules([recipe]),
            "inputs": describe_inputs(sources),
            "seeds": sorted({source.seed for source in sources}),
            "contexts": list(parts[0].contexts),
        },
        parts=[part.describe() for part in parts],
        compute=compute,
        refuse=refuse,
    )
    return work, plan.notes_of(sources)


def _parts(
    study: Ablation,
    recipe: Any,
    sites: tuple[str, ...],
    beside: tuple[str, ...],
    sources: list[Inputs],
    numbers: str,
) -> list[Part]:
    from jaxattn.walk import default_contexts

    name = study.recipes[0]
    by_block = plan.blocks_of(study, name, recipe)
    lattices = {block: lattice(r, sites, beside) for block, r in by_block.items()}
    parts = []
    for label in dict.fromkeys(source.label for source in sources):
        some = tuple(source for source in sources if source.label == label)
        contexts = tuple(default_contexts(some[0].length))
        for block, recipes in lattices.items():
            identity = {
                "study": study.name,
                "recipe": by_block[block].identity(),
                "name": name,
                "sites": (sites, beside),
                "inputs": [{"label": label, **source.identity} for source in some],
                "seeds": [source.seed for source in some],
                "block": block,
                "contexts": contexts,
            }
            key = part_key(identity, numbers)
            parts.append(Part(key, name, block, some, recipes, contexts))
    return parts


def _job(part: Part) -> plan.Job:
    """One call of error_curves, as estimates take it."""
    source, contexts = part.sources[0], part.contexts
    each = (
        plan.Part(FULL.name, part.kernel, recipe, source, part.block, contexts, "")
        for recipe in part.recipes.values()
    )
    return plan.Job(source, contexts, tuple(each))


def _rows(part: Part, sites: int, progress: Progress, place: Place) -> pa.Table:
    """One row for each panel, context and subset; a panel is a head of a capture, or all heads.

    nmse, nmse_p90: median and 90th percentile over seeds, heads and queries, each at most 1.
    better: share of the rows that are better than the kernel's as it is; of equal ones half.
    rows: how many there are. distinct: how many of them differ in some subset's NMSE.
    overflow: share of them that overflow.
    bias_l, bias_o: medians of what is finite.
    owed_nmse, owed_overflow: interaction indices of the subset (jaxattn.attribution), the Shapley
    value where it is one site; nan for subsets with sites beside.
    """
    import jaxattn
    from jaxattn.attribution import capped, errors_of, interaction_indices

    pooled: dict[str, list[np.ndarray]] = {name: [] for name in (*METRICS, "overflow")}
    kv_block = np.zeros(0)

    def report(done: int, total: int) -> None:
        progress.keys(len(pooled["nmse"]) * total + done, len(part.sources) * total)

    by_head = part.sources[0].kind == "capture"
    for source in part.sources:
        mesh = {} if place.devices is None else {"mesh": place.mesh(source.heads)}
        curves = jaxattn.error_curves(
            *source.arrays,
            list(part.recipes.values()),
            contexts=list(part.contexts),
            metrics=METRICS,
            progress=report,
            tile_keys=plan.TILE_KEYS,
            **mesh,
        )
        kv_block = curves.kv_block[0]
        for name, found in ({**curves.metrics, "overflow": curves.overflow}).items():
            pooled[name].append(_panels(np.asarray(found), by_head))
    rows = {name: np.concatenate(found, axis=-1) for name, found in pooled.items()}
    errors = errors_of(rows["nmse"], rows["overflow"])  # [subset, panel, context]
    columns: dict[str, np.ndarray] = {
        "nmse": errors.nmse,
        "nmse_p90": np.quantile(capped(rows["nmse"]), 0.9, axis=-1),
        "better": _share_better(capped(rows["nmse"])),
        "overflow": errors.overflow,
        **{name: _median_of_finite(rows[name]) for name in ("bias_l", "bias_o")},
    }
    for name in ("nmse", "overflow"):
        owed = np.full(errors.nmse.shape, np.nan)
        owed[: 2**sites] = interaction_indices(columns[name][: 2**sites])
        columns[f"owed_{name}"] = owed
    subset, panel, context = (x.ravel() for x in np.indices(errors.nmse.shape))
    count = len(subset)
    words = {"study": FULL.name, "recipe": part.kernel, "inputs": part.label, "block": part.block}
    table = {name: pa.repeat(pa.scalar(word), count) for name, word in words.items()}
    table["head"] = panel.astype(np.int32) if by_head else np.full(count, ALL_HEADS, np.int32)
    table["kv_block"] = kv_block[context].astype(np.int32)
    table["context"] = np.array(part.contexts, np.int32)[context]
    table["rows"] = np.full(count, rows["nmse"].shape[-1], np.int32)
    table["distinct"] = _distinct(rows["nmse"])[panel, context]
    table["subset"] = np.array(list(part.recipes), np.int32)[subset]
    return pa.table({**table, **{name: x.ravel() for name, x in columns.items()}})


def _panels(x: np.ndarray, by_head: bool) -> np.ndarray:
    """[recipe, context, B, T, N] as [recipe, panel, context, rows]."""
    x = np.moveaxis(x, -1, 1) if by_head else x[:, None]
    return x.reshape(*x.shape[:3], -1)


def _distinct(nmse: np.ndarray) -> np.ndarray:
    """int32 [panel, context]: rows that no other equals in every subset; nmse [subset, ..., rows].

    Where all queries are one, so are their rows: no more draws than there are values.
    """
    _, panels, contexts, _ = nmse.shape
    nmse = np.nan_to_num(nmse, nan=np.inf)  # nan equals nothing
    counts = [
        [np.unique(nmse[:, i, j], axis=1).shape[1] for j in range(contexts)] for i in range(panels)
    ]
    return np.array(counts, np.int32)


def _share_better(nmse: np.ndarray) -> np.ndarray:
    return ((nmse < nmse[0]).mean(axis=-1) + (nmse <= nmse[0]).mean(axis=-1)) / 2


def _median_of_finite(x: np.ndarray) -> np.ndarray:
    """Over the last axis; nan where nothing is finite."""
    some = np.isfinite(x)
    found = np.ma.median(np.ma.masked_array(x.astype(np.float64), ~some), axis=-1)
    return np.ma.filled(found, np.nan)
