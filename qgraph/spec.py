"""How a tensor is to be quantized, as frozen data: format, granularity, symmetric or affine, observer."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from qgraph.formats import INT32, Format

__all__ = ["BIAS", "Granularity", "PerAxis", "PerBlock", "PerTensor", "QuantSpec", "Scheme"]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclasses.dataclass(frozen=True)
class PerAxis:
    """One scale for each slice along `axis` (per-channel)."""

    axis: int


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for each run of `size` elements along `axis`."""

    axis: int
    size: int


Granularity: TypeAlias = PerTensor | PerAxis | PerBlock


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """What a tensor is quantized to, and which statistic decides its range.

    Attributes:
        format: the number format of the codes.
        granularity: how many scales there are.
        symmetric: zero point fixed at the format's middle, instead of free (affine).
        observer: name of the observer, see `qgraph.observers`.
    """

    format: Format
    granularity: Granularity = PerTensor()
    symmetric: bool = False
    observer: str = "histogram"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The specs of a layer's activations, weight and bias, and the pipeline that brings a model into them."""

    name: str
    activation: QuantSpec
    weight: QuantSpec
    bias: QuantSpec
    pipeline: str = "static"


BIAS = QuantSpec(INT32, PerAxis(0), symmetric=True, observer="minmax")
"""int32 at scale input x weight: what every integer kernel adds to its accumulator."""
