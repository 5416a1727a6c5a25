"""PyTorch's scaled_dot_product_attention on a CPU, one backend at a time."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import NOISE, Peer

if TYPE_CHECKING:
    import numpy as np

_DTYPES = {"f32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _peer(backend: str, short: str, suffix: str = "", **more: Any) -> Peer:
    return Peer(
        name=f"torch-{backend}-{short}{suffix}",
        family="torch_cpu",
        function=f"torch scaled_dot_product_attention, SDPBackend.{backend.upper()}",
        packages=("torch",),
        recipe=f"torch-cpu-{backend}-{short}",
        dtype=_DTYPES[short],
        **more,
    )


PEERS = (
    _peer("flash", "f32", expect=NOISE),
    _peer("flash", "bf16"),
    _peer("flash", "fp16"),
    _peer("flash", "bf16", "-causal", causal=True, contexts=(256, 1024)),
    _peer("flash", "bf16", "-gqa", group=4),
    _peer(
        "math",
        "f32",
        expect=NOISE,
        cause=(
            "torch's softmax sums in vector lanes, key after key: 0.8 of the error at 8,192 keys "
            "of minilm, where its rows sum to 1 within 2e-7; the recipe sums by halves"
        ),
    ),
    _peer("math", "bf16"),
    _peer("math", "fp16"),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash = "FLASH" in peer.function
    dtype = getattr(torch, peer.dtype)
    q, k, v = (
        torch.from_numpy(x).to(dtype).transpose(0, 1)[None].contiguous()
        for x in (query, key, value)
    )
    backend = SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH
    with sdpa_kernel(backend), torch.profiler.profile() as profile, torch.no_grad():
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=peer.causal, enable_gqa=peer.group > 1
        )
    ran = {event.key for event in profile.key_averages()}
    wanted = f"_scaled_dot_product{'_flash_attention_for_cpu' if flash else '_attention_math'}"
    if not any(wanted in name for name in ran):
        raise RuntimeError(f"another backend ran: {sorted(ran)}")
    assert out.dtype == dtype
    return out[0].transpose(0, 1).float().numpy()
