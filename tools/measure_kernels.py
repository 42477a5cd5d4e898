"""Measure ONNX Runtime's CPU kernels, float against int8, for the cost model of the CPU target.

Every case is a small chain, built as a float model and as its QDQ twin (u8 activations with scalar parameters, s8
symmetric per-channel weights, int32 biases). Both run under ONNX Runtime's profiler at ORT_ENABLE_ALL with one thread,
so each kernel is timed where it will run: float convolutions inside NCHWc chains, integer ones inside NHWC chains.
Times are kernel durations of the target nodes in us, the best of several blocks; work is MACs or output elements.

    python tools/measure_kernels.py --only conv --json kernels.json
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

CONVS = {"Conv", "QLinearConv"}
MATMULS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
SCALE = 0.05
_Nodes = list[tuple[str, float]]
_Shape = tuple[int, ...]


class _Net:
    """A model under construction; with `quant`, every value goes through a Q/DQ pair."""

    def __init__(self, quant: bool) -> None:
        self.quant = quant
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.scales: dict[str, float] = {}
        self.rng = np.random.default_rng(0)

    def const(self, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.weights)}"))
        return self.weights[-1].name

    def node(self, op: str, *ins: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, list(ins), [f"n{len(self.nodes)}"], name=f"n{len(self.nodes)}", **attrs))
        return self.nodes[-1].name

    def qdq(self, x: str, zero: int = 0, scale: float = SCALE) -> str:
        params = self.const(np.float32(scale)), self.const(np.uint8(zero))
        y = self.node("DequantizeLinear", self.node("QuantizeLinear", x, *params), *params)
        self.scales[y] = scale
        return y

    def op(self, op: str, *ins: str, zero: int = 0, scale: float = SCALE, **attrs: Any) -> str:
        y = self.node(op, *ins, **attrs)
        return self.qdq(y, zero, scale) if self.quant else y

    def input(self, *shape: int) -> str:
        name, kind = f"x{len(self.inputs)}", TensorProto.UINT8 if self.quant else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        params = self.const(np.float32(SCALE)), self.const(np.uint8(0))
        return self.node("DequantizeLinear", name, *params) if self.quant else name

    def weight(self, shape: _Shape, axis: int) -> tuple[str, np.ndarray]:
        w = (self.rng.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[axis])).astype(np.float32)
        reduced = tuple(a for a in range(len(shape)) if a != axis)
        scale = (np.abs(w).max(axis=reduced) / 127).astype(np.float32)
        if not self.quant:
            return self.const(w), scale
        ints = np.round(w / np.expand_dims(scale, reduced)).astype(np.int8)
        params = [self.const(ints), self.const(scale), self.const(np.zeros_like(scale, np.int8))]
        return self.node("DequantizeLinear", *params, axis=axis), scale

    def conv(self, x: str, cin: int, cout: int, k: int = 1, s: int = 1, g: int = 1, d: int = 1) -> str:
        """Convolution, bias and Relu (in the integer model the zero point 0 makes the Relu redundant)."""
        weight, scale = self.weight((cout, cin // g, k, k), 0)
        bias = self.const(np.zeros(cout, np.int32 if self.quant else np.float32))
        if self.quant:  # with any other bias scale ONNX Runtime leaves the Conv in float
            bias_scale = self.const(scale * np.float32(self.scales.get(x, SCALE)))
            bias = self.node("DequantizeLinear", bias, bias_scale, bias, axis=0)
        attrs: dict[str, Any] = {"kernel_shape": [k, k], "strides": [s, s], "pads": [d * (k - 1) // 2] * 4}
        y = self.op("Conv", x, weight, bias, group=g, dilations=[d, d], **attrs)
        return y if self.quant else self.node("Relu", y)

    def model(self, out: str) -> onnx.ModelProto:
        nodes, kind = list(self.nodes), TensorProto.FLOAT
        if nodes[-1].op_type == "DequantizeLinear":
            out, kind = nodes.pop().input[0], TensorProto.UINT8
        y = helper.make_tensor_value_info(out, kind, None)
        graph = helper.make_graph(nodes, "g", self.inputs, [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass
class _Case:
    section: str
    cls: str
    name: str
    work: float
    build: Callable[[_Net], str]
    pick: Callable[[_Nodes], float]
    forms: tuple[str, ...] = ("float", "int8")
    us: dict[str, float] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)


def _last_conv(nodes: _Nodes) -> float:
    return [t for op, t in nodes if op in CONVS][-1]


def _between_convs(nodes: _Nodes) -> float:
    """What lies between the first and the last convolution, and what an Add fused into one of them costs it."""
    at = [i for i, (op, _) in enumerate(nodes) if op in CONVS]
    fused = abs(nodes[at[0]][1] - nodes[at[1]][1]) if len(at) == 3 else 0.0
    return fused + sum(t for op, t in nodes[at[0] : at[-1]] if op not in CONVS)


def _only(nodes: _Nodes, wanted: set[str]) -> float:
    return sum(t for op, t in nodes if op in wanted)


CONV_CASES = {
    "1x1": "32-32k1@60x80 64-64k1@30x40 128-128k1@15x20 64-256k1@56x56 256-256k1@14x14 16-96k1@112x112 256-256k1@4x5",
    "1x1 cout%16": "144-24k1@56x56 240-40k1@28x28 64-6k1@30x40 64-12k1@30x40 64-8k1@30x40 256-4k1@8x10",
    "3x3": "16-16k3@30x40 64-64k3@56x56 128-128k3@28x28 256-256k3@14x14 512-512k3@7x7 64-128k3s2@56x56 256-16k3@4x5",
    "3x3 cout%16": "64-24k3@28x28 256-6k3@4x5 24-40k3@28x28 64-68k3@56x56 128-136k3@14x14",
    "dilated 3x3": "16-16k3d3@30x40 64-64k3d2@28x28 256-256k3d2@14x14",
    "cin 1 or 3": "3-16k3s2@240x320 3-32k3s2@224x224 3-64k7s2@224x224 1-32k3@28x28 1-64k3@112x112 3-64k3@64x64",
    "cin 4 to 12": "8-16k3@30x40 4-32k3s2@224x224 12-16k3@56x56 4-16k3s2@240x320 8-16k3@120x160 8-12k3@30x40",
    "depthwise 3x3": "16-16k3g16@120x160 32-32k3g32@60x80 64-64k3g64@30x40 128-128k3g128@15x20 256-256k3g256@8x10"
    " 144-144k3g144@56x56 384-384k3g384@14x14 32-32k3s2g32@120x160 96-96k3s2g96@112x112",
    "depthwise c%16": "72-72k3g72@28x28 24-24k3g24@56x56 120-120k3g120@14x14",
    "depthwise 5x5": "240-240k5g240@28x28 480-480k5g480@14x14 96-96k5s2g96@28x28",
    "grouped": "128-128k3g2@28x28 256-256k3g8@14x14 240-240k1g3@28x28 128-128k3g32@56x56 256-256k3g32@28x28",
}
CONV_SPEC = re.compile(r"(\d+)-(\d+)k(\d)(?:s(\d))?(?:g(\d+))?(?:d(\d))?@(\d+)x(\d+)")


def _conv_cases() -> Iterator[_Case]:
    def build(n: _Net, shape: _Shape, args: _Shape) -> str:
        x = n.input(*shape)
        return n.conv(n.conv(x, shape[1], shape[1]) if shape[1] >= 16 else x, *args)

    for cls, specs in CONV_CASES.items():
        for match in CONV_SPEC.finditer(specs):
            cin, cout, k, s, g, d, h, w = (int(v or 1) for v in match.groups())
            work = -(-h // s) * -(-w // s) * cout * (1 if "depthwise" in cls else cin // g * k * k)
            chain = partial(build, shape=(1, cin, h, w), args=(cin, cout, k, s, g, d))
            yield _Case("conv", cls, match[0], work, chain, _last_conv)


def _boundary_cases() -> Iterator[_Case]:
    def chain(n: _Net, shape: _Shape, into: bool) -> str:
        n.quant = not into
        x = n.conv(n.input(1, 16, *shape[1:]), 16, shape[0])
        n.quant = into
        return n.conv(n.qdq(x) if into else x, shape[0], shape[0])

    def plain(n: _Net, shape: _Shape) -> str:
        n.quant = False
        return n.node("Sqrt", n.qdq(n.node("Sqrt", n.input(*shape))))

    for c, h, w in [(16, 120, 160), (32, 60, 80), (64, 56, 56), (64, 30, 40), (256, 14, 14), (128, 8, 10)]:
        for cls, into in {"float -> int8 conv": True, "int8 -> float conv": False}.items():
            build = partial(chain, shape=(c, h, w), into=into)
            yield _Case("boundary", cls, f"{c}x{h}x{w}", c * h * w, build, _between_convs, ("int8",))
    for (m, n), op in product([(64, 384), (128, 768), (128, 3072), (1, 768)], ("QuantizeLinear", "DequantizeLinear")):
        pick = partial(_only, wanted={op})
        yield _Case("boundary", op, f"{m}x{n}", m * n, partial(plain, shape=(m, n)), pick, ("int8",))


POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
UNARY: dict[str, tuple[str, dict[str, Any]]] = {
    "MaxPool 3x3 s2": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "MaxPool 2x2 s2": ("MaxPool", POOL),
    "AveragePool 2x2 s2": ("AveragePool", POOL),
    "GlobalAveragePool (per input)": ("GlobalAveragePool", {}),
    "Sigmoid": ("Sigmoid", {"scale": 1 / 256}),
    "HardSigmoid": ("HardSigmoid", {"scale": 1 / 256}),
    "HardSwish": ("HardSwish", {}),
    "LeakyRelu": ("LeakyRelu", {"alpha": 0.1, "zero": 20}),
    "Softmax axis=1": ("Softmax", {"axis": 1, "scale": 1 / 256}),
    "DepthToSpace 2": ("DepthToSpace", {"blocksize": 2}),
    "Resize nearest x2, floor": ("Resize", {**NEAREST, "nearest_mode": "floor"}),  # NCHWc has a kernel for this mode
    "Resize nearest x2": ("Resize", NEAREST),
    "Resize linear x2": ("Resize", {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
}
BINARY = {"Add": 1.0, "Add + Relu": 1.0, "Mul": 1.0, "Concat equal scales": 1.0, "Concat other scales": 1.5}


def _glue_cases() -> Iterator[_Case]:
    def unary(n: _Net, name: str, c: int, hw: int) -> str:
        op, attrs = UNARY[name]
        sizes = ["", n.const(np.array([1, 1, 2, 2], np.float32))] if op == "Resize" else []
        y = n.op(op, n.conv(n.input(1, c, hw, hw), c, c), *sizes, **attrs)
        return n.conv(y, c // 4 if op == "DepthToSpace" else c, c)

    def binary(n: _Net, name: str, c: int, hw: int) -> str:
        x, concat = n.input(1, c, hw, hw), "Concat" in name
        attrs: dict[str, Any] = {"axis": 1} if concat else {}
        y = n.op(name.split()[0], n.conv(x, c, c), n.conv(x, c, c), scale=SCALE * BINARY[name], **attrs)
        y = n.node("Relu", y) if "Relu" in name and not n.quant else y
        return n.conv(y, 2 * c if concat else c, c)

    def shuffle(n: _Net, name: str, c: int, hw: int) -> str:
        y = n.op("Reshape", n.conv(n.input(1, c, hw, hw), c, c), n.const(np.array([1, 2, c // 2, hw, hw])))
        y = n.op("Transpose", y, perm=[0, 2, 1, 3, 4])
        return n.conv(n.op("Reshape", y, n.const(np.array([1, c, hw, hw]))), c, c)

    outputs = {"Resize": 4.0, "Concat": 2.0, "MaxPool": 0.25, "AveragePool": 0.25}  # per input element
    for names, build in (UNARY, unary), (BINARY, binary), (("channel shuffle",), shuffle):
        for name, (c, hw) in product(names, [(64, 56), (128, 28), (256, 14)]):
            work = c * hw * hw * outputs.get(name.split()[0], 1.0)
            yield _Case("glue", name, f"{c}x{hw}x{hw}", work, partial(build, name=name, c=c, hw=hw), _between_convs)


def _matmul_cases() -> Iterator[_Case]:
    def constant(n: _Net, m: int, k: int, cols: int, requantize: bool) -> str:
        return (n.op if requantize else n.node)("MatMul", n.input(1, m, k), n.weight((k, cols), 1)[0])

    def activations(n: _Net, a: _Shape, b: _Shape) -> str:
        return n.op("MatMul", n.input(*a), n.input(*b))

    pick = partial(_only, wanted=MATMULS)
    sizes = [(64, 64), (256, 256), (384, 1536), (768, 768), (768, 3072), (3072, 768)]
    for (k, cols), m, requantize in product(sizes, (1, 4, 16, 64, 128, 384), (False, True)):
        cls = f"{'u8' if requantize else 'float'} out, {'M=1' if m == 1 else 'M>1'}"
        build = partial(constant, m=m, k=k, cols=cols, requantize=requantize)
        yield _Case("matmul", cls, f"{m}x{k}x{cols}", m * k * cols, build, pick)
    for h, s, d in [(12, 64, 64), (12, 128, 64), (12, 384, 64), (6, 197, 64)]:
        for cls, k, cols in (("Q.K", d, s), ("P.V", s, d)):
            build = partial(activations, a=(1, h, s, k), b=(1, h, k, cols))
            yield _Case("matmul", cls, f"{h}x{s}x{k}x{cols}", h * s * k * cols, build, pick)


def _profile(model: onnx.ModelProto, seconds: float) -> _Nodes:
    """Operator and kernel time (us; the faster half of the second half of the runs) of each node, in order."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level, options.enable_profiling = 4, True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng, types = np.random.default_rng(1), {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        feeds = {i.name: (rng.random(i.shape) * 200).astype(types[i.type]) for i in session.get_inputs()}
        start, runs = time.perf_counter(), 0
        while runs < 10 or (time.perf_counter() - start < seconds and runs < 3000):
            session.run(None, feeds)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], (event["args"]["op_name"], []))[1].append(event["dur"])
    return [(op, float(np.mean(sorted(us[len(us) // 2 :])[: max(1, len(us) // 4)]))) for op, us in times.values()]


SECTIONS = {"conv": _conv_cases, "boundary": _boundary_cases, "glue": _glue_cases, "matmul": _matmul_cases}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Sections to run, by default all.")
@click.option("--seconds", default=0.1, show_default=True, help="Time for each block of one model.")
@click.option("--blocks", default=3, show_default=True, help="Alternating blocks; the fastest counts.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the results as JSON.")
def main(only: tuple[str, ...], seconds: float, blocks: int, target: Path | None) -> None:
    """Time float and int8 kernels of ONNX Runtime on this machine, with one thread."""
    table = Table("class", "case", "float us", "int8 us", "float work/ns", "int8 work/ns", "int8 operators")
    cases = [case for name, make in SECTIONS.items() if name in (only or SECTIONS) for case in make()]
    for case in cases:
        nets = [(form, _Net(form == "int8")) for form in case.forms]
        models = {form: net.model(case.build(net)) for form, net in nets}
        for _, (form, model) in product(range(blocks), models.items()):
            nodes = _profile(model, seconds)
            case.us[form] = min(case.pick(nodes), case.us.get(form, np.inf))
            case.ops[form] = " ".join(op for op, _ in nodes)
        f, q = case.us.get("float"), case.us["int8"]
        rates = [f"{case.work / us / 1e3:.3g}" if us else "" for us in (f, q)]
        table.add_row(case.cls, case.name, f"{f:.1f}" if f else "", f"{q:.1f}", *rates, case.ops["int8"])
    Console().print(table)
    if target:
        rows = [{k: getattr(c, k) for k in ("section", "cls", "name", "work", "us", "ops")} for c in cases]
        target.write_text(json.dumps({"machine": platform.machine(), "ort": ort.__version__, "cases": rows}) + "\n")


if __name__ == "__main__":
    main()
