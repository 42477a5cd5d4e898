"""What each node loses in each scheme: first-order estimates for all from one pass over the data, exact for a few.

The estimate is the error of the node's own output on a sample of its inputs, relative to that output's power: weights
and activations rounded as the scheme rounds them. Errors of different nodes are independent to first order, so a
candidate's noise is about the sum over its nodes, each times what the rest of the graph makes of it; that factor is
measured for few nodes (`measured`) and taken from the median of these for the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, stored, ternary, weights
from qgraph.apart import APART, Apart
from qgraph.calibration import CHANNELS, RUNS, SAMPLE, UNSCALED
from qgraph.errors import QuantizationError
from qgraph.formats import UINT8, Int
from qgraph.qparams import fake_quantize, from_range, of_blocks
from qgraph.readers import in_runs
from qgraph.rules import Rules
from qgraph.sides import SIDE, Side
from qgraph.spec import PerAxis, PerBlock, QuantSpec
from qgraph.targets import Form, Kernel, Output

__all__ = ["Estimate", "estimates", "noise_of", "total"]

_ROWS = 64
_LEARNED = 0.1
"""Share of the power of the weights' own error that learned roundings leave: of two transformers 9 and 14 dB less."""
_HALF = 1e-7
"""Noise of a node in 16-bit floats: a third of (2 ** -11) ** 2, of the operands and of the result."""
_SHARES = (1.4, 1.2, 1.0, 0.85, 0.7, 0.55, 0.4)
"""Of the range seen in one half of the data: the best of these on the other half is about what will be fitted."""
_UNKNOWN = 3e-5
"""Noise of an eight-bit node of which there is no sample: that of a uniform value cut into 200 steps."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One node in one scheme.

    Attributes:
        node: its name.
        op_type: its operator.
        scheme: the scheme.
        noise: error of its own output relative to the output's power.
        saved: seconds that the kernel saves, by the target's costs.
    """

    node: str
    op_type: str
    scheme: str
    noise: float
    saved: float


def estimates(model: ir.Model, rules: Rules, static: bool = True, learned: bool = False) -> list[Estimate]:
    """Of every node and kernel of a surveyed model, in graph order.

    Args:
        model: surveyed.
        rules: what kernels there are.
        static: whether calibrated ones count.
        learned: whether the roundings of weights with a scale for each channel will be learned.
    """
    found: list[Estimate] = []
    for node in model.graph:
        kernels, _ = rules.kernels(node)
        for scheme, kernel in kernels.items():
            if kernel.form is Form.QDQ and not static:
                continue
            saved = kernel.float_seconds - kernel.integer_seconds + kernel.price
            found.append(Estimate(node.name or "", node.op_type, scheme, noise_of(node, kernel, learned), saved))
    return found


def noise_of(node: ir.Node, kernel: Kernel, learned: bool = False) -> float:
    """Share of the output's power that the kernel turns into noise, on the node's sample.

    Of movers of codes: what rounds a product for them, else 0. With `learned`, the rounding of the weight will be
    learned, which is known only once it is done.

    What no scale holds, an infinite range or a weight that is not finite, is noise as a whole.
    """
    try:
        found = _noise(node, kernel, learned)
    except QuantizationError:
        return 1.0
    return found if math.isfinite(found) else 1.0


