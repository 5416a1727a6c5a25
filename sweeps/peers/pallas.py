"""Pallas kernels of jax itself, in interpret mode: their steps on XLA's CPU operations."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import NOISE, Peer

if TYPE_CHECKING:
    import numpy as np

_OPS = "jax.experimental.pallas.ops"
_TPU, _SPLASH = f"{_OPS}.tpu.flash_attention.flash_attention", f"{_OPS}.tpu.splash_attention"
_GPU = f"{_OPS}.gpu.attention.mha"


def _peer(name: str, function: str, recipe: str, dtype: str, **more: Any) -> Peer:
    fields = {"packages": ("jax", "jaxlib"), "family": "pallas", **more}
    return Peer(
        name=name,
        function=f"{function} (interpret mode)",
        recipe=recipe,
        dtype=dtype,
        head_dim=128,
        **fields,
    )


# Float32 queries and keys, whose values are 16 bits wide, beside values of 16 bits give a float32
# result: the roundings of p alone are left.
_WIDE = {"result": "float32"}

PEERS = (
    _peer("pallas-tpu-flash-f32", _TPU, "pallas-tpu-flash-f32", "float32", expect=NOISE),
    _peer("pallas-tpu-flash-bf16", _TPU, "pallas-tpu-flash-bf16", "bfloat16"),
    _peer("pallas-tpu-flash-bf16-wide", _TPU, "pallas-tpu-flash-bf16", "bfloat16", changes=_WIDE),
    _peer("splash-f32", _SPLASH, "splash-f32", "float32", expect=NOISE),
    _peer("splash-bf16", _SPLASH, "splash-bf16", "bfloat16"),
    _peer("pallas-gpu-mha-fp16", _GPU, "pallas-gpu-mha-fp16", "float16"),
    _peer("pallas-gpu-mha-fp16-wide", _GPU, "pallas-gpu-mha-fp16", "float16", changes=_WIDE),
    _peer("pallas-gpu-mha-bf16", _GPU, "pallas-gpu-mha-bf16", "bfloat16"),
    _peer("pallas-gpu-mha-bf16-wide", _GPU, "pallas-gpu-mha-bf16", "bfloat16", changes=_WIDE),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import jax.numpy as jnp
    import numpy as np

    call = {_TPU: _flash, _SPLASH: _splash, _GPU: _mha}[peer.function.split(" ")[0]]
    rows = query.shape[0]  # the kernels want whole blocks of queries
    query = np.pad(query, ((0, -rows % 128), (0, 0), (0, 0)))
    dtype = jnp.dtype("float32" if peer.name.endswith("-wide") else peer.dtype)
    q, k, v = jnp.asarray(query, dtype), jnp.asarray(key, dtype), jnp.asarray(value, peer.dtype)
    out = call(q, k, v, scale)
    assert out.dtype == dtype
    return np.asarray(out.astype(jnp.float32))[:rows]


def _flash(q: Any, k: Any, v: Any, scale: float) -> Any:
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    q, k, v = (jnp.moveaxis(x, 0, 1)[None] for x in (q, k, v))
    with pltpu.force_tpu_interpret_mode():
        return jnp.moveaxis(flash_attention(q, k, v, sm_scale=scale)[0], 0, 1)


def _splash(q: Any, k: Any, v: Any, scale: float) -> Any:
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # The kernel takes no scale: its callers multiply the query, in the query's dtype.
    q, k, v = (jnp.moveaxis(x, 0, 1) for x in (q * scale, k, v))
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * q.shape[0])
    attention = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=True)
    return jnp.moveaxis(attention(q, k, v), 0, 1)


def _mha(q: Any, k: Any, v: Any, scale: float) -> Any:
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu.attention import mha

    q, k, v = (x[None] for x in (q, k, v))
    padded = jnp.zeros((1, k.shape[1], *q.shape[2:]), q.dtype).at[:, : q.shape[1]].set(q)
    out = mha(padded, k, v, None, sm_scale=scale, interpret=True)
    return out[0, : q.shape[1]]
