"""A graph in float16 or bfloat16 -> the same graph in float32, its inputs and outputs as they were.

For targets whose kernels compute in float32 alone: there the runtime puts Casts around every operator. A Cast stands
behind each input in 16 bits and before each output; Casts between the two types fall away inside. Weights become views
of what they are on disk, and are widened one at a time when they are read; see `NarrowWeights` for those that stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, halves, instead
from qgraph.inference import infer_shapes
from qgraph.targets import Target
from qgraph.widened import HALVES, widened

__all__ = ["ToFloat"]

_FLOAT = ir.DataType.FLOAT
_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision")
"""Attributes that say a float type."""
_BITS = frozenset({"BitCast", "IsInf"})
"""What tells a 16-bit number from the same in float32: its bits, and that it ends at 65504."""
_ONLY = frozenset(
    {
        "GemmaRotaryEmbedding",
        "MatMulBlockQuantizedFp4Weight",
        "MatMulBlockQuantizedFp8Weight",
        "PagedAttention",
        "QOrderedLongformerAttention",
        "SparsePagedAttention",
    }
)
"""Operators of the runtime's own that take 16-bit floats and no others."""
_SEQUENCES = ("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SplitToSequence")
_KNOWN = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_CACHE = "it appends to a cache that the caller holds in {}"
_ATTENTION = "GroupQueryAttention"


class ToFloat(ir.passes.InPlacePass):
    """Converts a whole graph, bodies of If, Loop and Scan included.

    Args:
        caches: whether what appends to caches of keys and values that go in and out stays in their type, where the
            CPU provider has it (Concat, and GroupQueryAttention in float16). So they are read once a step, and not
            copied into float32 and back; measured, that is 1.0 to 3.2 times as fast.
        target: where the model will run, if its 16-bit kernels come behind this pass: the notes say what becomes of it.

    Attributes:
        refused: node -> why it stays in 16 bits, Casts around it; or the graph's name, where all of it stays.
        notes: what a reader of the report should know.

    Refused: operators without a float32 form, or whose result tells the two types apart; those of unknown domains;
    what appends to a cache that goes in and out in 16 bits, which would only be copied twice. Graphs whose inputs or
    outputs are sequences of such tensors, and those with values of unknown type, stay as they are.
    """

    def __init__(self, caches: bool = True, target: Target | None = None) -> None:
        super().__init__()
        self.caches, self.target = caches, target
        self.refused: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused, self.notes = {}, ()
        if not _halved(model):
            return ir.passes.PassResult(model, False)
        if model.functions:
            common.InlinePass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        nodes = [node for one in graph.all_graphs(model.graph) for node in one]
        opset = model.graph.opset_imports.get("", 0)
        if any(value.type is None for node in nodes for value in node.outputs if value.name):
            infer_shapes(model)
            halves.inferred(nodes, opset)
        _mend(nodes)
        if (reason := _obstacle(model, nodes)) is not None:
            self.refused[str(model.graph.name)] = reason
            self.notes = (f"The model computes in 16-bit floats, and was not brought to float32: {reason}.",)
            return ir.passes.PassResult(model, False)
        kept = {node: reason for node in nodes if (reason := _reason(node, opset, self.caches)) is not None}
        self.refused.update({graph.label(node): reason for node, reason in kept.items()})
        kinds = _Rewriting(model, nodes, kept).run()
        if kinds:
            self.notes = (instead.told(kinds, self.target),)
        return ir.passes.PassResult(model, True)


def _kind(value: ir.Value | None) -> ir.DataType | None:
    """Which 16-bit float type `value` is of, or its elements are; None for others."""
    kind = value.type.dtype if value is not None and value.type is not None else None
    return kind if kind in HALVES else None


def _halved(model: ir.Model) -> bool:
    """Whether there is a 16-bit float in the model, as far as its types are known."""
    graphs = [*graph.all_graphs(model.graph), *(function.graph for function in model.functions.values())]
    for one in graphs:
        values = (*one.inputs, *one.initializers.values(), *(value for node in one for value in node.outputs))
        if any(_kind(value) is not None for value in values):
            return True
    return False


