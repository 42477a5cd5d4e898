"""One run of the main job: build, audit, time, choose again where it is slower, compare."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import time
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qgraph import audit, bench, calibration, compare, data, errors, modelio, registry, session
from qgraph.compare import Runnable
from qgraph.data import Dataset, DataSource
from qgraph.errors import AuditError, SlowerError
from qgraph.observers import OBSERVERS
from qgraph.options import Options
from qgraph.pipeline import Context
from qgraph.report import Fidelity, NodeReport, Report, Speed
from qgraph.session import Feeds
from qgraph.spec import Scheme
from qgraph.targets import ABSORBED, KERNEL, REASON, Target

__all__ = ["Job", "Progress"]

Progress = Callable[[str, int, int], None]
_HELD_BACK = 0.15
_ROUNDS = 3


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
        if options.observer is not None and options.observer not in OBSERVERS:
            raise errors.unknown("observer", options.observer, OBSERVERS)
        progress("reading", 0, 0)
        self.float_model = modelio.read(source) if isinstance(source, (str, Path)) else source.clone()
        self.inputs = data.inputs_of(self.float_model)
        self.measured: dict[str, tuple[float, float]] = {}
        self.key = modelio.fingerprint(self.float_model)
        self.external = modelio.has_external(self.float_model)
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
        staged = self._best(calibrate, feeds)
        self._compare(staged, held, apart)
        self._footprints(staged, feeds)
        self.report.seconds = time.perf_counter() - start
        return staged

    def _best(self, calibrate: Dataset, feeds: Feeds) -> modelio.Staged:
        """Build until the result runs in its planned kernels and is not slower than the original."""
        keep = self._keep_float()
        found: audit.Audit | None = None
        for _ in range(_ROUNDS):
            model = self._build(calibrate, keep)
            staged = modelio.stage(model, self.output or Path("model.onnx"), self.workspace, self.external)
            found = self._audit(staged, model)
            if not found.clean:
                keep.update(_not_chosen(model, found))
                continue
            slowest = self._measure(staged, feeds)
            if slowest is None or self.options.force:
                return staged
            if self.measured:
                raise SlowerError(
                    f"The result runs at {slowest.ratio:.2f}x of its input on {slowest.threads} thread(s), even after "
                    "its slower parts went back to float, so it was not written. Use --force to write it all the same."
                )
            self.measured = self._node_times(staged, model, feeds)
            self.report.notes.append(
                f"A first result ran at {slowest.ratio:.2f}x: the choice was made again with times measured here."
            )
        assert found is not None
        raise AuditError(_audit_message(found))

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

    def _keep_float(self) -> dict[str, str]:
        """Pattern -> reason; a pattern that matches nothing is an error."""
        nodes = [(node.name or "", node.op_type) for node in self.float_model.graph.all_nodes()]
        for pattern in self.options.keep_float:
            if not any(fnmatch.fnmatchcase(name, pattern) or op_type == pattern for name, op_type in nodes):
                known = {name for name, _ in nodes if name} | {op_type for _, op_type in nodes}
                raise errors.unknown("node or operator", pattern, known)
        return {pattern: f"left in float by the option {pattern!r}" for pattern in self.options.keep_float}

    def _build(self, calibrate: Dataset, keep: dict[str, str]) -> ir.Model:
        model = self.float_model.clone()
        pipeline = registry.pipeline(self.scheme.pipeline)(self._context(calibrate, keep))
        model = pipeline(model).model
        self.report.steps = pipeline.steps
        self.report.calibration_samples = len(calibrate)
        if self.options.save_ranges is not None:
            calibration.save(model, self.options.save_ranges, self.key)
        return model

    def _context(self, calibrate: Dataset | None, keep: dict[str, str]) -> Context:
        return Context(
            self.target,
            self.scheme,
            calibrate,
            self.folder,
            self.options.observer,
            self.options.memory,
            (self.options.ranges, self.key) if self.options.ranges is not None else None,
            keep,
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
                self.report.nodes.append(NodeReport(name, node.op_type, kernel="(absorbed)"))
            elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                reason = str(node.meta.get(REASON, "inside a body of If, Loop or Scan"))
                self.report.nodes.append(NodeReport(name, node.op_type, reason=reason))
        return found

    def _compare(self, staged: modelio.Staged, held: Dataset, apart: bool) -> None:
        self.progress("comparing", 0, 0)
        options = self.target.options()
        found: Fidelity = compare.compare(self.original, Runnable(staged.path), held, options, apart)
        stored = ir.load(staged.path)
        layers = compare.layer_errors(self.original, stored, staged.path.parent, held, options)
        self.report.fidelity = dataclasses.replace(found, layers=layers)

    def _measure(self, staged: modelio.Staged, feeds: Feeds) -> Speed | None:
        """Time both; return the slowest ratio if the result is slower than the original."""
        if self.options.bench_seconds <= 0:
            self.report.notes.append("The models were not timed, so nothing is promised about speed.")
            return None
        self.report.speed = []
        for threads in sorted({1, bench.all_threads()}):
            what = f"timing on {threads} thread{'s' * (threads > 1)}"
            speed = bench.alternate(
                self.original,
                Runnable(staged.path),
                feeds,
                self.target.options(),
                threads,
                self.options.bench_seconds,
                functools.partial(self.progress, what),
            )
            self.report.speed.append(speed)
        slowest = min(self.report.speed, key=lambda speed: speed.ratio)
        return slowest if slowest.ratio < 1.0 else None

    def _footprints(self, staged: modelio.Staged, feeds: Feeds) -> None:
        """Size, load time and memory of both, when the original is a file that the runtime can read."""
        if self.options.bench_seconds <= 0 or self.path is None:
            return
        self.progress("measuring memory", 0, 0)
        self.report.before = bench.footprint(self.path, feeds, self.target.options())
        self.report.after = bench.footprint(staged.path, feeds, self.target.options())

    def _node_times(self, staged: modelio.Staged, model: ir.Model, feeds: Feeds) -> dict[str, tuple[float, float]]:
        """Seconds of each planned node in float and in integers, from the runtime's profiles of both graphs."""
        self.progress("profiling", 0, 0)
        plain = self.float_model.clone()
        registry.pipeline("plan")(self._context(None, {}))(plain)
        options = self.target.options(threads=1)
        in_float = bench.node_times(Runnable(plain, self.folder), feeds, options)
        in_integers = bench.node_times(Runnable(staged.path), feeds, options)
        planned = audit.plan_of(model).operators
        return {
            name: (in_float[name], in_integers[name]) for name in planned if name in in_float and name in in_integers
        }


def _not_chosen(model: ir.Model, found: audit.Audit) -> dict[str, str]:
    """What the runtime did not fuse, with what was seen as the reason to leave it in float."""
    reasons = {n: f"the runtime did not choose the planned kernel: {what}" for n, what in found.problems.items()}
    for node in model.graph:
        if node.meta.get(KERNEL) is None:
            continue
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            source = maker.inputs[0] if maker is not None and maker.op_type == "DequantizeLinear" else None
            if source is not None and source.name in found.unfused:
                reasons[str(node.name)] = "the runtime would dequantize its weight at every run"
    return reasons


def _audit_message(found: audit.Audit) -> str:
    lines = [f"{name}: {what}" for name, what in found.problems.items()]
    lines += [f"constant {name} is dequantized at every run, for {readers}" for name, readers in found.unfused.items()]
    return (
        "The model does not run in the planned kernels. "
        + "; ".join(lines[:5])
        + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    )
