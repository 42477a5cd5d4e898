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
from collections.abc import Mapping

import networkx as nx
import onnx_ir as ir

from qgraph import graph
from qgraph.errors import NothingQuantizedError
from qgraph.spec import Scheme
from qgraph.targets import ABSORBED, KERNEL, REASON, SPEC, Kernel, Output, Refusal, Target

__all__ = ["FOLLOWS", "GROUP", "Annotate", "clip_bounds"]

FOLLOWS = "qgraph.follows"
"""Key in `Value.meta`: the value only repeats values of its group, and needs no observer of its own."""

GROUP = "qgraph.group"
"""Key in `Value.meta`: name of the value whose parameters this one shares."""

_INTEGER, _FLOAT = "integer", "float"


class Annotate(ir.passes.InPlacePass):
    """Chooses islands and annotates values and nodes.

    Args:
        target: knows the kernels and costs.
        scheme: the number formats.
        keep_float: pattern of node names (shell style), or operator -> reason, for nodes to be left in float.
        measured: node name -> measured seconds (in float, in integers), in place of the target's estimates.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme,
        keep_float: Mapping[str, str] | None = None,
        measured: Mapping[str, tuple[float, float]] | None = None,
    ):
        super().__init__()
        self.target = target
        self.scheme = scheme
        self.keep_float = dict(keep_float or {})
        self.measured = dict(measured or {})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        main = model.graph
        kernels: dict[ir.Node, Kernel] = {}
        for node in main:
            found = self._find(node)
            if isinstance(found, Kernel):
                kernels[node] = found
            else:
                node.meta[REASON] = found.reason
        for body in main.subgraphs():
            for node in body:
                if not isinstance(self.target.kernel(node, self.scheme), Refusal):
                    node.meta[REASON] = "inside a body of If, Loop or Scan, whose values cannot be observed"
        results = {node: self._result(node, kernel) for node, kernel in kernels.items()}
        chosen = _cut(main, kernels, results, self.target)
        for node, kernel in kernels.items():
            if node in chosen:
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

    def _find(self, node: ir.Node) -> Kernel | Refusal:
        name = node.name or ""
        for pattern, reason in self.keep_float.items():
            if node.op_type == pattern or name == pattern or fnmatch.fnmatchcase(name, pattern):
                return Refusal(reason)
        found = self.target.kernel(node, self.scheme)
        if isinstance(found, Kernel) and name in self.measured:
            in_float, in_integers = self.measured[name]
            return dataclasses.replace(found, float_seconds=in_float, integer_seconds=in_integers)
        return found

    def _result(self, node: ir.Node, kernel: Kernel) -> list[ir.Value]:
        """The values that a kernel writes: after the activation that its quantizer absorbs, if there is one."""
        if kernel.output is Output.FLOAT:
            return []
        if kernel.shares:
            return list(node.outputs)
        value = node.outputs[0]
        users = value.consumers()
        if len(users) == 1 and not value.is_graph_output() and users[0].graph is node.graph:
            follower = users[0]
            if graph.is_standard(follower, *self.target.activations) and _absorbable(follower):
                return [follower.outputs[0]]
        return [value]

    def _annotate(
        self,
        main: ir.Graph,
        kernels: Mapping[ir.Node, Kernel],
        results: Mapping[ir.Node, list[ir.Value]],
        chosen: set[ir.Node],
    ) -> None:
        groups = _Groups()
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
                    groups.limit(value, clip_bounds(absorbed))
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
    low, high = clip_bounds(node)
    return low is not None and high is not None and low <= 0.0 <= high


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Relu or Clip; infinite where absent, None where computed at run time."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds: list[float | None] = []
    for position, missing in ((1, float("-inf")), (2, float("inf"))):
        value = node.inputs[position] if len(node.inputs) > position else None
        bounds.append(missing if value is None else graph.constant_scalar(value))
    return bounds[0], bounds[1]


def _cut(
    main: ir.Graph,
    kernels: Mapping[ir.Node, Kernel],
    results: Mapping[ir.Node, list[ir.Value]],
    target: Target,
) -> set[ir.Node]:
    """The nodes on the integer side of the cheapest cut."""
    network: nx.DiGraph[object] = nx.DiGraph()
    network.add_nodes_from((_INTEGER, _FLOAT))

    def pay(start: object, end: object, seconds: float) -> None:
        # Integer picoseconds: floating-point capacities can make a flow algorithm stall.
        amount = round(seconds * 1e12)
        if network.has_edge(start, end):
            network[start][end]["capacity"] += amount
        else:
            network.add_edge(start, end, capacity=amount)

    makers: dict[ir.Value, ir.Node] = {}
    for node, kernel in kernels.items():
        pay(_INTEGER, node, kernel.float_seconds)
        pay(node, _FLOAT, kernel.integer_seconds)
        for value in results[node]:
            makers[value] = node
    users: dict[ir.Value, list[ir.Node]] = {}
    for node, kernel in kernels.items():
        for position in kernel.activations:
            source = node.inputs[position]
            if source is not None:
                users.setdefault(source, []).append(node)
    for value, readers in users.items():
        # Quantized once for all its integer readers, unless its maker writes integers.
        crossing = ("quantize", value)
        for reader in readers:
            network.add_edge(reader, crossing)
        pay(crossing, makers.get(value, _FLOAT), target.quantize_cost(value))
    for value, maker in makers.items():
        readers = users.get(value, [])
        crossing = ("dequantize", value)
        pay(maker, crossing, target.dequantize_cost(value))
        ours = set(readers)
        if value.is_graph_output() or any(node not in ours for node in value.consumers()) or not readers:
            network.add_edge(crossing, _FLOAT)
        else:
            for reader in readers:
                network.add_edge(crossing, reader)
    if not kernels:
        return set()
    _, (integer, _) = nx.minimum_cut(network, _INTEGER, _FLOAT, flow_func=nx.algorithms.flow.preflow_push)
    return {node for node in kernels if node in integer}


def _summary(main: ir.Graph) -> str:
    """The most frequent reasons, for an error."""
    counts: dict[str, int] = {}
    for node in main:
        reason = str(node.meta.get(REASON, "no reason"))
        counts[f"{node.op_type}: {reason}"] = counts.get(f"{node.op_type}: {reason}", 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return "; ".join(f"{count} x {reason}" for reason, count in ranked) or "the graph is empty"


class _Groups:
    """Union-find over values that share their parameters."""

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}
        self._bounds: dict[ir.Value, tuple[float | None, float | None]] = {}

    def find(self, value: ir.Value) -> ir.Value:
        """The group's representative."""
        self._parent.setdefault(value, value)
        while self._parent[value] is not value:
            self._parent[value] = self._parent[self._parent[value]]
            value = self._parent[value]
        return value

    def join(self, first: ir.Value, second: ir.Value) -> None:
        """Put both into one group; the first one's representative stays."""
        self._parent[self.find(second)] = self.find(first)

    def limit(self, value: ir.Value, bounds: tuple[float | None, float | None]) -> None:
        """The group of `value` must stay within these bounds."""
        self._bounds[self.find(value)] = bounds

    def bounds(self, value: ir.Value) -> tuple[float | None, float | None] | None:
        """What `limit` said about the group, None for no limit."""
        return self._bounds.get(self.find(value))

    def roots(self) -> list[tuple[ir.Value, ir.Value]]:
        """(member, representative) of every group."""
        return [(value, self.find(value)) for value in list(self._parent)]
