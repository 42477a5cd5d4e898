"""Statistics that turn observed tensors into ranges. Adding one is a file here and its line in `OBSERVERS`."""

from __future__ import annotations

from qgraph import errors
from qgraph.observers.base import Observer, Range
from qgraph.observers.entropy import Entropy
from qgraph.observers.histogram import Histogram
from qgraph.observers.minmax import MinMax
from qgraph.observers.moving_average import MovingAverage
from qgraph.observers.percentile import Percentile
from qgraph.observers.torch_histogram import TorchHistogram

__all__ = [
    "OBSERVERS",
    "Entropy",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Range",
    "TorchHistogram",
    "create",
]

OBSERVERS: dict[str, type[Observer]] = {
    "histogram": Histogram,
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "torch-histogram": TorchHistogram,
}


def create(name: str) -> Observer:
    """A new, empty observer.

    Raises:
        OptionError: no observer has this name; names the nearest.
    """
    if name not in OBSERVERS:
        raise errors.unknown("observer", name, OBSERVERS)
    return OBSERVERS[name]()
