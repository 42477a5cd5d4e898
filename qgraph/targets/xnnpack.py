"""XNNPACK on phones: s8 convolutions in its own kernels, all else in those of the arm64 CPU provider.

Shapes must be known: a Gemm of a free batch gives one row there, whatever the batch is (found by running it).
It takes QLinearConv with s8 activations and s8 weights, per channel or not, dense (one group) or depthwise; u8
activations never together with s8 weights. A Relu left between Conv and QuantizeLinear costs that convolution, so its
bounds go into the range of the codes.
"""

from __future__ import annotations

from qgraph.formats import INT8
from qgraph.spec import Mixture
from qgraph.targets.base import Limits
from qgraph.targets.cpu import Cpu

__all__ = ["Xnnpack", "xnnpack"]


class Xnnpack(Cpu):
    """The XNNPACK provider, with the CPU provider for what it does not take."""

    sets_aside = False
    provider = "XnnpackExecutionProvider"
    runner = "xnnpack"
    limits = Limits(static_shapes=True)
    tolerance = 1e-2
    evidence = "what it takes: onnxruntime-web 1.16.3; costs: those of x86 with VNNI"
    missing = "Its packages are for Android and iOS."

    def __init__(self) -> None:
        super().__init__("xnnpack", "phones, XNNPACK: s8 convolutions, the rest on the arm64 CPU", INT8, INT8)
        # Weights in blocks only by name: nothing of them is XNNPACK's, and its last runtime for WebAssembly, on which
        # all is proved, has an older operator of them.
        parts = tuple(part for part in self.schemes["auto"].parts if part.block is None)
        self.schemes = {**self.schemes, "auto": Mixture("auto", parts)}

    @property
    def native(self) -> bool:
        """Whether the installed runtime has it."""
        return self.here


def xnnpack() -> Xnnpack:
    """XNNPACK with s8 activations and weights."""
    return Xnnpack()
