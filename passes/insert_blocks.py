"""MatMul(x, W) -> com.microsoft.MatMulNBits(x, codes of W, scales, zero points), W in blocks along the sum;
Gather(W, ids) -> Reshape(com.microsoft.GatherBlockQuantized(the same codes, ids, scales, zero points)) of a tied W.

The operator's own form, see `qgraph.blocks`. Accuracy level 4 makes it compute in int8 (each block of each row of x
gets a scale of its own); at the other levels weights of 2 and of 8 bits are tens of times slower than float. A Gemm's
bias becomes the operator's. An embedding that is the output head, too, is quantized once, for both. Codes come from the
algorithms before this pass, or are rounded to nearest as the file is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, ternary, weights
from qgraph.blocks import BLOCKS, Blocks, unpack
from qgraph.held import HELD, Held
from qgraph.spec import PerBlock, QuantSpec
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["InsertBlocks"]

_LEVEL = 4


class InsertBlocks(ir.passes.InPlacePass):
    """Writes the products that annotation planned with weights in blocks.

    Refused: nothing; what cannot be written so was not planned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [n for n in main if weights.is_product(n) and _is_planned(n)]
        names = graph.value_names(main)
        made: dict[tuple[object, ...], _Written] = {}
        for node in planned:
            _write(main, node, names, made)
        if planned:
            tables = {one.weight: one for one in made.values() if one.rows}
            for node in [n for n in main if graph.is_standard(n, "Gather") and _is_planned(n)]:
                found = tables.get(node.inputs[0]) if node.inputs[0] is not None else None
                if found is not None and found.is_table(node):
                    _pick(main, node, names, found)
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


@dataclasses.dataclass(frozen=True)
class _Written:
    """A weight in blocks, as constants of the graph.

    Attributes:
        weight: the float weight.
        inputs: codes, scales and, where there are some, zero points, as MatMulNBits takes them.
        zero_point: zero points as GatherBlockQuantized takes them.
        size: of the blocks.
        inner: size of the dimension summed over.
        rows: whether the rows of the weight are what is in blocks.
    """

    weight: ir.Value
    inputs: list[ir.Value | None]
    zero_point: ir.Value | None
    size: int
    inner: int
    rows: bool

    def is_table(self, node: ir.Node) -> bool:
        """Whether the Gather `node` can pick from it."""
        ids = node.inputs[1]
        whole = self.rows and self.inner % self.size == 0 and not node.attributes.get_int("axis", 0)
        return whole and ids is not None and ids.shape is not None


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.WEIGHTS


def _write(main: ir.Graph, node: ir.Node, names: set[str], made: dict[tuple[object, ...], _Written]) -> None:
    kernel: Kernel = node.meta[KERNEL]
    weight = node.inputs[1]
    assert kernel.weight is not None and weight is not None
    spec = kernel.weight[1]
    assert isinstance(spec.granularity, PerBlock)
    axis, size, bits = spec.granularity.axis, spec.granularity.size, spec.format.storage.bitwidth
    shape = graph.run_shape(weight) or (0, 0)
    inner, columns = shape[axis], shape[1 - axis]
    chosen: Blocks | None = node.meta.get(BLOCKS)
    held: Held | None = weight.meta.get(HELD)
    if chosen is None and held is not None and (held.blocks.bits, held.blocks.size) == (bits, size):
        chosen = held.blocks
    key = (weight, spec) if chosen is None else (chosen,)
    if key not in made:
        made[key] = _constants(main, weight, spec, chosen, (columns, inner), names)
    inputs: list[ir.Value | None] = [node.inputs[0], *made[key].inputs]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [weights.flat(main, bias, names)]
    attributes = {"K": inner, "N": columns, "bits": bits, "block_size": size, "accuracy_level": _LEVEL}
    new = ir.Node(
        "com.microsoft", "MatMulNBits", inputs, attributes=[ir.AttrInt64(k, v) for k, v in attributes.items()]
    )
    graph.replace_node(main, node, new)
    new.meta[KERNEL] = kernel
    if (grid := ternary.grid_of(weight)) is not None:
        new.meta[ternary.GRID] = grid


