"""Captures: query, key, value and an observed output from .npz or .safetensors files.

Arrays are memory-mapped (compressed .npz members are read), checked, and never unpickled. They
are [head, token, dim] or [batch, token, head, dim]; a capture of batch size 1 is a Stream, and
`Capture.select` takes one such entry out of a larger batch.
"""

import difflib
import functools
import hashlib
import json
import math
import os
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import ml_dtypes
import numpy as np
import safetensors

Array = np.ndarray
Arrays = dict[str, Array]
Order = Literal["C", "F"]

REQUIRED = ("query", "key", "value")
NAMES = (*REQUIRED, "output")
LAYOUTS = {3: "head,token,dim", 4: "batch,token,head,dim"}
EXCHANGED = {3: "[token, head, dim]", 4: "[batch, head, token, dim]"}
LAYOUT_RULE = "three axes are read as [head, token, dim], four as [batch, token, head, dim]"
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
CHUNK = 1 << 20  # elements looked at together when NaN and Inf are sought
MAX_DEFLATE_RATIO = 1100  # deflate cannot do better than 1032


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
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
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


def _check_names(path: Path, names: Iterable[str]) -> list[str]:
    """The capture's arrays among the file's."""
    counts = Counter(names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{path}: holds {twice[0]!r} more than once")
    found = ", ".join(repr(name) for name in sorted(counts)[:20]) or "nothing"
    for name in REQUIRED:
        if name not in counts:
            raise ValueError(f"{path}: lacks the array {name!r} (found: {found})")
    for name in counts:
        if name not in NAMES and "output" not in counts:
            if difflib.get_close_matches(name, ["output"], cutoff=0.8):
                raise ValueError(f"{path}: holds {name!r}; did you mean 'output'?")
    return [name for name in NAMES if name in counts]


def _check_dtype(path: Path, name: str, dtype: np.dtype) -> None:
    if dtype == np.dtype("V2"):
        raise ValueError(
            f"{path}: {name} has lost its dtype, as bfloat16 does in .npz: use .safetensors"
        )
    is_float = dtype.kind == "f" or dtype in map(np.dtype, SAFETENSORS_DTYPES.values())
    if not is_float or dtype.itemsize > 8:
        raise ValueError(f"{path}: {name} must hold floats of at most 64 bits, got {dtype}")


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


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Order) -> Array:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, shape, order))


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata; the library judges the header, which is then read for its offsets."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a sound .safetensors file: {_line(error)}") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        pairs = json.loads(file.read(length), object_pairs_hook=list)
    tensors = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    metadata = {k: v for name, entry in pairs if name == "__metadata__" for k, v in entry}
    named = _check_names(path, (name for name, _ in tensors))
    arrays = {}
    for name, entry in tensors:
        if name not in named:
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} must hold floats, got {entry['dtype']}")
        dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"{path}: {name} of shape {list(shape)} cannot fill {stop - start} B")
        arrays[name] = _map(path, dtype, shape, 8 + length + start, "C")
    return {name: arrays[name] for name in named}, metadata


def _read_npz(path: Path) -> tuple[Arrays, dict[str, str]]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path}: is a single .npy array: save query, key, value with np.savez")
    if magic.startswith(b"\x80"):
        raise ValueError(f"{path}: is a pickle, which is never loaded: save with np.savez")
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # zipfile fails in many ways on what is no archive
        raise ValueError(f"{path}: is not a sound .npz archive: {_line(error)}") from None
    with archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        members = dict(zip(names, archive.infolist(), strict=True))
        named = _check_names(path, names)
        return {name: _member(path, archive, name, members[name]) for name in named}, {}


def _member(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> Array:
    """One array of an archive: mapped where it is stored, read where it is compressed."""
    stored = info.compress_type == zipfile.ZIP_STORED
    if info.flag_bits & 1:
        raise ValueError(f"{path}: {name} is encrypted")
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{path}: {name} is neither stored nor deflated")
    if not stored and info.file_size > MAX_DEFLATE_RATIO * max(info.compress_size, 1):
        raise ValueError(f"{path}: {name} gives a size that deflate cannot reach")
    try:
        with archive.open(info) as stream:  # checks the member's own header
            shape, fortran, dtype = _npy_header(stream)
            header = stream.tell()  # bytes before the data
            data = b"" if stored else stream.read()
    except Exception as error:  # zipfile and numpy's literals fail in many ways
        raise ValueError(f"{path}: {name} is not a sound .npy array: {_line(error)}") from None
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} holds pickled objects, which are never loaded")
    _check_dtype(path, name, dtype)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != (info.file_size - header if stored else len(data)):
        raise ValueError(f"{path}: {name} of shape {list(shape)} does not fill its bytes")
    order: Order = "F" if fortran else "C"
    if not stored:
        return np.frombuffer(data, dtype).reshape(shape, order=order)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length + header
    if offset + size > path.stat().st_size:
        raise ValueError(f"{path}: is truncated: {name} ends behind the end of the file")
    return _map(path, dtype, shape, offset, order)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype; the stream is left at the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match np.lib.format.read_magic(stream):
            case (1, 0):
                return np.lib.format.read_array_header_1_0(stream)
            case (2, 0):
                return np.lib.format.read_array_header_2_0(stream)
            case version:
                raise ValueError(f"unknown format version {version}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
