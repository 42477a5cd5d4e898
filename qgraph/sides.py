"""Channels of a product's input that are computed in float, beside the product of all others in codes.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022), section 3.2: where a few
channels are many times as loud as the others, no scale suits both. Here the channels are the same for all data, chosen
when the model is compiled, and what they add is a product of a few columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.targets import Target

__all__ = ["BESIDE", "SIDE", "Side", "hushed", "loudest", "seconds"]

SIDE = "qgraph.side"
"""Key in `Node.meta`, of a Mul before products and of the products: a `Side` that is planned."""
BESIDE = "qgraph.beside"
"""Key in `Node.meta` of what computes the channels set aside: seconds that it takes, by the target's costs."""
_FEW = 4
"""Channels set aside. Twice as many take a third to two thirds longer, and bring some tenths of a decibel."""
_CODES = 2.0
"""Times as long as rounding the result that its share in float takes: Gather, MatMul and Add, one thread, onnxruntime
1.32.0, results of 64 x 384 to 128 x 3072 (`tools/measure_glue.py --only beside`)."""
_QUIET = 20
"""Powers of two by which the rows of these channels are made small in the weight that will be in codes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Channels set aside.

    Attributes:
        channels: their numbers, rising, [k].
        left: power of the product's output without them, as a share of the whole.
    """

    channels: NDArray[np.intp]
    left: float


def loudest(magnitudes: NDArray[np.floating]) -> NDArray[np.intp]:
    """The channels with the largest magnitudes, in rising order; none where there would be no others."""
    count = _FEW if len(magnitudes) > 2 * _FEW else 0
    return np.sort(np.argsort(-magnitudes, kind="stable")[:count])


def hushed(scale: NDArray[np.float64], channels: NDArray[np.intp]) -> NDArray[np.float64]:
    """Factors that make these channels' rows of a weight nearly zero: powers of two, which lose no digit."""
    found = scale.copy()
    least = float(np.delete(scale, channels).min())
    found[channels] = np.ldexp(1.0, int(np.frexp(least)[1]) - _QUIET)
    return found


def seconds(target: Target, products: Sequence[ir.Node]) -> float:
    """About how long it takes to compute the channels set aside, for all of these products."""
    return sum(_CODES * target.quantize_cost(node.outputs[0]) for node in products if graph.run_shape(node.outputs[0]))
