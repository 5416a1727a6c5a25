"""Outputs of real kernels kept for tests: small, with versions and a hash of their inputs.

So fidelity is held where a kernel cannot be run. `python -m sweeps.peers golden FILE [NAME ...]`
makes them anew, and keeps those of kernels that cannot be run.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.peers.compare import Drawn, NotRun, draw, real
from sweeps.peers.peer import Peer, peers, versions

INPUTS = "biased_v"  # where roundings inside a kernel show most
CONTEXT = 1  # of each peer's, or its last: inputs are drawn again, so length costs nothing


def case(peer: Peer) -> Drawn:
    """The inputs of a peer's golden output."""
    drawn = draw(peer, INPUTS, peer.contexts[min(CONTEXT, len(peer.contexts) - 1)])
    assert drawn is not None
    return drawn


def digest(drawn: Drawn) -> str:
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(x).tobytes() for x in drawn[:3])
    ).hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """meta (peer -> versions, inputs, context, sha256 of the inputs) and the outputs by peer."""
    if not path.exists():
        return {}, {}
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        return meta, {name: file[name] for name in meta}


def make(path: Path, names: Sequence[str]) -> Iterator[str]:
    """Run the named peers (all, if none) and write their outputs to `path`; one line for each."""
    meta, outputs = read(path)
    known = peers()
    for name in names or known:
        peer = known[name]
        drawn = case(peer)
        try:
            (output,) = real(peer, [drawn])
        except NotRun as error:
            yield f"{name}: not run: {error}"
            continue
        kept = output.astype(np.float16) if _is_half(output) else output.astype(np.float32)
        outputs[name] = kept
        meta[name] = {
            "versions": versions(peer),
            "inputs": INPUTS,
            "context": len(drawn.key),
            "inputs_sha256": digest(drawn),
        }
        yield f"{name}: {kept.shape} {kept.dtype}"
    names = sorted(name for name in outputs if name in known)
    meta = {name: meta[name] for name in names}
    with open(path, "wb") as file:
        text = np.array(json.dumps(meta, indent=1))
        arrays: dict[str, Any] = {name: outputs[name] for name in names}
        np.savez_compressed(file, meta=text, **arrays)


def _is_half(x: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(x.astype(np.float16).astype(x.dtype), x))
