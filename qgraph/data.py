"""Calibration and evaluation data: many sources, one shape: an iterable of feeds, read batch by batch, checked.

A *feed* maps input names to arrays for one run. Nothing is kept: every pass over a `Dataset` reads its source again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import errors
from qgraph.errors import DataError

__all__ = ["UNREADABLE", "Batch", "DataSource", "Dataset", "InputSpec", "inputs_of", "load"]

DataSource: TypeAlias = "str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | Dataset"

UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises on a file that it cannot read."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What one input of the model takes: name, numpy type, shape with None for free dimensions (None: any rank)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    @property
    def batch(self) -> int | None:
        """Fixed size of the first dimension, None when it is free or there is none."""
        return self.shape[0] if self.shape else None


@dataclasses.dataclass(frozen=True)
class Batch:
    """One run's feeds and where they came from."""

    name: str
    feeds: dict[str, NDArray[Any]]

    @property
    def digest(self) -> bytes:
        """Hash of the contents: an identity that no order of the data changes."""
        found = hashlib.sha256()
        for key in sorted(self.feeds):
            found.update(key.encode())
            found.update(repr(self.feeds[key].shape).encode())
            found.update(np.ascontiguousarray(self.feeds[key]).tobytes())
        return found.digest()


def inputs_of(model: ir.Model) -> list[InputSpec]:
    """The inputs a caller must give (those without a default)."""
    specs: list[InputSpec] = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        if value.dtype is None:
            raise DataError(f"Input {value.name!r} is not a tensor with a known type; such models cannot be run here.")
        shape = None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
        specs.append(InputSpec(value.name, np.dtype(value.dtype.numpy()), shape))
    return specs


