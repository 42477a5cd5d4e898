"""Proof on a target's own provider: which nodes it took, and whether its numbers are right.

A provider that takes a node may still compute something else. So every model is run there and on the CPU provider, and
the two must agree to within what the provider may round, or what the model lost by quantization already.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import audit, caches, naming, runners, work
from qgraph.audit import Audit, Plan, original_name
from qgraph.compare import Runnable
from qgraph.data import Dataset
from qgraph.errors import ExecutionError, UnprovedError
from qgraph.placement import Left, Placement
from qgraph.runners import Ran, Runner
from qgraph.session import HOST, Feeds, Session, SessionOptions, runtime_version
from qgraph.targets import Target

__all__ = ["audited", "hint", "how", "missing", "place", "prove", "runner_of"]

_SAMPLES = 2
_SECONDS = 10.0
_ROUNDS = 3
_ROOM = 128 << 20
"""Bytes that the inputs and outputs of all samples of a proof may take."""
_ROUNDED = 2.0
"""Other roundings at every step may move a result by as much as quantization itself did, there and back."""
_CAREFUL = 0.8
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_OPTIMIZED_AWAY = "(no work)"


def runner_of(target: Target) -> Runner | None:
    """The runner that stands for the target's provider here, if it is set up."""
    runner = runners.RUNNERS.get(target.runner or "")
    return runner if runner is not None and runner.missing is None else None


def hint(target: Target) -> str:
    """The command that brings the target's runner here, where there is one."""
    runner = runners.RUNNERS.get(target.runner or "")
    return "" if runner is None else f"To have it here: {runner.setup}."


def missing(target: Target) -> str:
    """What is not here that it takes to run models for `target`, and how to have it."""
    runner = runners.RUNNERS.get(target.runner or "")
    lacks = "" if runner is None or runner.missing is None else runner.missing[:1].upper() + runner.missing[1:] + "."
    return " ".join(part for part in (target.missing, lacks, hint(target)) if part)


def how(target: Target) -> str | None:
    """Where a model for `target` can be run here, in words; None for nowhere."""
    if target.native:
        return f"onnxruntime {runtime_version()}, in this process"
    runner = runner_of(target)
    return None if runner is None else runner.how


def place(model: Path, target: Target, feeds: Sequence[Feeds]) -> Ran:
    """Run `model` on the target's provider, here or by its runner.

    Raises:
        ExecutionError: there is no way to, or the provider refuses the model.
    """
    runner = None if target.native else runner_of(target)
    if runner is not None:
        return runner.run(model, feeds)
    if not target.native:
        raise ExecutionError(f"Nothing here runs models on {target.provider}. {target.missing}".strip())
    with tempfile.TemporaryDirectory(prefix="qgraph-place-") as folder:
        options = dataclasses.replace(target.options(), profile=str(Path(folder) / "profile"))
        with Session(model, options) as session:
            outputs = [session.run(one) for one in feeds]
            return Ran(outputs, session.profile(), {}, f"onnxruntime {runtime_version()}")


def audited(path: Path, plan: Plan, target: Target, feeds: Feeds | None = None) -> Audit:
    """Compare what the target makes of a model with the plan, as closely as can be seen here.

    Args:
        path: the model.
        plan: what is planned.
        target: where it will run.
        feeds: one sample, for providers that tell what they took only when they run; none to take their word for it.

    Raises:
        ExecutionError: the runtime cannot load the model.
    """
    if target.fuses_like_host or target.here:
        return audit.audit(path, plan, target)
    trusted = {name: operators[0] for name, operators in plan.operators.items()}
    if runner_of(target) is None or not feeds:
        return Audit(trusted, {}, {})
    try:
        where = _places(place(path, target, [caches.given(path, feeds)]))
    except UnprovedError:
        # The proof of what is chosen will say so.
        return Audit(trusted, {}, {})
    problems: dict[str, str] = {}
    for name in plan.operators:
        if name not in where:
            trusted[name] = _OPTIMIZED_AWAY if name in plan.movers else trusted[name]
        elif where[name] != target.provider:
            problems[name] = f"{target.provider} left it to {where[name]}"
    return Audit({name: ran for name, ran in trusted.items() if name not in problems}, problems, {})


