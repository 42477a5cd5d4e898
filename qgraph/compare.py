"""How faithful is a model to another? Outputs on data, and inner values to point at the culprit."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.caches import translated
from qgraph.data import Batch, Dataset
from qgraph.errors import DataError
from qgraph.report import Fidelity, Layer, OutputError
from qgraph.session import Session, SessionOptions

__all__ = ["Reference", "Runnable", "compare", "layer_errors"]

_LAYER_BYTES = 256 << 20
_TELLING = 4
_UNKNOWN_ELEMENTS = 4 << 20


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model that can be run: a file, or an IR whose external tensors lie in `folder`."""

    model: Path | ir.Model
    folder: Path | None = None

    def session(self, options: SessionOptions) -> Session:
        """Load it; caches in integers are given and returned as floats."""
        return translated(Session(self.model, options, self.folder), self.model)


class _Error:
    """Running sums of one output's error."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = self.cosines = self.squares = 0.0
        self.samples = self.same = 0
        self.classes = True

    def add(self, a: NDArray[Any], b: NDArray[Any], visible: NDArray[np.bool_] | None = None) -> None:
        """Take in [samples, ...]; where `visible` [samples, length] fits, hidden positions do not count."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        if visible is not None and a.ndim >= 3 and a.shape[:2] == visible.shape:
            x, y = (np.where(visible.reshape(*visible.shape, *[1] * (a.ndim - 2)), array, 0.0) for array in (x, y))
        # An infinity that both have (a masked score) is right, and one that only one has is wrong beyond measure.
        both = np.isinf(x) & (x == y)
        if both.any():
            x, y = np.where(both, 0.0, x), np.where(both, 0.0, y)
        if np.isinf(x).any() or np.isinf(y).any():
            x, y = np.where(np.isinf(x), 0.0, x), np.where(np.isinf(x) | np.isinf(y), np.nan, y)
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
        alike = (x * y).sum(axis=1) / np.where(norms > 0, norms, 1.0)
        if width == 1:
            # The cosine of two numbers says nothing but their sign; codes and labels are equal or not.
            wide = np.maximum(np.maximum(np.abs(x), np.abs(y))[:, 0], 1e-30)
            alike = 1.0 - np.abs(x - y)[:, 0] / wide if a.dtype.kind == "f" else same.astype(np.float64)
        alike = np.where(same, 1.0, alike)
        self.cosines += float(alike.sum())
        self.squares += float(np.square(1.0 - alike).sum())
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
            self._spread(),
        )

    def _spread(self) -> float:
        """Standard deviation of the samples' loss of cosine over its mean; 1 where there are too few to tell."""
        count = max(1, self.samples)
        mean = 1.0 - self.cosines / count
        if count < _TELLING or not mean > 0:
            return 1.0
        return math.sqrt(max(self.squares / count - mean * mean, 0.0)) / mean


