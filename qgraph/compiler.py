"""The main job: a model in; a quantized model out that was loaded, audited, compared and timed before it is written."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qgraph import audit, bench, calibration, compare, data, errors, modelio, registry, session
from qgraph.compare import Runnable
from qgraph.data import Dataset, DataSource
from qgraph.errors import AuditError, OptionError, SlowerError
from qgraph.observers import OBSERVERS
from qgraph.pipeline import Context
from qgraph.report import Fidelity, NodeReport, Report, Speed
from qgraph.spec import Scheme
from qgraph.targets import KERNEL, REASON, Target

__all__ = ["Options", "Result", "optimize"]

Progress = Callable[[str, int, int], None]
_HELD_BACK = 0.15
_ROUNDS = 3
_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Options:
    """How to optimize.

    Attributes:
        target: name of the target; `cpu` is the machine this runs on.
        scheme: name of the scheme, one of the target's.
        observer: name of the observer; None for the scheme's own.
        keep_float: patterns (shell style) of node names or operator types to leave in float.
        memory: bytes that the observed values of one calibration run may take.
        ranges: file of saved ranges to use instead of running the calibration data.
        save_ranges: file to save the observed ranges in.
        bench_seconds: about how long to time both models for each thread count; 0 does not time, and so cannot promise
            that the result is not slower.
        force: write the result even if it is slower than its input.
    """

    target: str = "cpu"
    scheme: str = "int8"
    observer: str | None = None
    keep_float: tuple[str, ...] = ()
    memory: int = calibration.DEFAULT_BUDGET
    ranges: Path | None = None
    save_ranges: Path | None = None
    bench_seconds: float = 4.0
    force: bool = False


@dataclasses.dataclass
class Result:
    """The optimized model and everything about it."""

    model: ir.Model
    report: Report
    _workspace: modelio.Workspace | None = None


def optimize(
    model: str | Path | ir.Model,
    output: str | Path | None = None,
    *,
    data: DataSource,
    evaluation: DataSource | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model for a target.

    Args:
        model: a file or an IR; neither is changed.
        output: where to write the result; None only returns it.
        data: calibration data, see `qgraph.data.load`.
        evaluation: data for the comparison with the original. By default a part of `data`, chosen by content, is held
            back from calibration for it.
        options: see `Options`.
        progress: called with (what is done, steps done, steps in all).

    Returns:
        The model as written, and the report.

    Raises:
        QGraphError: see `qgraph.errors`; nothing has been written then, and an older output still stands.
    """
    output = Path(output) if output is not None else None
    if output is not None and isinstance(model, (str, Path)) and output.resolve() == Path(model).resolve():
        raise OptionError("The output would replace the input; name another file.")
    workspace = modelio.Workspace(output)
    try:
        job = _Job(model, output, options or Options(), workspace, progress or (lambda *_: None))
        result = job.run(data, evaluation)
    except BaseException:
        workspace.close()
        raise
    if any(isinstance(v.const_value, ir.ExternalTensor) for v in result.model.graph.initializers.values()):
        if output is None:
            # The weights lie there as long as the result lives.
            result._workspace = workspace
            return result
    workspace.close()
    return result


