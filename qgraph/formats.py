"""Number formats as objects behind one small interface: a set of code values, how to reach them, how they are stored.

A format knows nothing of scales. It says which *code values* exist (`lowest`..`highest`), maps real code values to the
nearest existing one (`project`), and gives the ONNX type that stores them. Integers are here; floating-point, ternary
and binary formats are further subclasses with the same three members.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import errors

__all__ = [
    "INT2",
    "INT4",
    "INT8",
    "INT16",
    "INT32",
    "UINT2",
    "UINT4",
    "UINT8",
    "UINT16",
    "Format",
    "Int",
    "UInt",
    "by_name",
]


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A number format. Frozen, hashable, compared by value."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Field-standard name, as `int8` or `e4m3`."""

    @property
    @abc.abstractmethod
    def storage(self) -> ir.DataType:
        """ONNX element type that holds the codes."""

    @property
    @abc.abstractmethod
    def lowest(self) -> float:
        """Smallest code value."""

    @property
    @abc.abstractmethod
    def highest(self) -> float:
        """Largest code value."""

    @abc.abstractmethod
    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        """Nearest existing code value of each element (ties to even), saturating."""

    @property
    def signed(self) -> bool:
        """Whether negative code values exist."""
        return self.lowest < 0

    @property
    def steps(self) -> float:
        """Distance between the lowest and the highest code value."""
        return self.highest - self.lowest

    @property
    def middle(self) -> float:
        """The zero point of a symmetric range: 0 for signed codes, the upper middle for unsigned ones."""
        return 0.0 if self.signed else float(np.ceil((self.lowest + self.highest) / 2))

    def encode(self, codes: NDArray[np.floating]) -> NDArray[np.generic]:
        """Codes as an array of the storage type; shape kept."""
        return self.project(codes).astype(self.storage.numpy())


@dataclasses.dataclass(frozen=True)
class _Integer(Format):
    bits: int
    narrow: bool = False

    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        rounded = np.asarray(np.rint(codes))
        return np.clip(rounded, self.lowest, self.highest, out=rounded)

    @property
    def _stored_bits(self) -> int:
        return next(size for size in (2, 4, 8, 16, 32) if size >= self.bits)


@dataclasses.dataclass(frozen=True)
class Int(_Integer):
    """Two's complement integer of `bits` bits; `narrow` leaves out the lowest code, so that the range is symmetric.

    A width without an ONNX type of its own is stored in the next wider one: `Int(7)` is what `reduce_range` means on
    instruction sets whose 16-bit intermediate sums saturate.
    """

    @property
    def name(self) -> str:
        return f"int{self.bits}" + ("_narrow" if self.narrow else "")

    @property
    def storage(self) -> ir.DataType:
        return ir.DataType[f"INT{self._stored_bits}"]

    @property
    def lowest(self) -> float:
        return float(-(2 ** (self.bits - 1)) + self.narrow)

    @property
    def highest(self) -> float:
        return float(2 ** (self.bits - 1) - 1)


@dataclasses.dataclass(frozen=True)
class UInt(_Integer):
    """Unsigned integer of `bits` bits; stored in the next wider ONNX type."""

    @property
    def name(self) -> str:
        return f"uint{self.bits}"

    @property
    def storage(self) -> ir.DataType:
        return ir.DataType[f"UINT{self._stored_bits}"]

    @property
    def lowest(self) -> float:
        return 0.0

    @property
    def highest(self) -> float:
        return float(2**self.bits - 1)


INT2 = Int(2)
INT4 = Int(4)
INT8 = Int(8)
INT16 = Int(16)
INT32 = Int(32)
UINT2 = UInt(2)
UINT4 = UInt(4)
UINT8 = UInt(8)
UINT16 = UInt(16)

_NAMED: dict[str, Format] = {f.name: f for f in (INT2, INT4, INT8, INT16, INT32, UINT2, UINT4, UINT8, UINT16)}


def by_name(name: str) -> Format:
    """The format called `name`.

    Raises:
        OptionError: no such format; names the nearest.
    """
    if name not in _NAMED:
        raise errors.unknown("format", name, _NAMED)
    return _NAMED[name]
