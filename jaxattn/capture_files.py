"""Arrays of .npz and .safetensors files: memory-mapped, or read where compressed; never unpickled.

Whatever is wrong with a file is a ValueError of one line that names it.
"""

import difflib
import json
import math
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal

import ml_dtypes
import numpy as np
import safetensors

Array = np.ndarray
Arrays = dict[str, Array]
Order = Literal["C", "F"]

REQUIRED = ("query", "key", "value")
NAMES = (*REQUIRED, "output")
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
MAX_DEFLATE_RATIO = 1100  # deflate cannot do better than 1032


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
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


def read_npz(path: Path) -> tuple[Arrays, dict[str, str]]:
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


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Order) -> Array:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, shape, order))


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
