"""Run a model on data, batch by batch in bounded memory, and let observers see its values.

The calibration graph is the model with the observed values as outputs. It is serialized without its weights, which
stay where they are on disk. When the observed values of one run exceed the budget they are spread over several graphs,
run one after the other over all the data; what lies behind the last observed value is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, observers
from qgraph.data import Batch, Dataset
from qgraph.errors import DataError, ModelError
from qgraph.observers import Observer
from qgraph.session import Session, SessionOptions

__all__ = ["DEFAULT_BUDGET", "OBSERVER", "observe", "restore", "save"]

DEFAULT_BUDGET = 256 << 20
OBSERVER = "qgraph.observer"
"""Key in `Value.meta`: the observer of the value."""
_UNKNOWN_BYTES = 16 << 20
_VERSION = 1


def observe(
    model: ir.Model,
    data: Dataset,
    folder: Path | None = None,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Feed all of `data` through `model` and update the observers in `Value.meta["qgraph.observer"]`.

    Args:
        model: its observed values carry observers.
        data: the feeds.
        folder: where the model's external tensors lie.
        budget: bytes that the observed values of one run may take.
        progress: called with (runs done, runs in all).

    Raises:
        DataError: an observed value is NaN or infinite; names the batch and the value.
        ExecutionError: the runtime refuses the graph or a batch.
    """
    inputs = [v for v in model.graph.inputs if OBSERVER in v.meta]
    values = [v for node in model.graph for v in node.outputs if OBSERVER in v.meta]
    parts = list(_parts(values, budget)) or [[]]
    single = any(v.meta[OBSERVER].per_sample for v in (*inputs, *values))
    total, done = len(parts) * len(data), 0
    for number, part in enumerate(parts):
        session = _session(model, part, folder) if part else None
        try:
            for batch in _samples(data, single):
                if number == 0:
                    for value in inputs:
                        _update(value, batch.feeds[str(value.name)], batch)
                if session is not None:
                    results = session.run(batch.feeds)
                    for value in part:
                        _update(value, results.pop(str(value.name)), batch)
                done += 1
                if progress is not None:
                    progress(min(done, total), total)
        finally:
            if session is not None:
                session.close()


def _update(value: ir.Value, array: NDArray[Any], batch: Batch) -> None:
    observer: Observer = value.meta[OBSERVER]
    observer.update(array)
    if not observer.finite:
        maker = value.producer()
        where = f"the output of {graph.label(maker)}" if maker is not None else "an input"
        raise DataError(
            f"Value {value.name!r} ({where}) is NaN or infinite on {batch.name!r}. "
            "The float model itself overflows there: check the data, or leave the node in float."
        )


def _parts(values: list[ir.Value], budget: int) -> Iterator[list[ir.Value]]:
    """Values in graph order, as many at a time as the budget holds."""
    part: list[ir.Value] = []
    size = 0
    for value in values:
        count = graph.element_count(value)
        need = _UNKNOWN_BYTES if count is None else 4 * count
        if part and size + need > budget:
            yield part
            part, size = [], 0
        part.append(value)
        size += need
    if part:
        yield part


def _session(model: ir.Model, values: list[ir.Value], folder: Path | None) -> Session:
    copy = model.clone()
    names = {value.name for value in values}
    twins = {v.name: v for node in copy.graph for v in node.outputs if v.name in names}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(twins[value.name] for value in values)
    common.RemoveUnusedNodesPass()(copy)
    return Session(copy, SessionOptions(), folder)


def _samples(data: Dataset, single: bool) -> Iterator[Batch]:
    """The batches, or their samples where a statistic is one of samples and the model's batch is free."""
    free = single and all(spec.batch is None and spec.shape for spec in data.inputs)
    for batch in data:
        sizes = {array.shape[0] for array in batch.feeds.values() if array.ndim}
        if not free or len(sizes) != 1 or sizes == {1}:
            yield batch
            continue
        for row in range(sizes.pop()):
            feeds = {name: np.ascontiguousarray(a[row : row + 1]) for name, a in batch.feeds.items()}
            yield Batch(f"{batch.name}[{row}]", feeds)


def save(model: ir.Model, path: Path, key: str) -> None:
    """Write the statistics of all observed values to an `.npz` file under the model's `key`."""
    arrays: dict[str, NDArray[Any]] = {"qgraph": np.array([_VERSION]), "model": np.array(key)}
    for value in _observed(model):
        observer: Observer = value.meta[OBSERVER]
        arrays[f"{value.name}\n"] = np.array(_name_of(observer))
        for part, array in observer.state().items():
            arrays[f"{value.name}\n{part}"] = array
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type, unused-ignore]
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"Cannot write the ranges to {str(path)!r}: {error.strerror}.") from error


def restore(model: ir.Model, path: Path, key: str) -> None:
    """Give the observed values the statistics that `save` wrote.

    Raises:
        DataError: not a file of ranges, or of another model, or without one of the values.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored.items())
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"Cannot read ranges from {str(path)!r}: {str(error).splitlines()[0]}") from error
    if "qgraph" not in arrays or "model" not in arrays:
        raise DataError(f"{str(path)!r} holds no ranges written by qgraph.")
    if str(arrays["model"]) != key:
        raise DataError(f"The ranges in {str(path)!r} were observed on another model. Calibrate this one anew.")
    for value in _observed(model):
        kind = arrays.get(f"{value.name}\n")
        if kind is None:
            raise DataError(f"{str(path)!r} lacks the range of {value.name!r}: it was not quantized then.")
        prefix = f"{value.name}\n"
        state = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix) and k != prefix}
        value.meta[OBSERVER] = observers.OBSERVERS[str(kind)].from_state(state)


def _observed(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return [v for v in values if OBSERVER in v.meta]


def _name_of(observer: Observer) -> str:
    return next(name for name, kind in observers.OBSERVERS.items() if type(observer) is kind)
