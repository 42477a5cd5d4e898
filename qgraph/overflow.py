"""Values of a model that reach beyond the floats in which a provider computes, though the file has them in float32."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import onnx_ir as ir

from qgraph import caches, calibration, graph, halves, modelio
from qgraph.data import Dataset, inputs_of, load
from qgraph.float_formats import Float

__all__ = ["Beyond", "beyond", "told"]

_SAMPLES = 4
_NAMED = 3
_PEAK = "qgraph.beyond"


@dataclasses.dataclass(frozen=True)
class Beyond:
    """A node whose result reaches too far: what it is called, its operator, and the largest magnitude that was seen."""

    node: str
    op_type: str
    largest: float


def beyond(model: Path, data: Dataset, form: Float) -> list[Beyond]:
    """Nodes whose float32 results exceed what `form` holds on the first samples, in order of execution.

    Masks (see `qgraph.halves.MASK`) do not count, and what only brings codes back has their range.

    Args:
        model: a file; its external data lies beside it.
        data: feeds for it.
        form: the narrower floats.

    Raises:
        ExecutionError: the runtime cannot run the model.
    """
    loaded = modelio.read(model)
    halves.inferred(loaded.graph, loaded.graph.opset_imports.get("", 0))
    peaks: dict[ir.Node, halves.Peak] = {}
    for node in loaded.graph:
        if graph.is_standard(node, "DequantizeLinear"):
            continue
        for value in node.outputs:
            if graph.is_float(value):
                value.meta[calibration.STATISTICS] = {_PEAK: peaks.setdefault(node, halves.Peak())}
    few = [caches.given(model, batch.feeds) for batch in itertools.islice(data, _SAMPLES)]
    calibration.observe(loaded, load(few, inputs_of(loaded)), model.parent)
    found = {node: peak.largest for node, peak in peaks.items() if peak.largest > form.highest}
    return [Beyond(graph.label(node), node.op_type, largest) for node, largest in found.items()]


def told(found: list[Beyond], form: Float) -> str:
    """What is wrong and what to do about it, in words; nothing where nothing was found."""
    if not found:
        return ""
    names = ", ".join(f"{one.op_type} {one.node!r} reaches {one.largest:.2g}" for one in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f" It computes floats in {form.name}, which end at {form.highest:.5g}: {names}{more}. Change the model so that "
        "they stay within, or take a --scheme that has these nodes in integers, or another --target."
    )
