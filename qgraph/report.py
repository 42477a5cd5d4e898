"""What happened and why: every decision with its reason, every number with its unit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from qgraph.errors import ModelError
from qgraph.placement import Placement
from qgraph.speeds import Footprint, Latency, OperatorTime, Speed

__all__ = [
    "Budget",
    "Candidate",
    "Fidelity",
    "Footprint",
    "Latency",
    "Layer",
    "NodeReport",
    "OperatorTime",
    "OutputError",
    "Report",
    "Sensitivity",
    "Speed",
    "Step",
    "ValueHistogram",
    "WrittenFile",
]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass: name, seconds, change of each operator's count, node -> why it was left, notes for the reader."""

    name: str
    seconds: float
    operators: dict[str, int]
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """One node of the result.

    Attributes:
        name: its name.
        op_type: its operator.
        kernel: operator of the integer kernel that the runtime runs it in; None in float.
        reason: why it is in float; None in integers.
        scheme: scheme of its kernel; None in float.
    """

    name: str
    op_type: str
    kernel: str | None = None
    reason: str | None = None
    scheme: str | None = None


@dataclasses.dataclass(frozen=True)
class OutputError:
    """How far one output is from the original's.

    Attributes:
        sqnr: signal to quantization noise ratio over all samples, dB; infinite when equal.
        cosine: mean over samples of the cosine similarity.
        max_error: largest absolute difference.
        agreement: share of samples with the same largest element, where the output looks like class scores; else None.
        spread: how much the samples differ in what they lose of the cosine: standard deviation over mean.
    """

    sqnr: float
    cosine: float
    max_error: float
    agreement: float | None = None
    spread: float = 1.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """Error of one inner value: SQNR against the original's value of this name, dB."""

    value: str
    op_type: str
    sqnr: float


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Comparison with the original on data.

    Attributes:
        samples: number of runs compared.
        held_back: whether calibration did not see these samples.
        outputs: by output name.
        layers: inner values in order of execution.
        skipped: outputs whose shapes differ, with the first difference; their shape depends on their values.
    """

    samples: int
    held_back: bool
    outputs: dict[str, OutputError]
    layers: list[Layer] = dataclasses.field(default_factory=list[Layer])
    skipped: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def worst(self) -> OutputError:
        """The output with the lowest SQNR."""
        return min(self.outputs.values(), key=lambda o: -math.inf if math.isnan(o.sqnr) else o.sqnr)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the result may lose.

    Attributes:
        metric: what loss is measured by.
        limit: the largest loss allowed, in the metric's own unit.
        text: the budget in the user's words, as "cosine >= 0.99".
    """

    metric: str
    limit: float
    text: str

    @property
    def decibels(self) -> float | None:
        """The least SQNR that is asked for, where the budget is one of SQNR: its limit is the share of noise."""
        return -10 * math.log10(self.limit) if self.metric == "sqnr" and self.limit > 0 else None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One assignment of schemes to nodes that the search built and measured.

    Attributes:
        name: short label, unique within a report.
        nodes: scheme -> number of nodes in it; nodes without a kernel are not counted.
        loss: under the budget's metric; None when it was not measured.
        sqnr: of the worst output, dB; None when it was not measured.
        speed: threads (as text) -> times faster than the original.
        disk: bytes.
        verdict: "chosen", "within", "loses too much", "slower", or why it could not be had.
    """

    name: str
    nodes: dict[str, int]
    loss: float | None
    sqnr: float | None
    speed: dict[str, float]
    disk: int | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What one node costs and brings in one scheme.

    Attributes:
        node: its name.
        op_type: its operator.
        scheme: the scheme.
        noise: share of the worst output's power that quantizing this node alone turns into noise.
        exact: measured end to end; otherwise estimated from the node's own output.
        saved: seconds that the kernel saves on one thread, by estimate or profile; None where the target's costs are
            no times.
        failed: why it could not be measured, where that was tried; else an empty text.
    """

    node: str
    op_type: str
    scheme: str
    noise: float
    exact: bool
    saved: float | None
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class ValueHistogram:
    """Distribution of one quantized activation, and where its range was cut.

    Attributes:
        value: its name.
        edges: bin edges, ascending, one more than counts.
        counts: values in each bin.
        low: smallest number that the codes reach.
        high: largest.
        sqnr: of the value in the result, dB.
    """

    value: str
    edges: list[float]
    counts: list[int]
    low: float
    high: float
    sqnr: float


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """One file of what was written: its name beside the model, its size, and its SHA-256 in hexadecimal digits."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass
class Report:
    """Everything about one optimization; by `sha256`, of the output's .onnx file, and `files` they are told to match.

    `files` holds that file and each of its external data. They stay None and empty where no file was written.
    """

    source: str
    target: str
    scheme: str
    runtime: str
    output: str | None = None
    sha256: str | None = None
    files: list[WrittenFile] = dataclasses.field(default_factory=list[WrittenFile])
    check: str = "whole"
    calibration_samples: int = 0
    seconds: float = 0.0
    steps: list[Step] = dataclasses.field(default_factory=list[Step])
    nodes: list[NodeReport] = dataclasses.field(default_factory=list[NodeReport])
    notes: list[str] = dataclasses.field(default_factory=list[str])
    fidelity: Fidelity | None = None
    speed: list[Speed] = dataclasses.field(default_factory=list[Speed])
    before: Footprint | None = None
    after: Footprint | None = None
    budget: Budget | None = None
    candidates: list[Candidate] = dataclasses.field(default_factory=list[Candidate])
    sensitivity: list[Sensitivity] = dataclasses.field(default_factory=list[Sensitivity])
    histograms: list[ValueHistogram] = dataclasses.field(default_factory=list[ValueHistogram])
    operators: list[OperatorTime] = dataclasses.field(default_factory=list[OperatorTime])
    placement: Placement | None = None

    @property
    def quantized(self) -> list[NodeReport]:
        """Nodes in integer kernels."""
        return [node for node in self.nodes if node.kernel is not None]

    @property
    def refused(self) -> list[NodeReport]:
        """Nodes in float, with their reasons."""
        return [node for node in self.nodes if node.kernel is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinities as the string "inf", so that the JSON is standard."""
        return dict(_finite(dataclasses.asdict(self)))

    def save(self, path: str | Path) -> None:
        """Write as JSON, beside and moved into place."""
        temporary = Path(path).with_name(f".{Path(path).name}.part")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise ModelError(f"Cannot write the report to {str(path)!r}: {error.strerror}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
