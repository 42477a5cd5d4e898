"""MatMul(x, W) -> codes of W in blocks, chosen so that the product errs little behind the layers quantized before it.

Layers are done in order. With `Xf` what a layer reads in the model and `Xq` what it reads behind its quantized
beginning, the weights wanted are `W + (Xq'Xq + d)^-1 Xq'(Xf - Xq) W`: they take back what the error so far makes of
the output (Frantar and Alistarh, "Optimal Brain Compression", 2022, section 5, has the idea of the dense fit to the
float outputs; Arai and Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
2025, section 4, the correction). Their codes are then found against `Xq'Xq` (`qgraph.block_rounding`). Where rows are
few, both moments are shrunk towards inputs without correlation (Schaefer and Strimmer, "A Shrinkage Approach to
Large-Scale Covariance Matrix Estimation", 2005, table 2, target D; the prior is fixed here).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import calibration, graph, weights
from qgraph.block_rounding import damped, round_blocks
from qgraph.block_scales import Codes, Levels, searched
from qgraph.blocks import BLOCKS, Blocks
from qgraph.data import Dataset
from qgraph.errors import QuantizationError
from qgraph.formats import BINARY, TERNARY
from qgraph.observers.twin_moment import TwinMoment, TwinReach
from qgraph.outcome import LATE
from qgraph.spec import PerBlock, QuantSpec
from qgraph.streams import Streams
from qgraph.targets import KERNEL, Form, Kernel

__all__ = ["RoundBlocks"]

_DAMPING = 0.05
"""Share of the mean power of the inputs that is added to each: what the data has not shown may still happen."""
_PRIOR = 0.5
"""Rows, as a share of the inputs, that speak for inputs that have nothing to do with each other. On 42, 168 and 512
rows of 256 inputs, codes of four bits lose 0.9, 1.5 and 0.1 dB less on others for it; on 2048, 0.1 dB more."""
_ALIKE = 4
"""Rows that speak for inputs of the same power: one row or two say little of even that."""
_LATE = f"{LATE} before its codes were learned: they are rounded to nearest"
_UNSEEN = "the data shows no finite input of it: its codes are rounded to nearest"


class RoundBlocks(ir.passes.InPlacePass):
    """Writes `Node.meta["qgraph.blocks"]` on products planned with weights in blocks.

    Args:
        data: the calibration data.
        write: the passes that write planned weights; they make the quantized beginning.
        folder: where the model's external tensors lie.
        budget: bytes that a second moment may take; to solve for one layer takes about five times its moment.
        progress: called with ("rounding blocks...", layers done, layers in all).
        store: blocks found earlier on the same model and data, used and added to.
        damping: share of the mean power of the inputs that is added to each.
        sweeps: rounds of better scales and codes.
        correct: whether weights make up for what is quantized before them.
        deadline: of `time.monotonic`; layers that are not done by then are left to be rounded to nearest.

    Attributes:
        refused: node -> why its codes are not learned.
    """

    def __init__(
        self,
        data: Dataset,
        write: Sequence[ir.passes.PassBase] = (),
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        progress: Callable[[str, int, int], None] | None = None,
        store: MutableMapping[str, Blocks] | None = None,
        damping: float = _DAMPING,
        sweeps: int = 3,
        correct: bool = True,
        deadline: float | None = None,
    ):
        super().__init__()
        self.data = data
        self.write = write
        self.folder = folder
        self.budget = budget
        self.progress = progress
        self.store: MutableMapping[str, Blocks] = {} if store is None else store
        self.damping = damping
        self.sweeps = sweeps
        self.correct = correct
        self.deadline = deadline
        self.refused: dict[str, str] = {}
        self._twins: dict[ir.Node, list[ir.Node]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        self.refused, self._twins = {}, {}
        keys = _keys(model.graph)
        groups = self._groups(model.graph)
        nodes = [node for _, group in groups for node in group]
        if all(keys[node] in self.store for node in nodes):
            for node in nodes:
                self._give(node, keys)
            return ir.passes.PassResult(model, False)
        start, total, done = time.monotonic(), sum(map(_work, nodes)), 0.0
        # Experts of one layer read what is made at once; the streams stop there once.
        made: dict[ir.Value | None, int] = {v: at for at, node in enumerate(model.graph) for v in node.outputs}
        reached = 0
        with Streams(model, self.data, _is_planned, self._write, self.folder) as streams:
            for number, (position, group) in enumerate(groups):
                if self.progress is not None:
                    left = (time.monotonic() - start) / done * (total - done) if done else 0.0
                    about = f", about {left:.0f} s left" if number else ""
                    self.progress(f"rounding blocks{about}", number, len(groups))
                if self.deadline is not None and time.monotonic() > self.deadline:
                    late = [node for _, rest in groups[number:] for node in rest if keys[node] not in self.store]
                    self.refused.update({graph.label(node): _LATE for node in late})
                    for node in (one for _, rest in groups[number:] for one in rest if one not in late):
                        self._give(node, keys)
                    break
                if made.get(group[0].inputs[0], -1) >= reached:
                    streams.advance(position)
                    reached = position
                if any(keys[node] not in self.store for node in group):
                    self._solve(group, streams, keys)
                for node in group:
                    if keys[node] in self.store:
                        self._give(node, keys)
                done += sum(map(_work, group))
        return ir.passes.PassResult(model, False)

    def _give(self, node: ir.Node, keys: dict[ir.Node, str]) -> None:
        for one in (node, *self._twins.get(node, ())):
            one.meta[BLOCKS] = self.store[keys[node]]

    def _write(self, part: ir.Model) -> None:
        for one in self.write:
            one(part)

    def _groups(self, main: ir.Graph) -> list[tuple[int, list[ir.Node]]]:
        """(position of the first, products that read one value), in order."""
        found: dict[ir.Value, tuple[int, list[ir.Node]]] = {}
        reads: dict[tuple[ir.Value, QuantSpec], ir.Node] = {}
        for position, node in enumerate(main):
            kernel = _kernel(node)
            source, weight = (node.inputs[0], node.inputs[1]) if kernel is not None else (None, None)
            if kernel is None or kernel.weight is None or source is None or weight is None:
                continue
            inputs, _ = _dimensions(node)
            if 8 * inputs * inputs > self.budget:
                self.refused[graph.label(node)] = (
                    f"the second moment of its {inputs} inputs takes {8 * inputs * inputs >> 20} MiB, "
                    "more than the memory allowed"
                )
                continue
            first = reads.setdefault((weight, kernel.weight[1]), node)
            if first.inputs[0] is not source:
                self.refused[graph.label(node)] = (
                    f"it has the codes found for {graph.label(first)}, which reads its weight"
                )
                self._twins.setdefault(first, []).append(node)
                continue
            found.setdefault(source, (position, []))[1].append(node)
        return list(found.values())

    def _solve(self, group: Sequence[ir.Node], streams: Streams, keys: dict[ir.Node, str]) -> None:
        source = group[0].inputs[0]
        assert source is not None
        found = _moments(streams, source, self.correct)
        if found is None:
            self.refused.update({graph.label(node): _UNSEEN for node in group})
            return
        moment, drift = damped(found[0], self.damping), found[1]
        del found
        cured = None if drift is None else np.linalg.solve(moment, drift).astype(np.float32)
        del drift
        done: dict[tuple[ir.Value, QuantSpec], Blocks] = {}
        for node in group:
            if keys[node] in self.store:
                continue
            kernel, weight = _kernel(node), node.inputs[1]
            assert kernel is not None and kernel.weight is not None and weight is not None
            spec = kernel.weight[1]
            if (weight, spec) not in done:
                assert isinstance(spec.granularity, PerBlock)
                array = graph.constant(weight)
                assert array is not None
                rows = np.array(array if spec.granularity.axis == 0 else array.T, np.float32, order="C")
                del array
                graph.release(weight)
                if not np.isfinite(rows).all():
                    raise QuantizationError(
                        f"Weight {weight.name!r} of {graph.label(node)} is not finite: mend the model."
                    )
                if cured is not None:
                    rows += cured @ rows
                done[weight, spec] = self._rounded(rows, moment, Levels.of(spec)).packed()
            self.store[keys[node]] = done[weight, spec]

    def _rounded(self, target: NDArray[np.float32], moment: NDArray[np.float64], levels: Levels) -> Codes:
        if self.sweeps < 0:
            return searched(target, levels, np.diagonal(moment))
        return round_blocks(target, moment, levels, self.sweeps)


def _kernel(node: ir.Node) -> Kernel | None:
    """That of a product with weights in blocks."""
    kernel: Kernel | None = node.meta.get(KERNEL)
    if kernel is None or kernel.form is not Form.WEIGHTS or kernel.weight is None or not weights.is_product(node):
        return None
    # What is ternary is so already, or as a network was trained.
    few = kernel.weight[1].format in (TERNARY, BINARY)
    return kernel if isinstance(kernel.weight[1].granularity, PerBlock) and not few else None


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.WEIGHTS


def _dimensions(node: ir.Node) -> tuple[int, int]:
    """(inputs, outputs)."""
    kernel, shape = _kernel(node), graph.run_shape(node.inputs[1])
    assert kernel is not None and kernel.weight is not None and shape is not None
    granularity = kernel.weight[1].granularity
    assert isinstance(granularity, PerBlock)
    return shape[granularity.axis], shape[1 - granularity.axis]


def _work(node: ir.Node) -> float:
    inputs, outputs = _dimensions(node)
    return float(inputs) * inputs * (inputs + outputs)


def _keys(main: ir.Graph) -> dict[ir.Node, str]:
    """Identity of each planned product and of all that is quantized before it."""
    found: dict[ir.Node, str] = {}
    seen = hashlib.sha256()
    for node in main:
        if _is_planned(node):
            kernel: Kernel = node.meta[KERNEL]
            seen.update(f"{graph.label(node)} {kernel.weight}\n".encode())
            found[node] = seen.hexdigest()
    return found


def _moments(
    streams: Streams, source: ir.Value, correct: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None] | None:
    """(mean of xq xq^T, mean of xq (xf - xq)^T or None where the streams are one); None without a finite row."""
    differ = correct and streams.differs(source) and streams.aligned(source)
    reach = TwinReach()
    for own, other in streams.pairs(source):
        reach.update(own if differ else other, other)
    if reach.twin is None:
        return None
    seen = TwinMoment(reach, differ)
    for own, other in streams.pairs(source):
        seen.update(own if differ else other, other)
    return _shrunk(*seen.moments(), seen.rows)


def _shrunk(
    moment: NDArray[np.float64], drift: NDArray[np.float64] | None, rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """What few rows say of two inputs together counts less, in place: an expert may see fewer tokens than inputs."""
    share = rows / (rows + _PRIOR * len(moment))
    powers = np.diagonal(moment).copy()
    powers += (powers.mean() - powers) * (_ALIKE / (rows + _ALIKE))
    moment *= share
    np.fill_diagonal(moment, powers)
    if drift is not None:
        drift *= share
    return moment, drift
