"""Einsum(x, W) -> MatMul(x, W) with transposes around it, W the constant weights of experts.

How many write a mixture of experts ("teh,ekh->tek"); as a product it is found by what comes later (`SplitExperts`).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import experts, graph
from qgraph.pieces import Pieces, dims
from qgraph.targets import Target

__all__ = ["PlainEinsum"]


class PlainEinsum(ir.passes.InPlacePass):
    """Products of experts look like products.

    Refused: other than two operands, or one sum; weights whose last two dimensions are not the sum and what comes out
    of it; labels that are repeated or left out (...); targets without MatMulNBits among their fast operators.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if "MatMulNBits" not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        main = model.graph
        found = [(n, form) for n in main if graph.is_standard(n, "Einsum") and (form := _form(n)) is not None]
        new = Pieces(main) if found else None
        for node, form in found:
            if new is not None:
                new.at = node
                _write(new, node, form)
        if found:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


@dataclasses.dataclass(frozen=True)
class _Form:
    """An equation of a product.

    Attributes:
        x: the activation.
        weight: what it is multiplied with.
        own: labels of x.
        order: labels of x as the product wants them, the sum last; "1" where it has one for a dimension of the weight,
            or for rows.
        turned: whether the sum runs along the weight's last dimension.
        made: labels of the product, "1" for the row that x has no label for.
        wanted: labels of the result.
    """

    x: ir.Value
    weight: ir.Value
    own: str
    order: str
    turned: bool
    made: str
    wanted: str


def _form(node: ir.Node) -> _Form | None:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, wanted = equation.partition("->")
    labels = left.split(",")
    if not arrow or len(labels) != 2 or len(node.inputs) != 2:
        return None
    for position in (0, 1):
        x, weight, a, b = node.inputs[position], node.inputs[1 - position], labels[position], labels[1 - position]
        if x is None or weight is None or not graph.is_float(x) or x.shape is None or weight.shape is None:
            continue
        if experts.table(x, weight) is not None and not x.is_initializer():
            return _aligned(x, weight, a, b, wanted)
    return None


def _aligned(x: ir.Value, weight: ir.Value, a: str, b: str, wanted: str) -> _Form | None:
    plain = all(part.isalpha() and len(set(part)) == len(part) for part in (a, b, wanted))
    sums = [label for label in a if label in b and label not in wanted]
    if not plain or len(sums) != 1 or set(wanted) != set(a + b) - set(sums) or len(dims(x)) != len(a):
        return None
    if len(b) < 3 or len(dims(weight)) != len(b) or sums[0] not in b[-2:]:
        return None
    turned = b[-1] == sums[0]
    column = b[-2] if turned else b[-1]
    if column in a:
        return None
    free = [label for label in a if label not in b]
    lead = "".join(free[:-1]) + "".join(label if label in a else "1" for label in b[:-2])
    row = free[-1] if free else "1"
    made = "".join(free[:-1]) + b[:-2] + row + column
    return _Form(x, weight, a, lead + row + sums[0], turned, made, wanted)


def _write(new: Pieces, node: ir.Node, form: _Form) -> None:
    x, weight = form.x, form.weight
    order = [form.own.index(label) for label in form.order if label != "1"]
    if order != sorted(order):
        x = new.op("Transpose", [x], [dims(x)[i] for i in order], {"perm": order})
    ones = [i for i, label in enumerate(form.order) if label == "1"]
    if ones:
        left = iter(dims(x))
        x = new.op("Unsqueeze", [x, new.ints(ones)], [1 if label == "1" else next(left) for label in form.order])
    sizes = dims(weight)
    if form.turned:
        swap = [*range(len(sizes) - 2), len(sizes) - 1, len(sizes) - 2]
        weight = new.op("Transpose", [weight], [sizes[i] for i in swap], {"perm": swap})
    # The product has the weight's leading dimensions, where it is not x that has them.
    have = dict(zip(form.made[len(form.made) - len(sizes) : -2], sizes[:-2], strict=True))
    have |= {label: size for label, size in zip(form.order, dims(x), strict=True) if label != "1"} | {"1": 1}
    have[form.made[-1]] = sizes[-2] if form.turned else sizes[-1]
    product = ir.Node("", "MatMul", [x, weight], name=graph.fresh_name(f"{graph.label(node)}_product", new.names))
    product.metadata_props.update(node.metadata_props)
    graph.merge_origins(product, node)
    y = new.place(product, [[have[label] for label in form.made]], ir.DataType.FLOAT)[0]
    labels = form.made
    if "1" in labels:
        labels = labels.replace("1", "")
        y = new.op("Squeeze", [y, new.ints([-2])], [have[label] for label in labels])
    turn = [labels.index(label) for label in form.wanted]
    if turn != sorted(turn):
        y = new.op("Transpose", [y], [have[label] for label in form.wanted], {"perm": turn})
    last = y.producer()
    assert last is not None
    new.main.remove(last)
    graph.replace_node(new.main, node, last)
