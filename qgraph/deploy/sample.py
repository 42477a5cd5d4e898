"""A sample that travels with a model: inputs as raw little-endian numbers, and the outputs that the runtime gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.errors import QuantizationError
from qgraph.session import Feeds

__all__ = ["Tensor", "difference", "tolerance", "write_tensors"]

_FIRST = 8
_EXACT, _ROUNDED = 1e-3, 2e-2
"""What a device's result may differ by, as a share of the largest number: where all is computed in float32, and where
codes or halves are rounded, which one kernel does a step up and another a step down."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of the sample.

    Attributes:
        name: of the model's input or output.
        type: as numpy calls it.
        shape: of the sample, without free dimensions.
        file: raw numbers, C order, little-endian; relative to the folder.
        first: the first numbers, to look at.
    """

    name: str
    type: str
    shape: list[int]
    file: str
    first: list[float]


def write_tensors(folder: Path, prefix: str, arrays: Feeds) -> list[Tensor]:
    """Write each array to `<prefix>_<number>.bin` of a folder, and describe them.

    Raises:
        QuantizationError: an array holds no numbers.
    """
    found: list[Tensor] = []
    for number, (name, value) in enumerate(arrays.items()):
        array = np.ascontiguousarray(np.asarray(value))
        if array.dtype.kind in "OUS":
            raise QuantizationError(f"{name!r} holds text; a sample needs numbers.")
        array = array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
        file = f"{prefix}_{number}.bin"
        (folder / file).write_bytes(array.tobytes())
        first = [float(x) for x in array.reshape(-1)[:_FIRST]]
        shape = list(np.shape(value))
        found.append(Tensor(name, array.dtype.name, shape, f"{folder.name}/{file}", first))
    return found


def difference(expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> float:
    """Largest absolute difference of any output, as a share of that output's largest number; infinite where shapes,
    infinities or NaN differ."""
    worst = 0.0
    for name, one in expected.items():
        a, b = np.asarray(one, np.float64), np.asarray(found[name], np.float64)
        if a.shape != b.shape:
            return float("inf")
        known = np.isfinite(a)
        if not np.array_equal(a[~known], b[~known], equal_nan=True) or not np.isfinite(b[known]).all():
            return float("inf")
        largest = float(np.abs(a[known]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(a[known] - b[known]).max(initial=0.0)) / largest)
    return worst


def tolerance(types: set[str]) -> float:
    """What `difference` may be on another machine, for a model with weights and values of these numpy types."""
    return _EXACT if types <= {"float32", "float64", "int32", "int64", "bool"} else _ROUNDED
