"""Which operators can compute in 16-bit floats, by what ONNX says of their types; and how far a value reaches."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import ModelError

__all__ = ["MASK", "Peak", "complete", "contributed", "inferred", "inputs", "refusal", "retype", "saturated", "widens"]

MASK = 1e30
"""Magnitudes from here on are no values but masks, which any very low number serves as well as."""

_CONTRIBUTED = frozenset(
    {
        "Attention",
        "BiasGelu",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Operators of the runtime's own that take halves wherever they take floats."""
_MISPLACED = frozenset({"SimplifiedLayerNormalization"})
_INTEGER = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_WORDS = {"tensor(float)": ir.DataType.FLOAT} | {
    f"tensor({kind.name.lower()})": kind for kind in ir.DataType if kind not in (ir.DataType.FLOAT, ir.DataType.STRING)
}
_NAMES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


class Peak:
    """Largest magnitude of a value, masks left out.

    Attributes:
        largest: over all that was seen, below `MASK`.
        masked: whether something reaches farther, infinity included.
        broken: whether something was NaN.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.masked = False
        self.broken = False

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in all values of `array`."""
        magnitude = np.abs(array)
        seen = magnitude < MASK
        self.largest = max(self.largest, float(magnitude.max(initial=0.0, where=seen)))
        if not seen.all():
            self.broken |= bool(np.isnan(magnitude).any())
            self.masked |= bool((magnitude >= MASK).any())


@functools.cache
def _types(operator: str, domain: str, opset: int) -> tuple[tuple[tuple[frozenset[str], bool], ...], ...] | None:
    """((types, whether it repeats) of each input, likewise of each output); None where ONNX knows no such operator."""
    try:
        schema = onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return None
    repeats = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return tuple(
        tuple((frozenset(one.types), one.option == repeats) for one in side) for side in (schema.inputs, schema.outputs)
    )


def _at(side: tuple[tuple[frozenset[str], bool], ...], position: int) -> frozenset[str]:
    if position < len(side):
        return side[position][0]
    return side[-1][0] if side and side[-1][1] else frozenset()


def refusal(node: ir.Node, kind: ir.DataType, opset: int) -> str | None:
    """Why `node` cannot compute in `kind`; None if it can.

    Args:
        node: an operator.
        kind: float16 or bfloat16.
        opset: of the default domain.
    """
    if node.op_type in _BODIES:
        return None
    if node.domain not in ("", "ai.onnx") or contributed(node):
        return (
            None if contributed(node) else f"it is not known whether {node.domain}.{node.op_type} takes {_NAMES[kind]}"
        )
    if node.op_type in _INTEGER:
        return "it goes between floats and integers, at a scale in float32"
    found = _types(node.op_type, "", opset)
    if found is None:
        return f"opset {opset} has no {node.op_type}"
    name = f"tensor({_NAMES[kind]})"
    floats = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.FLOAT]
    made = [i for i, value in enumerate(node.outputs) if value.dtype == ir.DataType.FLOAT]
    takes = [name in _at(found[0], i) for i in floats]
    makes = [name in _at(found[1], i) for i in made]
    if not all(makes) or (takes and not any(takes)):
        return f"{node.op_type} of opset {opset} has no {_NAMES[kind]} form"
    return None


def widens(node: ir.Node, opset: int) -> bool:
    """Whether a standard operator takes float32 wherever it takes and makes 16-bit floats here."""
    found = _types(node.op_type, "" if node.domain == "ai.onnx" else node.domain, opset)
    if found is None or node.op_type in _BODIES:
        return True
    name = "tensor(float)"
    for side, values in zip(found, (node.inputs, node.outputs), strict=True):
        for position, value in enumerate(values):
            halved = value is not None and value.dtype in _NAMES and isinstance(value.type, ir.TensorType)
            if halved and name not in _at(side, position):
                return False
    return True


def contributed(node: ir.Node) -> bool:
    """Whether `node` is one of the runtime's own operators that take and make one float type."""
    # Some exporters put operators of the runtime's own into the default domain, and the runtime takes them.
    theirs = node.domain == "com.microsoft" or (node.domain == "" and node.op_type in _MISPLACED)
    return theirs and node.op_type in _CONTRIBUTED


