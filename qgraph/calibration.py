"""Run a model on data, batch by batch in bounded memory, and let observers see its values.

The calibration graph is the model with the observed values as outputs. It is serialized without its weights, which
stay where they are on disk. When the observed values of one run exceed the budget they are spread over several graphs,
run one after the other over all the data; what lies behind the last observed value is cut off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, observers
from qgraph.data import Batch, Dataset
from qgraph.datafiles import UNREADABLE
from qgraph.errors import DataError, ModelError, first_line
from qgraph.observers import Observer
from qgraph.observers.channel_mean import ChannelMean
from qgraph.observers.run_ranges import RunRanges
from qgraph.session import Session, SessionOptions

__all__ = [
    "CHANNELS",
    "DEFAULT_BUDGET",
    "MEANS",
    "OBSERVER",
    "RUNS",
    "SAMPLE",
    "STATISTICS",
    "UNSCALED",
    "Store",
    "observe",
    "restore",
    "save",
]

DEFAULT_BUDGET = 256 << 20
OBSERVER = "qgraph.observer"
"""Key in `Value.meta`: the observer of the value."""
MEANS = "qgraph.means"
"""Key in `Value.meta`: channel means of the value, a dict of ChannelMean by axis."""
SAMPLE = "qgraph.sample"
"""Key in `Node.meta` of a layer: some of its input, [n, channels] of a product, [n, channels, kernel...] of a Conv."""
CHANNELS = "qgraph.channels"
"""Key in `Node.meta` of a layer: (low, high) of each input channel over all the data, float32 [channels] each."""
RUNS = "qgraph.runs"
"""Key in `Node.meta` of a product: low and high of each input channel in some runs, float32 [runs, 2, channels]. Those
of hidden positions (padding) are in them, as they are in a range that is found at run time."""
UNSCALED = "qgraph.unscaled"
"""Key in `Node.meta` of a product behind a Mul that was put in: (its sample without it, the Mul's factors)."""
STATISTICS = "qgraph.statistics"
"""Key in `Value.meta`: anything else with an `update(array)`, a dict; it is not saved."""
Store: TypeAlias = "dict[tuple[str, str], Observer | ChannelMean]"
"""(value, kind of statistic) -> the statistic over all the data."""
_UNKNOWN_BYTES = 16 << 20
_VERSION = 1


def observe(
    model: ir.Model,
    data: Dataset,
    folder: Path | None = None,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
    store: Store | None = None,
    kinds: Collection[str] = (OBSERVER, MEANS, STATISTICS),
) -> None:
    """Feed all of `data` through `model` and update the statistics in the meta of its values.

    Args:
        model: its observed values carry an observer ("qgraph.observer"), channel means ("qgraph.means"), or other
            statistics ("qgraph.statistics").
        data: the feeds.
        folder: where the model's external tensors lie.
        budget: bytes that the observed values of one run may take.
        progress: called with (runs done, runs in all).
        store: observers and means of an earlier call on the same data, by value; these values are not run again, and
            new ones are added.
        kinds: keys of the statistics that are updated; others in the meta have seen the data already.

    Raises:
        DataError: an observed value is NaN or infinite; names the batch and the value.
        ExecutionError: the runtime refuses the graph or a batch.
    """
    missing = [v for v in _observed(model, kinds) if store is None or not _recalled(v, store)]
    values = [v for v in missing if v.producer() is not None]
    inputs = [v for v in missing if v.producer() is None]
    if not missing:
        return
    # Shapes were measured on one batch; the largest may be many times as large.
    growth = max(1.0, data.largest / max(1, data.first().nbytes))
    parts = list(_parts(values, int(budget / growth))) or [[]]
    single = OBSERVER in kinds and any(OBSERVER in v.meta and v.meta[OBSERVER].per_sample for v in (*inputs, *values))
    total, done = len(parts) * data.count(), 0
    for number, part in enumerate(parts):
        session = _session(model, part, folder) if part else None
        try:
            for batch in _samples(data, single):
                if number == 0:
                    for value in inputs:
                        _update(value, batch.feeds[str(value.name)], batch, kinds)
                if session is not None:
                    results = session.run(batch.feeds)
                    for value in part:
                        _update(value, results.pop(str(value.name)), batch, kinds)
                done += 1
                if progress is not None:
                    progress(min(done, total), total)
        finally:
            if session is not None:
                session.close()
    if store is not None:
        for value in missing:
            for kind, statistic in _statistics(value):
                store[str(value.name), kind] = copy.deepcopy(statistic)


def _recalled(value: ir.Value, store: Store) -> bool:
    """Give `value` its statistics from the store, if all of them are there."""
    wanted = list(_statistics(value))
    if STATISTICS in value.meta or any((str(value.name), kind) not in store for kind, _ in wanted):
        return False
    for kind, statistic in wanted:
        known = copy.deepcopy(store[str(value.name), kind])
        if isinstance(known, Observer):
            value.meta[OBSERVER] = known
        elif isinstance(statistic, ChannelMean):
            value.meta[MEANS] = {**value.meta[MEANS], statistic.axis: known}
    return True


def _update(value: ir.Value, array: NDArray[Any], batch: Batch, kinds: Collection[str]) -> None:
    visible = batch.visible
    statistics = [one for kind in (MEANS, STATISTICS) if kind in kinds for one in value.meta.get(kind, {}).values()]
    if visible is not None and array.ndim == 3 and array.shape[:2] == visible.shape:
        for statistic in statistics:
            if isinstance(statistic, RunRanges):
                # A range found at run time is that of hidden positions, too.
                statistic.update(array)
        others = [one for one in statistics if not isinstance(one, RunRanges)]
        # Sample by sample, since some statistics are of samples.
        for rows, seen in zip(array, visible, strict=True):
            _take(value, rows[seen][None], others, batch, kinds)
    else:
        _take(value, array, statistics, batch, kinds)


def _take(
    value: ir.Value, array: NDArray[Any], statistics: Sequence[Any], batch: Batch, kinds: Collection[str]
) -> None:
    for statistic in statistics:
        statistic.update(array)
    observer: Observer | None = value.meta.get(OBSERVER)
    if observer is None or OBSERVER not in kinds:
        return
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


def save(model: ir.Model, path: Path, key: str, store: Store | None = None) -> None:
    """Write the statistics of all observed values to an `.npz` file under the model's `key`; those of `store`, too."""
    found: Store = dict(store or {})
    found.update({(str(v.name), kind): statistic for v in _observed(model) for kind, statistic in _statistics(v)})
    names: list[str] = []
    kinds: list[str] = []
    arrays: dict[str, Any] = {}
    for (name, kind), statistic in found.items():
        for part, array in statistic.state().items():
            arrays[f"{len(names)}.{part}"] = array
        names.append(name)
        kinds.append(kind)
    header: dict[str, Any] = {
        "qgraph": np.array([_VERSION]),
        "model": np.array(key),
        "names": np.array(names),
        "kinds": np.array(kinds),
    }
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **header, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"Cannot write the ranges to {str(path)!r}: {error.strerror}.") from error