def _places(ran: Ran) -> dict[str, str]:
    """Node of the file -> provider that ran it."""
    if ran.assigned:
        return {original_name(name): provider for provider, names in ran.assigned.items() for name in names}
    return {original_name(kernel.node): kernel.provider for kernel in ran.kernels}


def prove(model: Path, original: Runnable, target: Target, data: Dataset, seconds: float | None = None) -> Placement:
    """Run `model` on the target's provider and on the CPU provider, and `original` on the latter.

    Two samples are always run, and then as many more as fit into the time.

    Args:
        model: what was written for the target.
        original: the float model.
        target: where it will run.
        data: the first batches of it are run.
        seconds: how long the provider is run on more than two; None for ten.

    Raises:
        ExecutionError: the provider refuses the model, or cannot be run here.
    """
    with naming.named(model) as readable:
        return _prove(readable, original, target, data, _SECONDS if seconds is None else seconds)


def _run(model: Path, target: Target, data: Dataset, seconds: float) -> tuple[list[Feeds], Ran]:
    """(samples, what came of them on the provider): two, and what fits into the time, in three jobs at most."""
    source = iter(batch.feeds for batch in data)
    batches: list[Feeds] = []
    rounds: list[tuple[int, float]] = []
    found: Ran | None = None
    end = time.monotonic() + seconds
    while len(rounds) < _ROUNDS:
        room = _ROOM // max(1, _bytes(batches[0], found.outputs[0])) - len(batches) if found is not None else _SAMPLES
        more = list(itertools.islice(source, min(room, _fitting(rounds, end - time.monotonic()))))
        if not more and found is not None:
            break
        start = time.monotonic()
        try:
            ran = place(model, target, [caches.given(model, feeds) for feeds in more])
        except UnprovedError:
            if found is None:
                raise
            break
        rounds.append((len(more), time.monotonic() - start))
        batches += more
        found = ran if found is None else dataclasses.replace(found, outputs=[*found.outputs, *ran.outputs])
    assert found is not None
    return batches, found


def _bytes(feeds: Feeds, outputs: Mapping[str, NDArray[Any]]) -> int:
    return sum(np.asarray(array).nbytes for one in (feeds, outputs) for array in one.values())


def _fitting(rounds: Sequence[tuple[int, float]], left: float) -> int:
    """How many samples more can be run in `left` seconds, where (samples, seconds) were seen."""
    if not rounds:
        return _SAMPLES
    count, took = rounds[-1]
    # A job has to start its runtime and load the model; of one job it is not known how long that was.
    load, each = took, took / count
    if len(rounds) > 1 and count > rounds[0][0]:
        each = max((took - rounds[0][1]) / (count - rounds[0][0]), 0.05 * each)
        load = max(0.0, took - count * each)
    return max(0, int(_CAREFUL * (left - load) / max(each, 1e-6)))


def _prove(model: Path, original: Runnable, target: Target, data: Dataset, seconds: float) -> Placement:
    batches, ran = _run(model, target, data, seconds)
    given = [caches.given(model, feeds) for feeds in batches]
    host = SessionOptions(providers=(HOST,))
    with Session(model, host) as session:
        expected = [session.run(feeds) for feeds in given]
    with original.session(host) as session:
        floats = [session.run(feeds) for feeds in batches]
    lost = [name for name in expected[0] if name not in ran.outputs[0]]
    if lost:
        raise ExecutionError(f"{target.provider} gave no output {lost[0]!r} of {model.name}.")
    names = [name for name in expected[0] if np.asarray(expected[0][name]).dtype.kind in "fiub"]
    if not names:
        raise ExecutionError(f"No output of {model.name} is of numbers: nothing can be compared.")
    errors = {name: _error(expected, ran.outputs, name) for name in names}
    kept = {name: _error(floats, expected, name) for name in names if name in floats[0]}
    allowed = {name: _allowed(target, kept.get(name, 0.0)) for name in names}
    # The output that is furthest beyond what it may be.
    worst = max(names, key=lambda name: errors[name] / allowed[name])
    far = max((_error(floats, ran.outputs, name) for name in kept), default=errors[worst])
    nodes, left = _counts(ran, target.provider, model)
    total = sum(nodes.values())
    work_share = _work_share(model, given[0], host, {one.name for one in left})
    return Placement(
        provider=target.provider,
        runtime=ran.runtime,
        nodes=nodes,
        share=nodes.get(target.provider, 0) / max(1, total),
        work=work_share,
        left=left,
        error=errors[worst],
        allowed=allowed[worst],
        sqnr=math.inf if far == 0 else -20 * math.log10(far) if math.isfinite(far) else -math.inf,
        cosine=min((_cosine(floats, ran.outputs, name) for name in kept), default=math.nan),
        samples=len(batches),
    )


