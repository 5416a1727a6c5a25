"""A real kernel's error vector beside its recipe's: what both get wrong against float64."""

import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from packaging.requirements import Requirement

from jaxattn.agreement import agreement, correlation
from sweeps.peers.peer import Peer, versions
from sweeps.plan import BUNDLED

INPUTS = ("gaussian", "biased_v", "minilm")
FIGURES = (
    "correlation",
    "settled",
    "ties",
    "ceiling",
    "control",
    "unexplained",
    "nmse_real",
    "nmse_recipe",
    "rms_ratio",
    "equal",
)
NOISE_FACTOR = 2  # two float32 kernels may err on either side
LIMIT_S = 1200  # of all calls of a real kernel
ROOT = Path(__file__).resolve().parents[2]


class NotRun(Exception):
    """The real kernel could not be run here; the message says why."""


class Drawn(NamedTuple):
    """Inputs of one comparison: query [T, N, H], key and value [S, K, .], and the scale."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float


def draw(peer: Peer, name: str, context: int) -> Drawn | None:
    """The first `context` keys of the named inputs in the peer's dtype; None if they do not fit."""
    import jaxattn

    if name == "minilm":
        capture = jaxattn.captures.load(BUNDLED["minilm"])
        query, (key, value) = capture.query[0][: peer.queries], capture.blocks(0, context)
        if peer.causal or peer.group > 1:
            return None
        query = np.resize(query, (peer.queries, *query.shape[1:]))  # a few, again and again
        scale = query.shape[-1] ** -0.5
        extra = max(0, peer.head_dim - query.shape[-1])
        query, key, value = (np.pad(x, ((0, 0), (0, 0), (0, extra))) for x in (query, key, value))
    else:
        query, stream = jaxattn.inputs.regime(
            name,
            length=context,
            seed=0,
            heads=peer.heads,
            group=peer.group,
            queries=context if peer.causal else peer.queries,
            head_dim=peer.head_dim,
            dtype=peer.dtype,
        )
        query, (key, value) = query[0], stream.blocks(0, context)
        scale = peer.head_dim**-0.5
    dtype = np.dtype(peer.dtype)
    query, key, value = (
        np.asarray(x).astype(dtype).astype(np.float32) for x in (query, key, value)
    )
    return Drawn(query, key, value, scale)


