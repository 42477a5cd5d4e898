"""Batches from files: .npz, .npy, folders of them, ONNX test_data_set_* folders."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.decoding import Decoder
from qgraph.errors import DataError, first_line
from qgraph.feeds import LABELS, Batch, InputSpec, check_names

__all__ = ["UNREADABLE", "batches"]

UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises on a file that it cannot read."""


def batches(path: Path, inputs: list[InputSpec]) -> Iterator[Batch]:
    """All batches of a file or folder, in order of the files' names.

    Raises:
        DataError: nothing there, not readable, or not the inputs of this model.
    """
    if path.is_dir():
        if path.name.startswith("test_data_set"):
            yield from _from_protos(path, inputs)
            return
        children = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy") or _is_test_set(p))
        if not children:
            raise DataError(f"The folder {str(path)!r} holds no .npz or .npy file and no test_data_set_* folder.")
        for child in children:
            yield from batches(child, inputs)
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
            tensor = ir.serde.deserialize_tensor(onnx.load_tensor(file))
        except Exception as error:
            raise DataError(f"{str(file)!r} is not an ONNX tensor: {error}") from error
        if number >= len(inputs):
            raise DataError(f"{str(folder)!r} holds {len(files)} inputs, but the model takes {len(inputs)}.")
        names = {spec.name for spec in inputs}
        feeds[tensor.name if tensor.name in names else inputs[number].name] = np.array(tensor.numpy())
    yield Batch(folder.name, feeds)


def _from_arrays(path: Path, inputs: list[InputSpec]) -> Iterator[Batch]:
    """Samples along axis 0, as many a run as the model's batch size: one where it is free."""
    try:
        with contextlib.ExitStack() as stack:
            decoder = Decoder.of(inputs)
            optional = decoder.optional if decoder is not None else set[str]()
            needed = [spec for spec in inputs if spec.name not in optional]
            members = _members(path, needed if path.suffix == ".npy" else inputs, stack)
            inputs = [spec for spec in inputs if spec.name in members or spec in needed]
            check_names(path.name, members, inputs)
            yield from _sliced(path.name, members, inputs)
    except UNREADABLE as error:
        raise DataError(f"Cannot read {str(path)!r}: {first_line(error)}") from error


class _Member:
    """One array of a file, read from its start to its end without ever being in memory whole."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self._fortran, self.dtype = header(file)
        if self.dtype.hasobject:
            raise ValueError("holds Python objects instead of numbers")
        self._whole: NDArray[Any] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def whole(self) -> NDArray[Any]:
        """All of it: for scalars, and for arrays stored by columns."""
        if self._whole is None:
            raw = np.frombuffer(self._bytes(math.prod(self.shape)), self.dtype)
            self._whole = raw.reshape(self.shape, order="F" if self._fortran else "C")
        return self._whole

    def rows(self, start: int, count: int) -> NDArray[Any]:
        """The next `count` rows, which must be those from `start`."""
        if self._fortran:
            return self.whole()[start : start + count]
        row = self.shape[1:]
        return np.frombuffer(self._bytes(count * math.prod(row)), self.dtype).reshape(count, *row)

    def _bytes(self, count: int) -> bytes:
        need = count * self.dtype.itemsize
        data = self._file.read(need)
        if len(data) < need:
            raise EOFError("the file is truncated")
        return data


def _members(path: Path, inputs: list[InputSpec], stack: contextlib.ExitStack) -> dict[str, _Member]:
    if path.suffix == ".npy":
        if len(inputs) != 1:
            raise DataError(
                f"{path.name!r} holds one array, but the model takes {len(inputs)} inputs: "
                f"{', '.join(i.name for i in inputs)}. Use .npz with one array for each."
            )
        return {inputs[0].name: _Member(stack.enter_context(path.open("rb")))}
    names = stack.enter_context(zipfile.ZipFile(path)).namelist()
    # An archive of its own for each, since they are read side by side.
    archives = [(name, stack.enter_context(zipfile.ZipFile(path))) for name in names]
    return {n.removesuffix(".npy"): _Member(stack.enter_context(archive.open(n))) for n, archive in archives}


def _sliced(label: str, members: dict[str, _Member], inputs: list[InputSpec]) -> Iterator[Batch]:
    batched = {spec.name: spec for spec in inputs if spec.shape is None or len(spec.shape) > 0}
    counts = {name: members[name].shape[0] for name in batched if members[name].ndim}
    if not counts:
        yield Batch(label, {name: member.whole() for name, member in members.items()})
        return
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise DataError(f"The arrays of {label!r} differ in their number of samples: {listing}.")
    total = next(iter(counts.values()))
    labels = members.get(LABELS) if LABELS not in batched else None
    if labels is not None and (not labels.ndim or labels.shape[0] != total):
        raise DataError(f"{label!r} holds {total} samples, but labels of shape {list(labels.shape)}.")
    # An array one rank higher than its input holds whole inputs; otherwise axis 0 is the input's own first axis.
    stacked = all(spec.shape is not None and members[n].ndim == len(spec.shape) + 1 for n, spec in batched.items())
    size = 1 if stacked else next((spec.batch for spec in batched.values() if spec.batch is not None), 1)
    if total % size:
        raise DataError(
            f"{label!r} holds {total} samples, but the model's batch is fixed at {size}: give a multiple of {size}."
        )
    for start in range(0, total, size):
        feeds: dict[str, NDArray[Any]] = {}
        for name, member in members.items():
            if member is labels:
                feeds[name] = member.rows(start, size)
            elif name not in batched or not member.ndim:
                feeds[name] = member.whole()
            else:
                rows = member.rows(start, size)
                feeds[name] = rows[0] if stacked else rows
        yield Batch(f"{label}[{start}]", feeds)
