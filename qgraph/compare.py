"""How faithful is a model to another? Outputs on data, and inner values to point at the culprit."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.data import Dataset
from qgraph.errors import DataError
from qgraph.report import Fidelity, Layer, OutputError
from qgraph.session import Session, SessionOptions

__all__ = ["Runnable", "compare", "layer_errors"]

_LAYER_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model that can be run: a file, or an IR whose external tensors lie in `folder`."""

    model: Path | ir.Model
    folder: Path | None = None

    def session(self, options: SessionOptions) -> Session:
        """Load it."""
        return Session(self.model, options, self.folder)


class _Error:
    """Running sums of one output's error."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = self.cosines = 0.0
        self.samples = self.same = 0
        self.classes = True

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        x, y = a.astype(np.float64), b.astype(np.float64)
        difference = x - y
        self.signal += float(np.square(x).sum())
        self.noise += float(np.square(difference).sum())
        # NaN stays NaN, where `max` would lose it.
        self.largest = float(np.maximum(self.largest, np.abs(difference).max(initial=0.0)))
        rows = x.shape[0] if x.ndim else 1
        width = math.prod(x.shape[1:])
        x, y = x.reshape(rows, width), y.reshape(rows, width)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        same = np.all(x == y, axis=1)
        self.cosines += float(np.where(same, 1.0, (x * y).sum(axis=1) / np.where(norms > 0, norms, 1.0)).sum())
        self.samples += rows
        if a.ndim == 2 and a.shape[1] > 1 and self.classes:
            self.same += int((x.argmax(axis=1) == y.argmax(axis=1)).sum())
        else:
            self.classes = False

    def result(self) -> OutputError:
        return OutputError(
            decibels(self.signal, self.noise),
            self.cosines / max(1, self.samples),
            self.largest,
            self.same / self.samples if self.classes and self.samples else None,
        )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, not a number for NaN."""
    if noise == 0.0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def compare(
    original: Runnable, other: Runnable, data: Dataset, options: SessionOptions, held_back: bool = True
) -> Fidelity:
    """Run both models on `data`, one live session at a time, and compare their outputs.

    The original's outputs wait on disk, not in memory, so the size of the data does not matter.

    Raises:
        DataError: the outputs differ in name, or none of them keeps its shape (one whose shape depends on its values,
            as that of NonZero, may not; it is listed in `skipped`).
        ExecutionError: a model cannot be loaded or run.
    """
    errors: dict[str, _Error] = {}
    skipped: dict[str, str] = {}
    count = 0
    names: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qgraph-compare-") as name:
        folder = Path(name)
        with original.session(options) as session:
            for count, batch in enumerate(data, 1):
                outputs = {k: v for k, v in session.run(batch.feeds).items() if _is_numeric(v)}
                arrays: dict[str, Any] = {f"o{i}": array for i, array in enumerate(outputs.values())}
                np.savez(folder / f"{count}.npz", **arrays)
                names = list(outputs)
        with other.session(options) as session:
            if not set(names) <= set(session.outputs):
                raise DataError(f"The models' outputs differ: {', '.join(names)} against {', '.join(session.outputs)}.")
            for number, batch in enumerate(data, 1):
                results = session.run(batch.feeds)
                with np.load(folder / f"{number}.npz") as stored:
                    for i, key in enumerate(names):
                        expected = stored[f"o{i}"]
                        if expected.shape != results[key].shape:
                            what = (
                                f"shape {list(results[key].shape)} instead of {list(expected.shape)} on {batch.name!r}"
                            )
                            skipped.setdefault(key, what)
                        else:
                            errors.setdefault(key, _Error()).add(expected, results[key])
    if not errors or errors.keys() <= skipped.keys():
        raise DataError("No output can be compared: " + "; ".join(f"{k!r} has {what}" for k, what in skipped.items()))
    found = {key: error.result() for key, error in errors.items() if key not in skipped}
    return Fidelity(count, held_back, found, skipped=skipped)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def layer_errors(
    original: Runnable, quantized: ir.Model, folder: Path | None, data: Dataset, options: SessionOptions
) -> list[Layer]:
    """SQNR of every quantized activation against the original's value of the same name, on the first batch.

    Args:
        original: the float model.
        quantized: its quantized form, QuantizeLinear nodes named after the values they quantize.
        folder: where the quantized model's external tensors lie.
        data: one batch of it is run.
        options: session options.
    """
    source = original.model if isinstance(original.model, ir.Model) else ir.load(original.model)
    known = {v.name for node in source.graph for v in node.outputs if v.name}
    probe = quantized.clone()
    pairs: dict[str, ir.Value] = {}
    ops: dict[str, str] = {}
    for node in probe.graph:
        if node.op_type != "QuantizeLinear" or node.inputs[1] is None:
            continue
        base = str(node.inputs[1].name).removesuffix("_scale")
        readers = [reader for reader in node.outputs[0].consumers() if reader.op_type == "DequantizeLinear"]
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        if base in known and readers and maker is not None and graph.is_float(node.inputs[0]):
            pairs.setdefault(base, readers[0].outputs[0])
            ops.setdefault(base, maker.op_type)
    names, size = [], 0
    for base, value in pairs.items():
        size += 4 * (graph.element_count(value) or 0)
        if size > _LAYER_BYTES:
            break
        names.append(base)
    if not names:
        return []
    feeds = data.first().feeds
    reference = source.clone()
    twins = {v.name: v for node in reference.graph for v in node.outputs if v.name in pairs}
    reference.graph.outputs.clear()
    reference.graph.outputs.extend(twins[name] for name in names)
    where = original.folder if isinstance(original.model, ir.Model) else original.model.parent
    with Session(reference, options, where) as session:
        expected = session.run(feeds)
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(pairs[name] for name in names)
    with Session(probe, options, folder) as session:
        results = session.run(feeds)
    layers: list[Layer] = []
    for name in names:
        x = expected[name].astype(np.float64)
        noise = float(np.square(x - results[str(pairs[name].name)]).sum())
        layers.append(Layer(name, ops[name], decibels(float(np.square(x).sum()), noise)))
    return layers
