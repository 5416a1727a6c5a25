import hashlib
import io
import json
import mmap
import pickle
import re
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxattn.captures import CHUNK, LAYOUT_RULE, load
from jaxattn.inputs import Stream

MINILM = Path(__file__).parent.parent / "sweeps" / "data" / "minilm_layer4_8k.safetensors"


def draw(rank=3, B=1, T=3, S=10, N=4, K=2, H=8, D=6, dtype=np.float16, seed=0):
    """Arrays in a file's layout, [head, token, dim] or [batch, token, head, dim]."""
    rng = np.random.default_rng(seed)
    shapes = {"query": (N, T, H), "key": (K, S, H), "value": (K, S, D), "output": (N, T, D)}
    if rank == 4:
        shapes = {name: (B, t, n, d) for name, (n, t, d) in shapes.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(path, arrays, **metadata):
    if path.suffix == ".safetensors":
        save_file(arrays, path, metadata=metadata or None)
    else:
        np.savez(path, **arrays)
    return path


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    return tmp_path / f"some kernel{request.param}"


def mapped(x):
    while x is not None and not isinstance(x, mmap.mmap):
        x = getattr(x, "base", None)
    return x is not None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_heads_first(path, dtype):
    arrays = draw(dtype=dtype)
    capture = load(save(path, arrays))
    assert isinstance(capture, Stream) and capture.label == "some kernel"
    assert (capture.length, capture.heads, capture.head_dim, capture.value_dim) == (10, 2, 8, 6)
    np.testing.assert_array_equal(capture.query[0].transpose(1, 0, 2), arrays["query"])
    np.testing.assert_array_equal(capture.output[0].transpose(1, 0, 2), arrays["output"])
    key, value = capture.blocks(2, 7)
    np.testing.assert_array_equal(key.transpose(1, 0, 2), arrays["key"][:, 2:7])
    np.testing.assert_array_equal(value.transpose(1, 0, 2), arrays["value"][:, 2:7])
    assert key.dtype == dtype and key.flags.aligned


def test_arrays_are_mapped_and_read_only(path):
    capture = load(save(path, draw()))
    for x in (capture.query, capture.key, capture.value, capture.output):
        assert mapped(x) and not x.flags.writeable


def test_batches(path):
    arrays = draw(rank=4, B=3)
    capture = load(save(path, arrays))
    assert capture.batch == 3
    np.testing.assert_array_equal(capture.key, arrays["key"])
    with pytest.raises(ValueError, match=r"batch size 3: take one entry with select"):
        capture.blocks(0, 1)
    one = capture.select(1)
    assert one.batch == 1 and one.label == "some kernel[1]" and one.output.shape[0] == 1
    np.testing.assert_array_equal(one.query[0], arrays["query"][1])
    np.testing.assert_array_equal(one.blocks(0, 10)[1], arrays["value"][1])
    assert one.select(0).identity == one.identity != capture.select(2).identity
    with pytest.raises(ValueError, match="batch entries 0..2, got 3"):
        capture.select(3)


def test_batch_of_one_and_no_output(path):
    arrays = draw(rank=4)
    del arrays["output"]
    capture = load(save(path, arrays))
    assert capture.output is None and capture.select(0).entry is None
    np.testing.assert_array_equal(capture.blocks(0, 10)[0], arrays["key"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_extension_floats(tmp_path, dtype):
    arrays = draw(dtype=getattr(ml_dtypes, dtype))
    capture = load(save(tmp_path / "x.safetensors", arrays))
    assert capture.key.dtype.name == dtype
    np.testing.assert_array_equal(capture.blocks(0, 10)[0].transpose(1, 0, 2), arrays["key"])
    with pytest.raises(ValueError, match="float"):
        load(save(tmp_path / "x.npz", arrays))


def test_dtypes_may_differ(path):
    arrays = draw() | {"query": draw(dtype=np.float32)["query"]}
    capture = load(save(path, arrays))
    assert (capture.query.dtype, capture.key.dtype) == (np.float32, np.float16)


def test_npz_in_other_clothes(tmp_path):
    """Compressed members, Fortran order, the other byte order, and arrays nobody asked for."""
    arrays = draw(dtype=np.float32)
    clothed = {
        "query": arrays["query"].astype(">f4"),
        "key": np.asfortranarray(arrays["key"]),
        "value": arrays["value"],
        "lse": np.arange(3),
    }
    np.savez(tmp_path / "a.npz", **clothed)
    np.savez_compressed(tmp_path / "b.npz", **clothed)
    for name, is_mapped in (("a.npz", True), ("b.npz", False)):
        capture = load(tmp_path / name)
        for x in ("query", "key", "value"):
            got = getattr(capture, x)
            np.testing.assert_array_equal(got[0].transpose(1, 0, 2), arrays[x])
            assert got.dtype.isnative and not got.flags.writeable
        assert mapped(capture.key) == mapped(capture.value) == is_mapped


def test_metadata_and_hash(tmp_path):
    path = save(tmp_path / "x.safetensors", draw(), layout="head, token, dim", source="here")
    capture = load(path)
    assert capture.metadata == {"layout": "head, token, dim", "source": "here"}
    assert capture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert capture.identity == {"sha256": capture.sha256}


def refused(path, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


CHANGED = {
    "no key": ({"key": None}, r"lacks the array 'key' \(found: 'output', 'query', 'value'\)"),
    "near miss": ({"output": None, "outputs": (4, 3, 6)}, "holds 'outputs'; did you mean 'output'"),
    "ranks differ": ({"query": (1, 3, 4, 8)}, "must all be"),
    "two axes": (dict.fromkeys(("query", "key", "value", "output"), (3, 8)), "must all be"),
    "heads": ({"query": (3, 3, 8), "output": (3, 3, 6)}, "multiple of key/value heads"),
    "head_dim": ({"query": (4, 3, 7)}, "same last axis"),
    "tokens": ({"value": (2, 9, 6)}, "key and value must agree"),
    "kv heads": ({"value": (1, 10, 6)}, "key and value must agree"),
    "output": ({"output": (4, 3, 8)}, "output must have"),
    "no tokens": ({"key": (2, 0, 8), "value": (2, 0, 6)}, "is empty"),
    "no queries": ({"query": (4, 0, 8), "output": (4, 0, 6)}, "is empty"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_refuses_shapes_and_names(path, case):
    changes, words = CHANGED[case]
    arrays = draw() | {k: None if v is None else np.zeros(v, "f2") for k, v in changes.items()}
    refused(save(path, {k: v for k, v in arrays.items() if v is not None}), words)


@pytest.mark.parametrize("rank", [3, 4])
def test_says_how_axes_are_read_and_what_they_look_like(path, rank):
    """As PyTorch and as most other layouts have them: one query, then as many as keys."""
    looks = {3: "[token, head, dim]: save each as x.transpose(1, 0, 2)"}
    looks[4] = "[batch, head, token, dim]: save each as x.transpose(0, 2, 1, 3)"
    words = re.escape(f"({LAYOUT_RULE}; they look like {looks[rank]})")
    for T in (1, 3):
        arrays = {n: np.swapaxes(x, rank - 3, rank - 2) for n, x in draw(rank, T=T).items()}
        refused(save(path, arrays), f"multiple of key/value heads, got .* {words}$")
    arrays = draw(rank) | {"query": draw(rank, H=7)["query"]}
    refused(save(path, arrays), rf"same last axis, got .* \({re.escape(LAYOUT_RULE)}\)$")


def test_refuses_batches_that_differ(path):
    arrays = draw(rank=4, B=2) | {"query": draw(rank=4, B=1)["query"]}
    refused(save(path, arrays), "batch, tokens and heads")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.complex64])
def test_refuses_other_dtypes(path, dtype):
    arrays = draw() | {"value": draw()["value"].astype(np.float32).astype(dtype, casting="unsafe")}
    refused(save(path, arrays), "value must hold floats")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_finds_the_first_element_that_is_not_finite(path, name, bad):
    arrays = draw()
    arrays[name][1, 2, 3] = arrays[name][1, 2, 5] = bad
    refused(save(path, arrays), rf"{name}\[1, 2, 3\] is {bad}; a capture must be finite")


def test_finds_nan_behind_the_first_chunk_and_in_fortran_order(tmp_path):
    S = CHUNK // 8
    arrays = draw(S=S)
    arrays["key"][1, S - 1, 7] = np.nan
    refused(save(tmp_path / "x.npz", arrays), rf"key\[1, {S - 1}, 7\] is nan")
    arrays = draw() | {"key": np.asfortranarray(draw()["key"])}
    arrays["key"][1, 2, 3] = np.nan
    refused(save(tmp_path / "x.npz", arrays), r"key\[1, 2, 3\] is nan")


def test_refuses_bfloat16_nan(tmp_path):
    arrays = draw(dtype=ml_dtypes.bfloat16)
    arrays["value"][0, 1, 2] = np.nan
    refused(save(tmp_path / "x.safetensors", arrays), r"value\[0, 1, 2\] is nan")


def test_refuses_another_layout(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(save(path, draw(), layout="token,head,dim"), "metadata gives the layout")
    refused(save(path, draw(rank=4), layout="head,token,dim"), "metadata gives the layout")


def test_refuses_what_is_no_capture(path, tmp_path):
    refused(path, "no such file")
    path.mkdir()
    refused(path, "is a directory")
    path.rmdir()
    path.write_bytes(b"")
    refused(path, "is empty")
    for content in (b"x", b"hello world, this is no capture at all", b"\0" * 100, b"PK\x03\x04"):
        path.write_bytes(content)
        refused(path, "is not a sound")
    other = tmp_path / "capture.pt"
    other.write_bytes(b"PK")
    refused(other, r"\.npz or \.safetensors file, by its suffix")


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_refuses_truncated_files(path, keep):
    save(path, draw(S=1000))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path, "is not a sound")


def test_never_unpickles(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **draw() | {"key": np.array([Exploding()], dtype=object)})
    refused(path, "key holds pickled objects")
    path.write_bytes(pickle.dumps(draw()))
    refused(path, "is a pickle, which is never loaded")
    np.save(tmp_path / "y.npy", draw()["key"])
    path.write_bytes((tmp_path / "y.npy").read_bytes())
    refused(path, "single .npy array")


class Exploding:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def npy(x):
    file = io.BytesIO()
    np.lib.format.write_array(file, x)
    return file.getvalue()


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_hostile_archives(tmp_path):
    path = tmp_path / "x.npz"
    good = [(name, npy(x)) for name, x in draw().items()]
    load(zipped(path, good))
    refused(zipped(path, [*good, good[1]]), "holds 'key' more than once")
    refused(zipped(path, [(name, b"no array") for name, _ in good]), "is not a sound .npy array")
    refused(zipped(path, [(n, x[:-2]) for n, x in good]), "does not fill")
    refused(zipped(path, [(n, x + b"??") for n, x in good]), "does not fill")
    refused(zipped(path, good, zipfile.ZIP_LZMA), "neither stored nor deflated")
    huge = npy(np.zeros((2, 10, 8), "f2")).replace(b"(2, 10, 8), }", b"(2, 10, 8000000), }")
    refused(zipped(path, [*good[:1], ("key", huge), *good[2:]]), "sound .npy array|does not fill")
    negative = npy(np.zeros((2, 10, 8), "f2")).replace(b"(2, 10, 8), }", b"(-2, 10,-8),}")
    refused(zipped(path, [*good[:1], ("key", negative), *good[2:]]), "does not fill|sound")
    refused(zipped(path, []), "lacks the array 'query' (.found: nothing.)")
    encrypted = bytearray(zipped(path, good).read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    refused(path, "query is encrypted")


def lie(path, change, data=None):
    """A .safetensors file of `draw` whose header went through change, a function of text."""
    save(path, draw())
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + length].decode())
    body = content[8 + length :] if data is None else data
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + body)
    return path


def edit(**fields):
    """A change of the key's fields."""

    def change(text):
        header = json.loads(text)
        header["key"] |= fields
        return json.dumps(header)

    return change


def test_refuses_safetensors_headers_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    load(lie(path, str))
    save(path, draw())
    start, stop = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["key"]["data_offsets"]
    for fields in (
        {"data_offsets": [start + 10**9, stop + 10**9]},
        {"data_offsets": [start + 16, stop + 16]},
        {"data_offsets": [stop, start]},
        {"data_offsets": [start, stop - 2]},
        {"shape": [2, 10, 9]},
        {"shape": [2**62, 2**62, 2**62]},
        {"shape": [-2, 10, -8]},
        {"dtype": "F32"},
        {"dtype": "F17"},
    ):
        refused(lie(path, edit(**fields)), "is not a sound .safetensors file")
    refused(lie(path, str, data=b""), "is not a sound")
    refused(lie(path, lambda text: text.rstrip()[:-1]), "is not a sound")
    refused(lie(path, lambda text: "[]"), "is not a sound")
    refused(lie(path, edit(dtype="I16")), "key must hold floats, got I16")
    whole = path.read_bytes()
    for length in (2**63, 2**40, len(whole)):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        refused(path, "is not a sound")


def test_refuses_duplicate_names_in_a_safetensors_header(tmp_path):
    def twice(text):
        entry = json.dumps(json.loads(text)["key"])
        return text.rstrip()[:-1] + f', "key": {entry}}}'

    refused(lie(tmp_path / "x.safetensors", twice), "holds 'key' more than once")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_refused_in_one_line(path, data):
    save(path, draw(S=3))
    content = bytearray(path.read_bytes())
    spots = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    for at, byte in data.draw(spots):
        content[at] = byte
    content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    try:
        load(path).blocks(0, 1)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spots=st.lists(
        st.tuples(st.integers(6, 90), st.sampled_from(b"()[]{}',:#\\\"0123456789LOVfc<>| \n\xff")),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_npy_headers_load_or_are_refused_in_one_line(tmp_path, spots):
    members = {name: bytearray(npy(x)) for name, x in draw(S=3).items()}
    for at, byte in spots:
        members["key"][at] = byte
    path = zipped(tmp_path / "x.npz", ((name, bytes(x)) for name, x in members.items()))
    try:
        load(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("span", [(-1, 5), (5, 4), (0, 11)])
def test_blocks_refuse_a_range_outside_the_capture(path, span):
    with pytest.raises(ValueError, match="not within"):
        load(save(path, draw())).blocks(*span)


def test_the_minilm_cut():
    capture = load(MINILM)
    assert capture.query.shape == (1, 8, 4, 32) and capture.query.dtype == np.float16
    assert (capture.length, capture.heads, capture.head_dim) == (8192, 4, 32)
    assert capture.metadata["licence"] == "Apache-2.0"
    assert "Python language reference" in capture.metadata["provenance"]


def test_the_minilm_cut_is_the_head_of_its_source():
    whole = Path(__file__).parents[2] / "shared" / "captures" / "minilm_layer4.safetensors"
    if not whole.exists():
        pytest.skip("the uncut capture is not part of the repository")
    capture, source = load(MINILM), load(whole)
    np.testing.assert_array_equal(capture.query, source.query[:, :8])
    np.testing.assert_array_equal(capture.key, source.key[:, :8192])
    np.testing.assert_array_equal(capture.value, source.value[:, :8192])
