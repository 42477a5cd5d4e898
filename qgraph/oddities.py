"""What data looks like that was given by mistake: samples that serve twice, inputs that never change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.data import Dataset

__all__ = ["constant", "shared"]

_CONSTANT = (
    "Input {!r} is {:.6g} throughout the calibration data: whatever depends on it has no range but that of one number. "
    "If the model will be given anything else, calibrate on that."
)
_SHARED = (
    "{} of the {} runs of the evaluation data are calibration data, too: that the result is as good on new data is not "
    "shown."
)


def constant(data: Dataset) -> list[str]:
    """A note on each input of several floats that are one number in all of the data. Reads it once."""
    seen: dict[str, float | None] = {}
    for batch in data:
        for name, array in batch.feeds.items():
            if array.dtype.kind == "f" and array.size and seen.get(name, 0.0) is not None:
                known = seen.get(name)
                seen[name] = _number(array) if known is None or _number(array) == known else None
    # Caches that are made up are zeros, and meant to be.
    return [_CONSTANT.format(n, number) for n, number in seen.items() if number is not None and n not in data.filled]


def _number(array: NDArray[Any]) -> float | None:
    """The one number that it holds several times; None where there is another."""
    first = array.reshape(-1)[0]
    return float(first) if array.size > 1 and bool(np.all(array == first)) else None


def shared(calibration: Dataset, evaluation: Dataset) -> str:
    """A note where runs of the one are runs of the other; else an empty text. Reads each once."""
    known = {batch.digest for batch in calibration}
    found = [batch.digest in known for batch in evaluation]
    return _SHARED.format(sum(found), len(found)) if any(found) else ""
