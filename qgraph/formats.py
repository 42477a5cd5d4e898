"""Number formats as objects behind one small interface: a set of code values, how to reach them, how they are stored.

A format knows nothing of scales. It says which *code values* exist (`lowest`..`highest`), maps real code values to the
nearest existing one (`project`), and gives the ONNX type that stores them. Whole numbers are here, ternary and binary
among them; floating-point formats and codebooks are in `qgraph.float_formats`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import errors

__all__ = [
    "BINARY",
    "INT2",
    "INT4",
    "INT8",
    "INT16",
    "INT32",
    "TERNARY",
    "UINT2",
    "UINT4",
    "UINT8",
    "UINT16",
    "Binary",
    "Format",
    "Int",
    "Ternary",
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

    @property
    def whole(self) -> bool:
        """Whether codes are whole numbers, one apart."""
        return True

    @property
    def stored(self) -> Format:
        """The format of all codes that the storage type holds: QuantizeLinear saturates at its ends."""
        return self

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
    def stored(self) -> Format:
        return dataclasses.replace(self, bits=self._stored_bits, narrow=False)

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


@dataclasses.dataclass(frozen=True)
class Ternary(Format):
    """-1, 0 and 1, in the two bits of the smallest integer type that ONNX has."""

    @property
    def name(self) -> str:
        return "ternary"

    @property
    def storage(self) -> ir.DataType:
        return ir.DataType.INT2

    @property
    def lowest(self) -> float:
        return -1.0

    @property
    def highest(self) -> float:
        return 1.0

    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        rounded = np.asarray(np.rint(codes))
        return np.clip(rounded, -1, 1, out=rounded)


@dataclasses.dataclass(frozen=True)
class Binary(Ternary):
    """-1 and 1; zero lies in the middle of the two and counts as 1."""

    @property
    def name(self) -> str:
        return "binary"

    def project(self, codes: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.where(np.asarray(codes) < 0, -1.0, 1.0).astype(np.asarray(codes).dtype)


INT2 = Int(2)
INT4 = Int(4)
INT8 = Int(8)
INT16 = Int(16)
INT32 = Int(32)
UINT2 = UInt(2)
UINT4 = UInt(4)
UINT8 = UInt(8)
UINT16 = UInt(16)

TERNARY = Ternary()
BINARY = Binary()

_WHOLE: tuple[Format, ...] = (INT2, INT4, INT8, INT16, INT32, UINT2, UINT4, UINT8, UINT16, TERNARY, BINARY)


def by_name(name: str, further: Iterable[Format] = ()) -> Format:
    """The format called `name`, among the whole numbers and `further` ones.

    Raises:
        OptionError: no such format; names the nearest.
    """
    known = {one.name: one for one in (*_WHOLE, *further)}
    if name not in known:
        raise errors.unknown("format", name, known)
    return known[name]