class Dataset:
    """Feeds that can be gone through again and again.

    Attributes:
        label: where the data comes from, for messages.
    """

    def __init__(self, source: Callable[[], Iterator[Batch]], label: str, inputs: list[InputSpec]):
        self._source = source
        self.label = label
        self.inputs = inputs
        self._only: frozenset[bytes] | None = None
        self._without: frozenset[bytes] = frozenset()

    def __iter__(self) -> Iterator[Batch]:
        found = False
        for raw in self._source():
            batch = _checked(raw, self.inputs)
            if self._only is not None or self._without:
                digest = batch.digest
                if digest in self._without or (self._only is not None and digest not in self._only):
                    continue
            found = True
            yield batch
        if not found:
            raise DataError(f"There is no data in {self.label}: at least one sample is needed.")

    def first(self) -> Batch:
        """The batch with the smallest hash: the same one in whatever order the data comes."""
        return min(self, key=lambda batch: batch.digest)

    def split(self, share: float) -> tuple[Dataset, Dataset | None]:
        """Part of the batches held back, chosen by their contents' hash, so that their order does not matter.

        Returns:
            (the rest, the held-back part); the second is None when there are fewer than four distinct batches.
        """
        digests = sorted({batch.digest for batch in self})
        if len(digests) < 4:
            return self, None
        held = frozenset(digests[: max(1, round(share * len(digests)))])
        rest, part = Dataset(self._source, self.label, self.inputs), Dataset(self._source, self.label, self.inputs)
        rest._only, rest._without, part._only = self._only, self._without | held, held
        return rest, part

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load(source: DataSource, inputs: list[InputSpec]) -> Dataset:
    """A dataset from whatever the user has.

    Args:
        source: a `.npz` file (arrays under the inputs' names, samples along axis 0); a `.npy` file (models with one
            input); a folder of such files, or of ONNX `test_data_set_*` folders with `input_0.pb`...; a string
            `package.module:function` naming a function that returns an iterable of feeds; such a function; or an
            iterable of feeds. An iterator that can be read only once is copied to a temporary file as it is read.
        inputs: the model's inputs.

    Raises:
        DataError: nothing there, or not readable as feeds of this model.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, Path)):
        text = str(source)
        path = Path(source)
        if not path.exists() and re.fullmatch(r"[\w.]+:[\w.]+", text):
            return load(_imported(text), inputs)
        if not path.exists():
            near = errors.nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            raise DataError(f"There is no data at {text!r}." + (f" Did you mean {near!r}?" if near else ""))
        return Dataset(lambda: _from_path(path, inputs), repr(text), inputs)
    if callable(source):
        label = getattr(source, "__qualname__", repr(source))
        return Dataset(lambda: _from_feeds(source(), label), f"function {label}", inputs)
    if isinstance(source, Iterator):
        spool = _Spool(source)
        return Dataset(spool.batches, "the given iterator", inputs)
    return Dataset(lambda: _from_feeds(source, "batch"), "the given data", inputs)


def _imported(text: str) -> Callable[[], Iterable[Mapping[str, Any]]]:
    module_name, _, attribute = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DataError(f"Cannot import {text!r}: {error}") from error
    if not callable(found):
        raise DataError(f"{text!r} is not a function that returns feeds.")
    return found  # type: ignore[no-any-return]


def _from_feeds(feeds: Iterable[Mapping[str, Any]], label: str, start: int = 0) -> Iterator[Batch]:
    if not isinstance(feeds, Iterable):
        raise DataError(f"{label} returned {type(feeds).__name__}, not an iterable of feeds (dicts of arrays).")
    for number, feed in enumerate(feeds, start):
        if not isinstance(feed, Mapping):
            raise DataError(
                f"Item {number} of {label} is {type(feed).__name__}, not a dict from input names to arrays."
            )
        try:
            arrays = {str(k): np.asarray(v) for k, v in feed.items()}
        except ValueError as error:
            raise DataError(f"{f'{label} {number}'!r} holds what is no array: {error}") from error
        yield Batch(f"{label} {number}", arrays)


class _Spool:
    """A one-shot iterator, written to disk while it is first read, so that it can be read again."""

    def __init__(self, source: Iterator[Mapping[str, Any]]):
        self._source = source
        self._folder = tempfile.TemporaryDirectory(prefix="qgraph-data-")
        self._files: list[Path] = []

    def batches(self) -> Iterator[Batch]:
        """All batches: those on disk, then those still to come."""
        number = 0
        while True:
            while number < len(self._files):
                with np.load(self._files[number], allow_pickle=True) as stored:
                    yield Batch(f"batch {number}", {name[1:]: array for name, array in stored.items()})
                number += 1
            batch = next(_from_feeds(self._source, "batch", number), None)
            if batch is None:
                return
            path = Path(self._folder.name) / f"{number}.npz"
            # A prefix, since an input may be called like a parameter of `savez`.
            np.savez(path, **{f"_{name}": a for name, a in batch.feeds.items()})  # type: ignore[arg-type, unused-ignore]
            self._files.append(path)


def _from_path(path: Path, inputs: list[InputSpec]) -> Iterator[Batch]:
    if path.is_dir():
        if path.name.startswith("test_data_set"):
            yield from _from_protos(path, inputs)
            return
        children = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy") or _is_test_set(p))
        if not children:
            raise DataError(f"The folder {str(path)!r} holds no .npz or .npy file and no test_data_set_* folder.")
        for child in children:
            yield from _from_path(child, inputs)
    elif path.suffix in (".npz", ".npy"):
        yield from _from_arrays(path, inputs)
    else:
        raise DataError(f"{str(path)!r} is none of .npz, .npy, a folder of them, or test_data_set_* folders.")


def _is_test_set(path: Path) -> bool:
    return path.is_dir() and path.name.startswith("test_data_set")


def _from_protos(folder: Path, inputs: list[InputSpec]) -> Iterator[Batch]:
    feeds: dict[str, NDArray[Any]] = {}
    files = list(folder.glob("input_*.pb"))
    for file in files:
        if not file.stem.removeprefix("input_").isdecimal():
            raise DataError(f"{str(file)!r} is not named input_<number>.pb.")
    files.sort(key=lambda p: int(p.stem.removeprefix("input_")))
    for number, file in enumerate(files):
        try:
            tensor = ir.serde.deserialize_tensor(_tensor_proto(file))
        except Exception as error:
            raise DataError(f"{str(file)!r} is not an ONNX tensor: {error}") from error
        if number >= len(inputs):
            raise DataError(f"{str(folder)!r} holds {len(files)} inputs, but the model takes {len(inputs)}.")
        names = {spec.name for spec in inputs}
        feeds[tensor.name if tensor.name in names else inputs[number].name] = np.array(tensor.numpy())
    yield Batch(folder.name, feeds)


def _tensor_proto(file: Path) -> Any:
    import onnx

    return onnx.load_tensor(file)


def _from_arrays(path: Path, inputs: list[InputSpec]) -> Iterator[Batch]:
    """Samples along axis 0, as many a run as the model's batch size: one where it is free."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                raise DataError(
                    f"{path.name!r} holds one array, but the model takes {len(inputs)} inputs: "
                    f"{', '.join(i.name for i in inputs)}. Use .npz with one array for each."
                )
            arrays: dict[str, NDArray[Any]] = {inputs[0].name: loaded}
        else:
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except UNREADABLE as error:
        raise DataError(f"Cannot read {str(path)!r}: {str(error).splitlines()[0]}") from error
    _check_names(path.name, arrays, inputs)
    yield from _sliced(path.name, arrays, inputs)


