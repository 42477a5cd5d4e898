"""A QuantSpec on each value that will be integer, a Kernel on each node that will compute in integers, a reason on
every other.

Which nodes are worth it is one minimum cut: each node with an integer kernel is on the float or on the integer side,
pays its time there, and every value that crosses pays for its quantization or dequantization. The cut of least total
time is found exactly (Greig, Porteous and Seheult 1989, for energies of this kind), so a depthwise convolution, a pool
or a Mul joins an island only if leaving it would cost more. Kernels with float inputs and outputs (dynamic ones,
weight-only ones) stand on the float side of the cut, in place of the float operator where they cost less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qgraph import graph, islands
from qgraph.errors import NothingQuantizedError
from qgraph.rules import FLOAT, Prices, Refusals, Rules, Times
from qgraph.spec import Mixture, Scheme
from qgraph.targets import ABSORBED, KERNEL, REASON, SPEC, Form, Kernel, Output, Target

__all__ = ["FOLLOWS", "GROUP", "Annotate"]

FOLLOWS = "qgraph.follows"
"""Key in `Value.meta`: the value only repeats values of its group, and needs no observer of its own."""

GROUP = "qgraph.group"
"""Key in `Value.meta`: name of the value whose parameters this one shares."""


_SPARE_SHARE = 0.03
"""What the precision of the outputs may cost, as a share of the estimated time."""


class Annotate(ir.passes.InPlacePass):
    """Chooses islands and annotates values and nodes.

    Args:
        target: knows the kernels and costs.
        scheme: the number formats, or several to choose from node by node.
        keep_float: patterns of node names (shell style), or operators, of the nodes that the caller wants in float.
        refused: (node, scheme) -> reason, for nodes found not to run in their planned kernel.
        measured: (node, scheme) -> measured seconds (in float, in it), in place of the target's estimates.
        choices: pattern -> scheme or "float", see `Rules`.
        prices: (node, scheme) -> seconds that its loss of accuracy is worth, see `Rules`.
        calibrated: whether there is data to fix ranges with.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme | Mixture,
        keep_float: Iterable[str] = (),
        refused: Refusals | None = None,
        measured: Times | None = None,
        choices: Mapping[str, str] | None = None,
        prices: Prices | None = None,
        calibrated: bool = True,
    ):
        super().__init__()
        self.target = target
        self.scheme = scheme
        self.rules = Rules(
            target,
            scheme,
            {**(choices or {}), **dict.fromkeys(keep_float, FLOAT)},
            refused,
            measured,
            prices,
            calibrated,
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        main = model.graph
        kernels: dict[ir.Node, Kernel] = {}
        resting: dict[ir.Node, Kernel] = {}
        for node in main:
            found, reason = self.rules.kernels(node)
            alone = [kernel for kernel in found.values() if kernel.form is not Form.QDQ]
            best = min(alone, key=lambda kernel: kernel.integer_seconds, default=None)
            if best is not None and best.integer_seconds < best.float_seconds:
                resting[node] = best
            static = next((kernel for kernel in found.values() if kernel.form is Form.QDQ), None)
            if static is not None:
                kernels[node] = self._joined(node, static, resting.get(node))
            node.meta[REASON] = node.meta.get(REASON, reason) if not found else self._worth(static or alone[0])
        for body in main.subgraphs():
            for node in body:
                if self.rules.kernels(node)[0]:
                    node.meta[REASON] = "inside a body of If, Loop or Scan, whose values cannot be observed"
        self.rules.check_used(main.all_nodes())
        results = {node: self._result(node, kernel) for node, kernel in kernels.items()}
        chosen, spared = self._choose(main, kernels, results)
        for node in spared:
            node.meta[REASON] = "a last layer: in few bits it would cap the output's precision, and gains little"
        planned = {node: kernel for node, kernel in resting.items() if node not in spared}
        planned.update({node: kernels[node] for node in chosen})
        for node, kernel in planned.items():
            del node.meta[REASON]
            node.meta[KERNEL] = kernel
        if not planned:
            raise NothingQuantizedError(
                f"Scheme {self.scheme.name!r} finds nothing worth quantizing on target {self.target.name!r}: "
                + _summary(main)
            )
        self._annotate(main, kernels, results, chosen)
        return ir.passes.PassResult(model, False)

    def _worth(self, kernel: Kernel) -> str:
        """Why a node with an integer kernel is better off in float."""
        gain = (kernel.float_seconds - kernel.integer_seconds) * 1e6
        whole = all(spec.format.whole for spec in kernel.activations.values())
        codes = "integers" if whole else kernel.scheme
        if gain < 0 < gain + kernel.price * 1e6:
            return f"in {codes} it would lose more accuracy than the time that it saves is worth"
        if kernel.price > 0 and gain > 0:
            return f"in {codes} it would save less than its loss of accuracy and the way in and out are worth"
        if self.target.ordinal:
            return "an integer kernel exists, but gains less than the way in and out is taken to cost"
        gain += kernel.price * 1e6
        if gain < -0.05:
            return f"the integer kernel is slower by about {-gain:.1f} us"
        return f"an integer kernel exists, but gains only {max(gain, 0):.1f} us, less than the way in and out costs"

    def _choose(
        self, main: ir.Graph, kernels: Mapping[ir.Node, Kernel], results: Mapping[ir.Node, list[ir.Value]]
    ) -> tuple[set[ir.Node], set[ir.Node]]:
        """(nodes in integers, last layers kept in float because that costs little)."""
        total, chosen = islands.cheapest(main, kernels, results, self.target)
        last = {n for n in islands.last_layers(main, kernels) if kernels[n].output is Output.QUANTIZED and n in chosen}
        if last:
            rest = {node: kernel for node, kernel in kernels.items() if node not in last}
            careful, fewer = islands.cheapest(main, rest, results, self.target)
            careful += sum(kernels[node].float_seconds for node in last)
            if fewer and careful <= total * (1 + _SPARE_SHARE):
                return fewer, last
        return chosen, set()

    def _joined(self, node: ir.Node, kernel: Kernel, alone: Kernel | None) -> Kernel:
        """A static kernel as the cut sees it: outside the integers waits float, or a kernel that stands alone."""
        if kernel.output is Output.FLOAT and kernel.result is None and self._follower(node) is not None:
            # A Relu between the layer and what reads it in float would keep both in float: end in integers instead.
            result = next(iter(kernel.activations.values()))
            kernel = dataclasses.replace(kernel, output=Output.QUANTIZED, result=result)
        if alone is not None:
            kernel = dataclasses.replace(kernel, float_seconds=min(kernel.float_seconds, alone.integer_seconds))
        return kernel

    def _follower(self, node: ir.Node) -> ir.Node | None:
        """The Relu or Clip that the quantizer after `node` would absorb."""
        value = node.outputs[0]
        users = value.consumers()
        if len(users) != 1 or value.is_graph_output() or users[0].graph is not node.graph:
            return None
        follower = users[0]
        if not graph.is_standard(follower, *self.target.activations) or not _absorbable(follower):
            return None
        return None if self.rules.keeps_float(follower) else follower

    def _result(self, node: ir.Node, kernel: Kernel) -> list[ir.Value]:
        """The values that a kernel writes: after the activation that its quantizer absorbs, if there is one."""
        if kernel.output is Output.FLOAT:
            return []
        if kernel.shares or kernel.joins:
            return list(node.outputs)
        follower = self._follower(node)
        return [node.outputs[0] if follower is None else follower.outputs[0]]

    def _annotate(
        self,
        main: ir.Graph,
        kernels: Mapping[ir.Node, Kernel],
        results: Mapping[ir.Node, list[ir.Value]],
        chosen: set[ir.Node],
    ) -> None:
        groups = islands.Groups()
        for node in main:
            if node not in chosen:
                continue
            kernel = kernels[node]
            inputs = [value for i in kernel.activations if (value := node.inputs[i]) is not None]
            for position, spec in kernel.activations.items():
                value = node.inputs[position]
                if value is not None and (SPEC not in value.meta or value.meta[SPEC].range is None):
                    value.meta[SPEC] = spec
            for value in results[node]:
                value.meta[SPEC] = kernel.result
                absorbed = value.producer()
                if absorbed is not None and absorbed is not node:
                    absorbed.meta[ABSORBED] = graph.label(node)
                    groups.limit(value, graph.clip_bounds(absorbed))
                if kernel.shares:
                    groups.join(inputs[0], value)
                    value.meta[FOLLOWS] = True
        fixed = {groups.find(value) for value, _ in groups.roots() if SPEC in value.meta and value.meta[SPEC].range}
        for node in main:
            if node in chosen and kernels[node].joins:
                inputs = [value for i in kernels[node].activations if (value := node.inputs[i]) is not None]
                # A common range must not reach beyond the bounds of a Relu or Clip that a quantizer stands for.
                free = not any(
                    value.meta[SPEC].range or groups.find(value) in fixed for value in (*inputs, *results[node])
                )
                if free and len({groups.bounds(value) for value in inputs}) == 1:
                    for value in (*inputs[1:], *results[node]):
                        groups.join(inputs[0], value)
                    for value in results[node]:
                        value.meta[FOLLOWS] = True
        for value, root in groups.roots():
            value.meta[GROUP] = root.name


def _absorbable(node: ir.Node) -> bool:
    """Relu, or a Clip whose bounds are constants that hold zero."""
    if node.op_type == "Relu":
        return True
    low, high = graph.clip_bounds(node)
    return low is not None and high is not None and low <= 0.0 <= high


def _summary(main: ir.Graph) -> str:
    """The most frequent reasons, for an error."""
    counts: dict[str, int] = {}
    for node in main:
        reason = str(node.meta.get(REASON, "no reason"))
        counts[f"{node.op_type}: {reason}"] = counts.get(f"{node.op_type}: {reason}", 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return "; ".join(f"{count} x {reason}" for reason, count in ranked) or "the graph is empty"
