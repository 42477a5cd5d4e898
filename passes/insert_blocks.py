"""MatMul(x, W) -> com.microsoft.MatMulNBits(x, codes of W, scales, zero points), W in blocks along the sum.

The operator's own form, see `qgraph.blocks`. Accuracy level 4 makes it compute in int8 (each block of each row of x
gets a scale of its own); at the other levels weights of 2 and of 8 bits are tens of times slower than float. A Gemm's
bias becomes the operator's. Codes come from the algorithms before this pass, or are rounded to nearest as the file is
written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import blocks, graph, weights
from qgraph.blocks import BLOCKS, Blocks
from qgraph.spec import PerBlock, QuantSpec
from qgraph.targets import KERNEL, Form, Kernel

__all__ = ["InsertBlocks"]

_LEVEL = 4


class InsertBlocks(ir.passes.InPlacePass):
    """Writes the products that annotation planned with weights in blocks.

    Refused: nothing; what cannot be written so was not planned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [n for n in main if graph.is_standard(n, "MatMul", "Gemm") and _is_planned(n)]
        names = graph.value_names(main)
        made: dict[tuple[object, ...], list[ir.Value | None]] = {}
        for node in planned:
            _write(main, node, names, made)
        if planned:
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.WEIGHTS


def _write(
    main: ir.Graph, node: ir.Node, names: set[str], made: dict[tuple[object, ...], list[ir.Value | None]]
) -> None:
    kernel: Kernel = node.meta[KERNEL]
    weight = node.inputs[1]
    assert kernel.weight is not None and weight is not None
    spec = kernel.weight[1]
    assert isinstance(spec.granularity, PerBlock)
    axis, size, bits = spec.granularity.axis, spec.granularity.size, spec.format.storage.bitwidth
    shape = graph.run_shape(weight) or (0, 0)
    inner, columns = shape[axis], shape[1 - axis]
    chosen: Blocks | None = node.meta.get(BLOCKS)
    key = (weight, spec) if chosen is None else (chosen,)
    if key not in made:
        made[key] = _constants(main, weight, spec, chosen, (columns, inner), names)
    inputs: list[ir.Value | None] = [node.inputs[0], *made[key]]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [weights.flat(main, bias, names)]
    attributes = {"K": inner, "N": columns, "bits": bits, "block_size": size, "accuracy_level": _LEVEL}
    new = ir.Node(
        "com.microsoft", "MatMulNBits", inputs, attributes=[ir.AttrInt64(k, v) for k, v in attributes.items()]
    )
    graph.replace_node(main, node, new)
    new.meta[KERNEL] = kernel


def _constants(
    main: ir.Graph, weight: ir.Value, spec: QuantSpec, chosen: Blocks | None, shape: tuple[int, int], names: set[str]
) -> list[ir.Value | None]:
    """Codes, scales and, where the spec is affine, zero points; evaluated as the file is written."""
    assert isinstance(spec.granularity, PerBlock)
    bits, size = spec.format.storage.bitwidth, spec.granularity.size
    columns, count = shape[0], -(-shape[1] // size)
    source = weights.Shared(weight, (lambda _: chosen) if chosen is not None else (lambda w: blocks.nearest(w, spec)))
    base = str(weight.name)

    def part(name: str, pick: Callable[[Blocks], NDArray[Any]], dtype: ir.DataType, *shape: int) -> ir.Value:
        return source.part(main, pick, dtype, shape, graph.fresh_name(f"{base}_{name}", names))

    found: list[ir.Value | None] = [
        part("blocks", lambda b: b.codes, ir.DataType.UINT8, columns, count, size * bits // 8),
        part("block_scales", lambda b: b.scale, ir.DataType.FLOAT, columns, count),
    ]
    if not spec.symmetric:
        found.append(part("block_zero_points", _zero_point, ir.DataType.UINT8, columns, -(-count * bits // 8)))
    return found


def _zero_point(made: Blocks) -> NDArray[Any]:
    assert made.zero_point is not None, "the spec is affine"
    return made.zero_point
