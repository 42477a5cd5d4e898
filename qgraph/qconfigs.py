"""Ranges that PyTorch's backends differ in: `torch.ao.quantization.get_default_qconfig` by name, for any target.

fbgemm and x86 leave the upper half of the activations' codes free (`reduce_range`), since sums of two products of
eight bits overflow sixteen where the processor has no VNNI; onednn and qnnpack use all 256. Weights have a symmetric
range for each channel, and on qnnpack one for the whole tensor. PyTorch 2, torch/ao/quantization/qconfig.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from qgraph.errors import OptionError, unknown
from qgraph.formats import INT8, UINT8, Format, UInt
from qgraph.spec import Mixture, PerTensor, QuantSpec, Scheme
from qgraph.targets import Target

__all__ = ["OBSERVER", "QCONFIGS", "QCONFIG_NOTE", "QCONFIG_USELESS", "QConfig", "with_qconfig"]

OBSERVER = "torch-histogram"
"""Of the activations, whose `range` is that of PyTorch's HistogramObserver."""
_FUSED = frozenset({"Relu"})
"""What PyTorch fuses into the layer before it. ReLU6 and Hardtanh are operators of their own there, which share scale,
zero point and observer with what they read: the observer sees it before and after."""
QCONFIG_NOTE = (
    "Static ranges are those of PyTorch's qconfig {!r}: no channels are scaled, no ranges fitted and no roundings "
    "learned, which would change them or what they are of."
)

QCONFIG_USELESS = (
    "Scheme {!r} calibrates no ranges here, which a qconfig is about: take scheme int8 or auto, and calibration data "
    "(--data)."
)


@dataclasses.dataclass(frozen=True)
class QConfig:
    """What sets one apart.

    Attributes:
        reduced: whether activations use codes 0 to 127 only.
        per_channel: whether each output channel of a weight has a scale of its own.
    """

    reduced: bool
    per_channel: bool


QCONFIGS: Mapping[str, QConfig] = MappingProxyType(
    {
        "fbgemm": QConfig(reduced=True, per_channel=True),
        "x86": QConfig(reduced=True, per_channel=True),
        "onednn": QConfig(reduced=False, per_channel=True),
        "qnnpack": QConfig(reduced=False, per_channel=False),
    }
)


def with_qconfig(target: Target, name: str) -> Target:
    """The same target, whose static schemes have the ranges of the qconfig called `name`.

    Where a target's activations are signed, so are the codes: scales are the same, zero points 128 less.

    Raises:
        OptionError: no such qconfig, or the target's kernels cannot have its ranges; names those that they can.
    """
    if name not in QCONFIGS:
        raise unknown("qconfig", name, QCONFIGS)
    why = _refused(target, QCONFIGS[name])
    if why is not None:
        others = [one for one, qconfig in QCONFIGS.items() if _refused(target, qconfig) is None]
        what = f"Take {' or '.join(others)}" if others else "Leave the qconfig out, or take another target"
        raise OptionError(f"Target {target.name!r} cannot have the ranges of qconfig {name!r}: {why}. {what}.")
    other = copy.copy(target)
    other.schemes = {key: _changed(scheme, QCONFIGS[name]) for key, scheme in target.schemes.items()}
    if target.clips_codes:
        other.absorbed = tuple(operator for operator in target.absorbed if operator in _FUSED)
    return other


def _static(target: Target) -> list[Scheme]:
    return [part for scheme in target.schemes.values() for part in scheme.parts if part.static]


def _refused(target: Target, qconfig: QConfig) -> str | None:
    """Why the target's static kernels cannot have these ranges."""
    static = _static(target)
    if not static:
        return "it has no static scheme"
    # Schemes of more bits stay as they are: these ranges are for eight.
    eight = [part for part in static if part.activation is not None and part.activation.format.storage.bitwidth == 8]
    for part in eight or static:
        assert part.activation is not None, "a static scheme has one"
        if part.activation.symmetric or part.activation.format not in (INT8, UINT8):
            return "its activations are not of eight bits with a free zero point"
        if part.activation.format.signed and qconfig.reduced:
            return "its activations are signed, and of unsigned codes only is there a half to leave free"
        if part.weight.format != INT8 and not qconfig.reduced:
            return "sums of full codes with weights of eight bits overflow there"
        if isinstance(part.weight.granularity, PerTensor) and qconfig.per_channel:
            return "its weights have one scale each"
    return None


def _changed(scheme: Scheme | Mixture, qconfig: QConfig) -> Scheme | Mixture:
    if isinstance(scheme, Mixture):
        parts = tuple(_part(part, qconfig) for part in scheme.parts)
        return dataclasses.replace(scheme, parts=parts)
    return _part(scheme, qconfig)


def _part(scheme: Scheme, qconfig: QConfig) -> Scheme:
    if scheme.activation is None or not scheme.static or scheme.activation.format.storage.bitwidth != 8:
        return scheme
    codes: Format = UInt(7) if qconfig.reduced else scheme.activation.format
    places = scheme.weight.granularity if qconfig.per_channel else PerTensor()
    return dataclasses.replace(
        scheme,
        activation=QuantSpec(codes, observer=OBSERVER, torch=True),
        weight=QuantSpec(INT8, places, symmetric=True, observer="minmax", torch=True),
    )