def inputs(node: ir.Node, kind: ir.DataType, opset: int) -> frozenset[int]:
    """Float inputs of a node in `kind` that are in `kind`, too; others stay in float32, as a Resize's scales do."""
    floats = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.FLOAT]
    found = _types(node.op_type, "", opset) if node.domain in ("", "ai.onnx") else None
    if node.op_type in _BODIES or found is None:
        return frozenset(floats)
    name = f"tensor({_NAMES[kind]})"
    return frozenset(i for i in floats if name in _at(found[0], i))


def saturated(array: NDArray[np.floating], kind: ir.DataType, highest: float) -> NDArray[np.generic]:
    """`array` in `kind`, what is infinite staying so, and masks becoming half of the lowest number.

    A mask is added to scores, whose sum must not become infinite: where all of a row is masked, that is NaN.
    """
    clipped = np.where(np.abs(array) >= MASK, np.sign(array) * highest / 2, np.clip(array, -highest, highest))
    return np.where(np.isinf(array), array, clipped).astype(kind.numpy())


def retype(node: ir.Node, kind: ir.DataType, highest: float) -> None:
    """Attributes that say float32 say `kind`."""
    for name in ("to", "dtype"):
        found = node.attributes.get(name)
        if found is not None and found.as_int() == int(ir.DataType.FLOAT):
            node.attributes.add(ir.AttrInt64(name, int(kind)))
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and (value is None or value.as_tensor().dtype == ir.DataType.FLOAT):
        array = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
        filler: NDArray[Any] = saturated(array, kind, highest)
        node.attributes.add(ir.AttrTensor("value", ir.Tensor(filler, dtype=kind)))
    if node.op_type in ("RandomNormal", "RandomUniform") and "dtype" not in node.attributes:
        node.attributes.add(ir.AttrInt64("dtype", int(kind)))


def inferred(nodes: Iterable[ir.Node], opset: int) -> None:
    """Types that are missing, as ONNX's signatures tell them: of what a Cast names, or of an input of the same kind.

    Args:
        nodes: in order; only the types of their outputs are written.
        opset: of the default domain.
    """
    for node in nodes:
        # What nobody reads may have been left out.
        if all(value.type is not None or not (value.consumers() or value.is_graph_output()) for value in node.outputs):
            continue
        if contributed(node):
            found = [node.inputs[0].type if node.inputs[0] is not None else None] * len(node.outputs)
        else:
            found = _told(node, opset)
        for value, kind in zip(node.outputs, found, strict=False):
            if value.type is None and kind is not None and (value.consumers() or value.is_graph_output()):
                value.type = kind


def _told(node: ir.Node, opset: int) -> list[ir.TypeProtocol | None]:
    """The types of a standard operator's outputs, None for those that its signature does not tell."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "" if node.domain == "ai.onnx" else node.domain)
    except onnx.defs.SchemaError:
        return []
    known: dict[str, ir.TypeProtocol] = {}
    for position, value in enumerate(node.inputs):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)] if schema.inputs else None
        if formal is not None and value is not None and value.type is not None:
            known.setdefault(formal.type_str, value.type)
    named = next((found for name in ("to", "dtype") if (found := node.attributes.get(name)) is not None), None)
    types: list[ir.TypeProtocol | None] = []
    for position in range(len(node.outputs)):
        formal = schema.outputs[min(position, len(schema.outputs) - 1)]
        one = next(iter(formal.types)) if len(formal.types) == 1 else ""
        cast = ir.DataType(named.as_int()) if named is not None else None
        kind = _WORDS.get(one, cast)
        types.append(known.get(formal.type_str) if kind is None else ir.TensorType(kind))
    return types


def complete(nodes: Iterable[ir.Node]) -> None:
    """Types that ONNX cannot infer: the runtime's own operators make what they read.

    Raises:
        ModelError: there is another value without a type.
    """
    for node in nodes:
        first = node.inputs[0] if node.inputs else None
        for value in node.outputs:
            if value.dtype is None and value.consumers() and first is not None and contributed(node):
                value.type = first.type
            if value.dtype is None and value.consumers():
                raise ModelError(f"The type of {value.name!r} is not known, so the graph cannot be converted.")
