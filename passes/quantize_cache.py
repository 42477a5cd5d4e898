"""GroupQueryAttention(..., past in float) -> GroupQueryAttention(..., past in int8 or int4, scales).

The caches that go in and come out are then codes, a quarter or an eighth of the bytes; the operator makes them of new
keys and values, and computes with them, by itself. The caller has to allocate them so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qgraph.passes.survey_cache import CACHE

from qgraph import caches, graph
from qgraph.errors import OptionError

__all__ = ["QuantizeCache"]

_INPUTS = 14


class QuantizeCache(ir.passes.InPlacePass):
    """Acts on every GroupQueryAttention whose caches go in and out of the model and were surveyed.

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place.

        Raises:
            OptionError: there is no such cache.
        """
        main = model.graph
        names = graph.value_names(main)
        changed = False
        for node in main:
            if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention"):
                changed |= _quantize(main, node, self.bits, names)
        if not changed:
            raise OptionError(
                "There is no cache to keep in integers: only GroupQueryAttention, as onnxruntime-genai builds decoders "
                "with it, computes with such caches, and it must read and write them as inputs and outputs in float32."
            )
        return ir.passes.PassResult(model, changed)


def _quantize(main: ir.Graph, node: ir.Node, bits: int, names: set[str]) -> bool:
    # A model in float16 has Casts at both ends, which codes need not.
    before = [caches.cast_from_input(value) for value in node.inputs[3:5]]
    after = [caches.cast_to_output(value) for value in node.outputs[1:3]]
    pasts = [value if cast is None else cast.inputs[0] for value, cast in zip(node.inputs[3:5], before, strict=True)]
    presents = node.outputs[1:3]
    fits = len(pasts) == 2 and all(
        v is not None and v.is_graph_input() and len(v.uses()) == 1 and (cast is not None or graph.is_float(v))
        for v, cast in zip(pasts, before, strict=True)
    )
    ends = all(CACHE in v.meta and (cast is not None or not v.uses()) for v, cast in zip(presents, after, strict=True))
    if not fits or not ends:
        return False
    for position, (past, cast) in enumerate(zip(pasts, before, strict=True), 3):
        if cast is not None:
            node.replace_input_with(position, past)
            main.remove(cast, safe=True)
    for present, cast in zip(presents, after, strict=True):
        if cast is not None:
            _hand_out(main, present, cast)
    scales: list[ir.Value] = []
    for past, present in zip(pasts, presents, strict=True):
        assert past is not None
        seen: caches.Seen = present.meta[CACHE]
        assert seen.largest is not None
        scale = caches.step(np.concatenate(seen.tokens, axis=1), seen.largest, bits)
        name = graph.fresh_name(f"{present.name}_scale", names)
        scales.append(graph.add_initializer(main, ir.Tensor(scale), name))
        for value in (past, present):
            value.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
            if bits == 4 and value.shape is not None and isinstance(value.shape[-1], int):
                value.shape = ir.Shape([*value.shape[:-1], value.shape[-1] // 2])
    node.resize_inputs(_INPUTS)
    for position, scale_value in zip((12, 13), scales, strict=True):
        node.replace_input_with(position, scale_value)
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", bits))
    for name in ("k_quant_type", "v_quant_type"):
        node.attributes.add(ir.AttrString(name, "PER_CHANNEL"))
    return True


def _hand_out(main: ir.Graph, value: ir.Value, cast: ir.Node) -> None:
    """`value` becomes the output that `cast` makes of it."""
    result = cast.outputs[0]
    name, result.name = result.name, None
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    main.remove(cast, safe=True)
    value.name = name
