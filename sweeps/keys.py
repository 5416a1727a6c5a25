"""The keys by which parts are found again: hashes of what their numbers depend on."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT = "jaxattn sweep 1"  # of the rows and the manifest: change it when either changes

# What of jaxattn changes no number of a stored row; recipes are in the key themselves.
WITHOUT_NUMBERS = frozenset(
    {
        *("__init__", "__main__", "atlas", "attribution", "fields", "kernels", "theory", "advise"),
        *("agreement", "command", "compare", "compare_text", "outputs", "practice", "remarks"),
        *("thresholds", "trials", "verdicts"),
        *("cost", "lattice", "candidates", "advice_text"),
    }
)


def plain(value: Any) -> Any:
    """The same value in strict JSON types: infinities and NaN as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return plain(value.item())  # a NumPy scalar


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def part_key(identity: Mapping[str, Any], sources: str) -> str:
    """SHA-256 (hex) over what a part's numbers depend on, and over the sources that make them."""
    text = canonical({"format": FORMAT, "identity": identity, "sources": sources})
    return hashlib.sha256(text.encode()).hexdigest()


def sources_hash(package: Path) -> str:
    """SHA-256 (hex) over names and contents of the modules of `package` that touch numbers.

    All Python files count except those of `WITHOUT_NUMBERS`, so a new module counts by itself.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0].removesuffix(".py") not in WITHOUT_NUMBERS:
            digest.update(f"{name.as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
