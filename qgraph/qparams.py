"""Scale and zero point from a range; quantize and dequantize. Pure numpy.

Expressed value = (code - zero_point) * scale, as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (2018), section 2.1, and in ONNX's QuantizeLinear.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qgraph.errors import QuantizationError
from qgraph.formats import INT32, Format
from qgraph.spec import PerBlock, PerTensor, QuantSpec

__all__ = [
    "QParams",
    "bias_scale",
    "dequantize",
    "fake_quantize",
    "from_range",
    "limit_accumulator",
    "of_blocks",
    "quantize",
]

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_TORCH_SMALLEST = np.finfo(np.float32).eps
_INT32_MAX = 2.0**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point.

    Attributes:
        scale: float32; shape () per tensor, [channels] per axis, the tensor's shape with the blocked axis divided
            (rounded up) per block.
        zero_point: codes as float64 of the same shape.
        format: the number format of the codes.
        axis: the axis of the scales; None per tensor.
        block: elements that share a scale along `axis`; None unless per block.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.float64]
    format: Format
    axis: int | None = None
    block: int | None = None

    @property
    def saturated(self) -> tuple[float, float]:
        """Smallest and largest value that comes out of a run-time quantizer, which knows the storage type only."""
        return dataclasses.replace(self, format=self.format.stored).range

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest expressed value (over all scales)."""
        low = (self.format.lowest - self.zero_point) * self.scale
        high = (self.format.highest - self.zero_point) * self.scale
        return float(np.min(low)), float(np.max(high))


def from_range(low: ArrayLike, high: ArrayLike, spec: QuantSpec) -> QParams:
    """Parameters that cover [low, high], extended to hold 0 exactly.

    Args:
        low: smallest values, of the scale's shape.
        high: largest values, same shape.
        spec: format, granularity and symmetry.

    Returns:
        Symmetric: scale = max(-low, high) / (steps / 2), so that -128..127 divides by 127.5 and -127..127 by 127.
        Affine: scale = (high - low) / steps, zero point rounded. What the rounding of the zero point pushes out at
        one end, or the last half step of a symmetric range, is expressed to within half a step by the last code.
        Where the spec says so, all is computed as PyTorch does: in single precision, no scale below 2**-23.

    Raises:
        QuantizationError: a bound is NaN or infinite, or low > high; of PyTorch's, also a range beyond float32.
    """
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.all(np.isfinite(lo)) and np.all(np.isfinite(hi))):
        raise QuantizationError(f"A range must be finite, got [{np.min(lo)}, {np.max(hi)}].")
    if np.any(np.asarray(low, np.float64) > np.asarray(high, np.float64)):
        raise QuantizationError("A range's low end lies above its high end.")
    fmt = spec.format
    if spec.torch:
        return _as_torch(lo.astype(np.float32), hi.astype(np.float32), spec)
    if spec.symmetric:
        scale = np.maximum(-lo, hi) / (fmt.steps / 2)
        zero = np.full(scale.shape, fmt.middle)
    else:
        scale = (hi - lo) / fmt.steps
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale > 0, fmt.lowest - np.rint(lo / scale), fmt.lowest)
        zero = np.clip(zero, fmt.lowest, fmt.highest)
    # An all-zero tensor has no range: any positive scale expresses it exactly.
    scale = np.where(scale > _SMALLEST_SCALE, scale, np.where(scale > 0, _SMALLEST_SCALE, 1.0))
    return QParams(scale.astype(np.float32), zero, fmt, *_places(spec))


def _places(spec: QuantSpec) -> tuple[int | None, int | None]:
    """Axis and block."""
    axis = None if isinstance(spec.granularity, PerTensor) else spec.granularity.axis
    return axis, spec.granularity.size if isinstance(spec.granularity, PerBlock) else None


def _as_torch(low: NDArray[np.float32], high: NDArray[np.float32], spec: QuantSpec) -> QParams:
    """The formulas of torch.ao.quantization.MinMaxObserver's documentation, every step rounded to float32."""
    fmt = spec.format
    with np.errstate(over="ignore"):
        steps = np.float32(fmt.steps / 2 if spec.symmetric else fmt.steps)
        reach = np.maximum(-low, high) if spec.symmetric else high - low
    if not np.all(np.isfinite(reach)):
        raise QuantizationError("A range is wider than float32 can say, which PyTorch's arithmetic cannot express.")
    scale = np.maximum(reach / steps, _TORCH_SMALLEST)
    zero = np.full(scale.shape, fmt.middle)
    if not spec.symmetric:
        zero = np.clip(fmt.lowest - np.rint(low / scale).astype(np.float64), fmt.lowest, fmt.highest)
    return QParams(np.asarray(scale, np.float32), zero, fmt, *_places(spec))


