"""Scales and zero points of `--qconfig` beside those of PyTorch's own observers, tensor by tensor.

    python tools/versus_torch_qconfig.py [--qconfig qnnpack] [--observer minmax] [--batches 1] [--seeds 3]

A small network (Conv, BatchNorm, Relu, Conv, Add, ReLU6, Linear) is fused and prepared by torch.ao (FX graph mode),
sees the calibration data, and is converted; the fused float network is exported to ONNX and quantized by qgraph with
the same data. Needs torch besides qgraph. Ends with an error where anything is outside what is promised:

- weights, and activations with `--observer minmax`: scales and zero points of PyTorch's observers on the same values,
  bit for bit;
- activations otherwise: of one batch, the same bits for nine tensors in ten and all within 2 %; of several batches,
  where PyTorch's histogram depends on their order, within 5 %.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import click
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.ao.quantization import HistogramObserver, MinMaxObserver, QConfig, QConfigMapping, get_default_qconfig
from torch.ao.quantization.quantize_fx import prepare_fx

import qgraph
from qgraph import qconfigs
from qgraph.session import Session, SessionOptions

SAME_SHARE = 0.9
LIMITS = (0.02, 0.05)
"""What scales may differ by, when PyTorch saw one batch and when it saw several."""
LAST_BITS = 1e-5
LAYERS = ("conv1", "conv2", "conv3", "conv4", "linear1", "linear2")
LABELS = {
    "x": "conv1 input", "conv1": "conv2 input", "conv2": "conv2 output", "add": "conv3 input", "conv3": "conv4 input",
    "conv4": "linear1 input", "linear1": "linear2 input",
}  # fmt: skip
"""What PyTorch calls a value -> what it is here."""
EXPECTED = {"conv1 input", "conv2 input", "conv2 output", "conv3 input", "conv4 input", "linear1 input"}
MOVES = ("Clip", "Flatten", "Reshape", "DequantizeLinear")
"""What shares scale, zero point and PyTorch's observer with its input; ReLU6, which PyTorch fuses into nothing, too."""
WATCHERS = (MinMaxObserver, HistogramObserver)
_SIZE, _CHANNELS, _REACH = 24, 16, 24.0

Params = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclasses.dataclass
class Triple:
    """One tensor's parameters: qgraph's, of PyTorch's observer on the very same values, of PyTorch's own network.

    The runtime and PyTorch sum up in different orders, so the last bits of their activations differ.
    """

    qconfig: str
    tensor: str
    ours: Params
    same_values: Params
    own_network: Params

    @property
    def is_weight(self) -> bool:
        """Whether it is a constant."""
        return self.tensor.endswith("weight")

    @property
    def same(self) -> bool:
        """Bit for bit what PyTorch makes of the same values."""
        return all(np.array_equal(a, b) for a, b in zip(self.ours, self.same_values, strict=True))

    def difference(self, other: Params) -> float:
        """Largest relative difference of scales; infinite where their number differs."""
        mine, theirs = self.ours[0], other[0]
        return float(np.max(np.abs(mine / theirs - 1))) if mine.shape == theirs.shape else float("inf")


class Network(nn.Module):
    """What is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(_CHANNELS, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 8, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu1, self.relu2, self.relu6 = nn.ReLU(), nn.ReLU(), nn.ReLU6()
        self.linear1 = nn.Linear(8 * (_SIZE // 2) ** 2, 64)
        self.linear2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, size, size] -> [n, 10]."""
        a = self.relu1(self.norm1(self.conv1(x)))
        b = self.norm2(self.conv2(a))
        c = self.relu2(self.conv3(b + a))
        d = self.relu6(self.conv4(c))
        return self.linear2(self.linear1(torch.flatten(d, 1)))


