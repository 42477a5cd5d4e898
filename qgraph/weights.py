"""Constants computed from constants when the file is written, one at a time, so that no second copy stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, widened
from qgraph.errors import QuantizationError
from qgraph.strips import Strips

__all__ = ["Shared", "derived", "flat", "is_product", "moved"]

_FLAT = "qgraph.flat"
_T = TypeVar("_T")


def is_product(node: ir.Node) -> bool:
    """Whether `node` is a product whose right side may be a weight."""
    return graph.is_standard(node, "MatMul", "Gemm") or (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul")


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
        widened.release(tensor)
        return ir.Tensor(made, dtype=dtype, name=name)

    return graph.add_initializer(main, ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name), name)


def moved(
    main: ir.Graph,
    weight: ir.Value,
    function: Callable[[NDArray[Any]], NDArray[Any]],
    shape: tuple[int, ...],
    name: str,
) -> ir.Value:
    """A new constant `name` of `main`: numbers of the constant `weight`, chosen and put in order, as they are stored.

    Args:
        main: where it is registered.
        weight: a constant; of what is a view of 16 bits, the new one is a view, too.
        function: array of `weight` -> array of `shape`, which makes no new numbers.
        shape: of the result.
        name: must be free.
    """
    tensor = weight.const_value
    assert tensor is not None
    stored = widened.source(tensor)

    def evaluate() -> ir.TensorProtocol:
        array = function(stored.numpy())
        widened.release(stored)
        return ir.Tensor(array, dtype=stored.dtype, name=name)

    lazy = ir.LazyTensor(evaluate, stored.dtype, ir.Shape(shape), name=name)
    made = graph.add_initializer(main, lazy if stored is tensor else widened.Widened(lazy), name)
    made.type = weight.type
    return made


def flat(main: ir.Graph, row: ir.Value, names: set[str]) -> ir.Value:
    """The constant `row` in one dimension: itself, or a new constant of `main`, one for all that ask.

    Args:
        main: where it is registered.
        row: a constant.
        names: taken names, to which the new one is added.
    """
    if len(graph.run_shape(row) or ()) == 1:
        return row
    known: ir.Value | None = row.meta.get(_FLAT)
    # What a copy of the graph has inherited is the other graph's.
    if known is None or main.initializers.get(str(known.name)) is not known:
        array = np.array(graph.constant(row)).reshape(-1)
        known = graph.add_initializer(main, ir.Tensor(array), graph.fresh_name(f"{row.name}_flat", names))
        row.meta[_FLAT] = known
    return known


class Shared(Generic[_T]):
    """Several constants that are computed together from one weight: it is read once where they are written in a row.

    Args:
        weight: a constant of two dimensions.
        function: strips of `weight` -> what the parts are taken from.
    """

    def __init__(self, weight: ir.Value, function: Callable[[Strips], _T]):
        if weight.const_value is None:
            raise QuantizationError(f"The weight {weight.name!r} is not a constant.")
        self._tensor = weight.const_value
        self._function = function
        self._made: _T | None = None
        self._parts = 0
        self._taken: set[str] = set()

    def part(
        self, main: ir.Graph, pick: Callable[[_T], NDArray[Any]], dtype: ir.DataType, shape: tuple[int, ...], name: str
    ) -> ir.Value:
        """A new constant `name` of `main`, that `pick` takes from what is computed; of `dtype` and `shape`."""
        self._parts += 1

        def evaluate() -> ir.TensorProtocol:
            return ir.Tensor(pick(self._get(name)), dtype=dtype, name=name)

        return graph.add_initializer(main, ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name), name)

    def _get(self, name: str) -> _T:
        made = self._made
        if made is None:
            try:
                made = self._function(Strips(self._tensor))
            except QuantizationError as error:
                raise QuantizationError(f"Weight {self._tensor.name!r} cannot be quantized: {error}") from error
        self._taken.add(name)
        # Kept until each part has been asked for once.
        self._made = made if len(self._taken) < self._parts else None
        if self._made is None:
            self._taken.clear()
        return made
