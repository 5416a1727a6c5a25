"""Tokamax: its XLA implementations, and its Pallas kernels in interpret mode."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import Peer

if TYPE_CHECKING:
    import numpy as np

_XLA, _CHUNKED, _TRITON, _SPLASH = "xla", "xla_chunked", "triton", "mosaic_tpu"


def _peer(name: str, implementation: str, recipe: str, **more: Any) -> Peer:
    fields = {
        "function": f"tokamax.dot_product_attention(implementation='{implementation}')",
        "packages": ("tokamax", "jax", "jaxlib"),
        "dtype": "bfloat16",
        **more,
    }
    return Peer(name=name, family="tokamax_cpu", recipe=recipe, **fields)


def _kernel(name: str, implementation: str, recipe: str, **more: Any) -> Peer:
    function = f"tokamax's kernel '{implementation}' (interpret mode)"
    return _peer(name, implementation, recipe, function=function, queries=128, **more)


# On a CPU a product of float32 p stays one, whatever its algorithm says.
_P = {"probs": "float32"}
# Float32 queries, whose values are bfloat16, give a float32 result: p's roundings alone are left.
_WIDE = {"result": "float32"}

PEERS = (
    _peer("tokamax-xla-bf16", _XLA, "tokamax-xla-bf16", changes=_P),
    _peer("tokamax-xla-chunked-bf16", _CHUNKED, "tokamax-xla-chunked-bf16", changes=_P),
    _kernel("tokamax-triton-bf16", _TRITON, "tokamax-triton-bf16", head_dim=128),
    _kernel(
        "tokamax-triton-bf16-wide",
        _TRITON,
        "tokamax-triton-bf16",
        head_dim=128,
        changes={**_WIDE, "scale": "float32"},
    ),
    _kernel("tokamax-splash-bf16", _SPLASH, "tokamax-splash-bf16"),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import jax.numpy as jnp
    import numpy as np
    import tokamax

    dtype = jnp.dtype("float32" if peer.name.endswith("-wide") else peer.dtype)
    rows = query.shape[0]  # the kernels want whole blocks of queries
    query = np.pad(query, ((0, -rows % 128), (0, 0), (0, 0)))
    q = jnp.asarray(query[None], dtype)
    k, v = (jnp.asarray(x[None], peer.dtype) for x in (key, value))
    implementation = peer.function.split("'")[-2]
    if implementation in (_XLA, _CHUNKED):
        out = tokamax.dot_product_attention(
            q, k, v, scale=scale, is_causal=peer.causal, implementation=implementation
        )
    else:
        out = {_TRITON: _triton, _SPLASH: _splash}[implementation](q, k, v, scale)
    assert out.dtype == dtype
    return np.asarray(out[0].astype(jnp.float32))[:rows]


def _triton(q: Any, k: Any, v: Any, scale: float) -> Any:
    import functools

    from jax.experimental import pallas
    from tokamax._src.ops.attention.pallas_triton import PallasTritonFlashAttention

    class Interpreted(PallasTritonFlashAttention):
        def supported_on(self, device: Any) -> bool:
            return True

    pallas.pallas_call = functools.partial(pallas.pallas_call, interpret=True)
    return Interpreted()(q, k, v, logits_scale=scale)


def _splash(q: Any, k: Any, v: Any, scale: float) -> Any:
    from jax.experimental.pallas import tpu
    from tokamax._src.ops.attention.pallas_mosaic_tpu import PallasMosaicTpuFlashAttention

    class Interpreted(PallasMosaicTpuFlashAttention):
        def supported_on(self, device: Any) -> bool:
            return True

    with tpu.force_tpu_interpret_mode():
        return Interpreted()(q, k, v, logits_scale=scale)
