"""Running sums of one output's error: what of its signal came out as noise, and how alike its samples are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.feeds import Batch
from qgraph.report import OutputError

__all__ = ["Tally", "decibels", "samples_of"]

_TELLING = 4


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, not a number for NaN."""
    if noise == 0.0:
        return float("inf")
    if math.isnan(noise) or math.isnan(signal):
        return float("nan")
    # Apart, since the share of an overflow is none.
    return float(10 * (np.log10(signal) - np.log10(noise))) if signal > 0 else float("-inf")


def samples_of(output: NDArray[Any], batch: Batch) -> int:
    """How many samples an output of this batch is: its length along axis 0.

    A scalar is one, and so is a vector, unless it has a number for each of the samples that went in: the scores of
    what a detector has found say something together.
    """
    if output.ndim == 1:
        sizes = {array.shape[0] for array in batch.feeds.values() if array.ndim}
        return len(output) if sizes == {len(output)} else 1
    return output.shape[0] if output.ndim else 1


def _looks_like_scores(output: NDArray[Any]) -> bool:
    return output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f"


def _is_measure(output: NDArray[Any]) -> bool:
    """Whether near is nearly right: of floats, and of pictures and sounds in 8 or 16 bits, but not of labels."""
    picture = output.dtype.kind in "iu" and output.dtype.itemsize <= 2 and output.ndim > 2
    return output.dtype.kind == "f" or picture


class Tally:
    """Of one output over all batches.

    Numbers are compared by their cosine, labels, indices and truths by the share that is equal: their cosine says
    nothing.
    """

    def __init__(self) -> None:
        self._signal = self._noise = self._largest = self._cosines = self._squares = 0.0
        self.samples = self._same = 0
        self._classes = True
        self.compared = 0
        """Batches whose shape was right."""

    def add(self, a: NDArray[Any], b: NDArray[Any], batch: Batch) -> None:
        """Take in the original's output and another model's of one shape; positions that a mask hides do not count."""
        visible = batch.visible
        x, y = a.astype(np.float64), b.astype(np.float64)
        if visible is not None and a.ndim >= 3 and a.shape[:2] == visible.shape:
            x, y = (np.where(visible.reshape(*visible.shape, *[1] * (a.ndim - 2)), array, 0.0) for array in (x, y))
        # An infinity that both have (a masked score) is right, and one that only one has is wrong beyond measure.
        both = np.isinf(x) & (x == y)
        if both.any():
            x, y = np.where(both, 0.0, x), np.where(both, 0.0, y)
        if np.isinf(x).any() or np.isinf(y).any():
            x, y = np.where(np.isinf(x), 0.0, x), np.where(np.isinf(x) | np.isinf(y), np.nan, y)
        difference = x - y
        self._signal += float(np.square(x).sum())
        self._noise += float(np.square(difference).sum())
        # NaN stays NaN, where `max` would lose it.
        self._largest = float(np.maximum(self._largest, np.abs(difference).max(initial=0.0)))
        rows = samples_of(a, batch)
        width = x.size // rows if rows else math.prod(x.shape[1:])
        x, y = x.reshape(rows, width), y.reshape(rows, width)
        alike = _alike(x, y) if _is_measure(a) else (x == y).sum(axis=1) / max(1, width)
        alike = np.where(np.all(x == y, axis=1), 1.0, alike)
        self._cosines += float(alike.sum())
        self._squares += float(np.square(1.0 - alike).sum())
        self.samples += rows
        self.compared += 1
        if _looks_like_scores(a) and self._classes:
            self._same += int((x.argmax(axis=1) == y.argmax(axis=1)).sum())
        else:
            self._classes = False

    def lose(self, a: NDArray[Any], b: NDArray[Any], batch: Batch) -> None:
        """Take in an output of another shape: nothing of it can be told from noise, and none of its samples agrees."""
        x, y = (np.where(np.isfinite(array), array, 0).astype(np.float64) for array in (a, b))
        power = float(np.square(x).sum())
        self._signal += power
        self._noise += max(power, float(np.square(y).sum()))
        self._largest = float(np.maximum(self._largest, np.abs(x).max(initial=0.0)))
        rows = max(1, samples_of(a, batch))
        self._squares += rows
        self.samples += rows
        self._classes = self._classes and _looks_like_scores(a)

    def result(self) -> OutputError:
        """All of it as numbers."""
        return OutputError(
            decibels(self._signal, self._noise),
            self._cosines / max(1, self.samples),
            self._largest,
            self._same / self.samples if self._classes and self.samples else None,
            self._spread(),
        )

    def _spread(self) -> float:
        """Standard deviation of the samples' loss of cosine over its mean; 1 where there are too few to tell."""
        count = max(1, self.samples)
        mean = 1.0 - self._cosines / count
        if count < _TELLING or not mean > 0:
            return 1.0
        return math.sqrt(max(self._squares / count - mean * mean, 0.0)) / mean


def _alike(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each row of [samples, width]; of single numbers their difference: a cosine has their sign only."""
    if x.shape[1] == 1:
        wide = np.maximum(np.maximum(np.abs(x), np.abs(y))[:, 0], 1e-30)
        return np.asarray(1.0 - np.abs(x - y)[:, 0] / wide)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(axis=1) / np.where(norms > 0, norms, 1.0))
