"""How faithful is a model to another? Outputs on data, and inner values to point at the culprit."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.caches import translated
from qgraph.data import Batch, Dataset
from qgraph.errors import DataError
from qgraph.report import Fidelity, Layer
from qgraph.session import Session, SessionOptions
from qgraph.tally import Tally, decibels, samples_of

__all__ = ["Reference", "Runnable", "compare", "decibels", "layer_errors"]

_LAYER_BYTES = 256 << 20
_UNKNOWN_ELEMENTS = 4 << 20
_LOST = ": counted as lost"


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model that can be run: a file, or an IR whose external tensors lie in `folder`."""

    model: Path | ir.Model
    folder: Path | None = None

    def session(self, options: SessionOptions) -> Session:
        """Load it; caches in integers are given and returned as floats."""
        return translated(Session(self.model, options, self.folder), self.model)


_NO_NUMBERS = "nothing can be compared with it"


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
        samples: of each output, over all batches.

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
        self.samples: dict[str, int] = {}
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
                for name in self._names:
                    self.numbers += found[name].size
                    self.samples[name] = self.samples.get(name, 0) + samples_of(found[name], batch)

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

    def compare(
        self, other: Runnable, held_back: bool = True, keep: str = "", unsteady: Mapping[str, str] | None = None
    ) -> Fidelity:
        """Run `other` on the same data and compare its outputs.

        An output of another shape than the original's (that of NonZero depends on its values) is a loss of all of it
        on that batch, and listed in `skipped`.

        Args:
            other: the model.
            held_back: whether calibration did not see the data.
            keep: keep its outputs, too, under this mark.
            unsteady: outputs to leave out -> what their shapes are, because float models alone do not agree on them.

        Raises:
            DataError: the outputs differ in name or rank, or none of them has its shape on any batch.
            ExecutionError: the model cannot be loaded or run.
        """
        tallies: dict[str, Tally] = {}
        unsteady = unsteady or {}
        changed: dict[str, tuple[str, int]] = {}
        with other.session(self._options) as session:
            if not set(self._names) <= set(session.outputs):
                found = ", ".join(session.outputs)
                raise DataError(f"The models' outputs differ: {', '.join(self._names)} against {found}.")
            for number, batch in enumerate(self.data, 1):
                results = session.run(batch.feeds, self._names)
                for key, expected in self._load(number).items():
                    tally = tallies.setdefault(key, Tally())
                    if expected.shape == results[key].shape:
                        tally.add(expected, results[key], batch)
                        continue
                    shapes = f"shape {list(results[key].shape)} instead of {list(expected.shape)} on {batch.name!r}"
                    if expected.ndim != results[key].ndim:
                        raise DataError(f"Output {key!r} has {shapes}.")
                    tally.lose(expected, results[key], batch)
                    first, count = changed.get(key, (shapes, 0))
                    changed[key] = first, count + 1
                if keep:
                    self._save(number, results, keep)
        if not any(tally.compared for key, tally in tallies.items() if key not in unsteady):
            what = "; ".join(f"{key!r} has {first}" for key, (first, _) in changed.items())
            raise DataError("No output can be compared: " + what)
        compared = {key: tally.result() for key, tally in tallies.items() if key not in unsteady}
        skipped = {key: f"{first}{_also(count)}{_LOST}" for key, (first, count) in changed.items()}
        skipped.update({key: f"{what}, before anything is quantized: not compared" for key, what in unsteady.items()})
        return Fidelity(self.count, held_back, compared, skipped=skipped)

    def unsteady(self, rewritten: Runnable) -> dict[str, str]:
        """Outputs whose shapes change when the float graph is only rewritten, and how; none if that is all of them."""
        try:
            found = self.compare(rewritten).skipped
        except DataError:
            return {}
        shapes = {key: what.removesuffix(_LOST) for key, what in found.items()}
        return shapes if len(shapes) < len(self._names) else {}


def _also(count: int) -> str:
    """How many more there are than the one that was named."""
    return "" if count == 1 else f" and in {count - 1} other run{'s' if count > 2 else ''}"


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