_NO_NUMBERS = "nothing can be compared with it"


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, not a number for NaN."""
    if noise == 0.0:
        return float("inf")
    if math.isnan(noise) or math.isnan(signal):
        return float("nan")
    # Apart, since the share of an overflow is none.
    return float(10 * (np.log10(signal) - np.log10(noise))) if signal > 0 else float("-inf")


class Reference:
    """The original's outputs on data, kept on disk, to compare any number of models with.

    Args:
        original: the model.
        data: the feeds.
        options: session options.
        folder: where the outputs wait; the size of the data does not matter.

    Attributes:
        count: batches.
        numbers: in all outputs of all batches.

    Raises:
        DataError: an output is NaN, or none is a tensor of numbers.
    """

    def __init__(self, original: Runnable, data: Dataset, options: SessionOptions, folder: Path):
        self.data = data
        self._options = options
        self._folder = folder
        self._names: list[str] = []
        self.count = 0
        self.numbers = 0
        folder.mkdir(parents=True, exist_ok=True)
        with original.session(options) as session:
            for self.count, batch in enumerate(data, 1):
                found = session.run(batch.feeds)
                for name, array in found.items():
                    if _is_numeric(array) and np.isnan(array).any():
                        raise DataError(
                            f"Output {name!r} of the original is NaN on {batch.name!r}: nothing can be compared with "
                            "it. The float model itself overflows there, or the data is wrong."
                        )
                self._names = self._save(self.count, found)
                if not self._names:
                    raise DataError(f"The original has no output that is a tensor of numbers: {_NO_NUMBERS}.")
                self.numbers += sum(found[name].size for name in self._names)

    def _save(self, number: int, outputs: dict[str, NDArray[Any]], mark: str = "") -> list[str]:
        numeric = {name: value for name, value in outputs.items() if _is_numeric(value)}
        arrays: dict[str, Any] = {f"o{i}": array for i, array in enumerate(numeric.values())}
        np.savez(self._folder / f"{mark}{number}.npz", **arrays)
        return list(numeric)

    def _load(self, number: int, mark: str = "") -> dict[str, NDArray[Any]]:
        with np.load(self._folder / f"{mark}{number}.npz") as stored:
            return {name: stored[f"o{i}"] for i, name in enumerate(self._names)}

    def outputs(self, mark: str = "") -> Iterator[tuple[Batch, dict[str, NDArray[Any]]]]:
        """Each batch with the original's outputs, or with those of the model that was compared under `mark`."""
        for number, batch in enumerate(self.data, 1):
            yield batch, self._load(number, mark)

    def compare(self, other: Runnable, held_back: bool = True, keep: str = "") -> Fidelity:
        """Run `other` on the same data and compare its outputs.

        Args:
            other: the model.
            held_back: whether calibration did not see the data.
            keep: keep its outputs, too, under this mark.

        Raises:
            DataError: the outputs differ in name, or none of them keeps its shape (one whose shape depends on its
                values, as that of NonZero, may not; it is listed in `skipped`).
            ExecutionError: the model cannot be loaded or run.
        """
        errors: dict[str, _Error] = {}
        skipped: dict[str, str] = {}
        with other.session(self._options) as session:
            if not set(self._names) <= set(session.outputs):
                found = ", ".join(session.outputs)
                raise DataError(f"The models' outputs differ: {', '.join(self._names)} against {found}.")
            for number, batch in enumerate(self.data, 1):
                results = session.run(batch.feeds, self._names)
                for key, expected in self._load(number).items():
                    if expected.ndim != results[key].ndim:
                        shapes = f"{list(results[key].shape)} instead of {list(expected.shape)}"
                        raise DataError(f"Output {key!r} has shape {shapes} on {batch.name!r}.")
                    if expected.shape != results[key].shape:
                        what = f"shape {list(results[key].shape)} instead of {list(expected.shape)} on {batch.name!r}"
                        skipped.setdefault(key, what)
                    else:
                        errors.setdefault(key, _Error()).add(expected, results[key], batch.visible)
                if keep:
                    self._save(number, results, keep)
        if not errors or errors.keys() <= skipped.keys():
            what = "; ".join(f"{k!r} has {what}" for k, what in skipped.items())
            raise DataError("No output can be compared: " + what)
        compared = {key: error.result() for key, error in errors.items() if key not in skipped}
        return Fidelity(self.count, held_back, compared, skipped=skipped)


def compare(
    original: Runnable, other: Runnable, data: Dataset, options: SessionOptions, held_back: bool = True
) -> Fidelity:
    """Run both models on `data`, one live session at a time, and compare their outputs.

    Raises:
        DataError, ExecutionError: see `Reference.compare`.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-compare-") as name:
        return Reference(original, data, options, Path(name)).compare(other, held_back)


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
    known = {v.name: v for node in source.graph for v in node.outputs if v.name}
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
        # The float model may know sizes that the file does not.
        size += 4 * (graph.element_count(known[base]) or graph.element_count(value) or _UNKNOWN_ELEMENTS)
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
    with translated(Session(probe, options, folder), probe) as session:
        results = session.run(feeds)
    layers: list[Layer] = []
    for name in names:
        x = expected[name].astype(np.float64)
        noise = float(np.square(x - results[str(pairs[name].name)]).sum())
        layers.append(Layer(name, ops[name], decibels(float(np.square(x).sum()), noise)))
    return layers