def _noise(node: ir.Node, kernel: Kernel, learned: bool) -> float:
    if kernel.shares:
        return _moved(node)
    if kernel.form is Form.HALF:
        return _HALF
    if kernel.form is Form.STORED and kernel.weight is not None:
        return stored.noise(node, kernel.weight[1])
    channels: tuple[NDArray[np.float32], NDArray[np.float32]] | None = node.meta.get(CHANNELS)
    if kernel.form is Form.QDQ and channels is not None and not np.isfinite(channels).all():
        return 1.0
    if graph.is_standard(node, "Gather") and kernel.weight is not None:
        return _table_noise(node.inputs[kernel.weight[0]], kernel.weight[1])
    sample: NDArray[np.float32] | None = node.meta.get(SAMPLE)
    if sample is None:
        sample = _drawn(node)
    if sample is None or kernel.weight is None:
        return _UNKNOWN
    scaled = kernel.form in (Form.QDQ, Form.DYNAMIC)  # Others read what they read before a Mul was put there.
    before: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None if scaled else node.meta.get(UNSCALED)
    sample, factor = (sample, None) if before is None else before
    try:
        signal, noise = _powers(node, kernel, sample, learned, factor)
    finally:
        graph.release(node.inputs[kernel.weight[0]])
    side: Side | None = node.meta.get(SIDE) if scaled else None
    return noise / signal * (1.0 if side is None else side.left) if signal > 0 else 0.0


def _moved(node: ir.Node) -> float:
    """Of a product's output that is rounded only for this mover of codes, and would else stay float at no cost."""
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if maker is not None and graph.is_standard(maker, "Add"):
        makers = [value.producer() for value in maker.inputs if value is not None]
        maker = next((one for one in makers if one is not None), maker)
    if maker is None or not graph.is_standard(maker, "MatMul", "Gemm") or SAMPLE not in maker.meta:
        return 0.0
    weight = graph.constant(maker.inputs[1])
    assert weight is not None, "it was surveyed"
    sample = maker.meta[SAMPLE]
    output = sample.reshape(len(sample), -1) @ _matrix(maker, weight)
    del weight
    graph.release(maker.inputs[1])
    power = _power(output)
    return _rounding(output) / power if power > 0 else 0.0


def _rounding(output: NDArray[Any]) -> float:
    """Power of what eight bits for the whole range of `output` add to it."""
    step = (float(output.max(initial=0.0)) - float(output.min(initial=0.0))) / 255
    return output.size * step * step / 12


