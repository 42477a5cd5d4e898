"""A graph in float32 -> the same graph in float16 or bfloat16, with Casts where the two meet.

Weights, values and the bodies of If, Loop and Scan change; inputs and outputs do not, unless asked for. What cannot
compute so (by ONNX's types), what the target would rather not, and what reaches beyond float16's 65504 on calibration
data stays in float32, with the reason. A mask of -3.4e38 becomes a low finite number and not minus infinity, of which a
Softmax makes NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import calibration, graph, halves, weights
from qgraph.calibration import STATISTICS
from qgraph.data import Dataset
from qgraph.errors import OptionError
from qgraph.float_formats import BF16, FP16, Float
from qgraph.halves import Peak
from qgraph.stored import Reach
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["ToHalf"]

_FLOAT = ir.DataType.FLOAT
_FORMATS = {"fp16": FP16, "bf16": BF16}
_PEAK = "qgraph.peak"
_CROSSING = "it was put in where float32 and {} meet"


class ToHalf(ir.passes.InPlacePass):
    """Converts a whole graph.

    Args:
        form: "fp16" or "bf16".
        keep: operator, or name of a node -> why it stays in float32.
        keep_io: whether inputs and outputs of the graph stay in float32.
        data: calibration data that shows what reaches too far; None to trust that nothing does.
        folder: where the model's external tensors lie.
        budget: bytes that one run's observed values may take.
        planned: whether annotation has decided: nodes for which it found a reason stay in float32.

    Attributes:
        refused: node -> why it stays in float32.
        subnormal: numbers of weights that are smaller than the smallest normal one, and lose digits.

    Refused: nothing as a whole; single nodes as above.
    """

    def __init__(
        self,
        form: str = "fp16",
        keep: Mapping[str, str] | None = None,
        keep_io: bool = True,
        data: Dataset | None = None,
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        planned: bool = False,
    ):
        super().__init__()
        if form not in _FORMATS:
            raise OptionError(f"A graph is converted to fp16 or bf16, and not to {form!r}.")
        self.format: Float = _FORMATS[form]
        self.kind = self.format.storage
        self.keep = dict(keep or {})
        self.keep_io = keep_io
        self.data, self.folder, self.budget = data, folder, budget
        self.planned = planned
        self.refused: dict[str, str] = {}
        self.subnormal = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused, self.subnormal = {}, 0
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        opset = model.graph.opset_imports.get("", 0)
        nodes = [node for one in graph.all_graphs(model.graph) for node in one]
        halves.complete(nodes)
        peaks = self._peaks(model)
        kept: set[ir.Node] = set()
        for node in nodes:
            floats = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == _FLOAT]
            if floats and (reason := self._reason(node, floats, peaks, opset)) is not None:
                kept.add(node)
                self.refused[graph.label(node)] = reason
                kernel: Kernel | None = node.meta.get(KERNEL)
                if kernel is not None and kernel.form is Form.HALF:
                    del node.meta[KERNEL]
                if KERNEL not in node.meta:
                    node.meta[REASON] = reason
            elif floats and node.graph is not model.graph:
                # Annotation decides about the main graph alone; bodies follow it.
                node.meta[KERNEL] = Kernel((node.op_type,), {}, form=Form.HALF, scheme=self.format.name)
        _Rewriting(self, model, nodes, kept, peaks, opset).run()
        for value in peaks:
            value.meta.pop(STATISTICS, None)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)

    def _peaks(self, model: ir.Model) -> dict[ir.Value, Peak]:
        """How far each float value of the main graph reaches on the data."""
        if self.data is None:
            return {}
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        found = {value: Peak() for value in values if value.dtype == _FLOAT and not value.is_initializer()}
        for value, peak in found.items():
            value.meta.setdefault(STATISTICS, {})[_PEAK] = peak
        calibration.observe(model, self.data, self.folder, self.budget)
        return found

    def _reason(
        self, node: ir.Node, floats: Iterable[ir.Value], peaks: Mapping[ir.Value, Peak], opset: int
    ) -> str | None:
        if self.planned and REASON in node.meta and KERNEL not in node.meta:
            return str(node.meta[REASON])
        for key in (node.name or "", node.op_type):
            if key in self.keep:
                return self.keep[key]
        for value in floats:
            peak = peaks.get(value)
            if peak is not None and peak.broken:
                return f"{value.name!r} is NaN on the data"
            if peak is not None and peak.largest > self.format.highest:
                reach = f"{value.name!r} reaches {peak.largest:.3g} on the data"
                return f"{reach}, and {self.format.name} only {self.format.highest:.5g}"
            array = graph.constant(value)
            if array is not None:
                size = np.abs(array)
                # Masks, and infinity, are told apart from weights that are too large.
                largest = float(size.max(initial=0.0, where=size < halves.MASK))
                del array, size
                graph.release(value)
                if largest > self.format.highest:
                    return f"the constant {value.name!r} reaches {largest:.3g}"
        return halves.refusal(node, self.kind, opset)


class _Rewriting:
    """One conversion, its Casts and constants shared between all that read them."""

    def __init__(
        self,
        parent: ToHalf,
        model: ir.Model,
        nodes: list[ir.Node],
        kept: set[ir.Node],
        peaks: Mapping[ir.Value, Peak],
        opset: int,
    ):
        self.parent, self.model, self.nodes, self.kept, self.peaks, self.opset = (
            parent, model, nodes, kept, peaks, opset,
        )  # fmt: skip
        self.kind, self.format = parent.kind, parent.format
        self.names = graph.value_names(model.graph)
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.masked = {value for value, peak in peaks.items() if peak.masked}

    def run(self) -> None:
        """Types of values first, then each input in the type that its node wants."""
        main = self.model.graph
        readers = {node: self._wanted(node) for node in self.nodes}
        outputs = list(main.outputs)
        # What was in 16 bits before is not ours to change.
        floats = {value for one in graph.all_graphs(main) for value in one.outputs if value.dtype == _FLOAT}
        bodies = [(body, node not in self.kept) for node in self.nodes for body in _bodies(node)]
        for one in [*(body for body, halved in bodies if halved), *([] if self.parent.keep_io else [main])]:
            for value in one.inputs:
                self._change(value)
        for node in self.nodes:
            if node not in self.kept:
                halves.retype(node, self.kind, self.format.highest)
                for value in node.outputs:
                    self._change(value)
        for node, wanted in readers.items():
            for position, kind in wanted.items():
                read = node.inputs[position]
                if read is not None:
                    node.replace_input_with(position, self._in(read, kind))
        for body, halved in bodies:
            for position, value in enumerate(body.outputs):
                if value in floats:
                    # Bodies of what stays in float32 meet it in float32.
                    body.outputs[position] = self._in(value, self.kind if halved else _FLOAT)
        for position, value in enumerate(outputs):
            if value not in floats:
                continue
            if value.dtype == self.kind and self.parent.keep_io:
                self._keep_output(position, value)
            elif value.dtype == _FLOAT and not self.parent.keep_io:
                self._convert_output(position, value)

    def _wanted(self, node: ir.Node) -> dict[int, ir.DataType]:
        """Type of each float input."""
        floats = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == _FLOAT]
        if node in self.kept:
            return dict.fromkeys(floats, _FLOAT)
        halved = halves.inputs(node, self.kind, self.opset)
        return {i: self.kind if i in halved else _FLOAT for i in floats}

    def _change(self, value: ir.Value) -> None:
        if value.dtype == _FLOAT and not value.is_initializer():
            value.type = ir.TensorType(self.kind)

    def _in(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """`value` in `kind`: itself, a converted constant, or a Cast after the node that makes it."""
        if value.dtype == kind:
            return value
        if (value, kind) not in self.made:
            if graph.has_constant(value) and kind == self.kind:
                self.made[value, kind] = self._constant(value)
            else:
                self.made[value, kind] = self._cast(value, kind)
        return self.made[value, kind]

    def _constant(self, value: ir.Value) -> ir.Value:
        home = value.graph
        assert isinstance(home, ir.Graph)
        array = graph.constant(value)
        assert array is not None
        if array.size > 1:
            self.parent.subnormal += Reach.of(array, self.format).subnormal
        shape = tuple(array.shape)
        del array
        graph.release(value)
        kind, highest = self.kind, self.format.highest
        name = graph.fresh_name(f"{value.name}_{self.format.name}", self.names)
        return weights.derived(home, value, lambda a: halves.saturated(a, kind, highest), kind, shape, name)

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        producer, home = value.producer(), value.graph
        assert isinstance(home, ir.Graph)
        source = value
        after = producer
        if value in self.masked and kind == self.kind:
            # A mask beyond the range would become infinite on the way.
            bounds: list[ir.Value | None] = []
            for sign, word in ((-1.0, "low"), (1.0, "high")):
                name = graph.fresh_name(f"{value.name}_{word}", self.names)
                bound = ir.Tensor(np.array(sign * self.format.highest / 2, np.float32))
                bounds.append(graph.add_initializer(home, bound, name))
            source = self._after(home, after, "Clip", [value, *bounds], value, _FLOAT, ())
            after = source.producer()
        return self._after(home, after, "Cast", [source], value, kind, (ir.AttrInt64("to", int(kind)),))

    def _after(
        self,
        home: ir.Graph,
        after: ir.Node | None,
        operator: str,
        inputs: list[ir.Value | None],
        like: ir.Value,
        kind: ir.DataType,
        attributes: tuple[ir.Attr, ...],
    ) -> ir.Value:
        name = graph.fresh_name(f"{like.name}_{operator}", self.names)
        node = ir.Node("", operator, inputs, attributes=attributes, name=name)
        node.meta[REASON] = _CROSSING.format(self.format.name)
        result = node.outputs[0]
        result.name = graph.fresh_name(f"{name}_output", self.names)
        result.type, result.shape = ir.TensorType(kind), like.shape
        graph.insert_behind(home, after, node)
        return result

    def _keep_output(self, position: int, value: ir.Value) -> None:
        """The float32 output keeps its name; what makes it gets another."""
        main = self.model.graph
        name = value.name
        if value.is_graph_input():
            return
        value.name = graph.fresh_name(f"{name}_{self.format.name}", self.names)
        result = self._cast(value, _FLOAT)
        result.name = name
        main.outputs[position] = result

    def _convert_output(self, position: int, value: ir.Value) -> None:
        name = value.name
        result = self._cast(value, self.kind)
        value.name = graph.fresh_name(f"{name}_fp32", self.names)
        result.name = name
        self.model.graph.outputs[position] = result


def _bodies(node: ir.Node) -> list[ir.Graph]:
    """The bodies of an If, Loop or Scan."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found
