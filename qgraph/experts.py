"""Products with a constant weight for each expert: where they are in a graph, and one expert's weight at a time.

A mixture of experts keeps its weights in tables [experts, K, N] or [experts, N, K]. A product meets all of them
(`MatMul(x, table)`), or one of them (`MatMul(x, Gather(table, 3))`), or those that a router picked for each row
(`MatMul(x, Gather(table, experts))`), with a Transpose in between where the table lies the other way, and in either
order of its inputs.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from qgraph import graph, widened

__all__ = ["PUT_BACK", "Experts", "find", "table"]

PUT_BACK = "qgraph.put_back"
"""Key in `Node.meta` of a Gather: it puts rows that were sorted by expert back into their places."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """A product of an activation and the weights of experts.

    Attributes:
        source: the activation [..., T, K]; [..., K, T] where the weight is on the left.
        table: a constant [*batch, K, N], or [*batch, N, K] where it is turned.
        batch: leading dimensions of the table; none where the product meets one expert.
        turned: whether the sum runs along the last dimension of the table.
        left: whether the weight is on the left of the product.
        ids: int32 or int64 [rows...], the expert of each row; None where nothing is picked at run time.
        nested: whether `ids` has a last dimension more, of one.
        first: the expert that the product meets, or 0 where it meets all.
    """

    source: ir.Value
    table: ir.Value
    batch: tuple[int, ...]
    turned: bool
    left: bool
    ids: ir.Value | None = None
    nested: bool = False
    first: int = 0

    @property
    def count(self) -> int:
        """How many experts there are."""
        return math.prod(self.batch)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's weight, as it lies in the table."""
        return (graph.run_shape(self.table) or ())[-2:]

    @property
    def sizes(self) -> tuple[int, int]:
        """(K, N)."""
        one, other = self.shape
        return (other, one) if self.turned else (one, other)

    def weight(self, number: int) -> ir.TensorProtocol:
        """The weight of one expert, [K, N] or [N, K] as it lies in the table; nothing is read or copied."""
        tensor = self.table.const_value
        assert tensor is not None, "the table is a constant"
        size = math.prod(self.shape) * tensor.nbytes // max(1, tensor.size)
        if isinstance(tensor, ir.ExternalTensor):
            return widened.window(tensor, number * size, size, ir.Shape(self.shape), str(tensor.name))

        def window() -> ir.TensorProtocol:
            return ir.Tensor(tensor.numpy().reshape(-1, *self.shape)[number], name=tensor.name)

        return ir.LazyTensor(window, tensor.dtype, ir.Shape(self.shape), name=str(tensor.name))


def find(node: ir.Node) -> Experts | None:
    """What `node` is, if it is a product of an activation and the constant weights of experts."""
    if not graph.is_standard(node, "MatMul") or len(node.inputs) != 2:
        return None
    for position in (1, 0):
        source, weight = node.inputs[1 - position], node.inputs[position]
        if source is None or source.is_initializer() or not graph.is_float(source):
            continue
        found = table(source, weight, left=position == 0)
        if found is not None:
            return found
    return None


def table(source: ir.Value, value: ir.Value | None, left: bool = False) -> Experts | None:
    """What the product of `source` and `value` is, if `value` is made of the constant weights of experts."""
    picked: ir.Node | None = None
    turned = left
    while value is not None and not graph.has_constant(value):
        maker = graph.producer(value, "Transpose", "Gather", "GatherND")
        # What others read, too, is computed in any case.
        if maker is None or len(value.uses()) != 1 or value.is_graph_output() or not maker.inputs:
            return None
        if maker.op_type == "Transpose":
            order = list(maker.attributes.get_ints("perm", []))
            same, rank = list(range(len(order))), len(order)
            if rank < 2 or order not in (same, [*same[:-2], rank - 1, rank - 2]):
                return None
            turned ^= order != same
        elif picked is None and _picks(maker):
            picked = maker
        else:
            return None
        value = maker.inputs[0]
    if value is None or not graph.has_constant(value) or not graph.is_float(value):
        return None
    shape = graph.run_shape(value) or ()
    if len(shape) < 3 or 0 in shape or (picked is not None and len(shape) != 3):
        return None
    if picked is None:
        return Experts(source, value, shape[:-2], turned, left)
    ids = picked.inputs[1]
    number = graph.constant_scalar(ids)
    if number is not None:
        # Counted from the end, it may be negative.
        return Experts(source, value, (), turned, left, first=int(number) % shape[0])
    return Experts(source, value, shape[:-2], turned, left, ids, picked.op_type == "GatherND")


def _picks(node: ir.Node) -> bool:
    """Whether it picks one weight, known or not, or one for each of several places."""
    ids = node.inputs[1]
    if ids is None or ids.shape is None:
        return False
    rank, known = len(ids.shape), graph.has_constant(ids)
    if node.op_type == "Gather":
        return not node.attributes.get_int("axis", 0) and known == (rank == 0)
    return not node.attributes.get_int("batch_dims", 0) and not known and rank > 1 and ids.shape[-1] == 1
