"""Put quantization tools side by side on one model: accuracy, task, speed, tool time, peak memory.

Each tool runs in a process of its own (`quantizers.py`), in an environment of its own where it needs one, and its peak
resident memory is read there. Speed is the median over pairs of neighbouring blocks against the model as given, one
live session at a time; accuracy is SQNR, cosine and the task's own metric on evaluation data.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from metrics import bits_per_byte, neighbours, sentence_embeddings, top1
from numpy.typing import NDArray
from rich.table import Table

from qgraph import bench, data, modelio
from qgraph.compare import Runnable, compare, decibels
from qgraph.data import Dataset
from qgraph.errors import QGraphError
from qgraph.report import OutputError, Speed
from qgraph.session import Session, SessionOptions

__all__ = ["METRICS", "Comparison", "Row", "joined", "outputs", "table"]

_WORKER = Path(__file__).resolve().parent / "quantizers.py"
_OPTIONS = SessionOptions()
Arrays = dict[str, NDArray[Any]]
# (inputs, labels or none, the original's outputs, the result's outputs) -> words.
Metric = Callable[[Arrays, "NDArray[np.int64] | None", Arrays, Arrays], str]


def joined(runs: Iterable[Any]) -> Arrays:
    """Feeds or outputs of several runs, joined along axis 0."""
    kept = [dict(run) for run in runs]
    return {name: np.concatenate([run[name] for run in kept]) for name in kept[0]}


def outputs(model: Path, dataset: Dataset) -> Arrays:
    """All outputs on all samples."""
    with Session(model, _OPTIONS) as session:
        return joined(session.run(batch.feeds) for batch in dataset)


def _top1(feeds: Arrays, labels: NDArray[np.int64] | None, original: Arrays, found: Arrays) -> str:
    if labels is None:
        raise QGraphError("Top-1 needs labels: give them with --labels.")
    return f"top-1 {top1(_first(found), labels):.2%}"


def _bits(feeds: Arrays, labels: NDArray[np.int64] | None, original: Arrays, found: Arrays) -> str:
    return f"{bits_per_byte(_first(found), _first(feeds)):.4f} bits per byte"


def _neighbours(feeds: Arrays, labels: NDArray[np.int64] | None, original: Arrays, found: Arrays) -> str:
    mask = feeds["attention_mask"]
    expected, got = _first(original), _first(found)
    cosine, same = neighbours(sentence_embeddings(expected, mask), sentence_embeddings(got, mask))
    # What a model makes of padding is of no use to anybody, and need not be alike.
    tokens = expected[mask > 0].astype(np.float64)
    ratio = decibels(float(np.square(tokens).sum()), float(np.square(tokens - got[mask > 0]).sum()))
    return f"cosine {cosine:.5f}, {same:.1%} neighbours, {ratio:.1f} dB without padding"


def _first(arrays: Arrays) -> NDArray[Any]:
    return next(iter(arrays.values()))


METRICS: dict[str, Metric] = {"top1": _top1, "bits": _bits, "neighbours": _neighbours}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one tool made of the model; `failure` says why the rest is missing, if it is.

    Attributes:
        method: the tool, with its variant.
        seconds: time the tool took.
        peak: largest resident memory of its process, bytes.
        size: the result's bytes on disk.
        errors: by output name.
        task: the task's metric, in words.
        speeds: one for each number of threads.
        failure: why there is no result, or only part of one.
    """

    method: str
    seconds: float | None = None
    peak: int | None = None
    size: int | None = None
    errors: dict[str, OutputError] = dataclasses.field(default_factory=dict)
    task: str = ""
    speeds: tuple[Speed, ...] = ()
    failure: str = ""


