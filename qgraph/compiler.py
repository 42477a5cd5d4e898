"""The main job: a model in; a quantized model out that was loaded, audited, compared and timed before it is written."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph import checks, fingerprint, modelio, registry, shards, unproved
from qgraph.data import DataSource, inputs_of, load
from qgraph.errors import AccuracyError, NothingQuantizedError, ProviderError, first_line, unknown
from qgraph.job import AUTO, Job, Progress
from qgraph.options import Options, refuse_overwriting
from qgraph.report import Report

__all__ = ["Options", "Result", "optimize"]

_FATAL = re.compile(r", so nothing was written| Widen the budget, .*$")
"""What the error of a step of a ladder says, and is not so where another step follows."""


@dataclasses.dataclass
class Result:
    """The optimized model, everything about it, and the folder of its weights while they have no other place."""

    model: ir.Model
    report: Report
    workspace: modelio.Workspace | None = dataclasses.field(default=None, repr=False)


def optimize(
    model: str | Path | ir.Model,
    output: str | Path | None = None,
    *,
    data: DataSource | None = None,
    evaluation: DataSource | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Result:
    """Quantize a model for a target.

    Args:
        model: a file or an IR; neither is changed.
        output: where to write the result; None only returns it.
        data: calibration data, see `qgraph.data.load`; None for what can do without.
        evaluation: data for the comparison with the original. By default a part of `data`, chosen by content, is held
            back from calibration for it.
        options: see `Options`.
        changes: fields of `Options` by name, as `target="x86"`, instead of or on top of `options`.
        progress: called with (what is done, steps done, steps in all).

    Returns:
        The model as written, and the report.

    Raises:
        QGraphError: see `qgraph.errors`; nothing has been written then, and an older output still stands.
    """
    fields = [field.name for field in dataclasses.fields(Options)]
    for name in changes:
        if name not in fields:
            raise unknown("option", name, [*fields, "data", "evaluation", "options", "progress"])
    options = dataclasses.replace(options or Options(), **changes)
    output = Path(output) if output is not None else None
    refuse_overwriting(
        {"output": output, "file of saved ranges": options.save_ranges, "state of the search": options.state},
        {"input": model, "calibration data": data, "evaluation data": evaluation, "file of ranges": options.ranges},
    )
    most = shards.limit(options.max_shard_size, registry.target(options.target).web)
    workspace = modelio.Workspace(output, most)
    try:
        job, staged = _climbed(model, output, options, workspace, progress or _silent, data, evaluation)
        job.report.notes += shards.notes(staged.path, most)
        if output is not None:
            job.report.notes += shards.left_behind(output, staged.path)
            staged.commit()
            job.report.files = fingerprint.of_files(output)
            job.report.sha256 = job.report.files[0].sha256
        result = Result(modelio.read(output or staged.path), job.report)
    except BaseException:
        workspace.close()
        raise
    if output is None and modelio.has_external(result.model):
        # The weights lie there as long as the result lives.
        result.workspace = workspace
    else:
        workspace.close()
    return result


def _climbed(
    model: str | Path | ir.Model,
    output: Path | None,
    options: Options,
    workspace: modelio.Workspace,
    progress: Progress,
    data: DataSource | None,
    evaluation: DataSource | None,
) -> tuple[Job, modelio.Staged]:
    """The job in the first scheme of the target's ladder that holds the budget; in the one that was asked for else."""
    ladder = (
        registry.target(options.target).ladder if options.scheme == AUTO and options.bits_per_weight is None else ()
    )
    if not ladder:
        job = Job(model, output, options, workspace, progress)
        return job, _run(job, data, evaluation)
    inputs = inputs_of(modelio.read(model) if isinstance(model, (str, Path)) else model)
    # What can be read once only is needed at every step.
    data, evaluation = (None if one is None else load(one, inputs) for one in (data, evaluation))
    notes: list[str] = []
    for scheme in ladder:
        last = scheme == ladder[-1]
        state = Path(f"{options.state}.{scheme}") if options.state is not None else None
        asked = dataclasses.replace(options, scheme=scheme, state=state, force=options.force and last)
        job = Job(model, output, asked, workspace, progress)
        job.report.notes[:0] = notes
        try:
            return job, _run(job, data, evaluation)
        except (AccuracyError, NothingQuantizedError, ProviderError) as error:
            if last:
                raise
            when = "next" if notes else "first"
            notes.append(f"Scheme {scheme!r} was tried {when}. {_FATAL.sub('', first_line(error, 1000))}")
    raise AssertionError("a ladder has a last step")


def _run(job: Job, data: DataSource | None, evaluation: DataSource | None) -> modelio.Staged:
    run = job.run if job.check == checks.WHOLE else functools.partial(unproved.run, job)
    return run(data, evaluation)


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""
