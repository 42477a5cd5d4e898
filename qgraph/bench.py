"""How fast? Two models in alternating blocks, one live session at a time.

Worker threads of an idle session spin and slow the other down, so each block loads its model anew; neighbouring blocks
form a pair, the ratio is the median over pairs, and drifts of the machine's speed cancel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qgraph.audit import original_name
from qgraph.compare import Runnable
from qgraph.errors import ExecutionError
from qgraph.modelio import size_on_disk
from qgraph.report import Footprint, Latency, Speed
from qgraph.session import Feeds, SessionOptions

__all__ = ["all_threads", "alternate", "footprint", "node_times", "operator_times"]

_WARM_RUNS = 2
_LEAST_RUNS = 3


def all_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _block(model: Runnable, feeds: Feeds, options: SessionOptions, seconds: float) -> float:
    """Median seconds per run of a fresh session."""
    with model.session(options) as session:
        for _ in range(_WARM_RUNS):
            # `run` tells errors in qgraph's words, `call` is for the clock.
            session.run(feeds)
        call = session.caller(feeds)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < _LEAST_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def alternate(
    before: Runnable,
    after: Runnable,
    feeds: Feeds,
    options: SessionOptions,
    threads: int,
    seconds: float = 6.0,
    progress: Callable[[int, int], None] | None = None,
    least: int = 3,
) -> Speed:
    """Time both models on `feeds`.

    Args:
        before: the original.
        after: the result.
        feeds: one run's inputs.
        options: session options; their thread count is replaced.
        threads: intra-op threads.
        seconds: about how long to measure in all; at most fifteen pairs of blocks are taken.
        progress: called with (pairs done, pairs in all).
        least: pairs that are taken however long they last.
    """
    options = dataclasses.replace(options, threads=threads)
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    total = least
    slice_seconds = min(0.25, seconds / 12)
    while len(pairs) < total:
        order = (before, after) if len(pairs) % 2 == 0 else (after, before)
        first, second = (_block(model, feeds, options, slice_seconds) for model in order)
        pairs.append((first, second) if order[0] is before else (second, first))
        cost = (time.perf_counter() - start) / len(pairs)
        # An odd number, so that the median is a pair that was measured.
        total = max(least, min(15, int(seconds / cost)) // 2 * 2 + 1)
        if progress is not None:
            progress(len(pairs), total)
    ratios = [b / a for b, a in pairs]
    return Speed(
        threads,
        _latency([b for b, _ in pairs]),
        _latency([a for _, a in pairs]),
        float(np.median(ratios)),
        min(ratios),
        max(ratios),
        len(pairs),
    )


def _latency(times: list[float]) -> Latency:
    return Latency(float(np.median(times)), min(times), max(times))


def node_times(model: Runnable, feeds: Feeds, options: SessionOptions, runs: int = 12) -> dict[str, float]:
    """Median seconds of each node in the runtime's profile, by the name it had before the runtime's optimizer."""
    with tempfile.TemporaryDirectory(prefix="qgraph-profile-") as folder:
        profiled = dataclasses.replace(options, profile=str(Path(folder) / "profile"))
        with model.session(profiled) as session:
            for _ in range(runs):
                session.call(feeds)
            return {original_name(time.node): time.seconds for time in session.profile()}


def operator_times(model: Runnable, feeds: Feeds, options: SessionOptions, runs: int = 12) -> dict[str, float]:
    """Seconds per run of all nodes of each operator of the runtime's graph, by the medians of its profile."""
    with tempfile.TemporaryDirectory(prefix="qgraph-profile-") as folder:
        profiled = dataclasses.replace(options, profile=str(Path(folder) / "profile"))
        with model.session(profiled) as session:
            for _ in range(runs):
                session.call(feeds)
            found: dict[str, float] = {}
            for one in session.profile():
                found[one.op_type] = found.get(one.op_type, 0.0) + one.seconds
    return found


def footprint(path: Path, feeds: Feeds, options: SessionOptions) -> Footprint:
    """Load and run the model once in a process of its own, and see what that takes.

    Raises:
        ExecutionError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-footprint-") as folder:
        arrays = Path(folder) / "feeds.npz"
        np.savez(arrays, **{f"_{name}": np.asarray(array) for name, array in feeds.items()})  # type: ignore[arg-type, unused-ignore]
        command = [sys.executable, "-m", "qgraph.footprint", str(path), str(arrays), json.dumps(options.providers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ExecutionError(f"Loading {path.name} in a process of its own failed: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Footprint(size_on_disk(path), float(found["load_seconds"]), int(found["resident"]))
