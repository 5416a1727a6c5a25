"""Peer: a real kernel beside the recipe that claims to round as it does."""

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

FAMILIES = (
    "ggml_cpu",
    "torch_cpu",
    "jax_cpu",
    "pallas",
    "tokamax_cpu",
    "triton_interpreter",
    "runtimes",
    "gpu",
)
VECTOR, NOISE = "vector", "noise"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A kernel and how to call it; the defaults are what most kernels take.

    family:      module of sweeps.peers whose `attend` calls it
    function:    what is called, for the tables
    packages:    distributions whose versions are recorded; all are needed
    recipe:      name in jaxattn.kernels; `changes` (fields of Recipe.replace) fit it to this call
    dtype:       of query, key and value
    expect:      VECTOR where the error vector should be the recipe's (correlation >= 0.999), NOISE
                 where it is float32 noise of an unknown order (RMS within a factor of 1.5)
    head_dim:    of drawn inputs, and what narrower captures are padded to with zeros
    heads:       key/value heads; group: query heads for each of them; queries: rows of each head
    causal:      queries as many as keys, each seeing the keys up to its own
    contexts:    numbers of keys
    environment: variables that the process needs before it imports anything
    cause:       why it falls short of what is expected, where that is known
    """

    name: str
    family: str
    function: str
    packages: tuple[str, ...]
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    expect: str = VECTOR
    head_dim: int = 64
    heads: int = 2
    group: int = 1
    queries: int = 16
    causal: bool = False
    softcap: float | None = None
    contexts: tuple[int, ...] = (512, 2048, 8192)
    environment: Mapping[str, str] = field(default_factory=dict)
    cause: str = ""


class Family(Protocol):
    """What a module of sweeps.peers offers."""

    PEERS: tuple[Peer, ...]

    def attend(
        self, peer: Peer, query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float
    ) -> np.ndarray:
        """query [T, N, H], key [S, K, H], value [S, K, D], float32 values exact in peer.dtype.

        Returns the real kernel's output [T, N, D] as it stores it, widened to float32.
        """


def family(name: str) -> Any:
    return importlib.import_module(f"sweeps.peers.{name}")


def peers() -> dict[str, Peer]:
    """All peers by name, whether or not their packages are installed."""
    return {peer.name: peer for name in FAMILIES for peer in family(name).PEERS}


def versions(peer: Peer) -> dict[str, str]:
    """Versions of the peer's packages; PackageNotFoundError where one is not installed."""
    return {package: importlib.metadata.version(package) for package in peer.packages}