def restore(model: ir.Model, path: Path, key: str) -> None:
    """Give the observed values the statistics that `save` wrote.

    Raises:
        DataError: not a file of ranges, or of another model, or without one of the values.
    """
    try:
        # Numpy would leave a damaged archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored.items())
    except (*UNREADABLE, AttributeError, TypeError) as error:  # the last two: a .npy file
        what = first_line(error) if isinstance(error, OSError) else "it is no file that --save-ranges wrote"
        raise DataError(f"Cannot read ranges from {str(path)!r}: {what}.") from error
    if not {"qgraph", "model", "names", "kinds"} <= arrays.keys():
        raise DataError(f"{str(path)!r} holds no ranges written by qgraph.")
    if arrays["qgraph"].tolist() != [_VERSION]:
        raise DataError(f"The ranges in {str(path)!r} are of another version of qgraph. Calibrate anew.")
    if str(arrays["model"]) != key:
        raise DataError(f"The ranges in {str(path)!r} were observed on another model. Calibrate this one anew.")
    states: dict[int, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        number, _, part = name.partition(".")
        if part:
            states.setdefault(int(number), {})[part] = array
    found: dict[str, dict[str, dict[str, NDArray[Any]]]] = {}
    for number, (name, kind) in enumerate(zip(arrays["names"].tolist(), arrays["kinds"].tolist(), strict=True)):
        found.setdefault(name, {})[kind] = states[number]
    for value in _observed(model):
        mine = found.get(str(value.name), {})
        for kind, statistic in _statistics(value):
            # The file's own observer is taken: it says how the ranges were observed.
            kinds = [k for k in mine if k in observers.OBSERVERS] if isinstance(statistic, Observer) else [kind]
            if not kinds or kinds[0] not in mine:
                raise DataError(f"{str(path)!r} lacks the range of {value.name!r}: it was not quantized then.")
            if isinstance(statistic, Observer):
                value.meta[OBSERVER] = observers.OBSERVERS[kinds[0]].from_state(mine[kinds[0]])
            else:
                value.meta[MEANS][statistic.axis] = ChannelMean.from_state(mine[kind])


def _observed(model: ir.Model, kinds: Collection[str] = (OBSERVER, MEANS, STATISTICS)) -> list[ir.Value]:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return [v for v in values if any(kind in v.meta for kind in kinds)]


def _statistics(value: ir.Value) -> Iterator[tuple[str, Observer | ChannelMean]]:
    """(kind, statistic) of all that observes `value`."""
    observer: Observer | None = value.meta.get(OBSERVER)
    if observer is not None:
        yield next(name for name, kind in observers.OBSERVERS.items() if type(observer) is kind), observer
    for axis, statistic in list(value.meta.get(MEANS, {}).items()):
        yield f"means {axis}", statistic
