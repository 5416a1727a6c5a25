"""walk_of: arguments, checked, as a walk over the keys that is ready to run."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxattn import block_rules, kernels, tiles
from jaxattn.exact import Exact
from jaxattn.formats import format_of
from jaxattn.lanes import structure_of
from jaxattn.pages import Pages
from jaxattn.passes import Job, Report, run_all
from jaxattn.recipe import Recipe

LONGEST = 2**30  # keys are counted in 32 bits


def default_contexts(length: int) -> list[int]:
    """Four per octave from 256 to `length`, to the nearest 16, and `length` itself."""
    steps = range(4 * max(0, int(math.log2(max(length, 1))) - 7) + 4)
    rounded = (round(2 ** (8 + step / 4) / 16) * 16 for step in steps)
    return [*(n for n in rounded if n < length), length]


class Walk(NamedTuple):
    """A pass over the keys that is ready to run.

    shape:    (recipe, context, B, T, N)
    kv_block: int [recipe, context]
    exact:    context -> the reference's (output [B·K, R, D], log-sum-exp [B·K, R]), float64
    run:      (report, progress): gives report(members, context, outcome) all there is; what it
              asks of `exact` it asks meanwhile
    """

    recipes: list[Recipe]
    contexts: list[int]
    shape: tuple[int, ...]
    kv_block: np.ndarray
    exact: Exact
    run: Callable[[Report, Callable[[int, int], None] | None], None]


def walk_of(
    query: Any,
    key: Any,
    value: Any,
    recipes: Sequence[Recipe | str],
    contexts: Sequence[int] | None,
    scale: float | None,
    tile_keys: int | None = None,
    mesh: Mesh | None = None,
) -> Walk:
    """The walk that error_curves of these arguments asks for; raises what error_curves does."""
    chosen = _chosen(recipes)
    query = np.asarray(query)
    stream = _stream(query, key, value)
    lengths = _contexts(contexts, stream.length)
    if tile_keys is not None:
        tile_keys = _whole("tile_keys", tile_keys, block_rules.LARGEST)
    scale = float(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")

    devices = _devices(mesh, stream.heads)

    rows = _rows(query, stream.heads)
    shape = (len(chosen), len(lengths), query.shape[0], query.shape[1], query.shape[2])
    kv_block = np.zeros(shape[:2], int)

    pages = Pages(stream, lengths[-1])
    exact = Exact(pages, rows.astype(np.float64) * scale, lengths)

    sizes = (rows.shape[-1], stream.value_dim)
    jobs = _jobs(chosen, lengths, sizes, tile_keys, kv_block, devices)
    dtypes = (query.dtype, *(x.dtype for x in pages.read(0, 1)))

    def run(report: Report, progress: Callable[[int, int], None] | None) -> None:
        with exact:
            run_all(
                jobs,
                pages,
                exact,
                report,
                progress,
                rows=rows,
                group=query.shape[0] * query.shape[2] // stream.heads,
                value_dim=stream.value_dim,
                scale=scale,
                formats=[format_of(dtype) for dtype in dtypes],
            )

    return Walk(chosen, lengths, shape, kv_block, exact, run)


def _chosen(recipes: Sequence[Recipe | str]) -> list[Recipe]:
    if isinstance(recipes, str | Recipe):
        raise TypeError(f"recipes must be a sequence of recipes or names, got one: {recipes!r:.60}")
    chosen = [kernels.get(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    for recipe in chosen:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipes must be Recipes or names, got a {type(recipe).__name__}")
    if not chosen:
        raise ValueError("recipes must hold at least one recipe")
    return chosen


class _Arrays(NamedTuple):
    """Key and value arrays [B, S, K, .] as a Stream of B·K heads."""

    key: np.ndarray
    value: np.ndarray

    @property
    def length(self) -> int:
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        return self.key.shape[0] * self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.key.shape[-1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]

    def blocks(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        def piece(x: np.ndarray) -> np.ndarray:
            part = np.moveaxis(x[:, start:stop], 0, 1)
            return part.reshape(len(part), -1, x.shape[-1])

        return piece(self.key), piece(self.value)


def _stream(query: np.ndarray, key: Any, value: Any) -> Any:
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, T, N, H] with no empty axis, got {query.shape}")
    if hasattr(key, "blocks"):
        if value is not None:
            raise ValueError("value must be None where key is a Stream of both")
        stream = key
        if query.shape[0] != 1:
            raise ValueError(f"a Stream goes with one batch entry, got query {query.shape}")
    else:
        key, value = np.asarray(key), np.asarray(value)
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3] or 0 in key.shape:
            raise ValueError(
                "key and value must be [B, S, K, H] and [B, S, K, D] with no empty axis, got "
                f"{key.shape} and {value.shape}"
            )
        if key.shape[0] != query.shape[0]:
            raise ValueError(f"query {query.shape} and key {key.shape} must agree in batch size")
        stream = _Arrays(key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, np.ndarray):
            format_of(x.dtype) if x.dtype.kind in "fV" else _not_floating(name, x)
    if stream.head_dim != query.shape[-1]:
        raise ValueError(f"query has head dim {query.shape[-1]}, key has {stream.head_dim}")
    if (query.shape[0] * query.shape[2]) % stream.heads:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {query.shape[2]} query heads"
        )
    return stream


def _not_floating(name: str, x: np.ndarray) -> None:
    raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it first")


def _contexts(contexts: Sequence[int] | None, length: int) -> list[int]:
    if length > LONGEST:
        raise ValueError(f"a context must be at most {LONGEST} keys, got {length}")
    if contexts is None:
        return default_contexts(length)
    if not isinstance(contexts, Sequence | np.ndarray) or not len(contexts):
        raise ValueError(
            f"contexts must be a sequence of at least one number, got {contexts!r:.60}"
        )
    return sorted({_whole("contexts", n, length, " (the keys there are)") for n in contexts})


def _whole(name: str, value: Any, most: int, why: str = "") -> int:
    """Numbers that a float holds are whole as well; a bool is none."""
    number = not isinstance(value, bool | np.bool_) and isinstance(value, int | float | np.number)
    if not number or not 1 <= value <= most or int(value) != value:
        raise ValueError(f"{name} must be whole numbers from 1 to {most}{why}, got {value!r}")
    return int(value)


def _rows(query: np.ndarray, heads: int) -> np.ndarray:
    """[B, T, N, H] -> [heads, R, H], heads = B·K: the rows that share keys and values."""
    B, T, N, H = query.shape
    G = B * N // heads
    grouped = query.reshape(B, T, heads // B, G, H)
    return np.moveaxis(grouped, 2, 1).reshape(heads, T * G, H)


def _devices(mesh: Mesh | None, heads: int) -> list[Mesh | None]:
    """The devices of each row of the mesh."""
    if mesh is None:
        return [None]
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got a {type(mesh).__name__}")
    if mesh.axis_names != ("recipes", "heads"):
        raise ValueError(f"mesh must have the axes 'recipes' and 'heads', got {mesh.axis_names}")
    if not mesh.devices.size:
        raise ValueError(f"mesh must hold devices, got one of shape {mesh.devices.shape}")
    if heads % mesh.shape["heads"]:
        raise ValueError(
            f"mesh: its {mesh.shape['heads']} devices along 'heads' must divide the number of "
            f"batch entries times key/value heads, {heads}"
        )
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError("mesh must hold devices of this process alone, see jax.local_devices()")
    return [Mesh(row, ("heads",)) for row in mesh.devices]


def _jobs(
    recipes: list[Recipe],
    contexts: list[int],
    sizes: tuple[int, int],
    tile_keys: int | None,
    kv_block: np.ndarray,
    devices: list[Mesh | None],
) -> list[Job]:
    """Recipes by structure, in as many parts as there are devices; contexts by block layout.

    sizes: head dim and value dim. Fills in kv_block [recipe, context].
    """
    groups: dict[Any, list[int]] = {}
    for i, recipe in enumerate(recipes):
        groups.setdefault(structure_of(recipe), []).append(i)
    jobs = []
    for number, group in enumerate(groups.values()):
        layouts: dict[tiles.Tile, list[int]] = {}
        for at, n in enumerate(contexts):
            tile = tiles.tile_of(recipes[group[0]].kv_block, n, *sizes, tile_keys)
            layouts.setdefault(tile, []).append(n)
            kv_block[group, at] = tile.kv_block
        size = -(-len(group) // len(devices))
        for part, start in enumerate(range(0, len(group), size)):
            members = group[start : start + size]
            some = [recipes[i] for i in members]
            where = devices[(number + part) % len(devices)]
            jobs += [Job(members, some, tile, at, where) for tile, at in layouts.items()]
    return jobs
