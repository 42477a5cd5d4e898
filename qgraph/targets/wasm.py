"""The CPU provider as WebAssembly has it, in every browser and in Node: int8, weights in blocks of few bits.

Its integer kernels compute the same numbers as those of x86 with VNNI. Its times were measured nowhere; the costs are
those of x86.
"""

from __future__ import annotations

from qgraph.formats import INT8, UINT8
from qgraph.spec import Mixture
from qgraph.targets.cpu import Cpu

__all__ = ["Wasm", "wasm"]


class Wasm(Cpu):
    """The CPU provider in WebAssembly."""

    runner = "wasm"
    web = True
    # Not measured there, and browsers' versions differ.
    attention = None
    sets_aside = False
    # MatMulNBits keeps float activations there, where the CPU provider rounds them to 8 bits.
    tolerance = 1e-2
    evidence = "what it takes: onnxruntime-web; costs: those of x86 with VNNI"

    def __init__(self) -> None:
        super().__init__(
            "wasm", "browsers through WebAssembly: u8 activations, s8 weights, weights in blocks", UINT8, INT8
        )
        # Weights in blocks only by name: one row of them ran at 0.05 to 0.07 times the speed of float32 there
        # (`qgraph profile --export`, in Node).
        parts = tuple(part for part in self.schemes["auto"].parts if part.block is None)
        self.schemes = {**self.schemes, "auto": Mixture("auto", parts)}

    @property
    def native(self) -> bool:
        """Never: this process is no browser."""
        return False


def wasm() -> Wasm:
    """onnxruntime-web without a GPU."""
    return Wasm()
