"""Whether a model gives the same bits here and on arm64, and if not, which node is the first that differs.

    python tools/same_bits.py model.onnx evaluation.npz --runs 2

The arm64 builds of the runtime run on emulated processors (`python tools/set_up.py arm64`). Outputs are compared bit by
bit, floats too; only which NaN it is does not count. To find the node, every QuantizeLinear's codes are made outputs,
which keeps the integer kernels as they are, and then the floats before the first that differs; what else the runtime
fuses may change by that, so the verdict is that of the model as it is, and the rest only tells where to look. Ends
with exit code 1 if anything differs.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass
from rich.console import Console
from rich.table import Table

from qgraph import data as datasets
from qgraph import modelio, registry
from qgraph.errors import QGraphError
from qgraph.runners import RUNNERS
from qgraph.session import Feeds, Session, SessionOptions

Arrays = Mapping[str, NDArray[Any]]

_SOURCES = ("QuantizeLinear", "DequantizeLinear")
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one value: elements that differ, elements in all, and the largest difference."""

    count: int
    size: int
    largest: float


def difference(first: NDArray[Any], second: NDArray[Any]) -> Difference:
    """Bit by bit; two NaN are alike, zeros of different sign are not."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return Difference(max(first.size, second.size), max(first.size, second.size), float("inf"))
    differs = first != second
    if first.dtype.kind == "f":
        differs = (differs | (np.signbit(first) != np.signbit(second))) & ~(np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        gaps = np.abs(first.astype(np.float64) - second.astype(np.float64))[differs]
    return Difference(int(differs.sum()), first.size, float(gaps.max(initial=0.0)))


def differences(expected: Sequence[Arrays], found: Sequence[Arrays]) -> dict[str, Difference]:
    """By output, over all runs; equal ones are left out."""
    result: dict[str, Difference] = {}
    for name in expected[0]:
        each = [difference(first[name], second[name]) for first, second in zip(expected, found, strict=True)]
        if any(one.count for one in each):
            count, size = sum(one.count for one in each), sum(one.size for one in each)
            result[name] = Difference(count, size, max(one.largest for one in each))
    return result


def is_signed(model: ir.Model) -> bool:
    """Whether activations are quantized to int8."""
    return any(
        node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.INT8 for node in model.graph
    ) or any(
        node.op_type == "QuantizeLinear" and len(node.inputs) > 2 and _dtype(node.inputs[2]) == ir.DataType.INT8
        for node in model.graph
    )


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype or (value.const_value.dtype if value.const_value else None)


def with_codes(model: ir.Model) -> list[ir.Node]:
    """Make the codes of activations outputs, in place; the QuantizeLinear that write them, in order."""
    found = [node for node in model.graph if node.op_type == "QuantizeLinear" and _computed(node.inputs[0])]
    for node in found:
        value = node.outputs[0]
        value.dtype = value.dtype or (_dtype(node.inputs[2]) if len(node.inputs) > 2 else ir.DataType.UINT8)
    _show(model, found)
    return found


def with_floats(model: ir.Model, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Make what `nodes` of the main graph write outputs, in place, where its type is known to be float32; those."""
    inferred = ShapeInferencePass()(model).model
    wanted = {str(node.name) for node in nodes}
    found = [n for n in inferred.graph if str(n.name) in wanted and n.outputs[0].dtype == ir.DataType.FLOAT]
    _show(inferred, found)
    return found


def _show(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    model.graph.outputs.extend(n.outputs[0] for n in nodes if not n.outputs[0].is_graph_output())


def _computed(value: ir.Value | None) -> bool:
    return value is not None and not value.is_initializer()


def behind(*values: ir.Value | None) -> list[ir.Node]:
    """The nodes that make `values` from codes or inputs, the first of them first."""
    seen: dict[ir.Node, None] = {}
    waiting = [*values]
    while waiting:
        one = waiting.pop()
        node = None if one is None else one.producer()
        if node is not None and node.op_type not in _SOURCES and node not in seen:
            seen[node] = None
            waiting.extend(node.inputs)
    return list(seen)[::-1]


def here(path: Path, feeds: Sequence[Feeds], options: SessionOptions) -> list[Arrays]:
    """Outputs on this machine."""
    with Session(path, options) as session:
        return [session.run(one) for one in feeds]


def compared(
    model: ir.Model, path: Path, feeds: Sequence[Feeds], options: SessionOptions, runner: str
) -> dict[str, Difference]:
    """Outputs of `model`, a changed copy of that in `path`, that differ there."""
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / path.name
        ir.save(model, shown)
        expected = here(shown, feeds, options)
        return differences(expected, RUNNERS[runner].run(shown, feeds, config=dict(options.config)).outputs)


def where(path: Path, feeds: Sequence[Feeds], options: SessionOptions, runner: str, console: Console) -> None:
    """Print the first place where codes differ, and how many do at each."""
    model = ir.load(path)
    last = list(model.graph.outputs)
    nodes = with_codes(model)
    wrong = compared(model, path, feeds, options, runner)
    places = [node for node in nodes if node.outputs[0].name in wrong]
    console.print(f"  {len(places)} of {len(nodes)} QuantizeLinear differ", highlight=False)
    for node in places[:_SHOWN]:
        one = wrong[str(node.outputs[0].name)]
        console.print(f"    {node.outputs[0].name}: {one.count} of {one.size} codes, by up to {one.largest:g}")
    suspects = behind(*(node.inputs[0] for node in places[:1])) if places else behind(*last)
    if not suspects:
        console.print("  and nothing lies before it but codes and inputs")
        return
    if len(suspects) > 1:
        # Without the codes: here only the floats count.
        model = ir.load(path)
        names = {str(node.name) for node in suspects}
        shown = with_floats(model, [node for node in model.graph if str(node.name) in names])
        wrong = compared(model, path, feeds, options, runner)
        suspects = [node for node in shown if node.outputs[0].name in wrong] or suspects
    told = ", ".join(f"{node.op_type} {node.name}" for node in suspects[:_SHOWN])
    console.print(f"  first node that differs, and those behind it: {told}")


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("dataset", metavar="DATA")
@click.option("--runs", default=1, show_default=True, help="Inputs of DATA to run.")
@click.option("--on", default="arm64,arm64-a53,arm64-a710", show_default=True, help="Runners, commas between.")
@click.option("--target", help="Whose session options to run with.  [default: arm64 for s8 codes, else x86-vnni]")
@click.option("--threads", default=1, show_default=True)
def main(path: Path, dataset: str, runs: int, on: str, target: str | None, threads: int) -> None:
    """Compare MODEL's outputs on DATA here and on arm64."""
    console = Console(soft_wrap=True)
    model = modelio.read(path)
    name = target or ("arm64" if is_signed(model) else "x86-vnni")
    options = registry.target(name).options(threads)
    loaded = datasets.load(dataset, datasets.inputs_of(model))
    feeds = [batch.feeds for batch, _ in zip(loaded, range(runs), strict=False)]
    expected = here(path, feeds, options)
    table = Table("where", "output", "elements that differ", "largest")
    wrong: list[str] = []
    for runner in on.split(","):
        found = differences(expected, RUNNERS[runner].run(path, feeds, config=dict(options.config)).outputs)
        for output in expected[0]:
            one = found.get(output)
            table.add_row(
                runner, output, "none: the same bits" if one is None else f"{one.count} of {one.size}",
                "" if one is None else f"{one.largest:.3g}",
            )  # fmt: skip
        if found:
            wrong.append(runner)
    console.print(table)
    for runner in wrong:
        console.print(f"{runner}:")
        where(path, feeds, options, runner, console)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        main()
    except QGraphError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
