"""An ordered, printable list of passes, run with a report of what each did and how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import calibration
from qgraph.blocks import Blocks
from qgraph.data import Dataset
from qgraph.qparams import QParams
from qgraph.report import Step
from qgraph.rules import Prices, Refusals, Times
from qgraph.spec import Mixture, Scheme
from qgraph.targets import Target

__all__ = ["Context", "Pipeline"]


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a pipeline is built from.

    Attributes:
        target: where the model will run.
        scheme: which numbers it will use, or several to choose from node by node.
        data: calibration data; None leaves out all that needs it.
        folder: where the model's external tensors lie, None when it has none.
        observer: name of the observer, None for each spec's own.
        budget: bytes that the observed values of one run may take.
        ranges: saved statistics to use instead of running the data, with the model's key.
        save_ranges: file to save the observed statistics in, with the model's key.
        keep_float: patterns of node names, or operators, of the nodes that the caller wants in float.
        refused: (node, scheme) -> reason, for nodes found not to run in their planned kernel.
        measured: (node, scheme) -> measured seconds (in float, in it), in place of the target's estimates.
        choices: pattern of node names, or operator -> scheme or "float".
        prices: (node, scheme) -> seconds that its loss of accuracy is worth.
        store: statistics by value, to be used again by the next pipeline on the same model and data.
        smoothing: how range is moved between channels: "none", "folded" where that costs nothing at run time,
            "explicit" with a multiplication where nothing takes the factors, or "aside" with the loudest channels in
            float besides.
        dynamic: names of the products that are expected to find their ranges at run time.
        learn: whether roundings are learned, which takes its time.
        codes: learned roundings, to be used again like `store`.
        fits: ranges fitted to what reads them, likewise.
        blocks: learned weights in blocks, likewise.
        pack: whether ternary and binary weights are packed further on disk.
        cache: bits of the caches of keys and values; None leaves them in float.
        deadline: of `time.monotonic`, after which nothing more is learned; None for none.
        progress: called with (what is done, steps done, steps in all).
    """

    target: Target
    scheme: Scheme | Mixture
    data: Dataset | None
    folder: Path | None = None
    observer: str | None = None
    budget: int = calibration.DEFAULT_BUDGET
    ranges: tuple[Path, str] | None = None
    save_ranges: tuple[Path, str] | None = None
    keep_float: tuple[str, ...] = ()
    refused: Refusals = dataclasses.field(default_factory=dict[tuple[str, str], str])
    measured: Times = dataclasses.field(default_factory=dict[tuple[str, str], tuple[float, float]])
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    prices: Prices = dataclasses.field(default_factory=dict[tuple[str, str], float])
    store: calibration.Store | None = None
    smoothing: str = "folded"
    dynamic: Collection[str] = ()
    learn: bool = False
    codes: dict[tuple[str, bytes], NDArray[Any]] | None = None
    fits: dict[tuple[str, tuple[str, ...]], QParams] | None = None
    blocks: MutableMapping[str, Blocks] | None = None
    deadline: float | None = None
    pack: bool = False
    cache: int | None = None
    progress: Callable[[str, int, int], None] | None = None


class Pipeline(ir.passes.Sequential):
    """`onnx_ir.passes.Sequential` that records its steps; errors of passes come through as they are."""

    def __init__(self, *passes: ir.passes.PassBase, progress: Callable[[str, int, int], None] | None = None):
        super().__init__(*passes)
        self.steps: list[Step] = []
        self._progress = progress

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run all passes in order; `steps` tells afterwards what happened."""
        with _without_collector():
            return self._run(model)

    def _run(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        self.steps = []
        before = _operators(model)
        for number, one in enumerate(self.passes):
            name = type(one).__name__
            if self._progress is not None:
                self._progress(name, number, len(self.passes))
            start = time.perf_counter()
            result = one(model)
            seconds = time.perf_counter() - start
            model = result.model
            modified |= result.modified
            after = _operators(model)
            delta = {
                op: after[op] - before[op] for op in sorted(before.keys() | after.keys()) if after[op] != before[op]
            }
            told = tuple(getattr(one, "notes", ()))
            self.steps.append(Step(name, seconds, delta, dict(getattr(one, "refused", {})), told))
            before = after
        return ir.passes.PassResult(model, modified)

    def __str__(self) -> str:
        return " -> ".join(type(one).__name__ for one in self.passes)


@contextlib.contextmanager
def _without_collector() -> Generator[None, None, None]:
    """The cyclic garbage collector would walk all of a growing graph again and again: a quarter of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())
