"""MatMul(x, W) -> com.microsoft.MatMulNBits(x, codes of W, scales), weights quantized in blocks along the sum.

The operator's own form: codes [N, blocks, block bytes] biased to unsigned, scales [N, blocks]. Accuracy level 4 makes
it compute in int8 (each block of each row of x gets a scale of its own); at the other levels eight-bit weights are tens
of times slower than float. A Gemm's bias becomes the operator's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.qparams import QParams, of_blocks, quantize
from qgraph.spec import PerBlock
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
        made: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
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
    main: ir.Graph, node: ir.Node, names: set[str], made: dict[tuple[object, ...], tuple[ir.Value, ir.Value]]
) -> None:
    kernel: Kernel = node.meta[KERNEL]
    weight = node.inputs[1]
    assert kernel.weight is not None and weight is not None
    spec = kernel.weight[1]
    assert isinstance(spec.granularity, PerBlock)
    axis, size, bits = spec.granularity.axis, spec.granularity.size, spec.format.storage.bitwidth
    shape = graph.run_shape(weight) or (0, 0)
    inner, columns = shape[axis], shape[1 - axis]
    if (weight, axis, size) not in made:
        array = graph.constant(weight)
        assert array is not None
        params = of_blocks(array, spec)
        del array
        graph.release(weight)
        scales = np.ascontiguousarray(params.scale.T if axis == 0 else params.scale)
        codes = weights.derived(
            main,
            weight,
            lambda array: _codes(array, params, axis, size),
            ir.DataType.UINT8,
            (columns, scales.shape[1], size),
            graph.fresh_name(f"{weight.name}_blocks", names),
        )
        name = graph.fresh_name(f"{weight.name}_block_scales", names)
        made[weight, axis, size] = codes, graph.add_initializer(main, ir.Tensor(scales), name)
    codes, scale_value = made[weight, axis, size]
    inputs: list[ir.Value | None] = [node.inputs[0], codes, scale_value]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        inputs += [None, None, weights.flat(main, bias, names)]
    attributes = {"K": inner, "N": columns, "bits": bits, "block_size": size, "accuracy_level": _LEVEL}
    new = ir.Node(
        "com.microsoft", "MatMulNBits", inputs, attributes=[ir.AttrInt64(k, v) for k, v in attributes.items()]
    )
    graph.replace_node(main, node, new)
    new.meta[KERNEL] = kernel


def _codes(array: NDArray[Any], params: QParams, axis: int, size: int) -> NDArray[np.uint8]:
    """[N, blocks, size], the last block filled up; 128 is the zero point that the operator takes when given none."""
    codes = quantize(array, params).astype(np.int16) + 128
    rows = codes.T if axis == 0 else codes
    wide = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)), constant_values=128)
    return np.ascontiguousarray(wide.reshape(len(wide), -1, size).astype(np.uint8))
