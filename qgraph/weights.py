"""Constants computed from constants when the file is written, one at a time, so that no second copy stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.errors import QuantizationError

__all__ = ["derived"]


def derived(
    main: ir.Graph,
    weight: ir.Value | None,
    function: Callable[[NDArray[Any]], NDArray[Any]],
    dtype: ir.DataType,
    shape: tuple[int, ...],
    name: str,
) -> ir.Value:
    """A new constant `name` of `main`: `function` of the constant `weight`, which is mapped, read and let go of then.

    Args:
        main: where it is registered.
        weight: a constant.
        function: array of `weight` -> array of `dtype` and `shape`.
        dtype: of the result.
        shape: of the result.
        name: must be free.

    Raises:
        QuantizationError: `weight` is no constant.
    """
    tensor = weight.const_value if weight is not None else None
    if weight is None or tensor is None:
        raise QuantizationError(f"The weight that {name!r} is made of is not a constant.")

    def evaluate(tensor: ir.TensorProtocol = tensor) -> ir.TensorProtocol:
        made = function(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        return ir.Tensor(made, dtype=dtype, name=name)

    return graph.add_initializer(main, ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name), name)
