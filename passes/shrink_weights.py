"""MatMul(x, W) -> MatMul(x, W'), W' what codes of few bits in blocks stand for: it is stored so, whatever computes it.

Products of many rows are faster in int8 with a scale for each column than with weights in blocks, and W' fits there
nearly without loss, since a block's steps are many of an int8 column's. So the file is as small as one with blocks, and
the model as fast as one in int8: weights in two levels of quantization, as in Lin et al., "QServe: W4A8KV4 Quantization
and System Co-design for Efficient LLM Serving" (2024), section 4.1, here unpacked once as the model is loaded. Codes
are learned as `RoundBlocks` learns them, and written by `StoreBlocks`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.blocks import BLOCKS, Blocks, nearest
from qgraph.errors import QuantizationError
from qgraph.held import HELD, Held
from qgraph.rules import Rules
from qgraph.spec import PerBlock, Scheme
from qgraph.strips import Strips
from qgraph.targets import KERNEL, Form, Kernel, Target

__all__ = ["ShrinkWeights"]

_HALF = np.finfo(np.float16)


class ShrinkWeights(ir.passes.InPlacePass):
    """Gives products weights that fit few bits; `Value.meta["qgraph.held"]` of each has the codes.

    Refused: products without a kernel for weights in blocks, and those that the caller wants in float or otherwise.

    Args:
        target: knows which products have such kernels.
        scheme: the blocks.
        learn: the pass that chooses the codes of planned products; codes without a choice are the nearest ones.
        choices: pattern of names, or operator -> scheme or "float": these nodes are left alone.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme,
        learn: ir.passes.PassBase | None = None,
        choices: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.target, self.scheme, self.learn, self.choices = target, scheme, learn, dict(choices or {})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place.

        Raises:
            QuantizationError: a weight is not finite.
        """
        main = model.graph
        rules = Rules(self.target, self.scheme, self.choices, calibrated=self.learn is not None)
        planned: dict[ir.Node, Kernel] = {}
        for node in main:
            if not weights.is_product(node) or rules.chosen(node) is not None:
                continue
            kernel = rules.kernels(node)[0].get(self.scheme.name)
            if kernel is not None and kernel.form is Form.WEIGHTS and kernel.weight is not None:
                node.meta[KERNEL] = planned[node] = kernel
        if self.learn is not None and planned:
            self.learn(model)
        names = graph.value_names(main)
        made: dict[tuple[ir.Value, int], ir.Value] = {}
        known: dict[ir.Value, Blocks] = {}
        for node, kernel in planned.items():
            del node.meta[KERNEL]
            weight = node.inputs[1]
            assert weight is not None and kernel.weight is not None
            found: Blocks | None = node.meta.pop(BLOCKS, None)
            if found is None and weight not in known:
                known[weight] = _nearest(weight, kernel)
            blocks = known[weight] if found is None else found
            key = weight, id(blocks)
            if key not in made:
                made[key] = _shrunk(main, weight, blocks, kernel, names)
            node.replace_input_with(1, made[key])
        if planned:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


def _nearest(weight: ir.Value, kernel: Kernel) -> Blocks:
    assert weight.const_value is not None and kernel.weight is not None
    try:
        return nearest(Strips(weight.const_value), kernel.weight[1])
    except QuantizationError as error:
        raise QuantizationError(f"Weight {weight.name!r} cannot be quantized: {error}") from error


def _shrunk(main: ir.Graph, weight: ir.Value, blocks: Blocks, kernel: Kernel, names: set[str]) -> ir.Value:
    """The weight that the codes stand for, in the shape of `weight`; computed whenever it is read."""
    assert kernel.weight is not None
    granularity = kernel.weight[1].granularity
    assert isinstance(granularity, PerBlock)
    held = _with_halves(blocks)
    turned = granularity.axis == 0
    shape = graph.run_shape(weight) or ()
    name = graph.fresh_name(f"{weight.name}_shrunk", names)

    def evaluate() -> ir.TensorProtocol:
        # Of the codes alone: the weight that they were found for need not be read again.
        return ir.Tensor(np.ascontiguousarray(held.real.T if turned else held.real), name=name)

    value = graph.add_initializer(main, ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape(shape), name=name), name)
    value.meta[HELD] = Held(held, None, turned)
    return value


def _with_halves(blocks: Blocks) -> Blocks:
    """With scales that 16 bits hold, where they are no smaller than a normal half is: half as many bytes for them."""
    scale = blocks.scale
    used = np.abs(scale[scale != 0])
    if used.size and (used.min() < _HALF.smallest_normal or used.max() > _HALF.max):
        return blocks
    return Blocks(
        blocks.codes, scale.astype(np.float16).astype(np.float32), blocks.zero_point, blocks.bits, blocks.inner
    )