def of_blocks(array: NDArray[np.floating], spec: QuantSpec) -> QParams:
    """Parameters of each block's own range, the last block of an axis being what is left.

    Args:
        array: the tensor.
        spec: its granularity is `PerBlock`.
    """
    assert isinstance(spec.granularity, PerBlock)
    axis, size = spec.granularity.axis, spec.granularity.size
    starts = np.arange(0, array.shape[axis], size)
    return from_range(
        np.minimum.reduceat(array, starts, axis=axis), np.maximum.reduceat(array, starts, axis=axis), spec
    )


def _spread(values: NDArray[np.generic], qparams: QParams, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Scales or zero points, shaped to broadcast over a tensor of `shape`."""
    if qparams.axis is None:
        return values
    axis = qparams.axis % len(shape)
    if qparams.block is not None:
        return np.repeat(values, qparams.block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def quantize(array: NDArray[np.floating], qparams: QParams) -> NDArray[np.generic]:
    """Codes of `array` in the format's storage type: saturate(round_half_even(x / scale) + zero_point).

    Computed in float32 as the ONNX operator does, so that folding at compile time equals quantizing at run time;
    int32 (biases) in float64, since float32 cannot count so far. Floats are rounded to the format's own numbers.
    """
    wide = np.float64 if qparams.format.steps > 2**24 else np.float32
    scale = _spread(qparams.scale, qparams, array.shape).astype(wide)
    zero = _spread(qparams.zero_point, qparams, array.shape).astype(wide)
    with np.errstate(over="ignore"):
        codes = np.divide(array, scale, dtype=wide)  # what overflows is infinite and saturates
    if qparams.format.whole:
        codes = np.rint(codes)
    return qparams.format.encode(codes + zero)


def dequantize(codes: NDArray[np.generic], qparams: QParams) -> NDArray[np.float32]:
    """Expressed values of `codes`, float32, same shape."""
    scale = _spread(qparams.scale, qparams, codes.shape).astype(np.float32)
    zero = _spread(qparams.zero_point, qparams, codes.shape).astype(np.float32)
    return np.asarray((codes.astype(np.float32) - zero) * scale, np.float32)


def fake_quantize(array: NDArray[np.floating], qparams: QParams) -> NDArray[np.float32]:
    """`array` as it is after one trip through the codes."""
    return dequantize(quantize(array, qparams), qparams)


def bias_scale(activation: QParams, weight: QParams) -> QParams:
    """Parameters of an int32 bias: scale_x * scale_w of each output channel, zero point 0."""
    scale = np.asarray(activation.scale.astype(np.float64) * weight.scale, np.float32)
    return QParams(scale, np.zeros(scale.shape), INT32, 0 if scale.ndim else None)


def limit_accumulator(
    activation: QParams,
    weight: QParams,
    absolute_sums: NDArray[np.floating],
    bias: NDArray[np.floating] | None,
) -> QParams:
    """Weight parameters whose int32 accumulator provably cannot overflow; the given ones when they already cannot.

    The accumulator of a channel is bounded by ``max|x_code - x_zero| * sum|w_code| + |bias_code|``. Both terms shrink
    in proportion to the weight's scale, so a channel whose bound is too large gets its scale widened by just that
    much (a known failure of today's tools: a tiny scale_x * scale_w makes the bias overflow).

    Args:
        activation: parameters of the input.
        weight: symmetric parameters of the weight, scale of shape [channels] or ().
        absolute_sums: sum of |weight| of each output channel, [channels].
        bias: [channels], or None.

    Raises:
        QuantizationError: no float32 scale is wide enough.
    """
    fmt = activation.format.stored
    reach = float(np.max(np.maximum(fmt.highest - activation.zero_point, activation.zero_point - fmt.lowest)))
    total = absolute_sums.astype(np.float64) * reach
    if bias is not None:
        total = total + np.abs(bias.astype(np.float64)) / float(activation.scale)
    # one unit in the last place for each rounded code is covered by the margin of 2 %
    needed = 1.02 * total / _INT32_MAX
    # the bias's own scale, their product, must not vanish in float32
    needed = np.maximum(needed, _SMALLEST_SCALE / float(activation.scale))
    if weight.axis is None:
        needed = np.asarray(np.max(needed, initial=0.0))
    if np.all(needed <= weight.scale):
        return weight
    if not np.all(needed <= np.finfo(np.float32).max):
        raise QuantizationError("A bias is so much larger than its layer's input that no scale can hold both.")
    scale = np.maximum(weight.scale, needed).astype(np.float32)
    return dataclasses.replace(weight, scale=scale)
