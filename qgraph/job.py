"""One run of the main job: build, audit, time, choose again where it is slower, compare."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import audit, bench, compare, data, modelio, registry, session
from qgraph.compare import Runnable
from qgraph.data import Dataset, DataSource
from qgraph.errors import AccuracyError, AuditError, ModelError, NothingQuantizedError, OptionError, SlowerError
from qgraph.options import Options
from qgraph.pipeline import Context
from qgraph.report import Fidelity, NodeReport, Report, Speed
from qgraph.session import Feeds
from qgraph.spec import Scheme
from qgraph.targets import ABSORBED, KERNEL, REASON, Target

__all__ = ["Job", "Progress"]

Progress = Callable[[str, int, int], None]
_HELD_BACK = 0.15
_ROUNDS = 4
_FAIR_DECIBELS = 12.0
_LEAST_DECIBELS = 6.0


class Job:
    """One call of `optimize`."""

    def __init__(
        self,
        source: str | Path | ir.Model,
        output: Path | None,
        options: Options,
        workspace: modelio.Workspace,
        progress: Progress,
    ):
        self.options, self.workspace, self.progress, self.output = options, workspace, progress, output
        self.target: Target = registry.target(options.target)
        self.scheme: Scheme = self.target.scheme(options.scheme)
        progress("reading", 0, 0)
        self.float_model = modelio.read(source) if isinstance(source, (str, Path)) else _copy(source)
        self.inputs = data.inputs_of(self.float_model)
        self.measured: dict[str, tuple[float, float]] = {}
        self.refused: dict[str, str] = {}
        self.save_ranges = Path(self.options.save_ranges) if self.options.save_ranges is not None else None
        self.key = modelio.fingerprint(self.float_model)
        self.external = modelio.has_external(self.float_model)
        self.avoid = modelio.external_files(self.float_model)
        self.folder = workspace.spill(self.float_model)
        readable = self.float_model.ir_version <= session.max_ir_version()
        self.path = Path(source) if isinstance(source, (str, Path)) and readable else None
        # The original as the runtime can load it: its IR version may be too new.
        self.float_model.ir_version = min(self.float_model.ir_version, session.max_ir_version())
        self.original = Runnable(self.float_model, self.folder)
        self.report = Report(
            source=str(source) if isinstance(source, (str, Path)) else f"graph {source.graph.name!r}",
            target=self.target.name,
            scheme=self.scheme.name,
            runtime=f"onnxruntime {session.runtime_version()}",
            output=str(output) if output is not None else None,
        )

    def run(self, source: DataSource, evaluation: DataSource | None) -> modelio.Staged:
        """All of it, but for moving the result into place."""
        start = time.perf_counter()
        calibrate, held, apart = self._data(source, evaluation)
        feeds = held.first().feeds
        if self.options.bench_seconds > 0 and self.options.target != "cpu":
            here = registry.target("cpu").name
            if here != self.target.name:
                self.report.notes.append(f"Times are this machine's, which is {here}, not those of {self.target.name}.")
        staged = self._best(calibrate, feeds)
        self._compare(staged, held, apart)
        self._footprints(staged, feeds)
        self.report.seconds = time.perf_counter() - start
        return staged

    def _best(self, calibrate: Dataset, feeds: Feeds) -> modelio.Staged:
        """A result in its planned kernels that is not slower than the original; chosen again where it is."""
        staged, model = self._audited(calibrate)
        slowest = self._measure(staged, feeds)
        if slowest is None or self.options.force:
            return staged
        self.report.notes.append(
            f"A first result ran at {slowest.ratio:.2f}x: the choice was made again with times measured here."
        )
        self.measured = self._node_times(staged, model, calibrate, feeds)
        try:
            staged, _ = self._audited(calibrate)
        except NothingQuantizedError as error:
            raise SlowerError(
                f"The result ran at {slowest.ratio:.2f}x of its input on {slowest.threads} thread(s), and by the times "
                "measured here no node is worth quantizing, so nothing was written."
            ) from error
        slowest = self._measure(staged, feeds)
        if slowest is None:
            return staged
        raise SlowerError(
            f"The result runs at {slowest.ratio:.2f}x of its input on {slowest.threads} thread(s), even after its "
            "slower parts went back to float, so it was not written. Use --force to write it all the same."
        )

    def _audited(self, calibrate: Dataset) -> tuple[modelio.Staged, ir.Model]:
        """A result whose planned kernels all appear in the runtime; what does not fuse goes back to float."""
        destination = self.output or Path("model.onnx")
        for attempt in range(_ROUNDS):
            model = self._build(calibrate)
            staged = modelio.stage(model, destination, self.workspace, self.external, self.avoid)
            found = self._audit(staged, model)
            if found.clean:
                return staged, model
            refused = _not_chosen(model, found)
            if attempt + 1 == _ROUNDS or not refused.keys() - self.refused.keys():
                raise AuditError(found.summary)
            self.refused.update(refused)
        raise AssertionError("unreachable")

    # -- stages ---------------------------------------------------------------------------------------------------

    def _data(self, source: DataSource, evaluation: DataSource | None) -> tuple[Dataset, Dataset, bool]:
        """Calibration data, evaluation data, and whether the two are apart."""
        self.progress("reading data", 0, 0)
        given = data.load(source, self.inputs)
        if evaluation is not None:
            return given, data.load(evaluation, self.inputs), True
        calibrate, held = given.split(_HELD_BACK)
        if held is None:
            self.report.notes.append(
                "There are too few samples to hold some back: the comparison ran on the calibration data itself."
            )
            return given, given, False
        return calibrate, held, True

    def _build(self, calibrate: Dataset) -> ir.Model:
        model = self.float_model.clone()
        pipeline = registry.pipeline(self.scheme.pipeline)(self._context(calibrate))
        model = pipeline(model).model
        self.report.steps = pipeline.steps
        self.report.calibration_samples = calibrate.count()
        # Later rounds plan less, and would leave ranges out.
        self.save_ranges = None
        return model

    def _context(self, calibrate: Dataset) -> Context:
        ranges = self.options.ranges
        return Context(
            self.target,
            self.scheme,
            calibrate,
            self.folder,
            self.options.observer,
            self.options.memory,
            (Path(ranges), self.key) if ranges is not None else None,
            (self.save_ranges, self.key) if self.save_ranges is not None else None,
            self.options.keep_float,
            self.refused,
            self.measured,
            self.progress,
        )

    def _audit(self, staged: modelio.Staged, model: ir.Model) -> audit.Audit:
        self.progress("auditing", 0, 0)
        found = audit.audit(staged.path, audit.plan_of(model), self.target)
        self.report.nodes = []
        for node in model.graph.all_nodes():
            name = node.name or ""
            if node.meta.get(KERNEL) is not None:
                self.report.nodes.append(NodeReport(name, node.op_type, kernel=found.kernels.get(name)))
            elif ABSORBED in node.meta:
                # Absorbed ones are gone; one that is still here was not.
                self.report.nodes.append(NodeReport(name, node.op_type, reason="the codes do not end at its bounds"))
            elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                reason = str(node.meta.get(REASON, "inside a body of If, Loop or Scan"))
                self.report.nodes.append(NodeReport(name, node.op_type, reason=reason))
        return found

    def _compare(self, staged: modelio.Staged, held: Dataset, apart: bool) -> None:
        """Compare outputs and layers; refuse a result that is mostly noise."""
        self.progress("comparing", 0, 0)
        options = self.target.options()
        found: Fidelity = compare.compare(self.original, Runnable(staged.path), held, options, apart)
        stored = ir.load(staged.path)
        layers = compare.layer_errors(self.original, stored, staged.path.parent, held, options)
        self.report.fidelity = dataclasses.replace(found, layers=layers)
        name, worst = min(found.outputs.items(), key=lambda item: _comparable(item[1].sqnr))
        if _comparable(worst.sqnr) >= _FAIR_DECIBELS:
            return
        culprits = ", ".join(layer.value for layer in sorted(layers, key=lambda layer: layer.sqnr)[:3])
        what = f"Output {name!r} has an SQNR of only {worst.sqnr:.1f} dB."
        if _comparable(worst.sqnr) < _LEAST_DECIBELS and not self.options.force:
            raise AccuracyError(
                f"{what} That is mostly noise, so nothing was written. The least faithful inner values are {culprits}: "
                "leave their nodes in float (--keep-float), try another observer, or use --force."
            )
        self.report.notes.append(f"{what} The least faithful inner values are {culprits}.")

    def _measure(self, staged: modelio.Staged, feeds: Feeds) -> Speed | None:
        """Time both; return the slowest ratio if the result is slower than the original."""
        if self.options.bench_seconds <= 0:
            self.report.notes.append("The models were not timed, so nothing is promised about speed.")
            return None
        self.report.speed = []
        for threads in sorted({1, bench.all_threads()}):
            speed = self._time(staged, feeds, threads, self.options.bench_seconds)
            if speed.ratio < 1.0:
                # A verdict of such weight is not left to one short measurement.
                speed = self._time(staged, feeds, threads, 3 * self.options.bench_seconds)
            self.report.speed.append(speed)
        slowest = min(self.report.speed, key=lambda speed: speed.ratio)
        return slowest if slowest.ratio < 1.0 else None

    def _time(self, staged: modelio.Staged, feeds: Feeds, threads: int, seconds: float) -> Speed:
        what = f"timing on {threads} thread{'s' * (threads > 1)}"
        return bench.alternate(
            self.original,
            Runnable(staged.path),
            feeds,
            self.target.options(),
            threads,
            seconds,
            functools.partial(self.progress, what),
        )

    def _footprints(self, staged: modelio.Staged, feeds: Feeds) -> None:
        """Size, load time and memory of both, when the original is a file that the runtime can read."""
        if self.options.bench_seconds <= 0 or self.path is None:
            return
        self.progress("measuring memory", 0, 0)
        self.report.before = bench.footprint(self.path, feeds, self.target.options())
        self.report.after = bench.footprint(staged.path, feeds, self.target.options())

    def _node_times(
        self, staged: modelio.Staged, model: ir.Model, calibrate: Dataset, feeds: Feeds
    ) -> dict[str, tuple[float, float]]:
        """Seconds of each planned node in float and in integers, from the runtime's profiles of both graphs."""
        self.progress("profiling", 0, 0)
        plain = self.float_model.clone()
        registry.pipeline("plan")(self._context(calibrate))(plain)
        options = self.target.options(threads=1)
        in_float = bench.node_times(Runnable(plain, self.folder), feeds, options)
        in_integers = bench.node_times(Runnable(staged.path), feeds, options)
        planned = audit.plan_of(model).operators
        return {
            name: (in_float[name], in_integers[name]) for name in planned if name in in_float and name in in_integers
        }