@dataclasses.dataclass
class Comparison:
    """One model and its data, on which tools are compared.

    Attributes:
        model: the float model.
        calibration: data that each tool gets.
        evaluation: data to compare on.
        folder: where results lie, `METHOD.onnx` each, with what they cost in `METHOD.json`.
        metric: the task's metric; None for none.
        labels: of the evaluation samples, for metrics that need them.
        samples: calibration runs given to each tool.
        seconds: how long each result is timed for each number of threads; 0 not at all.
        pythons: interpreter by tool; the others run in this one.
        reuse: whether results that are in `folder` already are taken as they are.
        reference: another float model to time against; None for `model`.
    """

    model: Path
    calibration: Path
    evaluation: Path
    folder: Path
    metric: Metric | None = None
    labels: NDArray[np.int64] | None = None
    samples: int = 64
    seconds: float = 6.0
    pythons: dict[str, Path] = dataclasses.field(default_factory=dict)
    reuse: bool = False
    reference: Path | None = None

    def __post_init__(self) -> None:
        inputs = data.inputs_of(modelio.read(self.model))
        self._held = data.load(self.evaluation, inputs)
        self._feeds = joined(batch.feeds for batch in self._held)
        self._expected = outputs(self.model, self._held) if self.metric else {}
        self._runs = Path(tempfile.mkdtemp(prefix="calibration-"))
        for number, batch in zip(range(self.samples), data.load(self.calibration, inputs), strict=False):
            np.savez(self._runs / f"{number:06}.npz", **{f"_{k}": v for k, v in batch.feeds.items()})

    def original(self) -> Row:
        """The float model itself."""
        return Row("float", size=modelio.size_on_disk(self.model), task=self._task(self._expected))

    def rows(self, methods: Iterable[str]) -> Iterator[Row]:
        """Run the tools, one after the other; what fails is a row that says why."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for method in methods:
            row = self._quantized(method)
            if not row.failure:
                try:
                    row = self._judged(row)
                except QGraphError as error:
                    row = dataclasses.replace(row, failure=_short(str(error)))
            yield row

    def _quantized(self, method: str) -> Row:
        """Run one tool in a process of its own."""
        output, cost = self.folder / f"{method}.onnx", self.folder / f"{method}.json"
        if not (self.reuse and output.exists() and cost.exists()):
            output.unlink(missing_ok=True)
            cost.unlink(missing_ok=True)
            python = self.pythons.get(method.partition("-")[0], Path(sys.executable))
            files = [str(path.absolute()) for path in (self.model, self._runs, output, cost)]
            command = [str(python), "-W", "ignore", str(_WORKER), method, *files]
            # Some leave files of their own where they are run.
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
            if done.returncode or not output.exists() or not cost.exists():
                lines = done.stderr.strip().splitlines() or [f"no result, exit code {done.returncode}"]
                return Row(method, failure=_short(lines[-1]))
        found = json.loads(cost.read_text())
        return Row(method, found["seconds"], found["peak"], modelio.size_on_disk(output))

    def _judged(self, row: Row) -> Row:
        """Compare and time a result."""
        before, after = Runnable(self.model), Runnable(self.folder / f"{row.method}.onnx")
        errors = compare(before, after, self._held, _OPTIONS).outputs
        task = self._task(outputs(self.folder / f"{row.method}.onnx", self._held)) if self.metric else ""
        feeds = self._held.first().feeds
        counts = sorted({1, bench.all_threads()}) if self.seconds else []
        timed = Runnable(self.reference or self.model)
        speeds = tuple(bench.alternate(timed, after, feeds, _OPTIONS, count, self.seconds) for count in counts)
        return dataclasses.replace(row, errors=errors, task=task, speeds=speeds)

    def _task(self, found: Arrays) -> str:
        return self.metric(self._feeds, self.labels, self._expected, found) if self.metric else ""


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def table(rows: Iterable[Row], title: str) -> Table:
    """The rows as a table; speeds with the lowest and the highest pair."""
    made = Table("tool", "SQNR, cosine", "task", "threads: speed", "tool s", "peak MB", "MB", title=title)
    for row in rows:
        several = len(row.errors) > 1
        errors = [f"{f'{k}: ' if several else ''}{e.sqnr:.1f} dB, {e.cosine:.5f}" for k, e in row.errors.items()]
        speeds = [f"{s.threads}: {s.ratio:.2f}x ({s.ratio_low:.2f} to {s.ratio_high:.2f})" for s in row.speeds]
        made.add_row(
            row.method,
            "\n".join(errors) + (f"failed: {row.failure}" if row.failure else ""),
            row.task,
            "\n".join(speeds),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.peak is None else f"{row.peak / 1e6:.0f}",
            "" if row.size is None else f"{row.size / 1e6:.1f}",
        )
    return made
