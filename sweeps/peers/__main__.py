"""`python -m sweeps.peers`: call one real kernel, compare it with its recipe, keep its output.

attend NAME FOLDER            what `sweeps run fidelity` starts: 0.npz ... there become 0.npy ...
check NAME [NAME ...]         the rows of these kernels, stored nowhere
golden FILE [NAME ...]        the outputs that tests keep
install                       the group `peers` of pyproject.toml, what can be installed of it
"""

import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.peers import compare, golden
from sweeps.peers.peer import Peer, family, peers

# Of llama.cpp only ggml's library is wanted.
GGML_ALONE = "-DLLAVA_BUILD=OFF " + " ".join(
    f"-DLLAMA_{part}=OFF"
    for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_TOOLS", "BUILD_SERVER", "CURL")
)


def attend(name: str, folder: str) -> None:
    peer = _peer(name)
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            query, key, value, scale = (arrays[x] for x in ("query", "key", "value", "scale"))
        result = family(peer.family).attend(peer, query, key, value, float(scale))
        np.save(path.with_suffix(".npy"), np.asarray(result, np.float32))


def check(first: str, *more: str) -> None:
    for name in (first, *more):
        try:
            for row in compare.compare(_peer(name)):
                cells = (f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values())
                print(name, "  ".join(cells), flush=True)
        except compare.NotRun as error:
            print(f"{name}: not run: {error}", flush=True)


def keep(path: str, *names: str) -> None:
    for name in names:
        _peer(name)
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    for line in golden.make(Path(path), names):
        print(line, flush=True)


def install() -> None:
    """One at a time: what does not install here leaves the others alone."""
    groups = tomllib.loads((compare.ROOT / "pyproject.toml").read_text())["dependency-groups"]
    os.environ.setdefault("CMAKE_ARGS", GGML_ALONE)
    failed = []
    for requirement in groups["peers"]:
        print(f"installing {requirement}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
        if subprocess.run(command).returncode:
            failed.append(requirement)
    if failed:
        print(f"not installed, so not run by the fidelity study: {', '.join(failed)}")


def _peer(name: str) -> Peer:
    from jaxattn.formats import unknown

    known = peers()
    if name not in known:
        raise unknown("real kernel", name, known)
    return known[name]


def main() -> None:
    commands: dict[str, Any] = {
        "attend": attend,
        "check": check,
        "golden": keep,
        "install": install,
    }
    command, *arguments = sys.argv[1:] or [""]
    if command not in commands:
        sys.exit(__doc__)
    try:
        inspect.signature(commands[command]).bind(*arguments)
    except TypeError as error:
        print(f"sweeps.peers {command}: {error}\n\n{__doc__}", file=sys.stderr)
        sys.exit(2)
    try:
        commands[command](*arguments)
    except (ValueError, OSError, EOFError) as error:
        print(f"sweeps.peers: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
