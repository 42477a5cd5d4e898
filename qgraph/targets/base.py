"""What a target is: an execution provider on a kind of machine, told as data.

Passes ask a target three things and never its name: which integer kernel a node can run in and in which form
(`kernel`), what crossing between float and integer costs (`quantize_cost`, `dequantize_cost`), and how to run a model
there (`options`).
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from qgraph import errors
from qgraph.float_formats import Float
from qgraph.session import HOST, SessionOptions, has_provider
from qgraph.spec import Mixture, QuantSpec, Scheme

__all__ = [
    "ABSORBED",
    "AUTO",
    "FOLDED",
    "KERNEL",
    "QPARAMS",
    "REASON",
    "SPEC",
    "STATIC",
    "WEIGHTS",
    "Form",
    "Kernel",
    "Limits",
    "Output",
    "Refusal",
    "Target",
    "annotated",
]

SPEC = "qgraph.spec"
"""Key in `Value.meta`: the QuantSpec that annotation gave the value."""
QPARAMS = "qgraph.qparams"
"""Key in `Value.meta`: the QParams that calibration gave the value."""
KERNEL = "qgraph.kernel"
"""Key in `Node.meta`: the Kernel that the node is planned to run in."""
ABSORBED = "qgraph.absorbed"
"""Key in `Node.meta` of a Relu or Clip: name of the node whose quantizer does its work."""
FOLDED = "qgraph.folded"
"""Key in `Node.meta` of a node that brings a stored weight back: name of the node that reads it. The runtime computes
it once, as it loads the model; that it does so is audited."""
REASON = "qgraph.reason"
"""Key in `Node.meta`: why the node stays in float."""

AUTO = "auto"
"""Name of the scheme that chooses node by node, and that is taken unless another is asked for."""
STATIC = "int8"
"""Name of the scheme whose activations have ranges fixed from data."""
WEIGHTS = "weights"
"""Name of the scheme in which each weight has as few bits as it bears, and activations stay in float."""


def annotated(graph: ir.Graph) -> list[ir.Value]:
    """The activations that have a spec, in topological order."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [value for value in values if SPEC in value.meta]


class Form(enum.Enum):
    """How a kernel is written."""

    QDQ = "qdq"
    """QuantizeLinear and DequantizeLinear around the float operator, ranges calibrated."""
    DYNAMIC = "dynamic"
    """DynamicQuantizeLinear before an integer product."""
    WEIGHTS = "weights"
    """Float activations meet weights quantized in blocks, in an operator made for that."""
    STORED = "stored"
    """The float operator, whose weight is stored in fewer bits and brought back once, when the model is loaded."""
    HALF = "half"
    """The float operator on floats of 16 bits."""


