"""Triton kernels of installed packages, run by Triton's interpreter: NumPy in place of a GPU.

What the interpreter (triton 3.9.0, runtime/interpreter.py) changes against a GPU:
- tl.dot is numpy.matmul with the accumulator's dtype: float32 sums of exact products in BLAS's
  order, and for a float16 result a float32 sum that is rounded once (create_dot);
- float32 to bfloat16 drops the low bits, where a GPU rounds to nearest even (_convert_float);
- exp2, log2 and division are correctly rounded or nearly, where a GPU approximates.
Two things it cannot do are added here, neither of them arithmetic of a kernel: it multiplies the
bits of bfloat16 as if they were integers (`_widen_bfloat16`), and Triton 3.9 has no block pointers
any more (`_restore_block_pointers`).
"""

import functools
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from sweeps.peers.peer import Peer

if TYPE_CHECKING:
    import numpy as np

_FLA = "fla.ops.attn.parallel.parallel_attn"
_SAGE = "sageattention.attn_qk_int8_per_block.forward"
_TUTORIAL = "flash_attn_triton.triton_kernel.attention_kernel._attn_fwd"
_BLOCK_M, _BLOCK_N = 128, 64  # of the tutorial's kernel: one of the pairs that it is tuned over


def _peer(name: str, function: str, recipe: str, *packages: str, **more: Any) -> Peer:
    fields = {"dtype": "float16", "contexts": (256, 1024, 2048), **more}
    return Peer(
        name=name,
        family="triton_interpreter",
        function=f"{function} (TRITON_INTERPRET=1)",
        packages=(*packages, "triton", "torch", "numpy"),
        recipe=recipe,
        environment={"TRITON_INTERPRET": "1"},
        **fields,
    )


_TRUNCATED = {"probs": "bfloat16:rz", "result": "bfloat16:rz"}
_TUTORIAL_PACKAGE = ("flash-attn-triton",)

PEERS = (
    _peer(
        "fla-parallel-attn-fp16",
        _FLA,
        "fla-parallel-attn-fp16",
        *("fla-core", "einops"),
        causal=True,
        contexts=(256, 1024),
    ),
    _peer(
        "fla-parallel-attn-bf16",
        _FLA,
        "fla-parallel-attn-bf16",
        *("fla-core", "einops"),
        causal=True,
        contexts=(256, 1024),
        dtype="bfloat16",
        changes=_TRUNCATED,
    ),
    _peer(
        "sage-1-triton",
        _SAGE,
        "sage-1",
        "sageattention",
        changes={"pv_chunk": 64, "result": "float16"},
    ),
    _peer("triton-tutorial-fp16", _TUTORIAL, "triton-tutorial-fp16", *_TUTORIAL_PACKAGE),
    _peer(
        "triton-tutorial-bf16",
        _TUTORIAL,
        "triton-tutorial-bf16",
        *_TUTORIAL_PACKAGE,
        dtype="bfloat16",
        changes=_TRUNCATED,
    ),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    dtype = getattr(torch, peer.dtype)
    call: Any = {_FLA: _fla, _SAGE: _sage, _TUTORIAL: _tutorial}[peer.function.split(" ")[0]]
    ran: list[str] = []
    run = InterpretedFunction.run

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        ran.append(self.fn.__name__)
        return run(self, *arguments, **options)

    InterpretedFunction.run = recorded
    with torch.no_grad():
        out = call(*(torch.from_numpy(x).to(dtype)[None] for x in (query, key, value)), scale)
    wanted = {_fla: "parallel_attn_fwd_kernel", _sage: "_attn_fwd", _tutorial: "_attn_fwd"}[call]
    if wanted not in ran:
        raise RuntimeError(f"the kernel was not interpreted: {ran}")
    assert out.dtype == dtype
    return out[0].float().numpy()


def _fla(q: Any, k: Any, v: Any, scale: float) -> Any:
    from fla.ops.attn.parallel import parallel_attn

    _widen_bfloat16()
    return parallel_attn(q, k, v, scale=scale)


def _sage(q: Any, k: Any, v: Any, scale: float) -> Any:
    """What sageattn does with smooth_k=False, but for its test that the inputs are on a GPU."""
    from sageattention.attn_qk_int8_per_block import forward
    from sageattention.quant_per_block import per_block_int8

    q8, q_scale, k8, k_scale = per_block_int8(q, k, sm_scale=scale, tensor_layout="NHD")
    return forward(q8, k8, v, q_scale, k_scale, tensor_layout="NHD", output_dtype=q.dtype)


def _tutorial(q: Any, k: Any, v: Any, scale: float) -> Any:
    """_attention.forward of the package, without the autotuner, which times kernels on a GPU."""
    import torch

    _widen_bfloat16()
    _restore_block_pointers()
    # Triton has dropped this module, which the package imports and does not use.
    name = "triton.tools.experimental_descriptor"
    sys.modules.setdefault(name, types.ModuleType(name))
    from flash_attn_triton.triton_kernel.attention_kernel import _attn_fwd

    rows, keys = q.shape[1], k.shape[1]
    if keys % _BLOCK_N:
        raise ValueError(f"the kernel takes whole blocks of {_BLOCK_N} keys, got {keys}")
    # The kernel has one stride and one length for q, k and v: as many queries as keys, of which it
    # computes the blocks of the grid.
    q = torch.cat([q, torch.zeros_like(k[:, rows:])], dim=1)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, m = torch.zeros_like(q), torch.empty(q.shape[:3])
    heads = q.shape[1]
    strides = (stride for x in (q, k, v, out) for stride in x.stride())
    _attn_fwd.fn[(-(-rows // _BLOCK_M), heads, 1)](
        *(q, k, v, scale, 0.0, 0, m, out),
        *strides,
        *(1, heads),
        N_CTX=keys,
        HEAD_DIM=q.shape[-1],
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        STAGE=1,
        USE_DROPOUT=False,
        IS_BF16=q.dtype == torch.bfloat16,
    )
    return out.transpose(1, 2)[:, :rows]


@functools.cache
def _widen_bfloat16() -> None:
    """tl.dot of bfloat16 with operands as float32, exactly: the products of a tensor core."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


class _Block(NamedTuple):
    base: Any
    strides: Any
    offsets: Any
    shape: Any


@functools.cache
def _restore_block_pointers() -> None:
    """tl.make_block_ptr, advance, load and store of blocks that lie wholly inside their array."""
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_semantic as semantic

    load, store = tl.load, tl.store

    def make(
        base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any
    ) -> _Block:
        return _Block(base, strides, offsets, block_shape)

    def advance(block: _Block, steps: Any) -> _Block:
        pairs = zip(block.offsets, steps, strict=True)
        return block._replace(offsets=tuple(at + step for at, step in pairs))

    def pointers(block: Any) -> Any:
        if not isinstance(block, _Block):
            return block
        rows, columns = (
            (tl.arange(0, size) + at) * stride
            for size, at, stride in zip(block.shape, block.offsets, block.strides, strict=True)
        )
        return block.base + rows[:, None] + columns[None, :]

    tl.make_block_ptr, tl.advance = make, advance
    tl.load = lambda at, *more: load(pointers(at), *more, _semantic=semantic)
    tl.store = lambda at, x, *more: store(pointers(at), x, *more, _semantic=semantic)
