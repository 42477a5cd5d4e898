"""Any valid graph -> the one spelling that later passes expect: functions inlined, constants as initializers.

Composed of the libraries' passes. Weights may come as initializers, as Constant or as ConstantOfShape nodes; names are
made unique; the opset is raised to what the target needs when the converter can.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, version_converter

from qgraph.attention import likely
from qgraph.errors import ModelError, first_line
from qgraph.graph import all_graphs, fresh_name, is_standard
from qgraph.inference import infer_shapes
from qgraph.quiet import quiet

__all__ = ["Canonicalize"]

_QUANTIZE_SINCE = 13
_IN_PLACE = 21
"""From here to 23 the converter keeps nodes and values as they are, at any later time."""
_FILLERS = ("ConstantOfShape", "Expand", "Tile")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGE = 1 << 26


class Canonicalize(ir.passes.InPlacePass):
    """Functions inlined, opset raised, constants lifted and folded, dead nodes gone, every node and value named.

    Args:
        opset: the opset to reach. A model that cannot be converted keeps its own if that is at least 13.
        attention: whether to reach opset 21, if the converter can, where there may be attention to fuse.
    """

    def __init__(self, opset: int = 21, attention: bool = False):
        super().__init__()
        self.opset = opset
        self.attention = attention

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place.

        Raises:
            ModelError: the model does not use the default ONNX domain, or its opset is too old and cannot be raised.
        """
        # Not in `requires`, whose errors onnx_ir would wrap into its own.
        if "" not in model.graph.opset_imports and "ai.onnx" not in model.graph.opset_imports:
            raise ModelError("The model imports no opset of the default ONNX domain: nothing in it can be quantized.")
        common.InlinePass()(model)
        constants = model.graph.initializers.values()
        weights = any(value.shape is not None and len(value.shape) > 1 for value in constants)
        if weights and all(value.is_graph_input() for value in constants):
            # The habit of old exporters (an obligation before IR 4), which makes none of them a real input. Where
            # only some are listed, these are defaults that a caller may override, and stay.
            common.RemoveInitializersFromInputsPass()(model)
        _convert(model, self.opset)
        if self.attention and likely(model.graph):
            _raise(model, _IN_PLACE)
        # Before the folder, which calls whatever has no name "node".
        _name_nodes(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        # Overridable or not, an expansion of a few numbers to a weight is a weight.
        with quiet("onnxscript.optimizer"):
            optimizer.fold_constants(
                model,
                input_size_limit=1024,
                output_size_limit=_LARGE,
                should_fold=_should_fold,
            )
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _drop_identities(model)
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        _name_nodes(model)
        omitted = [v for node in model.graph.all_nodes() for v in node.outputs if v.name == ""]
        common.NameFixPass()(model)
        for value in omitted:
            # An output with a name is asked for, and computed.
            value.name = ""
        infer_shapes(model)
        return ir.passes.PassResult(model, True)


def _should_fold(node: ir.Node) -> bool | None:
    """A filler that makes a layer's weight always, what could blow up a small graph never, else as the folder likes."""
    output = node.outputs[0] if node.outputs else None
    if output is None:
        return None
    if is_standard(node, *_FILLERS) and any(
        is_standard(user, *_LAYERS) and position == 1 for user, position in output.uses()
    ):
        return True
    shape = output.shape
    return None if shape is None or not shape.is_static() or _count(shape) <= 1 << 18 else False


def _count(shape: ir.Shape) -> int:
    total = 1
    for dim in shape.numpy():
        total *= dim
    return total


def _drop_identities(model: ir.Model) -> None:
    """Identity(x) -> x, but where a graph's output is made by it: the library's pass makes two outputs one there."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        source = node.inputs[0] if is_standard(node, "Identity") else None
        if source is None or node.graph is None or node.outputs[0].is_graph_output():
            continue
        if source.shape is None:
            source.shape = node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        node.graph.remove(node, safe=True)


def _convert(model: ir.Model, opset: int) -> None:
    current = model.graph.opset_imports.get("", 0)
    if current >= opset or current == 0:
        return
    graph = model.graph
    metadata, doc, name = dict(graph.metadata_props), graph.doc_string, graph.name
    inputs, outputs = [(v.name, v.type, v.shape) for v in graph.inputs], [v.name for v in graph.outputs]
    try:
        with quiet("onnxscript.version_converter"):
            version_converter.ConvertVersionPass(target_version=opset, fallback=True)(model)
    except Exception as error:
        if current < _QUANTIZE_SINCE:
            raise ModelError(
                f"The model has opset {current} and cannot be converted to {opset}: {first_line(error)}"
            ) from error
    graph = model.graph
    graph.metadata_props.update(metadata)
    graph.doc_string, graph.name = doc, name
    for value, (label, kind, shape) in zip(graph.inputs, inputs, strict=True):
        value.name, value.type, value.shape = label, kind, shape
    if [v.name for v in graph.outputs] != outputs:
        raise ModelError(f"Converting the model to opset {opset} changed its outputs; export it with a newer opset.")
    if model.graph.opset_imports.get("", 0) < _QUANTIZE_SINCE:
        raise ModelError(
            f"The model has opset {current}; the converter cannot raise it to {opset} (an operator has no newer form). "
            f"Export it with opset {_QUANTIZE_SINCE} or newer."
        )


def _raise(model: ir.Model, opset: int) -> None:
    """Convert where that is possible. A model that cannot be converted stays as it is, whole."""
    if model.graph.opset_imports.get("", 0) >= opset:
        return
    raised = model.clone()
    try:
        _convert(raised, opset)
    except ModelError:
        return
    if raised.graph.opset_imports.get("", 0) == opset:
        model.graph = raised.graph


def _name_nodes(model: ir.Model) -> None:
    """A name of its own for every node, bodies included: made of its first output's; reports and audits rest on it."""
    nodes = [node for graph in all_graphs(model.graph) for node in graph]
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    for node in nodes:
        if not node.name or node.name in seen:
            output = node.outputs[0].name if node.outputs else None
            node.name = fresh_name(f"{output or 'value'}_{node.op_type}", taken)
        seen.add(node.name)
