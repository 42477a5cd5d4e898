"""What each node loses in each scheme, as the search knows it: estimated for all, measured end to end for a few."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping

from qgraph.builder import Builder
from qgraph.errors import AuditError, DataError, ExecutionError, QuantizationError, first_line
from qgraph.judge import Judge
from qgraph.report import Sensitivity
from qgraph.roles import Role, role
from qgraph.sensitivity import Estimate
from qgraph.trials import Trials

__all__ = ["Noises"]

_RUIN = 1e6


@dataclasses.dataclass
class _Known:
    """Of one variant: estimates, their noise at the node's own output, and that as well as it is known."""

    estimates: list[Estimate]
    local: dict[tuple[str, str], float]
    values: dict[tuple[str, str], float]


def _by_role(local: Mapping[tuple[str, str], float], roles: Mapping[str, Role]) -> list[tuple[tuple[str, str], float]]:
    """The noisiest of each role, roles with the most noise first, and then all others, the noisiest first."""
    ranked = sorted(local.items(), key=lambda item: -item[1])
    first: dict[Role | None, tuple[tuple[str, str], float]] = {}
    most: dict[str, float] = {}
    for item in ranked:
        (node, _), noise = item
        first.setdefault(roles.get(node), item)
        most.setdefault(node, noise)
    sums: dict[Role | None, float] = {}
    for node, noise in most.items():
        sums[roles.get(node)] = sums.get(roles.get(node), 0.0) + noise
    leading = [first[one] for one in sorted(first, key=lambda one: -sums[one])]
    taken = {key for key, _ in leading}
    return [*leading, *(item for item in ranked if item[0] not in taken)]


class Noises:
    """Noise by (node, scheme), in the builder's present variant, and with learned roundings where it learns them.

    Args:
        builder: makes candidates with one node quantized.
        judge: measures their loss.
        estimate: noise of each node in each scheme at its own output.
        trials: keeps what was measured.
        progress: called with (what is done, steps done, steps in all).
    """

    def __init__(
        self,
        builder: Builder,
        judge: Judge,
        estimate: Callable[[], list[Estimate]],
        trials: Trials,
        progress: Callable[[str, int, int], None],
    ):
        self.builder = builder
        self.judge = judge
        self.trials = trials
        self.progress = progress
        self._estimate = estimate
        self._known: dict[tuple[str, bool], _Known] = {}
        self.failed: dict[tuple[str, str], str] = {}
        """What could not be measured, by the key of its measurement, and why."""

    def values(self) -> dict[tuple[str, str], float]:
        """As well as it is known: shares of power, comparable with one another."""
        return self._now().values

    def _now(self) -> _Known:
        """What is known of the builder's present variant: scaled channels leave other errors, at other nodes."""
        state = self.builder.variant, self.builder.learns
        if state not in self._known:
            self.progress("estimating", 0, 0)
            found = self._estimate()
            local = {(e.node, e.scheme): e.noise for e in found}
            self._known[state] = _Known(found, local, dict(local))
        return self._known[state]

    def _key(self, node: str, scheme: str) -> tuple[str, str]:
        """Under which a measurement is kept: that of the first variant under the scheme's plain name."""
        variant, learns = self.builder.variant, self.builder.learns
        plain = variant == self.builder.variants[0]
        return node, scheme + ("" if plain else f", {variant}") + (", learned" if learns else "")

    def told(self) -> list[Sensitivity]:
        """For the report: all that lose anything, measured where they were."""
        known, exact = self._now(), self.trials.noises
        found: list[Sensitivity] = []
        for one in known.estimates:
            key = self._key(one.node, one.scheme)
            if one.noise > 0:
                noise = exact.get(key, known.values[one.node, one.scheme])
                saved = None if self.builder.context.target.ordinal else one.saved
                failed = self.failed.get(key, "")
                found.append(Sensitivity(one.node, one.op_type, one.scheme, noise, key in exact, saved, failed))
        return found

    def measure(self, count: int, late: Callable[[], bool], among: Mapping[str, str] | None = None) -> bool:
        """Measure `count` nodes, and bring the estimates of the others to the scale of those of their role.

        The noisiest of each role comes first: how much of an error is left at the end depends most on what follows.

        Args:
            count: nodes.
            late: whether there is no time for another one.
            among: an assignment whose pairs alone are measured; None for all there are.

        Returns:
            Whether anything is known better now.
        """
        known = self._now()
        gains: dict[str, float] = {}
        nodes = {node for node, _ in known.local}
        roles = {name: role(node) for node in self.builder.prepared.graph if (name := node.name or "") in nodes}
        local = {pair: n for pair, n in known.local.items() if among is None or among.get(pair[0]) == pair[1]}
        for (node, scheme), noise in _by_role(local, roles):
            if late() or len(gains) >= count:
                break
            if noise <= 0 or node in gains:
                continue
            found = self.measured(node, scheme)
            if found is not None:
                gains[node] = found / noise
        if gains:
            usual = statistics.median(gains.values())
            alike: dict[Role | None, list[float]] = {}
            for node, gain in gains.items():
                alike.setdefault(roles.get(node), []).append(gain)
            scales = {one: statistics.median(found) for one, found in alike.items()}
            known.values = {
                (n, s): noise * gains.get(n, scales.get(roles.get(n), usual)) for (n, s), noise in known.local.items()
            }
        return bool(gains)

    def measured(self, node: str, scheme: str) -> float | None:
        """Share of the worst output's power that `node` alone in `scheme` turns into noise, over the judge's data."""
        key = self._key(node, scheme)
        if key not in self.trials.noises:
            self.progress("measuring sensitivity", len(self.trials.noises), 0)
            # Paid for, so that it is taken even if it saves nothing.
            prices = {pair: -1.0 if pair == (node, scheme) else math.inf for pair in self.builder.savings()}
            try:
                built = self.builder.build(prices)
            except (QuantizationError, AuditError, ExecutionError) as error:
                self.failed[key] = first_line(error)
                return None
            try:
                sqnr = self.judge.judge(built.runnable).fidelity.worst.sqnr
            except (DataError, ExecutionError):
                sqnr = math.nan
            finally:
                built.staged.discard()
            # What ruins the output is worse than any noise, but still a number that can be reckoned with.
            noise = 10 ** (-sqnr / 10) if math.isfinite(sqnr) else 0.0 if sqnr == math.inf else _RUIN
            self.trials.noises[key] = noise
            self.trials.save()
        return self.trials.noises[key]