def _mend(nodes: list[ir.Node]) -> None:
    """Sequences, which inference takes for tensors, are said to be such."""
    for node in nodes:
        for value in node.outputs if graph.is_standard(node, *_SEQUENCES) else ():
            if isinstance(value.type, ir.TensorType):
                value.type, value.shape = ir.SequenceType(value.type), None


def _obstacle(model: ir.Model, nodes: list[ir.Node]) -> str | None:
    """Why the graph as a whole stays as it is."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _kind(value) is not None and not isinstance(value.type, ir.TensorType):
            return f"{value.name!r} holds several tensors of that type"
    for node in nodes:
        for value in node.outputs:
            if value.type is None and value.consumers() and node.domain in _KNOWN:
                return f"the type of {value.name!r} is not known"
            if _kind(value) is not None and not isinstance(value.type, (ir.TensorType, ir.SequenceType)):
                return f"{value.name!r} is neither a tensor nor a sequence of tensors"
    return None


def _reason(node: ir.Node, opset: int, caches: bool) -> str | None:
    """Why `node` stays in 16 bits; None where it does not, or has nothing in them."""
    kind = next((found for value in (*node.inputs, *node.outputs) if (found := _kind(value)) is not None), None)
    if kind is None:
        return None
    word = kind.name.lower()
    if node.domain not in _KNOWN:
        return f"it is not known whether {node.domain}.{node.op_type} takes float32"
    if node.domain == "com.microsoft" and node.op_type in _ONLY:
        return f"{node.op_type} has no float32 form"
    if graph.is_standard(node, *_BITS):
        return f"{node.op_type} is about the numbers of {word}"
    if graph.is_standard(node, node.op_type) and not halves.widens(node, opset):
        return f"{node.op_type} of opset {opset} has no float32 form"
    return _CACHE.format(word) if caches and _appends(node, kind) else None


def _appends(node: ir.Node, kind: ir.DataType) -> bool:
    """Whether `node` makes a cache that goes out of one that comes in, and the CPU provider does so in `kind`."""
    if graph.is_standard(node, "Concat"):
        pasts, presents = node.inputs, node.outputs
    elif (node.domain, node.op_type) == ("com.microsoft", _ATTENTION) and kind == ir.DataType.FLOAT16:
        pasts, presents = node.inputs[3:5], node.outputs[1:3]
    else:
        return False
    comes = any(value is not None and _kind(value) == kind and value.is_graph_input() for value in pasts)
    return comes and any(value.is_graph_output() for value in presents)


class _Rewriting:
    """One conversion, its Casts shared between all that read them."""

    def __init__(self, model: ir.Model, nodes: list[ir.Node], kept: dict[ir.Node, str]):
        self.model, self.nodes, self.kept = model, nodes, kept
        self.names = graph.value_names(model.graph)
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.kinds: set[str] = set()

    def run(self) -> list[str]:
        """Types of values first, then each input in the type that its node wants; names of the types that went."""
        main = self.model.graph
        wanted = {node: {i: kind if node in self.kept else _FLOAT for i, kind in _read(node)} for node in self.nodes}
        ends = [(value, _kind(value)) for value in main.outputs]
        bodies = [one for one in graph.all_graphs(main) if one is not main]
        results = {body: [_kind(value) is not None for value in body.outputs] for body in bodies}
        self._constants(main, bodies)
        for body in bodies:
            for value in body.inputs:
                self._change(value)
        for node in self.nodes:
            if node not in self.kept:
                self._retype(node)
                for value in node.outputs:
                    self._change(value)
        for node, kinds in wanted.items():
            for position, kind in kinds.items():
                read = node.inputs[position]
                if read is not None and _element(read) != kind:
                    node.replace_input_with(position, self._in(read, kind))
        for body, halved in results.items():
            for position, value in enumerate(body.outputs):
                if halved[position] and _kind(value) is not None:
                    body.outputs[position] = self._in(value, _FLOAT)
        for position, (value, before) in enumerate(ends):
            if before is not None and value.dtype == _FLOAT:
                self._end(position, value, before)
        for node in self.nodes:
            if graph.is_standard(node, "Cast", "CastLike"):
                graph.drop_cast(node)
        common.RemoveUnusedNodesPass()(self.model)
        return sorted(self.kinds)

    def _constants(self, main: ir.Graph, bodies: list[ir.Graph]) -> None:
        """Weights become float32, under their names; one that is needed in 16 bits stays, and gets a twin on demand."""
        for home in (main, *bodies):
            for value in list(home.initializers.values()):
                if _kind(value) is None and not _is_half(value):
                    continue
                needed = value.is_graph_input() or value.is_graph_output() or value.const_value is None
                if needed or any(node in self.kept for node in value.consumers()):
                    continue
                assert value.const_value is not None
                value.const_value = widened(value.const_value)
                value.type = ir.TensorType(_FLOAT)

    def _change(self, value: ir.Value) -> None:
        kind = _kind(value)
        if kind is None or value.is_initializer():
            return
        self.kinds.add(kind.name.lower())
        # A sequence of float32 tensors, or a tensor.
        sequence = isinstance(value.type, ir.SequenceType)
        value.type = ir.SequenceType(ir.TensorType(_FLOAT)) if sequence else ir.TensorType(_FLOAT)

    def _retype(self, node: ir.Node) -> None:
        """Attributes that say 16 bits say float32."""
        for name in _TYPES:
            found = node.attributes.get(name)
            if found is not None and found.type == ir.AttributeType.INT and found.as_int() in map(int, HALVES):
                node.attributes.add(ir.AttrInt64(name, int(_FLOAT)))
        value = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and value is not None and value.as_tensor().dtype in HALVES:
            filler = value.as_tensor().numpy().astype(np.float32)
            node.attributes.add(ir.AttrTensor("value", ir.Tensor(filler)))

    def _in(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """`value` in `kind`: a converted constant, or a Cast after the node that makes it."""
        if (value, kind) not in self.made:
            tensor = value.const_value if graph.has_constant(value) else None
            if tensor is not None and kind == _FLOAT:
                home = value.graph
                assert isinstance(home, ir.Graph)
                name = graph.fresh_name(f"{value.name}_float", self.names)
                copy = widened(tensor)
                self.made[value, kind] = graph.add_initializer(home, copy, name)
            else:
                self.made[value, kind] = self._cast(value, kind, value.name)
        return self.made[value, kind]

    def _cast(self, value: ir.Value, kind: ir.DataType, base: str | None) -> ir.Value:
        home = value.graph
        assert isinstance(home, ir.Graph)
        name = graph.fresh_name(f"{base}_Cast", self.names)
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], name=name)
        result = node.outputs[0]
        result.name = graph.fresh_name(f"{name}_output", self.names)
        result.type, result.shape = ir.TensorType(kind), value.shape
        graph.insert_behind(home, value.producer(), node)
        return result

    def _end(self, position: int, value: ir.Value, kind: ir.DataType) -> None:
        """An output of the model in the type that it had, under its name; what makes it gets another."""
        name = value.name
        value.name = graph.fresh_name(f"{name}_float", self.names)
        result = self._cast(value, kind, name)
        result.name = name
        self.model.graph.outputs[position] = result


def _read(node: ir.Node) -> Iterator[tuple[int, ir.DataType]]:
    """(position, type) of each input in 16 bits whose numbers are read."""
    if graph.is_standard(node, "Shape", "Size"):
        return
    for position, value in enumerate(node.inputs):
        kind = _kind(value)
        if kind is None and value is not None and _is_half(value) and value.const_value is not None:
            kind = value.const_value.dtype
        if kind is not None:
            yield position, kind


def _is_half(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype in HALVES


def _element(value: ir.Value) -> ir.DataType | None:
    """Type of a value or of its elements."""
    return None if value.type is None else value.type.dtype
