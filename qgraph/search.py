"""Any-time choice of a scheme for each node: the least latency within the budget, best so far always at hand.

Loss is priced in seconds: a node goes into a scheme when the time saved is worth more than its noise times a price. At
each price the cheapest assignment is found exactly (a minimum cut), so price by price the candidates lie on the convex
hull of the trade-off between latency and noise (Lagrangian relaxation; Everett, "Generalized Lagrange Multiplier
Method", 1963). Noise is estimated for all nodes and measured for the few that decide; loss and speed of a candidate are
always measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from qgraph import mixing, pricing
from qgraph.bracket import Bracket
from qgraph.builder import Builder, Built, digest
from qgraph.compare import Runnable
from qgraph.errors import AuditError, DataError, ExecutionError, NothingQuantizedError, QuantizationError
from qgraph.judge import Judge
from qgraph.noises import Noises
from qgraph.sensitivity import Estimate, total
from qgraph.spec import Mixture
from qgraph.trials import NEAR, Trial, Trials

__all__ = ["Search"]

_STEPS, _MATTER, _KEPT, _WORTH, _FINER = 12, 8, 3, 0.8, 0.7
_LEARNING, _MEASURING = 0.5, 0.4
_BOLDER = 3  # Trials with the schemes that the first candidate does without, where that one is within the budget.
_LEAST_SAVED = 2e-9  # Seconds: where the estimates say nothing, what was asked for goes before the float graph.
_HOPELESS = 4.0  # Times the allowed loss that learned roundings will not make up for: they gain up to 5 dB.
_DEAR = ("explicit", "aside")  # Ways to scale channels that take time, so that they have to bring something.
FLOAT = "fp32"
FLOAT_SCHEME = Mixture(FLOAT, (), "float")


class Search:
    """Finds candidates; which of those within the budget is fastest is for the clock to say.

    Args:
        builder: makes candidates.
        judge: measures their loss.
        estimate: noise of each node in each scheme, in the builder's present variant.
        trials: what was tried before.
        deadline: of `time.monotonic`.
        progress: called with (what is done, steps done, steps in all).
        unlimited: whether the budget does not count: then the fastest is all there is to find.
        glance: a first look at a candidate's speed, threads -> times faster; None to do without.
        bits: stored bits of a weight on average, scales included, that may not be exceeded; None for no such limit.
    """

    def __init__(
        self,
        builder: Builder,
        judge: Judge,
        estimate: Callable[[], list[Estimate]],
        trials: Trials,
        deadline: float,
        progress: Callable[[str, int, int], None],
        unlimited: bool = False,
        glance: Callable[[Runnable], dict[str, float]] | None = None,
        bits: float | None = None,
    ):
        self.builder = builder
        self.judge = judge
        self.trials = trials
        self.deadline = deadline
        self.progress = progress
        self.built: dict[str, Built] = {}
        self.noises = Noises(builder, judge, estimate, trials, progress)
        self._saved = builder.savings()
        self._tariff = pricing.Tariff(builder.assignment, self.noises.values, self._sum)
        for trial in trials.trials.values():
            # What an earlier search knew of times is not known here.
            trial.saved, trial.speed, trial.twin = self._sum(trial.assignment) - trial.paid, {}, {}
        self._longest = 0.0
        self._limit = deadline - time.monotonic()
        self._unlimited = unlimited
        self._glance = glance
        self._bits = bits
        self._forced: dict[tuple[str, str], float] | None = None

    def within(self) -> list[str]:
        """Digests of the trials within the budget, fastest by estimate first."""
        # The float graph is within any budget of accuracy, and not within a size.
        return self.trials.within(self._unlimited, quantized=self._bits is not None)

    def get(self, key: str) -> Built:
        """The files of a trial, built again if they are gone or were never here."""
        self.builder.variant = self.trials.trials[key].variant
        if key not in self.built:
            assignment = self.trials.trials[key].assignment
            if not assignment:
                self.built[key] = self.builder.build(scheme=FLOAT_SCHEME)
            else:
                prices = pricing.only(assignment, self._saved)
                self.built[key] = self.builder.build(prices, learn=self.trials.trials[key].learned)
        return self.built[key]

    def relearn(self, measured: Mapping[tuple[str, str], tuple[float, float]]) -> None:
        """Take measured times, (node, scheme) -> (in float, in it), in place of estimates; also for what was tried."""
        self._saved.update({key: before - after for key, (before, after) in measured.items()})
        for trial in self.trials.trials.values():
            trial.saved = self._sum(trial.assignment) - trial.paid

    def _sum(self, assignment: Mapping[str, str]) -> float:
        return sum(self._saved.get(pair, 0.0) for pair in assignment.items())

    def run(self) -> None:
        """Try assignments until the budget is met as closely as pays, or the time is up."""
        self._try_float()
        self._forced = None if self._bits is None else self._sized(self._bits)
        fastest = self._first()
        if fastest is None:
            return
        if self.builder.order is not None and self.builder.order.last and fastest.within:
            self._narrow(fastest, _BOLDER)
            return
        if self.builder.order is not None and self._late():
            self._try(0.0, "most bits", pricing.without(self._saved, self.builder.order.others))
            return
        first = fastest if self._bits is not None else self._multiplied(self._finer(fastest))
        best = (None if self._late() else self._learn(first)) or first
        if self._late() or self._bits is not None or first.within or best.within or self._unlimited:
            if first is not fastest and not self._late():
                self.builder.variant = fastest.variant  # The clock may tell them apart after all.
                self._learn(fastest)
            return
        # Estimates leave out what the graph makes of an error; where the budget decides, that is measured.
        half = time.monotonic() + (self.deadline - time.monotonic()) * _MEASURING
        self.noises.measure(_MATTER, lambda: self._late() or time.monotonic() > half, best.assignment)
        self._narrow(best)

    def _first(self) -> Trial | None:
        """The fastest assignment, with channels scaled in the way that loses least; None when nothing can be had."""
        best: Trial | None = None
        for variant in self.builder.variants:
            if best is not None and (self._late() or (variant in _DEAR and (best.within or self._unlimited))):
                break
            self.builder.variant = variant
            if best is not None and not self.builder.differs():
                continue
            name = "fastest" if self._forced is None else f"{self._bits:g} bits"
            order = self.builder.order
            prices = self._forced or (None if order is None else pricing.without(self._saved, order.last))
            trial = self._try(0.0, name if variant == self.builder.variants[0] else f"{name}, {variant}", prices)
            # Multiplications take time, so they have to bring something.
            worth = _WORTH if variant in _DEAR else 1.0
            if trial is None:
                # By the estimates nothing pays. They are rough where all is small, so the clock is asked.
                trial = self._try(0.0, f"all layers, {variant}", self.builder.layers())
                if trial is not None:
                    trial.saved = max(trial.saved, 0.0 if self.builder.calibrated else _LEAST_SAVED)
            if trial is not None and (best is None or trial.strain < worth * best.strain):
                best = trial
        if best is not None:
            self.builder.variant = best.variant
        return best

    def _sized(self, bits: float) -> dict[tuple[str, str], float]:
        """Prices that leave the schemes only that lose least within `bits` for each weight on average."""
        half = time.monotonic() + (self.deadline - time.monotonic()) * _MEASURING
        self.noises.measure(len(self._saved), lambda: self._late() or time.monotonic() > half)
        chosen = mixing.assign(self.builder.prepared, self.builder.rules(), self.noises.values(), bits)
        return pricing.only(chosen, self._saved)

    def _key(self, assignment: Mapping[str, str], learned: bool = False) -> str:
        plain = not assignment or not self.builder.calibrated
        return digest(assignment) + ("" if plain else f"-{self.builder.variant}") + "-learned" * learned

    def _late(self) -> bool:
        return time.monotonic() + self._longest > self.deadline

    def _try_float(self) -> Trial:
        """The graph rewritten and nothing quantized: what there is when no scheme fits."""
        key = digest({})
        if key not in self.trials.trials:
            self.progress("trying fp32", 0, 0)
            self.built[key] = self.builder.build(scheme=FLOAT_SCHEME)
            self._judge(key, FLOAT, {}, self.built[key])
        return self.trials.trials[key]

    def _finer(self, first: Trial) -> Trial:
        """The most faithful assignment that is as fast as the fastest, as far as a clock could tell."""
        if self._late() or first.saved <= 0.0 or not self.builder.calibrated or self.builder.fixed:
            return first
        unit = first.saved / max(total(self.noises.values(), first.assignment), 1e-30)
        price = pricing.highest(NEAR * first.saved, unit, self._tariff.saved_at)
        trial = None if price is None else self._try(price, "finer")
        return trial if trial is not None and trial.rivals(first) and trial.strain < _FINER * first.strain else first

    def _multiplied(self, first: Trial) -> Trial:
        """The same assignment with channels scaled in ways that take time, where a clock does not show it."""
        best = first
        for variant in _DEAR:
            if self._late() or self.builder.fixed or variant not in self.builder.variants or first.saved <= 0.0:
                break
            self.builder.variant = variant
            if variant == best.variant or not self.builder.differs():
                continue
            trial = self._try(0.0, f"{first.name}, {variant}", pricing.only(first.assignment, self._saved))
            if trial is not None and trial.rivals(first) and trial.strain < _WORTH * best.strain:
                best = trial
        self.builder.variant = best.variant
        return best

    def _learn(self, first: Trial) -> Trial | None:
        """The fastest with learned roundings, where there is time: all that is left if the fastest is within."""
        done = first.within or self._unlimited
        seconds, left = self.builder.learning_seconds(first.assignment), self.deadline - time.monotonic()
        if (self.builder.fixed if done else first.strain > _HOPELESS) or seconds <= 0:
            return None
        if seconds >= (left if done else min(_LEARNING * self._limit, left)):
            return None
        self.builder.learns = True
        key = self._key(first.assignment, learned=True)
        if key not in self.trials.trials:
            self.progress("learning roundings", 0, 0)
            try:
                prices = self._forced or pricing.only(first.assignment, self._saved)
                built = self.builder.build(prices, learn=True)
            except (QuantizationError, AuditError, ExecutionError):
                self.builder.learns = False
                return None
            self._judge(key, f"{first.name}, learned", built.assignment, built, learned=True)
            if built.assignment == first.assignment:
                self.trials.trials[key].saved = first.saved  # The same kernels, whatever the estimates say of them.
        return self.trials.trials[key]

    def _try(self, price: float, name: str, forced: dict[tuple[str, str], float] | None = None) -> Trial | None:
        """Build and judge the best assignment at a price, unless it was tried; None when it quantizes nothing."""
        prices = self._tariff.prices(price) if forced is None else forced
        try:
            assignment = self.builder.assignment(prices)
        except NothingQuantizedError:
            return None
        learned = self.builder.learns
        key = self._key(assignment, learned)
        if key in self.trials.trials:
            return self.trials.trials[key]
        start = time.monotonic()
        self.progress(f"trying {name}", len(self.trials.trials), 0)
        try:
            built = self.builder.build(prices)
        except NothingQuantizedError:
            return None
        except (AuditError, ExecutionError, QuantizationError) as error:
            return self.trials.fail(key, name, assignment, error)
        # The audit may have taken nodes out.
        if (key := self._key(built.assignment, learned)) in self.trials.trials:
            built.staged.discard()
        else:
            self._judge(key, name, built.assignment, built, learned)
        self._longest = max(self._longest, time.monotonic() - start)
        return self.trials.trials[key]

    def _judge(self, key: str, name: str, assignment: dict[str, str], built: Built, learned: bool = False) -> None:
        try:
            verdict = self.judge.judge(built.runnable, learned)
        except (DataError, ExecutionError) as error:
            if not assignment:
                raise  # Where even the float graph cannot be judged, nothing can.
            built.staged.discard()
            self.trials.fail(key, name, assignment, error)
            return
        loss, sqnr = next(iter(verdict.losses.values()), 0.0), verdict.fidelity.worst.sqnr
        paid = self.builder.paid(built)
        trial = Trial(self.trials.unique(name), assignment, loss, verdict.strain, sqnr, self._sum(assignment) - paid)
        trial.disk, trial.variant, trial.learned = built.staged.nbytes, self.builder.variant, learned
        trial.stored, trial.paid = built.stored, paid
        if self._glance is not None:
            trial.speed = self._glance(built.runnable)
            trial.twin = dict(self.trials.trials[digest({})].speed) if trial.stored else {}
        self.built[key] = built
        self.trials.add(key, trial)
        self._let_go()

    def _let_go(self) -> None:
        """Keep the files of the most promising trials only."""
        keep = {digest({}), *self.within()[:_KEPT]}
        for key in [key for key in self.built if key not in keep]:
            self.built.pop(key).staged.discard()

    def _narrow(self, first: Trial, steps: int = _STEPS) -> None:
        """Bisect the price between the last that is outside the budget and the first that is within."""
        noises = self.noises.values()
        saving = sum(max(self._saved[pair], 0.0) for pair in first.assignment.items() if pair in self._saved)
        noise, key = total(noises, first.assignment), self._key(first.assignment, self.builder.learns)
        bracket = Bracket(noise, first.strain, max(saving, 1e-9) / max(noise, 1e-30), key)
        for step in range(steps):
            price = None if self._late() else bracket.price(self._tariff.noise_at)
            if price is None:
                return
            trial = self._try(price, f"mixed {step + 1}")
            if trial is None:
                bracket.nothing(price)
            else:
                key = self._key(trial.assignment, trial.learned)
                bracket.tried(price, total(noises, trial.assignment), trial.strain, key)
