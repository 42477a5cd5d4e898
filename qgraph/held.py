"""Weights whose file holds codes of few bits in blocks, while a kernel computes in int8 or float32.

`qgraph.passes.ShrinkWeights` gives a weight such codes; where it becomes int8, `keep` hands them on, and
`qgraph.passes.StoreBlocks` writes them in the place of either.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qgraph.blocks import Blocks
from qgraph.qparams import QParams

__all__ = ["HELD", "Held", "keep"]

HELD = "qgraph.held"
"""Key in `Value.meta` of a constant: the Held that it is computed of."""


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """What a constant is computed of.

    Attributes:
        blocks: the weight in blocks, [N, K].
        params: of its int8 codes, with a scale for each of N or one for all; None where it is in float32.
        turned: whether the constant is [K, N].
    """

    blocks: Blocks
    params: QParams | None
    turned: bool


def keep(made: ir.Value, weight: ir.Value, params: QParams, turned: bool) -> None:
    """Note on `made`, the int8 codes of `weight`, which blocks they are computed of, if any.

    Args:
        made: a constant, [N, K], or [K, N] if `turned`.
        weight: the float weight, held in few bits or not.
        params: of the int8 codes.
        turned: see `made`.
    """
    held: Held | None = weight.meta.get(HELD)
    if held is not None:
        made.meta[HELD] = Held(held.blocks, params, turned)
