"""Floating-point formats, and codebooks: what weights are stored in where whole numbers would waste their codes.

The numbers of each ONNX type are those of `ml_dtypes`, which rounds ties to even and knows subnormals. Formats of eight
bits and less are written with saturation, as ONNX's Cast does by default: what is too large, infinite included,
becomes the largest finite number. NaN stays NaN where the format has one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import QuantizationError
from qgraph.formats import Format

__all__ = [
    "ALL",
    "BF16",
    "E2M1",
    "E4M3",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FP16",
    "NF4",
    "Codebook",
    "Float",
]


@functools.cache
def _limits(kind: ir.DataType) -> tuple[float, float]:
    """(smallest normal, largest) number of a type."""
    found: Any = ml_dtypes.finfo(kind.numpy())  # type: ignore[no-untyped-call]
    return float(found.smallest_normal), float(found.max)


def _single(array: NDArray[Any]) -> NDArray[Any]:
    """float32 that rounds to fewer bits as `array` itself would: to odd, so that no tie comes to be on the way.

    `ml_dtypes` goes from float64 through float32 to the smallest types (S. Boldo and G. Melquiond, "Emulation of FMA
    and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", 2008, theorem 3).
    """
    if array.dtype != np.float64:
        return array
    single = np.asarray(array.astype(np.float32))
    inexact = single.astype(np.float64) != array
    beyond = np.abs(single.astype(np.float64)) > np.abs(array)
    cut = np.where(beyond, np.nextafter(single, np.float32(0)), single)
    return np.asarray(np.where(inexact & ~np.isnan(array), (cut.view(np.uint32) | 1).view(np.float32), cut))


@dataclasses.dataclass(frozen=True)
class Float(Format):
    """A floating-point type of ONNX.

    Attributes:
        label: what the field calls it.
        kind: the ONNX type.
    """

    label: str
    kind: ir.DataType

    @property
    def name(self) -> str:
        return self.label

    @property
    def storage(self) -> ir.DataType:
        return self.kind

    @property
    def whole(self) -> bool:
        return False

    @property
    def highest(self) -> float:
        return _limits(self.kind)[1]

    @property
    def lowest(self) -> float:
        return -self.highest

    @property
    def smallest_normal(self) -> float:
        """Below it numbers lose digits: they are subnormal."""
        return _limits(self.kind)[0]

    @property
    def has_nan(self) -> bool:
        """Whether one of the codes stands for no number."""
        return self.kind != ir.DataType.FLOAT4E2M1

    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        codes = np.asarray(codes)
        return np.asarray(self.encode(codes).astype(codes.dtype))

    def encode(self, codes: NDArray[np.floating]) -> NDArray[np.generic]:
        """Codes in the type itself; shape kept.

        Raises:
            QuantizationError: a NaN meets a format that has none.
        """
        array = np.asarray(codes)
        if not self.has_nan and np.isnan(array).any():
            raise QuantizationError(f"{self.name} has no NaN, and one is to be stored.")
        # NaN passes through a clip.
        return _single(np.clip(array, self.lowest, self.highest)).astype(self.kind.numpy())


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """A list of rising numbers between -1 and 1, of which weights keep the place of the nearest.

    Attributes:
        label: what the field calls it.
        numbers: at most 16.
    """

    label: str
    numbers: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.label

    @property
    def storage(self) -> ir.DataType:
        return ir.DataType.UINT4

    @property
    def whole(self) -> bool:
        return False

    @property
    def lowest(self) -> float:
        return self.numbers[0]

    @property
    def highest(self) -> float:
        return self.numbers[-1]

    def places(self, codes: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Place of the nearest number of each element; half way between two, the even place.

        Raises:
            QuantizationError: one is NaN.
        """
        array = np.asarray(codes, np.float64)
        if np.isnan(array).any():
            raise QuantizationError(f"{self.name} has no NaN, and one is to be stored.")
        numbers = np.array(self.numbers)
        middles = (numbers[1:] + numbers[:-1]) / 2
        below, above = np.searchsorted(middles, array, "left"), np.searchsorted(middles, array, "right")
        return np.where(below % 2 == 0, below, above).astype(np.uint8)

    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        codes = np.asarray(codes)
        return np.array(self.numbers)[self.places(codes)].astype(codes.dtype)

    def encode(self, codes: NDArray[np.floating]) -> NDArray[np.generic]:
        return self.places(codes).astype(self.storage.numpy())


FP16 = Float("fp16", ir.DataType.FLOAT16)
BF16 = Float("bf16", ir.DataType.BFLOAT16)
E4M3 = Float("e4m3", ir.DataType.FLOAT8E4M3FN)
E4M3FNUZ = Float("e4m3fnuz", ir.DataType.FLOAT8E4M3FNUZ)
E5M2 = Float("e5m2", ir.DataType.FLOAT8E5M2)
E5M2FNUZ = Float("e5m2fnuz", ir.DataType.FLOAT8E5M2FNUZ)
E2M1 = Float("e2m1", ir.DataType.FLOAT4E2M1)

NF4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
"""Quantiles of the normal distribution: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023),
appendix E."""

ALL: tuple[Format, ...] = (FP16, BF16, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1, NF4)
