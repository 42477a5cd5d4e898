"""float32 views of weights in 16-bit floats: read as float32, one at a time, and kept in the 16 bits that they have.

What is float32 in the graph is 16 bits on disk; `narrowing` writes it so.
"""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir

__all__ = ["HALVES", "Widened", "brains", "release", "source", "widened", "window"]

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The float types of 16 bits."""

_SMALL = 1024
"""Numbers of more than one dimension from which a tensor is only widened when it is read."""
_LONG = 1 << 20
"""Of one dimension: rows of numbers, which passes compute with at once."""


class Widened(ir.LazyTensor):
    """A float32 tensor whose numbers are those of a tensor in 16 bits, which stays where it is.

    Args:
        source: a tensor in float16 or bfloat16.
    """

    __slots__ = ("source",)

    def __init__(self, source: ir.TensorProtocol):
        super().__init__(self._widen, ir.DataType.FLOAT, ir.Shape(source.shape.numpy()), name=source.name)
        self.source = source

    def _widen(self) -> ir.TensorProtocol:
        array = self.source.numpy().astype(np.float32)
        release(self.source)
        return ir.Tensor(array, name=self.name)


def widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """`tensor` in float32: at once where it is small, as rows of numbers beside a weight are; as a view of it else."""
    large = tensor.size >= _SMALL if len(tensor.shape) > 1 else tensor.size >= _LONG
    if large:
        return Widened(tensor)
    array = tensor.numpy().astype(np.float32)
    release(tensor)
    return ir.Tensor(array, name=tensor.name)


def brains(model: ir.Model) -> bool:
    """Whether `model` computes in bfloat16: whether anything but a Cast reads what is known to be in it."""
    kind = ir.DataType.BFLOAT16
    for graph in (model.graph, *model.graph.subgraphs()):
        known = [v for v in (*graph.inputs, *graph.initializers.values()) if v.dtype == kind]
        for node in graph:
            to = node.attributes.get("to")
            if any(value.dtype == kind for value in node.outputs) or (to is not None and to.value == int(kind)):
                known.extend(node.outputs)
            if node.op_type == "Constant" and "value" in node.attributes:
                known.extend(node.outputs if node.attributes["value"].as_tensor().dtype == kind else [])
        if any(user.op_type != "Cast" for value in known for user in value.consumers()):
            return True
    return False


def source(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Where the numbers of `tensor` are stored: what it is a view of, or itself."""
    return tensor.source if isinstance(tensor, Widened) else tensor


def window(tensor: ir.ExternalTensor, start: int, length: int | None, shape: ir.Shape, name: str) -> ir.ExternalTensor:
    """`length` bytes of what `tensor` is in its file, from its byte `start` on, as a tensor of its own."""
    return ir.ExternalTensor(
        tensor.location,
        (tensor.offset or 0) + start,
        length,
        tensor.dtype,
        shape=shape,
        name=name,
        base_dir=tensor.base_dir,
    )


def release(tensor: ir.TensorProtocol | None) -> None:
    """Give a memory-mapped tensor's pages back; it is mapped again when next read."""
    stored = None if tensor is None else source(tensor)
    if isinstance(stored, ir.ExternalTensor):
        # Where someone still looks at it, it stays mapped, which costs address space only.
        with contextlib.suppress(BufferError):
            stored.release()
