"""What happened and why: every decision with its reason, every number with its unit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from qgraph.errors import ModelError

__all__ = ["Fidelity", "Footprint", "Latency", "Layer", "NodeReport", "OutputError", "Report", "Speed", "Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass: name, seconds, and by how many each operator's count changed."""

    name: str
    seconds: float
    operators: dict[str, int]


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """One node of the result.

    Attributes:
        name: its name.
        op_type: its operator.
        kernel: operator of the integer kernel that the runtime runs it in; None in float.
        reason: why it is in float; None in integers.
    """

    name: str
    op_type: str
    kernel: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class OutputError:
    """How far one output is from the original's.

    Attributes:
        sqnr: signal to quantization noise ratio over all samples, dB; infinite when equal.
        cosine: mean over samples of the cosine similarity.
        max_error: largest absolute difference.
        agreement: share of samples with the same largest element, where the output looks like class scores; else None.
    """

    sqnr: float
    cosine: float
    max_error: float
    agreement: float | None = None


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
        return min(self.outputs.values(), key=lambda o: o.sqnr)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one model: median and the lowest and highest block's median, seconds per run."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """Both models, timed in alternating blocks.

    Attributes:
        threads: intra-op threads.
        before: the original.
        after: the result.
        ratio: median over pairs of neighbouring blocks of before / after: above 1 is faster.
        ratio_low: lowest pair.
        ratio_high: highest pair.
        blocks: number of pairs.
    """

    threads: int
    before: Latency
    after: Latency
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model takes: bytes on disk, seconds to load, bytes of resident memory that loading and a run add."""

    disk: int
    load_seconds: float
    resident: int


@dataclasses.dataclass
class Report:
    """Everything about one optimization."""

    source: str
    target: str
    scheme: str
    runtime: str
    output: str | None = None
    calibration_samples: int = 0
    seconds: float = 0.0
    steps: list[Step] = dataclasses.field(default_factory=list[Step])
    nodes: list[NodeReport] = dataclasses.field(default_factory=list[NodeReport])
    notes: list[str] = dataclasses.field(default_factory=list[str])
    fidelity: Fidelity | None = None
    speed: list[Speed] = dataclasses.field(default_factory=list[Speed])
    before: Footprint | None = None
    after: Footprint | None = None

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
        plain: dict[str, Any] = _finite(dataclasses.asdict(self))
        return plain

    def save(self, path: str | Path) -> None:
        """Write as JSON, beside and moved into place."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
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
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return value
