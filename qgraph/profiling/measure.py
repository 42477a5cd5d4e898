"""Times the table of kernels on this machine, and makes a profile of what was timed here or elsewhere.

Models are timed in rounds: each round loads every model once, runs it for a moment and frees it, so that one session is
alive at a time, both forms of a kernel are neighbours, and a drift of the machine's speed meets all alike. What counts
is the median over the rounds. A run has one thread, and where the system tells it the clock is that thread's processor
time, which does not go on while the machine does something else.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import errors
from qgraph.errors import ExecutionError
from qgraph.profiles import HERE, Machine, Profile, RowTime
from qgraph.profiling import images, products
from qgraph.profiling.fit import fit
from qgraph.profiling.rows import AROUND, Row, Timed
from qgraph.session import Feeds, Session, SessionOptions, runtime_version
from qgraph.targets.cpu import Cpu
from qgraph.targets.cpu_costs import COEFFICIENTS, SHIPPED

__all__ = ["LEAST_ROUNDS", "feeds", "here", "models", "profile", "table"]

LEAST_ROUNDS = 3
_SLICE = 0.04
_WARM_RUNS, _LEAST_RUNS = 2, 3
_NEVER = 1000.0
_FINE = 1e-6

# On some systems a thread's time is counted in ticks of milliseconds.
_clock = time.thread_time if time.get_clock_info("thread_time").resolution <= _FINE else time.perf_counter

Times = Mapping[str, "Sequence[float] | str"]
"""Model -> seconds of a run in each round, or the runtime's words where it refused it."""


def table(target: Cpu) -> list[Row]:
    """The table of kernels, in the formats of a target."""
    activation = target.scheme("int8").parts[0].activation
    assert activation is not None, "a static scheme has one"
    codes = np.int8 if activation.format.signed else np.uint8
    return [*images.rows(codes), *products.rows(codes)]


def models(rows: Sequence[Row]) -> dict[str, Timed]:
    """The models of the table by name, in the order in which they are timed."""
    return {one.name: one for row in rows for one in (row.before, row.after)}


def feeds(model: ir.Model) -> dict[str, Any]:
    """One run's inputs, the same at every call: numbers from 0 to 1, or all codes."""
    found: dict[str, Any] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None, "inputs are typed"
        shape = tuple(int(one) for one in value.shape.numpy())
        ramp = np.arange(int(np.prod(shape))) * 37 % 251
        kind = value.dtype.numpy()
        array = ramp / 251 if np.dtype(kind).kind == "f" else ramp if kind == np.uint8 else ramp - 125
        found[str(value.name)] = array.reshape(shape).astype(kind)
    return found


def here(target: Cpu, seconds: float, progress: Callable[[str, int, int], None]) -> Profile:
    """Time the table on this machine, one thread, for about so many seconds, and at least three rounds.

    Interrupted after three rounds, it makes do with those; before, the interruption goes on to the caller.

    Raises:
        ExecutionError: the runtime refuses all models.
    """
    rows = table(target)
    start = time.perf_counter()
    times = _rounds(models(rows), target.options(1), seconds, progress)
    spent = time.perf_counter() - start
    runtime = f"onnxruntime {runtime_version()}"
    today = datetime.date.today().isoformat()
    return profile(HERE, target.name, target.provider, Machine.here(), (runtime, today, spent), rows, times)


def _rounds(
    todo: Mapping[str, Timed], options: SessionOptions, seconds: float, progress: Callable[[str, int, int], None]
) -> dict[str, list[float] | str]:
    built = {name: one.build() for name, one in todo.items()}
    arrays = {name: feeds(model) for name, model in built.items()}
    done: list[dict[str, float]] = []
    refused: dict[str, str] = {}
    start = time.perf_counter()
    try:
        while len(done) < LEAST_ROUNDS or (time.perf_counter() - start) * (1 + 1 / len(done)) < seconds:
            spent: dict[str, float] = {}
            rounds = LEAST_ROUNDS if not done else int(seconds / (time.perf_counter() - start) * len(done))
            rounds = max(LEAST_ROUNDS, len(done) + 1, rounds)
            # By turns from both ends, so that neither form always comes first.
            for name in built if len(done) % 2 == 0 else reversed(built):
                progress("timing kernels", len(done) * len(built) + len(spent), rounds * len(built))
                if name in refused:
                    continue
                try:
                    spent[name] = _block(built[name], arrays[name], options)
                except ExecutionError as error:
                    refused[name] = errors.first_line(error)
            done.append(spent)
    except KeyboardInterrupt:
        if len(done) < LEAST_ROUNDS:
            raise
    return {name: refused[name] if name in refused else [one[name] for one in done] for name in built}


