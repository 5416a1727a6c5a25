"""Inference runtimes on a CPU: ONNX Runtime, MLX, OpenVINO and ExecuTorch."""

from typing import TYPE_CHECKING, Any

from sweeps.peers.peer import NOISE, Peer

if TYPE_CHECKING:
    import numpy as np

_MHA = "onnxruntime com.microsoft.MultiHeadAttention"
_MLX = "mlx.core.fast.scaled_dot_product_attention (CPU)"
_OPENVINO = "openvino ScaledDotProductAttention (CPU, fused by snippets)"
_EXECUTORCH = "executorch torch.ops.llama.custom_sdpa"


def _peer(name: str, function: str, packages: tuple[str, ...], recipe: str, **more: Any) -> Peer:
    return Peer(
        name=name, family="runtimes", function=function, packages=packages, recipe=recipe, **more
    )


_MLX_TIES = (
    "one in 10,000 scores and one in 10,000 probabilities lies so near to a tie that MLX's order "
    "of float32 sums rounds it the other way (measured of its product and its softmax apart)"
)
_MLX_SUMS = (
    "its orders of float32 sums in q·k and in the row sum: p·v one key after another explains how "
    "the error grows, not its last factor of 1.6"
)
_ORT = ("onnxruntime", "onnx")
PEERS = (
    _peer("onnxruntime-mha", _MHA, _ORT, "onnxruntime-mha", queries=64, expect=NOISE),
    _peer("mlx-cpu-f32", _MLX, ("mlx",), "mlx-cpu-f32", expect=NOISE, cause=_MLX_SUMS),
    _peer("mlx-cpu-fp16", _MLX, ("mlx",), "mlx-cpu-fp16", dtype="float16", cause=_MLX_TIES),
    _peer("mlx-cpu-bf16", _MLX, ("mlx",), "mlx-cpu-bf16", dtype="bfloat16", cause=_MLX_TIES),
    _peer(
        "openvino-cpu-f32",
        _OPENVINO,
        ("openvino",),
        "openvino-cpu-f32",
        expect=NOISE,
        cause=(
            "an order of sums that is not known: from 2,048 keys on it errs 1.8 times as much as "
            "this host's matrix product, and less than one chain of keys would (0.2 to 0.5)"
        ),
    ),
    _peer("openvino-cpu-bf16", _OPENVINO, ("openvino",), "openvino-cpu-bf16", dtype="bfloat16"),
    _peer("executorch-sdpa", _EXECUTORCH, ("executorch", "torch"), "executorch-sdpa", expect=NOISE),
)


def attend(
    peer: Peer, query: "np.ndarray", key: "np.ndarray", value: "np.ndarray", scale: float
) -> "np.ndarray":
    call = {_MHA: _mha, _MLX: _mlx, _OPENVINO: _openvino, _EXECUTORCH: _executorch}[peer.function]
    return call(peer, query, key, value, scale)


def _mha(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    heads = query.shape[1]
    arrays = {
        name: x.reshape(1, len(x), -1)
        for name, x in (("query", query), ("key", key), ("value", value))
    }
    node = helper.make_node(
        "MultiHeadAttention",
        list(arrays),
        ["out"],
        domain="com.microsoft",
        num_heads=heads,
        scale=scale,
    )
    described = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)
        for name, x in arrays.items()
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, arrays["query"].shape)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", described, [out]), opset_imports=opsets, ir_version=8
    )
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, arrays)
    return result.reshape(len(query), heads, -1)


def _mlx(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    dtype = getattr(mx, peer.dtype)
    q, k, v = (mx.array(np.moveaxis(x, 0, 1)[None]).astype(dtype) for x in (query, key, value))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    assert out.dtype == dtype
    return np.moveaxis(np.array(out.astype(mx.float32))[0], 0, 1)


def _openvino(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import numpy as np
    import openvino as ov
    from openvino import opset13

    arrays = [np.ascontiguousarray(np.moveaxis(x, 0, 1)[None]) for x in (query, key, value)]
    inputs = [opset13.parameter(x.shape, np.float32) for x in arrays]
    rows = arrays[0].shape[2], arrays[1].shape[2]
    mask = opset13.constant(np.zeros((1, 1, *rows), np.float32))
    node = opset13.scaled_dot_product_attention(
        *inputs, mask, opset13.constant(np.float32(scale)), causal=False
    )
    model = ov.Model([node], inputs, "attention")
    hint = {"float32": "f32", "bfloat16": "bf16"}[peer.dtype]
    core = ov.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bfloat16 arithmetic: OpenVINO would take float32")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return np.moveaxis(compiled(arrays)[0][0], 0, 1).astype(np.float32)


def _executorch(peer: Peer, query: Any, key: Any, value: Any, scale: float) -> Any:
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the ops)

    q, k, v = (torch.from_numpy(x)[None].contiguous() for x in (query, key, value))
    out = torch.ops.llama.custom_sdpa(q, k, v, len(key) - len(query), None, 0.0, False, scale)
    return out[0].numpy()
