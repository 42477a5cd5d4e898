"""What each node loses in each scheme, as the search knows it: estimated for all, measured end to end for a few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from qgraph.builder import Builder
from qgraph.errors import AuditError, DataError, ExecutionError, QuantizationError, first_line
from qgraph.judge import Judge
from qgraph.report import Sensitivity
from qgraph.sensitivity import Estimate
from qgraph.trials import Trials

__all__ = ["Noises"]

_RUIN = 1e6


class Noises:
    """Noise by (node, scheme), in the builder's present variant when it is first asked for.

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
        self._estimates: list[Estimate] = []
        self._local: dict[tuple[str, str], float] | None = None
        self._values: dict[tuple[str, str], float] = {}
        self.failed: dict[tuple[str, str], str] = {}
        """What could not be measured, and why."""

    def values(self) -> dict[tuple[str, str], float]:
        """As well as it is known: shares of power, comparable with one another."""
        if self._local is None:
            self.progress("estimating", 0, 0)
            self._estimates = self._estimate()
            self._local = {(e.node, e.scheme): e.noise for e in self._estimates}
            self._values = dict(self._local)
        return self._values

    def told(self) -> list[Sensitivity]:
        """For the report: all that lose anything, measured where they were."""
        values, exact = self.values(), self.trials.noises
        found: list[Sensitivity] = []
        for one in self._estimates:
            key = one.node, one.scheme
            if one.noise > 0:
                noise = exact.get(key, values[key])
                saved = None if self.builder.context.target.ordinal else one.saved
                failed = self.failed.get(key, "")
                found.append(Sensitivity(one.node, one.op_type, one.scheme, noise, key in exact, saved, failed))
        return found

    def measure(self, count: int, late: Callable[[], bool]) -> bool:
        """Measure the `count` noisiest nodes, and bring the estimates of the others to the same scale.

        Args:
            count: nodes.
            late: whether there is no time for another one.

        Returns:
            Whether anything is known better now.
        """
        self.values()
        assert self._local is not None
        gains: dict[str, float] = {}
        for (node, scheme), noise in sorted(self._local.items(), key=lambda item: -item[1]):
            if late() or len(gains) >= count:
                break
            if noise <= 0 or node in gains:
                continue
            found = self.measured(node, scheme)
            if found is not None:
                gains[node] = found / noise
        if gains:
            usual = statistics.median(gains.values())
            self._values = {(n, s): noise * gains.get(n, usual) for (n, s), noise in self._local.items()}
        return bool(gains)

    def measured(self, node: str, scheme: str) -> float | None:
        """Share of the worst output's power that `node` alone in `scheme` turns into noise, over the judge's data."""
        if (node, scheme) not in self.trials.noises:
            self.progress("measuring sensitivity", len(self.trials.noises), 0)
            # Paid for, so that it is taken even if it saves nothing.
            prices = {key: -1.0 if key == (node, scheme) else math.inf for key in self.builder.savings()}
            try:
                built = self.builder.build(prices)
            except (QuantizationError, AuditError, ExecutionError) as error:
                self.failed[node, scheme] = first_line(error)
                return None
            try:
                sqnr = self.judge.judge(built.runnable).fidelity.worst.sqnr
            except (DataError, ExecutionError):
                sqnr = math.nan
            finally:
                built.staged.discard()
            # What ruins the output is worse than any noise, but still a number that can be reckoned with.
            noise = 10 ** (-sqnr / 10) if math.isfinite(sqnr) else 0.0 if sqnr == math.inf else _RUIN
            self.trials.noises[node, scheme] = noise
            self.trials.save()
        return self.trials.noises[node, scheme]
