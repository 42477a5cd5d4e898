"""Batches from files: .npz, .npy, folders of them, ONNX test_data_set_* folders."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import DataError
from qgraph.feeds import Batch, InputSpec, check_names

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
        mapped = path.suffix == ".npy"
        # Numpy would leave a damaged archive open.
        with path.open("rb") as file:
            loaded = np.load(path if mapped else file, mmap_mode="r" if mapped else None, allow_pickle=False)
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
    check_names(path.name, arrays, inputs)
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
        yield Batch(f"{label}[{start}]", {name: np.asarray(array, order="C") for name, array in feeds.items()})
