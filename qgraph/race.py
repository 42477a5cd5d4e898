"""The fastest of a search's candidates, by the clock where estimates leave it open."""

from __future__ import annotations

from qgraph.builder import digest
from qgraph.clock import Clock
from qgraph.report import Report, Speed
from qgraph.search import Search

__all__ = ["Race"]

_TIMED = 3
_UNTIMED = "The models were not timed, so nothing is promised about speed."
_NEAR = 0.9
"""Candidates that save less than this share of the best one's saving, by estimate, are not timed."""
_FASTER = 1.03
"""A candidate must be this much faster than one that was preferred by estimate: less is noise."""


class Race:
    """Times candidates, each once.

    Args:
        clock: times one against the original; without seconds nothing is timed.
        report: takes a note where nothing is.
    """

    def __init__(self, clock: Clock, report: Report):
        self._clock, self._report = clock, report
        self._speeds: dict[str, list[Speed]] = {}

    def fastest(self, search: Search, keys: list[str]) -> tuple[str, list[Speed]]:
        """(the fastest of the most promising `keys`, which come fastest first by estimate; its times)."""
        if self._clock.seconds <= 0:
            if _UNTIMED not in self._report.notes:
                self._report.notes.append(_UNTIMED)
            return keys[0], []
        best, found = keys[0], self._timed(search, keys[0])
        # The clock settles what estimates leave open. Behind a clear lead there is nothing to settle; nor between the
        # same kernels, of which the more faithful ones come first.
        trials, timed = search.trials.trials, [search.trials.trials[best].assignment]
        for key in keys[1:]:
            behind = len(timed) >= _TIMED or trials[key].saved < _NEAR * trials[best].saved
            behind = behind or trials[key].inferior(trials[best])
            if trials[key].assignment in timed or (behind and trials[best].slowest >= 1.0):
                continue
            speeds = self._timed(search, key)
            timed.append(trials[key].assignment)
            if trials[key].rate > _FASTER * trials[best].rate:
                best, found = key, speeds
        return best, found

    def _timed(self, search: Search, key: str) -> list[Speed]:
        if key not in self._speeds:
            trial = search.trials.trials[key]
            self._speeds[key] = self._clock.measure(search.get(key).runnable)
            trial.speed = {str(speed.threads): speed.ratio for speed in self._speeds[key]}
            if trial.stored and min(trial.speed.values()) < 1.0:
                # The same kernels without the codes: are they slow, or was it the clock?
                self._timed(search, digest({}))
                trial.twin = dict(search.trials.trials[digest({})].speed)
            search.trials.save()
        return self._speeds[key]
