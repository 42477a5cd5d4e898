"""Measure ONNX Runtime's CPU kernels, float against int8, for the cost model of the CPU target.

Every case is a small chain written once and built twice: as a float model and as its QDQ twin (u8 activations with
scalar parameters, s8 symmetric per-channel weights, int32 biases). Both run under the profiler of ONNX Runtime at
ORT_ENABLE_ALL, so each kernel is timed where it will really run: float convolutions inside NCHWc chains, integer
ones inside NHWC chains. Times are kernel durations of the target nodes only, in microseconds, the best of several
alternating blocks. A first-order fit (overhead + work / rate) is printed for each class of cases.

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

CONVS = {"Conv", "FusedConv", "QLinearConv", "ConvTranspose"}
MATMULS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
MATMULS |= {"DynamicQuantizeMatMul", "MatMulInteger"}
SCALE = 0.05
Nodes = list[tuple[str, float]]
Shape = tuple[int, ...]


class Net:
    """A model under construction; with `quant`, every value goes through a Q/DQ pair."""

    def __init__(self, quant: bool) -> None:
        self.quant = quant
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.scales: dict[str, float] = {}  # of the values that are not at SCALE
        self.rng = np.random.default_rng(0)

    def const(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *ins: str, outs: int = 1, **attrs: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{k}" for k in range(outs)]
        self.nodes.append(helper.make_node(op, list(ins), names, name=f"n{len(self.nodes)}", **attrs))
        return names

    def qdq(self, x: str, zero: int = 0, scale: float = SCALE) -> str:
        params = self.const(np.float32(scale)), self.const(np.uint8(zero))
        y = self.node("DequantizeLinear", self.node("QuantizeLinear", x, *params)[0], *params)[0]
        self.scales[y] = scale
        return y

    def input(self, *shape: int) -> str:
        """A graph input: u8 and a DQ in the integer model, so that no boundary is timed."""
        name = f"x{len(self.inputs)}"
        kind = TensorProto.UINT8 if self.quant else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if not self.quant:
            return name
        return self.node("DequantizeLinear", name, self.const(np.float32(SCALE)), self.const(np.uint8(0)))[0]

    def op(self, op: str, *ins: str, outs: int = 1, zero: int = 0, scale: float = SCALE, **attrs: Any) -> list[str]:
        names = self.node(op, *ins, outs=outs, **attrs)
        return [self.qdq(n, zero, scale) for n in names] if self.quant else names

    def weight(self, shape: tuple[int, ...], axis: int) -> tuple[str, np.ndarray]:
        w = (self.rng.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[axis])).astype(np.float32)
        if not self.quant:
            return self.const(w), np.ones(0)
        reduced = tuple(a for a in range(len(shape)) if a != axis)
        scale = (np.abs(w).max(axis=reduced) / 127).astype(np.float32)
        ints = np.round(w / np.expand_dims(scale, reduced)).astype(np.int8)
        zeros = self.const(np.zeros_like(scale, np.int8))
        return self.node("DequantizeLinear", self.const(ints), self.const(scale), zeros, axis=axis)[0], scale

    def conv(self, x: str, cin: int, cout: int, k: int = 1, s: int = 1, g: int = 1, d: int = 1) -> str:
        """Convolution, bias and Relu (in the integer model the zero point 0 makes the Relu redundant)."""
        weight, scale = self.weight((cout, cin // g, k, k), 0)
        bias = self.const(np.zeros(cout, np.float32))
        if self.quant:
            zeros = self.const(np.zeros(cout, np.int32))
            scale = scale * np.float32(self.scales.get(x, SCALE))  # any other bias scale keeps the Conv in float
            bias = self.node("DequantizeLinear", zeros, self.const(scale), zeros, axis=0)[0]
        attrs: dict[str, Any] = {"kernel_shape": [k, k], "strides": [s, s], "pads": [d * (k - 1) // 2] * 4}
        out = self.op("Conv", x, weight, bias, group=g, dilations=[d, d], **attrs)[0]
        return out if self.quant else self.node("Relu", out)[0]

    def model(self, out: str, drop_dq: bool = True) -> onnx.ModelProto:
        nodes, kind = list(self.nodes), TensorProto.FLOAT
        if drop_dq and nodes[-1].op_type == "DequantizeLinear":
            out, kind = nodes.pop().input[0], TensorProto.UINT8
        outs = [helper.make_tensor_value_info(out, kind, None)]
        graph = helper.make_graph(nodes, "g", self.inputs, outs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass
class Case:
    section: str
    cls: str  # the class over which a formula is fitted
    name: str
    work: float  # MACs, or output elements
    build: Callable[[Net], str]
    pick: Callable[[Nodes], float]
    forms: tuple[str, ...] = ("float", "int8")
    us: dict[str, float] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)


def last_conv(nodes: Nodes) -> float:
    return [t for op, t in nodes if op in CONVS][-1]


def between_convs(nodes: Nodes) -> float:
    """What lies between the first and the last convolution, and what an Add fused into one of them costs it."""
    at = [i for i, (op, _) in enumerate(nodes) if op in CONVS]
    fused = abs(nodes[at[0]][1] - nodes[at[1]][1]) if len(at) == 3 else 0.0
    return fused + sum(t for op, t in nodes[at[0] : at[-1]] if op not in CONVS)


def matmuls(nodes: Nodes) -> float:
    return sum(t for op, t in nodes if op in MATMULS)


def only(wanted: str) -> Callable[[Nodes], float]:
    return lambda nodes: sum(t for op, t in nodes if op == wanted)


CONV_CASES = {
    "1x1": "32-32k1@60x80 64-64k1@30x40 128-128k1@15x20 64-256k1@56x56 256-64k1@56x56 256-256k1@14x14 16-96k1@112x112"
    " 512-2048k1@7x7 256-256k1@4x5",
    "1x1 cout%16": "144-24k1@56x56 240-40k1@28x28 64-6k1@30x40 64-12k1@30x40 64-8k1@30x40 256-4k1@8x10",
    "3x3": "16-16k3@30x40 64-64k3@56x56 128-128k3@28x28 256-256k3@14x14 512-512k3@7x7 64-128k3s2@56x56 32-32k3@112x112"
    " 256-16k3@4x5 32-32k3@15x20",
    "3x3 cout%16": "64-24k3@28x28 256-6k3@4x5 24-40k3@28x28 64-68k3@56x56 128-136k3@14x14",
    "dilated 3x3": "16-16k3d3@30x40 64-64k3d2@28x28 256-256k3d2@14x14",
    "cin 1 or 3": "3-16k3s2@240x320 3-32k3s2@224x224 3-64k7s2@224x224 1-32k3@28x28 1-64k3@112x112 3-64k3@64x64",
    "cin 4 to 12": "8-16k3@30x40 4-32k3s2@224x224 12-16k3@56x56 4-16k3s2@240x320 8-16k3@120x160 8-12k3@30x40",
    "depthwise 3x3": "16-16k3g16@120x160 32-32k3g32@60x80 64-64k3g64@30x40 128-128k3g128@15x20 256-256k3g256@8x10"
    " 144-144k3g144@56x56 384-384k3g384@14x14 32-32k3s2g32@120x160 96-96k3s2g96@112x112",
    "depthwise c%16": "72-72k3g72@28x28 24-24k3g24@56x56 120-120k3g120@14x14",
    "depthwise 5x5": "240-240k5g240@28x28 480-480k5g480@14x14 96-96k5s2g96@28x28",
    "grouped": "128-128k3g2@28x28 256-256k3g8@14x14 240-240k1g3@28x28 480-480k1g8@14x14",
    "grouped, < 16 each": "128-128k3g32@56x56 256-256k3g32@28x28",
}
CONV_SPEC = re.compile(r"(\d+)-(\d+)k(\d)(?:s(\d))?(?:g(\d+))?(?:d(\d))?@(\d+)x(\d+)")


def conv_cases() -> Iterator[Case]:
    for cls, specs in CONV_CASES.items():
        for spec in specs.split():
            match = CONV_SPEC.fullmatch(spec)
            assert match
            cin, cout, k, s, g, d, h, w = (int(v or 1) for v in match.groups())

            def build(n: Net, shape: Shape = (1, cin, h, w), args: Shape = (cin, cout, k, s, g, d)) -> str:
                x = n.input(*shape)
                return n.conv(n.conv(x, shape[1], shape[1]) if shape[1] >= 16 else x, *args)

            work = -(-h // s) * -(-w // s) * cout * (1 if "depthwise" in cls else cin // g * k * k)
            yield Case("conv", cls, spec, work, build, last_conv)


def boundary_cases() -> Iterator[Case]:
    def into(n: Net, shape: Shape) -> str:
        n.quant = False
        x = n.conv(n.input(1, 16, *shape[1:]), 16, shape[0])
        n.quant = True
        return n.conv(n.qdq(x), shape[0], shape[0])

    def out(n: Net, shape: Shape) -> str:
        x = n.conv(n.input(1, 16, *shape[1:]), 16, shape[0])
        n.quant = False
        return n.conv(x, shape[0], shape[0])

    def plain(n: Net, shape: Shape) -> str:
        n.quant = False
        return n.node("Sqrt", n.qdq(n.node("Sqrt", n.input(*shape))[0]))[0]

    chains = {"float -> int8 conv": (into, between_convs), "int8 -> float conv": (out, between_convs)}
    pairs = {op: (plain, only(op)) for op in ("QuantizeLinear", "DequantizeLinear")}
    layouts = [(16, 120, 160), (32, 60, 80), (64, 56, 56), (64, 30, 40), (256, 14, 14), (128, 8, 10)]
    for table, shapes in ((chains, layouts), (pairs, [(1, 64, 384), (1, 128, 768), (1, 128, 3072), (1, 1, 768)])):
        for (cls, (build, pick)), shape in product(table.items(), shapes):
            chain = partial(build, shape=shape)
            yield Case("boundary", cls, "x".join(map(str, shape)), int(np.prod(shape)), chain, pick, ("int8",))


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
    "Resize nearest x2": ("Resize", {**NEAREST, "nearest_mode": "floor"}),  # the one that NCHWc has a kernel for
    "Resize nearest x2 default": ("Resize", NEAREST),
    "Resize linear x2": ("Resize", {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
}
BINARY = {"Add": 1.0, "Add + Relu": 1.0, "Mul": 1.0, "Concat equal scales": 1.0, "Concat other scales": 1.5}


def glue_cases() -> Iterator[Case]:
    def unary(n: Net, name: str, c: int, hw: int) -> str:
        op, attrs = UNARY[name]
        ins = [n.conv(n.input(1, c, hw, hw), c, c)]
        if op == "Resize":
            ins += ["", n.const(np.array([1, 1, 2, 2], np.float32))]
        return n.conv(n.op(op, *ins, **attrs)[0], c // 4 if op == "DepthToSpace" else c, c)

    def binary(n: Net, name: str, c: int, hw: int) -> str:
        x = n.input(1, c, hw, hw)
        joined = "Concat" in name
        ins = n.conv(x, c, c), n.conv(x, c, c)
        y = n.op(name.split()[0], *ins, scale=SCALE * BINARY[name], **({"axis": 1} if joined else {}))[0]
        y = n.node("Relu", y)[0] if "Relu" in name and not n.quant else y
        return n.conv(y, 2 * c if joined else c, c)

    def shuffle(n: Net, name: str, c: int, hw: int) -> str:
        x = n.conv(n.input(1, c, hw, hw), c, c)
        if name == "Split channels":
            return n.conv(n.op("Split", x, outs=2, axis=1)[0], c // 2, c)
        y = n.op("Reshape", x, n.const(np.array([1, 2, c // 2, hw, hw], np.int64)))[0]
        y = n.op("Transpose", y, perm=[0, 2, 1, 3, 4])[0]
        return n.conv(n.op("Reshape", y, n.const(np.array([1, c, hw, hw], np.int64)))[0], c, c)

    outputs = {"Resize": 4.0, "Concat": 2.0, "MaxPool": 0.25, "AveragePool": 0.25}  # per input element
    for names, build in (UNARY, unary), (BINARY, binary), (("channel shuffle", "Split channels"), shuffle):
        for name, (c, hw) in product(names, [(64, 56), (128, 28), (256, 14)]):
            work = c * hw * hw * outputs.get(name.split()[0], 1.0)
            yield Case("glue", name, f"{c}x{hw}x{hw}", work, partial(build, name=name, c=c, hw=hw), between_convs)


def matmul_cases() -> Iterator[Case]:
    def constant(n: Net, shape: Shape, requantize: bool) -> str:
        m, k, cols = shape
        y = n.node("MatMul", n.input(1, m, k), n.weight((k, cols), 1)[0])[0]
        return n.qdq(y) if requantize and n.quant else y

    def activations(n: Net, a: Shape, b: Shape) -> str:
        return n.op("MatMul", n.input(*a), n.input(*b))[0]

    sizes = [(64, 64), (256, 256), (384, 1536), (768, 768), (768, 3072), (3072, 768)]
    for (k, cols), m, requantize in product(sizes, (1, 4, 16, 64, 128, 384), (False, True)):
        cls = f"{'u8' if requantize else 'float'} out, {'M=1' if m == 1 else 'M>1'}"
        build = partial(constant, shape=(m, k, cols), requantize=requantize)
        yield Case("matmul", cls, f"{m}x{k}x{cols}", m * k * cols, build, matmuls)
    for heads, seq, dim in [(12, 64, 64), (12, 128, 64), (12, 384, 64), (6, 197, 64)]:
        for cls, (k, cols) in {"Q.K": (dim, seq), "P.V": (seq, dim)}.items():
            build = partial(activations, a=(1, heads, seq, k), b=(1, heads, k, cols))
            yield Case("matmul", cls, f"{heads}x{seq}x{k}x{cols}", heads * seq * k * cols, build, matmuls)


def profile(model: onnx.ModelProto, seconds: float) -> Nodes:
    """Operator and mean kernel time (us, fastest half of the second half of the runs) of each node, in order."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(1)
        types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
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
    result = []
    for op, durations in times.values():
        late = sorted(durations[len(durations) // 2 :])
        result.append((op, float(np.mean(late[: max(1, len(late) // 2)]))))
    return result


def fit(rows: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Overhead (us), work per ns and the median relative error of time = overhead + work / rate."""
    work, us = np.array(rows).T
    best = (0.0, 0.0, np.inf)
    for overhead in np.linspace(0, us.min(), 41):
        rate = 1 / max(1e-12, float(np.median((us - overhead) / work)))
        error = float(np.median(np.abs(overhead + work / rate - us) / us))
        best = min(best, (float(overhead), rate / 1e3, error), key=lambda b: b[2])
    return best


SECTIONS = {"conv": conv_cases, "boundary": boundary_cases, "glue": glue_cases, "matmul": matmul_cases}


@click.command()
@click.option("--only", "chosen", multiple=True, type=click.Choice(list(SECTIONS)), help="Sections, by default all.")
@click.option("--seconds", default=0.1, show_default=True, help="Time for each block of one model.")
@click.option("--blocks", default=3, show_default=True, help="Alternating blocks; the fastest counts.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the results as JSON.")
def main(chosen: tuple[str, ...], seconds: float, blocks: int, target: Path | None) -> None:
    """Time float and int8 kernels of ONNX Runtime on this machine, with one thread."""
    console = Console()
    cases = [case for name, make in SECTIONS.items() if not chosen or name in chosen for case in make()]
    table = Table("class", "case", "float us", "int8 us", "ratio", "float work/ns", "int8 work/ns", "int8 operators")
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for case in cases:
        models = {}
        for form in case.forms:
            net = Net(form == "int8")
            models[form] = net.model(case.build(net), drop_dq=form == "int8")
        for _ in range(blocks):
            for form, model in models.items():
                nodes = profile(model, seconds)
                case.us[form] = min(case.pick(nodes), case.us.get(form, np.inf))
                case.ops[form] = " ".join(op for op, _ in nodes)
        for form, us in case.us.items():
            groups.setdefault((case.section, case.cls, form), []).append((case.work, us))
        f, q = case.us.get("float", 0.0), case.us.get("int8", 0.0)
        speeds = [f"{case.work / t / 1e3:.2f}" if t else "-" for t in (f, q)]
        ratio = f"{f / q:.2f}" if f and q else "-"
        table.add_row(case.cls, case.name, f"{f:.1f}", f"{q:.1f}", ratio, *speeds, case.ops.get("int8", ""))
    fits = Table("section", "class", "form", "overhead us", "work per ns", "median error")
    summary = []
    for key, rows in groups.items():
        overhead, rate, error = fit(rows)
        fits.add_row(*key, f"{overhead:.1f}", f"{rate:.3g}", f"{error:.0%}")
        summary.append({"class": key, "overhead_us": overhead, "rate": rate, "error": error})
    console.print(table, fits)
    if target:
        keys = ("section", "cls", "name", "work", "us", "ops")
        host = {"machine": platform.machine(), "onnxruntime": ort.__version__, "threads": 1}
        rows_out = [{key: getattr(case, key) for key in keys} for case in cases]
        target.write_text(json.dumps({"host": host, "cases": rows_out, "fits": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