def _sliced(label: str, arrays: dict[str, NDArray[Any]], inputs: list[InputSpec]) -> Iterator[Batch]:
    batched = {spec.name: spec for spec in inputs if spec.shape is None or len(spec.shape) > 0}
    counts = {name: arrays[name].shape[0] for name in batched if arrays[name].ndim}
    if not counts:
        yield Batch(label, arrays)
        return
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise DataError(f"The arrays of {label!r} differ in their number of samples: {listing}.")
    total = next(iter(counts.values()))
    # An array one rank higher than its input holds whole inputs; otherwise axis 0 is the input's own first axis.
    stacked = all(spec.shape is not None and arrays[n].ndim == len(spec.shape) + 1 for n, spec in batched.items())
    size = 1 if stacked else next((spec.batch for spec in batched.values() if spec.batch is not None), 1)
    if total % size:
        raise DataError(
            f"{label!r} holds {total} samples, but the model's batch is fixed at {size}: give a multiple of {size}."
        )
    for start in range(0, total, size):
        feeds = {
            name: (arrays[name][start] if stacked else arrays[name][start : start + size])
            if name in batched
            else arrays[name]
            for name in arrays
        }
        yield Batch(f"{label}[{start}]", {name: np.ascontiguousarray(array) for name, array in feeds.items()})


def _check_names(label: str, arrays: Mapping[str, object], inputs: list[InputSpec]) -> None:
    wanted = [spec.name for spec in inputs]
    for name in arrays:
        if name not in wanted:
            near = errors.nearest(name, wanted)
            hint = f" Did you mean {near!r}?" if near else f" It takes: {', '.join(wanted)}."
            raise DataError(f"{label!r} holds {name!r}, which the model does not take.{hint}")
    for name in wanted:
        if name not in arrays:
            raise DataError(f"{label!r} lacks the input {name!r}.")


def _checked(batch: Batch, inputs: list[InputSpec]) -> Batch:
    """The batch with its arrays in the model's types, or a DataError that names the batch and the input."""
    _check_names(batch.name, batch.feeds, inputs)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        array = batch.feeds[spec.name]
        where = f"Input {spec.name!r} of {batch.name!r}"
        if array.dtype != spec.dtype:
            kinds = {np.dtype(spec.dtype).kind, array.dtype.kind}
            if kinds not in ({"f"}, {"i"}, {"u"}, {"i", "u"}) or not _fits(array, spec.dtype):
                raise DataError(f"{where} is {array.dtype}, but the model takes {spec.dtype}.")
            with np.errstate(over="ignore"):
                array = array.astype(spec.dtype)
        if spec.shape is not None:
            fits = array.ndim == len(spec.shape) and all(
                want is None or want == got for want, got in zip(spec.shape, array.shape, strict=True)
            )
            if not fits:
                wanted = "x".join("?" if d is None else str(d) for d in spec.shape) or "a scalar"
                got = "x".join(map(str, array.shape)) or "a scalar"
                raise DataError(f"{where} has shape {got}, but the model takes {wanted}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = "NaN" if np.isnan(array).any() else "infinite"
            raise DataError(f"{where} holds {bad} values: ranges would be meaningless. Clean the data.")
        feeds[spec.name] = array
    return Batch(batch.name, feeds)


def _fits(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether the values survive the conversion."""
    if array.size == 0 or np.dtype(dtype).kind == "f":
        return True
    info = np.iinfo(dtype)
    return bool(array.min() >= info.min and array.max() <= info.max)
