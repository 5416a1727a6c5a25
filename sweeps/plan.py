"""What a study computes: parts (recipe x input x seed x block size), grouped into jobs by input."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sweeps.keys import part_key

MOST_SEEDS = 10_000
LONGEST = 2**30  # keys are counted in 32 bits
RULE = "rule"  # the name of "as the recipe itself sets its KV block"
TILE_KEYS = None  # keys per compiled step: error_curves' own choice
BUNDLED = {"minilm": Path(__file__).parent / "data" / "minilm_layer4_8k.safetensors"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A named grid: `recipes` at their own KV block, those of `block_axis` at `kv_blocks` too.

    recipes: names; none for all that there are.
    sizes: keyword arguments of jaxattn.inputs.regime (heads, queries, group, head_dim, dtype).
    parameters: further keyword arguments, by regime.
    """

    name: str
    title: str
    recipes: tuple[str, ...]
    block_axis: tuple[str, ...]
    kv_blocks: tuple[int, ...]
    regimes: tuple[str, ...]
    seeds: int
    max_context: int
    sizes: Mapping[str, Any]
    parameters: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    has_figures = True

    def text(self, rows: Any, manifest: Mapping[str, Any]) -> str:
        """The study's tables, of its rows as a data frame."""
        from sweeps.table import by_head, crossings, own_blocks, table

        rows = own_blocks(rows, manifest["recipes"])
        present = set(rows["inputs"])
        names, labels = list(manifest["recipes"]), [x for x in manifest["inputs"] if x in present]
        captures = [x for x in labels if manifest["inputs"][x]["kind"] == "capture"]
        heads = by_head(rows, captures)
        apart = labels if heads is rows else list(heads["inputs"].unique())
        return f"{table(rows, names, labels)}\n\n{crossings(heads, names, apart)}"

    def describe(self, quick: "Study") -> list[str]:
        """Lines for `list`."""
        lines = [f"{word}: {study._size()}" for word, study in (("full", self), ("--quick", quick))]
        lines.append(f"recipes: {', '.join(self.names())}")
        return [*lines, f"regimes: {', '.join(self.regimes)}"]

    def names(self) -> tuple[str, ...]:
        """The recipes' names."""
        from jaxattn import kernels

        return self.recipes or tuple(kernels.names())

    def _size(self) -> str:
        names = self.names()
        axis = [name for name in self.block_axis if name in names]
        curves = (len(names) + len(axis) * len(self.kv_blocks)) * len(self.regimes) * self.seeds
        blocks = (
            f"KV blocks {', '.join(map(str, self.kv_blocks))} and their own"
            if axis
            else ("their own KV blocks")
        )
        return (
            f"{len(names)} recipes at {blocks}, {len(self.regimes)} regimes, {self.seeds} seeds, "
            f"contexts 256 to {self.max_context:,}: {curves} curves"
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Query, key and value as jaxattn.error_curves takes them, drawn from a regime or captured.

    identity: what decides their every bit, in values that JSON can hold.
    """

    label: str
    kind: str  # "regime" or "capture"
    seed: int
    length: int
    identity: Mapping[str, Any]
    arrays: tuple[Any, Any, Any]
    observed: bool = False  # the capture holds its kernel's own output too

    @property
    def heads(self) -> int:
        """Key/value heads, times the batch."""
        key = self.arrays[1]
        return key.shape[0] * key.shape[2] if self.kind == "capture" else key.heads

    @property
    def value_dim(self) -> int:
        _, key, value = self.arrays
        return value.shape[-1] if self.kind == "capture" else key.value_dim


@dataclasses.dataclass(frozen=True)
class Part:
    """One curve with its seed and block size: the unit that is stored, and found again by key."""

    study: str
    name: str
    recipe: Any
    inputs: Inputs
    block: str
    contexts: tuple[int, ...]
    sources: str

    @cached_property
    def key(self) -> str:
        """SHA-256 over all that the rows hold or depend on; a citation is neither."""
        recipe = self.recipe.identity()
        return part_key(
            {
                "study": self.study,
                "recipe": recipe,
                "name": self.name,
                "inputs": {"label": self.inputs.label, **self.inputs.identity},
                "seed": self.inputs.seed,
                "contexts": self.contexts,
                "block": self.block,
                "kv_block": self.recipe.kv_block,
                "tile_keys": TILE_KEYS,
                "storage": recipe.get("storage"),
            },
            self.sources,
        )

    def describe(self) -> dict[str, Any]:
        """The part's entry in the manifest."""
        return {
            "key": self.key,
            "recipe": self.name,
            "inputs": self.inputs.label,
            "seed": self.inputs.seed,
            "block": self.block,
        }


@dataclasses.dataclass(frozen=True)
class Job:
    """Parts that share inputs and contexts: as many calls of jaxattn.error_curves as they take."""

    inputs: Inputs
    contexts: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def recipes(self) -> tuple[Any, ...]:
        return tuple(part.recipe for part in self.parts)

    @property
    def cost(self) -> int:
        """About proportional to the time that it takes."""
        return len(self.parts) * self.contexts[-1]


def recipes_of(names: Sequence[str], settings: Sequence[str] = ()) -> dict[str, Any]:
    """Recipes by name; with `settings` (site=format) a changed one beside each that changes.

    Raises ValueError for unknown recipes, sites and formats, and if no recipe changes.
    """
    from jaxattn import kernels
    from jaxattn.recipe import with_changed

    chosen = [kernels.get(name) for name in dict.fromkeys(names)]
    return {recipe.name: recipe for recipe in with_changed(chosen, settings)}


def inputs_of(
    study: Study, choice: str | None = None, seeds: int | None = None, longest: int | None = None
) -> list[Inputs]:
    """The inputs of a run, seed by seed: a run broken off then has whole figures of few seeds.

    choice: None for the study's regimes, or a bundled capture's name, a file, or regimes A,B.
    seeds, longest: None for the study's own; a capture has no seeds, and ends where it ends.
    Raises ValueError where these do not fit, and for a file that captures.load rejects.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    if seeds is not None and seeds > MOST_SEEDS:
        raise ValueError(f"--seeds must be at most {MOST_SEEDS:,}, got {seeds:,}")
    if longest is not None and longest < 1:
        raise ValueError(f"--max-context must be at least 1, got {longest}")
    if longest is not None and longest > LONGEST:
        raise ValueError(f"--max-context must be at most {LONGEST:,}, got {longest:,}")
    path = BUNDLED.get(choice or "", Path(choice or ""))
    if choice is not None and (choice in BUNDLED or path.exists()):
        if seeds is not None:
            raise ValueError("--seeds has no meaning with a capture: its values are given")
        return [_captured(path, longest)]
    names = study.regimes if choice is None else tuple(dict.fromkeys(choice.split(",")))
    return [
        _drawn(study, name, seed, longest or study.max_context)
        for seed in range(seeds or study.seeds)
        for name in names
    ]


def notes_of(sources: Iterable[Inputs]) -> list[str]:
    """What the user should know of the inputs."""
    observed = any(source.observed for source in sources)
    return ["the capture's own `output` is left alone: `jaxattn compare FILE` is for it"] * observed


def _captured(path: Path, longest: int | None) -> Inputs:
    from jaxattn import captures

    capture = captures.load(path)
    if longest is not None and longest > capture.length:
        raise ValueError(f"--max-context {longest}: {capture.label} has {capture.length} keys")
    arrays = (capture.query, capture.key, capture.value)
    length = longest or capture.length
    observed = capture.output is not None
    return Inputs(capture.label, "capture", 0, length, capture.identity, arrays, observed)


def _drawn(study: Study, name: str, seed: int, length: int) -> Inputs:
    from jaxattn import inputs
    from jaxattn.formats import unknown

    if name not in inputs.REGIMES:
        raise unknown("input (neither a file nor a regime)", name, [*inputs.REGIMES, *BUNDLED])
    query, stream = inputs.regime(
        name, length=length, seed=seed, **study.sizes, **study.parameters.get(name, {})
    )
    return Inputs(stream.label, "regime", seed, length, stream.identity, (query, stream, None))


def jobs_of(
    study: Study, recipes: Mapping[str, Any], inputs: Iterable[Inputs], sources: str
) -> list[Job]:
    """A job for each input: every recipe at every block setting of the study."""
    from jaxattn.walk import default_contexts

    settings = {name: blocks_of(study, name, recipe) for name, recipe in recipes.items()}
    jobs = []
    for source in inputs:
        contexts = tuple(default_contexts(source.length))
        parts = tuple(
            Part(study.name, name, recipe, source, block, contexts, sources)
            for name, blocks in settings.items()
            for block, recipe in blocks.items()
        )
        jobs.append(Job(source, contexts, parts))
    return jobs


def blocks_of(study: Study, name: str, recipe: Any) -> dict[str, Any]:
    """The recipe by the name of its block setting: its own, then the study's axis."""
    settings = {RULE: recipe}
    if name.split("+")[0] in study.block_axis and not isinstance(recipe.kv_block, int):
        for kv_block in study.kv_blocks:
            settings[str(kv_block)] = recipe.replace(kv_block=kv_block)
    return settings
