"""Builds candidates: a clone of the prepared model, quantized as prices say, written, and audited on the runtime."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, MutableMapping
from pathlib import Path

import onnx_ir as ir

from qgraph import audit, learning, modelio, outcome, registry, unfit
from qgraph.blocks import Blocks
from qgraph.built import Built, assignment_of, digest
from qgraph.compare import Runnable
from qgraph.errors import AuditError, NothingQuantizedError, QuantizationError
from qgraph.few_bits import FewBits, Order
from qgraph.pipeline import Context
from qgraph.rebalance import FACTOR
from qgraph.report import NodeReport, Step
from qgraph.rules import FLOAT, Prices, Rules
from qgraph.sides import BESIDE, SIDE
from qgraph.spec import Mixture, Scheme
from qgraph.targets import REASON, Form, Target

__all__ = ["VARIANTS", "Builder", "Built", "digest"]

VARIANTS = ("folded", "none", "explicit", "aside")  # Ways to scale channels, as they are tried; two cost no time.
_ROUNDS = 4


class Builder:
    """Makes candidates of one model for one target.

    Args:
        model: the original, whose large weights lie in `context.folder`.
        context: everything but the prices; its data is the calibration data.
        workspace: where files are written.
        output: where the result will stand, None for nowhere.
        external: whether the original's weights are external.
        avoid: resolved paths that must not be replaced.
        progress: called with (what is done, steps done, steps in all).
    """

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        workspace: modelio.Workspace,
        output: Path | None,
        external: bool,
        avoid: set[Path],
        progress: Callable[[str, int, int], None],
    ):
        self.original = model
        self.context = dataclasses.replace(context, store={}, codes={}, fits={}, blocks={}, progress=progress)
        self.workspace, self.output, self.external = workspace, output, external
        self.avoid, self.progress = avoid, progress
        self.refused: dict[tuple[str, str], str] = {}
        self.measured: dict[tuple[str, str], tuple[float, float]] = {}
        saved = context.ranges is not None or context.save_ranges is not None or context.scheme.torch
        # Ranges that are saved, or PyTorch's, are those of the model itself.
        self.variants: tuple[str, ...] = VARIANTS if self.calibrated and not saved else ("none",)
        parts = context.scheme.parts
        if context.data is not None and parts and not saved and not any(part.static for part in parts):
            self.variants = ("folded",)  # What gains there is known without a trial.
        if context.scheme.held is not None:
            self.variants = self.variants[:1]  # Of each variant the codes would be learned anew.
        if not context.target.sets_aside:
            self.variants = tuple(one for one in self.variants if one != "aside")
        self.variant = self.variants[0]
        self._surveyed: ir.Model | None = None
        self._survey_steps: list[Step] = []
        self._variants: dict[str, tuple[ir.Model, list[Step], Context]] = {}
        self._changed: dict[str, bool] = {}
        self.unfollowed: list[str] = []
        self.learns = False  # Whether candidates have learned roundings unless it is said otherwise.
        self.fixed = saved or context.observer is not None  # Whether ranges are those that were asked for.
        self.audit: Callable[[Path, audit.Plan, Target], audit.Audit] = audit.audit
        self.keep: Callable[[str, ir.Model], MutableMapping[str, Blocks]] = lambda variant, model: {}
        self.few: FewBits | None = None  # Whether other schemes may be taken in place of those that were given.
        self.order: Order | None = None  # Of those, where they were.

    @property
    def prepared(self) -> ir.Model:
        """The model with everything done that does not depend on the assignment, in the present variant."""
        self._prepare()
        return self._variants[self.variant][0]

    @property
    def variant_context(self) -> Context:
        """The context with the statistics and the folder of the present variant."""
        self._prepare()
        return self._variants[self.variant][2]

    def savings(self) -> dict[tuple[str, str], float]:
        """(node, scheme) -> seconds that it saves, by the target's costs or as measured; of every kernel there is."""
        self._prepare()
        if not self.context.scheme.parts:
            return {}
        found: dict[tuple[str, str], float] = {}
        rules = self.rules()
        for node in self.prepared.graph:
            for scheme, kernel in rules.kernels(node)[0].items():
                if kernel.form is not Form.QDQ or self.context.data is not None:
                    found[node.name or "", scheme] = kernel.float_seconds - kernel.integer_seconds + kernel.price
        self.unfollowed = rules.unfollowed
        return found

    def layers(self) -> dict[tuple[str, str], float]:
        """Prices at which layers with weights are quantized, whatever that costs; of several, the calibrated."""
        one = len(self.context.scheme.parts) == 1
        rules = self.rules()
        return {
            (node.name or "", scheme): -1.0
            for node in self.prepared.graph
            for scheme, kernel in rules.kernels(node)[0].items()
            if kernel.weight is not None and (one or kernel.form is Form.QDQ)
        }

    def rules(self) -> Rules:
        """What decides about kernels, but for prices."""
        context = self.context
        choices = {**context.choices, **dict.fromkeys(context.keep_float, FLOAT)}
        calibrated = context.data is not None
        return Rules(context.target, context.scheme, choices, self.refused, self.measured, calibrated=calibrated)

    def differs(self) -> bool:
        """Whether the present variant is a model of its own."""
        self._prepare()
        if self.variant == "none":
            return any(one != "none" and self._changed[one] for one in self._changed)
        if self.variant == "aside":
            return any(SIDE in node.meta for node in self.prepared.graph)
        explicit = sum(s.operators.get("Mul", 0) for s in self._variants[self.variant][1] if s.name == "Smooth") > 0
        return explicit if self.variant == "explicit" else True

    def _prepare(self) -> None:
        """Survey once; scale channels once for each variant, whose statistics are its own."""
        if self._surveyed is None:
            pipeline = registry.pipeline("survey")(self.context)
            self._surveyed = pipeline(self.original.clone()).model
            self._survey_steps = pipeline.steps
            self._suit(self._surveyed)
            planned = self._surveyed.clone()
            with contextlib.suppress(NothingQuantizedError):
                registry.pipeline("assign")(self.context)(planned)
            self.context = dataclasses.replace(self.context, dynamic=outcome.dynamic(planned))
        if self.variant not in self._variants:
            context = dataclasses.replace(self.context, smoothing=self.variant, store={}, codes={}, fits={}, blocks={})
            model, steps = self._surveyed.clone(), self._survey_steps
            if self.variant != "none":
                usual = context.scheme if self.order is None else self.order.usual
                pipeline = registry.pipeline("scale")(dataclasses.replace(context, scheme=usual))
                model = pipeline(model).model
                steps = [*steps, *pipeline.steps]
                self._changed[self.variant] = any(getattr(one, "changes", ()) for one in pipeline.passes)
            if self.few is not None and self.order is not None:
                self.few.price(model)
            # Weights that were changed are new; they go to disk like the others.
            kept = self.keep(self.variant, model)
            context = dataclasses.replace(context, folder=self.workspace.spill(model), blocks=kept)
            if context.scheme.held is not None:
                pipeline = registry.pipeline("shrink")(context)
                model = pipeline(model).model
                steps = [*steps, *pipeline.steps]
                context = dataclasses.replace(context, folder=self.workspace.spill(model))
            self._variants[self.variant] = model, steps, context

    def _suit(self, model: ir.Model) -> None:
        """Take other schemes in place of those that were given, where others suit the model."""
        found = self.few.suited(model, self.context.target, self.rules()) if self.few is not None else None
        if found is not None:
            self.context = dataclasses.replace(self.context, scheme=found)
            self.variants, self.order = self.variants[:1], Order.of(found)  # Of weights alone the error is known.

    def assignment(self, prices: Prices | None = None, scheme: Scheme | Mixture | None = None) -> dict[str, str]:
        """What `build` would quantize, and to what; NothingQuantizedError where that is nothing."""
        model = self.prepared.clone()
        registry.pipeline("assign")(self._priced(prices, scheme))(model)
        return assignment_of(model)

    def build(
        self, prices: Prices | None = None, scheme: Scheme | Mixture | None = None, learn: bool | None = None
    ) -> Built:
        """A candidate whose planned kernels all appear in the runtime; what does not fuse is refused from now on.

        Args:
            prices: of lost accuracy.
            scheme: instead of the context's.
            learn: whether roundings are learned; None as `learns` says.

        Raises:
            NothingQuantizedError: no node is worth quantizing.
            AuditError: the runtime does not do what was planned, however little is.
        """
        wanted = scheme or self.context.scheme
        learn = self.learns if learn is None else learn
        for attempt in range(_ROUNDS):
            if wanted.pipeline == "quantize":
                model, before = self.prepared.clone(), self._variants[self.variant][1]
                pipeline = registry.pipeline("write")(dataclasses.replace(self._priced(prices, wanted), learn=learn))
            else:
                model, before = self.original.clone(), []
                pipeline = registry.pipeline(wanted.pipeline)(self._priced(prices, wanted))
            try:
                model = pipeline(model).model
            except NothingQuantizedError:
                raise
            except QuantizationError:
                hurdles = unfit.refusals(self.prepared, self.rules())
                if attempt + 1 == _ROUNDS or not hurdles:
                    raise
                self.refused.update(hurdles)
                continue
            self.refused.update(outcome.overflowing(pipeline.steps, self.context.target.half))
            if not wanted.parts:
                self._explain(model)
            assignment = assignment_of(model)
            staged = modelio.stage(model, self.output or Path("model.onnx"), self.workspace, self.external, self.avoid)
            self.progress("auditing", 0, 0)
            plan = audit.plan_of(model)
            try:
                found = self.audit(staged.path, plan, self.context.target)
            except BaseException:
                staged.discard()
                raise
            if found.clean:
                return Built(model, staged, outcome.nodes(model, found), [*before, *pipeline.steps], assignment)
            refused = outcome.not_chosen(model, found)
            if attempt + 1 == _ROUNDS or not refused.keys() - self.refused.keys():
                staged.discard()
                raise AuditError(found.summary)
            self.refused.update(refused)
            staged.discard()
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def rewritten(self, scheme: Scheme | Mixture) -> Generator[Runnable]:
        """The candidate of a scheme that leaves all in float, as long as it is looked at."""
        built = self.build(scheme=scheme)
        try:
            yield built.runnable
        finally:
            built.staged.discard()

    def explained(self, built: Built) -> list[NodeReport]:
        """The nodes of a candidate that is all float, with what the whole search found to be the reasons."""
        self._explain(built.model)
        return outcome.nodes(built.model, audit.Audit({}, {}, {}))

    def _explain(self, model: ir.Model) -> None:
        """Why each node of a graph that is all float has no kernel."""
        reasons: dict[str | None, str] = {}
        default = "the scheme leaves all nodes in float"
        if self.context.scheme.parts:
            default = "no candidate with its integer kernel was better than the float graph"
            planned = self.prepared.clone()
            with contextlib.suppress(NothingQuantizedError):
                registry.pipeline("assign")(self._priced(None, None))(planned)
            reasons = {node.name: str(node.meta[REASON]) for node in planned.graph if REASON in node.meta}
        for node in model.graph:
            node.meta[REASON] = reasons.get(node.name, default)

    @property
    def calibrated(self) -> bool:
        """Whether there is data to fix ranges with, and use for them."""
        return self.context.data is not None and self.context.scheme.static

    def learning_seconds(self, assignment: Mapping[str, str]) -> float:
        """About how long learned roundings of these nodes would take; 0 where there is nothing to learn from."""
        scheme = self.context.scheme
        data = self.context.data if self.calibrated else None
        if data is None or scheme.torch or scheme.held is not None:
            return 0.0
        rules, layers = self.rules(), list[ir.Node]()
        for node in self.prepared.graph:
            kernel = rules.kernels(node)[0].get(assignment.get(node.name or "", ""))
            if kernel is None or kernel.form in (Form.STORED, Form.HALF):
                continue
            if kernel.weight is not None and kernel.weight[1].format.whole:
                layers.append(node)
        return learning.seconds(layers, data.count(), self.context.budget)

    def paid(self, built: Built) -> float:
        """Seconds that scaling channels takes, about as long as rounding, and computing some of them in float."""
        factors = [node for node in built.model.graph if FACTOR in node.meta]
        beside: float = sum(node.meta.get(BESIDE, 0.0) for node in built.model.graph)
        return beside + sum(self.context.target.quantize_cost(node.outputs[0]) for node in factors)

    def _priced(self, prices: Prices | None, scheme: Scheme | Mixture | None) -> Context:
        return dataclasses.replace(
            self.variant_context,
            save_ranges=self.context.save_ranges,
            scheme=scheme or self.context.scheme,
            prices=prices or {},
            refused=self.refused,
            measured=self.measured,
        )
