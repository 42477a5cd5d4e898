"""A constant read a window at a time, so that a weight of any size is worked on in the memory of a few windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import widened

__all__ = ["Strips"]


class Strips:
    """A constant of two dimensions; windows of it come as float32.

    External tensors are read from their file, not mapped: what was mapped stays resident until all of it is let go of.

    Args:
        source: a tensor, or an array.
    """

    def __init__(self, source: ir.TensorProtocol | NDArray[Any]):
        self._array: NDArray[Any] | None = None
        self._path: Path | None = None
        self._offset = 0
        if not isinstance(source, np.ndarray):
            # What is a view of 16-bit floats is read from those, and widened a window at a time.
            source = widened.source(source)
        if isinstance(source, ir.ExternalTensor) and source.dtype.itemsize >= 1:
            self._path, self._offset = Path(source.path), source.offset or 0
            self._kind = np.dtype(source.dtype.numpy())
            self.shape = tuple(int(size) for size in source.shape.numpy())
        else:
            self._array = source if isinstance(source, np.ndarray) else source.numpy()
            self._kind = self._array.dtype
            self.shape = self._array.shape
        if len(self.shape) != 2:
            raise ValueError(f"A matrix is read in strips, and not what has the shape {list(self.shape)}.")

    def window(
        self, rows: slice, columns: slice = slice(None), into: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The part [rows, columns]; both steps are one.

        Args:
            rows: of the first dimension.
            columns: of the second.
            into: where to put it, flat and at least as long; without it the result may be a view of what is in memory.
        """
        top, bottom, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        size = (bottom - top, right - left)
        place = None if into is None else into[: size[0] * size[1]].reshape(size)
        if self._path is None:
            assert self._array is not None
            found = self._array[rows, columns]
        elif place is not None and self._kind == np.float32:
            self._read(place, top, left)
            return place
        else:
            found = np.empty(size, self._kind)
            self._read(found, top, left)
        if place is None:
            return found.astype(np.float32, copy=False)
        place[:] = found
        return place

    def _read(self, found: NDArray[Any], top: int, left: int) -> None:
        assert self._path is not None
        width = self.shape[1]
        with self._path.open("rb", buffering=0) as file:
            # Whole rows lie in a row; of parts of them each is read for itself.
            for number, run in enumerate([found] if found.shape[1] == width else list(found)):
                file.seek(self._offset + ((top + number) * width + left) * self._kind.itemsize)
                _fill(file, run)


def _fill(file: Any, run: NDArray[Any]) -> None:
    """Read until `run` is full.

    Raises:
        OSError: the file ends before.
    """
    left = memoryview(run.reshape(-1).view(np.uint8).data)
    while len(left):
        count = file.readinto(left)
        if not count:
            raise OSError(f"{file.name!r} is shorter than its tensors.")
        left = left[count:]
