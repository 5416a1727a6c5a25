"""Attention of PyTorch and of JAX on an Nvidia GPU: not run on a machine without one."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import Peer

if TYPE_CHECKING:
    import numpy as np

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
_CUDNN = "jax.nn.dot_product_attention(implementation='cudnn')"
_SECRET = "cuDNN's steps are not published: the recipe is FlashAttention-2's"


def _peer(name: str, short: str, function: str, packages: tuple[str, ...], **more: Any) -> Peer:
    return Peer(
        name=f"{name}-{short}",
        family="gpu",
        function=function,
        packages=packages,
        recipe=f"flash-attention-2-{short}",
        dtype=_DTYPES[short],
        head_dim=128,
        queries=128,
        **more,
    )


def _torch(backend: str, short: str, **more: Any) -> Peer:
    function = f"torch scaled_dot_product_attention on CUDA, SDPBackend.{backend}"
    name = f"torch-cuda-{backend.partition('_')[0].lower()}"
    return _peer(name, short, function, ("torch",), **more)


PEERS = tuple(
    peer
    for short in _DTYPES
    for peer in (
        _torch("FLASH_ATTENTION", short),
        _torch("EFFICIENT_ATTENTION", short, changes={"kv_order": "forward"}),
        _torch("CUDNN_ATTENTION", short, cause=_SECRET),
        _peer("jax-cudnn", short, _CUDNN, ("jax", "jaxlib"), cause=_SECRET),
    )
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    call = _jax if peer.function == _CUDNN else _sdpa
    return call(peer, query, key, value, scale)


def _sdpa(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    dtype = getattr(torch, peer.dtype)
    q, k, v = (
        torch.from_numpy(x).to("cuda", dtype).transpose(0, 1)[None].contiguous()
        for x in (query, key, value)
    )
    # One backend alone is allowed: torch raises where it cannot take it.
    backend = getattr(SDPBackend, peer.function.rpartition(".")[2])
    with sdpa_kernel(backend), torch.no_grad():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    assert out.dtype == dtype
    return out[0].transpose(0, 1).float().cpu().numpy()


def _jax(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "gpu":
        raise RuntimeError("jax finds no GPU")
    q, k, v = (jnp.asarray(x[None], peer.dtype) for x in (query, key, value))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    assert out.dtype == q.dtype
    return np.asarray(out[0].astype(jnp.float32))
