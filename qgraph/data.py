"""Calibration and evaluation data: many sources, one shape: an iterable of feeds, read batch by batch, checked.

A *feed* maps input names to arrays for one run. Nothing is kept: every pass over a `Dataset` reads its source again.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qgraph import datafiles, errors, named
from qgraph.decoding import Decoder
from qgraph.errors import DataError, QGraphError, first_line
from qgraph.feeds import Batch, InputSpec, checked, inputs_of

__all__ = ["Batch", "DataSource", "Dataset", "InputSpec", "inputs_of", "load"]

DataSource: TypeAlias = "str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | Dataset"


class Dataset:
    """Feeds that can be gone through again and again.

    Attributes:
        label: where the data comes from, for messages.
        filled: inputs that the source lacks and that follow from token ids, as far as it was read.
    """

    def __init__(self, source: Callable[[], Iterator[Batch]], label: str, inputs: list[InputSpec]):
        self._source = source
        self.label = label
        self.inputs = inputs
        self.filled: set[str] = set()
        self.decoder = Decoder.of(inputs)
        self._only: frozenset[bytes] | None = None
        self._without: frozenset[bytes] = frozenset()
        self._summary: tuple[int, int, Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        found = False
        for raw in self._source():
            batch = checked(self._completed(raw), self.inputs)
            if self._only is not None or self._without:
                digest = batch.digest
                if digest in self._without or (self._only is not None and digest not in self._only):
                    continue
            found = True
            yield batch
        if not found:
            raise DataError(f"There is no data in {self.label}: at least one sample is needed.")

    def _completed(self, raw: Batch) -> Batch:
        if self.decoder is None:
            return raw
        feeds = self.decoder.complete(raw.feeds)
        self.filled |= feeds.keys() - raw.feeds.keys()
        return Batch(raw.name, feeds, raw.labels)

    def _summarize(self) -> tuple[int, int, Batch]:
        """(number of batches, bytes of the largest, the batch with the smallest hash), found in one pass."""
        if self._summary is None:
            count = largest = 0
            first: tuple[bytes, Batch] | None = None
            for batch in self:
                count, largest = count + 1, max(largest, batch.nbytes)
                digest = batch.digest
                if first is None or digest < first[0]:
                    first = (digest, batch)
            assert first is not None, "an empty dataset raises when it is read"
            self._summary = (count, largest, first[1])
        return self._summary

    def first(self) -> Batch:
        """The batch with the smallest hash: the same one in whatever order the data comes."""
        return self._summarize()[2]

    def typical(self) -> dict[str, Any]:
        """Feeds to time with: the first batch, or of a decoder with a cache one step of generation like it."""
        feeds = self.first().feeds
        return feeds if self.decoder is None else self.decoder.step(feeds)

    @property
    def largest(self) -> int:
        """Bytes of the largest batch."""
        return self._summarize()[1]

    def count(self) -> int:
        """Number of batches."""
        return self._summarize()[0]

    def digest(self) -> str:
        """An identity of all feeds and labels, in whatever order they come."""
        found = hashlib.sha256()
        for one in sorted(batch.digest + (b"" if batch.labels is None else batch.labels.tobytes()) for batch in self):
            found.update(one)
        return found.hexdigest()

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


def load(source: DataSource, inputs: list[InputSpec]) -> Dataset:
    """A dataset from whatever the user has.

    Args:
        source: a `.npz` file (arrays under the inputs' names, samples along axis 0); a `.npy` file (models with one
            input); a folder of such files, or of ONNX `test_data_set_*` folders with `input_0.pb`...; a string
            `package.module:function` naming a function that returns an iterable of feeds; such a function; or an
            iterable of feeds. What functions and iterables give is copied to temporary files while it is first read
            (lists are not), so that every pass sees the same data.
        inputs: the model's inputs.

    Raises:
        DataError: nothing there, or not readable as feeds of this model.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, Path)):
        text = str(source)
        path = Path(source)
        if not path.exists() and named.is_name(text):
            return load(_imported(text), inputs)
        if not path.exists():
            near = errors.nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            raise DataError(f"There is no data at {text!r}." + (f" Did you mean {near!r}?" if near else ""))
        return Dataset(lambda: datafiles.batches(path, inputs), repr(text), inputs)
    if isinstance(source, Mapping):
        feed: Any = source
        return load([feed], inputs)
    if callable(source):
        label = getattr(source, "__qualname__", repr(source))
        return Dataset(_Spool(_called(source, label), label).batches, f"function {label}", inputs)
    if isinstance(source, Sequence):
        return Dataset(lambda: _from_feeds(source, "batch"), "the given data", inputs)
    # Whatever else can be iterated might differ from pass to pass: loaders that shuffle or augment do.
    return Dataset(_Spool(_iterated(source, "the given data"), "batch").batches, "the given data", inputs)


def _called(function: Callable[[], Iterable[Mapping[str, Any]]], label: str) -> Iterator[Any]:
    """The feeds that a user's function returns, with its own failures told as such."""
    try:
        feeds = function()
    except QGraphError:
        raise
    except Exception as error:
        raise DataError(f"Function {label} failed: {type(error).__name__}: {first_line(error)}") from error
    yield from _iterated(feeds, f"function {label}")


def _iterated(feeds: Any, label: str) -> Iterator[Any]:
    if not isinstance(feeds, Iterable):
        raise DataError(f"{label} returned {type(feeds).__name__}, not an iterable of feeds (dicts of arrays).")
    try:
        yield from feeds
    except QGraphError:
        raise
    except Exception as error:
        raise DataError(f"Reading {label} failed: {type(error).__name__}: {first_line(error)}") from error


def _imported(text: str) -> Callable[[], Iterable[Mapping[str, Any]]]:
    found = named.load(text, DataError)
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
    """Feeds, written to disk while they are first read, so that every further pass gives the same."""

    def __init__(self, source: Iterator[Any], label: str):
        self._source = source
        self._label = label
        self._folder = Path(tempfile.mkdtemp(prefix="qgraph-data-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files: list[Path] = []

    def batches(self) -> Iterator[Batch]:
        """All batches: those on disk, then those still to come."""
        number = 0
        while True:
            while number < len(self._files):
                with np.load(self._files[number], allow_pickle=True) as stored:
                    yield Batch(f"{self._label} {number}", {name[1:]: array for name, array in stored.items()})
                number += 1
            batch = next(_from_feeds(self._source, self._label, number), None)
            if batch is None:
                return
            path = self._folder / f"{number}.npz"
            # A prefix, since an input may be called like a parameter of `savez`.
            np.savez(path, **{f"_{name}": a for name, a in batch.feeds.items()})  # type: ignore[arg-type, unused-ignore]
            self._files.append(path)
