"""What the search has tried, kept on disk on request, so that an interrupted search goes on where it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

from qgraph.errors import DataError, ModelError, first_line
from qgraph.report import Budget, Candidate
from qgraph.words import decibels

__all__ = ["NEAR", "Trial", "Trials"]

NEAR = 0.97
"""Of the time saved: what saves that much is as fast, as far as a clock can tell."""
_LARGER = 1.25
"""Times the size of the fastest, from which being as fast is no longer enough."""

_VERSION = 1
_SHOWN = 4
_SAME = 0.8


@dataclasses.dataclass
class Trial:
    """One assignment and what was measured of it.

    Attributes:
        name: short label.
        assignment: scheme of each quantized node.
        loss: under the budget's first metric.
        strain: the largest loss as a share of its limit; above 1 is outside the budget.
        sqnr: of the worst output, dB.
        saved: seconds saved on one thread, by the target's costs.
        disk: bytes.
        speed: threads -> times faster than the original.
        failed: why it could not be had, or an empty string.
        variant: how channels are scaled, see `Builder`.
        learned: whether its ranges and roundings are learned.
        stored: whether it runs in the float graph's own kernels, and only its file is smaller.
        paid: seconds that multiplications take which scale channels, by the target's costs.
        twin: of a stored one, what was measured of the float graph: threads -> times faster than the original.
    """

    name: str
    assignment: dict[str, str]
    loss: float
    strain: float
    sqnr: float
    saved: float
    disk: int = 0
    speed: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    failed: str = ""
    variant: str = "none"
    learned: bool = False
    stored: bool = False
    paid: float = 0.0
    twin: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    @property
    def within(self) -> bool:
        """Whether it is inside the budget."""
        return not self.failed and self.strain <= 1.0

    def rivals(self, fastest: Trial) -> bool:
        """Whether it is about as fast and as small, by estimate: then it is better if it loses less."""
        return 0 < NEAR * fastest.saved <= self.saved and self.disk <= _LARGER * fastest.disk

    def inferior(self, other: Trial) -> bool:
        """Whether it loses more, is larger, and no faster by estimate: then only noise could speak for it."""
        return self.strain > other.strain and self.disk > other.disk and NEAR * self.saved <= other.saved

    @property
    def _ratios(self) -> list[float]:
        """Times faster than the original, as far as the clock tells.

        What is stored runs in the kernels of the float graph: where the clock shows no more between the two than its
        own noise, on a busy machine more than a tenth, it has timed one thing twice, and the better time holds.
        """
        alike = [(ratio, self.twin.get(threads, 0.0)) for threads, ratio in self.speed.items()]
        if self.stored and all(ratio >= _SAME * twin for ratio, twin in alike):
            return [max(pair) for pair in alike]
        return list(self.speed.values())

    @property
    def slowest(self) -> float:
        """Least measured ratio; below 1 is slower than the original. 1 when nothing was timed."""
        return min(self._ratios, default=1.0)

    @property
    def rate(self) -> float:
        """One number for the speed at all thread counts: their product; slower than the original at any counts so."""
        product = math.prod(self._ratios)
        return product if self.slowest >= 1.0 else min(product, self.slowest)

    def words(self, metric: str) -> str:
        """What it loses and brings."""
        if self.failed:
            return f"{self.name}: {self.failed}"
        speed = "".join(f", {ratio:.2f}x on {threads} thread(s)" for threads, ratio in self.speed.items())
        if metric == "sqnr":
            return f"{self.name} has {decibels(self.sqnr)}{speed}"
        return f"{self.name} loses {self.loss:.3g} of {metric} ({self.sqnr:.1f} dB){speed}"

    def candidate(self, chosen: bool, rejected: bool = False) -> Candidate:
        """For the report; `rejected` by the data that the result was judged on."""
        counts: dict[str, int] = {}
        for scheme in self.assignment.values():
            counts[scheme] = counts.get(scheme, 0) + 1
        if chosen:
            verdict = "chosen"
        elif self.failed:
            verdict = self.failed
        elif rejected:
            verdict = "loses too much on the evaluation data"
        elif not self.within:
            verdict = "loses too much"
        elif self.slowest < 1.0:
            verdict = "slower"
        else:
            verdict = "within"
        measured = not self.failed
        return Candidate(
            self.name,
            dict(sorted(counts.items())),
            self.loss if measured else None,
            self.sqnr if measured else None,
            dict(self.speed),
            self.disk or None,
            verdict,
        )


class Trials:
    """All trials by the digest of their assignment, and the measured noise of single nodes.

    Args:
        path: file to keep them in; None keeps them in memory.
        key: of the model, the data and the options; a file of another key is refused.
    """

    def __init__(self, path: Path | None, key: str):
        self._path = path
        self._key = key
        self.trials: dict[str, Trial] = {}
        self.noises: dict[tuple[str, str], float] = {}
        self.resumed = 0
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            stored: Any = json.loads(path.read_text())
            key, version = stored["key"], stored["version"]
            trials = {str(name): Trial(**one) for name, one in stored["trials"].items()}
            noises = {(node, scheme): float(noise) for node, scheme, noise in stored["noises"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = first_line(error) if isinstance(error, OSError) else "--state has not written it, or not whole"
            raise DataError(f"{str(path)!r} holds no state of a search: {what}. Name another file.") from error
        if (key, version) != (self._key, _VERSION):
            raise DataError(
                f"{str(path)!r} is the state of a search on another model, other data or other options. "
                "Name another file, or remove it."
            )
        self.trials, self.noises, self.resumed = trials, noises, len(trials)

    def add(self, digest: str, trial: Trial) -> None:
        """Remember, and save."""
        self.trials[digest] = trial
        self.save()

    def within(self, unlimited: bool, quantized: bool) -> list[str]:
        """Digests of those within the budget, fastest by estimate first.

        Args:
            unlimited: whether the budget does not count.
            quantized: whether what quantizes nothing is left out.
        """
        good = [(k, t) for k, t in self.trials.items() if t.within or (unlimited and not t.failed)]
        good = [(key, trial) for key, trial in good if trial.assignment or not quantized]
        # Of what no clock tells apart, variants of one assignment among it, the more faithful one goes first.
        best = max((trial for _, trial in good), key=lambda trial: trial.saved, default=None)
        rank = {key: math.inf if best and trial.rivals(best) else round(trial.saved, 9) for key, trial in good}
        return [k for k, _ in sorted(good, key=lambda one: (-rank[one[0]], one[1].strain, -one[1].saved, one[0]))]

    def unpriced(self) -> str | None:
        """Digest of the fastest by the clock that estimates said would save nothing; None where one is within.

        Then no mixtures were tried, since by the estimates no node of it pays.
        """
        tried = [(key, trial) for key, trial in self.trials.items() if trial.assignment and not trial.failed]
        if any(trial.within for _, trial in tried):
            return None
        # What is stored only runs in the float graph's kernels, whatever a noisy clock says.
        faster = {k: t.rate for k, t in tried if t.saved <= 0.0 and t.speed and not t.stored and t.slowest > 1 / NEAR}
        return max(faster, key=lambda key: faster[key], default=None)

    def fail(self, digest: str, name: str, assignment: dict[str, str], error: Exception) -> Trial:
        """Remember that a candidate could not be had."""
        trial = Trial(self.unique(name), assignment, math.inf, math.inf, -math.inf, 0.0, failed=str(error))
        self.add(digest, trial)
        return trial

    def unique(self, wanted: str) -> str:
        """A label that no trial has: a search may come by a second time."""
        taken = {trial.name for trial in self.trials.values()}
        others = (f"{wanted} ({number})" for number in itertools.count(2))
        return next(name for name in itertools.chain([wanted], others) if name not in taken)

    def nothing(self, what: str, budget: Budget | None) -> str:
        """Why nothing is written, with the best trade-offs found."""
        trials = sorted(self.trials.values(), key=lambda trial: trial.strain)
        text, metric = (budget.text, budget.metric) if budget is not None else ("no budget", "accuracy")
        found = "; ".join(trial.words(metric) for trial in trials[:_SHOWN])
        return (
            f"{what} ({text}), so nothing was written. The best trade-offs found: {found}. "
            "Widen the budget, give the search more time (--time-limit), or use --force."
        )

    def save(self) -> None:
        """Write the file, beside and moved into place."""
        if self._path is None:
            return
        stored = {
            "version": _VERSION,
            "key": self._key,
            "trials": {name: dataclasses.asdict(trial) for name, trial in self.trials.items()},
            "noises": [[node, scheme, noise] for (node, scheme), noise in self.noises.items()],
        }
        temporary = self._path.with_name(f".{self._path.name}.part")
        try:
            temporary.write_text(json.dumps(stored, indent=1) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            raise ModelError(f"Cannot write the search's state to {str(self._path)!r}: {error.strerror}.") from error