def _allowed(target: Target, lost: float) -> float:
    """What an output may differ by, of which the file itself lost so much."""
    return max(target.tolerance, _ROUNDED * lost if math.isfinite(lost) else 0.0)


def _pairs(
    first: Sequence[Mapping[str, NDArray[Any]]], second: Sequence[Mapping[str, NDArray[Any]]], name: str
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for one, other in zip(first, second, strict=True):
        x, y = one[name].astype(np.float64).reshape(-1), other[name].astype(np.float64).reshape(-1)
        if x.size != y.size:
            y = np.full_like(x, np.nan)
        same = ~np.isfinite(x) & ((x == y) | (np.isnan(x) & np.isnan(y)))
        # Where only one of them is no number, nothing is alike.
        y = np.where(~np.isfinite(x) & ~same, np.nan, y)
        x = np.where(np.isfinite(x), x, 0.0)
        pairs.append((x, np.where(same, 0.0, y)))
    return pairs


def _error(
    first: Sequence[Mapping[str, NDArray[Any]]], second: Sequence[Mapping[str, NDArray[Any]]], name: str
) -> float:
    """RMS of the difference over RMS of the first; infinite for what is no number."""
    pairs = _pairs(first, second, name)
    if not all(np.isfinite(y).all() for _, y in pairs):
        return math.inf
    noise = sum(float(np.square(x - y).sum()) for x, y in pairs)
    signal = sum(float(np.square(x).sum()) for x, _ in pairs)
    return 0.0 if noise == 0 else math.sqrt(noise / signal) if signal > 0 else math.inf


def _cosine(
    first: Sequence[Mapping[str, NDArray[Any]]], second: Sequence[Mapping[str, NDArray[Any]]], name: str
) -> float:
    found: list[float] = []
    for x, y in _pairs(first, second, name):
        if not np.isfinite(y).all():
            return math.nan
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        found.append(1.0 if np.array_equal(x, y) else float(x @ y) / norms if norms > 0 else math.nan)
    return float(np.mean(found))


def _counts(ran: Ran, provider: str, model: Path) -> tuple[dict[str, int], list[Left]]:
    """(provider -> nodes, the nodes that are not on `provider`)."""
    if ran.assigned:
        types = {node.name: node.op_type for node in ir.load(model).graph.all_nodes()}
        # What the runtime put in between, to turn layouts, is no node of the model.
        names = ((original_name(name), where) for where, names in ran.assigned.items() for name in names)
        found = [Left(name, types[name], where) for name, where in names if name in types]
    else:
        found = [Left(original_name(kernel.node), kernel.op_type, kernel.provider) for kernel in ran.kernels]
    found = [one for one in found if one.op_type not in _QUANTIZERS]
    return dict(Counter(one.provider for one in found)), [one for one in found if one.provider != provider]


def _work_share(model: Path, feeds: Feeds, options: SessionOptions, left: set[str]) -> float | None:
    """Share of the multiplications in nodes that are not in `left`."""
    amounts = work.by_node(model, feeds, options)
    total = sum(amounts.values())
    return None if not total else 1.0 - sum(count for name, count in amounts.items() if name in left) / total
