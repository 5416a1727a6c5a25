"""ggml's CPU flash attention, live: the library that llama-cpp-python builds, by its C API."""

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import NOISE, Peer

if TYPE_CHECKING:
    import numpy as np

F32, F16 = 0, 1  # GGML_TYPE_*


def _peer(name: str, recipe: str, kv: str = "float16", threads: int = 1, **more: Any) -> Peer:
    call = f"ggml_flash_attn_ext ({kv} K and V, {threads} thread{'s' * (threads > 1)})"
    return Peer(
        name=name,
        family="ggml_cpu",
        function=call,
        packages=("llama-cpp-python",),
        recipe=recipe,
        dtype="float16",
        **more,
    )


PEERS = (
    _peer("ggml-cpu-decode", "ggml-cpu-decode"),
    _peer("ggml-cpu-decode-gqa", "ggml-cpu-decode", group=4),
    _peer("ggml-cpu-decode-softcap", "ggml-cpu-decode", softcap=2.0),
    _peer("ggml-cpu-decode-causal", "ggml-cpu-decode", causal=True, contexts=(32, 60)),
    _peer("ggml-cpu-decode-f32", "ggml-cpu-decode-f32", "float32", expect=NOISE),
    _peer("ggml-cpu-prefill", "ggml-cpu-prefill", queries=64, expect=NOISE),
    _peer(
        "ggml-cpu-prefill-causal",
        "ggml-cpu-prefill",
        causal=True,
        contexts=(256, 1024),
        expect=NOISE,
    ),
    _peer("ggml-cpu-splitkv", "ggml-cpu-splitkv", threads=8, queries=1, heads=4),
)


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def _load() -> tuple[Any, Any]:
    """(libggml-base, libggml-cpu) with the signatures of the functions used here."""
    # Not imported: that would load all of llama.cpp.
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    libraries = []
    for name in ("ggml-base", "ggml-cpu"):
        found = [path for path in folder.glob(f"*{name}*") if path.suffix in (".so", ".dylib")]
        if not found:
            raise RuntimeError(f"llama-cpp-python has no library {name}")
        libraries.append(ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL))
    base, cpu = libraries
    pointer, number = ctypes.c_void_p, ctypes.c_float
    signatures: list[tuple[Any, Any, list[Any]]] = [
        (base.ggml_init, pointer, [_Parameters]),
        (base.ggml_free, None, [pointer]),
        (base.ggml_new_tensor_4d, pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 4]),
        (base.ggml_get_data, pointer, [pointer]),
        (base.ggml_nbytes, ctypes.c_size_t, [pointer]),
        (base.ggml_flash_attn_ext, pointer, [*[pointer] * 5, *[number] * 3]),
        (base.ggml_new_graph, pointer, [pointer]),
        (base.ggml_build_forward_expand, None, [pointer, pointer]),
        (cpu.ggml_graph_compute_with_ctx, ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ]
    for function, result, arguments in signatures:
        function.restype, function.argtypes = result, arguments
    return base, cpu


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import numpy as np

    base, cpu = _load()
    threads = peer.changes.get("split_kv", 8 if "8 threads" in peer.function else 1)
    kv = np.float32 if "(float32" in peer.function else np.float16
    q = np.moveaxis(query, 0, 1).astype(np.float32)  # [N, T, H]; ggml counts axes from the last
    k, v = (np.moveaxis(x, 0, 1).astype(kv) for x in (key, value))
    T, S = query.shape[0], key.shape[0]
    size = sum(x.nbytes for x in (q, k, v)) + q.nbytes + 2 * T * S
    context = base.ggml_init(_Parameters(2 * size + 2**26, None, False))
    if not context:
        raise RuntimeError("ggml_init gave no context")

    def tensor(x: Any) -> Any:
        x = np.ascontiguousarray(x)
        shape = (1,) * (4 - x.ndim) + x.shape
        kind = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}[x.dtype]
        made = base.ggml_new_tensor_4d(context, kind, *reversed(shape))
        assert base.ggml_nbytes(made) == x.nbytes
        ctypes.memmove(base.ggml_get_data(made), x.ctypes.data, x.nbytes)
        return made

    mask = None
    if peer.causal:
        ahead = np.arange(S)[None] > np.arange(T)[:, None]
        mask = tensor(np.where(ahead, np.float16(-np.inf), np.float16(0)))
    out = base.ggml_flash_attn_ext(
        context, tensor(q), tensor(k), tensor(v), mask, scale, 0.0, peer.softcap or 0.0
    )
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, out)
    status = cpu.ggml_graph_compute_with_ctx(context, graph, threads)
    if status:
        raise RuntimeError(f"ggml_graph_compute_with_ctx failed with status {status}")
    shape = (T, query.shape[1], value.shape[-1])
    assert base.ggml_nbytes(out) == 4 * int(np.prod(shape))
    result = np.empty(shape, np.float32)
    ctypes.memmove(result.ctypes.data, base.ggml_get_data(out), result.nbytes)
    base.ggml_free(context)
    return result
