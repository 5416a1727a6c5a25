"""Captures: query, key, value and an observed output from .npz or .safetensors files.

Arrays are memory-mapped (compressed .npz members are read), checked, and never unpickled. They
are [head, token, dim] or [batch, token, head, dim]; a capture of batch size 1 is a Stream, and
`Capture.select` takes one such entry out of a larger batch.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.capture_files import (
    REQUIRED,
    Array,
    Arrays,
    Order,
    read_npz,
    read_safetensors,
)

LAYOUTS = {3: "head,token,dim", 4: "batch,token,head,dim"}
EXCHANGED = {3: "[token, head, dim]", 4: "[batch, head, token, dim]"}
LAYOUT_RULE = "three axes are read as [head, token, dim], four as [batch, token, head, dim]"
CHUNK = 1 << 20  # elements looked at together when NaN and Inf are sought


@dataclass(frozen=True, eq=False)
class Capture:
    """Read-only arrays of one file; a Stream if the batch size is 1.

    query is [B, T, N, H], key [B, S, K, H], value [B, S, K, D] and output, the observed one,
    [B, T, N, D] or None; views of the mapped file, whose dtypes may differ from each other.
    metadata is the file's own (.safetensors only); entry is the batch entry that was selected.
    """

    path: Path
    query: Array
    key: Array
    value: Array
    output: Array | None
    metadata: dict[str, str]
    entry: int | None = None

    @property
    def batch(self) -> int:
        return self.key.shape[0]

    @property
    def length(self) -> int:
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.key.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def label(self) -> str:
        return self.path.stem if self.entry is None else f"{self.path.stem}[{self.entry}]"

    @functools.cached_property
    def sha256(self) -> str:
        """Of the whole file; computed when first asked for."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """The file's hash and the batch entry: what decides every bit of these inputs."""
        return {"sha256": self.sha256} | ({} if self.entry is None else {"entry": self.entry})

    def select(self, entry: int) -> "Capture":
        """One batch entry, as a capture of batch size 1.

        Raises:
          ValueError: no such entry.
        """
        if not 0 <= entry < self.batch:
            raise ValueError(f"{self.path} has batch entries 0..{self.batch - 1}, got {entry}")
        one = slice(entry, entry + 1)
        return replace(
            self,
            query=self.query[one],
            key=self.key[one],
            value=self.value[one],
            output=None if self.output is None else self.output[one],
            entry=self.entry if self.batch == 1 else entry,
        )

    def blocks(self, start: int, stop: int) -> tuple[Array, Array]:
        """Key [stop - start, K, H] and value [stop - start, K, D] of that range of keys.

        Raises:
          ValueError: a range outside the capture, or a batch size other than 1.
        """
        if self.batch != 1:
            raise ValueError(
                f"{self.path} has batch size {self.batch}: take one entry with select(entry)"
            )
        if not 0 <= start <= stop <= self.length:
            raise ValueError(
                f"keys {start}:{stop} are not within {self.path} of {self.length} keys"
            )
        key, value = self.key[0, start:stop], self.value[0, start:stop]
        return np.require(key, requirements="A"), np.require(value, requirements="A")


def load(path: str | os.PathLike[str]) -> Capture:
    """The capture in a .npz or .safetensors file.

    The file holds `query`, `key`, `value` and, where there is one, the observed `output`: floats,
    all [head, token, dim] or all [batch, token, head, dim]. Other arrays are left alone. Metadata
    `layout`, if present, must name that layout. Every element is read once, to find NaN and Inf.

    Raises:
      ValueError: anything else, in one line that names the file and what is wrong with it.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], tuple[Arrays, dict[str, str]]]] = {
        ".npz": read_npz,
        ".safetensors": read_safetensors,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a capture is a .npz or .safetensors file, by its suffix")
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a directory, not a capture")
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        if not path.is_file():
            raise ValueError(f"{path}: is not a regular file")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty")
        arrays, metadata = readers[path.suffix.lower()](path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    _check_shapes(path, arrays, metadata.get("layout"))
    for name, x in arrays.items():
        _check_finite(path, name, x)
    arrays = {name: _batched(x) for name, x in arrays.items()}
    return Capture(
        path, arrays["query"], arrays["key"], arrays["value"], arrays.get("output"), metadata
    )


def _batched(x: Array) -> Array:
    """[batch, token, head, dim], in the machine's byte order."""
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    x.flags.writeable = False
    return x if x.ndim == 4 else x.transpose(1, 0, 2)[None]


def _check_shapes(path: Path, arrays: Arrays, layout: str | None) -> None:
    shapes = {name: x.shape for name, x in arrays.items()}
    got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    ranks = {len(shape) for shape in shapes.values()}
    if len(ranks) > 1 or not ranks <= LAYOUTS.keys():
        raise ValueError(
            f"{path}: arrays must all be [head, token, dim] or all [batch, token, head, dim],"
            f" got {got}"
        )
    rank = ranks.pop()
    if layout is not None and layout.replace(" ", "").strip("[]") != LAYOUTS[rank]:
        raise ValueError(
            f"{path}: metadata gives the layout {layout!r}, but arrays of {rank} axes are read as"
            f" {LAYOUTS[rank]!r}"
        )
    if any(0 in shape for shape in shapes.values()):
        raise ValueError(f"{path}: an array is empty: {got}")
    read = {name: _bthd(shape) for name, shape in shapes.items()}
    if (broken := _broken_rule(read)) is None:
        return
    hint = ""
    if _broken_rule({name: (B, N, T, D) for name, (B, T, N, D) in read.items()}) is None:
        axes = "(1, 0, 2)" if rank == 3 else "(0, 2, 1, 3)"
        hint = f"; they look like {EXCHANGED[rank]}: save each as x.transpose{axes}"
    raise ValueError(f"{path}: {broken}, got {got} ({LAYOUT_RULE}{hint})")


def _broken_rule(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The first rule that shapes [batch, token, head, dim] break."""
    (B, T, N, H), (Bk, S, K, Hk), (Bv, Sv, Kv, D) = (shapes[name] for name in REQUIRED)
    if (Bk, Sv, Kv, Bv) != (B, S, K, B):
        return "batch, tokens and heads of key and value must agree"
    if Hk != H:
        return "query and key must have the same last axis"
    if N % K:
        return "query heads must be a multiple of key/value heads"
    if "output" in shapes and shapes["output"] != (B, T, N, D):
        return "output must have the tokens and heads of query and the last axis of value"
    return None


def _bthd(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (1, shape[1], shape[0], shape[2])


def _check_finite(path: Path, name: str, x: Array) -> None:
    order: Order = "C" if x.flags.c_contiguous else "F"
    flat = x.reshape(-1, order=order)  # a view of the file, not a copy
    for start in range(0, flat.size, CHUNK):
        finite = np.isfinite(flat[start : start + CHUNK])
        if not finite.all():
            first = start + int(finite.argmin())
            index = [int(i) for i in np.unravel_index(first, x.shape, order)]
            raise ValueError(f"{path}: {name}{index} is {flat[first]}; a capture must be finite")