def _constants(
    main: ir.Graph, weight: ir.Value, spec: QuantSpec, chosen: Blocks | None, shape: tuple[int, int], names: set[str]
) -> _Written:
    """Codes, scales and, where the spec is affine, zero points; evaluated as the file is written."""
    assert isinstance(spec.granularity, PerBlock)
    bits, size = spec.format.storage.bitwidth, spec.granularity.size
    columns, count = shape[0], -(-shape[1] // size)
    source = weights.Shared(weight, (lambda _: chosen) if chosen is not None else (lambda w: ternary.rounded(w, spec)))
    base = str(weight.name)

    def part(name: str, pick: Callable[[Blocks], NDArray[Any]], dtype: ir.DataType, *shape: int) -> ir.Value:
        return source.part(main, pick, dtype, shape, graph.fresh_name(f"{base}_{name}", names))

    found: list[ir.Value | None] = [
        part("blocks", lambda b: b.codes, ir.DataType.UINT8, columns, count, size * bits // 8),
        part("block_scales", lambda b: b.scale, ir.DataType.FLOAT, columns, count),
    ]
    rows, zero = spec.granularity.axis == 1, None
    if not spec.symmetric:
        found.append(part("block_zero_points", _zero_point, ir.DataType.UINT8, columns, -(-count * bits // 8)))
        if rows and any(graph.is_standard(reader, "Gather") for reader in weight.consumers()):
            zero = part("row_zero_points", _row_zero_point, ir.DataType.UINT8, columns, count, 1)
    return _Written(weight, found, zero, size, shape[1], rows)


def _pick(main: ir.Graph, node: ir.Node, names: set[str], found: _Written) -> None:
    """Rows of the table that a product reads in blocks."""
    kernel: Kernel = node.meta[KERNEL]
    ids, base = node.inputs[1], str(node.name)
    assert ids is not None and ids.shape is not None
    columns, scales = found.inputs[:2]
    last = graph.add_initializer(main, ir.tensor([2]), graph.fresh_name(f"{base}_last", names))
    steps = ir.Node("", "Unsqueeze", [scales, last], name=graph.fresh_name(f"{base}_scales", names))
    sizes = {"gather_axis": 0, "quantize_axis": 2, "block_size": found.size}
    assert kernel.weight is not None and columns is not None
    bits = (graph.run_shape(columns) or (0, 0, 0))[2] * 8 // found.size
    picked = ir.Node(
        "com.microsoft",
        "GatherBlockQuantized",
        [columns, ids, steps.outputs[0], *([] if found.zero_point is None else [found.zero_point])],
        attributes=[ir.AttrInt64(k, v) for k, v in {**sizes, "bits": bits}.items()],
    )
    shape = graph.add_initializer(
        main, ir.tensor([*[0] * len(ids.shape), found.inner]), graph.fresh_name(f"{base}_shape", names)
    )
    joined = ir.Node("", "Reshape", [picked.outputs[0], shape], name=graph.fresh_name(f"{base}_rows", names))
    for number, one in enumerate((steps, picked)):
        one.outputs[0].name = graph.fresh_name(f"{base}_part_{number}", names)
        one.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        main.insert_before(node, one)
    for one in (steps, joined):
        one.meta[REASON] = f"part of the embedding {base}"
    graph.replace_node(main, node, joined)
    picked.name = base
    picked.meta[KERNEL] = dataclasses.replace(kernel, operators=("GatherBlockQuantized",))


def _zero_point(made: Blocks) -> NDArray[Any]:
    assert made.zero_point is not None, "the spec is affine"
    return made.zero_point


def _row_zero_point(made: Blocks) -> NDArray[Any]:
    """One byte for each."""
    return unpack(_zero_point(made), made.bits)[:, : made.scale.shape[1], None]
