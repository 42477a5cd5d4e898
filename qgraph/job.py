"""One run of the main job: prepare, search within the budget, time, write nothing that does not hold."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from qgraph import caches, checks, details, elsewhere, language, modelio, originals, outcome, proof, registry
from qgraph.builder import Builder, Built
from qgraph.clock import Clock
from qgraph.data import Dataset, DataSource
from qgraph.division import Parts, divide
from qgraph.errors import ExecutionError, OptionError
from qgraph.few_bits import FewBits, notes_of
from qgraph.fingerprint import fingerprint
from qgraph.judge import Judge, Verdict
from qgraph.kept import keeper
from qgraph.options import UNFOLLOWED, Options, spared
from qgraph.pipeline import Context
from qgraph.qconfigs import QCONFIG_NOTE, QCONFIG_USELESS, with_qconfig
from qgraph.race import Race
from qgraph.report import Budget, Report, Sensitivity
from qgraph.rules import FLOAT
from qgraph.search import FLOAT_SCHEME, Search
from qgraph.sensitivity import Estimate, estimates
from qgraph.session import HOST, Feeds, max_ir_version, runtime_version
from qgraph.targets import AUTO, WEIGHTS, Target
from qgraph.trials import Trials
from qgraph.unwritten import only_float, over_budget, slower

__all__ = ["AUTO", "Job", "Progress"]

Progress = Callable[[str, int, int], None]


class Job:
    """One call of `optimize`."""

    def __init__(
        self,
        source: str | Path | ir.Model,
        output: Path | None,
        options: Options,
        workspace: modelio.Workspace,
        progress: Progress,
    ):
        self.options, self.workspace, self.progress, self.output = options, workspace, progress, output
        self.target: Target = registry.target(options.target)
        if options.block_size is not None:
            self.target = self.target.in_blocks(options.block_size)
        notes = [*elsewhere.notes(self.target), *self.target.notes]
        if options.qconfig is not None:
            self.target = with_qconfig(self.target, options.qconfig)
            notes.append(QCONFIG_NOTE.format(options.qconfig))
        if not self.target.native:
            self.options = options = dataclasses.replace(options, bench_seconds=0.0)
        self.scheme = self.target.scheme(WEIGHTS if options.bits_per_weight is not None else options.scheme)
        named = [self.scheme, *(self.target.scheme(name) for name in options.choices.values() if name != FLOAT)]
        if options.block_size is not None and all(part.block is None for one in named for part in one.parts):
            raise OptionError(f"Scheme {self.scheme.name!r} has no weights in blocks: leave out the block size.")
        self._named = self.scheme.name != AUTO and bool(self.scheme.parts)
        self._rejected: set[str] = set()
        self._profiled, self._steps, self._hint = False, False, ""
        self.feeds: Feeds = {}
        progress("reading", 0, 0)
        self.float_model = modelio.read(source) if isinstance(source, (str, Path)) else modelio.copied(source)
        self.limits = options.limits(language.is_language_model(self.float_model))
        self.key = fingerprint(self.float_model)
        self.external = modelio.has_external(self.float_model)
        self.avoid = spared((output, options.state, options.save_ranges), modelio.external_files(self.float_model))
        self.folder = workspace.spill(self.float_model)
        self.check, note = checks.chosen(self.float_model, options.check, options.why_whole)
        self.original, told = originals.runnable(self.float_model, self.folder, self.target, self.scheme)
        self._readable = not told and self.float_model.ir_version <= max_ir_version()
        self.path = Path(source) if isinstance(source, (str, Path)) else None
        # The original as the runtime can load it: its IR version may be too new.
        self.float_model.ir_version = min(self.float_model.ir_version, max_ir_version())
        self.report = Report(
            source=str(source) if isinstance(source, (str, Path)) else f"graph {source.graph.name!r}",
            target=self.target.name,
            scheme=self.scheme.name,
            runtime=f"onnxruntime {runtime_version()}",
            output=str(output) if output is not None else None,
            budget=Budget(
                self.limits[0].metric.name, self.limits[0].limit, ", ".join(limit.text for limit in self.limits)
            ),
            check=self.check,
            notes=[*notes, *told, *([note] if note is not None else [])],
        )

    def run(self, source: DataSource | None, evaluation: DataSource | None) -> modelio.Staged:
        """All of it, but for moving the result into place."""
        start = time.perf_counter()
        parts = self.divide(source, evaluation)
        calibrate, held, tested = parts.calibrate, parts.search, parts.final
        self._look(held)
        if self.options.bench_seconds > 0 and self.options.target != "cpu" and self.target.provider == HOST:
            here = registry.target("cpu").name
            if here != self.target.name:
                self.report.notes.append(f"Times are this machine's, which is {here}, not those of {self.target.name}.")
        self.progress("comparing", 0, 0)
        judge = self._judge(held, "search", parts.apart, calibrate if parts.apart else None)
        final = self._judge(tested, "final", parts.fresh) if tested is not None else judge
        if self.report.budget is not None:
            text = f"{self.report.budget.text} ({judge.told})"
            self.report.budget = dataclasses.replace(self.report.budget, text=text)
        builder = self.builder(calibrate)
        built, verdict = self._chosen(builder, judge, final)
        self.progress("proving", 0, 0)
        where = self.target, built.staged.path, self.original, final.data, self.report.notes.append
        self.report.placement = elsewhere.proved(*where, accept=self.options.force)
        self.report.fidelity = verdict.fidelity
        self.report.nodes, self.report.steps = built.nodes, built.steps
        self.report.notes += outcome.notes(built.model, built.steps)
        if not built.assignment:
            self.report.nodes = builder.explained(built)
            if self._named:
                self.report.notes.append(outcome.NOTHING.format(self.scheme.name))
        self.report.calibration_samples = calibrate.count() if calibrate is not None else 0
        try:
            self._details(built, builder, final)
        except (ExecutionError, KeyboardInterrupt) as error:
            # The result stands, with less to show.
            self.report.notes.append(f"Some details could not be measured: {error or 'interrupted'}")
        self.report.seconds = time.perf_counter() - start
        return built.staged

    def rank(self, source: DataSource, exact: int) -> list[Sensitivity]:
        """What each node loses alone; `exact` of them measured, the worst by estimate."""
        parts = self.divide(source, None)
        self._look(parts.search)
        judge = self._judge(parts.search, "search", parts.apart)
        search = self._search(self.builder(parts.calibrate), judge)
        search.noises.measure(exact, lambda: False)
        self._tell(search, None)
        return self.report.sensitivity

    def _details(self, built: Built, builder: Builder, final: Judge) -> None:
        timed = self.options.bench_seconds > 0
        details.weigh(self.report, self.path, built.staged.path, None)
        details.fill(self.report, self.original, built, builder, final.data, self.feeds, timed)
        if timed and self._readable:
            self.progress("measuring memory", 0, 0)
            details.weigh(self.report, self.path, built.staged.path, (self.feeds, self.target))

    # -- stages -----------------------------------------------------------------------------------------------------

    def _look(self, held: Dataset) -> None:
        """Take one sample to time with."""
        self.feeds = feeds = held.typical()
        self._steps = held.decoder is not None and held.decoder.is_step(feeds)
        self.clock = Clock(self.original, self.target.options(), feeds, self.options.bench_seconds, self.progress)

    def divide(self, source: DataSource | None, evaluation: DataSource | None) -> Parts:
        """Calibration data, and data to judge by."""
        self.progress("reading data", 0, 0)
        if source is None and (self.options.ranges is not None or self.options.save_ranges is not None):
            raise OptionError("Ranges are those of calibration data: give it (--data), or leave out the ranges.")
        run = functools.partial(self.original.session, self.target.options())
        parts = divide(self.float_model, source, evaluation, self.limits, self.options.qconfig is not None, run)
        self.report.notes += parts.told
        self._hint = "" if source is not None else " Losses are of random inputs: typical ones (--data) bring more."
        return parts

    def _judge(self, held: Dataset, name: str, apart: bool, seen: Dataset | None = None) -> Judge:
        folder = self.workspace.folder / f"judge-{name}"
        return Judge(self.original, held, self.limits, self.target.options(), folder, apart, seen)

    def builder(self, calibrate: Dataset | None) -> Builder:
        """What makes candidates."""
        if self.options.observer is not None and (calibrate is None or not self.scheme.static):
            raise OptionError(f"Scheme {self.scheme.name!r} calibrates no ranges here: leave out the observer.")
        if self.options.qconfig is not None and (calibrate is None or not self.scheme.static):
            raise OptionError(QCONFIG_USELESS.format(self.scheme.name))
        if self.options.kv_cache is not None:
            if calibrate is None:
                raise OptionError("The scales of a cache in integers are those of calibration data: give it (--data).")
            self.report.notes.append(caches.NOTES[self.options.kv_cache])
        ranges, saved = self.options.ranges, self.options.save_ranges
        context = Context(
            self.target,
            self.scheme,
            calibrate,
            self.folder,
            observer=self.options.observer,
            budget=self.options.memory,
            ranges=(Path(ranges), self.key) if ranges is not None else None,
            save_ranges=(Path(saved), self.key) if saved is not None else None,
            keep_float=self.options.keep_float,
            choices=self.options.choices,
            pack=self.options.pack,
            deadline=time.monotonic() + self.options.time_limit if self.check == checks.WHOLE else None,
            cache=caches.FORMATS.get(self.options.kv_cache or ""),
        )
        made = Builder(self.float_model, context, self.workspace, self.output, self.external, self.avoid, self.progress)
        made.audit = functools.partial(proof.audited, feeds=self.feeds)
        made.few = FewBits(self._steps) if self.check == checks.WHOLE and self.options.open else None
        made.keep = keeper(self.options.state, self.key, calibrate, self.options.memory, self.report.notes.append)
        return made

    def _chosen(self, builder: Builder, judge: Judge, final: Judge) -> tuple[Built, Verdict]:
        """The fastest candidate within the budget, by the final judge as well.

        Raises:
            AccuracyError: none is within the budget.
            NothingQuantizedError: only the float graph is, and a scheme was named.
            SlowerError: none is as fast as the original.
        """
        search = self._search(builder, judge)
        judge.rewritten = final.rewritten = functools.partial(builder.rewritten, FLOAT_SCHEME)
        self._run(search)
        self._learned(search, builder, search.trials.unpriced())
        race = Race(self.clock, self.report)
        keys = search.within()
        while keys:
            best, speeds = race.fastest(search, keys)
            if search.trials.trials[best].slowest < 1.0 and self._learned(search, builder, best):
                keys = [key for key in search.within() if key not in self._rejected]
                best, speeds = race.fastest(search, keys)
            built = search.get(best)
            verdict = final.judge(built.runnable)
            if verdict.within or self.options.force:
                break
            self._rejected.add(best)
            name = search.trials.trials[best].name
            words = f"Candidate {name!r} held the budget on the search's data, but not on the evaluation data."
            self.report.notes.append(words)
            keys.remove(best)
        else:
            self._tell(search, None)
            raise over_budget(search.trials, builder, self.report.budget, self._hint)
        self._tell(search, best)
        if self._named and not self.options.force and outcome.idle(built.assignment, builder.layers(), self.target):
            raise only_float(search.trials, builder, self.scheme.name, self.report.budget, self._hint)
        if search.trials.trials[best].slowest < 1.0 and not self.options.force:
            raise slower(search.trials, self.report.budget, self._hint)
        self.report.speed = speeds
        return built, verdict

    def _search(self, builder: Builder, judge: Judge) -> Search:
        state = Path(self.options.state) if self.options.state is not None else None
        trials = Trials(state, "" if state is None else repr(self._identity(judge, builder)))
        if trials.resumed:
            self.report.notes.append(f"{trials.resumed} candidates were measured before, and taken from {state}.")
        deadline = time.monotonic() + self.options.time_limit
        glance = self.clock.glance if self.options.bench_seconds > 0 else None
        rest = (deadline, self.progress, self.options.force, glance, self.options.bits_per_weight)
        search = Search(builder, judge, functools.partial(self._estimates, builder), trials, *rest)
        self.report.notes += [*notes_of(builder.order), *(UNFOLLOWED.format(one) for one in builder.unfollowed)]
        return search

    def _estimates(self, builder: Builder) -> list[Estimate]:
        if not self.scheme.parts:
            return []
        return estimates(builder.prepared, builder.rules(), builder.context.data is not None, builder.learns)

    def _identity(self, judge: Judge, builder: Builder) -> tuple[object, ...]:
        """All that the measurements of a search depend on."""
        told, chosen = self.report, self.options.identity
        seen = [data.digest() for data in (judge.data, builder.context.data) if data is not None]
        return (version("qgraph"), self.key, told.target, told.scheme, told.runtime, told.budget, chosen, seen)

    def _learned(self, search: Search, builder: Builder, odd: str | None) -> bool:
        """Search again, once, with the times of a candidate's nodes as measured here: estimates were far off."""
        if self._profiled or odd is None or not search.trials.trials[odd].assignment:
            return False
        self._profiled = True
        self.progress("profiling", 0, 0)
        ratio = search.trials.trials[odd].slowest
        words = "A first choice ran at {:.2f}x: the search went on with the times of its nodes as measured here."
        self.report.notes.append(words.format(ratio))
        builder.measured.update(details.measured_times(builder, search.get(odd), self.feeds))
        search.relearn(builder.measured)
        # With nothing to write there is time for another search, else what is left.
        search.deadline = max(search.deadline, time.monotonic() + self.options.time_limit * (ratio < 1.0))
        self._run(search)
        return True

    def _run(self, search: Search) -> None:
        """Search; an interrupt ends it with what it has."""
        try:
            search.run()
        except KeyboardInterrupt:
            if not any(search.trials.trials[key].assignment or not self._named for key in search.within()):
                raise
            self._profiled = True  # Nothing is searched for any more.
            self.report.notes.append("The search was interrupted: this is the best that it had found.")

    # -- words ------------------------------------------------------------------------------------------------------

    def _tell(self, search: Search, best: str | None) -> None:
        trials = search.trials.trials.items()
        self.report.candidates = [t.candidate(key == best, key in self._rejected) for key, t in trials]
        self.report.sensitivity = search.noises.told()
