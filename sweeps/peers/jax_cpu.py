"""Attention of jax.nn and of Flax as XLA computes it on this machine."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import NOISE, Peer

if TYPE_CHECKING:
    import numpy as np

_JAX = "jax.nn.dot_product_attention(implementation='xla')"
_FLAX = "flax.linen.dot_product_attention"
_TIE = (
    "single probabilities within 2e-7 of a tie, which sums in another order round the other way, "
    "and results that they move (at worst 0.7 % of all elements, by one step)"
)


def _jax(name: str, recipe: str, dtype: str, **more: Any) -> Peer:
    fields = {"function": _JAX, "packages": ("jax", "jaxlib"), "family": "jax_cpu", **more}
    return Peer(name=name, recipe=recipe, dtype=dtype, **fields)


PEERS = (
    _jax(
        "jax-nn-xla-f32",
        "jax-nn-f32",
        "float32",
        expect=NOISE,
        cause=(
            "the order of XLA's float32 sums in p·v, which alone makes its whole error and changes "
            "with shape and processor: seen, one chain of keys in panels of about 2,000 (with "
            "output_every=1 the RMS agree within 1 % up to there)"
        ),
    ),
    _jax("jax-nn-xla-bf16", "jax-nn-bf16", "bfloat16", cause=_TIE),
    _jax(
        "jax-nn-xla-fp16",
        "jax-nn-fp16",
        "float16",
        function=_JAX + ", outside of jit",
        cause=_TIE,
    ),
    _jax("jax-nn-xla-bf16-gqa", "jax-nn-bf16", "bfloat16", group=4, cause=_TIE),
    _jax("jax-nn-xla-bf16-causal", "jax-nn-bf16", "bfloat16", causal=True, contexts=(256, 1024)),
    _jax(
        "flax-linen-bf16",
        "flax-bf16",
        "bfloat16",
        function=_FLAX,
        packages=("flax", "jax", "jaxlib"),
        # Else XLA drops the rounding of p to bfloat16 on its way into the row sum.
        environment={"XLA_FLAGS": "--xla_allow_excess_precision=false"},
    ),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import jax.numpy as jnp
    import numpy as np

    dtype = jnp.dtype(peer.dtype)
    call: Any = _flax if peer.function == _FLAX else _nn
    out = call(peer, dtype, *(jnp.asarray(x[None]) for x in (query, key, value)), scale)
    assert out.dtype == dtype
    return np.asarray(out[0].astype(jnp.float32))


def _nn(peer: Peer, dtype: Any, q: Any, k: Any, v: Any, scale: float) -> Any:
    import jax

    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=peer.causal, implementation="xla"
        )

    # Inside jit float16 fails on a CPU, where XLA has no F16_F16_F32; outside, plain einsum stands
    # in for it.
    function: Any = call if peer.dtype == "float16" else jax.jit(call)
    return function(*(x.astype(dtype) for x in (q, k, v)))


def _flax(peer: Peer, dtype: Any, q: Any, k: Any, v: Any, scale: float) -> Any:
    import jax
    from flax import linen

    # Flax divides q by the root of its last dim, a power of two here: what is left of the scale is
    # multiplied before, so that q is rounded once.
    assert q.shape[-1] == 64
    return jax.jit(linen.dot_product_attention)(
        (q * (scale * 8)).astype(dtype), k.astype(dtype), v.astype(dtype)
    )
