"""A perceptron of any size, written without ever holding it in memory."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from models.builders.graph import Dim, GraphWriter


def big_mlp(gigabytes: float, path: Path | str, *, seed: int = 0, width: int = 4096, batch: Dim = "N") -> Path:
    """Write a stack of MatMul + Add + Relu with `gigabytes` (1e9 bytes) of float32 weights to `path`.

    Input `features` and output `hidden`, float32 [batch, width]. The weights are drawn one tensor at a time into
    `<name>.data` beside the model, so that memory stays at a few tensors of width * width * 4 bytes whatever the size.
    """
    target = Path(path)
    layers = max(1, round(gigabytes * 1e9 / (4 * width * (width + 1))))
    g = GraphWriter("big_mlp", seed=seed)
    x = g.input("features", ir.DataType.FLOAT, [batch, width])
    for index in range(layers):
        scope, name = f"/{index}", f"{index}.weight"
        draw = partial(_draw, g, name, width)
        weight = ir.LazyTensor(draw, ir.DataType.FLOAT, ir.Shape([width, width]), name=name)
        bias = g.weight(f"{index}.bias", g.normal(f"{index}.bias", (width,), 0.1))
        x = g.op("Add", [g.op("MatMul", [x, g.weight(name, weight)], scope), bias], scope)
        if index < layers - 1:
            x = g.op("Relu", [x], scope)
    g.output(x, "hidden", ir.DataType.FLOAT, [batch, width])
    ir.save(g.model(), target, external_data=f"{target.name}.data")
    return target


def _draw(g: GraphWriter, name: str, width: int) -> ir.TensorProtocol:
    weight = g.normal(name, (width, width), math.sqrt(2.0 / width))
    return ir.tensor(np.ascontiguousarray(weight), name=name)
