"""Which nodes are worth an integer kernel: one minimum cut; and which values share parameters: union-find.

Every node with an integer kernel stands on the float or on the integer side and pays its time there; every value that
crosses pays for its quantization or dequantization. The cheapest assignment is a minimum s-t cut (Greig, Porteous and
Seheult, "Exact Maximum A Posteriori Estimation for Binary Images", 1989).
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
import onnx_ir as ir

from qgraph.targets import Kernel, Target

__all__ = ["Groups", "cheapest", "last_layers"]

_INTEGER, _FLOAT = "integer", "float"


def cheapest(
    main: ir.Graph,
    kernels: Mapping[ir.Node, Kernel],
    results: Mapping[ir.Node, list[ir.Value]],
    target: Target,
) -> tuple[float, set[ir.Node]]:
    """The least total time in seconds, and the nodes that are in integers then."""
    network: nx.DiGraph[object] = nx.DiGraph()
    network.add_nodes_from((_INTEGER, _FLOAT))

    def pay(start: object, end: object, seconds: float) -> None:
        # Integer picoseconds: floating-point capacities can make a flow algorithm stall.
        amount = round(seconds * 1e12)
        if network.has_edge(start, end):
            network[start][end]["capacity"] += amount
        else:
            network.add_edge(start, end, capacity=amount)

    below = 0.0
    makers: dict[ir.Value, ir.Node] = {}
    for node, kernel in kernels.items():
        # Less than nothing, where a kernel is wanted at any cost, is no capacity: the rest counts from there.
        base = min(kernel.float_seconds, kernel.integer_seconds, 0.0)
        below += base
        pay(_INTEGER, node, kernel.float_seconds - base)
        pay(node, _FLOAT, kernel.integer_seconds - base)
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
        return 0.0, set()
    total, (integer, _) = nx.minimum_cut(network, _INTEGER, _FLOAT, flow_func=nx.algorithms.flow.preflow_push)
    return total * 1e-12 + below, {node for node in kernels if node in integer}


def last_layers(main: ir.Graph, kernels: Mapping[ir.Node, Kernel]) -> set[ir.Node]:
    """The layers with weights whose results reach an output of the model without meeting another such layer."""
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    waiting = [value.producer() for value in main.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kernel = kernels.get(node)
        if kernel is not None and kernel.weight is not None:
            found.add(node)
        else:
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return found


class Groups:
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
