"""MatMul(x, W [E, K, N]) -> Concat(MatMul(part of x, W[0]), MatMul(part of x, W[1]), ...), each to be quantized;
MatMul(x, Gather(W, experts)) -> the same on the rows of x sorted by expert, and the results put back in their order.

The runtime has no product with a table of weights in blocks, but one for each of its experts. Instead of copying the
weights that a router picked (16 MB for each token and expert of 2048 x 2048), rows go to the weights: an expert that
nobody picked multiplies nothing. That is 15 to 40 times as fast as float for such sizes (tools/experts_products.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import experts, graph
from qgraph.experts import Experts
from qgraph.pieces import Pieces, dims, free
from qgraph.rules import FLOAT, Rules
from qgraph.spec import Mixture, Scheme
from qgraph.targets import REASON, Form, Target

__all__ = ["SplitExperts"]

_INT64 = ir.DataType.INT64
_EXACT = {"allowzero": 1}


class SplitExperts(ir.passes.InPlacePass):
    """Products of experts become one product for each, called `<name>_expert_<number>`, where weights go into blocks.

    Weights stay where they are, on disk or in memory: each product has a window of the table.

    Refused: products that the target has no faster kernel for; activations of unknown rank; picked experts whose
    activation has more dimensions than the experts have. Other targets than those that have MatMulNBits among their
    fast operators.

    Args:
        target: knows the kernels and costs.
        scheme: the number formats in question.
        keep_float: patterns of nodes that stay whole and in float.
        choices: pattern -> scheme or "float", see `Rules`.

    Attributes:
        refused: node -> why it is left whole.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme | Mixture,
        keep_float: Iterable[str] = (),
        choices: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.target = target
        self.rules = Rules(target, scheme, {**(choices or {}), **dict.fromkeys(keep_float, FLOAT)})
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused = {}
        if "MatMulNBits" not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        main = model.graph
        found = [(node, one) for node in main if (one := experts.find(node)) is not None]
        writer = _Writer(main) if found else None
        changed = False
        for node, one in found:
            reason = _unfit(one) or self._slower(node, one)
            if reason is not None:
                self.refused[graph.label(node)] = node.meta[REASON] = f"its experts stay together: {reason}"
            elif writer is not None:
                writer.split(node, one)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    def _slower(self, node: ir.Node, one: Experts) -> str | None:
        """Why the product of one expert would not be quantized."""
        inner, columns = one.sizes
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
        if (rows := _rows(one)) is not None:
            x.meta[graph.RUN_SHAPE] = (rows, inner)
        weight = ir.Value(name="W", const_value=one.weight(one.first), type=x.type, shape=ir.Shape(one.shape))
        product = _product(x, weight, one.turned, node.name)
        product.meta[graph.ORIGINS] = node.meta.get(graph.ORIGINS, ())
        ir.Graph([x], product.outputs, nodes=[product], initializers=[weight], name="one_expert")
        kernels, reason = self.rules.kernels(product)
        blocks = [kernel for kernel in kernels.values() if kernel.form is Form.WEIGHTS]
        if not blocks:
            return reason
        if all(kernel.integer_seconds >= kernel.float_seconds for kernel in blocks):
            return f"for one expert, [{inner}, {columns}], the kernel with weights in blocks is no faster"
        return None