class _Job:
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
        self.key = modelio.fingerprint(self.float_model)
        self.external = modelio.has_external(self.float_model)
        self.folder = workspace.spill(self.float_model)
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

    def run(self, source: DataSource, evaluation: DataSource | None) -> Result:
        """All of it."""
        start = time.perf_counter()
        calibrate, held, apart = self._data(source, evaluation)
        keep = self._keep_float()
        best: tuple[modelio.Staged, ir.Model] | None = None
        for attempt in range(_ROUNDS):
            model = self._build(calibrate, keep)
            staged = modelio.stage(model, self.output or Path("model.onnx"), self.workspace, self.external)
            found = self._audit(staged, model)
            if not found.clean and attempt + 1 < _ROUNDS:
                # What the runtime does not fuse is left in float, with what was seen as the reason.
                keep.update(
                    {n: f"the runtime did not choose the planned kernel: {w}" for n, w in found.problems.items()}
                )
                keep.update(_readers(model, found))
                continue
            if not found.clean:
                raise AuditError(_audit_message(found))
            best = (staged, model)
            break
        assert best is not None
        staged, model = best
        self._compare(staged, model, held, apart)
        self._measure(staged, held)
        self.report.seconds = time.perf_counter() - start
        if self.output is not None:
            staged.commit()
            return Result(modelio.read(self.output), self.report)
        return Result(modelio.read(staged.path), self.report)

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
        """Node name -> reason, from the caller's patterns; a pattern that matches nothing is an error."""
        keep: dict[str, str] = {}
        nodes = [(node.name or "", node.op_type) for node in self.float_model.graph.all_nodes()]
        for pattern in self.options.keep_float:
            hits = [n for n, op in nodes if fnmatch.fnmatchcase(n, pattern) or op == pattern]
            if not hits:
                raise errors.unknown(
                    "node or operator", pattern, {*(n for n, _ in nodes if n), *(op for _, op in nodes)}
                )
            keep.update(dict.fromkeys(hits, f"left in float by the option {pattern!r}"))
        return keep

    def _build(self, calibrate: Dataset, keep: dict[str, str]) -> ir.Model:
        context = Context(
            self.target,
            self.scheme,
            calibrate,
            self.folder,
            self.options.observer,
            self.options.memory,
            (self.options.ranges, self.key) if self.options.ranges is not None else None,
            keep,
            self.progress,
        )
        model = self.float_model.clone()
        pipeline = registry.pipeline(self.scheme.pipeline)(context)
        model = pipeline(model).model
        self.report.steps = pipeline.steps
        self.report.calibration_samples = len(calibrate)
        if self.options.save_ranges is not None:
            calibration.save(model, self.options.save_ranges, self.key)
        return model

    def _audit(self, staged: modelio.Staged, model: ir.Model) -> audit.Audit:
        self.progress("auditing", 0, 0)
        found = audit.audit(staged.path, audit.plan_of(model), self.target)
        self.report.nodes = []
        for node in model.graph.all_nodes():
            name = node.name or ""
            if node.meta.get(KERNEL) is not None:
                self.report.nodes.append(NodeReport(name, node.op_type, kernel=found.kernels.get(name)))
            elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                reason = str(node.meta.get(REASON, "inside a body of If, Loop or Scan"))
                self.report.nodes.append(NodeReport(name, node.op_type, reason=reason))
        return found

    def _compare(self, staged: modelio.Staged, model: ir.Model, held: Dataset, apart: bool) -> None:
        self.progress("comparing", 0, 0)
        options = self.target.options()
        found: Fidelity = compare.compare(self.original, Runnable(staged.path), held, options, apart)
        stored = ir.load(staged.path)
        layers = compare.layer_errors(self.original, stored, staged.path.parent, held, options)
        self.report.fidelity = dataclasses.replace(found, layers=layers)

    def _measure(self, staged: modelio.Staged, held: Dataset) -> None:
        """Time both; refuse a result that is slower."""
        if self.options.bench_seconds <= 0:
            self.report.notes.append("The models were not timed, so nothing is promised about speed.")
            return
        feeds = held.first().feeds
        speeds: list[Speed] = []
        for threads in sorted({1, bench.all_threads()}):
            self.progress(f"timing on {threads} thread{'s' * (threads > 1)}", 0, 0)
            speeds.append(
                bench.alternate(
                    self.original,
                    Runnable(staged.path),
                    feeds,
                    self.target.options(),
                    threads,
                    self.options.bench_seconds,
                )
            )
        self.report.speed = speeds
        slowest = min(speeds, key=lambda s: s.ratio)
        if slowest.ratio < 1.0 - _TOLERANCE and not self.options.force:
            raise SlowerError(
                f"The result runs at {slowest.ratio:.2f}x of its input on {slowest.threads} thread(s), so it was not "
                "written. Use --force to write it all the same, or another scheme."
            )


def _readers(model: ir.Model, found: audit.Audit) -> dict[str, str]:
    """The nodes that read a constant which the runtime would dequantize at every run."""
    reasons: dict[str, str] = {}
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
