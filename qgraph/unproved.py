"""The job where the whole model is not run: quantize what pays by the target's costs, and prove its parts, or nothing.

So a model need not fit into memory. What is written then is said not to have been compared or timed as a whole.
"""

from __future__ import annotations

import dataclasses
import math
import time

from qgraph import checks, details, outcome, part_checks
from qgraph.data import DataSource
from qgraph.errors import OptionError
from qgraph.job import Job
from qgraph.modelio import Staged
from qgraph.report import Sensitivity
from qgraph.spec import Mixture
from qgraph.targets import KERNEL, WEIGHTS
from qgraph.words import decibels

__all__ = ["run"]

_NAMED = 3


def run(job: Job, source: DataSource | None, evaluation: DataSource | None) -> Staged:
    """All of it, but for moving the result into place.

    Raises:
        OptionError: there is data to judge by, which nothing is.
        NothingQuantizedError: nothing pays.
        AuditError: a part does not do what was planned.
    """
    if evaluation is not None:
        raise OptionError(
            f"Evaluation data is for a run of the whole model: leave it out, or say --check {checks.WHOLE}."
        )
    if isinstance(job.scheme, Mixture) and job.scheme.name == WEIGHTS and job.options.bits_per_weight is None:
        raise OptionError(
            f"Scheme {WEIGHTS!r} finds the fewest bits that keep a budget, which nothing is held to with --check "
            f"{job.check}: say which bits, as --scheme int4, or --check {checks.WHOLE}."
        )
    start = time.perf_counter()
    report, proved = job.report, job.check == checks.PARTS
    data = job.divide(source, None).calibrate if source is not None else None
    builder = job.builder(data)
    # What the CPU provider makes of a graph tells nothing about a provider that fuses in its own way.
    builder.audit = part_checks.audit_graph if proved and job.target.fuses_like_host else part_checks.assumed
    built = builder.build(learn=data is not None)
    report.nodes, report.steps = built.nodes, built.steps
    report.notes += outcome.notes(built.model, built.steps)
    report.calibration_samples = data.count() if data is not None else 0
    report.budget = None
    details.weigh(report, job.path, built.staged.path, None)
    if proved:
        options = job.target.options()
        report.sensitivity = part_checks.errors(builder.prepared, built.model, built.staged.path, options, job.progress)
    if job.target.ordinal:
        report.sensitivity = [dataclasses.replace(one, saved=None) for one in report.sensitivity]
    count = sum(KERNEL in node.meta for node in built.model.graph)
    report.notes.append(_told(report.sensitivity, count) if proved else _NOTHING)
    report.seconds = time.perf_counter() - start
    return built.staged


_NOTHING = (
    "Nothing was checked (--check none): the result has not been loaded, run, compared or timed, so nothing is "
    "promised about its accuracy, its speed or its kernels."
)


def _told(found: list[Sensitivity], count: int) -> str:
    """What was proved, and what was not."""
    whole = (
        "The whole model was not run, compared or timed (--check parts), so nothing is promised about its accuracy or "
        "its speed. Its graph loads, in the planned kernels"
    )
    if not found:
        return f"{whole}; none of its {count} quantized nodes was run by itself, which is for weights in blocks."
    levels = [-10 * math.log10(one.noise) if one.noise > 0 else math.inf for one in found]
    worst = ", ".join(f"{one.node} {decibels(level)}" for one, level in zip(found[:_NAMED], levels, strict=False))
    middle = decibels(sorted(levels)[len(levels) // 2])
    return (
        f"{whole}; {len(found)} of its {count} quantized nodes were run by themselves on random inputs: median SQNR "
        f"{middle}, worst {worst}."
    )