def real(peer: Peer, cases: Sequence[Drawn]) -> list[np.ndarray]:
    """The real kernel's output for each case, computed in a process of its own. Raises NotRun."""
    refuse_versions(peer)
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(cases):
            np.savez(Path(folder, f"{i}.npz"), **case._asdict())
        command = [sys.executable, "-m", "sweeps.peers", "attend", peer.name, folder]
        environment = {**os.environ, **peer.environment}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            raise NotRun(f"took longer than {LIMIT_S} s") from None
        if done.returncode < 0:
            raise NotRun(f"killed by {_signal(-done.returncode)}")
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise NotRun(f"failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return [_output(Path(folder, f"{i}.npy"), case) for i, case in enumerate(cases)]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # those for real time have no names
        return f"signal {number}"


def _output(path: Path, case: Drawn) -> np.ndarray:
    expected = (*case.query.shape[:2], case.value.shape[-1])
    try:
        result = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NotRun(f"gave no output that can be read ({error})") from None
    if result.shape != expected:
        raise NotRun(f"gave an output of shape {result.shape}, not {expected}")
    return result


def refuse_versions(peer: Peer) -> None:
    """Raises NotRun where a package is missing, or of a version that a peer is not made for."""
    try:
        installed = versions(peer)
    except ModuleNotFoundError as error:
        raise NotRun(f"{error.name} is not installed") from None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in map(Requirement, project["dependency-groups"]["peers"]):
        version = installed.get(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            raise NotRun(f"{requirement.name} {version} is installed, it needs {requirement}")


def recipe_of(peer: Peer) -> Any:
    from jaxattn import kernels

    recipe = kernels.get(peer.recipe)
    return recipe.replace(**peer.changes) if peer.changes else recipe


def control_of(recipe: Any) -> Any:
    """A kernel without roundings inside: its inputs and its result alone are narrow.

    What a comparison would find if the recipe were empty; it should find less.
    """
    from jaxattn.recipe import Recipe

    inputs = {site: getattr(recipe, site) for site in ("query", "key", "value", "result")}
    groups = {"query_group": recipe.query_group, "key_group": recipe.key_group}
    return Recipe(**inputs, **groups, kv_block=recipe.key_group or 64)


def figures(
    truth: np.ndarray,
    emulated: np.ndarray,
    control: np.ndarray,
    reference: np.ndarray,
    *,
    exact: np.ndarray | None = None,
    tied: np.ndarray | None = None,
) -> dict[str, float]:
    """How much of the real kernel's error the recipe explains; all arrays [T, N, D].

    Beside what jaxattn.agreement.Agreement has:
    control: the correlation for a recipe without roundings inside
    settled: the correlation without the elements `tied` (see ties); ties: their share
    ceiling: correlation of the recipe's errors with those of `exact`, the recipe in float64 sums;
        where rounding turns on float32 noise, no other kernel can be expected nearer than that
    """
    truth, emulated, control = (x.astype(np.float64) for x in (truth, emulated, control))
    e, r, c = truth - reference, emulated - reference, control - reference
    clear = np.ones(e.shape, bool) if tied is None else ~tied
    return agreement(truth, emulated, reference)._asdict() | {
        "settled": correlation(e[clear], r[clear]),
        "ties": float(1 - np.mean(clear)),
        "ceiling": 1.0 if exact is None else correlation(r, exact.astype(np.float64) - reference),
        "control": correlation(e, c),
    }


def ties(
    truth: np.ndarray, emulated: np.ndarray, unrounded: np.ndarray, noise: float
) -> np.ndarray:
    """Where kernel and recipe took the two neighbours of a result that lies between them.

    unrounded: the recipe's result in float32; noise: what float32 sums may differ by. An element
    counts if `unrounded` is as near to the middle of the two as noise can tell.
    """
    middle = (truth.astype(np.float64) + emulated) / 2
    return (truth != emulated) & (np.abs(unrounded - middle) <= noise)


def emulate(peer: Peer, drawn: Drawn, recipe: Any) -> np.ndarray:
    """The recipe's output [T, N, D] in float32, rounded as `result` says and no further."""
    import jaxattn

    out = jaxattn.dot_product_attention(
        drawn.query,
        drawn.key,
        drawn.value,
        recipe=recipe,
        scale=drawn.scale,
        is_causal=peer.causal,
        softcap=peer.softcap,
    )
    return np.asarray(out)


def compare(peer: Peer) -> Iterator[dict[str, Any]]:
    """One row for each of the inputs and contexts. Raises NotRun where the kernel cannot run."""
    refuse_versions(peer)
    drawn = {(name, n): draw(peer, name, n) for name in INPUTS for n in peer.contexts}
    cases = {words: case for words, case in drawn.items() if case is not None}
    truths = real(peer, list(cases.values()))
    for ((name, context), case), truth in zip(cases.items(), truths, strict=True):
        words = {"peer": peer.name, "recipe": peer.recipe, "inputs": name, "context": context}
        yield {**words, **judge(peer, case, truth)}


def judge(peer: Peer, case: Drawn, truth: np.ndarray) -> dict[str, float]:
    """The figures of one output of the real kernel beside its recipe's."""
    import jaxattn
    from jaxattn.formats import FLOAT32

    recipe = recipe_of(peer)
    control = control_of(recipe)
    reference = jaxattn.reference_attention(
        case.query,
        case.key,
        case.value,
        scale=case.scale,
        is_causal=peer.causal,
        softcap=peer.softcap,
    )
    emulated = emulate(peer, case, recipe)
    plain = emulate(peer, case, control)
    exact, tied = emulate(peer, case, recipe.replace(storage="float64")), None
    if recipe.result != FLOAT32:
        unrounded = emulate(peer, case, recipe.replace(result=FLOAT32))
        single = emulate(peer, case, control.replace(result=FLOAT32))
        noise = NOISE_FACTOR * float(np.abs(single - reference).max())
        tied = ties(truth, emulated, unrounded, noise)
    return figures(truth, emulated, plain, reference, exact=exact, tied=tied)