def network(seed: int) -> Network:
    """Seeded weights, and statistics of the norms that are not those of a new layer."""
    torch.manual_seed(seed)
    made = Network()
    for norm in (made.norm1, made.norm2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        # So that a third of its results is beyond 6.
        made.conv4.weight.mul_(_REACH)
    made.train()
    with torch.no_grad():
        for _ in range(4):
            made(torch.randn(16, _CHANNELS, _SIZE, _SIZE))
    return made.eval()


def chosen_of(name: str, observer: str | None) -> QConfig:
    """PyTorch's default, or with another observer of activations."""
    found = get_default_qconfig(name)
    if observer == "minmax":
        found = QConfig(MinMaxObserver.with_args(reduce_range=qconfigs.QCONFIGS[name].reduced), found.weight)
    return found


def params_of(watcher: nn.Module) -> Params:
    """Of an observer that has seen its data."""
    scale, zero = watcher.calculate_qparams()
    return scale.numpy(), zero.numpy().astype(np.int64)


def theirs(model: nn.Module, batches: list[torch.Tensor], chosen: QConfig) -> tuple[nn.Module, dict[str, Params]]:
    """The network with observers that have seen the data, and what they found, by `LABELS` and by layer."""
    prepared = prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(chosen), (batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    found: dict[str, Params] = {}
    for node in prepared.graph.nodes:
        watcher = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(watcher, WATCHERS) and node.args[0].name in LABELS:
            found[LABELS[node.args[0].name]] = params_of(watcher)
    for layer in LAYERS:
        module = prepared.get_submodule(layer)
        watcher = chosen.weight()
        watcher((module[0] if isinstance(module, nn.Sequential) else module).weight)
        found[f"{layer} weight"] = params_of(watcher)
    return prepared, found


def fused(prepared: nn.Module) -> nn.Module:
    """The float network that PyTorch quantizes: norms folded into convolutions, observers taken out."""
    plain = copy.deepcopy(prepared)
    for node in list(plain.graph.nodes):
        if node.op == "call_module" and isinstance(plain.get_submodule(str(node.target)), WATCHERS):
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    plain.recompile()
    return plain


def layers_of(graph: ir.Graph) -> list[ir.Node]:
    """In the order of `LAYERS`."""
    return [node for node in graph if node.op_type in ("Conv", "Gemm", "MatMul")]


def shared(value: ir.Value) -> list[ir.Value]:
    """The values that one of PyTorch's observers sees: `value`, and what it shares its parameters with."""
    maker = value.producer()
    before = maker.inputs[0] if maker is not None and maker.op_type in MOVES else None
    return [*([] if before is None else shared(before)), value]


def on_same_values(path: Path, batches: list[NDArray[np.float32]], chosen: QConfig) -> dict[str, Params]:
    """What PyTorch's observers find on the values that the runtime computes in the float model, by label."""
    model = ir.load(path)
    layers = dict(zip(LAYERS, layers_of(model.graph), strict=True))
    values = {f"{name} input": shared(node.inputs[0]) for name, node in layers.items()}
    values["conv2 output"] = [layers["conv2"].outputs[0]]
    known = {value.name for value in model.graph.inputs}
    model.graph.outputs.extend(value for some in values.values() for value in some if value.name not in known)
    watchers = {label: chosen.activation() for label in values}
    with Session(model, SessionOptions(threads=1)) as session:
        for batch in batches:
            seen = {**session.run({"x": batch}), "x": batch}
            for label, watcher in watchers.items():
                for value in values[label]:
                    watcher(torch.from_numpy(np.ascontiguousarray(seen[str(value.name)])))
    return {label: params_of(watcher) for label, watcher in watchers.items()}


def ours(graph: ir.Graph) -> dict[str, Params]:
    """What qgraph wrote, by label; without the tensors that it left in float."""

    def behind(value: ir.Value | None, op_type: str) -> ir.Node | None:
        """The operator of this type that made `value`, through what only moves codes."""
        node = value.producer() if value is not None else None
        while node is not None and node.op_type != op_type and node.op_type in MOVES:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        return node if node is not None and node.op_type == op_type else None

    def read(node: ir.Node) -> Params:
        scale, zero = (np.atleast_1d(node.inputs[i].const_value.numpy()) for i in (1, 2))
        return scale, zero.astype(np.int64)

    found: dict[str, Params] = {}
    for layer, node in zip(LAYERS, layers_of(graph), strict=True):
        weight, source = behind(node.inputs[1], "DequantizeLinear"), behind(node.inputs[0], "QuantizeLinear")
        if weight is not None and source is not None:
            found[f"{layer} weight"], found[f"{layer} input"] = read(weight), read(source)
        users = node.outputs[0].consumers()
        if layer == "conv2" and users and users[0].op_type == "QuantizeLinear":
            found["conv2 output"] = read(users[0])
    return found


def compared(name: str, observer: str | None, count: int, seed: int, folder: Path) -> list[Triple]:
    """All tensors that qgraph quantized."""
    data = np.random.default_rng(seed).standard_normal((64, _CHANNELS, _SIZE, _SIZE)).astype(np.float32)
    batches = np.array_split(data, count)
    chosen = chosen_of(name, observer)
    prepared, own = theirs(network(seed), [torch.from_numpy(batch) for batch in batches], chosen)
    path = folder / f"{name}-{seed}.onnx"
    # Norms are folded as PyTorch folded them: the weights are the same bits.
    torch.onnx.export(
        fused(prepared), (torch.from_numpy(data[:2]),), path, input_names=["x"], output_names=["y"], dynamo=False,
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, opset_version=17, verbose=False,
    )  # fmt: skip
    # What the result is judged by is given apart, so that all of the data is calibrated on.
    # A qconfig brings its observers with it; for another one, the promise is of the arithmetic alone.
    with mock.patch.object(qconfigs, "OBSERVER", observer or qconfigs.OBSERVER):
        result = qgraph.optimize(
            path, data={"x": data}, evaluation={"x": data[:8]}, target="x86-vnni", scheme="int8", qconfig=name,
            max_loss="50%", bench_seconds=0.0, force=True,
        )  # fmt: skip
    same = {**own, **on_same_values(path, batches, chosen)}
    return [Triple(name, label, mine, same[label], own[label]) for label, mine in ours(result.model.graph).items()]


def verdict(found: list[Triple], observer: str | None, batches: int) -> list[str]:
    """What is outside the promise."""
    exact = [one for one in found if one.is_weight or observer == "minmax"]
    rest = [one for one in found if not one.is_weight and observer != "minmax"]
    wrong = [f"{one.qconfig}: {one.tensor} is not the same" for one in exact if not one.same]
    near = [(one, LAST_BITS) for one in exact] + [(one, LIMITS[batches > 1]) for one in rest]
    for one, limit in near:
        far = max(one.difference(one.same_values), one.difference(one.own_network))
        if far > limit:
            wrong.append(f"{one.qconfig}: {one.tensor} differs by {far:.2%}")
    if rest and batches == 1 and (share := sum(one.same for one in rest) / len(rest)) < SAME_SHARE:
        wrong.append(f"only {share:.0%} of the activations are the same")
    if {one.tensor for one in found} < EXPECTED:
        wrong.append("not quantized: " + ", ".join(sorted(EXPECTED - {one.tensor for one in found})))
    return wrong


@click.command()
@click.option("--qconfig", "names", multiple=True, type=click.Choice(list(qconfigs.QCONFIGS)), help="Default: all.")
@click.option("--observer", type=click.Choice(["minmax"]), help="Of the activations, instead of PyTorch's default.")
@click.option("--batches", default=1, show_default=True, type=click.IntRange(1, 64), help="That PyTorch sees.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Networks and data sets.")
def main(names: tuple[str, ...], observer: str | None, batches: int, seeds: int) -> None:
    """Compare, print, and fail where a promise is broken."""
    warnings.filterwarnings("ignore")
    found: list[Triple] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or qconfigs.QCONFIGS:
            for seed in range(seeds):
                found += compared(name, observer, batches, seed, Path(folder))
    table = Table("qconfig", "tensor", "scales", "zero", "PyTorch's", "same bits", "difference", "to its own network")
    for one in found:
        table.add_row(
            one.qconfig, one.tensor, str(one.ours[0].size), str(one.ours[1][0]), str(one.same_values[1][0]),
            "yes" if one.same else "no", f"{one.difference(one.same_values):.1e}",
            f"{one.difference(one.own_network):.1e}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    for kind, is_weight in (("weights", True), ("activations", False)):
        some = [one for one in found if one.is_weight == is_weight]
        near = sum(one.difference(one.own_network) <= LAST_BITS for one in some)
        console.print(
            f"{kind}: {sum(one.same for one in some)} of {len(some)} have the bits of PyTorch's observer on the same "
            f"values; {near} are equal but for last bits to PyTorch's own network"
        )
    if wrong := verdict(found, observer, batches):
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
