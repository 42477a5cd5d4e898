"""Measure ONNX Runtime's GPU provider: products and convolutions in each numeric form, against float32.

    pip install "onnxruntime-gpu[cuda,cudnn]" && python tools/measure_gpu.py --json gpu.json

Inputs and outputs stay in the GPU's memory (I/O binding), the device is waited for once in a block of runs, and forms
take turns in blocks, so that what is timed is the kernel and what the runtime puts around it. Each row tells the
median time, how many times faster than float32 with TF32 that is, the largest error relative to the largest value of
the float64 product of the weights as they are stored, and the nodes that the provider did not take.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qgraph import blocks
from qgraph.formats import INT8, UINT2, UINT4
from qgraph.spec import PerBlock, QuantSpec

FORMATS = {2: QuantSpec(UINT2), 4: QuantSpec(UINT4), 8: QuantSpec(INT8, symmetric=True)}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
Model = tuple[onnx.ModelProto, NDArray[Any]]


def _cast(array: NDArray[Any], kind: str) -> NDArray[Any]:
    return array.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def _model(nodes: list[Any], constants: dict[str, NDArray[Any]], kind: str, *shapes: Any) -> onnx.ModelProto:
    """From x to y. numpy has no bfloat16, so that one is cast at both ends, which is part of its time."""
    ends = "float32" if kind == "bfloat16" else kind
    x, y = "x", "y"
    if ends != kind:
        x, y = "x_float", "y_float"
        nodes = [
            helper.make_node("Cast", [x], ["x"], to=TYPES[kind]),
            *nodes,
            helper.make_node("Cast", ["y"], [y], to=TYPES[ends]),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(x, TYPES[ends], shapes[0])],
        [helper.make_tensor_value_info(y, TYPES[ends], shapes[1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def plain(rows: int, weight: NDArray[Any], kind: str) -> Model:
    """MatMul of `kind`."""
    stored = _cast(weight, kind)
    model = _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": stored},
        kind,
        [rows, len(weight)],
        [rows, weight.shape[1]],
    )
    return model, stored.astype(np.float64)


def in_blocks(rows: int, weight: NDArray[Any], kind: str, bits: int, size: int, level: int = 0) -> Model:
    """MatMulNBits of activations of `kind`."""
    spec = FORMATS[bits]
    made = blocks.nearest(weight, QuantSpec(spec.format, PerBlock(0, size), symmetric=spec.symmetric))
    constants: dict[str, NDArray[Any]] = {"q": made.codes, "s": _cast(made.scale, kind)}
    if made.zero_point is not None:
        constants["z"] = made.zero_point
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=weight.shape[0], N=weight.shape[1],
        bits=bits, block_size=size, accuracy_level=level,
    )  # fmt: skip
    return _model([node], constants, kind, [rows, len(weight)], [rows, weight.shape[1]]), made.real.T.astype(np.float64)


def dequantized(rows: int, weight: NDArray[Any], kind: str, form: str) -> Model:
    """DequantizeLinear of a weight per channel before a MatMul; in int8 also the activation, as TensorRT reads it."""
    stored: NDArray[Any]
    if form == "fp8":
        scale = np.abs(weight).max(0) / 448
        stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    else:
        scale = np.abs(weight).max(0) / 127
        stored = np.rint(weight / scale).astype(np.int8)
    real = stored.astype(np.float64) * scale
    constants: dict[str, NDArray[Any]] = {"q": stored, "s": _cast(scale, kind)}
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1)]
    source = "x"
    if form == "int8 qdq":
        constants |= {"xs": _cast(np.asarray(4 / 127), kind), "xz": np.int8(0) * np.ones((), np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        ]
        source = "xd"
    nodes.append(helper.make_node("MatMul", [source, "w"], ["y"]))
    return _model(nodes, constants, kind, [rows, len(weight)], [rows, weight.shape[1]]), real


def dynamic(rows: int, weight: NDArray[Any]) -> Model:
    """DynamicQuantizeLinear and MatMulInteger."""
    scale = float(np.abs(weight).max() / 127)
    stored = np.rint(weight / scale).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "q", "xz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["t"]),
        helper.make_node("Mul", ["f", "t"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {"q": stored, "s": np.asarray(scale, np.float32)}
    return _model(nodes, constants, "float32", [rows, len(weight)], [rows, weight.shape[1]]), stored * scale


def convolution(weight: NDArray[Any], size: int, kind: str, groups: int, integers: bool = False) -> Model:
    """Conv over [8, channels, size, size]."""
    shape = [8, weight.shape[1] * groups, size, size]
    stored = _cast(weight, kind)
    constants: dict[str, NDArray[Any]] = {"w": stored}
    nodes = []
    if integers:
        scale = np.abs(weight).max((1, 2, 3)) / 127
        constants = {"q": np.rint(weight / scale[:, None, None, None]).astype(np.int8), "s": _cast(scale, kind)}
        nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0)]
    pad = weight.shape[2] // 2
    nodes.append(helper.make_node("Conv", ["x", "w"], ["y"], group=groups, pads=[pad] * 4))
    return _model(nodes, constants, kind, shape, [8, len(weight), size, size]), np.empty(0)


def products(rows: int, inner: int, columns: int) -> Iterator[tuple[str, Callable[[], Model], str, dict[str, str]]]:
    """(form, how to build it, type of the activations, provider options)."""
    weight = (np.random.default_rng(0).standard_normal((inner, columns)) / np.sqrt(inner)).astype(np.float32)
    yield "float32", lambda: plain(rows, weight, "float32"), "float32", {}
    yield "float32, no TF32", lambda: plain(rows, weight, "float32"), "float32", {"use_tf32": "0"}
    for kind in ("float16", "bfloat16"):
        yield kind, lambda kind=kind: plain(rows, weight, kind), kind, {}
    for bits, size in ((2, 128), (4, 16), (4, 32), (4, 64), (4, 128), (8, 32), (8, 128)):
        yield (
            f"{bits} bits, block {size}",
            lambda b=bits, s=size: in_blocks(rows, weight, "float16", b, s),
            "float16",
            {},
        )
    yield "4 bits, block 32, level 4", lambda: in_blocks(rows, weight, "float16", 4, 32, 4), "float16", {}
    yield "4 bits, block 32, float32", lambda: in_blocks(rows, weight, "float32", 4, 32), "float32", {}
    yield "4 bits, block 32, bfloat16", lambda: in_blocks(rows, weight, "bfloat16", 4, 32), "bfloat16", {}
    for form in ("int8 weights", "int8 qdq", "fp8"):
        yield form, lambda form=form: dequantized(rows, weight, "float16", form), "float16", {}
    yield "int8 dynamic", lambda: dynamic(rows, weight), "float32", {}


def convolutions(
    channels: int, out: int, size: int, taps: int, groups: int
) -> Iterator[tuple[str, Callable[[], Model], str, dict[str, str]]]:
    """The same for convolutions."""
    shape = (out, channels // groups, taps, taps)
    weight = (np.random.default_rng(0).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    nhwc = {"prefer_nhwc": "1"}
    for kind in ("float32", "float16"):
        yield kind, lambda kind=kind: convolution(weight, size, kind, groups), kind, {}
        yield f"{kind}, NHWC", lambda kind=kind: convolution(weight, size, kind, groups), kind, nhwc
    yield "int8 weights", lambda: convolution(weight, size, "float16", groups, True), "float16", {}


class Timed:
    """One form in a session of its own, its input on the device."""

    def __init__(self, provider: str, model: onnx.ModelProto, feed: NDArray[Any], options: dict[str, str]):
        self.model, self.provider, self.options = model.SerializeToString(), provider, options
        self.session = self._session(ort.SessionOptions())
        device = "cpu" if provider == "CPUExecutionProvider" else "cuda"
        self.feed = {model.graph.input[0].name: feed}
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input(model.graph.input[0].name, ort.OrtValue.ortvalue_from_numpy(feed, device, 0))
        self.binding.bind_output(model.graph.output[0].name, device)
        for _ in range(3):
            self.session.run_with_iobinding(self.binding)

    def _session(self, settings: ort.SessionOptions) -> Any:
        return ort.InferenceSession(self.model, settings, providers=[(self.provider, self.options)], enable_fallback=0)

    def block(self, runs: int) -> float:
        """Mean seconds of a run in a block."""
        self.binding.synchronize_inputs()
        start = time.perf_counter()
        for _ in range(runs):
            self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return (time.perf_counter() - start) / runs

    def output(self) -> NDArray[Any]:
        """What it computes, as float64."""
        return self.binding.get_outputs()[0].numpy().astype(np.float64)

    def elsewhere(self) -> list[str]:
        """Operators that another provider ran."""
        with tempfile.TemporaryDirectory() as folder:
            settings = ort.SessionOptions()
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "p")
            session = self._session(settings)
            session.run(None, self.feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [event["args"] for event in events if event.get("cat") == "Node"]
        return sorted({args["op_name"] for args in nodes if args.get("provider") not in (self.provider, None)})


def measure(provider: str, cases: Any, feed: NDArray[Any], blocks_each: int) -> list[dict[str, Any]]:
    """All forms of one case, in turns."""
    live: dict[str, tuple[Timed, NDArray[Any]]] = {}
    rows: list[dict[str, Any]] = []
    for form, build, kind, options in cases:
        model, real = build()
        try:
            live[form] = (
                Timed(provider, model, feed.astype("float16" if kind == "float16" else "float32"), options),
                real,
            )
        except Exception as error:
            rows.append({"form": form, "failed": str(error).splitlines()[0][:160]})
    times: dict[str, list[float]] = {form: [] for form in live}
    for _ in range(blocks_each):
        for form, (timed, _) in live.items():
            times[form].append(timed.block(30))
    base = float(np.median(times["float32"]))
    for form, (timed, real) in live.items():
        row: dict[str, Any] = {"form": form, "us": 1e6 * float(np.median(times[form]))}
        row["ratio"] = base / float(np.median(times[form]))
        found = timed.output()
        if found.size and real.size:
            expected = feed.astype(np.float64) @ real
            row["error"] = float(np.abs(found - expected).max() / np.abs(expected).max())
        row["elsewhere"] = timed.elsewhere()
        rows.append(row)
    return rows


@click.command()
@click.option("--provider", default="CUDAExecutionProvider", show_default=True)
@click.option("--blocks", "count", default=7, show_default=True, help="Blocks of 30 runs for each form.")
@click.option("--quick", is_flag=True, help="Small sizes only, to see that it runs.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write all rows.")
def main(provider: str, count: int, quick: bool, path: Path | None) -> None:
    """Measure every case and print a table."""
    ort.set_default_logger_severity(3)
    ort.preload_dlls() if hasattr(ort, "preload_dlls") else None
    found: dict[str, list[dict[str, Any]]] = {}
    random = np.random.default_rng(1)
    sizes = ((256, 256),) if quick else ((1024, 1024), (4096, 4096), (4096, 11008))
    for inner, columns in sizes:
        for rows in (1, 16) if quick else (1, 16, 128, 1024):
            feed = random.standard_normal((rows, inner)).astype(np.float32).clip(-4, 4)
            name = f"product {rows} x {inner} x {columns}"
            found[name] = measure(provider, products(rows, inner, columns), feed, count)
    for channels, out, size, taps, groups in ((64, 64, 56, 3, 1), (256, 256, 14, 3, 1), (256, 1024, 14, 1, 1),
                                              (144, 144, 56, 3, 144)):  # fmt: skip
        if quick:
            break
        feed = random.standard_normal((8, channels, size, size)).astype(np.float32)
        name = f"convolution {taps}x{taps} {channels} to {out} in {groups} groups at {size}"
        found[name] = measure(provider, convolutions(channels, out, size, taps, groups), feed, count)
    for name, rows_of in found.items():
        click.echo(name)
        for row in rows_of:
            if "failed" in row:
                click.echo(f"  {row['form']:28} {row['failed']}")
            else:
                error = f"{row['error']:.1e}" if "error" in row else "-"
                told = f"{row['us']:9.1f} us {row['ratio']:6.2f}x  error {error}  {row['elsewhere'] or ''}"
                click.echo(f"  {row['form']:28} {told}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