def _table_noise(table: ir.Value | None, spec: QuantSpec) -> float:
    """Of rows with a scale each, on rows spread over the table."""
    array = graph.constant(table)
    assert array is not None
    rows = np.array(array[:: max(1, len(array) // _ROWS)], np.float64)
    del array
    graph.release(table)
    params = from_range(rows.min(axis=1), rows.max(axis=1), QuantSpec(spec.format, PerAxis(0), symmetric=True))
    power = float(np.square(rows).sum())
    return float(np.square(rows - fake_quantize(rows, params)).sum()) / power if power > 0 else 0.0


def _drawn(node: ir.Node) -> NDArray[np.float32] | None:
    """Rows for a product that has not seen data: heavy-tailed, as activations of trained networks are."""
    shape = graph.run_shape(node.inputs[1]) if weights.is_product(node) else None
    if shape is None or len(shape) != 2:
        return None
    inner = shape[1 if node.attributes.get_int("transB", 0) else 0]
    return np.random.default_rng(inner).standard_t(4, (_ROWS, inner)).astype(np.float32)


def _powers(
    node: ir.Node,
    kernel: Kernel,
    sample: NDArray[np.float32],
    learned: bool,
    factor: NDArray[np.float32] | None = None,
) -> tuple[float, float]:
    """Of the node's output on the sample, and of its error; the weight's inputs are multiplied by `factor`."""
    assert kernel.weight is not None
    position, spec = kernel.weight
    weight = graph.constant(node.inputs[position])
    assert weight is not None
    if factor is not None:
        weight = weight * (factor if node.attributes.get_int("transB", 0) else factor[:, None])
    if not np.isfinite(weight).all():
        raise QuantizationError(f"The weight of {graph.label(node)} is not finite.")
    rows = sample.reshape(len(sample), -1)
    apart: Apart | None = node.meta.get(APART) if kernel.form is Form.QDQ else None
    if apart is not None:
        rows = apart.rows
    if kernel.form is Form.WEIGHTS and isinstance(spec.granularity, PerBlock):
        # The operator rounds rows in blocks as long as those of the weights, to eight bits whatever theirs are.
        along = QuantSpec(Int(8, narrow=True), PerBlock(1, spec.granularity.size), symmetric=True)
        noisy = fake_quantize(rows, of_blocks(rows, along))
        matrix, rounded = _matrix(node, weight), _in_blocks(weight, spec)
    else:
        noisy = _activation(node, kernel, rows) if apart is None else _fitted(kernel, apart)
        axis = spec.granularity.axis % weight.ndim if isinstance(spec.granularity, PerAxis) else None
        others = tuple(i for i in range(weight.ndim) if i != axis)
        params = from_range(weight.min(axis=others, initial=0.0), weight.max(axis=others, initial=0.0), spec)
        matrix, rounded = _matrix(node, weight), _matrix(node, fake_quantize(weight, params))
        if learned:
            rounded = np.asarray(matrix + _LEARNED**0.5 * (rounded - matrix), np.float32)
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    return _error(rows, noisy, matrix, rounded, groups, kernel.output is Output.QUANTIZED)


def _in_blocks(weight: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    """[inner, outputs] as blocks of few bits have it."""
    return ternary.rounded(weight, spec).real.T


def _activation(node: ir.Node, kernel: Kernel, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sample as per-tensor codes of the whole range have it."""
    spec = next(iter(kernel.activations.values()), None)
    runs: NDArray[np.float32] | None = node.meta.get(RUNS) if kernel.form is Form.DYNAMIC else None
    if runs is not None:
        ends = runs[:, 0].min(axis=1), runs[:, 1].max(axis=1)
        return in_runs(rows, *ends, QuantSpec(UINT8) if spec is None else spec)
    channels: tuple[NDArray[np.float32], NDArray[np.float32]] | None = node.meta.get(CHANNELS)
    if spec is None or channels is None:
        low, high = float(rows.min(initial=0.0)), float(rows.max(initial=0.0))
    else:
        low, high = float(channels[0].min(initial=0.0)), float(channels[1].max(initial=0.0))
    return fake_quantize(rows, from_range(low, high, QuantSpec(UINT8) if spec is None else spec))


def _fitted(kernel: Kernel, apart: Apart) -> NDArray[np.float32]:
    """One half of the data in codes whose range is a share of the other half's."""
    spec = next(iter(kernel.activations.values()), QuantSpec(UINT8))
    low, high = float(apart.low.min(initial=0.0)), float(apart.high.max(initial=0.0))
    tried = (fake_quantize(apart.rows, from_range(low * share, high * share, spec)) for share in _SHARES)
    return min(tried, key=lambda found: _power(found - apart.rows))


def _matrix(node: ir.Node, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[inner, outputs], inner per group for convolutions."""
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1).T
    return weight.T if node.attributes.get_int("transB", 0) else weight


def _error(
    rows: NDArray[np.float32],
    noisy: NDArray[np.float32],
    matrix: NDArray[np.float32],
    rounded: NDArray[np.float32],
    groups: int,
    coded: bool,
) -> tuple[float, float]:
    """Power of the output, and of its error, summed over groups; of an output in codes, their rounding too."""
    if groups == 1:
        output = rows @ matrix
        return _power(output), _power(output - noisy @ rounded) + (_rounding(output) if coded else 0.0)
    count, inner = len(rows), matrix.shape[0]
    x, y = (a.reshape(count, groups, inner).transpose(1, 0, 2) for a in (rows, noisy))
    w, v = (a.reshape(inner, groups, -1).transpose(1, 0, 2) for a in (matrix, rounded))
    output = x @ w
    return _power(output), _power(output - y @ v) + (_rounding(output) if coded else 0.0)


def _power(array: NDArray[Any]) -> float:
    # Squares of what float32 holds need not fit into it.
    return float(np.square(array, dtype=np.float64).sum())


def total(noises: Mapping[tuple[str, str], float], assignment: Mapping[str, str]) -> float:
    """First-order noise of an assignment."""
    return sum(noises.get((node, scheme), 0.0) for node, scheme in assignment.items())
