"""W in float32, read from 16 bits -> Cast(W in 16 bits): a weight that nothing changed is stored as the model had it.

The Cast's input is constant, so the runtime folds it once, as it loads the model (which is audited), and the operator
finds the float32 weight that it would have found. The file does not grow.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import narrowing
from qgraph.targets import FOLDED

__all__ = ["NarrowWeights"]


class NarrowWeights(ir.passes.InPlacePass):
    """Undoes, for the weights that stay float, what `ToFloat` did to them.

    Refused: nothing. Rows of numbers and small tensors are float32 already, and stay so.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        casts = narrowing.narrow(model)
        for cast in casts:
            readers = cast.outputs[0].consumers()
            cast.meta[FOLDED] = str(readers[0].name) if readers else ""
        return ir.passes.PassResult(model, bool(casts))