def _block(model: ir.Model, arrays: Feeds, options: SessionOptions) -> float:
    """Median seconds of a run in a fresh session."""
    with Session(model, options) as session:
        for _ in range(_WARM_RUNS):
            session.run(arrays)
        call = session.caller(arrays)
        times: list[float] = []
        end = time.perf_counter() + _SLICE
        while len(times) < _LEAST_RUNS or time.perf_counter() < end:
            start = _clock()
            call()
            times.append(_clock() - start)
    return float(np.median(times))


def profile(
    name: str,
    like: str,
    provider: str,
    machine: Machine,
    told: tuple[str, str, float],
    rows: Sequence[Row],
    times: Times,
) -> Profile:
    """The profile of measured times.

    Args:
        name: what it is called.
        like: the target whose table it is.
        provider: the execution provider.
        machine: where.
        told: runtime, date, and seconds that it took.
        rows: the table.
        times: what was measured; a kernel that the runtime refused gets costs with which it is never chosen.

    Raises:
        ExecutionError: the runtime refused all models.
    """
    known = {model: list(seen) for model, seen in times.items() if not isinstance(seen, str)}
    refused = {model: seen for model, seen in times.items() if isinstance(seen, str)}
    if not known:
        raise ExecutionError(f"The runtime refuses every model of the table: {next(iter(refused.values()), '')}")
    every = {model: one for model, one in models(rows).items() if model in known}
    medians = {model: float(np.median(known[model])) for model in every}
    fitted = fit([(one.terms, medians[model]) for model, one in every.items()], {**COEFFICIENTS, **AROUND})
    errors_of = dict(zip(every, fitted.errors, strict=True))
    timed = {term for one in every.values() for term in one.terms}
    never = {term for model, one in models(rows).items() if model in refused for term in one.terms} - timed
    coefficients = {
        term: COEFFICIENTS[term] * _NEVER if term in never else fitted.coefficients[term] for term in COEFFICIENTS
    }
    expected = _expected(every, medians, {term: fitted.coefficients[term] for term in AROUND})
    found = [
        RowTime(
            row.table,
            row.name,
            row.form,
            medians[row.before.name],
            medians[row.after.name],
            float(np.median([b / a for b, a in zip(known[row.before.name], known[row.after.name], strict=True)])),
            max(errors_of[row.before.name], errors_of[row.after.name], key=abs),
            expected(row),
        )
        for row in rows
        if row.before.name in known and row.after.name in known
    ]
    count = min(len(seen) for seen in known.values())
    return Profile(name, like, provider, machine, *told, count, tuple(found), coefficients, refused)


def _expected(
    every: Mapping[str, Timed], medians: Mapping[str, float], around: Mapping[str, float]
) -> Callable[[Row], float]:
    """What the shipped costs would make of a row's ratio on this machine, were all kernels slower or faster alike."""

    def parts(one: Timed) -> tuple[float, float]:
        outside = 1e-9 * sum(around[term] * count for term, count in one.terms.items() if term in around)
        return SHIPPED.seconds({term: count for term, count in one.terms.items() if term not in around}), outside

    seen = [(medians[model], *parts(one)) for model, one in every.items()]
    scale = float(np.median([max(time - outside, 0.0) / inside for time, inside, outside in seen]))

    def ratio(row: Row) -> float:
        before, after = (scale * inside + outside for inside, outside in map(parts, (row.before, row.after)))
        return before / after

    return ratio
