"""inputs [batch, 3, h, w] -> [1, 3, 224, 224]: dynamic dimensions get the sizes that the data has.

For providers that take only nodes whose shapes are known before the model is run. What the shapes are computed from
then folds to constants.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qgraph import graph
from qgraph.data import Dataset
from qgraph.errors import DataError, OptionError
from qgraph.targets import Target

__all__ = ["FixShapes"]


class FixShapes(ir.passes.InPlacePass):
    """Fixes the shapes of the inputs, where the target asks for it.

    Args:
        target: says whether shapes must be static.
        data: whose first sample has the sizes; None for models whose shapes are static already.

    Raises:
        OptionError: an input has dynamic dimensions, and there is no data.
        DataError: samples differ in size where the model leaves it open.
    """

    def __init__(self, target: Target, data: Dataset | None = None):
        super().__init__()
        self.target = target
        self.data = data
        self.notes: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if not self.target.limits.static_shapes:
            return ir.passes.PassResult(model, False)
        main = model.graph
        free = [v for v in main.inputs if v.name not in main.initializers and (v.shape is None or v.shape.is_dynamic())]
        if not free:
            return ir.passes.PassResult(model, False)
        names = ", ".join(f"{value.name} {value.shape}" for value in free)
        if self.data is None:
            raise OptionError(
                f"Target {self.target.name!r} takes models of fixed shapes only, and inputs are open: {names}. Give "
                "data of the size that it will run on (--data)."
            )
        sizes = self._sizes(free)
        for value in free:
            value.shape = ir.Shape(sizes[str(value.name)])
        fixed = ", ".join(f"{name} {list(shape)}" for name, shape in sizes.items())
        self.notes = [
            f"Target {self.target.name!r} takes fixed shapes only: the model now takes {fixed}, as the data is."
        ]
        for one in graph.all_graphs(main):
            for node in one:
                for value in node.outputs:
                    # What was known with names of dimensions is inferred anew.
                    if value.shape is not None and value.shape.is_dynamic():
                        value.shape = None
        return ir.passes.PassResult(model, True)

    def _sizes(self, free: list[ir.Value]) -> Mapping[str, tuple[int, ...]]:
        assert self.data is not None
        found: dict[str, tuple[int, ...]] = {}
        for batch in self.data:
            for value in free:
                name = str(value.name)
                if name not in batch.feeds:
                    raise DataError(f"Sample {batch.name!r} has no input {name!r}, whose shape is open.")
                shape = tuple(batch.feeds[name].shape)
                if found.setdefault(name, shape) != shape:
                    raise DataError(
                        f"Input {name!r} is {list(found[name])} in the first sample and {list(shape)} in "
                        f"{batch.name!r}: target {self.target.name!r} takes one size. Give samples of one size."
                    )
        return found
