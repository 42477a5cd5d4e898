"""Which kernels a node may run in: what the target has, less what the caller, the runtime or a price forbids."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qgraph import graph
from qgraph.errors import OptionError, unknown
from qgraph.spec import Mixture, Scheme
from qgraph.targets import Kernel, Refusal, Target

__all__ = ["FLOAT", "Prices", "Refusals", "Rules", "Times"]

_FORCED = -1.0
FLOAT = "float"
"""What `choices` call no scheme at all."""

Refusals = Mapping[tuple[str, str], str]
"""(node, scheme) -> why the node is not to be in it."""
Times = Mapping[tuple[str, str], tuple[float, float]]
"""(node, scheme) -> measured seconds in float and in the scheme."""
Prices = Mapping[tuple[str, str], float]
"""(node, scheme) -> seconds that its loss of accuracy is worth; infinite to forbid it."""


class Rules:
    """All that decides which kernels come into question for a node.

    Args:
        target: knows the kernels.
        scheme: the schemes in question.
        choices: pattern -> scheme, or "float". A pattern is a node's name (shell style) or an operator; names go before
            operators, and later patterns before earlier ones.
        refused: what was found not to work.
        measured: times in place of the target's estimates.
        prices: of lost accuracy.
        calibrated: whether there is data to fix ranges with.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme | Mixture,
        choices: Mapping[str, str] | None = None,
        refused: Refusals | None = None,
        measured: Times | None = None,
        prices: Prices | None = None,
        calibrated: bool = True,
    ):
        self.target = target
        self.parts = scheme.parts
        self.choices = dict(choices or {})
        self.refused = dict(refused or {})
        self.measured = dict(measured or {})
        self.prices = dict(prices or {})
        self.calibrated = calibrated
        self._used: set[str] = set()
        self._followed: set[str] = set()
        for pattern, name in self.choices.items():
            if name != FLOAT and name not in target.schemes:
                raise unknown(f"scheme for {pattern!r}:", name, [*target.schemes, FLOAT])

    def kernels(self, node: ir.Node) -> tuple[dict[str, Kernel], str]:
        """(scheme -> kernel with its seconds, price included; why there is none of the first scheme)."""
        pattern = self.chosen(node)
        parts = self.parts
        if pattern is not None:
            if self.choices[pattern] == FLOAT:
                return {}, f"left in float by the option {pattern!r}"
            parts = self.target.scheme(self.choices[pattern]).parts
            if not parts:
                return {}, f"left in float by the option {pattern!r}={self.choices[pattern]!r}"
            if not self.calibrated:
                parts = tuple(part for part in parts if not part.static)
                if not parts:
                    return {}, f"{self.choices[pattern]!r} needs calibration data"
        found: dict[str, Kernel] = {}
        reasons: list[str] = []
        for part in parts:
            kernel = self._kernel(node, part, forced=pattern is not None)
            if isinstance(kernel, Refusal):
                reasons.append(kernel.reason)
            else:
                found[part.name] = kernel
        if pattern is not None and found:
            self._followed.add(pattern)
        if pattern is not None and not found and node.name == pattern:
            told = [self.target.kernel(node, part) for part in parts]
            if all(isinstance(one, Refusal) for one in told):
                raise OptionError(f"Node {pattern!r} cannot be {self.choices[pattern]!r}: {reasons[0]}.")
        nothing = (
            "no scheme was asked for" if self.calibrated else "no scheme is left without calibration data (--data)"
        )
        return found, reasons[0] if reasons else nothing

    def _kernel(self, node: ir.Node, part: Scheme, forced: bool = False) -> Kernel | Refusal:
        key = (node.name or "", part.name)
        if key in self.refused:
            return Refusal(self.refused[key])
        kernel = self.target.kernel(node, part)
        if isinstance(kernel, Refusal):
            return kernel
        if key in self.measured:
            in_float, in_integers = self.measured[key]
            kernel = dataclasses.replace(kernel, float_seconds=in_float, integer_seconds=in_integers)
        price = self.prices.get(key, 0.0)
        if math.isinf(price):
            return Refusal("the search left it in float: it would save too little for the accuracy that it loses")
        if forced:
            # What the caller chose is taken, whether it pays or not.
            price = _FORCED
        if price:
            kernel = dataclasses.replace(kernel, integer_seconds=kernel.integer_seconds + price, price=price)
        return kernel

    def chosen(self, node: ir.Node) -> str | None:
        """The caller's pattern that decides about `node`, by it or a node that was merged into it."""
        origins = [(node.name or "", node.op_type), *node.meta.get(graph.ORIGINS, ())]
        by_operator: str | None = None
        by_name: str | None = None
        for pattern in self.choices:
            for name, op_type in origins:
                if name == pattern or fnmatch.fnmatchcase(name, pattern):
                    by_name = pattern
                elif op_type == pattern:
                    by_operator = pattern
                else:
                    continue
                self._used.add(pattern)
        return by_name or by_operator

    def keeps_float(self, node: ir.Node) -> bool:
        """Whether the caller wants `node` in float."""
        pattern = self.chosen(node)
        return pattern is not None and self.choices[pattern] == FLOAT

    @property
    def unfollowed(self) -> list[str]:
        """Patterns for which no node that was looked at has a kernel in the scheme that was chosen."""
        return [p for p, scheme in self.choices.items() if scheme != FLOAT and p not in self._followed]

    def check_used(self, nodes: Iterable[ir.Node]) -> None:
        """Every pattern has matched something.

        Raises:
            OptionError: one has not; names the nearest of `nodes`.
        """
        origins = [origin for node in nodes for origin in (node, *node.meta.get(graph.ORIGINS, ()))]
        known = {name for n in origins for name in ((n.name, n.op_type) if isinstance(n, ir.Node) else n) if name}
        for pattern in self.choices:
            if pattern not in self._used:
                raise unknown("node or operator to choose for (after fusion)", pattern, known)