def _rows(one: Experts) -> int | None:
    """Rows that an expert multiplies in a run, as far as is known."""
    seen = graph.element_count(one.source)
    if one.ids is None:
        shape = graph.run_shape(one.source)
        return None if shape is None else max(1, shape[-1] if one.left else (shape[-2] if len(shape) > 1 else 1))
    picked = graph.element_count(one.ids)
    return None if picked is None or seen is None else max(1, picked // one.count)


def _unfit(one: Experts) -> str | None:
    if one.source.shape is None:
        return "the rank of its activation is not known"
    rank = len(one.source.shape)
    if one.left and rank < 2:
        return "its activation is a vector"
    if one.ids is not None and rank > len(one.ids.shape or ()) + 2 - one.nested:
        return "its activation has more dimensions than the experts that are picked for it"
    if one.ids is not None and rank < 2:
        return "its activation is a vector"
    return None


def _product(x: ir.Value, weight: ir.Value, turned: bool, name: str | None) -> ir.Node:
    if not turned:
        return ir.Node("", "MatMul", [x, weight], name=name)
    return ir.Node("com.microsoft", "FusedMatMul", [x, weight], [ir.AttrInt64("transB", 1)], name=name)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sorted:
    """How rows go to the experts that were picked for them.

    Attributes:
        order: row of x that stands in each place when they are sorted.
        back: place of each row of x.
        counts: rows of each expert.
        rows: how many there are in all, [1].
    """

    order: ir.Value
    back: ir.Value
    counts: ir.Value
    rows: ir.Value


class _Writer:
    """Writes the products of experts into a graph; what several of them read is written once."""

    def __init__(self, main: ir.Graph):
        self.new = Pieces(main)
        self._windows: dict[tuple[ir.Value, int], ir.Value] = {}
        self._turned: dict[ir.Value, ir.Value] = {}
        self._parts: dict[tuple[object, ...], Sequence[ir.Value]] = {}
        self._sorted: dict[tuple[ir.Value, int], _Sorted] = {}

    def split(self, node: ir.Node, one: Experts) -> None:
        """Replace `node`, which is what `one` says."""
        self.new.at = node
        x = one.source
        if one.left:
            x = self._turned.get(x) or self._turned.setdefault(x, self._swapped(x))
        y = self._all(one, x) if one.ids is None else self._picked(one, self._ids(one.ids, one.nested), x)
        y = self._swapped(y) if one.left else y
        last = y.producer()
        assert last is not None
        self.new.main.remove(last)
        graph.replace_node(self.new.main, node, last)

    # -- each expert has rows of its own, or all have the same ones

    def _all(self, one: Experts, x: ir.Value) -> ir.Value:
        axes, vector = len(one.batch), len(dims(x)) == 1
        missing = axes + 2 - len(dims(x)) - vector
        if vector:
            x = self.new.op("Unsqueeze", [x, self.new.ints([0])], [1, *dims(x)])
        if missing > 0:
            x = self.new.op("Unsqueeze", [x, self.new.ints(range(missing))], [*[1] * missing, *dims(x)])
        sizes = dims(x)
        if any(size > 1 and dim not in (1, size) for dim, size in zip(sizes[-axes - 2 : -2], one.batch, strict=True)):
            # That dimension is one, or that of the experts; only a run tells.
            wide = [b if b > 1 else d for b, d in zip(one.batch, sizes[-axes - 2 : -2], strict=True)]
            x = self.new.op("Expand", [x, self.new.ints([*one.batch, 1, 1])], [*sizes[: -axes - 2], *wide, *sizes[-2:]])
        y = self._level(one, x, 0, one.first)
        return self.new.op("Squeeze", [y, self.new.ints([-2])], [*dims(y)[:-2], dims(y)[-1]]) if vector else y

    def _level(self, one: Experts, x: ir.Value, depth: int, number: int) -> ir.Value:
        """The products of the experts from `number` on that have their first `depth` indices in common."""
        if depth == len(one.batch):
            return self._expert(one, x, number)
        size, axis = one.batch[depth], depth - len(one.batch) - 2
        if size == 1:
            return self._level(one, x, depth + 1, number)
        parts: Sequence[ir.Value] = [x] * size if dims(x)[axis] == 1 else self._split(x, axis, size)
        step = math.prod(one.batch[depth + 1 :])
        made = [self._level(one, part, depth + 1, number + i * step) for i, part in enumerate(parts)]
        sizes = dims(made[0])
        sizes[axis] = size
        return self.new.op("Concat", made, sizes, {"axis": axis})

    def _split(self, x: ir.Value, axis: int, size: int) -> Sequence[ir.Value]:
        if (x, axis) not in self._parts:
            sizes = dims(x)
            sizes[axis] = 1
            self._parts[x, axis] = self.new.ops("Split", [x], [sizes] * size, {"axis": axis, "num_outputs": size})
        return self._parts[x, axis]

    # -- each row has an expert that was picked for it

    def _picked(self, one: Experts, ids: ir.Value, x: ir.Value) -> ir.Value:
        axes = len(dims(ids))
        if len(dims(x)) != axes + 2 or not all(map(_same, dims(x)[:-2], dims(ids))):
            # Each as large as the other, as the product would make them.
            wide = self.new.op("Concat", [self.new.shape(ids), self.new.ints([1, 1])], [axes + 2], {"axis": 0}, _INT64)
            x = self.new.op("Expand", [x, wide], [*free(axes), *dims(x)[-2:]])
            ids = self.new.op("Expand", [ids, self.new.shape(x, end=-2)], free(axes), {}, ids.dtype)
        plan = self._order(ids, one.count)
        key = (one.source, one.left, plan.order)
        if key not in self._parts:
            flat = x
            if axes > 1:
                pair = [plan.rows, self.new.shape(x, start=-2)]
                shape = self.new.op("Concat", pair, [3], {"axis": 0}, _INT64)
                flat = self.new.op("Reshape", [x, shape], [*free(1), *dims(x)[-2:]], _EXACT)
            near = self.new.op("Gather", [flat, plan.order], dims(flat))
            sizes = [*free(1), *dims(flat)[1:]]
            self._parts[key] = self.new.ops("Split", [near, plan.counts], [sizes] * one.count, {"axis": 0})
        made = [self._expert(one, part, number) for number, part in enumerate(self._parts[key])]
        sizes = [*free(1), *dims(made[0])[1:]]
        y = self.new.op("Gather", [self.new.op("Concat", made, sizes, {"axis": 0}), plan.back], sizes)
        if (last := y.producer()) is not None:
            last.meta[experts.PUT_BACK] = True
        if axes > 1:
            pair = [self.new.shape(x, end=-1), self.new.ints([one.sizes[1]])]
            shape = self.new.op("Concat", pair, [axes + 2], {"axis": 0}, _INT64)
            y = self.new.op("Reshape", [y, shape], [*dims(x)[:-1], one.sizes[1]], _EXACT)
        return y

    def _ids(self, ids: ir.Value, nested: bool) -> ir.Value:
        if not nested:
            return ids
        if ids not in self._turned:
            self._turned[ids] = self.new.op("Squeeze", [ids, self.new.ints([-1])], dims(ids)[:-1], {}, ids.dtype)
        return self._turned[ids]

    def _order(self, ids: ir.Value, count: int) -> _Sorted:
        if (ids, count) not in self._sorted:
            rows = free(1)
            flat = self.new.op("Reshape", [ids, self.new.ints([-1])], rows, {}, ids.dtype)
            flat = self.new.op("Cast", [flat], rows, {"to": int(_INT64)}, _INT64)
            # They may be counted from the end.
            flat = self.new.op("Mod", [flat, self.new.ints(count)], rows, {}, _INT64)
            size, smallest = self.new.shape(flat), {"axis": 0, "largest": 0}
            order = self.new.ops("TopK", [flat, size], [rows] * 2, smallest, _INT64)[1]
            back = self.new.ops("TopK", [order, size], [rows] * 2, smallest, _INT64)[1]
            hot = [flat, self.new.ints(count), self.new.ints([0, 1])]
            one_hot = self.new.op("OneHot", hot, [*rows, count], {"axis": -1}, _INT64)
            counts = self.new.op("ReduceSum", [one_hot, self.new.ints([0])], [count], {"keepdims": 0}, _INT64)
            self._sorted[ids, count] = _Sorted(order, back, counts, size)
        return self._sorted[ids, count]

    # -- pieces

    def _expert(self, one: Experts, x: ir.Value, number: int) -> ir.Value:
        if (one.table, number) not in self._windows:
            name = graph.fresh_name(f"{one.table.name}_{number}", self.new.names)
            self._windows[one.table, number] = graph.add_initializer(self.new.main, one.weight(number), name)
        name = self.new.name(f"expert_{number}")
        product = _product(x, self._windows[one.table, number], one.turned, name)
        product.metadata_props.update(self.new.at.metadata_props)
        graph.merge_origins(product, self.new.at)
        if one.turned:
            self.new.main.opset_imports.setdefault("com.microsoft", 1)
        return self.new.place(product, [[*dims(x)[:-1], one.sizes[1]]], ir.DataType.FLOAT)[0]

    def _swapped(self, x: ir.Value) -> ir.Value:
        order = list(range(len(dims(x))))
        order[-2:] = order[:-3:-1]
        return self.new.op("Transpose", [x], [dims(x)[i] for i in order], {"perm": order})


def _same(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are known to be the same."""
    known = isinstance(one, int) or one.value is not None
    return known and one == other