def _comparable(decibels: float) -> float:
    """NaN as the worst; an output that is all zeros has no signal to compare noise with."""
    if np.isnan(decibels):
        return float("-inf")
    return float("inf") if decibels == float("-inf") else decibels


def _copy(model: Any) -> ir.Model:
    if not isinstance(model, ir.Model):
        raise OptionError(
            f"The model is a {type(model).__name__}; give a path or an onnx_ir.Model (onnx_ir.from_proto makes one)."
        )
    try:
        return model.clone()
    except Exception as error:
        raise ModelError(
            "The model cannot be copied. Its nodes may be out of order: run onnx_ir's TopologicalSortPass first."
        ) from error


def _not_chosen(model: ir.Model, found: audit.Audit) -> dict[str, str]:
    """What the runtime did not fuse, with what was seen as the reason to leave it in float."""
    planned = {str(node.name): node for node in model.graph if KERNEL in node.meta}
    reasons = {
        name: f"the runtime did not choose the planned kernel: {what}"
        for name, what in found.problems.items()
        if name in planned
    }
    for constant, readers in found.unfused.items():
        ours = [name for name in readers if name in planned]
        for name in ours or [name for name, node in planned.items() if _reads(node, constant)]:
            reasons[name] = "the runtime would dequantize its weight at every run"
    return reasons


def _reads(node: ir.Node, constant: str) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(m is not None and m.inputs and m.inputs[0] is not None and m.inputs[0].name == constant for m in makers)
