"""A QuantSpec on each value that will be integer, a Kernel on each node that will compute in integers, a reason on
every other.

Which nodes are worth it is one minimum cut: each node with an integer kernel is on the float or on the integer side,
pays its time there, and every value that crosses pays for its quantization or dequantization. The cut of least total
time is found exactly (Greig, Porteous and Seheult 1989, for energies of this kind), so a depthwise convolution, a pool
or a Mul joins an island only if leaving it would cost more.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qgraph import graph, islands
from qgraph.errors import NothingQuantizedError, unknown
from qgraph.spec import Scheme
from qgraph.targets import ABSORBED, KERNEL, REASON, SPEC, Kernel, Output, Refusal, Target

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
        scheme: the number formats.
        keep_float: patterns of node names (shell style), or operators, of the nodes that the caller wants in float.
        refused: node name -> reason, for nodes found not to run in their planned kernel.
        measured: node name -> measured seconds (in float, in integers), in place of the target's estimates.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme,
        keep_float: Iterable[str] = (),
        refused: Mapping[str, str] | None = None,
        measured: Mapping[str, tuple[float, float]] | None = None,
    ):
        super().__init__()
        self.target = target
        self.scheme = scheme
        self.keep_float = tuple(keep_float)
        self.refused = dict(refused or {})
        self.measured = dict(measured or {})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        main = model.graph
        self._used: set[str] = set()
        kernels: dict[ir.Node, Kernel] = {}
        for node in main:
            found = self._find(node)
            if isinstance(found, Kernel):
                kernels[node] = found
            else:
                node.meta[REASON] = found.reason
        for body in main.subgraphs():
            for node in body:
                self._kept(node)
                if not isinstance(self.target.kernel(node, self.scheme), Refusal):
                    node.meta[REASON] = "inside a body of If, Loop or Scan, whose values cannot be observed"
        self._check_patterns(main)
        results = {node: self._result(node, kernel) for node, kernel in kernels.items()}
        chosen, spared = self._choose(main, kernels, results)
        for node, kernel in kernels.items():
            if node in spared:
                node.meta[REASON] = "a last layer: in eight bits it would cap the output's precision, and gains little"
            elif node in chosen:
                node.meta[KERNEL] = kernel
            else:
                node.meta[REASON] = _worth(kernel)
        if not chosen:
            raise NothingQuantizedError(
                f"Scheme {self.scheme.name!r} finds nothing worth quantizing on target {self.target.name!r}: "
                + _summary(main)
            )
        self._annotate(main, kernels, results, chosen)
        return ir.passes.PassResult(model, False)

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

    def _find(self, node: ir.Node) -> Kernel | Refusal:
        name = node.name or ""
        pattern = self._kept(node)
        if pattern is not None:
            return Refusal(f"left in float by the option {pattern!r}")
        if name in self.refused:
            return Refusal(self.refused[name])
        found = self.target.kernel(node, self.scheme)
        if not isinstance(found, Kernel):
            return found
        if found.output is Output.FLOAT and self._follower(node) is not None:
            # A Relu between the layer and what reads it in float would keep both in float: end in integers instead.
            found = dataclasses.replace(found, output=Output.QUANTIZED, result=self.scheme.activation)
        if name in self.measured:
            in_float, in_integers = self.measured[name]
            found = dataclasses.replace(found, float_seconds=in_float, integer_seconds=in_integers)
        return found

    def _kept(self, node: ir.Node) -> str | None:
        """The caller's pattern that `node`, or a node that was merged into it, matches."""
        origins = [(node.name or "", node.op_type), *node.meta.get(graph.ORIGINS, ())]
        for pattern in self.keep_float:
            for name, op_type in origins:
                if op_type == pattern or name == pattern or fnmatch.fnmatchcase(name, pattern):
                    self._used.add(pattern)
                    return pattern
        return None

    def _check_patterns(self, main: ir.Graph) -> None:
        nodes = [origin for node in main.all_nodes() for origin in (node, *node.meta.get(graph.ORIGINS, ()))]
        known = {name for n in nodes for name in ((n.name, n.op_type) if isinstance(n, ir.Node) else n) if name}
        for pattern in self.keep_float:
            if pattern not in self._used:
                raise unknown("node or operator to keep in float (after fusion)", pattern, known)

    def _follower(self, node: ir.Node) -> ir.Node | None:
        """The Relu or Clip that the quantizer after `node` would absorb."""
        value = node.outputs[0]
        users = value.consumers()
        if len(users) != 1 or value.is_graph_output() or users[0].graph is not node.graph:
            return None
        follower = users[0]
        if not graph.is_standard(follower, *self.target.activations) or not _absorbable(follower):
            return None
        return None if self._kept(follower) is not None else follower

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
                if value is not None:
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
        for node in main:
            if node in chosen and kernels[node].joins:
                inputs = [value for i in kernels[node].activations if (value := node.inputs[i]) is not None]
                # A common range must not reach beyond the bounds of a Relu or Clip that a quantizer stands for.
                if len({groups.bounds(value) for value in inputs}) == 1:
                    for value in (*inputs[1:], *results[node]):
                        groups.join(inputs[0], value)
                    for value in results[node]:
                        value.meta[FOLLOWS] = True
        for value, root in groups.roots():
            value.meta[GROUP] = root.name


def _worth(kernel: Kernel) -> str:
    """Why a node with an integer kernel is better off in float."""
    gain = (kernel.float_seconds - kernel.integer_seconds) * 1e6
    if gain < -0.05:
        return f"the integer kernel is slower by about {-gain:.1f} us"
    return f"an integer kernel exists, but gains only {max(gain, 0):.1f} us, less than the way in and out costs"


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
