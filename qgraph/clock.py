"""How fast candidates are against one original, at one thread and at all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from qgraph import bench
from qgraph.compare import Runnable
from qgraph.report import Speed
from qgraph.session import Feeds, SessionOptions

__all__ = ["Clock"]


class Clock:
    """Times candidates.

    Args:
        original: what they are timed against.
        options: session options; thread counts are set here.
        feeds: one run's inputs.
        seconds: about how long a measurement takes, for each number of threads.
        progress: called with (what is done, steps done, steps in all).
    """

    def __init__(
        self,
        original: Runnable,
        options: SessionOptions,
        feeds: Feeds,
        seconds: float,
        progress: Callable[[str, int, int], None],
    ):
        self.original = original
        self.options = options
        self.feeds = feeds
        self.seconds = seconds
        self.progress = progress

    def measure(self, candidate: Runnable) -> list[Speed]:
        """At each number of threads; a ratio below one is measured again, three times as long.

        Raises:
            ExecutionError: a model cannot be run.
        """
        speeds: list[Speed] = []
        for threads in sorted({1, bench.all_threads()}):
            speed = self._time(candidate, threads, self.seconds)
            if speed.ratio < 1.0:
                # A verdict of such weight is not left to one short measurement.
                speed = self._time(candidate, threads, 3 * self.seconds)
            speeds.append(speed)
        return speeds

    def glance(self, candidate: Runnable) -> dict[str, float]:
        """One pair of blocks on all threads: enough for a point in a plot, not for a verdict."""
        speed = bench.alternate(
            self.original, candidate, self.feeds, self.options, bench.all_threads(), self.seconds / 4, least=1
        )
        return {str(speed.threads): speed.ratio}

    def _time(self, candidate: Runnable, threads: int, seconds: float) -> Speed:
        what = f"timing on {threads} thread{'s' * (threads > 1)}"
        report = functools.partial(self.progress, what)
        return bench.alternate(self.original, candidate, self.feeds, self.options, threads, seconds, report)