class Output(enum.Enum):
    """What a kernel does at its output."""

    QUANTIZED = "quantized"
    """It exists only with a quantized output."""
    FLOAT = "float"
    """It writes float from its int32 accumulator; a QuantizeLinear after it may fuse, but need not be there."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a node cannot, or should not, run in an integer kernel."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An integer kernel that a node can run in, and the form that makes the runtime choose it.

    Attributes:
        operators: operator types, any of which in the runtime's optimized graph shows that the kernel was chosen.
        activations: spec of each quantized activation, by input position.
        weight: position and spec of the constant weight, if there is one.
        bias: position of the bias, if there is one.
        constants: spec of each further constant that must be in integers, by input position.
        output: what the output is.
        result: spec of the output, or None when it is not quantized.
        shares: whether input and output must have the same parameters (the operator only moves codes about).
        joins: whether the kernel is faster when all its inputs and its output have the same parameters.
        form: how it is written; only QDQ kernels quantize their activations with calibrated ranges.
        scheme: name of the scheme that it belongs to.
        float_seconds: estimated time as it is.
        integer_seconds: estimated time in this kernel, price included.
        price: seconds that its loss of accuracy was said to be worth.
    """

    operators: tuple[str, ...]
    activations: Mapping[int, QuantSpec]
    weight: tuple[int, QuantSpec] | None = None
    bias: int | None = None
    constants: Mapping[int, QuantSpec] = dataclasses.field(default_factory=dict[int, QuantSpec])
    output: Output = Output.QUANTIZED
    result: QuantSpec | None = None
    shares: bool = False
    joins: bool = False
    form: Form = Form.QDQ
    scheme: str = "int8"
    float_seconds: float = 0.0
    integer_seconds: float = 0.0
    price: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a provider asks of a whole graph.

    Attributes:
        static_shapes: whether it takes only nodes whose shapes are all known before the model is run.
    """

    static_shapes: bool = False


class Target(abc.ABC):
    """An execution provider on a kind of machine."""

    name: str
    description: str
    provider: str
    min_opset: int
    runner: str | None = None
    """The runner that has the provider where this runtime has not, see `qgraph.runners`."""
    evidence: str = ""
    """Where its table and its costs come from: measured when and on what, or documented and never run."""
    limits: Limits = Limits()
    tolerance: float = 1e-3
    """What the provider's outputs may differ from those of the CPU provider on the same file: RMS of the difference
    over RMS of the output. What the file itself lost by quantization is allowed in any case."""
    fuses_like_host: bool = True
    """Whether the CPU provider's optimized graph shows the kernels that are chosen there."""
    ordinal: bool = False
    """Whether its costs are an order of preference, and no times."""
    web: bool = False
    """Whether models run in browsers, which load files of 2 GB at most."""
    divides: bool = False
    """Whether a product whose result is copied apart is slower than one for each part."""
    sets_aside: bool = False
    """Whether a few channels of a product may be computed in float beside the codes of all others."""
    reciprocals: bool = True
    """Whether Reciprocal between quantizers is right there; else it is written as a Div."""
    rounds_apart: bool = False
    """Whether its integer kernels round results that lie in the middle of two codes differently by processor."""
    mask: float | None = None
    """What hides a score before Softmax where graphs are in integers from end to end; None for what the model has."""
    ladder: tuple[str, ...] = ()
    """Schemes that the default scheme tries one after the other, until one holds the budget; empty for itself alone."""
    notes: tuple[str, ...] = ()
    """What a report says of it: which measured profile its costs are, say."""
    missing: str = ""
    """What it takes to run a model there, where nothing here can."""
    schemes: Mapping[str, Scheme | Mixture]
    refused: Mapping[str, str] = MappingProxyType({})
    """Schemes that there are elsewhere -> why not here."""
    half: str | None = None
    """Floats of 16 bits that this target computes in: "fp16" or "bf16"."""
    narrow: Float | None = None
    """Floats in which its provider computes what the file has in float32; None where those are float32 there, too."""
    slow_fusions: frozenset[str] = frozenset()
    """Operators into which the runtime fuses by itself, although they are slower here than their parts."""
    fast_operators: frozenset[str] = frozenset()
    """Operators of the runtime's own into which passes may fuse, because they are faster here than their parts."""
    attention: int | None = None
    """The opset since which ONNX's Attention is faster here than its parts; None where it is not, or not measured."""
    absorbed: tuple[str, ...] = ()
    """Operators that disappear into the QuantizeLinear after them when its range allows."""
    clips_codes: bool = False
    """Whether it has Clip on codes, so that one that no range allows for need not be in float."""
    greedy_fusions: frozenset[str] = frozenset()
    """Operators that the runtime turns into integer kernels wherever they stand between integers, planned or not."""

    def scheme(self, name: str) -> Scheme | Mixture:
        """The scheme called `name`, as this target wants it.

        Raises:
            OptionError: this target has no such scheme; lists those that it has.
        """
        if name in self.refused:
            has = ", ".join(self.schemes)
            raise errors.OptionError(
                f"Target {self.name!r} has no scheme {name!r}: {self.refused[name]}. It has: {has}."
            )
        if name == WEIGHTS and name not in self.schemes:
            raise errors.OptionError(
                f"Target {self.name!r} has no kernels for weights of few bits, among which scheme {name!r} and "
                f"--bits-per-weight choose: leave that out. Its schemes are: {', '.join(self.schemes)}."
            )
        if name not in self.schemes:
            raise errors.unknown(f"scheme for target {self.name!r}:", name, self.schemes)
        return self.schemes[name]

    def in_blocks(self, size: int) -> Target:
        """The same target whose schemes have blocks of `size` weights, where they have blocks."""
        other = copy.copy(self)
        other.schemes = {name: scheme.in_blocks(size) for name, scheme in self.schemes.items()}
        return other

    @property
    def here(self) -> bool:
        """Whether the installed runtime has this target's provider."""
        return has_provider(self.provider)

    @property
    def native(self) -> bool:
        """Whether models run here as they will run there, so that their times mean something."""
        return self.here

    def options(self, threads: int = 0) -> SessionOptions:
        """Session options that run a model on this target, or on the host where the target's provider is not here."""
        return SessionOptions(providers=(self.provider if self.here else HOST,), threads=threads)

    @abc.abstractmethod
    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """The integer kernel for `node`, looked up by its pattern, or why there is none."""

    @abc.abstractmethod
    def quantize_cost(self, value: ir.Value) -> float:
        """Seconds to bring a float value into integers."""

    @abc.abstractmethod
    def dequantize_cost(self, value: ir.Value) -> float:
        """Seconds to bring an integer value back to float."""

    @property
    def activations(self) -> tuple[str, ...]:
        """`absorbed`, unless a target of one's own says otherwise."""
        return self.absorbed
