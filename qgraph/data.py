"""Calibration and evaluation data: many sources, one shape: an iterable of feeds, read batch by batch, checked.

A *feed* maps input names to arrays for one run. Nothing is kept: every pass over a `Dataset` reads its source again.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qgraph import datafiles, errors
from qgraph.errors import DataError
from qgraph.feeds import Batch, InputSpec, checked, inputs_of

__all__ = ["Batch", "DataSource", "Dataset", "InputSpec", "inputs_of", "load"]

DataSource: TypeAlias = "str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | Dataset"


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
            batch = checked(raw, self.inputs)
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
        return Dataset(lambda: datafiles.batches(path, inputs), repr(text), inputs)
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


def _from_feeds(feeds: Any, label: str, start: int = 0) -> Iterator[Batch]:
    if not isinstance(feeds, Iterable):
        raise DataError(f"{label} returned {type(feeds).__name__}, not an iterable of feeds (dicts of arrays).")
    feed: Any
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
        self._folder = Path(tempfile.mkdtemp(prefix="qgraph-data-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
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
            path = self._folder / f"{number}.npz"
            # A prefix, since an input may be called like a parameter of `savez`.
            np.savez(path, **{f"_{name}": a for name, a in batch.feeds.items()})  # type: ignore[arg-type, unused-ignore]
            self._files.append(path)
