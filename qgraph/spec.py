"""How a tensor is to be quantized, as frozen data: format, granularity, symmetric or affine, observer."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from qgraph.formats import INT32, Format

__all__ = ["BIAS", "Granularity", "Mixture", "PerAxis", "PerBlock", "PerTensor", "QuantSpec", "Scheme"]


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
        range: lowest and highest number, where a kernel wants just these and not those of the data.
        torch: whether scale and zero point are computed as PyTorch does, and stay as they were observed.
    """

    format: Format
    granularity: Granularity = PerTensor()
    symmetric: bool = False
    observer: str = "histogram"
    range: tuple[float, float] | None = None
    torch: bool = False


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The numbers of a layer.

    Attributes:
        name: what the user calls it.
        activation: spec of activations; None leaves them in float (weight-only).
        weight: spec of weights.
        bias: spec of biases; None leaves them in float.
        dynamic: whether activations get their range at run time, from each tensor itself.
        pipeline: name of the pipeline that brings a model into it.
    """

    name: str
    activation: QuantSpec | None
    weight: QuantSpec
    bias: QuantSpec | None = None
    dynamic: bool = False
    pipeline: str = "quantize"

    @property
    def static(self) -> bool:
        """Whether ranges of activations must be calibrated."""
        return self.activation is not None and not self.dynamic

    @property
    def torch(self) -> bool:
        """Whether static ranges are PyTorch's, and nothing may change them."""
        return self.static and self.activation is not None and self.activation.torch

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Itself: a mixture of one."""
        return (self,)

    @property
    def held(self) -> Scheme | None:
        """Another scheme for the weights in the file; a mixture may have one."""
        return None

    @property
    def bits(self) -> int:
        """Stored bits of a weight, its scale not counted."""
        return self.weight.format.storage.bitwidth

    @property
    def block(self) -> int | None:
        """Weights that share a scale, where they are in blocks."""
        granularity = self.weight.granularity
        return granularity.size if isinstance(granularity, PerBlock) else None

    def weight_along(self, axis: int) -> QuantSpec:
        """The weight's spec with a scale for each slice along `axis`, unless the whole weight has one."""
        if isinstance(self.weight.granularity, PerTensor):
            return self.weight
        return dataclasses.replace(self.weight, granularity=PerAxis(axis))

    def in_blocks(self, size: int) -> Scheme:
        """The same with blocks of `size` weights, where there are blocks."""
        spec = self.weight
        if not isinstance(spec.granularity, PerBlock):
            return self
        blocked = dataclasses.replace(spec, granularity=PerBlock(spec.granularity.axis, size))
        return dataclasses.replace(self, weight=blocked)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several schemes in one graph, each node in the one that suits it; without any, everything stays in float.

    Attributes:
        name: what the user calls it.
        parts: the schemes.
        pipeline: name of the pipeline that brings a model into it.
        held: the scheme whose codes the weights of products have in the file, whatever computes with them.
    """

    name: str
    parts: tuple[Scheme, ...]
    pipeline: str = "quantize"
    held: Scheme | None = None

    @property
    def static(self) -> bool:
        """Whether ranges of activations must be calibrated."""
        return any(part.static for part in self.parts)

    @property
    def torch(self) -> bool:
        """Whether static ranges are PyTorch's, and nothing may change them."""
        return any(part.torch for part in self.parts)

    def in_blocks(self, size: int) -> Mixture:
        """The same with blocks of `size` weights, where there are blocks."""
        parts = tuple(part.in_blocks(size) for part in self.parts)
        return dataclasses.replace(self, parts=parts, held=self.held and self.held.in_blocks(size))


BIAS = QuantSpec(INT32, PerAxis(0), symmetric=True, observer="minmax")
"""int32 at scale input x weight: what every integer kernel adds to its accumulator."""
