"""MatMul(x, W) -> MatMul(x0, W) + MatMul(Gather(x, channels), Wf), x0 with zeros where a few channels are too loud.

Those channels of x, and their rows of W, stay in float, so that the scale of all others suits them (`qgraph.sides` has
the paper). `Smooth` chooses them, and has put the Mul before the product that makes them zero now.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, weights
from qgraph.biases import bias_of
from qgraph.sides import BESIDE, SIDE, Side, seconds
from qgraph.targets import REASON, Target

__all__ = ["SetAside"]

_WHY = "it computes the few channels that are too loud for the codes of the others"


class SetAside(ir.passes.InPlacePass):
    """Writes what `Smooth` planned, behind `DropFactors`: products that stay in float read their input as it was.

    Refused: nothing; what cannot be set aside was not planned.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        factors = [node for node in main if node.op_type == "Mul" and SIDE in node.meta]
        names = graph.value_names(main) if factors else set[str]()
        for factor in factors:
            _Writer(main, self.target, factor, names).write()
        return ir.passes.PassResult(model, bool(factors))


class _Writer:
    """One Mul and the products behind it."""

    def __init__(self, main: ir.Graph, target: Target, factor: ir.Node, names: set[str]):
        self._main, self._target, self._factor, self._names = main, target, factor, names
        side: Side = factor.meta.pop(SIDE)
        self._channels = side.channels
        by = graph.constant(factor.inputs[1])
        assert by is not None, "Smooth made it"
        self._by: NDArray[np.float32] = by.astype(np.float32)
        self._picked: ir.Value | None = None
        self._made: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def write(self) -> None:
        """The zeros in the Mul, and each product's share in float."""
        products = [node for node, position in self._factor.outputs[0].uses() if position == 0]
        for product in products:
            self._split(product)
        by = self._by.copy()
        by[self._channels] = 0
        base = self._factor.inputs[1]
        assert base is not None
        zeros = graph.add_initializer(self._main, ir.Tensor(by), self._name(f"{base.name}_aside"))
        self._factor.replace_input_with(1, zeros)

    def _split(self, product: ir.Node) -> None:
        weight, source = product.inputs[1], self._factor.inputs[0]
        assert weight is not None and source is not None
        turned = bool(product.attributes.get_int("transB", 0))
        if (weight, turned) not in self._made:
            self._made[weight, turned] = self._weights(weight, turned)
        rest, beside = self._made[weight, turned]
        product.replace_input_with(1, rest)
        adds = bias_of(product)[0]
        last = product if adds is None else adds
        base = product.name or product.outputs[0].name or "product"
        share = ir.Node("", "MatMul", [self._picks(source), beside], name=self._name(f"{base}_aside"))
        whole, alike = last.outputs[0], product.outputs[0]
        made, name = share.outputs[0], whole.name
        made.name, made.type, made.shape = share.name, alike.type, alike.shape
        total = ir.Node("", "Add", [whole, made], name=self._name(f"{base}_whole"))
        result = total.outputs[0]
        result.type, result.shape = whole.type, whole.shape
        # What is known of the sum is what was known of the product: its users, its name, its range and its group.
        result.meta.update(whole.meta)
        if graph.RUN_SHAPE in alike.meta:
            made.meta[graph.RUN_SHAPE] = alike.meta[graph.RUN_SHAPE]
        for key in [key for key in whole.meta if key != graph.RUN_SHAPE]:
            del whole.meta[key]
        ir.convenience.replace_all_uses_with(whole, result, replace_graph_outputs=True)
        total.replace_input_with(0, whole)
        result.name, whole.name = name, self._name(f"{name}_coded")
        self._main.insert_after(last, [share, total])
        for node in (share, total):
            node.meta[REASON], node.meta[BESIDE] = _WHY, 0.0
        share.meta[BESIDE] = seconds(self._target, [product])

    def _weights(self, weight: ir.Value, turned: bool) -> tuple[ir.Value, ir.Value]:
        """(the weight with zeros in the rows of the channels, those rows alone as they were before the Mul)."""
        channels, by = self._channels, self._by
        shape = graph.run_shape(weight)
        assert shape is not None

        def silent(array: NDArray[np.float32]) -> NDArray[np.float32]:
            found = array.copy()
            found[(slice(None), channels) if turned else channels] = 0
            return found

        def loud(array: NDArray[np.float32]) -> NDArray[np.float32]:
            rows = array[:, channels].T if turned else array[channels]
            return np.ascontiguousarray(rows * by[channels, None], np.float32)

        outputs = shape[0] if turned else shape[1]
        kinds = (("rest", silent, shape), ("loud", loud, (len(channels), outputs)))
        rest, beside = (
            weights.derived(self._main, weight, function, ir.DataType.FLOAT, size, self._name(f"{weight.name}_{kind}"))
            for kind, function, size in kinds
        )
        return rest, beside

    def _picks(self, source: ir.Value) -> ir.Value:
        """The channels of `source`, gathered once."""
        if self._picked is None:
            base = self._factor.name or "factor"
            which = ir.tensor(self._channels.astype(np.int64))
            index = graph.add_initializer(self._main, which, self._name(f"{base}_channels"))
            node = ir.Node("", "Gather", [source, index], [ir.AttrInt64("axis", -1)], name=self._name(f"{base}_picked"))
            self._picked = node.outputs[0]
            self._picked.name, self._picked.type = node.name, source.type
            if source.shape is not None:
                self._picked.shape = ir.Shape([*source.shape.dims[:-1], len(self._channels)])
            ran = graph.run_shape(source)
            if ran is not None:
                self._picked.meta[graph.RUN_SHAPE] = (*ran[:-1], len(self._channels))
            node.meta[REASON], node.meta[BESIDE] = _WHY, 0.0
            self._main.insert_before(self._factor, node)
        return self._picked

    def _name(self, wanted: str) -> str:
        return graph.fresh_name(wanted, self._names)
